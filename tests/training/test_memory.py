"""What a run takes is compared with what is free before it is taken."""

from dataclasses import replace

import pytest

from sparsegate.models.memory import training_memory
from sparsegate.recipes.registry import recipe
from sparsegate.training import memory
from sparsegate.training.config import OptimConfig
from sparsegate.training.memory import method_of, require_memory_for


@pytest.mark.parametrize(
    ("optim", "of_expert"),
    [
        (OptimConfig(), 16),
        (OptimConfig(experts="factored"), 8),
        (OptimConfig(experts="factored", in_backward=True), 4),
    ],
)
def test_a_translation_model_takes_at_least_its_weights_gradients_and_moments(
    monkeypatch: pytest.MonkeyPatch, optim: OptimConfig, of_expert: int
):
    config = replace(recipe("translation-moe-512-h"), optim=optim)
    experts = 2 * 512 * 2 * 512 * 2048  # an encoder's and a decoder's, of two matrices each
    others = 102.3e6  # of the model without mixtures, and gates
    needed = 16 * others + of_expert * experts
    monkeypatch.setattr(memory, "available_memory", lambda device: round(1.01 * needed))
    require_memory_for(config)
    monkeypatch.setattr(memory, "available_memory", lambda device: round(0.98 * needed))
    with pytest.raises(ValueError, match=r"model: weights, gradients and optimizer alone take .* GiB, and"):
        require_memory_for(config)


@pytest.mark.parametrize(
    ("device", "kernels", "freed"),
    [("cpu", "auto", True), ("cuda", "triton", True), ("cuda", "auto", False)],
)
def test_gradients_and_copies_of_all_experts_are_planned_where_a_kernel_makes_them(device, kernels, freed):
    """Without a GPU, too."""
    config = recipe("small-moe-32")
    training = replace(config.training, device=device, kernels=kernels)
    config = replace(config, optim=OptimConfig(experts="factored", in_backward=True), training=training)
    assert method_of(config).in_backward == freed
    narrow = replace(config, model=replace(config.model, expert_dtype="bfloat16"))
    assert method_of(narrow).copied_bytes == (0 if freed else 4)
    assert method_of(config).copied_bytes == 0
    halved = replace(config, training=replace(config.training, precision="bfloat16"))
    assert method_of(halved).copied_bytes == (0 if device == "cpu" else 2)
    copied = training_memory(narrow.model, method_of(narrow))
    without = training_memory(narrow.model, replace(method_of(narrow), copied_bytes=0))
    assert copied.peak - without.peak == (0 if freed else 32 * 2 * 128 * 256 * 4)
