"""A model laid over devices: traffic by counting it, times by the formula, memory refused in one line."""

from dataclasses import replace

import pytest
import torch

from sparsegate.models import MixtureLM
from sparsegate.models.gates import HierarchicalGate
from sparsegate.models.memory import Method
from sparsegate.models.softmax import draw_log_uniform
from sparsegate.parallel.placement import experts_of
from sparsegate.recipes.cluster import Layout, Machine, arithmetic_flops, lay_out
from sparsegate.recipes.planner import plan
from sparsegate.recipes.registry import recipe


def laid(
    name: str, machine: Machine, *, batch_tokens: int = 8192, expert_copies: int = 1, **method: object
) -> Layout:
    return lay_out(
        recipe(name).model,
        machine,
        Method(**{"tokens": 1, **method}),
        batch_tokens=batch_tokens,
        micro_batches=1,
        expert_copies=expert_copies,
    )


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        *((name, devices) for name in ("moe-256", "moe-1024-h") for devices in (1, 2, 16)),
        ("moe-4", 2),  # all experts
        ("moe-32", 8),  # four on each, so that a token's are rarely together
        ("moe-32", 7),  # not evenly
        ("moe-1024-h", 24),  # 16 groups, which are cut
    ],
)
def test_what_is_sent_is_what_tokens_with_experts_drawn_at_random_would_send(name: str, devices: int):
    """Each rank's tokens are sent once to each other rank that has an expert of theirs."""
    model = recipe(name).model
    assert isinstance(model, MixtureLM)
    num_tokens = 20_000
    if isinstance(model.gate, HierarchicalGate):
        groups, chosen = model.gate.num_groups, model.gate.k_primary
        in_group = model.num_experts // groups
        group_TC = torch.rand(num_tokens, groups).topk(chosen).indices
        inner_TCK = torch.rand(num_tokens, chosen, in_group).topk(model.k // chosen).indices
        expert_TK = (group_TC[:, :, None] * in_group + inner_TCK).flatten(1)
    else:
        expert_TK = torch.rand(num_tokens, model.num_experts).topk(model.k).indices
    own = [experts_of(r, num_experts=model.num_experts, num_ranks=devices) for r in range(devices)]
    device_E = torch.cat([torch.full((len(experts),), rank) for rank, experts in enumerate(own)])
    home_T1 = torch.arange(num_tokens)[:, None] % devices
    device_TK = device_E[expert_TK]
    away_TW = torch.zeros(num_tokens, devices, dtype=torch.bool).scatter(1, device_TK, True)
    rows = away_TW.scatter(1, home_T1, False).sum() / num_tokens
    pairs = (device_TK != home_T1).sum() / num_tokens
    # A row there and back, forward and backward; a pair's number and weight, and its gradient back.
    expected = -(-8192 // devices) * float(rows * 4 * model.width * 4 + pairs * 12)
    assert laid(name, Machine(devices=devices)).all_to_all_bytes == pytest.approx(expected, rel=0.01)


def test_the_gradients_of_copies_travel_in_a_ring_and_those_of_experts_do_not():
    layout = laid("moe-256", Machine(devices=8))
    counted = plan(recipe("moe-256").model)
    experts = 256 * 2 * 512 * 1024
    assert layout.copied_parameters == counted.parameters - experts
    assert layout.all_reduce_bytes == round(2 * 7 / 8 * 4 * (counted.parameters - experts))


def test_words_that_are_spread_are_not_copied():
    machine = Machine(devices=8)
    layout = laid("moe-256", machine, spread_words=True)
    sent = layout.all_to_all_bytes + layout.word_bytes + layout.all_reduce_bytes
    assert layout.network_seconds == sent / machine.bandwidth
    counted = plan(recipe("moe-256").model)
    experts = 256 * 2 * 512 * 1024
    tables = 793_471 * (2 * 512 + 1)
    assert layout.copied_parameters == counted.parameters - experts - tables
    assert layout.memory < laid("moe-256", Machine(devices=8)).memory - 12 * tables


@pytest.mark.parametrize("devices", [2, 5])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("samples", [0, 300])
def test_words_that_are_spread_travel_once_for_each_device_that_asks(
    samples: int, micro_batches: int, devices: int
):
    """Every device looks up its tokens' words in what stands elsewhere, and its targets' and candidates'."""
    model = replace(recipe("small-moe-32").model, softmax_samples=samples)
    tokens, width, vocab_size = 600, model.width, model.vocab_size
    layout = lay_out(
        model,
        Machine(devices=devices),
        Method(tokens=1, spread_words=True),
        batch_tokens=tokens * micro_batches * devices,
        micro_batches=micro_batches,
    )

    def drawn(number: int) -> torch.Tensor:
        return draw_log_uniform(number, vocab_size, device=torch.device("cpu"))

    def looked_up(word_N: torch.Tensor, numbers: int) -> int:
        """Bytes that leave a device, of whose requests and answers others have as many."""
        return int((word_N.unique() % devices != 0).sum()) * (4 + 2 * 4 * numbers)

    torch.manual_seed(7)
    sent = 0.0
    for _ in range(rounds := 30):
        sent += looked_up(drawn(tokens), width)
        if samples:
            sent += looked_up(torch.cat([drawn(tokens), drawn(samples)]), width + 1)
        else:  # a hidden value, a target, and two numbers, for each token and other device
            sent += (devices - 1) * tokens * (2 * 4 * width + 8 + 2 * 8)
    assert layout.word_bytes == pytest.approx(micro_batches * sent / rounds, rel=0.02)


def test_words_that_are_copied_do_not_travel():
    assert laid("moe-256", Machine(devices=8)).word_bytes == 0
    assert laid("moe-256", Machine(), spread_words=True).word_bytes == 0


def test_a_step_takes_what_the_roofline_says():
    machine = Machine(devices=4, flops=1e12, efficiency=0.5, memory_bandwidth=1e12, bandwidth=1e9)
    layout = laid("moe-32", machine)
    counted = plan(recipe("moe-32").model)
    flops = 6 * (counted.ops_per_timestep + 512 * 8192) * 2048
    assert layout.arithmetic_seconds == pytest.approx(flops / 5e11)
    assert layout.network_seconds == (layout.all_to_all_bytes + layout.all_reduce_bytes) / 1e9
    times = (layout.arithmetic_seconds, layout.memory_seconds, layout.network_seconds)
    assert layout.overlapped_seconds == max(times)
    assert layout.in_turn_seconds == sum(times)
    assert layout.tflops == pytest.approx(flops / max(times) / 1e12)
    assert layout.rows_per_expert == 4 * 8192 / 32


@pytest.mark.parametrize("devices", [1, 2, 3, 16])
def test_a_step_waits_for_the_device_that_has_most_experts(devices: int):
    """Appendix C.1: of MoE-4 on 16 GPUs four did the experts' work."""
    machine = Machine(devices=devices, flops=1e12, efficiency=0.5)
    layout, tokens = laid("moe-4", machine, batch_tokens=48 * 64), 48 * 64
    most = {1: 4, 2: 2, 3: 2, 16: 1}[devices]
    rows_of_an_expert, expert = tokens, 2 * 512 * 1024  # all four see all tokens
    model = recipe("moe-4").model
    rest = arithmetic_flops(model) - 6 * 4 * expert
    flops = rest * tokens / devices + 6 * most * rows_of_an_expert * expert
    assert layout.arithmetic_seconds == pytest.approx(flops / 5e11)


def test_one_device_sends_nothing():
    layout = laid("moe-32", Machine())
    assert layout.all_to_all_bytes == layout.all_reduce_bytes == 0


def test_a_sampled_softmax_counts_its_candidates():
    sampled = recipe("moe-4").model
    full = replace(sampled, softmax_samples=0)
    for model, words in ((sampled, 8192), (full, 793_471)):
        assert arithmetic_flops(model) == 6 * (plan(model).ops_per_timestep + 512 * words)


def test_more_devices_hold_fewer_experts_each_and_take_less_memory():
    some = [laid("moe-4096-h", Machine(devices=devices)) for devices in (1, 4, 16)]
    assert [layout.experts_per_device for layout in some] == [4096, 1024, 256]
    assert some[0].memory > some[1].memory > some[2].memory


def test_copies_of_the_experts_are_models_beside_each_other_that_add_up_their_gradients():
    """Tokens travel as on the devices of one copy; each device sends its experts' gradients to the others."""
    one = laid("moe-256", Machine(devices=4), batch_tokens=2048)
    four = laid("moe-256", Machine(devices=16), batch_tokens=8192, expert_copies=4)
    same = ("experts_per_device", "tokens_per_device", "memory", "all_to_all_bytes", "arithmetic_seconds")
    assert all(getattr(four, name) == getattr(one, name) for name in same)
    of_experts = 64 * 2 * 512 * 1024 * 4
    assert four.all_reduce_bytes == round(2 * 15 / 16 * 4 * one.copied_parameters)
    assert (one.copies_bytes, four.copies_bytes) == (0, 2 * 3 * of_experts // 4)
    with pytest.raises(ValueError, match=r"training\.expert-copies \(3\) must divide devices"):
        laid("moe-256", Machine(devices=16), expert_copies=3)


def test_a_model_that_does_not_fit_is_refused_with_the_figures():
    machine = Machine(devices=2, memory=2**30)
    with pytest.raises(ValueError, match=r"memory \(1\.0 GiB\) is less than the [0-9.]+ GiB that training"):
        laid("moe-4096-h", machine).require_memory(machine)
    roomy = Machine(devices=16, memory=2**45)
    laid("moe-4096-h", roomy).require_memory(roomy)


@pytest.mark.parametrize("name", ["4xlstm-512", "moe-1-wide"])
def test_dense_models_are_copied_and_send_no_tokens(name: str):
    layout = laid(name, Machine(devices=4))
    assert (layout.all_to_all_bytes, layout.experts_per_device, layout.rows_per_expert) == (0, 0, 0)
