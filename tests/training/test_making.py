"""A fresh model has the weights that the seed gives, wherever it is made."""

from dataclasses import replace

import pytest
import torch

from sparsegate.recipes.registry import recipe
from sparsegate.training.config import RunConfig
from sparsegate.training.making import make_model
from sparsegate.training.ranks import ALONE

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
