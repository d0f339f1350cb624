"""Gradients that can be differentiated again, of each input by itself."""

import torch

from sparsegate.moe.kernels.higher_order import gradients_through


def test_an_input_made_from_another_counts_once():
    """d ab / da is b, though b be made from a: what that adds is for b's own backward pass."""
    a = torch.randn(3, dtype=torch.float64, requires_grad=True)
    b, grad = a.square(), torch.randn(3, dtype=torch.float64)
    found = gradients_through(lambda a, b: [a * b], (a, b), (True, True), [grad])
    torch.testing.assert_close(found, (b * grad, a * grad))
    (second,) = torch.autograd.grad(found[0].sum(), a)
    torch.testing.assert_close(second, 2 * a * grad)


def test_what_needs_no_gradient_gets_none_and_what_nothing_depends_on_gives_none():
    a, b = torch.randn(2, requires_grad=True), torch.randn(2, requires_grad=True)
    found = gradients_through(lambda a, b: [a * b, a.exp(), None], (a, b), (False, True), [a, None, None])
    assert found[0] is None
    torch.testing.assert_close(found[1], a * a)
