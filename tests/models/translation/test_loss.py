"""The loss of target tokens: sums over the real ones, whatever the pieces are."""

import pytest
import torch

from sparsegate.models.softmax import OutputSoftmax
from sparsegate.models.translation import loss as loss_module
from sparsegate.models.translation import token_losses
from tests.helpers.moe_cases import gradients
from tests.helpers.tolerances import assert_close

V, D = 7, 4
MASK_BS = torch.arange(5) < torch.tensor([[5], [2], [0], [3]])


def a_case(num_samples=0):
    softmax = OutputSoftmax(vocab_size=V, width=D, num_samples=num_samples, dtype=torch.float64)
    torch.nn.init.normal_(softmax.bias)
    hidden_BSD = torch.randn(4, 5, D, dtype=torch.float64, requires_grad=True)
    return softmax, hidden_BSD, torch.randint(V, (4, 5))


def by_token(softmax, hidden_BSD, label_BS, smoothing):
    """nll and smoothed loss as they read, one token at a time."""
    nll, loss = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
    for b, s in MASK_BS.nonzero().tolist():
        logits_V = softmax.weight @ hidden_BSD[b, s] + softmax.bias
        logprob_V = logits_V - logits_V.exp().sum().log()
        target_V = torch.full((V,), smoothing / V, dtype=torch.float64)
        target_V[label_BS[b, s]] += 1 - smoothing
        nll[b, s] = -logprob_V[label_BS[b, s]]
        loss[b, s] = -(target_V * logprob_V).sum()
    return nll, loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("max_logits", [1 << 24, 3 * V, 1], ids=["whole", "pieces", "tokens"])
def test_the_losses_are_their_formulas_in_value_and_gradient(smoothing, max_logits, monkeypatch):
    monkeypatch.setattr(loss_module, "_MAX_LOGITS", max_logits)
    softmax, hidden_BSD, label_BS = a_case()
    ours = token_losses(softmax, hidden_BSD, label_BS, MASK_BS, label_smoothing=smoothing)
    nll_BS, loss_BS = by_token(softmax, hidden_BSD, label_BS, smoothing)
    assert_close(ours.nll_BS, nll_BS)
    assert_close(ours.loss_BS, loss_BS)
    of = (hidden_BSD, softmax.weight, softmax.bias)
    # A piece that is computed again is computed once.
    for our_gradient, their_gradient in zip(
        torch.autograd.grad(ours.loss_BS.sum(), of), gradients(loss_BS.sum(), *of), strict=True
    ):
        assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("max_logits", [3 * 4, 1], ids=["pieces", "tokens"])
def test_all_pieces_have_the_same_candidates_in_loss_and_gradient(max_logits, monkeypatch):
    softmax, hidden_BSD, label_BS = a_case(num_samples=4)
    of = (hidden_BSD, softmax.weight, softmax.bias)
    torch.manual_seed(3)
    whole = softmax.nll(hidden_BSD[MASK_BS], label_BS[MASK_BS])
    monkeypatch.setattr(loss_module, "_MAX_LOGITS", max_logits)
    torch.manual_seed(3)
    ours = token_losses(softmax, hidden_BSD, label_BS, MASK_BS).loss_BS
    assert_close(ours[MASK_BS], whole)
    for our_gradient, their_gradient in zip(
        torch.autograd.grad(ours.sum(), of), gradients(whole.sum(), *of), strict=True
    ):
        assert_close(our_gradient, their_gradient)


def test_logits_of_one_piece_exist_at_once(monkeypatch):
    """Several pieces save no logits for the gradient; one piece does."""
    softmax, hidden_BSD, label_BS = a_case()
    for max_logits, is_saved in ((1 << 24, True), (3 * V, False)):
        monkeypatch.setattr(loss_module, "_MAX_LOGITS", max_logits)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, to=shapes: to.append(t.shape) or t, lambda t: t
        ):
            token_losses(softmax, hidden_BSD, label_BS, MASK_BS)
        assert any(shape[-1:] == (V,) and len(shape) == 2 for shape in shapes) == is_saved


def test_padding_costs_nothing_and_is_not_computed():
    softmax, hidden_BSD, label_BS = a_case()
    with torch.no_grad():
        hidden_BSD[~MASK_BS] = torch.nan
    losses = token_losses(softmax, hidden_BSD, label_BS, MASK_BS)
    assert not losses.nll_BS[~MASK_BS].any()
    assert losses.loss_BS.isfinite().all()
    for gradient in gradients(losses.loss_BS.sum(), hidden_BSD, *softmax.parameters()):
        assert gradient.isfinite().all()


def test_a_batch_without_a_token_costs_nothing():
    softmax, hidden_BSD, label_BS = a_case()
    losses = token_losses(softmax, hidden_BSD, label_BS, torch.zeros_like(MASK_BS), label_smoothing=0.1)
    assert losses.nll_BS.shape == (4, 5)
    assert not losses.loss_BS.any()


def test_losses_of_low_precision_are_in_float32():
    softmax = OutputSoftmax(vocab_size=V, width=D, dtype=torch.bfloat16)
    losses = token_losses(
        softmax, torch.randn(4, 5, D).bfloat16(), torch.randint(V, (4, 5)), MASK_BS, label_smoothing=0.1
    )
    assert losses.nll_BS.dtype == losses.loss_BS.dtype == torch.float32


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(smoothing):
    softmax, hidden_BSD, label_BS = a_case()
    with pytest.raises(
        ValueError, match=rf"^label_smoothing \({smoothing}\) must be at least 0 and below 1$"
    ):
        token_losses(softmax, hidden_BSD, label_BS, MASK_BS, label_smoothing=smoothing)


def test_smoothing_and_a_sampled_softmax_exclude_each_other_in_training():
    softmax, hidden_BSD, label_BS = a_case(num_samples=3)
    with pytest.raises(ValueError, match=r"label_smoothing \(0.1\) needs the probabilities of all words"):
        token_losses(softmax, hidden_BSD, label_BS, MASK_BS, label_smoothing=0.1)
    softmax.eval()
    token_losses(softmax, hidden_BSD, label_BS, MASK_BS, label_smoothing=0.1)
