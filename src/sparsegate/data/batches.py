"""Batches that are a pure function of (seed, index), so that a run resumes at any step at once.

The input of a position is always the token that stands before its target in the stream. Before the first
token of a sentence that is the end of the sentence before, so `end_id` also means "start"; it stands before
the first sentence as well.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .dataset import TokenFile

_Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of tokens to predict.

    input_BS, target_BS: int64; target is input shifted by one. Where `mask_BS` (bool) is False, both are 0
        and ignored.
    carries_state: a row goes on where the same row of the batch before ended; else recurrent state starts at
        zero.
    index: its number, counted on over epochs.
    """

    input_BS: Tensor
    target_BS: Tensor
    mask_BS: Tensor
    carries_state: bool
    index: int

    @property
    def num_tokens(self) -> int:
        """Number of real targets."""
        return int(self.mask_BS.sum())


def _batch(
    token_file: TokenFile, position_BS: _Positions, mask_BS: Any, carries_state: bool, index: int
) -> Batch:
    """The batch whose targets stand at `position_BS` of the stream, which is a ring: before its first token
    is its last, the end of a sentence."""
    num_tokens = token_file.num_tokens
    target_BS = token_file.token_N[position_BS % num_tokens].astype(np.int64)
    input_BS = token_file.token_N[(position_BS - 1) % num_tokens].astype(np.int64)
    return Batch(
        input_BS=torch.from_numpy(input_BS * mask_BS),
        target_BS=torch.from_numpy(target_BS * mask_BS),
        mask_BS=torch.from_numpy(mask_BS),
        carries_state=carries_state,
        index=index,
    )


def _random(seed: int, epoch: int, size: int) -> npt.NDArray[np.uint64]:
    """`size` random 64-bit numbers that depend on (seed, epoch) alone, and not on the version of NumPy."""
    return np.random.PCG64([seed, epoch]).random_raw(size)


class ContinuousBatches:
    """The split as one stream, cut into `batch_size` lanes that are unrolled `num_steps` at a time, state
    carried.

    All batches are full. An epoch begins at an offset drawn from (seed, epoch), goes once around the stream,
    and leaves out the ``num_tokens % (batch_size * num_steps)`` tokens before the offset; other epochs leave
    out others.

    ValueError if the split is smaller than one batch.
    """

    def __init__(self, *, token_file: TokenFile, batch_size: int, num_steps: int, seed: int) -> None:
        _check_positive(batch_size=batch_size, num_steps=num_steps)
        _check_seed(seed)
        self.batches_per_epoch = token_file.num_tokens // (batch_size * num_steps)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"batch_size ({batch_size}) x num_steps ({num_steps}) must not exceed the "
                f"{token_file.num_tokens:,} tokens of {token_file.tokens_path}"
            )
        self._token_file = token_file
        self._num_steps = num_steps
        self._seed = seed
        lane_B = np.arange(batch_size) * (self.batches_per_epoch * num_steps)
        self._position_BS = lane_B[:, None] + np.arange(num_steps)

    def batch(self, index: int) -> Batch:
        """Batch number `index`, counted on over epochs; its mask is all true."""
        epoch, number = divmod(index, self.batches_per_epoch)
        offset = int(_random(self._seed, epoch, 1)[0] % np.uint64(self._token_file.num_tokens))
        position_BS = self._position_BS + (offset + number * self._num_steps)
        mask_BS = np.ones(position_BS.shape, dtype=bool)
        return _batch(self._token_file, position_BS, mask_BS, number > 0, index)


class SentenceBatches:
    """Sentences in an order drawn from (seed, epoch), those of about equal length together.

    A batch holds about `batch_words` tokens, ends of sentences included; its rows are as long as its longest
    sentence. A sentence longer than `max_length` is cut into pieces, and the first input of a later piece is
    the token before it. An epoch holds every token exactly once, also for an evaluation sentence by sentence.
    """

    def __init__(self, *, token_file: TokenFile, batch_words: int, max_length: int, seed: int) -> None:
        _check_positive(batch_words=batch_words, max_length=max_length)
        _check_seed(seed)
        if max_length > batch_words:
            raise ValueError(f"max_length ({max_length}) must not exceed batch_words ({batch_words})")
        self._token_file = token_file
        self._seed = seed
        self._piece_start_N, self._piece_length_N = _pieces(token_file, max_length)
        # A batch is never empty, since it spans at least batch_words tokens and no piece is longer than that.
        self.batches_per_epoch = max(1, token_file.num_tokens // batch_words)
        self._plan = lru_cache(maxsize=1)(self._plan_of_epoch)

    def batch(self, index: int) -> Batch:
        """Batch number `index`, counted on over epochs; the first of an epoch draws the epoch's order."""
        epoch, number = divmod(index, self.batches_per_epoch)
        piece_N, first_N, batch_N = self._plan(epoch)
        chosen = batch_N[number]
        piece_B = piece_N[first_N[chosen] : first_N[chosen + 1]]
        length_B = self._piece_length_N[piece_B]
        step_S = np.arange(length_B.max())
        mask_BS = step_S < length_B[:, None]
        position_BS = self._piece_start_N[piece_B][:, None] + step_S
        return _batch(self._token_file, position_BS, mask_BS, False, index)

    def _plan_of_epoch(self, epoch: int) -> tuple[_Positions, _Positions, _Positions]:
        """The pieces by length, at random within it; where each batch begins; the batches' order."""
        num_pieces = len(self._piece_length_N)
        draw = _random(self._seed, epoch, num_pieces + self.batches_per_epoch)
        piece_N = np.lexsort((draw[:num_pieces], self._piece_length_N))
        token_N = np.cumsum(self._piece_length_N[piece_N]) - self._piece_length_N[piece_N]
        batch_of_piece_N = token_N * self.batches_per_epoch // self._token_file.num_tokens
        first_N = np.searchsorted(batch_of_piece_N, np.arange(self.batches_per_epoch + 1))
        return piece_N, first_N, np.argsort(draw[num_pieces:], kind="stable")


def _pieces(token_file: TokenFile, max_length: int) -> tuple[_Positions, _Positions]:
    """Start and length, in tokens, of every sentence, those longer than `max_length` in pieces."""
    end_N = token_file.sentence_end_N.astype(np.int64)
    start_N = np.concatenate(([0], end_N[:-1]))
    pieces_N = -(-(end_N - start_N) // max_length)
    first_N = np.repeat(np.cumsum(pieces_N) - pieces_N, pieces_N)
    piece_start_N = np.repeat(start_N, pieces_N) + (np.arange(len(first_N)) - first_N) * max_length
    return piece_start_N, np.minimum(max_length, np.repeat(end_N, pieces_N) - piece_start_N)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed ({seed}) must not be negative")
