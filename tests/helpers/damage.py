"""What bit rot, bad copies and careless tools do to a file."""

import random
from collections.abc import Callable, Iterator

Damage = Callable[[bytes, random.Random], bytes]


def flip(data: bytes, position: int, mask: int) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


def flip_in(begin: float, end: float, bit: int) -> Damage:
    """One bit, somewhere between two parts of the file."""

    def damage(data: bytes, choose: random.Random) -> bytes:
        low = int(begin * len(data))
        return flip(data, choose.randrange(low, max(low + 1, int(end * len(data)))), 1 << bit)

    return damage


def block(make: Callable[[bytes, random.Random], bytes]) -> Damage:
    """One stretch of the file becomes something else."""

    def damage(data: bytes, choose: random.Random) -> bytes:
        begin = choose.randrange(len(data))
        end = min(len(data), begin + choose.choice([1, 2, 8, 64, 512]))
        return data[:begin] + make(data[begin:end], choose) + data[end:]

    return damage


def replace_byte(old: bytes, new: bytes) -> Damage:
    """One of the places where `old` stands, for damage that keeps JSON valid."""

    def damage(data: bytes, choose: random.Random) -> bytes:
        places = [position for position in range(len(data)) if data[position : position + 1] == old]
        if not places:
            return flip(data, choose.randrange(len(data)), 255)
        position = choose.choice(places)
        return data[:position] + new + data[position + 1 :]

    return damage


CLASSES: dict[str, Damage] = {
    **{f"bit {bit} of the first byte": flip_in(0, 0, bit) for bit in range(8)},
    **{f"bit {bit} in the first tenth": flip_in(0, 0.1, bit) for bit in range(8)},
    **{f"bit {bit} in the middle": flip_in(0.1, 0.9, bit) for bit in range(8)},
    **{f"bit {bit} in the last tenth": flip_in(0.9, 1, bit) for bit in range(8)},
    "emptied": lambda data, choose: b"",
    "all zeros": lambda data, choose: bytes(len(data)),
    "cut": lambda data, choose: data[: choose.randrange(len(data))],
    "last byte lost": lambda data, choose: data[:-1],
    "first byte lost": lambda data, choose: data[1:],
    "a byte more": lambda data, choose: data + bytes([choose.randrange(256)]),
    "twice": lambda data, choose: data + data,
    "a block of zeros": block(lambda old, choose: bytes(len(old))),
    "a block of noise": block(lambda old, choose: choose.randbytes(len(old))),
    "a block lost": block(lambda old, choose: b""),
    "a block twice": block(lambda old, choose: old + old),
    "a block reversed": block(lambda old, choose: old[::-1]),
    "a byte inserted": block(lambda old, choose: bytes([choose.randrange(256)]) + old),
    "a digit changed": replace_byte(b"1", b"2"),
    "a letter changed": replace_byte(b"e", b"a"),
    "a space doubled": replace_byte(b" ", b"  "),
    "a comma lost": replace_byte(b",", b" "),
    "line ends changed": lambda data, choose: data.replace(b"\n", b"\r\n"),
    "read as text": lambda data, choose: data.decode("latin-1").encode("utf-8"),
    "upper case": lambda data, choose: data.upper(),
}


def damages(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` damaged forms of a file, from each class in turn; the same each time."""
    choose, found = random.Random(0), 0
    while found < count:
        for name, damage in CLASSES.items():
            damaged = damage(data, choose)
            if damaged != data and found < count:
                found += 1
                yield f"{name} ({found})", damaged
