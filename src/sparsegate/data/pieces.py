"""Finished pieces of work, kept with checksums, so that work that was killed goes on where it stopped."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from .dataset import Sha256, SplitName
from .files import fsync, read_sealed, sealed, writing

_READ_AT_ONCE = 1 << 20


class Counts(BaseModel):
    """What is in the text of one split. `words` leaves the ends of sentences out, `bytes` counts one for
    each."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tokens: int = 0
    sentences: int = 0
    words: int = 0
    bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            tokens=self.tokens + other.tokens,
            sentences=self.sentences + other.sentences,
            words=self.words + other.words,
            bytes=self.bytes + other.bytes,
        )


class Record(BaseModel):
    """What one finished piece is: the checksums of its files, and what it holds of each split."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    digests: dict[str, Sha256]
    splits: dict[SplitName, Counts] = {}


class DigestedFile:
    """A file and the SHA-256 of what is written to it. OSError names the file if that fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            # Whoever still writes to a file of that name, writes to one without a name.
            path.unlink(missing_ok=True)
            self._file = path.open("xb")
        self._sha256 = hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._sha256.update(content)
        with writing(self._path):
            self._file.write(content)

    def close(self) -> None:
        with writing(self._path):
            self._file.close()

    def bring_to_disk(self) -> None:
        self.close()
        with writing(self._path):
            fsync(self._path)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


class Pieces:
    """A folder of pieces, each of some files and a record that is written last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, piece: str, file: str) -> Path:
        """Where a file of a piece stands."""
        return self._folder / f"{piece}.{file}"

    def finish(
        self, piece: str, files: Mapping[str, DigestedFile], splits: Mapping[str, Counts] | None = None
    ) -> None:
        """Record that the piece's files, now closed, are all of it.

        Nothing is brought to the disk: what a power cut takes does not fit its checksum, and is made again.
        """
        record = Record(
            digests={name: file.sha256 for name, file in files.items()}, splits=dict(splits or {})
        )
        path = self.path(piece, "json")
        temporary = path.with_suffix(".tmp")
        with writing(path):
            temporary.write_bytes(sealed(record.model_dump()))
            temporary.replace(path)

    def is_finished(self, piece: str) -> bool:
        """Whether the piece has a record, and all its files fit it."""
        try:
            record = self.record(piece)
            return all(self._digest(piece, file) == digest for file, digest in record.digests.items())
        except (ValueError, FileNotFoundError):
            return False

    def record(self, piece: str) -> Record:
        """The record of a finished piece."""
        return read_sealed(self.path(piece, "json"), Record)

    def contents(self, piece: str, file: str) -> Iterator[bytes]:
        """A file of a finished piece, a megabyte at once, the last when its checksum is known to fit.

        ValueError if it does not: a worker whose parent was killed may have begun the piece anew.
        """
        path, sha256, last = self.path(piece, file), hashlib.sha256(), b""
        with path.open("rb") as opened:
            while content := opened.read(_READ_AT_ONCE):
                if last:
                    yield last
                sha256.update(content)
                last = content
        if sha256.hexdigest() != self.record(piece).digests[file]:
            raise ValueError(f"{path}: changed since it was written; give the same command again")
        if last:
            yield last

    def _digest(self, piece: str, file: str) -> str:
        with self.path(piece, file).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
