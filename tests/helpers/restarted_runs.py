"""Runs on ranks that are killed and started again: a program of its own, since it forks.

    python -c "from tests.helpers.restarted_runs import main; main()" FOLDER KIND KILLS SEED

torchrun's own agent starts, watches and restarts the ranks. They are forked from a process that has imported
torch already, so that a restart takes a second instead of ten.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sparsegate.training import loop
from sparsegate.training.config import RunConfig
from sparsegate.training.overrides import from_json, to_json
from sparsegate.training.run_folder import saved_steps
from tests.helpers.killed_runs import KINDS
from tests.helpers.rank_runs import exact
from tests.helpers.tiny_runs import TINY_RUNS, with_gates

KINDS_ON_RANKS = KINDS | {"copies": ("language", {"expert_copies": 2})}
RANKS = 4
STEPS = 16
MOST_KILLS_OF_A_RUN = 3
IMPORTED_IN_A_RUN = ("tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer")
# Where a kill waits for its rank to be, and how long it then waits at most; "" is any moment of the run.
AIMS = {"": 5.0, "saving": 0.03, "evaluating": 0.03}
PATIENCE_S = 120


def config_of(folder: Path, kind: str) -> RunConfig:
    task, training = KINDS_ON_RANKS[kind]
    run = TINY_RUNS[task](folder / "dataset", steps=STEPS)
    run = exact(run, evaluate_every=8, checkpoint_every=2, timeout=60.0, **training)
    return with_gates(run, "noisy_topk")


def main() -> None:
    folder, kind, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    multiprocessing.set_forkserver_preload([__name__, *IMPORTED_IN_A_RUN])
    config = config_of(folder, kind)
    launch(config, folder / "whole", restarts=0)
    chance, moments, jobs = random.Random(seed), Counter(), 0
    while moments.total() < kills:
        planned = min(chance.randint(1, MOST_KILLS_OF_A_RUN), kills - moments.total())
        moments += killed(config, folder / f"job-{jobs}", planned, chance)
        jobs += 1
        print(json.dumps({"kills": moments.total(), "jobs": jobs, "moments": dict(moments)}), flush=True)


def launch(config: RunConfig, folder: Path, *, restarts: int) -> None:
    """Train on ranks until the run ends; an error where it does not."""
    status_of(folder, 0).parent.mkdir(parents=True, exist_ok=True)
    how = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=RANKS,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.02,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder.parent / f"{folder.name}-said")),
    )
    elastic_launch(how, train_on_rank)(json.dumps(to_json(config)), str(folder))


def killed(config: RunConfig, folder: Path, planned: int, chance: random.Random) -> Counter[str]:
    """A run to its end, of which ranks are killed so many times; where they were then, for each kill."""
    moments: Counter[str] = Counter()
    problems: list[BaseException] = []

    def kill_again_and_again() -> None:
        try:
            for number in range(planned):
                aim = chance.choice([*AIMS])
                moment = kill(folder, number, chance.randrange(RANKS), aim, chance)
                if not moment:
                    return  # no restart follows
                moments[moment] += 1
        except BaseException as problem:
            problems.append(problem)

    killer = threading.Thread(target=kill_again_and_again)
    killer.start()
    launch(config, folder, restarts=planned)
    killer.join()
    if problems:
        raise problems[0]
    return moments


def kill(folder: Path, generation: int, rank: int, aim: str, chance: random.Random) -> str:
    """Kill a rank of a generation at a random moment; what it was doing, or "" where the run had ended."""
    until = time.monotonic() + PATIENCE_S
    while not all(generation_of(folder, each) == generation for each in range(RANKS)):
        assert time.monotonic() < until, f"no generation {generation} of {folder}"
        time.sleep(0.002)
    while aim and status(folder, rank)[2] not in (aim, "ended"):
        assert time.monotonic() < until, f"never {aim}: {folder}"
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, AIMS[aim]))
    _, pid, moment = status(folder, rank)
    if moment == "ended":
        return ""
    before = saved_steps(folder)
    os.kill(int(pid), signal.SIGKILL)
    assert not before or saved_steps(folder)[0] >= before[0], "a completed checkpoint is gone"
    return moment


def status_of(folder: Path, rank: int) -> Path:
    return folder.parent / f"{folder.name}-ranks" / str(rank)


def status(folder: Path, rank: int) -> list[str]:
    """Generation, process, and what it is doing."""
    return status_of(folder, rank).read_text().split()


def generation_of(folder: Path, rank: int) -> int:
    return int(status(folder, rank)[0]) if status_of(folder, rank).exists() else -1


def train_on_rank(config: str, folder: str) -> None:
    """A rank: it tells what it is doing, and must go on from the newest checkpoint that is there."""
    torch.set_num_threads(1)
    os.environ.pop("TORCHELASTIC_ERROR_FILE", None)
    file = status_of(Path(folder), int(os.environ["RANK"]))

    def tell(doing: str) -> None:
        words = f"{os.environ['TORCHELASTIC_RESTART_COUNT']} {os.getpid()} {doing}".encode()
        temporary = file.with_name(f"{file.name}.new")
        temporary.write_bytes(words)
        os.replace(temporary, file)

    newest = (saved_steps(Path(folder)) or [0])[0]
    tell("starting")
    for name, doing in (("step", "training"), ("evaluate", "evaluating"), ("save", "saving")):
        setattr(loop.Run, name, told(getattr(loop.Run, name), doing, tell))
    plain = loop.Run.resume_or_start

    def resume_or_start(run: loop.Run) -> None:
        plain(run)
        assert run.state.progress.step == newest, f"at {run.state.progress.step} instead of {newest}"

    loop.Run.resume_or_start = resume_or_start
    loop.train(from_json(RunConfig, json.loads(config)), folder=Path(folder), resume=True)
    tell("ended")


def told(method, doing, tell):
    def telling(run: loop.Run) -> None:
        tell(doing)
        method(run)
        tell("training")

    return telling
