"""What every gate promises."""

import pytest
import torch

from sparsegate.moe.losses import importance_loss, load_loss, switch_loss, threshold_loss, z_loss
from sparsegate.moe.routing import Routing
from tests.helpers.moe_cases import (
    DRAWS_ITS_OWN,
    DROPS,
    GATES,
    NOT_MET,
    NOT_NORMALIZED,
    NUM_EXPERTS,
    PASSED_BY,
    WIDTH,
    a_gate,
    dense,
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


def routed_again(gate, x_TD, noise, mask_T=None):
    """Routed with the same draws every time, given or not."""
    torch.manual_seed(7)
    return gate(x_TD, mask_T, noise)


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
def test_pairs_stand_token_by_token_no_pair_twice_and_padding_has_none(name, training, mask_T):
    gate, x_TD, noise = routed(name, training=training)
    routing = gate(x_TD, mask_T, noise)
    assert routing.num_experts == gate.num_experts == NUM_EXPERTS
    tokens = routing.token_N.tolist()
    assert tokens == sorted(tokens)
    assert routing.pairs_T.tolist() == [tokens.count(token) for token in range(7)]
    assert routing.weight_N.shape == routing.expert_N.shape == routing.token_N.shape
    if routing.pairs_per_token is not None:
        assert routing.pairs_T.tolist() == [routing.pairs_per_token] * 7
    used = []
    for token, expert, weight in zip(
        tokens, routing.expert_N.tolist(), routing.weight_N.tolist(), strict=True
    ):
        assert 0 <= expert <= NUM_EXPERTS
        assert weight >= 0
        if expert < NUM_EXPERTS:
            used.append((token, expert))
        else:
            assert weight == 0
    assert len(set(used)) == len(used) > 0
    assert mask_T is None or all(mask_T[token] for token, _ in used)
    num_real = 7 if mask_T is None else int(mask_T.sum())
    assert routing.sums.num_unrouted == num_real - len({token for token, _ in used})
    if not gate.pairs_vary and name not in DROPS:
        assert len(used) == num_real * gate.pairs_per_token
    assert routing.sums.num_dropped == int(routing.sums.count_E.sum()) - len(used)


@in_both_modes
def test_weights_of_a_token_that_has_experts_sum_to_one_if_normalized(name, training):
    gate, x_TD, noise = routed(name, training=training)
    routing = gate(x_TD, MASK_T, noise)
    total_T = dense(routing).sum(dim=1)
    has_expert_T = torch.zeros(7, dtype=torch.bool)
    has_expert_T[routing.token_N[routing.expert_N < NUM_EXPERTS]] = True
    assert not total_T[~has_expert_T].any()
    assert (total_T < 1 + 1e-12).all()
    if name in NOT_NORMALIZED:
        assert name in DROPS or (total_T < 1).all()
    elif name not in PASSED_BY:
        assert_close(total_T[has_expert_T], torch.ones(int(has_expert_T.sum())))


@in_both_modes
def test_the_sums_are_sums_over_the_pairs_in_use(name, training):
    gate, x_TD, noise = routed(name, training=training)
    routing = gate(x_TD, MASK_T, noise)
    # Under a capacity the sums tell what was asked for.
    asked = gate.gate(x_TD, MASK_T, noise) if name in DROPS else routing
    importance, count = [0.0] * (NUM_EXPERTS + 1), [0] * (NUM_EXPERTS + 1)
    for expert, weight in zip(asked.expert_N.tolist(), asked.weight_N.tolist(), strict=True):
        importance[expert] += weight
        count[expert] += 1
    assert_close(routing.sums.importance_E, torch.tensor(importance[:-1], dtype=torch.float64))
    assert routing.sums.count_E.tolist() == count[:-1]
    assert routing.sums.num_tokens == MASK_T.sum()
    assert (routing.sums.load_E >= 0).all()
    if not training:
        assert routing.sums.load_E.tolist() == count[:-1]


@in_both_modes
def test_padding_leaves_no_trace_even_if_it_is_nan(name, training, monkeypatch):
    if name in DRAWS_ITS_OWN:  # padding shifts which draw goes to whom
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    gate, x_TD, noise = routed(name, training=training)
    x_nan_TD = x_TD.detach().masked_fill(~MASK_T[:, None], torch.nan).requires_grad_()
    padded = gate(x_nan_TD, MASK_T, noise)
    without = gate(x_TD[MASK_T], None, None if noise is None else noise[MASK_T])
    assert_close(dense(padded)[MASK_T], dense(without))
    assert_close(padded.sums.importance_E, without.sums.importance_E)
    assert_close(padded.sums.load_E, without.sums.load_E)
    assert_close(padded.sums.probability_E, without.sums.probability_E)
    assert_close(padded.sums.z, without.sums.z)
    assert_close(padded.sums.threshold, without.sums.threshold)
    for field in ("count_E", "num_tokens", "num_unrouted", "num_dropped"):
        assert torch.equal(getattr(padded.sums, field), getattr(without.sums, field))

    cotangent_TE = torch.randn(7, NUM_EXPERTS, dtype=torch.float64)
    ours = (dense(padded) * cotangent_TE).sum() + all_losses(padded).sum() + threshold_loss(padded)
    theirs = (
        (dense(without) * cotangent_TE[MASK_T]).sum() + all_losses(without).sum() + threshold_loss(without)
    )
    our_gradients = gradients(ours, x_nan_TD, *gate.parameters())
    their_gradients = gradients(theirs, x_TD, *gate.parameters())
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        assert_close(our_gradient, their_gradient)


@in_both_modes
def test_a_token_is_routed_the_same_in_any_company_unless_the_gate_says_otherwise(name, training):
    gate, x_TD, noise = routed(name, training=training)
    together_TE = dense(gate(x_TD, None, noise))
    alone_TE = torch.cat(
        [dense(gate(x_TD[t : t + 1], None, None if noise is None else noise[t : t + 1])) for t in range(7)]
    )
    if gate.selects_over_batch:
        assert (alone_TE - together_TE).abs().max() > 1e-3
    else:
        assert_close(alone_TE, together_TE)


def test_the_same_noise_decides_the_same(name):
    gate, x_TD, noise = routed(name, training=True)
    if noise is not None:
        assert_same_routing(gate(x_TD, None, noise), gate(x_TD, None, noise))
    assert_same_routing(routed_again(gate, x_TD, None), routed_again(gate, x_TD, None))


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
    expected = routed_again(wide, x_TD.float(), None if noise is None else noise.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = routed_again(gate, x_TD, noise)
    for routing in (routed_again(gate, x_TD, noise), under_autocast):
        assert routing.weight_N.dtype == routing.sums.load_E.dtype == torch.float32
        assert_same_routing(routing, expected)


@in_both_modes
def test_the_derivative_of_the_weights_and_sums_is_that_of_finite_differences(name, training):
    gate, x_TD, noise = routed(name, training=training)

    def function(x, *parameters):
        names = [key for key, _ in gate.named_parameters()]
        torch.manual_seed(7)
        routing = torch.func.functional_call(
            gate, dict(zip(names, parameters, strict=True)), (x, MASK_T, noise)
        )
        return routing.weight_N, all_losses(routing)

    inputs = (x_TD, *(p.detach().clone().requires_grad_() for p in gate.parameters()))
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6, rtol=1e-6)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-6, rtol=1e-6)


def test_multiply_adds_count_every_weight_that_a_token_meets_once(name):
    gate = a_gate(name)
    weights = [p for key, p in gate.named_parameters() if not key.endswith("log_threshold")]
    assert gate.ops_per_token() == sum(p.numel() for p in weights) - NOT_MET.get(name, 0)


def test_a_step_changes_nothing_but_the_bias_of_a_gate_that_has_one(name):
    gate, x_TD, noise = routed(name, training=True)
    before = {key: value.clone() for key, value in gate.state_dict().items()}
    gate.after_step(gate(x_TD, None, noise).sums)
    changed = {key for key, value in gate.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == ({"bias"} if name == "sigmoid" else set())


def test_the_weights_of_meta_gates_have_shapes_alone(name):
    gate = GATES[name](width=WIDTH, num_experts=NUM_EXPERTS, device="meta", dtype=torch.float16)
    assert {p.device.type for p in gate.parameters()} == {"meta"}
    assert gate(torch.empty(3, WIDTH, device="meta")).sums.count_E.shape == (NUM_EXPERTS,)
