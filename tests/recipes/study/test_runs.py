"""A study measures what separate runs would give, goes on where it stopped, and repeats nothing."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sparsegate.data import Dataset
from sparsegate.evaluation import evaluate
from sparsegate.recipes.load import load
from sparsegate.recipes.study import runs as module
from sparsegate.recipes.study.config import Study
from sparsegate.recipes.study.measuring import Measured, read_measured
from sparsegate.recipes.study.results import Row, collect
from sparsegate.recipes.study.runs import Runner, Stopped, run_folder, steps_for
from sparsegate.training.config import SentencesConfig
from sparsegate.training.loop import Run, train
from tests.helpers.runs import make_dataset

MOE = "small-moe-4"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("text") / "text", kind="subwords")


@pytest.fixture
def study(dataset: Dataset) -> Study:
    return Study(
        scale="laptop",
        data=str(dataset.directory),
        data_fingerprint=dataset.fingerprint,
        models=(MOE,),
        other_costs=(),
        seeds=(1,),
        words=(100, 200),
        gates="within",
        batches=SentencesConfig(batch_words=64, max_length=32),
        dropout=0.1,
        learning_rates=(1e-2,),
        expert_rates=(0.5,),
        search_words=60,
        keep_weights=True,
    )


def run(study: Study, folder: Path) -> dict[int, Measured]:
    """Everything measured of the first model and seed; the balance apart, which may be NaN."""
    Runner(study=study, folder=folder, console=None, say=lambda text: None).run(lambda: None)
    return measured(folder)


def measured(folder: Path) -> dict[int, Measured]:
    """Without the speed, which is never the same twice."""
    found = read_measured(run_folder(folder, MOE, 1))
    return {words: replace(one, tokens_per_second=0.0) for words, one in found.items()}


@pytest.fixture
def whole(study: Study, tmp_path: Path) -> dict[int, Measured]:
    return run(study, tmp_path / "whole")


def test_a_longer_run_passes_through_a_shorter_one(study: Study, tmp_path: Path, whole: dict[int, Measured]):
    for words in study.words:
        assert run(replace(study, words=(words,)), tmp_path / f"{words}") == {words: whole[words]}


def test_the_pieces_add_up_to_the_likelihood_of_the_test_split(
    study: Study, dataset: Dataset, tmp_path: Path, whole: dict[int, Measured]
):
    model = load(run_folder(tmp_path / "whole", MOE, 1), checkpoint="last").model
    test = evaluate(model, dataset.split("test"), batch_size=3, num_steps=50, context="sentence")
    last = whole[200]
    assert sum(last.nll_nats) == pytest.approx(test.nll_nats, rel=1e-5)
    assert sum(last.tokens) == test.num_tokens
    assert last.perplexity == pytest.approx(test.word_perplexity, rel=1e-4)
    assert len(last.nll_nats) > 20


def test_words_are_counted_as_the_run_saw_them(study: Study, dataset: Dataset, whole: dict[int, Measured]):
    train_split = dataset.split("train")
    rate = (train_split.num_words + train_split.num_sentences) / train_split.num_tokens
    for words, one in whole.items():
        assert one.step == steps_for(words, study, dataset)
        assert one.words == round(one.tokens_seen * rate)
        assert one.words == pytest.approx(words, rel=0.4)
        assert one.passes == pytest.approx(one.tokens_seen / train_split.num_tokens)


def test_a_study_that_is_killed_in_a_step_ends_as_one_that_was_not(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[int, Measured]
):
    plain, left = Run.step, 0

    def dies_in_time(step_of: Run) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        plain(step_of)

    for steps in (1, 2):
        left = steps
        with monkeypatch.context() as patch:
            patch.setattr(Run, "step", dies_in_time)
            with pytest.raises(KeyboardInterrupt):
                run(study, tmp_path / "parts")
    assert run(study, tmp_path / "parts") == whole


def test_a_run_that_was_saved_unmeasured_is_measured_and_not_trained_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[int, Measured]
):
    def fails(*args: object, **keywords: object) -> None:
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(module, "measure", fails)
        with pytest.raises(OSError, match="disk"):
            run(replace(study, words=(100,)), tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", fails)
        assert run(replace(study, words=(100,)), tmp_path / "parts") == {100: whole[100]}


def test_what_is_finished_is_not_trained_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[int, Measured]
):
    def trained(*args: object, **keywords: object) -> None:
        raise AssertionError

    monkeypatch.setattr(module, "train", trained)
    assert run(study, tmp_path / "whole") == whole


def test_a_signal_stops_the_study(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stopped(*args: object, **keywords: object) -> object:
        return replace(train(*args, **keywords), stopped_by="SIGTERM")  # type: ignore[arg-type]

    monkeypatch.setattr(module, "train", stopped)
    with pytest.raises(Stopped):
        run(study, tmp_path)
    assert measured(tmp_path) == {}


def test_the_best_learning_rate_of_a_short_training_is_taken(study: Study, tmp_path: Path):
    told: list[str] = []
    study = replace(study, learning_rates=(1e-6, 1e-2, 1e30), expert_rates=(1e-6, 1.0), words=(100,))
    Runner(study=study, folder=tmp_path, console=None, say=told.append).run(lambda: None)
    (one,) = measured(tmp_path).values()
    assert (one.learning_rate, one.expert_rate) == (1e-2, 1.0)
    where = tmp_path / "search" / MOE
    assert [entry.name for entry in where.iterdir()] == ["search.json"]
    assert len(told) == 7
    assert "diverged" in told[5]


def test_rates_that_all_diverge_are_refused(study: Study, tmp_path: Path):
    with pytest.raises(ValueError, match=r"learning_rates: small-moe-4 diverged with each of them"):
        run(replace(study, learning_rates=(1e30, 1e31)), tmp_path)


def test_weights_go_where_they_are_not_wanted_and_then_a_run_cannot_go_on(
    study: Study, tmp_path: Path, whole: dict[int, Measured]
):
    study = replace(study, keep_weights=False)
    folder = tmp_path / "light"
    assert run(study, folder) == whole
    assert not (run_folder(folder, MOE, 1) / "checkpoints").exists()
    assert run(study, folder) == whole
    with pytest.raises(ValueError, match="ended at 200 words without keeping its weights; leave 300 words"):
        run(replace(study, words=(100, 200, 300)), folder)


def test_a_budget_that_a_run_has_passed_is_refused(study: Study, tmp_path: Path, whole: dict[int, Measured]):
    with pytest.raises(ValueError, match="has passed 150 words unmeasured; leave this budget out, or remove"):
        run(replace(study, words=(100, 150, 200)), tmp_path / "whole")
    assert measured(tmp_path / "whole") == whole


def test_a_budget_that_is_further_on_goes_on_with_the_run(
    study: Study, tmp_path: Path, whole: dict[int, Measured]
):
    assert run(replace(study, words=(100,)), tmp_path / "grown") == {100: whole[100]}
    assert run(study, tmp_path / "grown") == whole


def test_a_row_has_the_mean_over_seeds_and_their_interval(study: Study, tmp_path: Path):
    study = replace(study, words=(100,))
    run(study, tmp_path)
    (alone,) = collect(tmp_path, study)
    assert alone.interval_over == "test text"
    assert alone.low < alone.perplexity < alone.high
    run(replace(study, seeds=(2,)), tmp_path)  # runs of an earlier command are there as well
    (row,) = collect(tmp_path, study)
    assert row.seeds == [1, 2]
    assert row.interval_over == "seeds"
    logs = [math.log(x) for x in row.perplexities]
    assert math.log(row.perplexity) == pytest.approx(sum(logs) / 2)
    half = 12.706 * abs(logs[0] - logs[1]) / 2
    assert math.log(row.high) - math.log(row.perplexity) == pytest.approx(half)
    assert row.equal_cost
    assert row.kind == "flat mixture"


def test_a_mixture_stands_beside_the_best_dense_model_run_by_run(study: Study, tmp_path: Path):
    study = replace(study, models=("small-4xlstm", MOE, "small-moe-1-wide"), words=(100,))
    Runner(study=study, folder=tmp_path, console=None, say=lambda text: None).run(lambda: None)

    def rows() -> tuple[Row, Row]:
        by_name = {row.model: row for row in collect(tmp_path, study)}
        best = min(("small-4xlstm", "small-moe-1-wide"), key=lambda name: by_name[name].perplexity)
        assert [name for name, row in by_name.items() if row.against_dense is None] == [best]
        return by_name[MOE], by_name[best]

    mixture, dense = rows()
    ratio = mixture.against_dense
    assert ratio is not None
    assert ratio.over == "test text"
    assert ratio.mean == pytest.approx(mixture.perplexity / dense.perplexity)
    # Both were measured on the same pieces, which are easy or hard for both.
    assert math.log(ratio.high / ratio.low) < math.log(mixture.high / mixture.low)
    Runner(study=replace(study, seeds=(1, 2)), folder=tmp_path, console=None, say=print).run(lambda: None)
    mixture, dense = rows()
    ratio = mixture.against_dense
    assert ratio is not None
    assert ratio.over == "seeds"
    logs = [math.log(a / b) for a, b in zip(mixture.perplexities, dense.perplexities, strict=True)]
    assert math.log(ratio.mean) == pytest.approx(sum(logs) / 2)
    assert math.log(ratio.high) - math.log(ratio.mean) == pytest.approx(12.706 * abs(logs[0] - logs[1]) / 2)


@pytest.mark.parametrize("content", ["[1]", "{}, 3", '{"100": {"step": 1}}', '{"many": {}}'])
def test_damaged_measurements_are_named(
    study: Study, tmp_path: Path, content: str, whole: dict[int, Measured]
):
    path = run_folder(tmp_path / "whole", MOE, 1) / "measured.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"measured\.json"):
        run(study, tmp_path / "whole")


def test_a_damaged_search_is_named(study: Study, tmp_path: Path):
    path = tmp_path / "search" / MOE / "search.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{"rate": 1}]))
    with pytest.raises(ValueError, match=r"search\.json: damaged; remove it, and the search begins anew"):
        run(replace(study, learning_rates=(1e-2, 2e-2)), tmp_path)
    shutil.rmtree(tmp_path / "search")
