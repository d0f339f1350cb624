"""What every gate promises."""

import pytest
import torch

from sparsegate.moe.losses import importance_loss, load_loss, switch_loss, z_loss
from sparsegate.moe.routing import Routing
from tests.helpers.moe_cases import (
    GATES,
    NOT_MET,
    NOT_NORMALIZED,
    NUM_EXPERTS,
    WIDTH,
    a_gate,
    gradients,
    noise_for,
)
from tests.helpers.tolerances import assert_close

MASK_T = torch.tensor([True, True, False, True, False, True, True])

pytestmark = pytest.mark.parametrize("name", GATES)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def routed(name, *, training, dtype=torch.float64):
    """A gate, seven tokens, a noise draw."""
    gate = a_gate(name, dtype=dtype).train(training)
    x_TD = torch.randn(7, WIDTH, dtype=dtype, requires_grad=True)
    return gate, x_TD, noise_for(gate, 7, dtype=dtype)


def all_losses(routing: Routing) -> torch.Tensor:
    return torch.stack([loss(routing) for loss in (importance_loss, load_loss, switch_loss, z_loss)])


def assert_same_routing(ours: Routing, theirs: Routing) -> None:
    assert torch.equal(ours.expert_N, theirs.expert_N)
    assert_close(ours.weight_N, theirs.weight_N)
    assert torch.equal(ours.sums.count_E, theirs.sums.count_E)
    assert_close(ours.sums.importance_E, theirs.sums.importance_E)
    assert_close(ours.sums.load_E, theirs.sums.load_E)
    assert_close(ours.sums.probability_E, theirs.sums.probability_E)
    assert_close(ours.sums.z, theirs.sums.z)
    assert torch.equal(ours.sums.num_tokens, theirs.sums.num_tokens)


@in_both_modes
@pytest.mark.parametrize("mask_T", [None, MASK_T], ids=["all real", "padded"])
def test_every_real_token_has_k_different_experts_whose_weights_sum_to_one_if_normalized(
    name, training, mask_T
):
    gate, x_TD, noise = routed(name, training=training)
    routing = gate(x_TD, mask_T, noise)
    k = gate.pairs_per_token
    assert routing.num_experts == gate.num_experts == NUM_EXPERTS
    assert routing.token_N.tolist() == [token for token in range(7) for _ in range(k)]
    expert_TK, weight_TK = routing.expert_N.reshape(7, k), routing.weight_N.reshape(7, k)
    real_T = torch.ones(7, dtype=torch.bool) if mask_T is None else mask_T
    assert (weight_TK >= 0).all()
    if name in NOT_NORMALIZED:
        assert (weight_TK[real_T].sum(dim=1) < 1).all()
    else:
        assert_close(weight_TK[real_T].sum(dim=1), torch.ones(int(real_T.sum())))
    for experts in expert_TK[real_T].tolist():
        assert len(set(experts)) == k
        assert set(experts) <= set(range(NUM_EXPERTS))
    assert (expert_TK[~real_T] == NUM_EXPERTS).all()
    assert not weight_TK[~real_T].any()


@in_both_modes
def test_the_sums_are_sums_over_the_pairs_in_use(name, training):
    gate, x_TD, noise = routed(name, training=training)
    routing = gate(x_TD, MASK_T, noise)
    importance, count = [0.0] * (NUM_EXPERTS + 1), [0] * (NUM_EXPERTS + 1)
    for expert, weight in zip(routing.expert_N.tolist(), routing.weight_N.tolist(), strict=True):
        importance[expert] += weight
        count[expert] += 1
    assert_close(routing.sums.importance_E, torch.tensor(importance[:-1], dtype=torch.float64))
    assert routing.sums.count_E.tolist() == count[:-1]
    assert routing.sums.num_tokens == MASK_T.sum()
    assert (routing.sums.load_E >= 0).all()
    if not training:
        assert routing.sums.load_E.tolist() == count[:-1]


@in_both_modes
def test_padding_leaves_no_trace_even_if_it_is_nan(name, training):
    gate, x_TD, noise = routed(name, training=training)
    x_nan_TD = x_TD.detach().masked_fill(~MASK_T[:, None], torch.nan).requires_grad_()
    padded = gate(x_nan_TD, MASK_T, noise)
    without = gate(x_TD[MASK_T], None, None if noise is None else noise[MASK_T])
    k = gate.pairs_per_token
    for field in ("expert_N", "weight_N"):
        ours, theirs = (getattr(r, field).reshape(-1, k) for r in (padded, without))
        assert_close(ours[MASK_T], theirs, dtype=torch.float64)
    assert_close(padded.sums.importance_E, without.sums.importance_E)
    assert_close(padded.sums.load_E, without.sums.load_E)
    assert_close(padded.sums.probability_E, without.sums.probability_E)
    assert_close(padded.sums.z, without.sums.z)
    assert torch.equal(padded.sums.count_E, without.sums.count_E)

    weight_TK = torch.randn(7, k, dtype=torch.float64)
    ours = (padded.weight_N * weight_TK.flatten()).sum() + all_losses(padded).sum()
    theirs = (without.weight_N * weight_TK[MASK_T].flatten()).sum() + all_losses(without).sum()
    our_gradients = gradients(ours, x_nan_TD, *gate.parameters())
    their_gradients = gradients(theirs, x_TD, *gate.parameters())
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        assert_close(our_gradient, their_gradient)


@in_both_modes
def test_a_token_is_routed_the_same_in_any_company(name, training):
    gate, x_TD, noise = routed(name, training=training)
    together, k = gate(x_TD, None, noise), gate.pairs_per_token
    for token in range(7):
        alone = gate(x_TD[token : token + 1], None, None if noise is None else noise[token : token + 1])
        assert torch.equal(alone.expert_N, together.expert_N[token * k : (token + 1) * k])
        assert_close(alone.weight_N, together.weight_N[token * k : (token + 1) * k])


def test_the_same_noise_decides_the_same(name):
    gate, x_TD, noise = routed(name, training=True)
    assert_same_routing(gate(x_TD, None, noise), gate(x_TD, None, noise))
    torch.manual_seed(7)
    first = gate(x_TD)
    torch.manual_seed(7)
    assert_same_routing(first, gate(x_TD))


def test_evaluation_draws_no_noise(name):
    gate, x_TD, noise = routed(name, training=False)
    state = torch.get_rng_state()
    routing = gate(x_TD)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_routing(gate(x_TD, None, noise), routing)


@in_both_modes
def test_no_token_has_no_pairs_and_sums_of_zero_with_a_path_for_the_gradient(name, training):
    gate = a_gate(name).train(training)
    x_TD = torch.empty(0, WIDTH, dtype=torch.float64, requires_grad=True)
    routing = gate(x_TD, None, noise_for(gate, 0))
    assert routing.expert_N.shape == routing.weight_N.shape == routing.token_N.shape == (0,)
    sums = routing.sums
    assert not torch.stack([sums.importance_E, sums.load_E, sums.count_E, sums.probability_E]).any()
    loss = routing.weight_N.sum() + all_losses(routing).sum()
    assert loss == 0
    loss.backward()
    assert x_TD.grad.shape == (0, WIDTH)
    for parameter_name, parameter in gate.named_parameters():
        if parameter_name.endswith("w_gate"):
            assert not parameter.grad.any()


@in_both_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gates_compute_in_float32_at_least(name, training, dtype):
    gate, x_TD, noise = routed(name, training=training, dtype=dtype)
    wide = a_gate(name, dtype=torch.float32).train(training)
    wide.load_state_dict({key: value.float() for key, value in gate.state_dict().items()})
    expected = wide(x_TD.float(), None, None if noise is None else noise.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = gate(x_TD, None, noise)
    for routing in (gate(x_TD, None, noise), under_autocast):
        assert routing.weight_N.dtype == routing.sums.load_E.dtype == torch.float32
        assert_same_routing(routing, expected)


@in_both_modes
def test_the_derivative_of_the_weights_and_sums_is_that_of_finite_differences(name, training):
    gate, x_TD, noise = routed(name, training=training)

    def function(x, *parameters):
        names = [key for key, _ in gate.named_parameters()]
        routing = torch.func.functional_call(
            gate, dict(zip(names, parameters, strict=True)), (x, MASK_T, noise)
        )
        return routing.weight_N, all_losses(routing)

    inputs = (x_TD, *(p.detach().clone().requires_grad_() for p in gate.parameters()))
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6, rtol=1e-6)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-6, rtol=1e-6)


def test_multiply_adds_count_every_weight_that_a_token_meets_once(name):
    gate = a_gate(name)
    assert gate.ops_per_token() == sum(p.numel() for p in gate.parameters()) - NOT_MET.get(name, 0)


def test_a_step_changes_nothing_in_a_gate_without_a_balancing_state(name):
    gate, x_TD, noise = routed(name, training=True)
    before = {key: value.clone() for key, value in gate.state_dict().items()}
    gate.after_step(gate(x_TD, None, noise).sums)
    assert all(torch.equal(value, before[key]) for key, value in gate.state_dict().items())


def test_the_weights_of_meta_gates_have_shapes_alone(name):
    gate = GATES[name](width=WIDTH, num_experts=NUM_EXPERTS, device="meta", dtype=torch.float16)
    assert {p.device.type for p in gate.parameters()} == {"meta"}
    assert gate(torch.empty(3, WIDTH, device="meta")).sums.count_E.shape == (NUM_EXPERTS,)
