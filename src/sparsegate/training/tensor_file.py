"""The safetensors format as a stream: written without a second copy in memory, read once while it is hashed.

The safetensors library takes whole files, whose bytes would have to be read a second time for their digest.
The format is a header (8 bytes of length, then JSON of names, dtypes, shapes and offsets) and the tensors'
bytes. Any safetensors reader opens these files; the reader here takes a subset of what the library takes.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from .strict_json import MAX_JSON_BYTES, Json, is_count, parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_ALIGNMENT = 8

# What a file holds, on the meta device, to what of it is read into tensors that are there.
Targets = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

assert sys.byteorder == "little", "safetensors is little-endian, and tensors go out as they lie in memory"


class Reader(Protocol):
    """What `read_tensors` reads from: `size` bytes in all, at the beginning."""

    size: int

    def read(self, count: int) -> bytearray: ...

    def read_into(self, buffer: memoryview) -> None: ...


@dataclass(frozen=True)
class EncodedTensors:
    """A safetensors file before it is written: its header, and its tensors in the order of their bytes."""

    header: bytes
    tensors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The file's bytes. Tensors on a device are copied to memory one at a time."""
        yield self.header
        for tensor in self.tensors:
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            yield _bytes_of(plain).numpy().data


def encode_tensors(
    tensors: Mapping[str, Tensor], *, name: str, metadata: Mapping[str, str] | None = None
) -> EncodedTensors:
    """Lay out `tensors` as one file; nothing is copied or written yet.

    Raises:
        ValueError: naming the tensor (`name` and its own) that the format cannot hold.
    """
    for key, tensor in tensors.items():
        _check_tensor(key, tensor, name)
    # Larger items first, so that every tensor begins at a multiple of its item size.
    order = sorted(tensors, key=lambda key: -tensors[key].element_size())
    offsets, end = {}, 0
    for key in order:
        begin, end = end, end + tensors[key].nbytes
        offsets[key] = [begin, end]
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    for key, tensor in tensors.items():
        dtype, shape = _DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets[key]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(
            f"{name}: the header is over {MAX_JSON_BYTES:,} bytes ({len(tensors):,} tensors); stack them"
        )
    return EncodedTensors(len(text).to_bytes(8, "little") + text, tuple(tensors[key] for key in order))


def read_tensors(reader: Reader, targets: Targets | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, each in memory of its own; and its metadata.

    targets: is told what the file holds before any of it is read, as tensors of the meta device, and answers
    with tensors to read into instead, by name, of the same shapes and of any device and dtype. One that lies
    as the file's does takes its bytes directly; another costs a copy, of this tensor alone.

    Raises:
        ValueError: one line, without the file's name, which the caller knows. Targets may have been written.
    """
    length = int.from_bytes(reader.read(8), "little")
    if length > min(MAX_JSON_BYTES, reader.size - 8):
        raise ValueError(
            f"a header of {length:,} bytes does not fit: not a safetensors file, or a truncated one"
        )
    header = parse_json(reader.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = _parse_metadata(header.pop(_METADATA, {}))
    regions = {key: _Region.parse(key, entry) for key, entry in header.items()}
    order = sorted(regions, key=lambda key: (regions[key].begin, regions[key].end))
    _check_tiling([regions[key] for key in order], reader.size - 8 - length)
    given = {} if targets is None else targets({key: regions[key].allocate("meta") for key in regions})
    # Only then, so that one that cannot be made is found before any is written.
    tensors = {key: given[key] if key in given else regions[key].allocate("cpu") for key in regions}
    for key in order:
        target, region = tensors[key].detach(), regions[key]
        lies_so = target.device.type == "cpu" and target.is_contiguous() and target.dtype == region.dtype
        plain = target if lies_so else region.allocate("cpu")
        view = _bytes_of(plain)
        reader.read_into(view.numpy().data)
        if plain.dtype == torch.bool and bool((view > 1).any()):
            raise ValueError(f"tensor {short_repr(key)} of truth values holds bytes other than 0 and 1")
        if plain is not target:
            target.copy_(plain)
    return tensors, metadata


@dataclass(frozen=True)
class _Region:
    """Where one tensor lies: bytes [begin, end) after the header."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int

    @classmethod
    def parse(cls, name: str, entry: Json) -> "_Region":
        where = f"tensor {short_repr(name)}"
        match entry:
            case {"dtype": str(dtype), "shape": shape, "data_offsets": [begin, end], **rest} if not rest:
                pass
            case _:
                raise ValueError(f"{where} does not have a dtype, a shape and data_offsets in the header")
        if not name.isprintable() or dtype not in DTYPES:
            raise ValueError(f"{where} has an unprintable name or the unknown dtype {short_repr(dtype)}")
        if not _are_counts(shape) or not is_count(begin) or not is_count(end):
            raise ValueError(f"{where} has a shape or data_offsets that are not counts")
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{where} of shape {short_repr(shape)} does not fill bytes {begin} to {end}")
        return cls(name, DTYPES[dtype], shape, begin, end)

    def allocate(self, device: str) -> Tensor:
        try:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        except (RuntimeError, TypeError, OverflowError):
            where = f"tensor {short_repr(self.name)}"
            raise ValueError(f"{where} of shape {short_repr(self.shape)} cannot be made") from None


def _check_tensor(key: object, tensor: object, name: str) -> None:
    where = f"{name}: tensor {short_repr(key)}"
    if not isinstance(key, str) or not key.isprintable() or key == _METADATA:
        raise ValueError(f"{where} needs a name of printable characters other than {_METADATA}; rename it")
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{where} is a {type(tensor).__name__}; make it a tensor, or put it into the state")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{where} is {tensor.layout} on {tensor.device}; make it dense, with values")
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"{where} is {tensor.dtype}, which safetensors cannot hold; convert it")


def _parse_metadata(value: Json) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("the header's metadata is not a JSON object")
    metadata = {key: text for key, text in value.items() if isinstance(text, str)}
    if len(metadata) != len(value):
        raise ValueError("the header's metadata is not all text")
    return metadata


def _check_tiling(regions: list[_Region], size: int) -> None:
    end = 0
    for region in regions:
        if region.begin != end:
            raise ValueError(
                f"tensor {short_repr(region.name)} begins at byte {region.begin} instead of {end}"
            )
        end = region.end
    if end != size:
        raise ValueError(f"{size:,} bytes of tensors, where the header tells of {end:,}: truncated or padded")


def _are_counts(value: Json) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(is_count(entry) for entry in value)


def _bytes_of(tensor: Tensor) -> Tensor:
    # Not reshape: a contiguous tensor of one element may have any stride, which `view` to bytes refuses.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
