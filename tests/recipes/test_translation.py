"""The paper's translation models: what a plan counts, and what the paper prints."""

import json

import pytest
import torch

from sparsegate.cli.main import main
from sparsegate.models.gates import BalancedGate, HierarchicalGate, NoisyTopKGate, build_gate
from sparsegate.models.translation import MixtureBlock
from sparsegate.recipes.planner import plan
from sparsegate.recipes.registry import RECIPES, recipe

# name: multiply-adds per timestep (M), all parameters (billions; None: the paper prints none)
PRINTED = {
    "translation-dense": ("85", None),
    "translation-moe-32": ("85", None),
    "translation-moe-512-h": ("85", None),
    "translation-moe-2048-h": ("85", "8.7"),
    "multilingual-dense": ("102", None),
    "multilingual-moe-512": ("102", "8.7"),
}
LSTM = 4 * (512 + 512) * 2048 + 2048 * 512
CONTEXT = 4 * 512 * 2048
SOFTMAX = 512 * 32_768


@pytest.mark.parametrize("name", PRINTED)
def test_tables_2_to_5_come_out_to_the_printed_digit(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", name, "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    ops, parameters = PRINTED[name]
    assert f"{counted['ops_per_timestep'] / 1e6:.0f}" == ops
    if parameters is not None:
        assert f"{counted['parameters'] / 1e9:.1f}" == parameters


@pytest.mark.parametrize("name", PRINTED)
def test_operations_are_lstms_one_context_two_layers_of_experts_and_the_softmax(name: str):
    expert_ops = 2 * 512 * (16_384 if name.startswith("multilingual") else 8192)
    counted = plan(recipe(name).model)
    assert counted.ops_per_timestep == 5 * LSTM + CONTEXT + 2 * expert_ops + SOFTMAX
    without = plan(recipe("translation-lstm").model)
    assert counted.ops_per_timestep - without.ops_per_timestep == 2 * expert_ops


def test_the_largest_model_is_its_experts_and_little_else():
    counted = plan(recipe("translation-moe-2048-h").model)
    experts, gates = 2 * 2048 * 2 * 512 * 2048, 2 * (512 + 1) * (64 + 2048)
    attention, tables = 2 * 512 * 512 + 512, 3 * 512 * 32_768 + 32_768
    layers = 5 * LSTM + CONTEXT + experts + gates + attention
    assert counted.parameters_without_embedding_and_softmax == layers
    assert counted.parameters == layers + tables


def test_the_dense_baseline_has_about_the_size_of_gnmt():
    counted = plan(recipe("translation-gnmt").model)
    assert counted.parameters == pytest.approx(278e6, rel=0.02)
    assert counted.ops_per_timestep_with_gates_and_attention == pytest.approx(212e6, rel=0.03)


@pytest.mark.parametrize("name", ["translation-moe-32", "translation-moe-512-h", "translation-moe-2048-h"])
def test_models_of_one_pair_are_as_the_paper_says(name: str):
    model = recipe(name).model
    block = model.encoder_block
    assert block == model.decoder_block
    assert isinstance(block, MixtureBlock)
    assert (block.k, block.hidden, model.dropout) == (4, 2048, 0.4)
    if isinstance(block.gate, HierarchicalGate):
        assert (block.gate.primary, block.gate.secondary, block.gate.k_primary) == ("balanced", "balanced", 2)
    else:
        assert isinstance(block.gate, BalancedGate)
    assert (model.encoder_layers, model.decoder_layers, model.attention) == (3, 2, "product")
    assert (model.width, model.lstm_units, model.lstm_projection) == (512, 2048, 512)


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if "translation-moe" in name or "multilingual-moe" in name]
)
def test_in_evaluation_no_token_of_any_model_has_more_than_64_pairs(name: str):
    block = recipe(name).model.encoder_block
    assert isinstance(block, MixtureBlock)
    sizes = {"width": 512, "num_experts": block.num_experts, "k": block.k}
    gate = build_gate(block.gate, **sizes, kernel=None, device="meta").eval()
    assert gate(torch.empty(3, 512, device="meta")).expert_N.numel() <= 3 * 64


def test_the_multilingual_model_is_flat_and_noisy():
    block = recipe("multilingual-moe-512").model.encoder_block
    assert (block.num_experts, block.k, block.hidden) == (512, 2, 8192)
    assert isinstance(block.gate, NoisyTopKGate)


PAPERS = [name for name in RECIPES if name.startswith(("translation-", "multilingual-"))]


@pytest.mark.parametrize("name", PAPERS)
def test_they_are_trained_as_the_paper_says(name: str):
    config = recipe(name)
    assert (config.optim.warmup_steps, config.optim.constant_steps) == (2000, 8000)
    assert config.losses.importance == config.losses.load == 0.01


@pytest.mark.parametrize(("size", "width"), [("small", 128), ("medium", 512)])
@pytest.mark.parametrize(
    ("mixture", "dense", "num_experts"),
    [
        ("translation-moe-32", "translation-dense", 32),
        ("translation-moe-32-noisy", "translation-dense", 32),
        ("multilingual-moe-64", "multilingual-dense", 64),
    ],
)
def test_a_smaller_mixture_and_the_dense_model_cost_the_same(
    size: str, width: int, mixture: str, dense: str, num_experts: int
):
    mixture, dense = f"{size}-{mixture}", f"{size}-{dense}"
    counted, baseline = plan(recipe(mixture).model), plan(recipe(dense).model)
    assert counted.ops_per_timestep == baseline.ops_per_timestep
    gates = counted.ops_per_timestep_with_gates_and_attention
    assert gates - baseline.ops_per_timestep_with_gates_and_attention == 2 * width * num_experts * (
        2 if recipe(mixture).model.encoder_block.gate.kind == "noisy_topk" else 1
    )
