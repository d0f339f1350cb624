"""Stretches of files, so that several processes read one text: each line belongs to exactly one of them."""

import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .text_options import TextOptions

READ_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FOREIGN = {
    b"\x1f\x8b": "gzip: give its name the ending .gz",
    b"\xfd7zXZ\x00": "xz: unpack it with `xz -dk`",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it with `zstd -d`",
    b"PK\x03\x04": "zip: unpack it with `unzip`",
    b"BZh91AY&SY": "bzip2: unpack it with `bunzip2 -k`",
    b"PAR1": "parquet: give its name the ending .parquet",
    b"\xff\xfe": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
}


@dataclass(frozen=True, kw_only=True)
class Span:
    """The lines of a file that begin at one of its bytes from `start` to before `stop`.

    A gzip file is one span. Of a parquet file a span has the row groups whose data begin there.
    """

    path: Path
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the file, as it is on the disk."""
        return self.stop - self.start


def whole(path: Path) -> Span:
    """All of a file. ValueError if it is packed and empty."""
    return Span(path=path, start=0, stop=_size(path))


def cut(files: Iterable[Path], *, part_bytes: int) -> list[tuple[Span, ...]]:
    """The text of `files` in order, in parts of about `part_bytes` of their bytes.

    ValueError for a packed file that is empty.
    """
    parts: list[tuple[Span, ...]] = []
    part: list[Span] = []
    room = part_bytes
    for path in files:
        for span in _spans(path, room, part_bytes):
            part.append(span)
            room -= span.num_bytes
            if room <= 0:
                parts.append(tuple(part))
                part, room = [], part_bytes
    return [*parts, tuple(part)] if part else parts


def _size(path: Path) -> int:
    size = path.stat().st_size
    if size == 0 and path.suffix in (".gz", ".parquet"):
        raise ValueError(f"{path}: 0 bytes, which is no {path.suffix} file; download or make it again")
    return size


def _spans(path: Path, first: int, size: int) -> Iterator[Span]:
    """A file in spans of `size` bytes, the first of `first`."""
    start, stop = 0, _size(path)
    if path.suffix == ".gz":
        yield Span(path=path, start=0, stop=stop)
        return
    while start < stop:
        end = min(stop, start + (first if start == 0 else size))
        yield Span(path=path, start=start, stop=end)
        start = end


def blocks(
    span: Span, *, options: TextOptions, advance: Callable[[int], None]
) -> Iterator[tuple[int, bytes, Callable[[int], str]]]:
    """Whole lines, about `READ_BYTES` at once, joined by line feeds and without the last line feed.

    With each block the number of its first line in the span, from 0, and how a line of the span is called in
    an error: by its number in the file. `advance` is told the bytes of the file that each block took.
    """
    with span.path.open("rb") as file:
        first = _first_line(file, span)
        name = _namer(span.path, first)
        position, number = span.start, 0
        reads, mark = _reads(file, span, first, options), b"" if first else BYTE_ORDER_MARK
        for block in _lines(reads, name, options.max_line_bytes, mark):
            yield number, _without_mark(span.path, block) if first == number == 0 else block, name
            number += block.count(b"\n") + 1
            reached = max(position, min(file.tell(), span.stop))
            advance(reached - position)
            position = reached
        advance(span.stop - position)


def _namer(path: Path, first: int) -> Callable[[int], str]:
    """Names a line by its number after position `first`. Lines before that are counted when it is called."""

    def name(number: int) -> str:
        with path.open("rb") as file:
            for start in range(0, first, READ_BYTES):
                number += file.read(min(READ_BYTES, first - start)).count(b"\n")
        return f"{path}, line {number + 1}"

    return name


def _lines(
    reads: Iterable[bytes], name: Callable[[int], str], max_line_bytes: int, mark: bytes
) -> Iterator[bytes]:
    """The bytes of `reads` at the last line feed of each; `mark` alone is no line. ValueError for a line that
    is too long."""
    pending = b""
    number = 0
    for read in reads:
        pending += read
        # No read is longer than the limit, so that only the first line, which earlier reads may have begun,
        # can be.
        line_end = pending.find(b"\n")
        if (line_end if line_end >= 0 else len(pending)) > max_line_bytes:
            limit = f"max_line_bytes ({max_line_bytes:,})"
            raise ValueError(f"{name(number)}: longer than {limit}; break the line or raise the limit")
        block, line_feed, rest = pending.rpartition(b"\n")
        if line_feed:
            yield block
            number += block.count(b"\n") + 1
            pending = rest
    if pending and (number or pending != mark):
        yield pending


def _first_line(file: BinaryIO, span: Span) -> int:
    """Where the first line begins that begins in the span; `span.stop` or more if none does."""
    if span.start == 0:
        return 0
    position = file.seek(span.start - 1)
    while position < span.stop and (read := file.read(READ_BYTES)):
        line_feed = read.find(b"\n")
        if line_feed >= 0:
            return position + line_feed + 1
        position += len(read)
    return max(position, span.stop)


def _reads(file: BinaryIO, span: Span, first: int, options: TextOptions) -> Iterator[bytes]:
    """The bytes of the span's lines, unpacked."""
    if first >= span.stop:
        return
    if span.path.suffix == ".gz":
        yield from _unpacked(file, span.path, options)
    else:
        file.seek(first)
        yield from _bounded(file, span.stop - 1 - first, min(READ_BYTES, options.max_line_bytes))


def _bounded(file: BinaryIO, num_bytes: int, size: int) -> Iterator[bytes]:
    """At least `num_bytes` of the file, and on to the end of the line that the byte after them is in."""
    while num_bytes and (read := file.read(min(size, num_bytes))):
        num_bytes -= len(read)
        yield read
    while read := file.read(size):
        line_end = read.find(b"\n") + 1
        if line_end:
            yield read[:line_end]
            return
        yield read


def _unpacked(file: BinaryIO, path: Path, options: TextOptions) -> Iterator[bytes]:
    limit = max(READ_BYTES, os.fstat(file.fileno()).st_size * options.max_gzip_ratio)
    size = min(READ_BYTES, options.max_line_bytes)
    total = 0
    stream = gzip.GzipFile(fileobj=file)
    try:
        while read := stream.read(size):
            total += len(read)
            if total > limit:
                ratio = f"max_gzip_ratio ({options.max_gzip_ratio})"
                raise ValueError(
                    f"{path}: unpacks to more than {ratio} times its size; raise the limit if it is text"
                )
            yield read
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); copy or download it again") from None


def _without_mark(path: Path, head: bytes) -> bytes:
    """The first lines of a file without a byte order mark; ValueError if they begin what is not text."""
    for magic, cure in _FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: not text but {cure}")
    return head.removeprefix(BYTE_ORDER_MARK)
