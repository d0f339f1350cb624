"""What runs are given to read."""

from collections.abc import Iterable


def several(name: str, texts: Iterable[str]) -> Iterable[str]:
    """`texts`, unless they are one text, whose characters would be taken for texts."""
    if isinstance(texts, str):
        raise ValueError(f"{name}: is one text; give a list of texts")
    return texts
