"""A column of text out of parquet files, by `pyarrow`, which is needed for nothing else."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from .spans import Span
from .text_options import TextOptions

_ROWS_AT_ONCE = 1 << 10


def column_texts(
    span: Span, *, options: TextOptions, advance: Callable[[int], None]
) -> Iterator[tuple[int, list[bytes], Callable[[int], str]]]:
    """The texts of column `options.field`, in UTF-8, of the row groups whose data begin in the span.

    With each batch of them the number of its first row, from 0, and how a row is called in an error.
    `advance` is told the bytes of the file that each row group took. ValueError in one line that names the
    file, and the row where one is at fault.
    """
    pyarrow, parquet = _library(span)

    def name(number: int) -> str:
        return f"{span.path}, row {number + 1}"

    done = 0
    try:
        with parquet.ParquetFile(span.path, memory_map=True) as file:
            _check_column(pyarrow, file, span, options.field)
            for group, number, num_bytes in _groups(file, span):
                batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[options.field])
                for batch in batches:
                    rows = batch.column(options.field).cast(pyarrow.large_binary()).to_pylist()
                    _check_rows(rows, number, name, options)
                    yield number, rows, name
                    number += len(rows)
                taken = min(num_bytes, span.num_bytes - done)
                advance(taken)
                done += taken
    except (pyarrow.ArrowException, OSError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{span.path}: damaged parquet file ({cause}); download it again") from None
    advance(span.num_bytes - done)


def _library(span: Span) -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        cure = "install it with `pip install 'sparsegate[parquet]'`"
        raise ValueError(f"{span.path}: parquet files need the package pyarrow; {cure}") from None


def _check_column(pyarrow: Any, file: Any, span: Span, field: str) -> None:
    schema = file.schema_arrow
    if field not in schema.names:
        raise ValueError(
            f"{span.path}: no column {field!r} but {', '.join(schema.names[:8])}; name the field"
        )
    if schema.names.count(field) > 1:
        raise ValueError(f"{span.path}: {schema.names.count(field)} columns {field!r}; rename all but one")
    kind = schema.field(field).type
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()):
        raise ValueError(f"{span.path}: column {field!r} holds {kind} and no text; name the field")


def _groups(file: Any, span: Span) -> Iterator[tuple[int, int, int]]:
    """Each row group of the span: its number, that of its first row, its bytes."""
    start = row = 0
    for group in range(file.num_row_groups):
        described = file.metadata.row_group(group)
        num_bytes = sum(described.column(c).total_compressed_size for c in range(described.num_columns))
        if span.start <= start < span.stop:
            yield group, row, num_bytes
        start += num_bytes
        row += described.num_rows


def _check_rows(
    rows: list[bytes | None], number: int, name: Callable[[int], str], options: TextOptions
) -> None:
    for place, row in enumerate(rows):
        if row is None:
            raise ValueError(
                f"{name(number + place)}: no text in column {options.field!r}; leave the row out"
            )
        if len(row) > options.max_line_bytes:
            limit = f"max_line_bytes ({options.max_line_bytes:,})"
            raise ValueError(f"{name(number + place)}: longer than {limit}; raise the limit")
