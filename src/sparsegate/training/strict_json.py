"""JSON with one meaning: finite numbers, unique keys, bounded size and depth, nothing converted."""

import json
import math
import reprlib
from typing import NoReturn, TypeAlias, TypeGuard

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

MAX_JSON_BYTES = 8 << 20  # of the worst text, this makes 0.2 GB of objects
MAX_JSON_DEPTH = 64


def to_json_bytes(value: object, *, name: str, indent: int | None = None) -> bytes:
    """ASCII JSON that `parse_json` reads back as an equal value, keys in the given order.

    Raises:
        ValueError: naming the entry (`state.curve[3]`) that JSON cannot hold exactly.
    """
    _check_exact(value, name, depth=0)
    data = json.dumps(value, allow_nan=False, indent=indent).encode("ascii")
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(
            f"{name} ({len(data):,} bytes of JSON) must not exceed {MAX_JSON_BYTES:,}; use tensors"
        )
    return data


def parse_json(data: bytes | bytearray) -> Json:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: one line, without the file's name, which the caller knows.
    """
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{len(data):,} bytes of JSON, more than the limit of {MAX_JSON_BYTES:,}")
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_float=_finite_float,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def is_count(value: Json) -> TypeGuard[int]:
    """An integer of 0 or more; true and false are none."""
    return type(value) is int and value >= 0


def _check_exact(value: object, name: str, depth: int) -> None:
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"{name[:100]} is nested more than {MAX_JSON_DEPTH} deep or in itself; flatten it")
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {key!r}, which JSON would turn into text; use str(key)")
            _check_exact(entry, f"{name}.{key}", depth + 1)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _check_exact(entry, f"{name}[{index}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, which JSON cannot hold; leave it out or store None")
    elif value is not None and not isinstance(value, bool | int | float | str):
        kind = type(value).__name__
        raise ValueError(f"{name} is a {kind}, which JSON cannot hold; use plain values, lists and dicts")


def _unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one JSON object")
    return result


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {reprlib.repr(text)} is too large")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
