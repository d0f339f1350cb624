"""From tokens that come one by one to text: which part of it is certain, and where it stops."""

from collections.abc import Sequence

from ..data.vocabulary import Vocabulary

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextGrowth:
    """Text that grows by tokens, up to a stop. What is given out never has to be taken back.

    before: tokens that the text follows. stop: texts that it ends before.
    """

    stopped: bool = False

    def __init__(self, *, vocabulary: Vocabulary, before: Sequence[int], stop: Sequence[str]) -> None:
        self._vocabulary = vocabulary
        self._stop = stop
        # How a token is spaced depends on the one before, so these are decoded again with those that follow.
        self._context = list(before[-1:])
        self._new: list[int] = []
        self._held = ""

    def add(self, token: int) -> str:
        """The text that `token` makes certain. Where it completes a stop, sets `stopped`: the text ends."""
        self._new.append(token)
        text = self.rest()
        stops = [found for each in self._stop if (found := text.find(each)) >= 0]
        if stops:
            self.stopped = True
            return text[: min(stops)]
        if text.endswith(_INCOMPLETE):
            return ""
        certain = len(text) - self._begun_stop(text)
        self._context, self._new, self._held = self._new, [], text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """What is not certain yet, as half a character or the beginning of a stop."""
        before = self._vocabulary.decode(self._context)
        return self._held + self._vocabulary.decode(self._context + self._new).removeprefix(before)

    def _begun_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which one of the stops begins."""
        longest = max((len(each) - 1 for each in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(each.startswith(text[-length:]) for each in self._stop):
                return length
        return 0
