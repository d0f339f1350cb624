"""The output layer: a distribution, and its negative logarithm in nats."""

import pytest
import torch

from sparsegate.models.softmax import FullSoftmax
from tests.helpers.moe_cases import gradients
from tests.helpers.tolerances import TOLERANCES, assert_close


def a_softmax(dtype=torch.float64) -> FullSoftmax:
    softmax = FullSoftmax(vocab_size=7, width=4, dtype=dtype)
    torch.nn.init.normal_(softmax.bias)
    return softmax


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,), (2, 0)])
def test_nll_is_the_log_softmax_at_the_target(leading):
    softmax = a_softmax()
    hidden = torch.randn(*leading, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(7, leading)
    logits = hidden @ softmax.weight.T + softmax.bias
    assert_close(softmax(hidden), logits)
    expected = logits.exp().sum(dim=-1).log() - logits.gather(-1, target[..., None])[..., 0]
    nll = softmax.nll(hidden, target)
    assert nll.shape == leading
    assert_close(nll, expected)
    of = (hidden, softmax.weight, softmax.bias)
    for ours, theirs in zip(gradients(nll.sum(), *of), gradients(expected.sum(), *of), strict=True):
        assert_close(ours, theirs)


def test_the_probabilities_of_all_targets_sum_to_one():
    softmax, hidden = a_softmax(), torch.randn(5, 4, dtype=torch.float64)
    total = sum(torch.exp(-softmax.nll(hidden, torch.full((5,), v))) for v in range(7))
    assert_close(total, torch.ones(5))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_nll_is_in_float32_at_least(dtype):
    softmax, hidden, target = a_softmax(dtype), torch.randn(5, 4, dtype=dtype), torch.randint(7, (5,))
    nll = softmax.nll(hidden, target)
    assert nll.dtype == torch.promote_types(dtype, torch.float32)
    exact = softmax(hidden).double().log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
    assert_close(nll, -exact, dtype=nll.dtype)


def test_huge_logits_have_a_finite_nll():
    softmax, hidden = a_softmax(), 1e6 * torch.randn(5, 4, dtype=torch.float64)
    assert softmax.nll(hidden, torch.randint(7, (5,))).isfinite().all()


def test_a_fresh_model_knows_nothing():
    """At the start the distribution is nearly uniform for hidden layers of size about one."""
    softmax = FullSoftmax(vocab_size=1000, width=64)
    nll = softmax.nll(torch.randn(200, 64), torch.randint(1000, (200,))).mean()
    assert abs(float(nll.detach()) - (torch.log(torch.tensor(1000.0)) + 0.5)) < 0.2
