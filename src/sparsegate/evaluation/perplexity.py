"""Perplexity, bits per byte and balance of a language model on text that it has not seen."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ..decoding.inference import evaluation_mode
from ..decoding.likelihood import groups_by_length, likelihoods, row_batches
from ..decoding.peers import ALONE, Peers
from ..models.language_model import LanguageModel
from ..moe.routing import BalanceSums
from .sums import add_exactly
from .text import Text

_SORTED_AT_ONCE = 1 << 12


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model's likelihood of a text, and what it is to be divided by.

    nll_nats: negative log-likelihood of all tokens, ends of sentences included. num_words: without ends.
    num_bytes: of UTF-8, one for each end included. num_unknown: tokens that are `<unk>`. sums: what balance
    metrics are functions of, over the whole text in float64, by mixture layer. None: not known (see
    `text.part_of`).
    """

    nll_nats: float
    num_tokens: int
    num_sentences: int
    num_words: int | None
    num_bytes: int | None
    num_unknown: int
    sums: dict[str, BalanceSums]

    @property
    def perplexity(self) -> float:
        """Per token, ends of sentences included, as in the paper; compares models of one vocabulary."""
        return _exp(self.nll_nats / self.num_tokens)

    @property
    def word_perplexity(self) -> float | None:
        """Per word of the stated tokenisation and one end for each sentence: compares vocabularies, too."""
        return None if self.num_words is None else _exp(self.nll_nats / (self.num_words + self.num_sentences))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text: compares everything, if `unknown_share` is told beside it.

        To say that a word is unknown costs less than to say which it is, so unknown words lower it.
        """
        return None if self.num_bytes is None else self.nll_nats / math.log(2) / self.num_bytes

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that stand for whatever is not in the vocabulary."""
        return self.num_unknown / self.num_tokens

    def metrics(self) -> dict[str, float]:
        """All of the above that is known, and `loss`, the mean negative log-likelihood per token in nats."""
        metrics = {
            "loss": self.nll_nats / self.num_tokens,
            "perplexity": self.perplexity,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
            "unknown_share": self.unknown_share,
        }
        return {name: value for name, value in metrics.items() if value is not None}


def evaluate(
    model: LanguageModel,
    text: Text,
    *,
    batch_size: int,
    num_steps: int,
    unknown_id: int | None = None,
    context: Literal["stream", "sentence"] = "stream",
    progress: Callable[[int], None] | None = None,
    peers: Peers = ALONE,
) -> Evaluation:
    """Measure the likelihood of every token of `text`, each once.

    batch_size, num_steps: rows and steps that the model reads at once; they bound the memory. Sums are
    float64. unknown_id: of the vocabulary; None where nothing can be unknown. context: "stream" reads the
    text in `batch_size` lanes of consecutive tokens and carries the recurrent state
        from sentence to sentence. A lane begins without a state, so that many lanes on a short text read a
        little worse than one. "sentence" reads each sentence by itself from a fresh state, which is what a
        model was trained on that saw shuffled sentences; the result does not depend on `batch_size` and
        `num_steps`.
    progress: is told the number of tokens of each batch.
    peers: who read a share of each batch's rows each. All get the same result.

    The model is left in the mode that it was in.
    """
    for name, value in (("batch_size", batch_size), ("num_steps", num_steps)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    groups = _lanes(text, batch_size) if context == "stream" else _sentences(text, batch_size * num_steps)
    nll_nats, sums = 0.0, {}
    with evaluation_mode(model):
        for rows, first_inputs in groups:
            steps = max(1, batch_size * num_steps // len(rows))
            batches = row_batches(rows, first_inputs=first_inputs, num_steps=steps)
            own = (batch.of_rows(peers.rows(len(rows))) for batch in batches)
            for likelihood in likelihoods(model, own):
                nll_nats += float(likelihood.nll_BS.sum(dtype=torch.float64))
                sums = add_exactly(sums, likelihood.sums)
                if progress is not None:
                    progress(likelihood.num_tokens)
    (nll_nats,), sums = peers.sum(nll_nats), peers.total(sums)
    return Evaluation(
        nll_nats=nll_nats,
        num_tokens=len(text.token_N),
        num_sentences=len(text.sentence_end_N),
        num_words=text.num_words,
        num_bytes=text.num_bytes,
        num_unknown=0 if unknown_id is None else int(np.count_nonzero(text.token_N == unknown_id)),
        sums=sums,
    )


_Rows = tuple[list[npt.NDArray[Any]], list[int]]


def _lanes(text: Text, batch_size: int) -> Iterator[_Rows]:
    """The text in lanes of equal length, except that the last is shorter, and the token before each."""
    num_tokens = len(text.token_N)
    length = -(-num_tokens // batch_size)
    starts = range(0, num_tokens, length)
    yield (
        [text.token_N[start : start + length] for start in starts],
        [text.end_id, *(int(text.token_N[start - 1]) for start in starts[1:])],
    )


def _sentences(text: Text, max_tokens: int) -> Iterator[_Rows]:
    """All sentences in groups of about equal length."""
    start = 0
    for first in range(0, len(text.sentence_end_N), _SORTED_AT_ONCE):
        end_N = text.sentence_end_N[first : first + _SORTED_AT_ONCE].astype(np.int64)
        rows = np.split(text.token_N[start : end_N[-1]], end_N[:-1] - start)
        for group in groups_by_length([len(row) for row in rows], max_tokens=max_tokens):
            yield [rows[index] for index in group], [text.end_id] * len(group)
        start = int(end_N[-1])


def _exp(value: float) -> float:
    """The exponential, infinite where it is too large for a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
