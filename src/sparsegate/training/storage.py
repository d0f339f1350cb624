"""Files and directories that appear whole or not at all, also when the process is killed or the power fails.

Everything is written under a name that begins with `.tmp-`, beside its target so that both are on one
filesystem. The files, then the directory that holds them, are flushed to the disk (fsync), one rename makes
the target, and the rename itself is flushed with the directory above.
"""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .strict_json import MAX_JSON_BYTES, Json, parse_json, to_json_bytes

UNFINISHED = ".tmp-"  # being written
RETIRED = ".old-"  # being deleted
REPLACED = ".replaced-"  # whole: what stood in a target's place, until the new one is on the disk

_CHUNK = 1 << 24
_Value = TypeVar("_Value")


class CannotSave(OSError):
    """The disk refused a save (full, failing, read-only). What was saved before is untouched."""

    def __init__(self, path: Path, *, needed: int, cause: OSError) -> None:
        self.path, self.needed, self.free = path, needed, _free_bytes(path)
        free = "unknown" if self.free is None else f"{self.free:,}"
        super().__init__(
            f"{path}: cannot save: {cause.strerror or cause} ({needed:,} bytes needed, {free} free); "
            "what was saved before is intact: make room or choose another folder, then resume"
        )


@dataclass(frozen=True)
class FileDigest:
    """What a file must be: its size in bytes, and the SHA-256 of its content in hexadecimal digits."""

    size: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileDigest:
    """Create `path`, which must not exist, and flush it to the disk; its digest is taken on the way."""
    sha256, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            for start in range(0, len(view), _CHUNK):
                piece = view[start : start + _CHUNK]
                sha256.update(piece)
                size += len(piece)
                while piece:
                    piece = piece[os.write(descriptor, piece) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileDigest(size, sha256.hexdigest())


def write_file_atomically(path: Path, chunks: Iterable[bytes | memoryview], *, size: int) -> None:
    """Write `path`, or replace it whole. `size` is for the message alone.

    Raises:
        CannotSave: `path` is whole, with its old content unless it was the very last flush that failed.
    """
    temporary = path.with_name(UNFINISHED + path.name)
    try:
        remove(temporary)
        try:
            write_file(temporary, chunks)
            os.replace(temporary, path)
        finally:
            remove(temporary)
        fsync_directory(path.parent)
    except OSError as error:
        raise CannotSave(path, needed=size, cause=error) from error


def write_json_atomically(path: Path, value: Json) -> None:
    """Write `value` to `path` as indented JSON, or replace the file whole.

    Raises:
        ValueError: naming the entry that JSON cannot hold exactly.
        CannotSave: as `write_file_atomically` does.
    """
    data = to_json_bytes(value, name=path.name, indent=2) + b"\n"
    write_file_atomically(path, [data], size=len(data))


@contextmanager
def directory_atomically(target: Path) -> Iterator[Path]:
    """A directory to write files into: it becomes `target` when the block ends, and goes if the block fails.

    A target that stands there already is kept under `.replaced-` and its name; the caller deletes it.
    """
    temporary = target.with_name(UNFINISHED + target.name)
    try:
        remove(temporary)
        os.mkdir(temporary)
        yield temporary
        fsync_directory(temporary)
        _publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def make_directory(path: Path) -> None:
    """Create `path` and what is missing above it, and flush each to the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        os.mkdir(path)
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def retire(path: Path) -> None:
    """Delete a directory so that nobody ever takes a half-deleted one for a whole one."""
    retired = path.with_name(RETIRED + path.name)
    remove(retired)
    os.rename(path, retired)
    remove(retired)


def remove(path: Path) -> None:
    """Delete a file, a link or a directory with all in it; no error if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(directory: Path, *prefixes: str) -> None:
    """Delete what a killed writer left in `directory` under one of the prefixes."""
    for name in os.listdir(directory):
        if name.startswith(prefixes):
            remove(directory / name)


class FileReader:
    """A regular file, read once from its beginning while its digest is computed."""

    def __init__(self, descriptor: int) -> None:
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._sha256 = hashlib.sha256()

    def read(self, count: int) -> bytearray:
        """Exactly `count` bytes; ValueError if the file ends before."""
        data = bytearray(count)
        self.read_into(memoryview(data))
        return data

    def read_into(self, buffer: memoryview) -> None:
        """Fill `buffer`, which is of bytes; ValueError if the file ends before."""
        while buffer:
            count = os.readv(self._descriptor, [buffer[:_CHUNK]])
            if count == 0:
                raise ValueError("the file ends too early")
            self._sha256.update(buffer[:count])
            buffer = buffer[count:]

    def finish(self) -> FileDigest:
        """Read to the end; the digest of what was read in all."""
        buffer = memoryview(bytearray(min(_CHUNK, self.size)))
        while count := os.readv(self._descriptor, [buffer]):
            self._sha256.update(buffer[:count])
        return FileDigest(self.size, self._sha256.hexdigest())


def read_file(
    path: Path, parse: Callable[[FileReader], _Value], *, expected: FileDigest | None = None
) -> _Value:
    """What `parse` makes of the file, given out only if the very bytes that it read have the expected digest.

    Raises:
        ValueError: one line that names the file: missing, damaged, not a file, or what `parse` found wrong.
    """
    with _open_regular(path) as reader:
        if expected is not None and reader.size != expected.size:
            raise ValueError(f"damaged: {reader.size:,} bytes instead of {expected.size:,}")
        try:
            return parse(reader)
        finally:
            # Damage is told before what `parse` makes of it.
            if expected is not None and (found := reader.finish()) != expected:
                raise ValueError(f"damaged: its SHA-256 is {found.sha256} instead of {expected.sha256}")


def read_json(path: Path, *, expected: FileDigest | None = None) -> Json:
    """The value in a JSON file.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    return read_file(path, lambda reader: parse_json(read_small(reader)), expected=expected)


def read_small(reader: FileReader) -> bytearray:
    """The whole file, which must not exceed what any JSON file of ours holds."""
    if reader.size > MAX_JSON_BYTES:
        raise ValueError(f"{reader.size:,} bytes, more than the limit of {MAX_JSON_BYTES:,}")
    return reader.read(reader.size)


@contextmanager
def _open_regular(path: Path) -> Iterator[FileReader]:
    """Adds the path to every error, also of the block."""
    try:
        # O_NONBLOCK: a named pipe in a file's place must not make the reader wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("not a regular file")
            yield FileReader(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except OSError as error:
        cause = "a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise ValueError(f"{path}: cannot be read: {cause}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _publish(temporary: Path, target: Path) -> None:
    renames = [(temporary, target)]
    if os.path.lexists(target):
        replaced = target.with_name(REPLACED + target.name)
        remove(replaced)
        renames.insert(0, (target, replaced))
    done = []
    try:
        for source, destination in renames:
            os.rename(source, destination)
            done.append((source, destination))
        fsync_directory(target.parent)
    except BaseException:
        with suppress(OSError):
            for source, destination in reversed(done):
                os.rename(destination, source)
        raise


def _free_bytes(path: Path) -> int | None:
    for folder in path.parents:
        try:
            return shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None
