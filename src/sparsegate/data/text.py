"""Reading text: lines out of plain, gzip, JSON-lines and parquet files, in constant memory.

A line ends at a line feed, or at carriage return and line feed; nothing else ends one (U+2028, form feeds and
lone carriage returns stay in the line as white space). A byte order mark at the beginning of a file is
dropped. Text is UTF-8; bad bytes, NUL and lone surrogates are errors that name file and line, unless
`TextOptions.replace_bad_bytes` turns each of them into U+FFFD.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from .parquet import column_texts
from .spans import Span, blocks, whole
from .text_options import TextOptions

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_JSON_LINES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")

Format = Literal["plain text", "JSON lines", "parquet"]
_Namer = Callable[[int], str]


def format_of(path: Path) -> Format:
    """How a file of that name is read: ``.parquet``; ``.jsonl`` and C4's ``.json``, also with ``.gz``; or as
    plain text."""
    if path.suffix == ".parquet":
        return "parquet"
    return "JSON lines" if path.name.endswith(_JSON_LINES) else "plain text"


def read_lines(span: Span, *, options: TextOptions, advance: Callable[[int], None]) -> Iterator[list[str]]:
    """The lines of a span in batches of about a megabyte, without line ends.

    ``.gz`` is unpacked; JSON lines hold one object a line whose `options.field` is text of any number of
    lines, as is each row of that column in ``.parquet``; see `format_of`. `advance` is told the bytes of the
    file that each batch took.

    ValueError in one line that names file and line for text that cannot be read.
    """
    for lines in _read(span, options, advance):
        if not options.keep_blank_lines:
            lines = [line for line in lines if line and not line.isspace()]
        if lines:
            yield lines


def read_raw_lines(
    path: Path, *, options: TextOptions, advance: Callable[[int], None]
) -> Iterator[list[str]]:
    """Every line of one file, blank ones as well and JSON as it stands; else like `read_lines`."""
    for number, block, name in blocks(whole(path), options=options, advance=advance):
        yield _split(_decode(block, number, name, options))


def _read(span: Span, options: TextOptions, advance: Callable[[int], None]) -> Iterator[list[str]]:
    match format_of(span.path):
        case "parquet":
            for number, rows, name in column_texts(span, options=options, advance=advance):
                yield _documents(_decode_rows(rows, number, name, options))
        case "JSON lines":
            for number, block, name in blocks(span, options=options, advance=advance):
                yield _json_lines(block, number, name, options)
        case "plain text":
            for number, block, name in blocks(span, options=options, advance=advance):
                yield _split(_decode(block, number, name, options))


def _json_lines(block: bytes, number: int, name: _Namer, options: TextOptions) -> list[str]:
    lines = _split(_decode(block, number, name, options))
    return _documents(
        text_fields(partial(name, number + offset), line, [options.field], options)[0]
        for offset, line in enumerate(lines)
        if line and not line.isspace()
    )


def _decode_rows(rows: list[bytes], number: int, name: _Namer, options: TextOptions) -> Iterator[str]:
    for place, row in enumerate(rows, number):
        yield _decode(row, 0, lambda _, place=place: name(place), options)


def _documents(texts: Iterator[str]) -> list[str]:
    """The lines of texts. As in a file, the last line feed ends the last line, and does not begin another."""
    return [line for text in texts if text for line in _split(text.removesuffix("\n"))]


def _split(text: str) -> list[str]:
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in lines] if "\r" in text else lines


def _decode(block: bytes, number: int, name: _Namer, options: TextOptions) -> str:
    """`block`, whose first line is called `name(number)`, as text."""
    if options.replace_bad_bytes:
        return block.decode(errors="replace").replace("\0", REPLACEMENT)
    position = block.find(b"\0")
    if position >= 0:
        where = name(number + block.count(b"\n", 0, position))
        raise ValueError(f"{where}: a NUL byte; is it a binary file? replace_bad_bytes reads on")
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        where = name(number + block.count(b"\n", 0, error.start))
        bad = f"byte 0x{block[error.start]:02x} is not UTF-8"
        raise ValueError(f"{where}: {bad}; convert it with iconv, or replace_bad_bytes") from None


def text_fields(
    where: Callable[[], str], line: str, fields: Sequence[str], options: TextOptions
) -> list[str]:
    """The text in each of some fields of one JSON object. ValueError that begins as `where` says."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where()}: not JSON ({error}); each line must hold one JSON object") from None
    return [_text_of(where, document, field, options) for field in fields]


def _text_of(where: Callable[[], str], document: object, field: str, options: TextOptions) -> str:
    if not isinstance(document, dict) or not isinstance(document.get(field), str):
        raise ValueError(f"{where()}: no object with a text in field {field!r}; name the field that holds it")
    text: str = document[field]
    if options.replace_bad_bytes:
        return _NO_TEXT.sub(REPLACEMENT, text)
    if _NO_TEXT.search(text):
        raise ValueError(
            f"{where()}: a NUL or a lone surrogate in field {field!r}; replace_bad_bytes reads on"
        )
    return text
