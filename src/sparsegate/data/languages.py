"""Names of languages, and of pairs of them."""

import re

_LANGUAGE = r"[A-Za-z]{2,8}(?:_[A-Za-z0-9]{2,8})*"
PAIR_PATTERN = rf"^{_LANGUAGE}-{_LANGUAGE}$"


def check_language(language: str) -> str:
    """`language`, if it is a code such as ``de``, ``pt_BR`` or ``zh_Hans``; ValueError otherwise."""
    if not re.fullmatch(_LANGUAGE, language):
        raise ValueError(f"language {language[:40]!r} must be a code such as de, pt_BR or zh_Hans")
    return language


def pair_name(source: str, target: str) -> str:
    """``en-fr``: from English to French."""
    return f"{source}-{target}"


def languages_of(pair: str) -> tuple[str, str]:
    """Source and target of ``en-fr``. ValueError for what is no pair of two different languages."""
    source, hyphen, target = pair.partition("-")
    if not hyphen:
        raise ValueError(f"pair {pair[:40]!r} must be two languages with a hyphen, such as en-fr")
    if check_language(source) == check_language(target):
        raise ValueError(f"pair {pair!r}: its languages must be different")
    return source, target
