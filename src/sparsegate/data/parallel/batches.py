"""Batches of sentence pairs for a translation model.

A source is the token of the target language, the subwords, and the end; the decoder's input begins with the
beginning, its labels end with the end::

    source_BS   <2fr> The cat  </s>  <pad>
    target_BS   <s>   Le  chat
    label_BS    Le    chat </s>
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..dataset import TokenFile
from ..joint_subwords import JointSubwords
from .dataset import Pair
from .epoch import EpochPlan

_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TranslationBatch:
    """Sentences to translate, and their translations.

    source_BS, target_BS, label_BS: int64; label is target shifted by one. They hold `pad_id` where their mask
        is False: `source_mask_BS`, and `target_mask_BS` for both target and label (bool).
    index: its number, counted on over epochs.
    """

    source_BS: Tensor
    source_mask_BS: Tensor
    target_BS: Tensor
    label_BS: Tensor
    target_mask_BS: Tensor
    index: int

    @property
    def num_sentences(self) -> int:
        """Number of rows."""
        return len(self.source_BS)

    @property
    def num_tokens(self) -> int:
        """Number of real labels, ends included."""
        return int(self.target_mask_BS.sum())

    def of_rows(self, rows: range) -> "TranslationBatch":
        """Consecutive sentences of it, perhaps none, as wide as the batch."""
        first, end = rows.start, rows.stop
        return TranslationBatch(
            source_BS=self.source_BS[first:end],
            source_mask_BS=self.source_mask_BS[first:end],
            target_BS=self.target_BS[first:end],
            label_BS=self.label_BS[first:end],
            target_mask_BS=self.target_mask_BS[first:end],
            index=self.index,
        )


class TranslationBatches:
    """Batches to train on, each a pure function of (seed, index): a run resumes at any one at once.

    batch_subwords: how many positions the padded source, and the padded target, may have at most; of pairs
        longer than that each is a batch by itself. A source counts with its language token and its end, a
        target with its end. Sentences of about equal length stand together.
    temperature: how pairs of languages are mixed. Of an epoch's examples, each pair has a share proportional
        to its size to the power of 1 / temperature: at 1 as many as there are, at 5 small pairs more often.
        All pairs are in each batch, if their lengths permit.

    An epoch has as many examples as the text, but for rounding up. At temperature 1 it is every example once.
    Otherwise each goes through its pair's examples of a length in a new order each time, without repeating
    one before all of them were seen.
    """

    def __init__(
        self,
        *,
        pairs: Sequence[Pair],
        vocabulary: JointSubwords,
        batch_subwords: int,
        seed: int,
        temperature: float = 1.0,
    ) -> None:
        _check(batch_subwords, pairs)
        if seed < 0:
            raise ValueError(f"seed ({seed}) must not be negative")
        if not 1 <= temperature <= 1000:
            raise ValueError(f"temperature ({temperature}) must be at least 1, and no more than 1000")
        self._pairs = tuple(pairs)
        self._vocabulary = vocabulary
        self._epochs = EpochPlan(
            lengths=[_lengths(pair) for pair in pairs],
            batch_subwords=batch_subwords,
            seed=seed,
            temperature=temperature,
        )
        self._plan = lru_cache(maxsize=1)(self._epochs.plan)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches, the same in each epoch."""
        return self._epochs.num_batches

    @property
    def shares(self) -> dict[str, float]:
        """Which share of the examples each pair of languages has."""
        return {
            pair.name: float(share) for pair, share in zip(self._pairs, self._epochs.share_P, strict=True)
        }

    def batch(self, index: int) -> TranslationBatch:
        """Batch number `index`, counted on over epochs; the first of an epoch draws the epoch's order."""
        epoch, number = divmod(index, self.batches_per_epoch)
        pair_B, example_B = self._plan(epoch).rows(number)
        return _batch(self._pairs, pair_B, example_B, self._vocabulary, index)


class EvaluationBatches:
    """All examples of one pair, once and in order, in batches of at most `batch_subwords` positions.

    Lengths are counted, and longer pairs are treated, as in `TranslationBatches`.
    """

    def __init__(self, *, pair: Pair, vocabulary: JointSubwords, batch_subwords: int) -> None:
        _check(batch_subwords, [pair])
        self._pair = pair
        self._vocabulary = vocabulary
        self._first_N = _cut_in_order(_lengths(pair).max(axis=1), batch_subwords)

    def __len__(self) -> int:
        return len(self._first_N) - 1

    def __iter__(self) -> Iterator[TranslationBatch]:
        return map(self.batch, range(len(self)))

    def batch(self, index: int) -> TranslationBatch:
        """Batch number `index`."""
        example_B = np.arange(self._first_N[index], self._first_N[index + 1])
        return _batch((self._pair,), np.zeros_like(example_B), example_B, self._vocabulary, index)


def _check(batch_subwords: int, pairs: Sequence[Pair]) -> None:
    if batch_subwords < 1:
        raise ValueError(f"batch_subwords ({batch_subwords}) must be at least 1")
    if not pairs:
        raise ValueError("pairs: there is none; give at least one")


def _lengths(pair: Pair) -> _Integers:
    """For each example how many positions its source and its target take: [N, 2]."""
    source_N, target_N = (
        np.diff(side.sentence_end_N.astype(np.int64), prepend=0) for side in (pair.source, pair.target)
    )
    return np.stack((source_N + 1, target_N), axis=1)


def _cut_in_order(size_N: _Integers, budget: int) -> _Integers:
    """Where batches begin, and the end of the last: as many rows as fit, padded to the longest of them."""
    first, rows, longest = [0], 0, 0
    for example, size in enumerate(size_N.tolist()):
        longest = max(longest, size)
        if rows and (rows + 1) * longest > budget:
            first.append(example)
            rows, longest = 0, size
        rows += 1
    return np.array([*first, len(size_N)])


def _batch(
    pairs: Sequence[Pair], pair_B: _Integers, example_B: _Integers, vocabulary: JointSubwords, index: int
) -> TranslationBatch:
    """The batch of the examples `example_B`, each of the pair that `pair_B` numbers."""
    source_BS, source_mask_BS = _sentences(
        [pair.source for pair in pairs], pair_B, example_B, vocabulary.pad_id
    )
    label_BS, label_mask_BS = _sentences(
        [pair.target for pair in pairs], pair_B, example_B, vocabulary.pad_id
    )
    language_P = np.array([vocabulary.language_id(pair.target_language) for pair in pairs])
    begin_B = np.full(len(pair_B), vocabulary.begin_id)
    target_BS = _behind(begin_B, label_BS[:, :-1])
    return TranslationBatch(
        source_BS=torch.from_numpy(_behind(language_P[pair_B], source_BS)),
        source_mask_BS=torch.from_numpy(_behind(np.ones(len(pair_B), dtype=bool), source_mask_BS)),
        target_BS=torch.from_numpy(np.where(label_mask_BS, target_BS, vocabulary.pad_id)),
        label_BS=torch.from_numpy(label_BS),
        target_mask_BS=torch.from_numpy(label_mask_BS),
        index=index,
    )


def _sentences(
    sides: Sequence[TokenFile], side_B: _Integers, example_B: _Integers, pad_id: int
) -> tuple[_Integers, npt.NDArray[np.bool_]]:
    """The ids of sentences, padded at their ends, and which are real; `side_B` says whose they are."""
    start_B, end_B = np.empty_like(example_B), np.empty_like(example_B)
    for number, side in enumerate(sides):
        here = side_B == number
        end_B[here] = side.sentence_end_N[example_B[here]]
        before_B = side.sentence_end_N[np.maximum(example_B[here] - 1, 0)]
        start_B[here] = np.where(example_B[here] > 0, before_B, 0)
    step_S = np.arange((end_B - start_B).max())
    mask_BS = step_S < (end_B - start_B)[:, None]
    id_BS = np.full(mask_BS.shape, pad_id, dtype=np.int64)
    for number, side in enumerate(sides):
        row, step = np.nonzero(mask_BS & (side_B == number)[:, None])
        id_BS[row, step] = side.token_N[start_B[row] + step]
    return id_BS, mask_BS


def _behind(first_B: npt.NDArray[Any], rest_BS: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows that begin with `first_B` and go on with `rest_BS`."""
    return np.concatenate((first_B[:, None], rest_BS), axis=1)
