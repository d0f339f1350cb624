"""Runs of the training loop on ranks."""

import json
import math
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sparsegate.evaluation.translating import TranslationEvaluation
from sparsegate.models import LanguageModel
from sparsegate.models.softmax import OutputSoftmax
from sparsegate.parallel.gradients import GradientSums
from sparsegate.training import loop, rank_checkpoint
from sparsegate.training import ranks as ranks_of_runs
from sparsegate.training.checkpoint import checkpoint_name, load_checkpoint
from sparsegate.training.config import RunConfig
from sparsegate.training.making import make_state
from sparsegate.training.ranks import ALONE, Ranks, ToldElsewhere
from sparsegate.training.run_folder import checkpoints_of
from sparsegate.training.storage import FileDigest
from sparsegate.training.tasks import open_task
from tests.helpers.ranks import gradient_group


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

    Two ranks stand on each machine, for a run that asks. Gradients are added up in several buckets.
    """

    @contextmanager
    def these(*given: object, **options: object) -> Iterator[Ranks]:
        yield Ranks.of_mesh(mesh, gradient_group=gradient_group(mesh.size()))

    with (
        mock.patch.object(loop, "ranks_of_process", these),
        mock.patch.object(ranks_of_runs, "GradientSums", partial(GradientSums, bucket_bytes=2048)),
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


def failing_train_on_rank(mesh: DeviceMesh, config: RunConfig, folder: str, who: int, step: int) -> str:
    """The same, when the disk of rank `who` is full at the checkpoint of a step."""
    real = rank_checkpoint.write_file

    def full(path: Path, chunks: Iterable[bytes | memoryview]) -> FileDigest:
        if mesh.get_local_rank() == who and path.parent.name.endswith(checkpoint_name(step)):
            raise OSError(28, "No space left on device")
        return real(path, chunks)

    with mock.patch.object(rank_checkpoint, "write_file", full):
        return train_on_rank(mesh, config, folder)


def differently_on_rank(mesh: DeviceMesh, configs: list[RunConfig], folder: str) -> str:
    """Each rank with a configuration of its own."""
    return train_on_rank(mesh, configs[mesh.get_local_rank()], folder)


@dataclass(frozen=True)
class Measurement:
    """What an evaluation found: figures, balance sums by field, translations."""

    metrics: dict[str, float]
    sums: dict[str, Tensor]
    hypotheses: list[str]


def evaluated(config: RunConfig, ranks: Ranks = ALONE) -> Measurement:
    """A fresh model, whose gates prefer something, on the validation split; its experts on ranks."""
    task = open_task(config)
    state = make_state(task.config, ranks)
    for name, parameter in state.model.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    found = task.evaluate(state.model, ranks)
    parts = list(found.pairs.values()) if isinstance(found, TranslationEvaluation) else [found]
    return Measurement(
        metrics=found.metrics(),
        sums={
            f"{number} {layer} {name}": value
            for number, part in enumerate(parts)
            for layer, sums in part.sums.items()
            for name, value in vars(sums).items()
        },
        hypotheses=[text for part in parts for text in getattr(part, "hypotheses", [])],
    )


def evaluation_of_a_rank(mesh: DeviceMesh, config: RunConfig) -> Measurement:
    return evaluated(config, Ranks.of_mesh(mesh))


def sizes_read_by_a_rank(mesh: DeviceMesh, config: RunConfig) -> int:
    """How many tokens of the validation split this rank passes through its model."""
    read, plain = [], LanguageModel.forward

    def counting(model: LanguageModel, input_BS: Tensor, **options: Tensor) -> object:
        mask_BS = options["mask_BS"]
        read.append(input_BS.numel() if mask_BS is None else int(mask_BS.sum()))
        return plain(model, input_BS, **options)

    with mock.patch.object(LanguageModel, "forward", counting):
        evaluated(config, Ranks.of_mesh(mesh))
    return sum(read)


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
