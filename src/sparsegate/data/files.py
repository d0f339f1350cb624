"""Files that are complete or absent: sealed JSON, and directories that appear at once."""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)

MAX_JSON_BYTES = 64 << 20
TEMPORARY = ".tmp-"
_LOCK = ".lock"
_KEY = re.compile("[0-9a-f]{16}")
_SEAL = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')


def sealed(payload: Mapping[str, Any]) -> bytes:
    """`payload` as JSON whose last key, ``sha256``, is the digest of every byte that stands before it.

    ValueError if it is larger than what `read_sealed` reads.
    """
    assert payload
    assert "sha256" not in payload
    body = _json(payload, "\n").encode().removesuffix(b"\n}")
    if len(body) > MAX_JSON_BYTES - 100:
        raise ValueError(
            f"{len(body):,} bytes of JSON, more than {MAX_JSON_BYTES:,}; set a smaller vocabulary_size"
        )
    return body + f',\n  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _json(value: Any, line_end: str) -> str:
    """JSON with a line for each key of an object; each list is in one line, which is fast."""
    if not isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    inner = line_end + "  "
    entries = (
        f"{json.dumps(key, ensure_ascii=False)}: {_json(entry, inner)}" for key, entry in value.items()
    )
    return "{" + ",".join(inner + entry for entry in entries) + line_end + "}"


def read_sealed(path: Path, model: type[Model], *, max_bytes: int = MAX_JSON_BYTES) -> Model:
    """Read what `sealed` wrote; ValueError where a byte differs or a field does not fit `model`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(
            f"{path}: {size:,} bytes, more than max_bytes ({max_bytes:,}); is it the right file?"
        )
    content = path.read_bytes()
    seal = _SEAL.search(content)
    if seal is None:
        raise ValueError(f"{path}: incomplete, or not written by this package; restore it, or make it again")
    body = content[: seal.start()]
    if hashlib.sha256(body).hexdigest() != seal[1].decode():
        raise ValueError(f"{path}: damaged (its sha256 does not fit); restore it, or make it again")
    try:
        return model.model_validate_json(body + b"\n}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise ValueError(f"{path}: {field}: {' '.join(first['msg'].split())}; make it again") from None


def fsync(path: Path) -> None:
    """Bring a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError in the block comes out with `path` and a cure."""
    try:
        yield
    except OSError as error:
        problem = f"cannot write ({error.strerror}); free space, or choose another disk"
        raise OSError(error.errno, problem, str(path)) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, which holds the old content or the new one, whatever happens."""
    temporary = _temporary_beside(path)
    try:
        with writing(path), temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def new_directory(target: Path, *, key: str) -> Iterator[Path]:
    """A temporary directory beside `target` that becomes `target` when the block ends without an error.

    `target` must not exist or be an empty directory: FileExistsError otherwise, and also where another
    process is at work on it, whatever its key. After an error nothing is left. What a process left that was
    killed or interrupted, or whose child was killed (ChildProcessError), is the directory of the next with
    the same `key`, of 16 hexadecimal digits; of other keys it is removed.
    """
    assert _KEY.fullmatch(key)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{key}")
    with _locked(target) as lock:
        _remove_what_the_dead_left(target, but=temporary)
        try:
            temporary.mkdir(exist_ok=True)
            yield temporary
            fsync(temporary)
            refuse_existing(target)
            temporary.rename(target)
        except ChildProcessError:
            raise
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.unlink(missing_ok=True)
            raise
        lock.unlink(missing_ok=True)
    fsync(target.parent)


@contextmanager
def _locked(target: Path) -> Iterator[Path]:
    """Holds the lock of `target`, a file beside it. The lock ends with the process, the file stays."""
    path = target.with_name(f"{TEMPORARY}{target.name}{_LOCK}")
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                cure = "wait for it, or end it"
                raise FileExistsError(f"{target}: another process is making it; {cure}") from None
            # The one that held it may have removed the file since it was opened here.
            if _stands_at(lock, path):
                yield path
                return


def _stands_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_what_the_dead_left(target: Path, *, but: Path) -> None:
    """Remove the directories of other keys. Who holds the lock of `target` knows that they are nobody's."""
    name = re.compile(f"{re.escape(TEMPORARY + target.name)}-{_KEY.pattern}")
    for path in sorted(target.parent.iterdir()):
        if path != but and name.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """FileExistsError in one line unless `target` is absent or an empty directory."""
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        cure = "choose another, or remove it"
        raise FileExistsError(f"{target}: exists already and is not an empty directory; {cure}")


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
