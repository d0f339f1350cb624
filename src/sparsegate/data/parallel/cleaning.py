"""The one form that lines of parallel text are brought to, in training and when they are to be translated.

``clean-1``, in this order:

1. Unicode NFC.
2. Every control character (category Cc: tabs, carriage returns, U+0085, escape sequences' first character)
   becomes a space.
3. White space at both ends of the line goes.

Nothing else is changed: case, quotes, spaces within the line, joiners and emoji stay. What is not UTF-8, NUL
bytes and lone surrogates never get here: reading refuses them with file and line, or replaces each by U+FFFD.

The name carries a version: a change of the rules is a new name.
"""

import re

from ..normalization import normalize

CLEANING = "clean-1"
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def clean_line(line: str) -> str:
    """`line` by the rules of ``clean-1``.

    >>> clean_line(" one\\ttwo \\x85")
    'one two'
    """
    return _CONTROL.sub(" ", normalize(line)).strip()


def one_line(text: str) -> str:
    """`text` as one line: control characters and line ends become spaces, and white space at its end goes."""
    return _BREAKS.sub(" ", text).rstrip()
