"""What a verb is, and how its words on the command line are read."""

import argparse
import re
import textwrap
from argparse import Namespace
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..training.overrides import did_you_mean, options, paths_after, replace_by_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb of the command line; its module ends in `VERB = Verb(...)`.

    example: one or more command lines that work, shown in the help.
    add_arguments: declares the verb's own arguments.
    run: does it, and returns the exit code. ValueError and OSError mean that the user's input is at fault.
    config: for a verb whose further options are the fields of a configuration: makes it from the verb's own
        arguments, or returns None while they do not name one. `run` finds it as `args.config`, with the
        changes of the command line in it. For other verbs None.
    """

    example: str
    add_arguments: Callable[["Parser"], None]
    run: Callable[[Namespace], int]
    config: Callable[[Namespace], "DataclassInstance | None"] | None = None


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError, so that errors of every origin leave by one door."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def parse(verb: Verb, argv: Sequence[str], *, name: str, summary: str) -> Namespace:
    """The arguments of one verb.

    Raises:
        ValueError: an argument that the verb does not know, or a value that does not fit.
        SystemExit: after the help was printed.
    """
    parser = _parser(verb, name=name, summary=summary)
    flags = list(parser._option_string_actions)
    own, changes = _split(argv, flags)
    if verb.config is None:
        _check_known(changes, flags)
        return _arguments(parser, own)
    args = _arguments(parser, own)
    args.config = verb.config(args)
    if args.config is None:
        _check_known(changes, flags)
        return args
    by_path = {flag.removeprefix("--").replace("-", "_"): value for flag, value in changes.items()}
    given = {path: value for path, value in by_path.items() if value is not None}
    _check_known(changes, [*flags, *map(_flag, paths_after(args.config, given))])
    args.config = replace_by_path(args.config, by_path)
    return args


def _arguments(parser: Parser, words: Sequence[str]) -> Namespace:
    """Positional arguments and options in any order; help is of the arguments that stand before it."""
    if any(word in ("-h", "--help") for word in words):
        return parser.parse_args(words)
    return parser.parse_intermixed_args(words)


def _parser(verb: Verb, *, name: str, summary: str) -> Parser:
    example = textwrap.indent(textwrap.dedent(verb.example).strip(), "  ")
    parser = Parser(
        prog=f"sparsegate {name}",
        description=f"{summary}\n\nexample:\n{example}",
        formatter_class=partial(_HelpFormatter, max_help_position=32),
        allow_abbrev=False,
        add_help=False,
    )
    verb.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("-h", "--help", action=_Help, config=verb.config, help="show this help and leave")
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves names such as `news-moe-4096-h` whole, so that they can be found and copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Help(argparse.Action):
    """Prints the help, with the fields of the configuration that the arguments before it name."""

    def __init__(self, *, config: Callable[[Namespace], Any] | None, **settings: Any) -> None:
        super().__init__(nargs=0, **settings)
        self.config = config

    def __call__(self, parser: argparse.ArgumentParser, namespace: Namespace, *_: object) -> NoReturn:
        if self.config is not None:
            parser.usage = parser.format_usage().removeprefix("usage: ").rstrip() + " [--FIELD VALUE ...]"
            config = self.config(namespace)
            if config is None:
                parser.epilog = "Give --help after the name, and it shows the fields that can be changed."
            else:
                group = parser.add_argument_group("fields of the configuration [and their values]")
                for option in options(config):
                    value = _text(option.value)
                    text = f"{option.doc} [{value}]" if value else option.doc
                    group.add_argument(_flag(option.path), metavar=option.type, help=text.replace("%", "%%"))
        parser.print_help()
        parser.exit()


# `top_k (0) must` and `hold_out: ...` at the beginning; further on a name before its value, or with an
# underscore. Not in paths, quotes, what another program said, or what a file holds.
_VALUE = r"(?= \([^()]*\)(?:[\s,:;]|$))"
_NAMES = re.compile(
    rf"^\w+(?:{_VALUE}|(?=: ))|(?<![\w./'\"-])(?<!Error: )(?<!\.json: )"
    rf"(?:\w+{_VALUE}(?= \((?:-?\d|'))|[a-z]+(?:_[a-z]+)+(?![\w./'\"-]))"
)


def with_flags(message: str, verb: Verb, words: Sequence[str]) -> str:
    """A message of the library, with its arguments named as the verb's options are: `top_k (0) must be ...`
    says `--top-k`. words: of the command line; those of the user's own stay as they are."""
    flags = {
        action.dest: next(flag for flag in action.option_strings if flag.startswith("--"))
        for action in _parser(verb, name="", summary="")._actions
        if action.option_strings
    }
    own = {text for word in words for text in (word, str(Path(word))) if not word.startswith("-")}
    theirs = [match.span() for word in own for match in re.finditer(re.escape(word), message)]

    def flag(name: re.Match[str]) -> str:
        is_theirs = any(start <= name.start() and name.end() <= end for start, end in theirs)
        return name[0] if is_theirs else flags.get(name[0], name[0])

    return _NAMES.sub(flag, message)


def _split(argv: Sequence[str], flags: Container[str]) -> tuple[list[str], dict[str, str | None]]:
    """The words that are the verb's own, and the options that are not: `--flag value` or `--flag=value`.

    argparse alone would take the value of an option that it does not know for a positional argument.
    """
    own: list[str] = []
    others: dict[str, str | None] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if word == "--":
            return [*own, word, *rest], others
        if not flag.startswith("--") or flag in flags:
            own.append(word)
            continue
        flag = flag.replace("_", "-")
        if equals:
            others[flag] = value
        else:
            others[flag] = rest.pop(0) if rest and not rest[0].startswith("--") else None
    return own, others


def _check_known(changes: Mapping[str, str | None], known: Sequence[str]) -> None:
    for flag, value in changes.items():
        if flag not in known:
            raise ValueError(f"{flag}: no such option{did_you_mean(flag, known)}")
        if value is None:
            raise ValueError(f"{flag}: needs a value after it")


def _flag(path: str) -> str:
    return "--" + path.replace("_", "-")


def _text(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
