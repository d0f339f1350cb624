"""What the verbs that use a trained model have in common: the run, and the lines on standard input."""

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from ..recipes.language_run import LanguageRun
from ..recipes.load import load, require_language, require_translation
from ..recipes.translation_run import TranslationRun
from .verb import Parser

_READ_BYTES = 1 << 20
_MAX_LINE_BYTES = 4 << 20


def add_checkpoint(parser: Parser) -> None:
    """Which weights of which run."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that `sparsegate train` wrote")
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="best|last|STEP",
        help="which weights (default: best, or the last where none was evaluated)",
    )


def checkpoint_of(args: Namespace) -> str | int:
    return int(args.checkpoint) if args.checkpoint.isdecimal() else args.checkpoint


def add_run(parser: Parser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")


def load_run(args: Namespace) -> LanguageRun | TranslationRun:
    trained = load(args.run, checkpoint=checkpoint_of(args), device=args.device, warn=warn)
    if trained.model.sees_later_tokens():
        warn(
            f"{args.run}: its gate chooses among tokens, and what a token gets depends on later ones; "
            "likelihoods and perplexities are not those of a model that predicts, and change with what is "
            "read at once"
        )
    return trained


def load_language_run(args: Namespace) -> LanguageRun:
    return require_language(load_run(args))


def load_translation_run(args: Namespace) -> TranslationRun:
    return require_translation(load_run(args))


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def lines_as_they_come(path: Path | None = None, *, replace_bad_bytes: bool = False) -> Iterator[list[str]]:
    """The lines of a file, without line ends, in batches of those that can be had without waiting.

    path: None is standard input. replace_bad_bytes: U+FFFD stands for what is no UTF-8, and for NUL.

    Lines end as in `data.text`. A program that writes a line and waits for the answer gets it.

    Raises:
        ValueError: names the line that is no UTF-8, holds NUL or is too long; the lines before it came first.
    """
    if path is not None:
        with path.open("rb") as file:
            yield from _lines(file.fileno(), str(path), replace_bad_bytes)
    elif sys.stdin is None:
        raise ValueError("standard input: is closed; give text on it")
    else:
        yield from _lines(sys.stdin.fileno(), "standard input", replace_bad_bytes)


def _lines(descriptor: int, name: str, replace_bad_bytes: bool) -> Iterator[list[str]]:
    number, pending = 1, b""
    while block := os.read(descriptor, _READ_BYTES):
        *complete, pending = (pending + block).split(b"\n")
        yield from _decoded(complete, name, number, replace_bad_bytes)
        number += len(complete)
        _require_short(pending, f"{name}, line {number}")
    if pending:
        yield from _decoded([pending], name, number, replace_bad_bytes)


def _decoded(lines: list[bytes], name: str, number: int, replace_bad_bytes: bool) -> Iterator[list[str]]:
    """The lines in one batch, which are the first of a line that cannot be decoded and of those after it."""
    decoded: list[str] = []
    problem = None
    for line in lines:
        try:
            decoded.append(_decode(line, name, number + len(decoded), replace_bad_bytes))
        except ValueError as error:
            problem = error
            break
    if decoded:
        yield decoded
    if problem is not None:
        raise problem


def _require_short(line: bytes, where: str) -> None:
    if len(line) > _MAX_LINE_BYTES:
        raise ValueError(f"{where}: longer than {_MAX_LINE_BYTES:,} bytes; break it")


def _decode(line: bytes, name: str, number: int, replace_bad_bytes: bool) -> str:
    where = f"{name}, line {number}"
    _require_short(line, where)
    if replace_bad_bytes:
        line = line.replace(b"\0", "\N{REPLACEMENT CHARACTER}".encode())
    if b"\0" in line:
        raise ValueError(f"{where}: a NUL byte; is it a binary file?")
    try:
        text = line.removesuffix(b"\r").decode(errors="replace" if replace_bad_bytes else "strict")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{line[error.start]:02x} is not UTF-8"
        raise ValueError(f"{where}: {bad}; convert it with iconv") from None
    return text.removeprefix("\N{BYTE ORDER MARK}") if number == 1 else text
