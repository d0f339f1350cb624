"""Grouped products in Triton: equal to the loop, and without a look at the counts."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sparsegate import BalancedGroups, Hierarchical, NoisyTopK
from sparsegate.moe.kernels.grouped import grouped_product, grouped_products
from tests.helpers.tolerances import assert_close
from tests.moe.kernels.test_grouped import ENDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_ROWS, WIDTH, WIDTHS = 7, 21, (19, 5)


def a_tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_values_and_derivatives_are_those_of_the_loop(ends, dtype):
    end_E = torch.tensor(ends, device=DEVICE)
    inputs = [a_tensor(NUM_ROWS, WIDTH, dtype=dtype)]
    inputs += [a_tensor(len(ends), WIDTH, width, dtype=dtype) for width in WIDTHS]
    cotangents = [a_tensor(NUM_ROWS, sum(WIDTHS), dtype=dtype), *(torch.randn_like(t) for t in inputs)]
    found = []
    for kernel in ("triton", "loop"):
        leaves = inputs if kernel == "triton" else [t.detach().double().requires_grad_() for t in inputs]
        first, *rest = [c.detach().to(leaves[0].dtype) for c in cotangents]
        out = grouped_products(*leaves, end_E, kernel=kernel)
        gradients = torch.autograd.grad(out, leaves, first.requires_grad_(), create_graph=True)
        again = torch.autograd.grad(gradients, [*leaves, first], rest)
        found.append([out, *gradients, *again])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype
        # Second derivatives are products of what was rounded before.
        assert_close(ours, theirs, dtype=dtype, scale=20)


def test_rows_past_the_last_end_reach_nothing_even_if_they_are_nan():
    rows, weight = a_tensor(NUM_ROWS, WIDTH, dtype=torch.float32), a_tensor(3, WIDTH, 5, dtype=torch.float32)
    unused = torch.arange(NUM_ROWS, device=DEVICE)[:, None] >= 5
    rows = rows.detach().masked_fill(unused, torch.nan).requires_grad_()
    out = grouped_product(rows, weight, torch.tensor([1, 3, 5], device=DEVICE), kernel="triton")
    cotangent = torch.ones_like(out).masked_fill(unused, torch.nan)
    grad_rows, grad_weight = torch.autograd.grad(out, (rows, weight), cotangent)
    assert not out[5:].any()
    assert not grad_rows[5:].any()
    assert grad_weight.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="gates take this kernel on CUDA devices alone")
@pytest.mark.parametrize("training", [True, False])
def test_a_hierarchy_computes_what_it_does_with_the_loop(training):
    gates = [
        Hierarchical.noisy_topk(
            width=16, num_experts=24, num_groups=4, k_primary=2, k_secondary=2, kernel=kernel, device=DEVICE
        ).train(training)
        for kernel in ("triton", "loop")
    ]
    for parameter in gates[0].parameters():
        torch.nn.init.normal_(parameter)
    gates[1].load_state_dict(gates[0].state_dict())
    x_TD = torch.randn(50, 16, device=DEVICE)
    noise = torch.randn(50, gates[0].noise_width, device=DEVICE)
    ours, theirs = (gate(x_TD, None, noise) for gate in gates)
    assert torch.equal(ours.expert_N, theirs.expert_N)
    assert_close(ours.weight_N, theirs.weight_N, scale=20)


def test_where_it_does_not_suit_it_says_what_does():
    def a_gate(**options: str) -> Hierarchical:
        secondary = BalancedGroups(width=4, num_groups=2, group_size=3, k=1, **options)
        return Hierarchical(primary=NoisyTopK(width=4, num_experts=2, k=1), secondary=secondary)

    with pytest.raises(ValueError, match=r"kernel \('fast'\) must be one of loop, triton"):
        a_gate(kernel="fast")(torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"kernel \('triton'\) is for CUDA devices, not for cpu: 'loop' can"):
        a_gate(kernel="triton")(torch.randn(5, 4))
