"""What stays of a run: the log of a run that was killed and resumed is the log of one that was not."""

import io
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsegate.inspection.balance import balance_metrics
from sparsegate.moe.routing import BalanceSums
from sparsegate.training import reporter as reporter_module
from sparsegate.training.log import read_log
from sparsegate.training.reporter import Reporter

from .test_log import files_no_larger_than

TIMES = ("time", "train/tokens_per_second")


def reporter(
    folder: Path, *, total_steps: int, log_every: int = 1, console: Console | None = None
) -> Reporter:
    return Reporter(
        folder=folder, total_steps=total_steps, name="moe-4", log_every=log_every, console=console
    )


# What the tables and metrics of this file do not need.
UNUSED = {
    "threshold": torch.tensor(0.0),
    "num_unrouted": torch.tensor(0),
    "num_dropped": torch.tensor(0),
}


def balance_at(step: int) -> dict[str, BalanceSums]:
    generator = torch.Generator().manual_seed(step)
    count_E = torch.randint(0, 9, (4,), generator=generator)
    sums = BalanceSums(
        importance_E=torch.rand(4, generator=generator),
        within_load_E=count_E + 0.5,
        group_load_A=torch.ones(1),
        group_count_A=torch.ones(1, dtype=torch.int64),
        within_probability_E=torch.rand(4, generator=generator),
        group_probability_A=torch.ones(1),
        z=torch.rand((), generator=generator),
        count_E=count_E,
        num_tokens=count_E.sum(),
        **UNUSED,
    )
    return {"moe": sums, "decoder.moe": sums + sums}


def metrics_at(step: int) -> dict:
    """What a deterministic run reports: numbers and tensors, now and then one that is not finite."""
    loss = math.nan if step % 13 == 5 else 10 / step
    return {"loss": torch.tensor(loss), "learning_rate": step * 1e-4, "tokens": torch.tensor(100 + step)}


def train(report: Reporter, first: int, last: int, evaluate_every: int) -> None:
    for step in range(first, last + 1):
        report.step(step, metrics_at(step), balance_at(step))
        if step % 7 == 3:
            report.event("skipped", batch=step, loss=math.nan)
        if step % evaluate_every == 0:
            report.evaluation(step, {"loss": 11 / step, "bits_per_byte": 2 / step})


def without_times(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(folder / "log.jsonl")]


def scalars_of_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def scalars_of_log(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The JSON lines in TensorBoard's precision, which is float32."""
    scalars: dict[str, list[tuple[int, float]]] = {}
    for line in read_log(folder / "log.jsonl"):
        if line["kind"] in ("step", "evaluation"):
            for key in line.keys() - {"kind", "step", "time"}:
                value = torch.tensor(float(line[key]), dtype=torch.float32).item()
                scalars.setdefault(key, []).append((line["step"], value))
    return scalars


def comparable(scalars: dict) -> dict:
    """nan equals itself here."""
    return {tag: [(step, str(value)) for step, value in points] for tag, points in scalars.items()}


def test_a_step_is_logged_with_everything_that_is_known_about_it(tmp_path):
    with reporter(tmp_path, total_steps=20) as report:
        report.step(4, metrics_at(4), balance_at(4))
    (line,) = read_log(tmp_path / "log.jsonl")
    assert line["kind"] == "step"
    assert line["step"] == 4
    assert abs(line["time"] - time.time()) < 60
    assert line["train/loss"] == 2.5
    assert line["train/perplexity"] == pytest.approx(math.exp(2.5))
    assert line["train/tokens"] == 104
    assert line["train/tokens_per_second"] > 0
    for layer, sums in balance_at(4).items():
        assert {k: line[f"{layer}/{k}"] for k in balance_metrics(sums)} == balance_metrics(sums)


def test_every_so_many_steps_are_logged_and_the_first_and_the_last(tmp_path):
    with reporter(tmp_path, total_steps=25, log_every=10) as report:
        train(report, 1, 25, evaluate_every=100)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl") if line["kind"] == "step"] == [
        1,
        10,
        20,
        25,
    ]


def test_a_step_that_is_not_logged_reads_nothing_from_the_device(tmp_path):
    """Reading a value off the meta device is an error, and so would this test be."""
    value = torch.tensor(1.0, device="meta")
    sums = BalanceSums(
        importance_E=value,
        within_load_E=value,
        group_load_A=value,
        group_count_A=value.to(torch.int64),
        within_probability_E=value,
        group_probability_A=value,
        z=value,
        count_E=value.to(torch.int64),
        num_tokens=value.to(torch.int64),
        **UNUSED,
    )
    with reporter(tmp_path, total_steps=9, log_every=5) as report:
        report.step(2, {"loss": value, "tokens": value.to(torch.int64)}, {"moe": sums})
        with pytest.raises(RuntimeError, match="meta"):
            report.step(5, {"loss": value})


@settings(max_examples=40)
@given(data=st.data(), log_every=st.integers(1, 6), evaluate_every=st.integers(1, 9))
def test_a_killed_and_resumed_run_logs_what_an_uninterrupted_one_does(
    tmp_path_factory, data, log_every, evaluate_every
):
    total = 24
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    with reporter(whole, total_steps=total, log_every=log_every) as report:
        train(report, 1, total, evaluate_every)
    begin = 0
    for _ in range(data.draw(st.integers(1, 3), label="kills")):
        killed = data.draw(st.integers(begin, total), label="killed after step")
        report = reporter(broken, total_steps=total, log_every=log_every)
        report.resume_at(begin)
        train(report, begin + 1, killed, evaluate_every)
        for file in (broken / "log.jsonl", *sorted((broken / "tensorboard").glob("*"))[-1:]):
            if file.exists() and data.draw(st.booleans(), label="dies while writing"):
                file.write_bytes(file.read_bytes() + b'{"kind": "step", "st')
        begin = data.draw(st.integers(begin, killed), label="checkpoint")
    with reporter(broken, total_steps=total, log_every=log_every) as report:
        report.resume_at(begin)
        train(report, begin + 1, total, evaluate_every)
    assert without_times(broken) == without_times(whole)
    assert comparable(scalars_of_tensorboard(whole)) == comparable(scalars_of_log(whole))
    assert comparable(scalars_of_tensorboard(broken)) == comparable(scalars_of_log(broken))


def test_speed_counts_all_tokens_since_the_line_before_and_only_the_time_spent_training(
    tmp_path, monkeypatch
):
    clock = SimpleNamespace(now=100.0, time=lambda: 0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(reporter_module, "time", clock)
    with reporter(tmp_path, total_steps=30, log_every=10) as report:
        for step in range(1, 31):
            clock.now += 0.5
            report.step(step, {"tokens": torch.tensor(50)})
            if step == 15:
                with report.doing("evaluating"):
                    clock.now += 1000
    speeds = [line["train/tokens_per_second"] for line in read_log(tmp_path / "log.jsonl")]
    assert speeds == pytest.approx([100, 100, 100, 100])


def test_an_event_has_the_step_reported_last_unless_it_says_otherwise(tmp_path):
    with reporter(tmp_path, total_steps=9) as report:
        report.step(3, {"loss": 1.0})
        report.event("checkpoint", path="checkpoints/step-00000003", seconds=0.5)
        report.event("skipped", step=4, reason="the loss is not finite")
    _, saved, skipped = read_log(tmp_path / "log.jsonl")
    assert (saved["kind"], saved["step"], saved["seconds"]) == ("checkpoint", 3, 0.5)
    assert (skipped["kind"], skipped["step"]) == ("skipped", 4)


@pytest.mark.parametrize(
    ("loss", "perplexity"), [(800.0, "inf"), (math.inf, "inf"), (math.nan, "nan"), (0.0, 1.0)]
)
def test_the_perplexity_of_any_loss_is_logged(tmp_path, loss, perplexity):
    with reporter(
        tmp_path, total_steps=9, console=Console(file=io.StringIO(), force_terminal=True)
    ) as report:
        report.step(3, {"loss": loss})
        report.evaluation(3, {"loss": loss})
    step, evaluation = read_log(tmp_path / "log.jsonl")
    assert (step["train/perplexity"], evaluation["valid/perplexity"]) == (perplexity, perplexity)


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path):
    screen = io.StringIO()
    with reporter(tmp_path, total_steps=60, console=Console(file=screen, width=200)) as report:
        train(report, 1, 3, evaluate_every=100)
        before = (tmp_path / "log.jsonl").read_bytes()
        with files_no_larger_than(len(before) + 50):
            train(report, 4, 20, evaluate_every=100)
        assert (tmp_path / "log.jsonl").read_bytes() == before
        train(report, 21, 60, evaluate_every=100)
    assert screen.getvalue().count("cannot write the log") == 1
    steps = [line["step"] for line in read_log(tmp_path / "log.jsonl") if line["kind"] == "step"]
    assert steps == [1, 2, 3, *range(21, 61)]
    assert comparable(scalars_of_tensorboard(tmp_path)) == comparable(scalars_of_log(tmp_path))


def test_a_folder_that_is_gone_does_not_stop_training(tmp_path):
    folder = tmp_path / "run"
    with reporter(folder, total_steps=9) as report:
        train(report, 1, 9, evaluate_every=3)
    assert not folder.exists()


SCRIPT = """
import sys, time
from pathlib import Path
from rich.console import Console
from sparsegate.training.reporter import Reporter
with Reporter(folder=Path(sys.argv[1]), total_steps=50, name="x", log_every=1, console=Console()) as report:
    print("ready", *(name for name in sys.modules if "tensorboard" in name), flush=True)
    sys.stdin.readline()
    for step in range(1, 51):
        report.step(step, {"loss": 1.0})
        report.evaluation(step, {"loss": 1.0})
"""


def test_a_reader_of_the_output_that_goes_away_does_not_stop_training(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": ""},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"  # and TensorBoard, slow to import, is not there yet
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate("go\n", timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert len(list(read_log(tmp_path / "log.jsonl"))) == 100


def test_the_log_of_a_process_killed_at_any_moment_can_be_gone_on_from(tmp_path):
    """Lines that were reported before the kill are there: nothing waits in a buffer of the process."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + "\n    print('done', flush=True); time.sleep(60)", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": ""},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    assert "done\n" in iter(process.stdout.readline, "")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(read_log(tmp_path / "log.jsonl"))) == 100
    assert comparable(scalars_of_tensorboard(tmp_path)) == comparable(scalars_of_log(tmp_path))
