"""Weights to give away: one safetensors file, with a digest of its content in its own metadata."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .storage import read_file, write_file_atomically
from .tensor_file import EncodedTensors, encode_tensors, read_tensors

_DIGEST = "sha256"


def export_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata` to `path`, or replace the file whole.

    Raises:
        ValueError: naming the tensor that the format cannot hold; nothing has been written.
        CannotSave: `path` is as it was.
    """
    digest = _digest(encode_tensors(tensors, name=path.name, metadata=metadata))
    encoded = encode_tensors(tensors, name=path.name, metadata={**metadata, _DIGEST: digest})
    write_file_atomically(path, encoded.chunks(), size=encoded.size)


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata that `export_weights` wrote, once their digest is verified.

    Raises:
        ValueError: one line that names the file, what is wrong with it, and the cure.
    """
    tensors, metadata = read_file(path, read_tensors)
    expected = metadata.pop(_DIGEST, None)
    found = _digest(encode_tensors(tensors, name=path.name, metadata=metadata))
    if found != expected:
        raise ValueError(f"{path}: damaged: the SHA-256 is {found} instead of {expected}; get the file again")
    return tensors, metadata


def _digest(encoded: EncodedTensors) -> str:
    sha256 = hashlib.sha256()
    for chunk in encoded.chunks():
        sha256.update(chunk)
    return sha256.hexdigest()
