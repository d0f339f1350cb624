"""Small checkpoints whose content tells their step, so that a test can see which one it was given."""

from pathlib import Path

import torch
from torch import Tensor

from sparsegate.training.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint


def tensors_of(step: int, *, numel: int = 64) -> dict[str, dict[str, Tensor]]:
    """Several files and dtypes, all of them functions of the step."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(numel, generator=generator)
    return {
        "model": {"experts.w_in": weight.reshape(2, -1), "gate.w_gate": weight[:4].bfloat16()},
        "optimizer": {"experts.w_in.mean": -weight, "steps": torch.tensor(step)},
        "state": {"hidden": weight[::7].double(), "mask": weight > 0, "none": torch.zeros(0, 3)},
    }


def state_of(step: int) -> dict:
    return {"step": step, "curve": [1 / (step + 1), 2.5, None], "best": {"loss": 0.1 * step, "name": "ä\n"}}


def save(directory: Path, step: int, *, keep: set[int] | None = None, numel: int = 64) -> Path:
    return save_checkpoint(
        directory, step=step, tensors=tensors_of(step, numel=numel), state=state_of(step), keep=keep or set()
    )


def assert_is_of(checkpoint: Checkpoint, step: int, *, numel: int = 64) -> None:
    """Every bit is the one that was saved at `step`."""
    assert checkpoint.step == step
    assert checkpoint.state == state_of(step)
    assert_same_tensors(checkpoint.tensors, tensors_of(step, numel=numel))


def assert_same_tensors(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert {name: list(group) for name, group in found.items()} == {n: list(g) for n, g in expected.items()}
    for name, group in expected.items():
        for key, tensor in group.items():
            assert same_bits(found[name][key], tensor), (name, key)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits; NaN equals itself and 0.0 differs from -0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def bits(tensor: Tensor) -> bytes:
    return (
        tensor.detach()
        .clone(memory_format=torch.contiguous_format)
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def latest_step(directory: Path, *, numel: int = 64) -> int | None:
    """The step that a run would resume from; its content is checked."""
    path = latest_checkpoint(directory, warn=lambda message: None)
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    assert_is_of(checkpoint, checkpoint.step, numel=numel)
    return checkpoint.step


def unfinished(directory: Path) -> list[str]:
    """What a save left behind that is no checkpoint."""
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("step-"))
