"""How text is read, whatever its vocabulary."""

from dataclasses import dataclass

SHORTEST_LIMIT = 1 << 10


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How text is read, whatever its vocabulary.

    field: the key that holds the text in JSON lines, or the column of a parquet file.
    keep_blank_lines: keep lines of nothing but white space as sentences (source code, WikiText); else they
        are dropped.
    replace_bad_bytes: replace what is not UTF-8, NUL and lone surrogates by U+FFFD; else they are errors.
    max_line_bytes: the longest line, JSON object or text of a row that is read.
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
