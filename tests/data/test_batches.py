import itertools
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.data import Batch, ContinuousBatches, SentenceBatches, TokenFile, batches
from sparsegate.data.permutation import Permutation, random_numbers
from tests.data.making import dataset_of, prose


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    """A split of sentences of 1 to 30 words; every word, known by its number, occurs once."""
    words = iter(range(10**6))
    lengths = [(number * 7) % 31 for number in range(150)]
    text = "".join(" ".join(f"w{next(words)}" for _ in range(length)) + "\n" for length in lengths)
    return dataset_of(tmp_path_factory.mktemp("numbered"), text).split("train")


Make = Callable[[TokenFile, int], ContinuousBatches | SentenceBatches]


def continuous(token_file: TokenFile, seed: int) -> ContinuousBatches:
    return ContinuousBatches(token_file=token_file, batch_size=3, num_steps=7, seed=seed)


def sentences(token_file: TokenFile, seed: int) -> SentenceBatches:
    return SentenceBatches(token_file=token_file, batch_words=50, max_length=12, seed=seed)


every_kind = pytest.mark.parametrize("make", [continuous, sentences])


def epoch_of(batches: ContinuousBatches | SentenceBatches, epoch: int) -> list[Batch]:
    first = epoch * batches.batches_per_epoch
    return [batches.batch(index) for index in range(first, first + batches.batches_per_epoch)]


def targets(batches: list[Batch]) -> list[int]:
    return [token for batch in batches for token in batch.target_BS[batch.mask_BS].tolist()]


def equal(one: Batch, other: Batch) -> bool:
    tensors = ("input_BS", "target_BS", "mask_BS")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return same and (one.carries_state, one.index) == (other.carries_state, other.index)


def predecessors(token_file: TokenFile) -> Counter[tuple[int, int]]:
    """Each token with the one before it; the end of a sentence stands before the first."""
    before = token_file.end_id
    pairs: Counter[tuple[int, int]] = Counter()
    for token in token_file.token_N.tolist():
        pairs[before, token] += 1
        before = token
    return pairs


def pairs_of(batches: list[Batch]) -> Counter[tuple[int, int]]:
    return Counter(
        pair
        for batch in batches
        for pair in zip(
            batch.input_BS[batch.mask_BS].tolist(), batch.target_BS[batch.mask_BS].tolist(), strict=True
        )
    )


@every_kind
def test_batches_are_a_pure_function_of_seed_and_index(make: Make, numbered: TokenFile) -> None:
    batches = make(numbered, 5)
    indices = [0, 3, batches.batches_per_epoch, 4 * batches.batches_per_epoch + 1, 1, 3]
    several = [batches.batch(index) for index in indices]
    for index, batch in zip(indices, several, strict=True):
        assert batch.index == index
        assert equal(batch, make(numbered, 5).batch(index))


@every_kind
def test_epochs_and_seeds_differ(make: Make, numbered: TokenFile) -> None:
    batches = make(numbered, 0)
    orders = [targets(epoch_of(batches, epoch)) for epoch in range(4)]
    orders += [targets(epoch_of(make(numbered, seed), 0)) for seed in (1, 2)]
    assert all(orders[i] != orders[j] for i in range(len(orders)) for j in range(i))


@every_kind
def test_types_and_shapes(make: Make, numbered: TokenFile) -> None:
    for batch in epoch_of(make(numbered, 0), 0):
        assert batch.input_BS.dtype == batch.target_BS.dtype == torch.int64
        assert batch.mask_BS.dtype == torch.bool
        assert batch.input_BS.shape == batch.target_BS.shape == batch.mask_BS.shape
        assert batch.num_tokens == int(batch.mask_BS.sum()) > 0
        assert not batch.input_BS[~batch.mask_BS].any()
        assert not batch.target_BS[~batch.mask_BS].any()


def test_sentences_cover_every_token_once_an_epoch_with_the_token_before_it(numbered: TokenFile) -> None:
    for epoch in (0, 1, 7):
        assert pairs_of(epoch_of(sentences(numbered, 3), epoch)) == predecessors(numbered)


def test_a_row_of_sentence_batches_is_a_sentence_or_a_piece_of_one(numbered: TokenFile) -> None:
    ends = numbered.sentence_end_N.tolist()
    stream = numbered.token_N.tolist()
    pieces: Counter[tuple[int, ...]] = Counter()
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        pieces.update(tuple(stream[first : min(first + 12, end)]) for first in range(start, end, 12))
    rows: Counter[tuple[int, ...]] = Counter()
    for batch in epoch_of(sentences(numbered, 0), 2):
        assert not batch.carries_state
        lengths = batch.mask_BS.sum(1)
        assert batch.mask_BS.shape[1] == lengths.max() <= 12
        for row, mask, length in zip(batch.target_BS, batch.mask_BS, lengths, strict=True):
            assert mask.tolist() == [True] * int(length) + [False] * (len(row) - int(length))
            rows[tuple(row[mask].tolist())] += 1
    assert rows == pieces


def test_sentence_batches_hold_about_as_many_tokens_as_asked_for_and_little_padding(
    numbered: TokenFile,
) -> None:
    batches = epoch_of(sentences(numbered, 0), 0)
    assert len(batches) == numbered.num_tokens // 50
    sizes = [batch.num_tokens for batch in batches]
    assert 50 - 12 <= min(sizes) <= max(sizes) <= 50 * (1 + 1 / len(batches)) + 12
    assert sum(batch.mask_BS.numel() for batch in batches) < 1.15 * sum(sizes)


def test_continuous_epochs_leave_out_less_than_a_batch_and_repeat_nothing(numbered: TokenFile) -> None:
    batches = continuous(numbered, 0)
    stream = predecessors(numbered)
    for epoch in range(5):
        pairs = pairs_of(epoch_of(batches, epoch))
        assert pairs <= stream
        assert stream.total() - pairs.total() == numbered.num_tokens % (3 * 7) < 3 * 7


def test_continuous_rows_go_on_where_the_batch_before_ended(numbered: TokenFile) -> None:
    batches = epoch_of(continuous(numbered, 0), 1)
    stream = numbered.token_N.tolist()
    assert [batch.carries_state for batch in batches] == [False] + [True] * (len(batches) - 1)
    assert all(batch.mask_BS.all() for batch in batches)
    lanes = torch.cat([batch.target_BS for batch in batches], dim=1)
    inputs = torch.cat([batch.input_BS for batch in batches], dim=1)
    assert torch.equal(inputs[:, 1:], lanes[:, :-1])
    ring = stream + stream
    joined = lanes.flatten().tolist()
    assert any(ring[first : first + len(joined)] == joined for first in range(len(stream)))


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    batch_words=st.integers(1, 40),
    max_length=st.integers(1, 40),
    seed=st.integers(0, 2**63),
)
def test_sentence_batches_of_any_text_are_a_partition(
    lengths: list[int], batch_words: int, max_length: int, seed: int
) -> None:
    max_length = min(max_length, batch_words)
    batches = SentenceBatches(
        token_file=in_memory(lengths), batch_words=batch_words, max_length=max_length, seed=seed
    )
    epoch = epoch_of(batches, seed % 3)
    assert pairs_of(epoch) == predecessors(in_memory(lengths))
    assert all(batch.num_tokens > 0 for batch in epoch)


class InMemory:
    """What batches read of a `TokenFile`."""

    def __init__(self, token_N: np.ndarray, sentence_end_N: np.ndarray) -> None:
        self.token_N = token_N
        self.sentence_end_N = sentence_end_N
        self.num_tokens = len(token_N)
        self.end_id = 0
        self.tokens_path = Path("memory.tokens")


def in_memory(lengths: list[int]) -> TokenFile:
    token_N, ends = [], []
    for length in lengths:
        token_N += [len(token_N) + place + 1 for place in range(length)] + [0]
        ends.append(len(token_N))
    return InMemory(np.array(token_N, dtype="<u4"), np.array(ends, dtype="<u8"))  # type: ignore[return-value]


def plain_epoch(lengths: list[int], batch_words: int, max_length: int, seed: int) -> list[list[range]]:
    """The batches of epoch 0, each piece as the range of its positions: the docstring, in plain loops."""
    num_tokens = sum(lengths)
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    pieces = [
        range(start + first, start + min(first + max_length, length))
        for start, length in zip(starts, lengths, strict=True)
        for first in range(0, length, max_length)
    ]
    num_batches = max(1, num_tokens // batch_words)
    num_blocks = max(1, num_tokens // max_length)
    block_of = [min(piece.start // max_length, num_blocks - 1) for piece in pieces]
    order = Permutation(size=num_blocks, seed=(0, 0, 0, seed))(np.arange(num_blocks)).tolist()
    num_windows = -(-num_batches // max(1, batches._BLOCKS_AT_ONCE * max_length // batch_words))
    found: list[list[range]] = []
    for window in range(num_windows):
        first, after = (number * num_batches // num_windows for number in (window, window + 1))
        blocks = order[first * num_blocks // num_batches : after * num_blocks // num_batches]
        rest = [[p for p, of in zip(pieces, block_of, strict=True) if of == block] for block in blocks]
        # What is left behind the last whole block is drawn for last.
        tail = [p for each in rest for p in each if p.start >= num_blocks * max_length]
        drawn = [p for each in rest for p in each if p not in tail] + tail
        draw = random_numbers((1, 0, window, seed), len(drawn) + after - first).tolist()
        ordered = sorted(range(len(drawn)), key=lambda n: (len(drawn[n]), draw[n]))
        total, cuts, done = sum(map(len, drawn)), [], 0
        for number in ordered:
            cuts.append(done * (after - first) // total)
            done += len(drawn[number])
        begins = [sum(cut < number for cut in cuts) for number in range(after - first + 1)]
        for number in range(1, len(begins)):
            begins[number] = max(begins[number], begins[number - 1] + 1)
        for number in range(len(begins)):
            begins[number] = min(begins[number], len(drawn) - (len(begins) - 1 - number))
        of_window = [[drawn[n] for n in ordered[begin:end]] for begin, end in itertools.pairwise(begins)]
        found += [of_window[n] for n in sorted(range(after - first), key=lambda n: draw[len(drawn) + n])]
    return found


@pytest.mark.parametrize("blocks_at_once", [1 << 16, 8])
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    batch_words=st.integers(1, 60),
    max_length=st.integers(1, 40),
    seed=st.integers(0, 2**63),
)
def test_sentence_batches_are_those_of_plain_loops(
    blocks_at_once: int, lengths: list[int], batch_words: int, max_length: int, seed: int
) -> None:
    max_length = min(max_length, batch_words)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(batches, "_BLOCKS_AT_ONCE", blocks_at_once)
        token_file = in_memory([length - 1 for length in lengths])
        made = SentenceBatches(
            token_file=token_file, batch_words=batch_words, max_length=max_length, seed=seed
        )
        expected = plain_epoch(lengths, batch_words, max_length, seed)
    rows = [
        [row[mask].tolist() for row, mask in zip(batch.target_BS, batch.mask_BS, strict=True)]
        for batch in epoch_of(made, 0)
    ]
    stream = token_file.token_N.tolist()
    assert rows == [[[stream[place] for place in piece] for piece in batch] for batch in expected]


def test_no_two_orders_of_sentences_are_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of blocks and pieces nor of epochs, windows and seeds, also such as are several numbers."""
    first_of: Counter[int] = Counter()

    def recorded(seed: tuple[int, ...], size: int) -> np.ndarray:
        first_of[int(random_numbers(seed, 1)[0])] += 1
        return random_numbers(seed, size)

    monkeypatch.setattr("sparsegate.data.batches.random_numbers", recorded)
    monkeypatch.setattr("sparsegate.data.permutation.random_numbers", recorded)
    monkeypatch.setattr(batches, "_BLOCKS_AT_ONCE", 8)
    token_file = in_memory([9] * 30)
    seeds = [0, 1, 7, 1 << 32, 7 + (1 << 32), 7 + (2 << 32), 7 + (1 << 64)]
    for seed in seeds:
        made = SentenceBatches(token_file=token_file, batch_words=40, max_length=10, seed=seed)
        for epoch in range(3):
            epoch_of(made, epoch)
    assert made._num_windows > 2
    # For every window its blocks are drawn, the same for all of an epoch, and its pieces.
    assert len(first_of) == len(seeds) * 3 * (1 + made._num_windows)


def test_batches_of_many_windows_hold_as_many_words_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one sentence is longer than all others together."""
    monkeypatch.setattr(batches, "_BLOCKS_AT_ONCE", 64)
    lengths = [(number * 7) % 31 for number in range(3000)]
    token_file = in_memory([*lengths[:1000], 60_000, *lengths[1000:]])
    made = SentenceBatches(token_file=token_file, batch_words=400, max_length=20, seed=0)
    assert made._num_windows > 50
    sizes = [batch.num_tokens for batch in epoch_of(made, 1)]
    assert len(sizes) == token_file.num_tokens // 400
    assert 0.7 * 400 < min(sizes) <= max(sizes) < 1.3 * 400


def test_memory_does_not_grow_with_the_number_of_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_BLOCKS_AT_ONCE", 1 << 8)
    peaks = []
    for num_sentences in (1 << 15, 1 << 21):
        token_N = np.tile(np.array([5, 0], dtype="<u2"), num_sentences)
        ends_N = 2 * np.arange(1, num_sentences + 1, dtype="<u8")
        tracemalloc.start()
        made = SentenceBatches(
            token_file=InMemory(token_N, ends_N),  # type: ignore[arg-type]
            batch_words=5000,
            max_length=50,
            seed=0,
        )
        assert abs(made.batch(3).num_tokens / 5000 - 1) < 0.1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 8 << 20


def test_impossible_batches_are_refused(numbered: TokenFile) -> None:
    size = numbered.num_tokens
    with pytest.raises(
        ValueError, match=rf"batch_size \({size}\) x num_steps \(2\) must not exceed the {size:,} "
    ):
        ContinuousBatches(token_file=numbered, batch_size=size, num_steps=2, seed=0)
    with pytest.raises(ValueError, match=r"num_steps \(0\) must be at least 1"):
        ContinuousBatches(token_file=numbered, batch_size=1, num_steps=0, seed=0)
    with pytest.raises(ValueError, match=r"batch_size \(-1\) must be at least 1"):
        ContinuousBatches(token_file=numbered, batch_size=-1, num_steps=3, seed=0)
    with pytest.raises(ValueError, match=r"max_length \(11\) must not exceed batch_words \(10\)"):
        SentenceBatches(token_file=numbered, batch_words=10, max_length=11, seed=0)
    with pytest.raises(ValueError, match=r"seed \(-1\) must not be negative"):
        sentences(numbered, -1)


def test_a_split_of_one_batch_is_that_batch_in_another_order(tmp_path: Path) -> None:
    token_file = dataset_of(tmp_path, prose(3)).split("train")
    batches = SentenceBatches(token_file=token_file, batch_words=1000, max_length=1000, seed=0)
    assert batches.batches_per_epoch == 1
    assert pairs_of([batches.batch(12)]) == predecessors(token_file)
