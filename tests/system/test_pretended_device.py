"""What runs on the CPU runs on a GPU: shown on a device whose tensors do not mix with the CPU's."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sparsegate import load
from sparsegate.decoding.sampling import Sampling
from sparsegate.models.gates import GateConfig, build_gate
from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.experts.swiglu import SwiGLU
from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss, switch_loss, threshold_loss, z_loss
from sparsegate.training.config import RunConfig
from sparsegate.training.loop import Run, TrainResult, train
from sparsegate.training.reporter import Silence
from sparsegate.training.tasks import open_task
from tests.helpers.model_cases import GATES
from tests.helpers.pretended_device import PretendedDevice, there, waits
from tests.helpers.runs import make_dataset, make_translation_dataset
from tests.helpers.tiny_runs import tiny_run, tiny_translation_run, with_gates
from tests.training.test_large_models import LARGE, with_optim

KERNELS = ["auto", "triton"]
LOSSES = (importance_loss, load_loss, switch_loss, z_loss, threshold_loss)
Arrays = dict[str, npt.NDArray[Any]]


@pytest.fixture(scope="module")
def device() -> Iterator[PretendedDevice]:
    device = PretendedDevice()
    yield device
    device.stop()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("text") / "language").directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_translation_dataset(tmp_path_factory.mktemp("text") / "translation").directory


def on_gpu(config: RunConfig, kernels: str) -> RunConfig:
    return replace(config, training=replace(config.training, device="cuda", kernels=kernels))


def outcome(result: TrainResult) -> Arrays:
    """All weights, the optimizers' state, and the loss of the last evaluation."""
    assert result.evaluation is not None
    state = result.state
    found = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    for number, optimizer in enumerate(state.optimizers):
        for index, values in enumerate(optimizer.state.values()):
            found |= {f"optimizer/{number}/{index}/{key}": value for key, value in values.items()}
    found["loss"] = torch.tensor(result.evaluation.metrics()["loss"])
    return {name: value.detach().cpu().float().numpy() for name, value in found.items()}


def trained(config: RunConfig, folder: Path, resume: bool = False) -> Arrays:
    return outcome(train(config, folder=folder, resume=resume))


def assert_ends_as_on_the_cpu(
    device: PretendedDevice, config: RunConfig, folder: Path, kernels: str, *, within: float = 1e-3
) -> tuple[Arrays, Arrays]:
    """All weights and all state, within so much of the greatest number of each. Returns both sides."""
    expected = trained(config, folder / "cpu")
    found = device.run(trained, on_gpu(config, kernels), folder / "gpu")
    assert_alike(found, expected, within=within)
    return found, expected


def assert_alike(found: Arrays, expected: Arrays, *, within: float) -> None:
    """Each to so much of its own greatest number: second moments are tiny."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name] - value).max() <= within * abs(value).max(), name


def test_what_is_on_two_sides_is_refused_and_waiting_is_counted(device: PretendedDevice):
    with pytest.raises(RuntimeError, match="some of its tensors are on pretended, and others on the CPU"):
        device.run(_mix)
    assert device.run(_wait) == 3


def _mix() -> None:
    torch.ones(3, device=there()) + torch.ones(3)


def _wait() -> int:
    with waits() as counted:
        value = torch.ones(3, device=there())
        assert value.device == there()
        value.sum().item(), value.cpu(), value[value > 0]
    return counted.total()


@pytest.mark.parametrize("kernels", KERNELS)
def test_language_models(device: PretendedDevice, text: Path, tmp_path: Path, kernels: str):
    assert_ends_as_on_the_cpu(device, tiny_run(text, steps=4), tmp_path, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
def test_translation_models(device: PretendedDevice, pairs: Path, tmp_path: Path, kernels: str):
    assert_ends_as_on_the_cpu(device, tiny_translation_run(pairs, steps=4), tmp_path, kernels)


@pytest.mark.parametrize("gate", GATES)
def test_gates(device: PretendedDevice, text: Path, tmp_path: Path, gate: str):
    assert_ends_as_on_the_cpu(device, with_gates(tiny_run(text, steps=3), gate), tmp_path, "auto")


@pytest.mark.parametrize("kernels", KERNELS)
def test_everything_that_lets_large_models_train(
    device: PretendedDevice, text: Path, tmp_path: Path, kernels: str
):
    """In float32, where a last bit of a gradient is no other rounding of a weight."""
    config = with_optim(tiny_run(text, steps=4), **LARGE)
    model = replace(config.model, softmax_samples=9, recompute=True)
    assert_ends_as_on_the_cpu(device, replace(config, model=model), tmp_path, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
def test_experts_in_bfloat16_rounded_at_random(
    device: PretendedDevice, text: Path, tmp_path: Path, kernels: str
):
    """By the same draws: what differs are a few that were near to another neighbour."""
    config = with_optim(tiny_run(text, steps=4), **LARGE)
    config = replace(config, model=replace(config.model, expert_dtype="bfloat16"))
    sides = assert_ends_as_on_the_cpu(device, config, tmp_path, kernels, within=1e-2)
    for name in (name for name in sides[0] if ".experts." in name):
        found, expected = (side[name] for side in sides)
        differs = found != expected
        assert differs.mean() < 0.1, name  # more than half, rounded otherwise
        assert abs(found - expected).max() <= abs(expected).max() / 2**7, name  # one step of the greatest


def test_a_run_is_resumed_on_either_side(device: PretendedDevice, text: Path, tmp_path: Path):
    config = tiny_run(text, steps=6, checkpoint_every=3)
    short = replace(config, training=replace(config.training, steps=3))
    expected = trained(config, tmp_path / "whole")
    device.run(trained, on_gpu(short, "auto"), tmp_path / "first")
    found = [trained(config, tmp_path / "first", True)]
    trained(short, tmp_path / "second")
    found.append(device.run(trained, on_gpu(config, "auto"), tmp_path / "second", True))
    for each in found:
        assert_alike(each, expected, within=1e-3)


def test_trained_models_speak_there(device: PretendedDevice, text: Path, pairs: Path, tmp_path: Path):
    train(tiny_run(text, steps=3), folder=tmp_path / "language")
    train(tiny_translation_run(pairs, steps=3), folder=tmp_path / "translation")
    assert device.run(_spoken, tmp_path, "cuda") == _spoken(tmp_path, "cpu")


def _spoken(folder: Path, device: str) -> list[Any]:
    language, translation = (load(folder / name, device=device) for name in ("language", "translation"))
    return [
        [round(scored.total, 3) for scored in language.score(["the cat", "a"])],
        [written.tokens for written in language.generate(["the", "a cat"], sampling=Sampling(max_tokens=5))],
        [*translation.translate(["the cat", "a"])],
        round(translation.evaluate("valid").metrics()["loss"], 4),
    ]


def test_a_training_step_waits_for_its_loss_and_its_norm_alone(device: PretendedDevice, text: Path, tmp_path):
    for gate in ("noisy_topk", "hierarchical"):
        config = on_gpu(with_gates(tiny_run(text, steps=30), gate), "triton")
        assert device.run(_waits_of_steps, config, tmp_path) == {"aten._local_scalar_dense.default": 5 * 3}


def _waits_of_steps(config: RunConfig, folder: Path) -> dict[str, int]:
    run = Run(open_task(config), folder, Silence())
    run.step()
    with waits() as counted:
        for _ in range(3):
            run.step()
        return dict(counted)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("experts", [FeedForward, SwiGLU])
def test_the_layer_waits_for_nothing(device: PretendedDevice, gate: GateConfig, experts: type):
    found, expected = device.run(_layer, gate, experts, "pretended"), _layer(gate, experts, "cpu")
    assert found.pop("waits") == 0
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def _layer(gate: GateConfig, experts: Callable[..., Any], device: str) -> dict[str, Any]:
    """Outputs, losses and gradients of a training step with padding, and how often it waited."""
    torch.manual_seed(0)
    kernel = "triton" if device == "pretended" else None
    k = 6 if gate.kind == "softmax" else 2
    moe = MoE(
        gate=build_gate(gate, width=8, num_experts=6, k=k, kernel=kernel),
        experts=experts(width=8, hidden=5, num_experts=6, kernel=kernel),
    )
    with torch.no_grad():
        for parameter in moe.gate.parameters():
            parameter.normal_(std=0.5)
    x, cotangent, mask = torch.randn(4, 5, 8), torch.randn(4, 5, 8), torch.rand(4, 5) < 0.8
    noise = torch.randn(4, 5, moe.gate.noise_width) if moe.gate.noise_width else None
    moe = moe.to(device)
    x, cotangent, mask = (value.to(device) for value in (x, cotangent, mask))
    noise = None if noise is None else noise.to(device)
    x.requires_grad_()
    with waits() as counted:
        y, routing = moe(x, mask, noise)
        losses = torch.stack([loss(routing) for loss in LOSSES])
        total = (y * cotangent).sum() + losses.sum()
        grads = torch.autograd.grad(total, [x, *moe.parameters()], allow_unused=True)
        waited = counted.total()
    values = {"y": y, "losses": losses, **{f"gradient {n}": g for n, g in enumerate(grads) if g is not None}}
    return {"waits": waited, **{name: value.detach().cpu().numpy() for name, value in values.items()}}
