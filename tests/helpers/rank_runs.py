"""Runs of the training loop on ranks."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sparsegate.training import loop
from sparsegate.training.checkpoint import load_checkpoint
from sparsegate.training.config import RunConfig
from sparsegate.training.ranks import Ranks, ToldElsewhere
from sparsegate.training.run_folder import checkpoints_of


@dataclass(frozen=True)
class Ended:
    """What a run leaves: losses by step, and the tensors of its last checkpoint as one process has them."""

    losses: dict[int, float]
    tensors: dict[str, dict[str, Tensor]]


def exact(config: RunConfig, **training: object) -> RunConfig:
    """Without dropout, whose draws depend on how a batch is split."""
    return replace(
        config,
        model=replace(config.model, dropout=0.0),
        training=replace(config.training, **training),
    )


def train_on_rank(mesh: DeviceMesh, config: RunConfig, folder: str, resume: bool = False) -> str:
    """What the loop says on this rank: "" when it ends, or the signal that it left on."""

    @contextmanager
    def these(*given: object, **options: object) -> Iterator[Ranks]:
        yield Ranks.of_mesh(mesh)

    with mock.patch.object(loop, "ranks_of_process", these):
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


def differently_on_rank(mesh: DeviceMesh, configs: list[RunConfig], folder: str) -> str:
    """Each rank with a configuration of its own."""
    return train_on_rank(mesh, configs[mesh.get_local_rank()], folder)


def ended(folder: Path) -> Ended:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if line["kind"] == "step"}
    newest = max(checkpoints_of(folder).glob("step-*"))
    return Ended(losses=losses, tensors=load_checkpoint(newest).tensors)


def assert_alike(found: Ended, expected: Ended, *, tolerance: float) -> None:
    """0: bit for bit."""
    assert found.losses.keys() == expected.losses.keys()
    for step, loss in expected.losses.items():
        assert abs(found.losses[step] - loss) <= tolerance * abs(loss), step
    assert {file: [*tensors] for file, tensors in found.tensors.items()}.keys() == expected.tensors.keys()
    for file, tensors in expected.tensors.items():
        assert found.tensors[file].keys() == tensors.keys()
        for name, tensor in tensors.items() if file == "model" or not tolerance else ():
            torch.testing.assert_close(found.tensors[file][name], tensor, rtol=tolerance, atol=30 * tolerance)
