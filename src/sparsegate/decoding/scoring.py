"""Log-probability of lines of text, token by token."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.vocabulary import Vocabulary
from ..models.language_model import LanguageModel
from .inference import evaluation_mode
from .likelihood import groups_by_length, likelihoods, row_batches

_Tokens = npt.NDArray[np.integer[Any]]

# Positions in a batch, which bounds the memory, and lines that are sorted by length together.
_MAX_TOKENS = 4096
_WINDOW = 1024


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One line and how likely it is, as a sentence by itself.

    tokens: ids of the line, and then the end of the sentence. logprobs: the natural logarithm of each token's
    probability, given those before it. num_unknown: of the tokens, how many stand for whatever is not in the
    vocabulary; of these only the probability of being unknown is known.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    num_unknown: int

    @property
    def total(self) -> float:
        """Natural logarithm of the probability of the line and its end."""
        return math.fsum(self.logprobs)


def score(model: LanguageModel, vocabulary: Vocabulary, lines: Iterable[str]) -> Iterator[Scored]:
    """Each line's log-probability, in the order of the lines, which are read a thousand at a time.

    lines: without line ends; ValueError for one that holds a line feed. An empty line is a sentence whose
    only token is its end. A line may be of any length: the model's memory use does not grow with it.
    """
    remaining = iter(lines)
    while window := list(islice(remaining, _WINDOW)):
        yield from score_lines(model, vocabulary, window)


def score_lines(model: LanguageModel, vocabulary: Vocabulary, lines: Sequence[str]) -> list[Scored]:
    """As `score`, of lines that are all there: those of about equal length go through the model together."""
    rows = _encode(vocabulary, lines)
    nll = score_rows(model, rows, start=vocabulary.end_id)
    return [
        Scored(
            text=line,
            tokens=tuple(row.tolist()),
            # From 0, so that a certain token has 0.0 and not -0.0.
            logprobs=tuple((0.0 - nll_N).tolist()),
            num_unknown=int((row == vocabulary.unknown_id).sum()) if vocabulary.unknown_id is not None else 0,
        )
        for line, row, nll_N in zip(lines, rows, nll, strict=True)
    ]


def score_rows(model: LanguageModel, rows: Sequence[_Tokens], *, start: int) -> list[npt.NDArray[np.float64]]:
    """Negative log-likelihood in nats of each token of each row, from a fresh state and the input `start`.

    Raises:
        ValueError: one is not finite.
    """
    nll: list[list[npt.NDArray[np.float64]]] = [[] for _ in rows]
    with evaluation_mode(model):
        for group in groups_by_length([len(row) for row in rows], max_tokens=_MAX_TOKENS):
            batches = row_batches(
                [rows[index] for index in group],
                first_inputs=[start] * len(group),
                num_steps=max(1, _MAX_TOKENS // len(group)),
            )
            done = 0
            for likelihood in likelihoods(model, batches):
                for index, nll_S in zip(group, likelihood.nll_BS.double().cpu().numpy(), strict=True):
                    nll[index].append(nll_S[: max(0, len(rows[index]) - done)])
                done += likelihood.nll_BS.shape[1]
    nll_of_rows = [np.concatenate(pieces) for pieces in nll]
    if not all(np.isfinite(nll_N).all() for nll_N in nll_of_rows):
        raise ValueError("the model's output is not finite: its training diverged; use an earlier checkpoint")
    return nll_of_rows


def _encode(vocabulary: Vocabulary, lines: Sequence[str]) -> list[_Tokens]:
    """The tokens of each line, its end included."""
    for line in lines:
        if "\n" in line:
            raise ValueError(f"line {line[:40]!r} holds a line feed; give one line at a time")
    token_N = vocabulary.encode_lines(lines)
    end_N = np.flatnonzero(token_N == vocabulary.end_id) + 1
    return np.split(token_N, end_N[:-1])
