"""Batches that are a pure function of (seed, index), so that a run resumes at any step at once.

The input of a position is always the token that stands before its target in the stream. Before the first
token of a sentence that is the end of the sentence before, so `end_id` also means "start"; it stands before
the first sentence as well.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .dataset import TokenFile
from .permutation import Permutation, random_numbers

_Positions = npt.NDArray[np.int64]

# Sentences are shuffled among those of about so many blocks; what a batch costs to find grows with it.
_BLOCKS_AT_ONCE = 1 << 16
# What is drawn for an epoch of sentences. It begins the key, and the seed ends it: keys are as if padded by
# zeros, and a large seed is several numbers, but so no key is the beginning of another.
_BLOCKS, _PIECES = range(2)


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

    def of_rows(self, rows: range) -> "Batch":
        """Consecutive rows of it, perhaps none."""
        first, end = rows.start, rows.stop
        return replace(
            self,
            input_BS=self.input_BS[first:end],
            target_BS=self.target_BS[first:end],
            mask_BS=self.mask_BS[first:end],
        )


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
        offset = int(random_numbers((self._seed, epoch), 1)[0] % np.uint64(self._token_file.num_tokens))
        position_BS = self._position_BS + (offset + number * self._num_steps)
        mask_BS = np.ones(position_BS.shape, dtype=bool)
        return _batch(self._token_file, position_BS, mask_BS, number > 0, index)


class SentenceBatches:
    """Sentences in an order drawn from (seed, epoch), those of about equal length together.

    A batch holds about `batch_words` tokens, ends of sentences included; its rows are as long as its longest
    sentence. A sentence longer than `max_length` is cut into pieces, and the first input of a later piece is
    the token before it. An epoch holds every token exactly once, also for an evaluation sentence by sentence.

    Nothing that grows with the split is held in memory. The stream is seen as blocks of `max_length` tokens,
    what is left at its end going with the last; a piece belongs to the block that it begins in, so that none
    is empty. An epoch is a pseudo-random permutation of the blocks, cut into windows of some 65,000. The
    pieces of a window are sorted by length, at random within it, and cut into the window's batches at equal
    numbers of tokens.
    """

    def __init__(self, *, token_file: TokenFile, batch_words: int, max_length: int, seed: int) -> None:
        _check_positive(batch_words=batch_words, max_length=max_length)
        _check_seed(seed)
        if max_length > batch_words:
            raise ValueError(f"max_length ({max_length}) must not exceed batch_words ({batch_words})")
        self._token_file = token_file
        self._max_length = max_length
        self._seed = seed
        self.batches_per_epoch = max(1, token_file.num_tokens // batch_words)
        self._num_blocks = max(1, token_file.num_tokens // max_length)
        self._num_windows = -(-self.batches_per_epoch // max(1, _BLOCKS_AT_ONCE * max_length // batch_words))
        self._window = lru_cache(maxsize=1)(self._window_of_epoch)

    def batch(self, index: int) -> Batch:
        """Batch number `index`, counted on over epochs; the first of a window draws the window's order."""
        epoch, number = divmod(index, self.batches_per_epoch)
        window = ((number + 1) * self._num_windows - 1) // self.batches_per_epoch
        start_N, length_N, first_N, order_N = self._window(epoch, window)
        chosen = order_N[number - self._first_batch(window)]
        start_B, length_B = (each[first_N[chosen] : first_N[chosen + 1]] for each in (start_N, length_N))
        step_S = np.arange(length_B.max())
        mask_BS = step_S < length_B[:, None]
        return _batch(self._token_file, start_B[:, None] + step_S, mask_BS, False, index)

    def _first_batch(self, window: int) -> int:
        return window * self.batches_per_epoch // self._num_windows

    def _window_of_epoch(
        self, epoch: int, window: int
    ) -> tuple[_Positions, _Positions, _Positions, _Positions]:
        """Starts and lengths of a window's pieces; where each of its batches begins; the batches' order."""
        num_tokens = self._token_file.num_tokens
        first, after = self._first_batch(window), self._first_batch(window + 1)
        # There are at least as many blocks as batches, and at least one for each batch of every window.
        first_block, after_block = (
            batch * self._num_blocks // self.batches_per_epoch for batch in (first, after)
        )
        permutation = Permutation(size=self._num_blocks, seed=(_BLOCKS, epoch, 0, self._seed))
        block_N = permutation(np.arange(first_block, after_block))
        if (block_N == self._num_blocks - 1).any() and self._num_blocks * self._max_length < num_tokens:
            block_N = np.append(block_N, self._num_blocks)
        start_N, length_N = _pieces(self._token_file, block_N, self._max_length)
        draw = random_numbers((_PIECES, epoch, window, self._seed), len(start_N) + after - first)
        piece_N = np.lexsort((draw[: len(start_N)], length_N))
        start_N, length_N = start_N[piece_N], length_N[piece_N]
        first_N = _cuts(length_N, after - first)
        return start_N, length_N, first_N, np.argsort(draw[len(start_N) :], kind="stable")


def _pieces(token_file: TokenFile, block_N: _Positions, max_length: int) -> tuple[_Positions, _Positions]:
    """Start and length, in tokens, of every piece of a sentence that begins in one of the blocks."""
    end_N = token_file.sentence_end_N
    first_N = block_N * max_length
    after_N = np.minimum(first_N + max_length, token_file.num_tokens)
    # Sentences that reach into the block: from the one that its first token is in to that of its last.
    first_sentence_N = np.searchsorted(end_N, first_N.astype(np.uint64), side="right")
    sentences_N = np.searchsorted(end_N, (after_N - 1).astype(np.uint64), side="right") - first_sentence_N + 1
    sentence_N = _ranges(first_sentence_N, sentences_N)
    start_N = np.where(sentence_N > 0, end_N[sentence_N - 1], 0).astype(np.int64)
    length_N = end_N[sentence_N].astype(np.int64) - start_N
    # Pieces of one sentence lie max_length apart, so one at most of each sentence begins in a block.
    offset_N = np.maximum(0, np.repeat(first_N, sentences_N) - start_N)
    offset_N = -(-offset_N // max_length) * max_length
    begins_N = (offset_N < length_N) & (start_N + offset_N < np.repeat(after_N, sentences_N))
    length_N = np.minimum(max_length, length_N - offset_N)
    return (start_N + offset_N)[begins_N], length_N[begins_N]


def _cuts(length_N: _Positions, num_batches: int) -> _Positions:
    """Where each batch of pieces of these lengths begins, and the end: about equal tokens, no batch empty."""
    batch_of_piece_N = (np.cumsum(length_N) - length_N) * num_batches // length_N.sum()
    cut_N = np.searchsorted(batch_of_piece_N, np.arange(num_batches + 1))
    batch_N = np.arange(num_batches + 1)
    ascending_N = np.maximum.accumulate(cut_N - batch_N) + batch_N
    return np.minimum(ascending_N, len(length_N) - num_batches + batch_N)


def _ranges(first_N: npt.NDArray[Any], size_N: npt.NDArray[Any]) -> _Positions:
    """The numbers ``first, first + 1, ...``, `size` of them, for each range, one after the other."""
    before_N = np.cumsum(size_N) - size_N
    return np.repeat(first_N - before_N, size_N) + np.arange(size_N.sum())


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed ({seed}) must not be negative")
