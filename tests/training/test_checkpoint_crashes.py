"""A run resumes from its last complete checkpoint after a power cut, and after kill -9, at any moment."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsegate.training.storage import write_json_atomically
from tests.helpers.checkpoints import latest_step, save, unfinished
from tests.helpers.crash_states import Tree, crash_states, read_tree, write_tree
from tests.helpers.os_shim import Call, Killed, OsShim
from tests.helpers.savers import NUMEL, fork_server, save_for_ever

SHORT_STATES = 40  # of each scenario, besides those after the save


@dataclass(frozen=True)
class Scenario:
    """Saves that lead up to the one of step 9, and the steps that may be found after it was cut short."""

    before: tuple[tuple[int, set[int]], ...]
    keep: set[int]
    found: set[int | None]


SCENARIOS = {
    "the first save": Scenario((), set(), {None, 9}),
    "one more": Scenario(((5, set()),), {5}, {5, 9}),
    "one deleted": Scenario(((3, set()), (5, {3})), {5}, {5, 9}),
    "all others deleted": Scenario(((3, set()), (5, {3})), set(), {5, 9}),
    "the same step again": Scenario(((9, set()),), set(), {9}),
}


@pytest.fixture(autouse=True)
def without_real_flushes(monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def prepare(run: Path, scenario: Scenario) -> None:
    run.mkdir()
    for step, keep in scenario.before:
        save(run / "checkpoints", step, keep=keep)


def record(monkeypatch: pytest.MonkeyPatch, run: Path, scenario: Scenario) -> tuple[Tree, list[Call]]:
    prepare(run, scenario)
    before = read_tree(run)
    with monkeypatch.context() as patch:
        shim = OsShim(patch, run)
        save(run / "checkpoints", 9, keep=scenario.keep)
    return before, shim.calls


def violations(run: Path, before: Tree, calls: list[Call], scenario: Scenario, most: int | None) -> list[str]:
    """The crash states from which a run would not resume as it should.

    Args:
        most: how many states during the save to try; None for all. Those after it are always tried.
    """
    states = list(crash_states(run, before, calls))
    during = [state for state in states if state[0] < len(calls)]
    if most is not None and len(during) > most:
        states = random.Random(0).sample(during, most) + states[len(during) :]
    failures = []
    for made, tree in states:
        allowed = {9} if made == len(calls) else scenario.found
        shutil.rmtree(run)
        write_tree(run, tree)
        try:
            found = latest_step(run / "checkpoints")
        except (ValueError, AssertionError) as error:
            failures.append(f"after {made} of {len(calls)} calls: {error}")
        else:
            if found not in allowed:
                failures.append(f"after {made} of {len(calls)} calls: step {found}")
    return failures


def assert_resumes_from_every_crash_state(monkeypatch, tmp_path, name: str, most: int | None) -> None:
    run = tmp_path / "run"
    before, calls = record(monkeypatch, run, SCENARIOS[name])
    assert not violations(run, before, calls, SCENARIOS[name], most)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_model_of_the_disk_ends_where_the_disk_does(monkeypatch, tmp_path, name) -> None:
    run = tmp_path / "run"
    before, calls = record(monkeypatch, run, SCENARIOS[name])
    assert read_tree(run) in [tree for made, tree in crash_states(run, before, calls) if made == len(calls)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_power_cut_leaves_the_old_or_the_new_checkpoint(monkeypatch, tmp_path, name) -> None:
    assert_resumes_from_every_crash_state(monkeypatch, tmp_path, name, SHORT_STATES)


@pytest.mark.nightly
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_power_cut_leaves_the_old_or_the_new_checkpoint_in_every_state(monkeypatch, tmp_path, name) -> None:
    assert_resumes_from_every_crash_state(monkeypatch, tmp_path, name, None)


@pytest.mark.parametrize(
    "left_out",
    [
        lambda path: path.suffix == ".safetensors",
        lambda path: path.name == "state.json",
        lambda path: path.name == "MANIFEST.json",
        lambda path: path.name.startswith(".tmp-"),
        lambda path: path.name == "checkpoints",
        lambda path: path.name == "run",
    ],
    ids=["tensors", "state", "manifest", "new directory", "directory above", "run folder"],
)
def test_without_any_one_flush_a_power_cut_loses_the_checkpoint(
    monkeypatch, tmp_path, left_out: Callable[[Path], bool]
) -> None:
    run, scenario = tmp_path / "run", SCENARIOS["the first save"]
    before, calls = record(monkeypatch, run, scenario)
    fewer = [call for call in calls if not (call.kind == "fsync" and left_out(call.path))]
    assert len(fewer) < len(calls)
    assert violations(run, before, fewer, scenario, None)


def test_a_power_cut_leaves_the_old_or_the_new_pointer(monkeypatch, tmp_path) -> None:
    old, new = b'{\n  "step": 5\n}\n', b'{\n  "step": 9\n}\n'
    write_json_atomically(tmp_path / "best.json", {"step": 5})
    with monkeypatch.context() as patch:
        shim = OsShim(patch, tmp_path)
        write_json_atomically(tmp_path / "best.json", {"step": 9})
    assert (tmp_path / "best.json").read_bytes() == new
    for made, tree in crash_states(tmp_path, {"best.json": old}, shim.calls):
        assert tree["best.json"] in ({new} if made == len(shim.calls) else {old, new})


def die_at(shim: OsShim, index: int) -> None:
    def before(call: Call) -> None:
        if len(shim.calls) >= index:
            raise Killed

    shim.before = before


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_before_any_call_leaves_the_old_or_the_new_checkpoint(monkeypatch, tmp_path, name) -> None:
    scenario = SCENARIOS[name]
    _, calls = record(monkeypatch, tmp_path / "recorded", scenario)
    for index in range(len(calls)):
        run = tmp_path / f"run-{index}"
        prepare(run, scenario)
        with monkeypatch.context() as patch:
            die_at(OsShim(patch, run), index)
            with pytest.raises(Killed):
                save(run / "checkpoints", 9, keep=scenario.keep)
        assert latest_step(run / "checkpoints") in scenario.found
        save(run / "checkpoints", 12)
        assert latest_step(run / "checkpoints") == 12
        assert unfinished(run / "checkpoints") == [], index


def kill_while_saving(run: Path, kills: int) -> int:
    """Kill savers that resume from what the one before left; how many were killed in the middle of a save."""
    run.mkdir()
    delays, in_the_middle = random.Random(0), 0
    for _ in range(kills):
        saver = fork_server().Process(target=save_for_ever, args=(run,))
        before = last_completed(run)
        saver.start()
        while last_completed(run) == before:
            saver.join(0.005)
            assert saver.exitcode is None
        saver.join(delays.uniform(0, 0.2))
        saver.kill()
        saver.join()
        found = latest_step(run / "checkpoints", numel=NUMEL)
        assert found is not None
        assert found >= last_completed(run)
        in_the_middle += bool(unfinished(run / "checkpoints"))
    return in_the_middle


def last_completed(run: Path) -> int:
    completed = run / "completed"
    return int(completed.read_text().split()[-1]) if completed.exists() and completed.stat().st_size else -1


def test_kill_9_while_saving_never_loses_a_completed_checkpoint(tmp_path) -> None:
    assert kill_while_saving(tmp_path / "run", 20) > 0


@pytest.mark.nightly
def test_200_kills_while_saving_never_lose_a_completed_checkpoint(tmp_path) -> None:
    assert kill_while_saving(tmp_path / "run", 200) > 100
