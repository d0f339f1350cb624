"""The loop: a run that stops and goes on is the run that never stopped; a bad batch leaves no trace."""

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sparsegate.cli.main import main
from sparsegate.data import Batch
from sparsegate.models import LanguageModel, RecurrentLM
from sparsegate.models.softmax import OutputSoftmax
from sparsegate.training import loop, tasks
from sparsegate.training.checkpoint import checkpoint_name, latest_checkpoint, load_checkpoint
from sparsegate.training.config import ContinuousConfig, ParallelConfig, RunConfig, SentencesConfig
from sparsegate.training.log import read_log
from sparsegate.training.loop import TrainResult, train
from sparsegate.training.making import make_state
from sparsegate.training.ranks import Ranks
from sparsegate.training.run_folder import checkpoints_of, read_best, saved_steps
from sparsegate.training.step import NonFinite
from sparsegate.training.tasks import open_task
from sparsegate.training.tasks.language import LanguagePart
from sparsegate.training.tasks.task import State
from tests.helpers.model_cases import GATES
from tests.helpers.runs import LINES
from tests.helpers.tiny_runs import TINY_DATASETS, TINY_RUNS, tiny_run, with_gates


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for each task."""
    folder = tmp_path_factory.mktemp("text")
    return {task: make(folder / task).directory for task, make in TINY_DATASETS.items()}


@pytest.fixture(params=TINY_RUNS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def config(datasets: dict[str, Path], task: str) -> RunConfig:
    return TINY_RUNS[task](datasets[task], steps=24)


@pytest.fixture
def language(datasets: dict[str, Path]) -> RunConfig:
    """For what language models alone have."""
    return tiny_run(datasets["language"], steps=24)


def with_training(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, training=replace(config.training, **changes))


def everything(result: TrainResult) -> dict[str, torch.Tensor]:
    """Weights, moments and carried state by name."""
    state = result.state
    tensors = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    for number, optimizer in enumerate(state.optimizers):
        for index, moments in enumerate(optimizer.state.values()):
            tensors |= {f"optimizer/{number}/{index}/{key}": value for key, value in moments.items()}
    for name, (h, c) in state.carried.items():
        tensors |= {f"carried/{name}/h": h, f"carried/{name}/c": c}
    return tensors


def assert_equal(one: TrainResult, other: TrainResult) -> None:
    left, right = everything(one), everything(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_denormal_numbers_count_as_zero_while_a_run_trains(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[bool] = []
    compute = loop.compute_gradient
    monkeypatch.setattr(
        loop, "compute_gradient", lambda *args, **names: (seen.append(flushes()), compute(*args, **names))[1]
    )
    train(with_training(config, steps=2), folder=tmp_path / "run")
    assert seen == [True] * 2
    assert not flushes()


def flushes() -> bool:
    return (torch.full((1,), torch.finfo(torch.float32).tiny) / 2).item() == 0


SHORT_EPOCHS = {
    "stream": ContinuousConfig(batch_size=6, num_steps=65),
    "sentence": SentencesConfig(batch_words=390, max_length=8),
    "pairs": ParallelConfig(batch_subwords=335),
}
TASKS = {"stream": "language", "sentence": "language", "pairs": "translation"}
EPOCH = 11
STOPS = [1, EPOCH, 17]
OTHER_STOPS = [pytest.param(s, marks=pytest.mark.nightly) for s in range(1, 24) if s not in STOPS]


@pytest.mark.parametrize("form", SHORT_EPOCHS)
@pytest.mark.parametrize("stop_at", [*STOPS, *OTHER_STOPS])
def test_a_run_in_two_parts_ends_bit_for_bit_as_in_one(
    datasets: dict[str, Path], tmp_path: Path, stop_at: int, form: str
):
    """At the first step, in the warm-up, at the end of an epoch, in the middle of one."""
    task = TASKS[form]
    config = replace(TINY_RUNS[task](datasets[task], steps=24), batches=SHORT_EPOCHS[form])
    assert open_task(config).batches.batches_per_epoch == EPOCH
    whole = train(config, folder=tmp_path / "whole")
    train(with_training(config, steps=stop_at), folder=tmp_path / "parts")
    parts = train(config, folder=tmp_path / "parts", resume=True)
    assert_equal(parts, whole)
    progress = asdict(parts.state.progress)
    best = ("best_step", "best_nll")  # the part's last step is evaluated, which the whole run's is not
    assert {k: v for k, v in progress.items() if k not in best} == {
        k: v for k, v in asdict(whole.state.progress).items() if k not in best
    }


@pytest.mark.parametrize("name", GATES)
def test_so_it_does_with_every_gate(config: RunConfig, tmp_path: Path, name: str):
    config = with_gates(with_training(config, steps=7), name)
    whole = train(config, folder=tmp_path / "whole")
    train(with_training(config, steps=3), folder=tmp_path / "parts")
    parts = train(config, folder=tmp_path / "parts", resume=True)
    assert_equal(parts, whole)
    if name == "sigmoid_topk":
        biases = [value for key, value in everything(whole).items() if key.endswith("moe.gate.bias")]
        assert biases
        assert all(bias.any() and (bias % 0.5 == 0).all() for bias in biases)
    warnings = [
        line["message"] for line in read_log(tmp_path / "whole/log.jsonl") if line["kind"] == "warning"
    ]
    assert len(warnings) == (name in ("balanced", "balanced_hierarchy", "expert_choice"))
    assert whole.evaluation is not None
    assert math.isfinite(whole.evaluation.metrics()["loss"])
    assert all("the tokens after it" in message for message in warnings)


def test_so_it_does_with_a_sampled_softmax(config: RunConfig, tmp_path: Path):
    config = with_training(replace(config, model=replace(config.model, softmax_samples=9)), steps=7)
    whole = train(config, folder=tmp_path / "whole")
    train(with_training(config, steps=3), folder=tmp_path / "parts")
    assert_equal(train(config, folder=tmp_path / "parts", resume=True), whole)
    full = train(
        with_training(replace(config, model=replace(config.model, softmax_samples=0)), steps=7),
        folder=tmp_path / "full",
    )
    assert not torch.equal(everything(full)["model/softmax.bias"], everything(whole)["model/softmax.bias"])


def test_so_it_does_with_an_adaptive_softmax(language: RunConfig, tmp_path: Path):
    config = with_training(replace(language, model=replace(language.model, softmax_cutoffs=(9,))), steps=7)
    whole = train(config, folder=tmp_path / "whole")
    train(with_training(config, steps=3), folder=tmp_path / "parts")
    assert_equal(train(config, folder=tmp_path / "parts", resume=True), whole)
    assert "model/softmax.clusters.tail.0.1.weight" in everything(whole)
    with pytest.raises(ValueError, match=r"model\.softmax-cutoffs \(1000000\) must ascend, from at least 1"):
        train(replace(config, model=replace(config.model, softmax_cutoffs=(10**6,))), folder=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_so_it_does_with_the_factored_optimizer(config: RunConfig, tmp_path: Path):
    config = with_training(replace(config, optim=replace(config.optim, experts="factored")), steps=7)
    whole = train(config, folder=tmp_path / "whole")
    assert {"optimizer/1/0/row", "optimizer/1/1/col"} <= everything(whole).keys()
    train(with_training(config, steps=3), folder=tmp_path / "parts")
    assert_equal(train(config, folder=tmp_path / "parts", resume=True), whole)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(config: RunConfig, tmp_path: Path):
    first, second = (train(config, folder=tmp_path / name) for name in ("first", "second"))
    assert_equal(first, second)
    other = train(replace(config, seed=2), folder=tmp_path / "other")
    assert not torch.equal(everything(other)["model/softmax.bias"], everything(first)["model/softmax.bias"])


class Planted:
    """Multiplies the loss of some batches, in the order in which the model sees them, by a factor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at: set[int], factor: float) -> None:
        self.calls = 0
        plain = OutputSoftmax.nll

        def nll(softmax: OutputSoftmax, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            value = plain(softmax, hidden, target)
            if softmax.training:
                self.calls += 1
                if self.calls - 1 in at:
                    value = value * factor
            return value

        monkeypatch.setattr(OutputSoftmax, "nll", nll)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_nonfinite_batch_leaves_everything_as_if_it_had_not_been(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
):
    """The gate's bias as well, which is no weight."""
    config = with_gates(config, "sigmoid_topk")
    bad = {0, 5, 6, 13}
    spared = train(with_training(config, skip_batches=tuple(bad)), folder=tmp_path / "spared")
    Planted(monkeypatch, at=bad, factor=factor)
    result = train(config, folder=tmp_path / "bad")
    assert_equal(result, spared)
    assert result.state.progress.skipped == len(bad)
    assert result.state.progress.step == spared.state.progress.step == 24
    assert result.state.progress.tokens == spared.state.progress.tokens


def test_a_gradient_that_overflows_is_caught_though_the_loss_is_finite(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spared = train(with_training(config, skip_batches=(4,)), folder=tmp_path / "spared")
    Planted(monkeypatch, at={4}, factor=1e37)
    result = train(config, folder=tmp_path / "bad")
    assert result.state.progress.skipped == 1
    assert_equal(result, spared)


def test_a_gradient_that_explodes_is_told_once(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Planted(monkeypatch, at={4, 5}, factor=1e9)
    result = train(config, folder=tmp_path)
    (warning,) = [line["message"] for line in read_log(tmp_path / "log.jsonl") if line["kind"] == "warning"]
    assert re.match(
        r"step 5 has a gradient of norm \d\.\de\+\d\d, which optim\.clip-norm cuts to 1: ", warning
    )
    assert result.state.progress.step == 24


def test_a_spike_is_clipped_and_learned_from(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = train(config, folder=tmp_path / "plain")
    Planted(monkeypatch, at={4}, factor=1000.0)
    result = train(config, folder=tmp_path / "spike")
    norms, spiked = (
        [
            line["train/grad_norm"]
            for line in read_log(tmp_path / name / "log.jsonl")
            if line["kind"] == "step"
        ]
        for name in ("plain", "spike")
    )
    assert spiked[:4] == norms[:4]
    assert spiked[4] > 100 * norms[4]
    assert result.state.progress.skipped == 0
    assert not torch.equal(everything(result)["model/softmax.bias"], everything(plain)["model/softmax.bias"])
    assert all(value.isfinite().all() for value in everything(result).values())


def test_several_bad_batches_in_a_row_stop_the_run_and_leave_its_checkpoint(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Planted(monkeypatch, at=set(range(12, 100)), factor=float("nan"))
    with pytest.raises(NonFinite, match=r"3 batches in a row.*batch 14.*optim\.learning-rate"):
        train(with_training(config, max_nonfinite=3), folder=tmp_path / "run")
    newest = latest_checkpoint(checkpoints_of(tmp_path / "run"))
    assert newest is not None
    assert newest.name == checkpoint_name(10)


def test_hopeless_training_ends_with_exit_code_4_and_one_line(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    Planted(monkeypatch, at=set(range(100)), factor=float("nan"))
    assert main(cli(config, tmp_path / "run", "--training.max-nonfinite", "2")) == 4
    lines = capsys.readouterr().err.strip().splitlines()
    assert "not finite in 2 batches in a row" in lines[-1]
    assert not any("Traceback" in line for line in lines)


MIXTURE = "--model.{0}hidden 8 --model.{0}num-experts 4 --model.{0}k 2"
SIZES = {
    "language": f"small-moe-32 {MIXTURE.format('')} --batches.batch-size 2 --batches.num-steps 8",
    "translation": f"small-translation-moe-32 {MIXTURE.format('encoder-block.')} "
    f"{MIXTURE.format('decoder-block.')} --batches.batch-subwords 64 --model.lstm-projection 0",
}


def cli(config: RunConfig, folder: Path, *more: str, steps: int = 10) -> list[str]:
    """`sparsegate train` of a recipe cut down until it is tiny."""
    task = "translation" if config.batches.kind == "parallel" else "language"
    course = f"--model.width 8 --model.lstm-units 8 --training.steps {steps} --training.checkpoint-every 5"
    where = ["--data", config.data, "--out", str(folder)]
    return ["train", *SIZES[task].split(), *where, *course.split(), *more]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.nightly) for n in (signal.SIGINT, signal.SIGUSR1))],
)
def test_a_signal_saves_the_current_step_and_leaves_with_0(
    config: RunConfig, tmp_path: Path, number: signal.Signals
):
    folder = tmp_path / "run"
    words = cli(config, folder, "--training.log-every", "1", steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsegate", *words], stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(process, folder / "log.jsonl", 12)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert number.name in errors
    logged = (folder / "log.jsonl").read_text().splitlines()
    last = max(
        int(line.partition('"step": ')[2].partition(",")[0]) for line in logged if '"kind": "step"' in line
    )
    assert saved_steps(folder)[0] == last
    load_checkpoint(checkpoints_of(folder) / checkpoint_name(last))


def wait_for_steps(process: subprocess.Popen[str], log: Path, lines: int) -> None:
    while not log.exists() or len(log.read_bytes().splitlines()) < lines:
        assert process.poll() is None, process.communicate()[1]
        os.sched_yield()


def test_the_best_checkpoint_and_the_newest_are_kept(config: RunConfig, tmp_path: Path):
    result = train(with_training(config, keep_checkpoints=1, evaluate_every=6), folder=tmp_path / "run")
    best = result.state.progress.best_step
    assert read_best(tmp_path / "run") == best
    assert set(saved_steps(tmp_path / "run")) == {24, best}


def test_frozen_parameters_stay_and_the_others_learn(config: RunConfig, tmp_path: Path):
    config = with_training(config, freeze=("*layers.lstm*", "embedding.*"))
    start = make_state(open_task(config).config).model.state_dict()
    state = train(config, folder=tmp_path / "run").state
    for name, parameter in state.model.named_parameters():
        frozen = "layers.lstm" in name or name.startswith("embedding.")
        assert torch.equal(parameter, start[name]) == frozen, name
        (adam,) = state.optimizers
        assert (parameter in adam.state) != frozen, name


def test_thresholds_that_nothing_would_train_are_refused(config: RunConfig, tmp_path: Path):
    config = with_gates(config, "balanced")
    with pytest.raises(
        ValueError, match=r"^training.freeze: would leave [a-z.]*layers.moe.moe.gate.log_threshold "
    ):
        train(with_training(config, freeze=("*log_threshold",)), folder=tmp_path / "run")
    train(with_training(config, steps=2), folder=tmp_path / "first")
    again = with_training(config, steps=2, freeze=("*log_threshold",), init_from=str(tmp_path / "first"))
    assert train(again, folder=tmp_path / "second").evaluation is not None


def test_a_run_starts_from_the_weights_of_another(config: RunConfig, tmp_path: Path):
    train(config, folder=tmp_path / "first")
    best = read_best(tmp_path / "first")
    assert best is not None
    weights = load_checkpoint(checkpoints_of(tmp_path / "first") / checkpoint_name(best)).tensors["model"]
    frozen = with_training(config, steps=1, init_from=str(tmp_path / "first"), freeze=("[!s]*",))
    second = train(frozen, folder=tmp_path / "second")
    for name, value in second.state.model.state_dict().items():
        assert torch.equal(value, weights[name]) != name.startswith("softmax"), name


REFUSALS = {
    "a name that matches no parameter": (
        {"freeze": ("layer.*",)},
        r"training\.freeze \(layer\.\*\): no parameter",
    ),
    "nothing left to train": ({"freeze": ("*",)}, "nothing is left to train"),
    "weights from what is no run": ({"init_from": "/nowhere"}, "/nowhere"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_done_is_refused_in_one_line(config: RunConfig, tmp_path: Path, what: str):
    changes, message = REFUSALS[what]
    with pytest.raises((ValueError, OSError), match=message):
        train(with_training(config, **changes), folder=tmp_path / "run")


def test_translations_that_would_depend_on_each_other_are_refused_before_the_first_step(
    datasets: dict[str, Path], tmp_path: Path
):
    config = with_gates(TINY_RUNS["translation"](datasets["translation"], steps=1), "expert_choice")
    with pytest.raises(ValueError, match="a translation would depend on its neighbours"):
        train(with_training(config, bleu_sentences=3), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(config, folder=tmp_path / "run").evaluation is not None


def test_a_folder_that_holds_something_else_is_left_alone(config: RunConfig, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and not a run"):
        train(config, folder=tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_a_run_is_not_started_twice_nor_resumed_as_another(config: RunConfig, tmp_path: Path):
    train(with_training(config, steps=2), folder=tmp_path / "run")
    with pytest.raises(ValueError, match="--resume"):
        train(config, folder=tmp_path / "run")
    with pytest.raises(ValueError, match=r"^seed \(2\) is 1 in .*config\.json"):
        train(replace(config, seed=2), folder=tmp_path / "run", resume=True)
    changed = replace(config, model=replace(config.model, dropout=0.3))
    with pytest.raises(ValueError, match=r"^model\.dropout \(0\.3\) is 0\.2 in .*config\.json"):
        train(changed, folder=tmp_path / "run", resume=True)


def test_a_run_is_not_resumed_on_another_dataset(config: RunConfig, tmp_path: Path, task: str):
    train(with_training(config, steps=2), folder=tmp_path / "run")
    other = TINY_DATASETS[task](tmp_path / "other", lines=["other words", "stand here", "now"] * 50)
    with pytest.raises(ValueError, match="data_fingerprint"):
        train(replace(config, data=str(other.directory)), folder=tmp_path / "run", resume=True)


def test_weights_made_with_another_vocabulary_are_refused(config: RunConfig, tmp_path: Path, task: str):
    train(with_training(config, steps=2), folder=tmp_path / "first")
    lines = [line.swapcase() for line in LINES]
    other = TINY_DATASETS[task](tmp_path / "other", lines=lines)
    assert other.vocabulary.size == open_task(config).dataset.vocabulary.size
    tuned = replace(with_training(config, init_from=str(tmp_path / "first")), data=str(other.directory))
    with pytest.raises(ValueError, match="vocabulary|subwords"):
        train(tuned, folder=tmp_path / "second")


def test_a_full_disk_ends_with_exit_code_3_and_the_checkpoint_before(config: RunConfig, tmp_path: Path):
    folder = tmp_path / "run"
    assert main(cli(config, folder, steps=5)) == 0
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from sparsegate.cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(main(sys.argv[1:]))"
    )
    words = cli(config, folder, "--resume", steps=10)
    process = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert process.returncode == 3, process.stderr
    assert process.stderr.splitlines()[-1].startswith("sparsegate train:")
    assert "Traceback" not in process.stderr
    newest = latest_checkpoint(checkpoints_of(folder))
    assert newest is not None
    assert newest.name == checkpoint_name(5)
    assert not list(checkpoints_of(folder).glob(".tmp-*"))


def test_a_recurrent_model_trains_on_the_same_road(language: RunConfig, tmp_path: Path):
    model = RecurrentLM(vocab_size=1, width=8, lstm_units=16, lstm_projection=8, dropout=0.1, num_layers=1)
    result = train(replace(language, model=model), folder=tmp_path / "run")
    assert result.state.progress.step == 24


def test_state_is_carried_within_an_epoch_and_begins_anew_with_the_next(
    language: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    carried: dict[int, bool] = {}
    plain = tasks.language.language_parts

    def noted(
        model: LanguageModel, batch: Batch, state: State, run: RunConfig, ranks: Ranks
    ) -> Iterator[LanguagePart]:
        carried[batch.index] = bool(state)
        return plain(model, batch, state, run, ranks)

    monkeypatch.setattr("sparsegate.training.tasks.language.language_parts", noted)
    train(replace(language, batches=SHORT_EPOCHS["stream"]), folder=tmp_path / "stream")
    assert carried == {index: index % EPOCH != 0 for index in range(24)}
    train(replace(language, batches=SHORT_EPOCHS["sentence"]), folder=tmp_path / "sentence")
    assert carried == dict.fromkeys(range(24), False)
