"""Any module as an expert."""

import pytest
import torch
from torch import nn

from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.experts.modules import ModuleExperts
from sparsegate.moe.gating.noisy_topk import NoisyTopK
from sparsegate.moe.layer import MoE
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, a_moe, gradients
from tests.helpers.tolerances import assert_close


def linear(weight):
    """A linear layer x @ weight, without a bias."""
    layer = nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
    layer.load_state_dict({"weight": weight.T})
    return layer


def test_modules_with_the_weights_of_stacked_experts_compute_the_same():
    moe = a_moe()
    experts = ModuleExperts(
        [
            nn.Sequential(linear(w_in), nn.ReLU(), linear(w_out))
            for w_in, w_out in zip(moe.experts.w_in, moe.experts.w_out, strict=True)
        ]
    )
    foreign = MoE(gate=moe.gate, experts=experts)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 4, NUM_EXPERTS, dtype=torch.float64)
    cotangent = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    ours, theirs = foreign(x, None, noise)[0], moe(x, None, noise)[0]
    assert_close(ours, theirs)

    our_x, our_gate, *our_weights = gradients(
        (ours * cotangent).sum(), x, foreign.gate.w_gate, *experts.parameters()
    )
    their_x, their_gate, their_in, their_out = gradients(
        (theirs * cotangent).sum(), x, moe.gate.w_gate, moe.experts.w_in, moe.experts.w_out
    )
    assert_close(our_x, their_x)
    assert_close(our_gate, their_gate)
    assert_close(torch.stack(our_weights[0::2]).mT, their_in)
    assert_close(torch.stack(our_weights[1::2]).mT, their_out)
    assert experts.ops_per_pair() == moe.experts.ops_per_pair()


def test_experts_of_different_kinds_live_together():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            return self.factor * x

    kinds = [
        nn.Identity(),
        Scale(),
        nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, WIDTH)),
    ]
    gate = NoisyTopK(width=WIDTH, num_experts=3, k=3)
    y, routing = MoE(gate=gate, experts=ModuleExperts(kinds)).eval()(x := torch.randn(5, WIDTH))
    assert_close(routing.weight_N, torch.full((15,), 1 / 3))
    assert_close(y, sum(kind(x) for kind in kinds) / 3)


def test_no_modules_are_refused():
    with pytest.raises(ValueError, match="experts: an empty list"):
        ModuleExperts([])


@pytest.mark.parametrize("sizes", [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_stacked_experts_of_no_size_are_refused(sizes):
    width, hidden, num_experts = sizes
    with pytest.raises(ValueError, match=r"must be >= 1$"):
        FeedForward(width=width, hidden=hidden, num_experts=num_experts)


def test_stacked_experts_keep_the_size_of_activations_at_the_start():
    experts = FeedForward(width=64, hidden=256, num_experts=4)
    x = torch.randn(500, 64)
    for w_in, w_out in zip(experts.w_in, experts.w_out, strict=True):
        assert abs(float(((x @ w_in).relu() @ w_out).detach().std()) - 1) < 0.1
