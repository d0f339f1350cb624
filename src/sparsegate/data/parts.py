"""A text in parts of about equal size, which can be read at the same time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .hold_out import Division, Text
from .spans import Span, cut
from .text_options import TextOptions

PART_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some spans of a text, and to which splits their lines go. `number` counts all parts of all texts."""

    number: int
    spans: tuple[Span, ...]
    division: Division

    @property
    def num_bytes(self) -> int:
        """Bytes of the files, as they are on the disk."""
        return sum(span.num_bytes for span in self.spans)

    def read(self, *, options: TextOptions, advance: Callable[[int], None]) -> Iterator[dict[str, list[str]]]:
        """The lines of each split in batches of about a megabyte; see `read_lines`."""
        return self.division.read(self.spans, options=options, advance=advance)


def parts_of(texts: Sequence[Text], *, part_bytes: int) -> list[Part]:
    """All parts, in the order of the texts. What is made of them does not depend on `part_bytes`."""
    if part_bytes < 1:
        raise ValueError(f"part_bytes ({part_bytes}) must be at least 1")
    several = [(spans, text.division) for text in texts for spans in cut(text.files, part_bytes=part_bytes)]
    return [
        Part(number=number, spans=spans, division=division)
        for number, (spans, division) in enumerate(several)
    ]
