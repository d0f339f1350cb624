"""Runs of the training loop on ranks."""

import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sparsegate.models.softmax import OutputSoftmax
from sparsegate.training import loop
from sparsegate.training.checkpoint import load_checkpoint
from sparsegate.training.config import RunConfig
from sparsegate.training.ranks import Ranks, ToldElsewhere
from sparsegate.training.run_folder import checkpoints_of


@dataclass(frozen=True)
class Ended:
    """What a run leaves: numbers by step, and the tensors of its last checkpoint as one process has them.

    norms: of the gradients; to Adam alone a gradient of twice the size is the same. evaluations: losses on
    the validation split.
    """

    losses: dict[int, float]
    norms: dict[int, float]
    evaluations: dict[int, float]
    tensors: dict[str, dict[str, Tensor]]


def exact(config: RunConfig, **training: object) -> RunConfig:
    """Without dropout, whose draws depend on how a batch is split."""
    return replace(
        config,
        model=replace(config.model, dropout=0.0),
        training=replace(config.training, **training),
    )


def train_on_rank(mesh: DeviceMesh, config: RunConfig, folder: str, resume: bool = False) -> str:
    """What the loop says on this rank: "" when it ends, or the signal that it left on.

    Two ranks stand on each machine, for a run that asks.
    """

    @contextmanager
    def these(*given: object, **options: object) -> Iterator[Ranks]:
        yield Ranks.of_mesh(mesh)

    with (
        mock.patch.object(loop, "ranks_of_process", these),
        mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "2"}),
    ):
        try:
            return loop.train(config, folder=Path(folder), resume=resume).stopped_by
        except (ValueError, OSError) as error:
            return "told elsewhere" if isinstance(error, ToldElsewhere) else str(error)


def stopped_on_rank(mesh: DeviceMesh, config: RunConfig, folder: str, who: int, step: int) -> str:
    """The same, when a signal reaches rank `who` in that step."""
    plain = loop.Run.step

    def signalled(run: loop.Run) -> None:
        plain(run)
        if mesh.get_local_rank() == who and run.state.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(loop.Run, "step", signalled):
        return train_on_rank(mesh, config, folder)


def spoiled_on_rank(mesh: DeviceMesh, config: RunConfig, folder: str, who: int, batch: int) -> str:
    """The same, when the losses of rank `who` are not finite in that batch."""
    plain, batches = OutputSoftmax.nll, count()

    def nll(softmax: OutputSoftmax, hidden: Tensor, target: Tensor) -> Tensor:
        value = plain(softmax, hidden, target)
        spoiled = softmax.training and next(batches) == batch and mesh.get_local_rank() == who
        return value * math.nan if spoiled else value

    with mock.patch.object(OutputSoftmax, "nll", nll):
        return train_on_rank(mesh, config, folder)


def differently_on_rank(mesh: DeviceMesh, configs: list[RunConfig], folder: str) -> str:
    """Each rank with a configuration of its own."""
    return train_on_rank(mesh, configs[mesh.get_local_rank()], folder)


def ended(folder: Path) -> Ended:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

    def values(kind: str, name: str) -> dict[int, float]:
        return {line["step"]: line[name] for line in lines if line["kind"] == kind}

    newest = max(checkpoints_of(folder).glob("step-*"))
    return Ended(
        losses=values("step", "train/loss"),
        norms=values("step", "train/grad_norm"),
        evaluations=values("evaluation", "valid/loss"),
        tensors=load_checkpoint(newest).tensors,
    )


def assert_alike(found: Ended, expected: Ended, *, tolerance: float) -> None:
    """0: bit for bit. A run in parts has evaluations at their ends as well."""
    assert found.losses.keys() == expected.losses.keys()
    for name in ("losses", "norms", "evaluations"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        for step, value in theirs.items():
            assert abs(ours[step] - value) <= tolerance * abs(value), (name, step)
    assert found.tensors.keys() == expected.tensors.keys()
    for file, tensors in expected.tensors.items():
        assert found.tensors[file].keys() == tensors.keys()
        for name, tensor in tensors.items() if file == "model" or not tolerance else ():
            torch.testing.assert_close(found.tensors[file][name], tensor, rtol=tolerance, atol=30 * tolerance)
