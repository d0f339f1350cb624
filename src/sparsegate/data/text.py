"""Reading text: lines out of plain, gzip and JSON-lines files, in constant memory.

A line ends at a line feed, or at carriage return and line feed; nothing else ends one (U+2028, form feeds and
lone carriage returns stay in the line as white space). A byte order mark at the beginning of a file is
dropped. Text is UTF-8; bad bytes, NUL and lone surrogates are errors that name file and line, unless
`TextOptions.replace_bad_bytes` turns each of them into U+FFFD.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

READ_BYTES = 1 << 20
SHORTEST_LIMIT = 1 << 10
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_FOREIGN = {
    b"\x1f\x8b": "gzip: give its name the ending .gz",
    b"\xfd7zXZ\x00": "xz: unpack it with `xz -dk`",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it with `zstd -d`",
    b"PK\x03\x04": "zip: unpack it with `unzip`",
    b"BZh91AY&SY": "bzip2: unpack it with `bunzip2 -k`",
    b"\xff\xfe": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
}


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How text is read, whatever its vocabulary.

    field: the key that holds the text in JSON lines.
    keep_blank_lines: keep lines of nothing but white space as sentences (source code, WikiText); else they
        are dropped.
    replace_bad_bytes: replace what is not UTF-8, NUL and lone surrogates by U+FFFD; else they are errors.
    max_line_bytes: the longest line, or JSON object, that is read.
    max_gzip_ratio: a gzip file may unpack to this many times its own size, or to a megabyte.
    """

    field: str = "text"
    keep_blank_lines: bool = False
    replace_bad_bytes: bool = False
    max_line_bytes: int = 4 << 20
    max_gzip_ratio: int = 100

    def __post_init__(self) -> None:
        if self.max_line_bytes < SHORTEST_LIMIT:
            raise ValueError(f"max_line_bytes ({self.max_line_bytes}) must be at least {SHORTEST_LIMIT}")
        if self.max_gzip_ratio < 1:
            raise ValueError(f"max_gzip_ratio ({self.max_gzip_ratio}) must be at least 1")


def text_files(paths: Iterable[Path]) -> list[Path]:
    """The files of `paths`: those given, and all those below a directory, in order of their path, hidden ones
    left out.

    FileNotFoundError for one that does not exist, ValueError for a directory without files or for what is no
    file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(file for file in _files_below(path))
            if not below:
                raise ValueError(f"{path}: a directory without files; give text files or a directory of them")
            files.extend(below)
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise ValueError(
                f"{path}: not a regular file; text is read more than once, so save it to a file first"
            )
        else:
            raise FileNotFoundError(f"{path}: no such file or directory")
    return files


def _files_below(directory: Path) -> Iterator[Path]:
    for parent, children, names in os.walk(directory):
        children[:] = [name for name in children if not name.startswith(".")]
        for name in names:
            file = Path(parent, name)
            if not name.startswith(".") and file.is_file():
                yield file


def read_lines(path: Path, *, options: TextOptions, advance: Callable[[int], None]) -> Iterator[list[str]]:
    """The lines of one file in batches of about a megabyte, without line ends.

    ``.gz`` is unpacked, ``.jsonl`` holds one object a line whose `options.field` is text of any number of
    lines, everything else is plain text. `advance` is told the bytes of the file that each batch took.

    ValueError in one line that names file and line for text that cannot be read.
    """
    parse = _json_lines if is_json_lines(path) else _plain_lines
    for lines in _parsed(path, parse, options, advance):
        if not options.keep_blank_lines:
            lines = [line for line in lines if line and not line.isspace()]
        if lines:
            yield lines


def read_raw_lines(
    path: Path, *, options: TextOptions, advance: Callable[[int], None]
) -> Iterator[list[str]]:
    """Every line of one file, blank ones as well and JSON as it stands; else like `read_lines`."""
    return _parsed(path, _plain_lines, options, advance)


def is_json_lines(path: Path) -> bool:
    """Whether the name of a file says that each of its lines is a JSON object."""
    return path.name.removesuffix(".gz").endswith(".jsonl")


_Parse = Callable[[Path, bytes, int, TextOptions], list[str]]


def _parsed(
    path: Path, parse: _Parse, options: TextOptions, advance: Callable[[int], None]
) -> Iterator[list[str]]:
    number = 1
    with path.open("rb") as file:
        position = 0
        for block in _blocks(path, file, options):
            yield parse(path, block, number, options)
            number += block.count(b"\n") + 1
            advance(file.tell() - position)
            position = file.tell()
        advance(file.tell() - position)


def _blocks(path: Path, file: BinaryIO, options: TextOptions) -> Iterator[bytes]:
    """Whole lines, about `READ_BYTES` at once, joined by line feeds and without the last line feed."""
    pending = b""
    number = 1
    for read in _reads(path, file, options):
        pending += read
        # No read is longer than the limit, so that only the first line, which earlier reads may have begun,
        # can be.
        line_end = pending.find(b"\n")
        if (line_end if line_end >= 0 else len(pending)) > options.max_line_bytes:
            limit = f"max_line_bytes ({options.max_line_bytes:,})"
            raise ValueError(f"{path}, line {number}: longer than {limit}; break the line or raise the limit")
        block, line_feed, rest = pending.rpartition(b"\n")
        if line_feed:
            yield block
            number += block.count(b"\n") + 1
            pending = rest
    if pending:
        yield pending


def _reads(path: Path, file: BinaryIO, options: TextOptions) -> Iterator[bytes]:
    """The bytes of the text, unpacked, without a byte order mark."""
    packed = path.suffix == ".gz"
    stream = gzip.GzipFile(fileobj=file) if packed else file
    limit = max(READ_BYTES, os.fstat(file.fileno()).st_size * options.max_gzip_ratio)
    size = min(READ_BYTES, options.max_line_bytes)
    total = 0
    while read := _read(path, stream, size):
        if total == 0:
            _refuse_foreign(path, read)
            read = read.removeprefix(BYTE_ORDER_MARK)
        total += len(read)
        if packed and total > limit:
            ratio = f"max_gzip_ratio ({options.max_gzip_ratio})"
            raise ValueError(
                f"{path}: unpacks to more than {ratio} times its size; raise the limit if it is text"
            )
        yield read


def _read(path: Path, stream: BinaryIO | gzip.GzipFile, size: int) -> bytes:
    try:
        return stream.read(size)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); copy or download it again") from None


def _refuse_foreign(path: Path, head: bytes) -> None:
    for magic, cure in _FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: not text but {cure}")


def _plain_lines(path: Path, block: bytes, number: int, options: TextOptions) -> list[str]:
    return _split(_decode(path, block, number, options))


def _json_lines(path: Path, block: bytes, number: int, options: TextOptions) -> list[str]:
    lines: list[str] = []
    for offset, line in enumerate(_plain_lines(path, block, number, options)):
        if line and not line.isspace():
            (text,) = text_fields(f"{path}, line {number + offset}", line, [options.field], options)
            # As in a file, the last line feed ends the last line, and does not begin another.
            lines.extend(_split(text.removesuffix("\n")) if text else [])
    return lines


def _split(text: str) -> list[str]:
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in lines] if "\r" in text else lines


def _decode(path: Path, block: bytes, number: int, options: TextOptions) -> str:
    """`block`, whose first line is the file's line `number`, as text."""
    if options.replace_bad_bytes:
        return block.decode(errors="replace").replace("\0", REPLACEMENT)
    position = block.find(b"\0")
    if position >= 0:
        number += block.count(b"\n", 0, position)
        raise ValueError(
            f"{path}, line {number}: a NUL byte; is it a binary file? replace_bad_bytes reads on"
        )
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        number += block.count(b"\n", 0, error.start)
        bad = f"byte 0x{block[error.start]:02x} is not UTF-8"
        raise ValueError(
            f"{path}, line {number}: {bad}; convert it with iconv, or replace_bad_bytes"
        ) from None


def text_fields(where: str, line: str, fields: Sequence[str], options: TextOptions) -> list[str]:
    """The text in each of some fields of one JSON object. ValueError that begins with `where`."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); each line must hold one JSON object") from None
    return [_text_of(where, document, field, options) for field in fields]


def _text_of(where: str, document: object, field: str, options: TextOptions) -> str:
    if not isinstance(document, dict) or not isinstance(document.get(field), str):
        raise ValueError(f"{where}: no object with a text in field {field!r}; name the field that holds it")
    text: str = document[field]
    if options.replace_bad_bytes:
        return _NO_TEXT.sub(REPLACEMENT, text)
    if _NO_TEXT.search(text):
        raise ValueError(f"{where}: a NUL or a lone surrogate in field {field!r}; replace_bad_bytes reads on")
    return text
