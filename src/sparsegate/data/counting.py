"""Counts of words or characters, part by part, and of all parts together."""

from collections import Counter
from collections.abc import Iterable
from contextlib import closing

import numpy as np

from .normalization import Normalization
from .parts import Part
from .pieces import DigestedFile, Pieces
from .text_options import TextOptions
from .train_vocabulary import CountedKind, count_entries
from .workers import Advance, Work


def make_counting(
    *, kind: CountedKind, normalization: Normalization, text: TextOptions, pieces: Pieces
) -> Work[Part]:
    """Counts what train has of a part, unless that is done; see `train_vocabulary.count_entries`."""

    def count(part: Part, advance: Advance) -> None:
        piece = _piece(part)
        if pieces.is_finished(piece):
            advance(part.num_bytes)
            return
        batches = (lines["train"] for lines in part.read(options=text, advance=advance))
        _write(pieces, piece, count_entries(kind, batches, normalization=normalization))

    return count


def merged_counts(pieces: Pieces, parts: Iterable[Part]) -> Counter[str]:
    """The sum of the counts of all `parts`. Memory grows with the number of distinct entries.

    ValueError if a file is not what was written.
    """
    total: Counter[str] = Counter()
    for part in parts:
        entries = b"".join(pieces.contents(_piece(part), "entries")).decode().split("\n")
        count_N = np.frombuffer(b"".join(pieces.contents(_piece(part), "counts")), dtype="<u8")
        # The line feed itself is counted first, and written as nothing.
        total.update(dict(zip(["\n", *entries[1:]], count_N.tolist(), strict=True)))
    return total


def _piece(part: Part) -> str:
    return f"count-{part.number:06}"


def _write(pieces: Pieces, piece: str, count: Counter[str]) -> None:
    ends = count.pop("\n", 0)
    with (
        closing(DigestedFile(pieces.path(piece, "entries"))) as entries,
        closing(DigestedFile(pieces.path(piece, "counts"))) as counts,
    ):
        entries.write("\n".join(["", *count]).encode())
        counts.write(np.array([ends, *count.values()], dtype="<u8").tobytes())
    pieces.finish(piece, {"entries": entries, "counts": counts})
