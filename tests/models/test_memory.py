"""What training is said to take is what weights, gradients and optimizers are found to take."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.planned_memory import CASES, row
from sparsegate.models import FeedForwardLM, MixtureLM, RecurrentLM, build
from sparsegate.models.memory import Memory, Method, require_memory, training_memory
from sparsegate.recipes.registry import recipe
from sparsegate.training.config import OptimConfig, RunConfig
from sparsegate.training.making import with_optimizers

COMMON = {"vocab_size": 11, "width": 6, "dropout": 0.1, "lstm_bias": True}
MODELS = [
    MixtureLM(**COMMON, lstm_units=6, num_experts=5, k=2, hidden=7),
    MixtureLM(**COMMON, lstm_units=6, num_experts=5, k=2, hidden=7, experts="swiglu"),
    FeedForwardLM(**COMMON, lstm_units=6, hidden=(7, 8)),
    RecurrentLM(**COMMON, lstm_units=9, lstm_projection=6, num_layers=2),
    MixtureLM(**COMMON, lstm_units=6, num_experts=5, k=2, hidden=7, softmax_cutoffs=(4,)),
]
METHOD = Method(tokens=10)


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.kind)
@pytest.mark.parametrize("experts", ["adam", "factored"])
def test_weights_gradients_and_state_are_those_of_a_model_that_is_trained(config, experts):
    model = build(config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    config_of_run = RunConfig(name="any", model=config, optim=OptimConfig(experts=experts))
    optimizers = with_optimizers(model, config_of_run).optimizers
    for optimizer in optimizers:
        optimizer.step()
    memory = training_memory(config, replace(METHOD, experts=experts))
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.experts == sum(p.nbytes for p in model.expert_parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    state = [s for optimizer in optimizers for s in optimizer.state.values()]
    assert memory.optimizer == sum(t.nbytes for s in state for name, t in s.items() if name != "step")


@pytest.mark.parametrize("softmax", [{}, {"softmax_samples": 4}, {"softmax_cutoffs": (4,)}], ids=str)
def test_the_state_of_tables_with_sparse_gradients_is_that_of_their_optimizer(softmax: dict[str, object]):
    config = replace(MODELS[3], **softmax)
    model = build(config).train()
    optimizers = with_optimizers(
        model, RunConfig(name="any", model=config, optim=OptimConfig(tables="rows"))
    ).optimizers
    token_BS = torch.randint(11, (2, 5))
    model.softmax.nll(model(token_BS).hidden_BSD, token_BS).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    state = [s for optimizer in optimizers for s in optimizer.state.values()]
    found = sum(t.nbytes for s in state for name, t in s.items() if name != "step")
    assert training_memory(config, replace(METHOD, sparse_rows=True)).optimizer == found


def of(name: str, **method: object) -> Memory:
    return training_memory(recipe(name).model, Method(**{"tokens": 2048, **method}))


def test_each_way_of_saving_saves_what_it_says():
    plain, parameters = of("moe-4096-h"), 4096 * 2 * 512 * 1024
    assert plain.experts == 4 * parameters
    assert of("moe-4096-h", expert_bytes=2).experts == 2 * parameters
    averages = 4096 * 2 * (4 * (512 + 1024) + 8)
    assert plain.optimizer - of("moe-4096-h", experts="factored").optimizer == 8 * parameters - averages
    assert averages < 0.01 * plain.experts
    in_backward = of("moe-4096-h", in_backward=True)
    assert plain.gradients - in_backward.gradients == 4 * (parameters - parameters // 4096)
    assert plain.peak - in_backward.peak == plain.gradients - in_backward.gradients
    recomputed = of("moe-4096-h", recompute=True)
    assert plain.activations - recomputed.activations == 2048 * 4 * 1024 * 4
    rows = of("moe-4096-h", sparse_rows=True)
    of_embedding, of_softmax = (793_471 - 2048) * 512, (793_471 - 2048 - 8192) * 513
    assert plain.gradients - rows.gradients == 4 * (of_embedding + of_softmax)


def test_a_vocabulary_that_is_sampled_needs_no_logits_of_all_words():
    config = replace(recipe("moe-256").model, softmax_samples=0)
    method = Method(tokens=2048, sparse_rows=True)
    sampled, full = of("moe-256", sparse_rows=True), training_memory(config, method)
    assert sampled.softmax < 0.1 * (3 * 2048 * 793_471 * 4)
    assert full.gradients - sampled.gradients == (793_471 - 2048 - 8192) * 513 * 4


def test_of_many_words_there_are_never_all_logits_and_of_few_three_times():
    config = replace(recipe("moe-256").model, softmax_samples=0)
    few = training_memory(replace(config, vocab_size=8000), Method(tokens=512))
    assert few.softmax == 3 * 512 * 8000 * 4
    assert training_memory(config, Method(tokens=2048)).softmax < 32 * 2**20
    assert training_memory(config, Method(tokens=1 << 17)).softmax < 2 * (1 << 17) * (512 + 256) * 4


def test_a_vocabulary_of_no_more_words_than_samples_is_planned_whole():
    config = recipe("moe-256").model
    method = Method(tokens=2048, sparse_rows=True)
    for words in (8000, 8192):
        few = replace(config, vocab_size=words)
        assert training_memory(few, method) == training_memory(replace(few, softmax_samples=0), method)


def test_an_adaptive_softmax_takes_less_of_everything():
    config = replace(recipe("moe-256").model, softmax_samples=0)
    method = Method(tokens=2048)
    full = training_memory(config, method)
    adaptive = training_memory(replace(config, softmax_cutoffs=(20_000, 200_000)), method)
    softmax = 512 * 20_002 + (512 + 180_000) * 128 + (512 + 593_471) * 32
    assert adaptive.tables == 4 * (793_471 * 512 + softmax)
    assert full.gradients - adaptive.gradients == full.tables - adaptive.tables
    assert full.optimizer - adaptive.optimizer == 2 * (full.tables - adaptive.tables)


def test_the_papers_largest_model_has_about_a_billion_parameters_on_each_of_128_devices():
    memory = of("news-moe-131072-h", experts="factored", devices=128)
    assert memory.experts == 4 * 1024 * 2 * 512 * 1024
    assert memory.experts / 4 == pytest.approx(1e9, rel=0.1)  # appendix D: "up to 1 billion"
    assert memory.others == of("news-moe-131072-h").others


def test_a_model_that_is_too_large_is_refused_with_both_figures():
    config, needed = recipe("moe-4096-h").model, of("moe-4096-h").peak
    require_memory(config, Method(tokens=2048), available=needed)
    with pytest.raises(
        ValueError, match=r"model: training it takes about [0-9.]+ GiB, and 24\.0 GiB are free"
    ):
        require_memory(config, Method(tokens=2048), available=24 * 2**30)


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_within_a_tenth_of_the_measured_one(case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    assert row(case)["predicted / measured"] == pytest.approx(1, abs=0.1)
