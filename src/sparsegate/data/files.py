"""Files that are complete or absent: sealed JSON, and directories that appear at once."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)

MAX_JSON_BYTES = 64 << 20
_SEAL = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')


def sealed(payload: Mapping[str, Any]) -> bytes:
    """`payload` as JSON whose last key, ``sha256``, is the digest of every byte that stands before it.

    ValueError if it is larger than what `read_sealed` reads.
    """
    assert payload
    assert "sha256" not in payload
    body = json.dumps(payload, ensure_ascii=False, indent=2).encode().removesuffix(b"\n}")
    if len(body) > MAX_JSON_BYTES - 100:
        raise ValueError(
            f"{len(body):,} bytes of JSON, more than {MAX_JSON_BYTES:,}; set a smaller vocabulary_size"
        )
    return body + f',\n  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def read_sealed(path: Path, model: type[Model], *, max_bytes: int = MAX_JSON_BYTES) -> Model:
    """Read what `sealed` wrote; ValueError where a byte differs or a field does not fit `model`."""
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(
            f"{path}: {size:,} bytes, more than max_bytes ({max_bytes:,}); is it the right file?"
        )
    content = path.read_bytes()
    seal = _SEAL.search(content)
    if seal is None:
        raise ValueError(f"{path}: incomplete, or not written by this package; prepare the dataset again")
    body = content[: seal.start()]
    if hashlib.sha256(body).hexdigest() != seal[1].decode():
        raise ValueError(
            f"{path}: damaged (its sha256 does not fit); restore it or prepare the dataset again"
        )
    try:
        return model.model_validate_json(body + b"\n}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise ValueError(
            f"{path}: {field}: {' '.join(first['msg'].split())}; prepare the dataset again"
        ) from None


def fsync(path: Path) -> None:
    """Bring a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, which holds the old content or the new one, whatever happens."""
    descriptor, name = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that becomes `target` when the block ends without an error.

    `target` must not exist or be an empty directory: FileExistsError otherwise. After an error nothing is
    left; what a killed process left beside `target` is removed first (a directory still in use is locked, and
    is left alone).
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".tmp-{target.name}-"
    for stale in target.parent.glob(f"{prefix}*"):
        _remove_if_unused(stale)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield temporary
        temporary.chmod(0o755)
        fsync(temporary)
        refuse_existing(target)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    fsync(target.parent)


def refuse_existing(target: Path) -> None:
    """FileExistsError in one line unless `target` is absent or an empty directory."""
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise FileExistsError(
            f"{target}: exists already and is not an empty directory; choose another or remove it"
        )


def _remove_if_unused(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
