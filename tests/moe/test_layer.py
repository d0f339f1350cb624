"""The layer as a whole: shapes, masks, names, precision, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.experts.modules import ModuleExperts
from sparsegate.moe.gating.noisy_topk import NoisyTopK
from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss
from tests.helpers import moe_oracle as oracle
from tests.helpers.derivatives import assert_derivatives
from tests.helpers.moe_cases import (
    GATES,
    NUM_EXPERTS,
    WIDTH,
    Batch,
    a_batch,
    a_gate,
    a_moe,
    dense,
    gradients,
    noise_for,
    some_experts,
)
from tests.helpers.tolerances import TOLERANCES, assert_close

MASK_T = torch.tensor([True, True, False, True, False, True, True])


def loss_of(moe: MoE, batch: Batch, mask_T=None):
    """A task and both balance losses, the task over real tokens alone."""
    y_TD, routing = moe(batch.x_TD, mask_T, batch.noise_TE)
    if mask_T is not None:
        y_TD = y_TD[mask_T]
    cotangent_TD = batch.cotangent_TD if mask_T is None else batch.cotangent_TD[mask_T]
    return (y_TD * cotangent_TD).sum() + importance_loss(routing) + load_loss(routing)


def test_derivatives_of_the_whole_layer_are_those_of_finite_differences():
    moe, batch = a_moe(width=3, hidden=4, num_experts=4), a_batch(5, width=3, num_experts=4)
    mask_T = torch.tensor([True, True, False, True, True])

    def function(x, *parameters):
        names = [name for name, _ in moe.named_parameters()]
        y, routing = torch.func.functional_call(
            moe, dict(zip(names, parameters, strict=True)), (x, mask_T, batch.noise_TE)
        )
        return y, importance_loss(routing), load_loss(routing)

    inputs = (batch.x_TD, *(p.detach().clone().requires_grad_() for p in moe.parameters()))
    assert_derivatives(function, *inputs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", GATES)
def test_with_any_gate_the_output_is_the_dense_sum_of_eq_1_in_value_and_gradient(name, training):
    moe = MoE(gate=a_gate(name), experts=some_experts("feed_forward")).train(training)
    batch, noise = a_batch(7), noise_for(moe.gate, 7)
    y_TD, routing = moe(batch.x_TD, MASK_T, noise)
    experts = oracle.feed_forward(moe.experts.w_in, moe.experts.w_out)
    expected_TD = oracle.mixture(batch.x_TD, dense(routing), experts)
    assert_close(y_TD, expected_TD)
    of = (batch.x_TD, *moe.parameters())
    for ours, theirs in zip(
        gradients((y_TD * batch.cotangent_TD).sum(), *of),
        gradients((expected_TD * batch.cotangent_TD).sum(), *of),
        strict=True,
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 1, 3), (2, 0, 3)])
def test_any_leading_shape_is_a_list_of_tokens(leading):
    moe = a_moe()
    x = torch.randn(*leading, WIDTH, dtype=torch.float64)
    noise = torch.randn(*leading, NUM_EXPERTS, dtype=torch.float64)
    mask = torch.rand(leading) < 0.7
    y, routing = moe(x, mask, noise)
    flat_y, flat_routing = moe(x.reshape(-1, WIDTH), mask.reshape(-1), noise.reshape(-1, NUM_EXPERTS))
    assert y.shape == x.shape
    assert torch.equal(y.reshape(-1, WIDTH), flat_y)
    assert torch.equal(routing.weight_N, flat_routing.weight_N)
    assert torch.equal(routing.sums.load_E, flat_routing.sums.load_E)


def test_input_of_any_layout_is_read_alike():
    moe = a_moe()
    x = torch.randn(WIDTH, 3, 4, dtype=torch.float64).permute(2, 1, 0)
    noise = torch.randn(NUM_EXPERTS, 3, 4, dtype=torch.float64).permute(2, 1, 0)
    mask = (torch.rand(3, 4) < 0.5).T
    assert not any(t.is_contiguous() for t in (x, noise, mask))
    assert torch.equal(moe(x, mask, noise)[0], moe(x.contiguous(), mask.contiguous(), noise.contiguous())[0])


def test_padding_leaves_no_trace_even_if_it_is_nan():
    moe, batch = a_moe(), a_batch(7)
    nan = batch._replace(x_TD=batch.x_TD.detach().masked_fill(~MASK_T[:, None], torch.nan).requires_grad_())
    real = Batch(*(t[MASK_T] for t in batch))
    y_TD, _ = moe(nan.x_TD, MASK_T, nan.noise_TE)
    assert_close(y_TD[MASK_T], moe(real.x_TD, None, real.noise_TE)[0])
    assert not y_TD[~MASK_T].any()
    ours = gradients(loss_of(moe, nan, MASK_T), nan.x_TD, *moe.parameters())
    theirs = gradients(loss_of(moe, real), batch.x_TD, *moe.parameters())
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient)


def test_a_shared_expert_is_added_for_real_tokens_alone():
    moe, shared = a_moe(), nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    both = MoE(gate=moe.gate, experts=moe.experts, shared=shared)
    batch = a_batch(7)
    x_nan_TD = batch.x_TD.detach().masked_fill(~MASK_T[:, None], torch.nan)
    y_TD, _ = both(x_nan_TD, MASK_T, batch.noise_TE)
    expected_TD = moe(batch.x_TD, MASK_T, batch.noise_TE)[0] + shared(batch.x_TD)
    assert_close(y_TD[MASK_T], expected_TD[MASK_T])
    assert not y_TD[~MASK_T].any()
    for ours, theirs in zip(
        gradients((y_TD * batch.cotangent_TD).sum(), *shared.parameters()),
        gradients((expected_TD * batch.cotangent_TD)[MASK_T].sum(), *shared.parameters()),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_a_batch_of_nothing_but_padding_trains_nothing():
    moe, batch = a_moe(), a_batch(7)
    mask_T = torch.zeros(7, dtype=torch.bool)
    y_TD, routing = moe(batch.x_TD, mask_T, batch.noise_TE)
    assert not y_TD.any()
    assert routing.sums.num_tokens == 0
    loss = y_TD.sum() + importance_loss(routing) + load_loss(routing)
    assert loss == 0
    for gradient in gradients(loss, batch.x_TD, *moe.parameters()):
        assert not gradient.any()


def test_noise_is_drawn_in_training_and_only_there():
    moe, x = a_moe(), torch.randn(9, WIDTH, dtype=torch.float64)
    assert not torch.equal(moe(x)[0], moe(x)[0])
    moe.eval()
    state = torch.get_rng_state()
    assert torch.equal(moe(x)[0], moe(x)[0])
    assert torch.equal(moe(x)[0], moe(x, None, torch.randn(9, NUM_EXPERTS))[0])
    torch.set_rng_state(state)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_module_of_one_dtype_stays_in_it_and_gates_in_float32_at_least(dtype):
    moe, batch = a_moe(dtype=dtype), a_batch(16, dtype=dtype)
    y_TD, routing = moe(batch.x_TD, None, batch.noise_TE)
    assert y_TD.dtype == dtype
    assert routing.weight_N.dtype == torch.promote_types(dtype, torch.float32)
    exact = a_moe().train()
    exact.load_state_dict({name: value.double() for name, value in moe.state_dict().items()})
    exact_batch = Batch(*(t.detach().double() for t in batch))
    assert_close(y_TD, exact(exact_batch.x_TD, None, exact_batch.noise_TE)[0], scale=4)
    loss_of(moe, batch).backward()
    assert {p.grad.dtype for p in (batch.x_TD, *moe.parameters())} == {dtype}
    assert all(p.grad.isfinite().all() for p in moe.parameters())


def test_under_autocast_experts_compute_in_bfloat16_and_gates_in_float32():
    moe, batch = a_moe(dtype=torch.float32), a_batch(16, dtype=torch.float32)
    y_TD, routing = moe(batch.x_TD, None, batch.noise_TE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_TD, cast_routing = moe(batch.x_TD, None, batch.noise_TE)
    loss = (cast_TD * batch.cotangent_TD).sum()
    assert torch.equal(cast_routing.weight_N, routing.weight_N)
    assert torch.equal(cast_routing.expert_N, routing.expert_N)
    assert cast_TD.dtype == torch.float32
    assert not torch.equal(cast_TD, y_TD)
    assert_close(cast_TD, y_TD, dtype=torch.bfloat16)
    ours = gradients(loss, batch.x_TD, *moe.parameters())
    theirs = gradients((y_TD * batch.cotangent_TD).sum(), batch.x_TD, *moe.parameters())
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert our_gradient.dtype == torch.float32
        assert_close(our_gradient, their_gradient, dtype=torch.bfloat16, scale=4)


def test_the_names_in_a_checkpoint_are_the_promised_ones():
    shapes = {name: tuple(value.shape) for name, value in a_moe(hidden=7).state_dict().items()}
    assert shapes == {
        "gate.w_gate": (WIDTH, NUM_EXPERTS),
        "gate.w_noise": (WIDTH, NUM_EXPERTS),
        "experts.w_in": (NUM_EXPERTS, WIDTH, 7),
        "experts.w_out": (NUM_EXPERTS, 7, WIDTH),
    }


def test_multiply_adds_are_the_gates_and_those_of_k_experts():
    assert a_moe(width=512, hidden=1024, num_experts=4, k=2).ops_per_token() == (
        2 * 512 * 4 + 2 * 2 * 512 * 1024
    )


def replayed(moe: MoE, batch: Batch, *, preserve_rng_state: bool):
    """Gradients with the activations computed a second time in backward, the noise drawn inside."""
    torch.manual_seed(3)
    y_TD, routing = checkpoint(moe, batch.x_TD, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    loss = (y_TD * batch.cotangent_TD).sum() + importance_loss(routing) + load_loss(routing)
    moe.zero_grad()
    batch.x_TD.grad = None
    loss.backward()
    return [t.grad.clone() for t in (batch.x_TD, *moe.parameters())]


def test_activation_checkpointing_replays_the_noise():
    moe, batch = a_moe(), a_batch(20)
    torch.manual_seed(3)
    y_TD, routing = moe(batch.x_TD)
    loss = (y_TD * batch.cotangent_TD).sum() + importance_loss(routing) + load_loss(routing)
    plain = gradients(loss, batch.x_TD, *moe.parameters())
    kept = replayed(moe, batch, preserve_rng_state=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, plain, strict=True))
    lost = replayed(moe, batch, preserve_rng_state=False)
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(lost, plain, strict=True))


@pytest.mark.parametrize(
    ("mask_shape", "noise_shape", "message"),
    [
        ((3, 2), None, r"mask: its shape \[3, 2\] must be \[2, 3\], to fit x"),
        ((1,), None, r"mask: its shape \[1\] must be \[2, 3\], to fit x"),
        (None, (2, 3, 1), r"noise: its shape \[2, 3, 1\] must be \[2, 3, 6\], to fit x"),
        (None, (6, 6), r"noise: its shape \[6, 6\] must be \[2, 3, 6\], to fit x"),
    ],
)
def test_a_mask_or_noise_that_would_broadcast_is_refused(mask_shape, noise_shape, message):
    mask = None if mask_shape is None else torch.ones(mask_shape, dtype=torch.bool)
    noise = None if noise_shape is None else torch.randn(noise_shape)
    with pytest.raises(ValueError, match=f"^{message}$"):
        a_moe()(torch.randn(2, 3, WIDTH, dtype=torch.float64), mask, noise)


def test_a_gate_and_experts_of_different_number_are_refused():
    gate = NoisyTopK(width=WIDTH, num_experts=4, k=2)
    for experts in (
        FeedForward(width=WIDTH, hidden=3, num_experts=5),
        ModuleExperts([nn.Identity()] * 5),
    ):
        with pytest.raises(
            ValueError, match=r"^gate.num_experts \(4\) must equal experts.num_experts \(5\)$"
        ):
            MoE(gate=gate, experts=experts)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_check_names_the_first_token_that_is_not_finite_and_forgives_padding(value):
    moe = MoE(gate=a_moe().gate, experts=a_moe().experts, check_finite=True)
    x_TD = torch.randn(7, WIDTH, dtype=torch.float64)
    moe(x_TD)
    x_TD[3, 1] = x_TD[4, 0] = value
    with pytest.raises(ValueError, match=r"^x: 2 of 7 tokens are not finite \(first: token 3\); [^\n]*$"):
        moe(x_TD)
    with pytest.raises(ValueError, match=r"^x: 1 of 7 tokens are not finite \(first: token 3\); [^\n]*$"):
        moe(x_TD, MASK_T)
    moe(x_TD, MASK_T & (torch.arange(7) != 3))
