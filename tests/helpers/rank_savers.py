"""Ranks that save some experts together, and what one process would have saved."""

import time
from collections.abc import Collection
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sparsegate.training import checkpoint, rank_checkpoint
from sparsegate.training.checkpoint import load_checkpoint
from sparsegate.training.parts import Share
from sparsegate.training.rank_checkpoint import latest_on_ranks, save_on_ranks
from sparsegate.training.ranks import Ranks
from sparsegate.training.storage import FileDigest
from tests.helpers.checkpoints import same_bits

NUM_EXPERTS = 9
STATE = {"tokens": 12}


def shared() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    return {
        "model": {"gate.w_gate": torch.randn(4, NUM_EXPERTS)},
        "optimizer": {"gate.w_gate/step": torch.ones(())},
    }


def stacked() -> dict[str, dict[str, Tensor]]:
    """Of all experts; several dtypes, and two layers of different numbers of experts."""
    torch.manual_seed(2)
    w_in = torch.randn(NUM_EXPERTS, 3, 5)
    return {
        "model": {"moe.experts.w_in": w_in, "moe.experts.w_out": w_in.bfloat16(), "two.w_in": w_in[:8] + 1},
        "optimizer": {"moe.experts.w_in/row": w_in.sum(2)},
    }


def share_of(groups: dict[str, dict[str, Tensor]], share: Share) -> dict[str, dict[str, Tensor]]:
    return {
        group: {name: t[share.of(len(t)).start : share.of(len(t)).stop] for name, t in tensors.items()}
        for group, tensors in groups.items()
    }


def words() -> dict[str, Tensor]:
    """Of all words of a vocabulary."""
    torch.manual_seed(3)
    return {"embedding.weight": torch.randn(11, 3), "softmax.bias": torch.randn(11)}


def word_share(tensors: dict[str, Tensor], share: Share) -> dict[str, Tensor]:
    return {name: tensor[share.rank :: share.num_ranks] for name, tensor in tensors.items()}


def whole() -> dict[str, dict[str, Tensor]]:
    found = {group: tensors | stacked()[group] for group, tensors in shared().items()}
    return found | {"model": found["model"] | words()}


def assert_same(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for group, tensors in expected.items():
        assert found[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert same_bits(found[group][name], tensor), (group, name)


def ranks_of(mesh: DeviceMesh) -> Ranks:
    return Ranks.of_mesh(mesh)


def save_of_a_rank(mesh: DeviceMesh, folder: str, step: int, keep: Collection[int] = ()) -> str:
    ranks = ranks_of(mesh)
    share = Share(rank=ranks.rank, num_ranks=ranks.num_ranks)
    path = save_on_ranks(
        Path(folder),
        step=step,
        tensors=shared(),
        stacked=share_of(stacked(), share),
        words={"model": word_share(words(), share)},
        state=STATE,
        keep=keep,
        ranks=ranks,
    )
    return str(path)


def failing_save_of_a_rank(mesh: DeviceMesh, folder: str, step: int, who: int, which: str) -> str:
    """What a rank says when the disk of rank `who` is full at the file `which`."""
    real = rank_checkpoint.write_file

    def full(path: Path, chunks):
        if path.name.startswith(which):
            raise OSError(28, "No space left on device")
        return real(path, chunks)

    with mock.patch.object(rank_checkpoint, "write_file", full if mesh.get_local_rank() == who else real):
        try:
            save_of_a_rank(mesh, folder, step)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
    return "saved"


def latest_of_a_rank(mesh: DeviceMesh, folder: str) -> tuple[str, list[str], list[str]]:
    """The newest whole checkpoint as a rank finds it, what it is warned of, and the files that it reads."""
    warnings, read, real = [], [], checkpoint.read_file

    def reading(path: Path, parse, *, expected: FileDigest | None = None):
        read.extend([path.name] if expected is not None else [])
        return real(path, parse, expected=expected)

    with mock.patch.object(checkpoint, "read_file", reading):
        found = latest_on_ranks(Path(folder), warn=warnings.append, ranks=ranks_of(mesh))
    return "" if found is None else found.name, warnings, read


def slow_work_of_a_rank(mesh: DeviceMesh, who: int, seconds: float, timeout_s: float, fails: bool) -> str:
    """What a rank gets of work that takes rank `who` longer than ranks wait for each other."""
    rank = mesh.get_local_rank()

    def work() -> str:
        if rank == who:
            time.sleep(seconds)
            if fails:
                raise ValueError("it failed")
        return f"done by {rank}"

    try:
        return Ranks.of_mesh(mesh, timeout_s=timeout_s).beside().however_long(work)
    except ValueError as error:
        return str(error)


def assert_loads(path: Path, share: Share | None) -> None:
    expected = whole()
    if share is not None:
        expected = {group: tensors | share_of(stacked(), share)[group] for group, tensors in shared().items()}
        expected["model"] |= word_share(words(), share)
    found = load_checkpoint(path, share=share, word_share=share)
    assert found.state == STATE
    assert_same(found.tensors, expected)
