"""Cross entropy over words, some of them at a time, is the plain one in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from sparsegate.models import cross_entropy
from sparsegate.models.cross_entropy import linear_cross_entropy, target_and_logsumexp
from tests.helpers.moe_cases import gradients
from tests.helpers.tolerances import TOLERANCES, assert_close

T, D, V = 6, 5, 23


def a_case(*, dtype=torch.float64, bias=True, num_tokens=T):
    hidden_TD = torch.randn(num_tokens, D, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(V, D, dtype=dtype, requires_grad=True)
    bias_V = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    return hidden_TD, weight_VD, bias_V, torch.randint(V, (num_tokens,))


def in_pieces(monkeypatch, *, max_logits=0, least_words=4):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", max_logits)
    monkeypatch.setattr(cross_entropy, "_BLOCK_LOGITS", 0)
    monkeypatch.setattr(cross_entropy, "_LEAST_WORDS", least_words)


@pytest.mark.parametrize("words", [1, 4, V - 1, V, V + 5])
@pytest.mark.parametrize("bias", [True, False])
def test_pieces_have_the_plain_value_and_gradient(words, bias, monkeypatch):
    hidden_TD, weight_VD, bias_V, target_T = a_case(bias=bias)
    of = (hidden_TD, weight_VD, *([bias_V] if bias else []))
    logits_TV = hidden_TD @ weight_VD.T + (bias_V if bias else 0)
    plain_T = logits_TV.exp().sum(dim=1).log() - logits_TV[torch.arange(T), target_T]
    in_pieces(monkeypatch, least_words=words)
    nll_T = linear_cross_entropy(hidden_TD, weight_VD, bias_V, target_T)
    assert_close(nll_T, plain_T)
    # Of a sum that weighs each token: what comes back from above differs from token to token.
    share_T = torch.randn(T, dtype=torch.float64)
    for ours, theirs in zip(
        gradients((nll_T * share_T).sum(), *of), gradients((plain_T * share_T).sum(), *of), strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("words", [3, V])
def test_its_gradients_are_its_derivatives(words):
    hidden_TD, weight_VD, bias_V, target_T = a_case()
    target_T[1], target_T[2] = -1, V
    assert torch.autograd.gradcheck(
        lambda *of: target_and_logsumexp(*of, target_T, words_at_once=words), (hidden_TD, weight_VD, bias_V)
    )


def test_words_may_be_spread_over_several_calls():
    """As ranks would have them: each call knows its own rows, and targets counted from its first."""
    hidden_TD, weight_VD, bias_V, target_T = a_case()
    first, second = (
        target_and_logsumexp(hidden_TD, weight_VD[w], bias_V[w], target_T - w.start)
        for w in (slice(0, 9), slice(9, V))
    )
    spread_T = torch.logaddexp(first[1], second[1]) - first[0] - second[0]
    plain_T = F.cross_entropy(F.linear(hidden_TD, weight_VD, bias_V), target_T, reduction="none")
    assert_close(spread_T, plain_T)
    of = (hidden_TD, weight_VD, bias_V)
    for ours, theirs in zip(gradients(spread_T.sum(), *of), gradients(plain_T.sum(), *of), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_dtype_has_sums_in_float32_at_least(dtype, monkeypatch):
    hidden_TD, weight_VD, bias_V, target_T = a_case(dtype=dtype)
    of = (hidden_TD, weight_VD, bias_V)
    exact_T = F.cross_entropy(
        F.linear(hidden_TD.double(), weight_VD.double(), bias_V.double()), target_T, reduction="none"
    )
    in_pieces(monkeypatch)
    nll_T = linear_cross_entropy(*of, target_T)
    assert nll_T.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(nll_T, exact_T, dtype=dtype)
    for ours, theirs in zip(gradients(nll_T.sum(), *of), gradients(exact_T.sum(), *of), strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, dtype=dtype)


def test_products_are_in_what_autocast_says_and_weights_keep_float32_gradients(monkeypatch):
    hidden_TD, weight_VD, bias_V, target_T = a_case(dtype=torch.float32)
    of = (hidden_TD, weight_VD, bias_V)
    in_pieces(monkeypatch)
    exact_T = linear_cross_entropy(*of, target_T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll_T = linear_cross_entropy(*of, target_T)
    assert nll_T.dtype == torch.float32
    assert not torch.equal(nll_T, exact_T)
    assert_close(nll_T, exact_T, dtype=torch.bfloat16)
    for ours, exact in zip(gradients(nll_T.sum(), *of), gradients(exact_T.sum(), *of), strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, exact, dtype=torch.bfloat16)


def test_few_logits_are_computed_as_ever_to_the_bit_and_many_never_exist_at_once(monkeypatch):
    of = a_case(dtype=torch.float32)
    usual_T = F.cross_entropy(F.linear(*of[:3]), of[3], reduction="none")
    for max_logits, is_plain in ((T * V, True), (T * V - 1, False)):
        in_pieces(monkeypatch, max_logits=max_logits)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, to=shapes: to.append(tuple(t.shape)) or t, lambda t: t
        ):
            nll_T = linear_cross_entropy(*of)
        assert ((T, V) in shapes) == is_plain
        if is_plain:
            assert torch.equal(nll_T, usual_T)


def test_what_is_frozen_has_no_gradient_and_no_token_has_one_of_zeros(monkeypatch):
    in_pieces(monkeypatch)
    hidden_TD, weight_VD, bias_V, target_T = a_case(num_tokens=0)
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", -1)
    nll_T = linear_cross_entropy(hidden_TD, weight_VD, bias_V, target_T)
    assert not any(g.any() for g in gradients(nll_T.sum(), hidden_TD, weight_VD, bias_V))
    hidden_TD, weight_VD, bias_V, target_T = a_case()
    linear_cross_entropy(hidden_TD, weight_VD.detach(), bias_V, target_T).sum().backward()
    assert weight_VD.grad is None
    assert hidden_TD.grad.any()
    assert bias_V.grad.any()


@pytest.mark.parametrize("planted", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(planted, monkeypatch):
    in_pieces(monkeypatch)
    hidden_TD, weight_VD, bias_V, target_T = a_case()
    with torch.no_grad():
        bias_V[V // 2] = planted
    assert not linear_cross_entropy(hidden_TD, weight_VD, bias_V, target_T).isfinite().any()
