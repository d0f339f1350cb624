import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.data.joint_subwords import JointSubwords
from sparsegate.data.parallel import (
    EvaluationBatches,
    Pair,
    TranslationBatch,
    TranslationBatches,
    TranslationDataset,
)
from tests.data.parallel.making import dataset_of, pairs

TENSORS = ("source_BS", "source_mask_BS", "target_BS", "label_BS", "target_mask_BS")
Example = tuple[tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TranslationDataset:
    sizes = {"en-fr": 500, "de-en": 120}
    return dataset_of(tmp_path_factory.mktemp("numbered"), sizes, both_directions=True)


def batches_of(
    dataset: TranslationDataset, *names: str, budget: int = 200, **options: object
) -> TranslationBatches:
    train = dataset.part("train")
    chosen = [train[name] for name in names or train]
    return TranslationBatches(
        pairs=chosen, vocabulary=dataset.vocabulary, batch_subwords=budget, **{"seed": 3, **options}
    )


def epoch_of(batches: TranslationBatches, epoch: int) -> list[TranslationBatch]:
    first = epoch * batches.batches_per_epoch
    return [batches.batch(index) for index in range(first, first + batches.batches_per_epoch)]


def examples(batches: list[TranslationBatch]) -> list[Example]:
    """What the rows say: the source with its language, the label with its end."""
    return [
        (tuple(source[source_mask].tolist()), tuple(label[label_mask].tolist()))
        for batch in batches
        for source, source_mask, label, label_mask in zip(
            batch.source_BS, batch.source_mask_BS, batch.label_BS, batch.target_mask_BS, strict=True
        )
    ]


def written(vocabulary: JointSubwords, first: str, second: str, number_of: int) -> list[Example]:
    """An oracle from the text: what the examples of one direction must be."""
    return [
        (
            tuple(vocabulary.encode_source(source, target_language=second)),
            (*vocabulary.encode(target), vocabulary.end_id),
        )
        for source, target in pairs(first, second, range(number_of))
    ]


def all_written(vocabulary: JointSubwords) -> Counter[Example]:
    sizes = {("en", "fr"): 500, ("fr", "en"): 500, ("de", "en"): 120, ("en", "de"): 120}
    return Counter(row for pair, size in sizes.items() for row in written(vocabulary, *pair, size))


def equal(one: TranslationBatch, other: TranslationBatch) -> bool:
    return one.index == other.index and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS
    )


def positions(batch: TranslationBatch) -> int:
    return max(batch.source_BS.numel(), batch.target_BS.numel())


def waste(batches: list[TranslationBatch]) -> float:
    """The share of all positions of source and target that is padding."""
    cells = sum(batch.source_BS.numel() + batch.target_BS.numel() for batch in batches)
    real = sum(int(batch.source_mask_BS.sum()) + batch.num_tokens for batch in batches)
    return 1 - real / cells


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_batches_are_a_pure_function_of_seed_and_index(
    temperature: float, dataset: TranslationDataset
) -> None:
    batches = batches_of(dataset, temperature=temperature)
    far = 10**6
    for index in [0, 3, batches.batches_per_epoch, 4 * batches.batches_per_epoch + 1, 1, far, 3]:
        batch = batches.batch(index)
        assert batch.index == index
        assert equal(batch, batches_of(dataset, temperature=temperature).batch(index))


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_any_number_of_workers_makes_the_same_batches(workers: int, dataset: TranslationDataset) -> None:
    """Worker w of W makes the batches w, w + W, ...; here all at once."""
    number = 2 * batches_of(dataset).batches_per_epoch
    with ThreadPoolExecutor(workers) as pool:
        shares = list(
            pool.map(
                lambda worker: [batches_of(dataset).batch(i) for i in range(worker, number, workers)],
                range(workers),
            )
        )
    one = batches_of(dataset)
    for index in range(number):
        assert equal(shares[index % workers][index // workers], one.batch(index))


def test_every_example_is_in_an_epoch_once(dataset: TranslationDataset) -> None:
    for epoch in (0, 1, 9):
        assert Counter(examples(epoch_of(batches_of(dataset), epoch))) == all_written(dataset.vocabulary)


def test_epochs_and_seeds_differ(dataset: TranslationDataset) -> None:
    orders = [examples(epoch_of(batches_of(dataset), epoch)) for epoch in range(3)]
    orders += [examples(epoch_of(batches_of(dataset, seed=seed), 0)) for seed in (4, 2**40)]
    assert all(orders[i] != orders[j] for i in range(len(orders)) for j in range(i))


def test_types_shapes_and_special_tokens(dataset: TranslationDataset) -> None:
    vocabulary = dataset.vocabulary
    languages = {vocabulary.language_id(language) for language in vocabulary.languages}
    for batch in epoch_of(batches_of(dataset), 0):
        rows, steps = batch.source_BS.shape
        assert batch.source_BS.dtype == batch.target_BS.dtype == batch.label_BS.dtype == torch.int64
        assert batch.source_mask_BS.dtype == batch.target_mask_BS.dtype == torch.bool
        assert batch.source_mask_BS.shape == (rows, steps)
        assert batch.target_BS.shape == batch.label_BS.shape == batch.target_mask_BS.shape
        assert batch.num_sentences == rows == len(batch.target_BS)
        assert batch.num_tokens == int(batch.target_mask_BS.sum())
        assert batch.source_mask_BS.any(0).all()
        assert batch.target_mask_BS.any(0).all()
        for source, mask in zip(batch.source_BS, batch.source_mask_BS, strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [True] * length + [False] * (steps - length)
            assert int(source[0]) in languages
            assert int(source[length - 1]) == vocabulary.end_id
            assert not (source[mask][1:-1] < 3 + len(languages)).any()
        for target, label, mask in zip(batch.target_BS, batch.label_BS, batch.target_mask_BS, strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
            assert int(target[0]) == vocabulary.begin_id
            assert int(label[length - 1]) == vocabulary.end_id
            assert torch.equal(target[1:length], label[: length - 1])
        for ids, mask in (
            (batch.source_BS, batch.source_mask_BS),
            (batch.target_BS, batch.target_mask_BS),
            (batch.label_BS, batch.target_mask_BS),
        ):
            assert (ids[~mask] == vocabulary.pad_id).all()
            assert (ids[mask] != vocabulary.pad_id).all()


@pytest.mark.parametrize("budget", [1, 20, 30, 200, 1000, 100_000])
def test_no_batch_is_above_the_budget_but_a_single_pair(budget: int, dataset: TranslationDataset) -> None:
    for batch in epoch_of(batches_of(dataset, budget=budget), 1):
        assert positions(batch) <= budget or batch.num_sentences == 1


def test_batches_are_full_and_hold_little_padding(dataset: TranslationDataset) -> None:
    batches = epoch_of(batches_of(dataset, budget=600), 0)
    in_order = EvaluationBatches(
        pair=dataset.pair("train", "en-fr"), vocabulary=dataset.vocabulary, batch_subwords=600
    )
    assert waste(batches) < 0.15 < waste(list(in_order)) / 2
    assert sum(map(positions, batches)) > 0.8 * 600 * len(batches)


def test_pairs_of_languages_are_mixed_within_batches(dataset: TranslationDataset) -> None:
    batches = epoch_of(batches_of(dataset, budget=600), 0)
    languages = [len(batch.source_BS[:, 0].unique()) for batch in batches]
    assert sum(number > 1 for number in languages) > 0.8 * len(batches)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 5.0, 100.0])
def test_shares_follow_the_size_to_the_power_of_one_by_temperature(
    temperature: float, dataset: TranslationDataset
) -> None:
    batches = batches_of(dataset, "en-fr", "de-en", temperature=temperature)
    weights = {"en-fr": 500 ** (1 / temperature), "de-en": 120 ** (1 / temperature)}
    expected = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    assert batches.shares == pytest.approx(expected)
    rows = [row for epoch in range(3) for row in examples(epoch_of(batches, epoch))]
    french = dataset.vocabulary.language_id("fr")
    found = sum(source[0] == french for source, _ in rows) / len(rows)
    assert found == pytest.approx(expected["en-fr"], abs=0.03)
    assert len(rows) / 3 == pytest.approx(620, rel=0.05)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 100.0])
def test_no_example_comes_again_before_all_of_its_kind(
    temperature: float, dataset: TranslationDataset
) -> None:
    """Of each pair and length, all examples come equally often, and none is left out for ever."""
    batches = batches_of(dataset, "en-fr", "de-en", temperature=temperature)
    seen = Counter(row for epoch in range(12) for row in examples(epoch_of(batches, epoch)))
    expected = {
        name: Counter(written(dataset.vocabulary, *name.split("-"), size))
        for name, size in (("en-fr", 500), ("de-en", 120))
    }
    assert seen.keys() == (expected["en-fr"] | expected["de-en"]).keys()
    for rows in expected.values():
        by_size: dict[int, list[int]] = {}
        for row in rows:
            by_size.setdefault(max(map(len, row)), []).append(seen[row])
        assert all(max(times) - min(times) <= 1 for times in by_size.values())


class Ends:
    """What batches read of a `TokenFile`: sentences of given lengths, all tokens different."""

    def __init__(self, lengths: list[int], end_id: int) -> None:
        self.sentence_end_N = np.cumsum(np.array(lengths) + 1).astype("<u8")
        self.num_sentences = len(lengths)
        self.token_N = np.arange(int(self.sentence_end_N[-1])) + 1000
        self.token_N[self.sentence_end_N.astype(int) - 1] = end_id


VOCABULARY = JointSubwords(merges=[], languages=["en", "fr"])


def in_memory(lengths: list[tuple[int, int]]) -> Pair:
    first, second = (Ends(list(side), VOCABULARY.end_id) for side in zip(*lengths, strict=True))
    return Pair(source_language="en", target_language="fr", source=first, target=second)  # type: ignore[arg-type]


several_lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=40)


@given(
    several=st.lists(several_lengths, min_size=1, max_size=3),
    budget=st.integers(1, 120),
    temperature=st.sampled_from([1.0, 2.0, 50.0]),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 3),
)
def test_batches_of_any_lengths_keep_the_laws(
    several: list[list[tuple[int, int]]], budget: int, temperature: float, seed: int, epoch: int
) -> None:
    corpora = [in_memory(lengths) for lengths in several]
    batches = TranslationBatches(
        pairs=corpora, vocabulary=VOCABULARY, batch_subwords=budget, seed=seed, temperature=temperature
    )
    made = epoch_of(batches, epoch)
    assert all(positions(batch) <= budget or batch.num_sentences == 1 for batch in made)
    assert all(batch.num_sentences > 0 for batch in made)
    sizes = [max(len(source), len(label)) for source, label in examples(made)]
    expected = Counter(max(first + 2, second + 1) for lengths in several for first, second in lengths)
    if temperature == 1.0:
        assert Counter(sizes) == expected
    assert set(sizes) <= set(expected)


@given(lengths=several_lengths, budget=st.integers(1, 120))
def test_evaluation_batches_are_all_examples_in_order_as_many_as_fit(
    lengths: list[tuple[int, int]], budget: int
) -> None:
    """An oracle: take one more row until it does not fit."""
    batches = EvaluationBatches(pair=in_memory(lengths), vocabulary=VOCABULARY, batch_subwords=budget)
    expected: list[list[int]] = []
    for first, second in lengths:
        size = max(first + 2, second + 1)
        if not expected or (len(expected[-1]) + 1) * max([*expected[-1], size]) > budget:
            expected.append([])
        expected[-1].append(size)
    made = list(batches)
    assert len(batches) == len(made) == len(expected)
    assert [[max(map(len, row)) for row in examples([batch])] for batch in made] == expected
    found = [(len(source) - 2, len(label) - 1) for source, label in examples(made)]
    assert found == lengths


def test_evaluation_reads_the_lines_of_the_files(dataset: TranslationDataset) -> None:
    pair = dataset.pair("train", "en-de")
    batches = EvaluationBatches(pair=pair, vocabulary=dataset.vocabulary, batch_subwords=100)
    assert examples(list(batches)) == written(dataset.vocabulary, "en", "de", 120)
    assert equal(batches.batch(2), list(batches)[2])


def test_impossible_batches_are_refused(dataset: TranslationDataset) -> None:
    with pytest.raises(ValueError, match=r"batch_subwords \(0\) must be at least 1"):
        batches_of(dataset, budget=0)
    with pytest.raises(ValueError, match=r"seed \(-1\) must not be negative"):
        batches_of(dataset, seed=-1)
    for temperature in (0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature .* must be at least 1, and no more than 1000"):
            batches_of(dataset, temperature=temperature)
    with pytest.raises(ValueError, match="pairs: there is none; give at least one"):
        TranslationBatches(pairs=[], vocabulary=dataset.vocabulary, batch_subwords=9, seed=0)


def test_an_empty_source_is_its_language_and_an_end(tmp_path: Path) -> None:
    pair = in_memory([(0, 0)])
    (batch,) = EvaluationBatches(pair=pair, vocabulary=VOCABULARY, batch_subwords=1)
    assert batch.source_BS.tolist() == [[4, 2]]
    assert batch.target_BS.tolist() == [[1]]
    assert batch.label_BS.tolist() == [[2]]
