"""A fresh model has the weights that the seed gives, wherever it is made, and its optimizers their rates."""

from dataclasses import replace

import pytest
import torch

from sparsegate.recipes.registry import recipe
from sparsegate.training.config import RunConfig
from sparsegate.training.making import make_model, make_state
from sparsegate.training.overrides import replace_by_path
from sparsegate.training.ranks import ALONE
from sparsegate.training.step import set_learning_rate

SMALL = recipe("small-moe-4")


@pytest.mark.parametrize("expert_dtype", ["float32", "bfloat16"])
@pytest.mark.gpu
def test_weights_are_the_same_on_a_gpu(expert_dtype: str):
    config = replace(SMALL, model=replace(SMALL.model, expert_dtype=expert_dtype))
    made = {device: make_model(config, ALONE, device=torch.device(device)) for device in ("cpu", "cuda")}
    assert {p.device.type for p in made["cuda"].parameters()} == {"cuda"}
    for name, weight in made["cpu"].named_parameters():
        assert torch.equal(made["cuda"].get_parameter(name).cpu(), weight)


def test_the_seed_gives_the_weights():
    def weights(config: RunConfig) -> dict[str, torch.Tensor]:
        model = make_model(config, ALONE, device=torch.device("cpu"))
        return {name: weight for name, weight in model.named_parameters() if weight.dim() == 3}

    first, again, other = weights(SMALL), weights(SMALL), weights(replace(SMALL, seed=SMALL.seed + 1))
    assert len(first) == 2
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert not (weight == other[name]).any()


@pytest.mark.parametrize("experts", ["adam", "factored"])
def test_the_experts_have_a_rate_of_their_own(experts: str):
    """Of one first step, whose size both optimizers have from the rate alone."""
    steps = []
    for rate in (1.0, 0.25):
        changes = {"model.vocab_size": 50, "optim.experts": experts, "optim.expert_rate": rate}
        config = replace_by_path(SMALL, changes)
        state = make_state(config)
        before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
        for parameter in state.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        set_learning_rate(state.optimizers, 0.125)
        for optimizer in state.optimizers:
            optimizer.step()
        steps.append({name: p.detach() - before[name] for name, p in state.model.named_parameters()})
    for name, step in steps[0].items():
        factor = 0.25 if ".experts." in name else 1.0
        torch.testing.assert_close(steps[1][name], factor * step, rtol=1e-3, atol=1e-6)


def test_kernels_of_another_device_are_refused():
    config = replace_by_path(SMALL, {"training.kernels": "triton"})
    with pytest.raises(ValueError, match=r"training\.kernels \(triton\): is for CUDA devices, .*; use auto"):
        make_model(config, ALONE, device=torch.device("cpu"))
