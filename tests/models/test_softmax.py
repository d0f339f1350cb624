"""The output layer: a distribution, and its negative logarithm in nats."""

import math

import pytest
import torch

from sparsegate.models.softmax import AdaptiveSoftmax, OutputSoftmax, draw_log_uniform, log_chance
from tests.helpers.moe_cases import gradients
from tests.helpers.tolerances import TOLERANCES, assert_close


def a_softmax(dtype=torch.float64) -> OutputSoftmax:
    softmax = OutputSoftmax(vocab_size=7, width=4, dtype=dtype)
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
    softmax = OutputSoftmax(vocab_size=1000, width=64)
    nll = softmax.nll(torch.randn(200, 64), torch.randint(1000, (200,))).mean()
    assert abs(float(nll.detach()) - (torch.log(torch.tensor(1000.0)) + 0.5)) < 0.2


VOCAB, SAMPLES = 50, 20


def probability(word: int) -> float:
    """Log-uniform over the vocabulary."""
    return math.log((word + 2) / (word + 1)) / math.log(VOCAB + 1)


def a_sampled_softmax(num_samples: int = SAMPLES) -> OutputSoftmax:
    softmax = OutputSoftmax(vocab_size=VOCAB, width=4, num_samples=num_samples, dtype=torch.float64)
    torch.nn.init.normal_(softmax.bias)
    return softmax


@pytest.mark.parametrize("words_at_once", [2, 256])
def test_the_sampled_loss_is_its_formula_in_value_and_gradient(words_at_once, monkeypatch):
    """Corrected logits; of a word that is drawn twice one counts; a candidate that is the target, none.

    Also with two candidates at once, which may both have been drawn before.
    """
    monkeypatch.setattr("sparsegate.models.cross_entropy._BLOCK_LOGITS", 0)
    monkeypatch.setattr("sparsegate.models.cross_entropy._LEAST_WORDS", words_at_once)
    softmax = a_sampled_softmax()
    hidden_TD = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target_T = torch.tensor([0, 3, 7, 7, 49, 20])
    sample_S = torch.tensor([0, 0, 0, 0, 1, 2, 3, 3, 3, 7, 11, 20, 20, 30])
    losses = []
    for hidden_D, target in zip(hidden_TD, target_T.tolist(), strict=True):

        def corrected(word, hidden_D=hidden_D):
            chance = 1 - (1 - probability(word)) ** len(sample_S)
            return hidden_D @ softmax.weight[word] + softmax.bias[word] - math.log(chance)

        others = [corrected(word) for word in set(sample_S.tolist()) - {target}]
        total = sum(torch.exp(logit) for logit in [corrected(target), *others])
        losses.append(total.log() - corrected(target))
    ours, theirs = softmax.sampled_nll(hidden_TD, target_T, sample_S), torch.stack(losses)
    assert_close(ours, theirs)
    of = (hidden_TD, softmax.weight, softmax.bias)
    for our_gradient, their_gradient in zip(
        gradients(ours.sum(), *of), gradients(theirs.sum(), *of), strict=True
    ):
        assert_close(our_gradient, their_gradient)


def test_candidates_are_log_uniform_and_as_often_present_as_stated():
    draws = torch.stack([draw_log_uniform(SAMPLES, VOCAB, device=torch.device("cpu")) for _ in range(4000)])
    assert (draws[:, 1:] >= draws[:, :-1]).all()
    assert 0 <= int(draws.min()) <= int(draws.max()) == VOCAB - 1
    chance_V = log_chance(torch.arange(VOCAB), num_samples=SAMPLES, vocab_size=VOCAB).exp()
    for word in range(VOCAB):
        p, chance = probability(word), float(chance_V[word])
        share = float((draws == word).double().mean())
        present = float((draws == word).any(dim=1).double().mean())
        assert abs(share - p) < 5 * (p * (1 - p) / draws.numel()) ** 0.5
        assert abs(present - chance) < 5 * (chance * (1 - chance) / len(draws)) ** 0.5 + 1e-3


def test_with_very_many_samples_it_is_the_full_softmax():
    softmax = a_sampled_softmax(20_000)
    hidden_TD, target_T = torch.randn(6, 4, dtype=torch.float64), torch.randint(VOCAB, (6,))
    assert_close(softmax.nll(hidden_TD, target_T), softmax.eval().nll(hidden_TD, target_T), scale=1e3)


def test_evaluation_is_exact_and_training_draws_anew():
    softmax = a_sampled_softmax()
    full = OutputSoftmax(vocab_size=VOCAB, width=4, dtype=torch.float64)
    full.load_state_dict(softmax.state_dict())
    hidden, target = torch.randn(2, 3, 4, dtype=torch.float64), torch.randint(VOCAB, (2, 3))
    first, second = softmax.nll(hidden, target), softmax.nll(hidden, target)
    assert first.shape == (2, 3)
    assert not torch.equal(first, second)
    assert torch.equal(softmax.eval().nll(hidden, target), full.nll(hidden, target))


def test_only_targets_and_candidates_have_gradients():
    softmax = a_sampled_softmax()
    sample_S = torch.tensor([0, 1, 4])
    loss = softmax.sampled_nll(torch.randn(2, 4, dtype=torch.float64), torch.tensor([9, 30]), sample_S).sum()
    (gradient,) = gradients(loss, softmax.weight)
    assert gradient.any(dim=1).nonzero()[:, 0].tolist() == [0, 1, 4, 9, 30]


def test_with_samples_words_begin_as_frequent_as_they_are_drawn_without_equal():
    sampled = OutputSoftmax(vocab_size=VOCAB, width=4, num_samples=SAMPLES, dtype=torch.float64)
    full = OutputSoftmax(vocab_size=VOCAB, width=4, dtype=torch.float64)
    log_p_V = torch.tensor([math.log(probability(word)) for word in range(VOCAB)], dtype=torch.float64)
    hidden_VD, target_V = torch.zeros(VOCAB, 4, dtype=torch.float64), torch.arange(VOCAB)
    assert_close(-sampled.eval().nll(hidden_VD, target_V), log_p_V)
    assert_close(full.nll(hidden_VD, target_V), torch.full_like(log_p_V, math.log(VOCAB)))


def test_biases_begin_the_same_on_the_way_over_meta_and_in_bfloat16():
    expected_V = OutputSoftmax(vocab_size=VOCAB, width=4, num_samples=SAMPLES).bias
    late = OutputSoftmax(vocab_size=VOCAB, width=4, num_samples=SAMPLES, device="meta").to_empty(device="cpu")
    late.reset_parameters()
    assert torch.equal(late.bias, expected_V)
    narrow = OutputSoftmax(vocab_size=VOCAB, width=4, num_samples=SAMPLES, dtype=torch.bfloat16)
    assert torch.equal(narrow.bias, expected_V.bfloat16())


def test_a_negative_number_of_samples_is_refused():
    with pytest.raises(ValueError, match=r"num_samples \(-1\) must be at least 1, or 0 for all words"):
        OutputSoftmax(vocab_size=3, width=2, num_samples=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sparse_gradient_is_the_dense_one_in_the_rows_of_targets_and_candidates(dtype):
    softmax = OutputSoftmax(vocab_size=50, width=4, num_samples=6, dtype=dtype)
    hidden_TD, target_T = torch.randn(5, 4, dtype=dtype), torch.tensor([3, 40, 3, 7, 0])
    sample_S = torch.tensor([0, 1, 1, 7, 20, 49])
    found = []
    for softmax.sparse in (False, True):
        softmax.zero_grad()
        leaf_TD = hidden_TD.clone().requires_grad_()
        softmax.sampled_nll(leaf_TD, target_T, sample_S).sum().backward()
        found.append((softmax.weight.grad, softmax.bias.grad, leaf_TD.grad))
    (dense, *others), (sparse, *sparse_others) = found
    assert sparse.is_sparse
    assert set(sparse.coalesce().indices()[0].tolist()) == {*target_T.tolist(), *sample_S.tolist()}
    assert_close(sparse.to_dense(), dense)
    for other, sparse_other in zip(others, sparse_others, strict=True):
        assert torch.equal(other, sparse_other)


CUTOFFS = (8, 20)


def an_adaptive_softmax(dtype=torch.float64) -> AdaptiveSoftmax:
    return AdaptiveSoftmax(vocab_size=VOCAB, width=16, cutoffs=CUTOFFS, dtype=dtype)


TARGETS = {
    "of all clusters": [0, 7, 8, 19, 20, 49],
    "without a cluster": [0, 7, 8, 8, 3, 19],
    "frequent": [0, 1],
    "none": [],
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("max_logits", [1 << 24, 0])
def test_an_adaptive_softmax_is_the_librarys_in_value_and_gradient(targets, max_logits, monkeypatch):
    monkeypatch.setattr("sparsegate.models.cross_entropy.MAX_LOGITS", max_logits)
    softmax, target_T = an_adaptive_softmax(), torch.tensor(targets, dtype=torch.int64)
    hidden_TD = torch.randn(len(targets), 16, dtype=torch.float64, requires_grad=True)
    nll_T = softmax.nll(hidden_TD, target_T)
    expected_T = -softmax.clusters(hidden_TD, target_T).output
    assert_close(nll_T, expected_T)
    of = (hidden_TD, *softmax.parameters())
    for ours, theirs in zip(gradients(nll_T.sum(), *of), gradients(expected_T.sum(), *of), strict=True):
        assert_close(ours, theirs)
    nll_T.sum().backward()
    assert all(parameter.grad is not None for parameter in softmax.parameters())


def test_its_logits_are_log_probabilities_of_all_words():
    softmax, hidden = an_adaptive_softmax(), torch.randn(2, 3, 16, dtype=torch.float64)
    logits = softmax(hidden)
    assert logits.shape == (2, 3, VOCAB)
    assert_close(logits.exp().sum(dim=-1), torch.ones(2, 3))
    target = torch.randint(VOCAB, (2, 3))
    assert_close(-softmax.nll(hidden, target), logits.gather(-1, target[..., None])[..., 0])


def test_it_computes_under_autocast_and_from_the_meta_device():
    softmax = an_adaptive_softmax(torch.float32)
    hidden_TD, target_T = torch.randn(9, 16, requires_grad=True), torch.randint(VOCAB, (9,))
    exact_T = softmax.nll(hidden_TD, target_T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll_T = softmax.nll(hidden_TD, target_T)
    assert nll_T.dtype == torch.float32
    assert_close(nll_T, exact_T, dtype=torch.bfloat16)
    described = AdaptiveSoftmax(vocab_size=VOCAB, width=16, cutoffs=CUTOFFS, device="meta")
    assert described.device.type == "meta"
    assert [p.shape for p in described.parameters()] == [p.shape for p in softmax.parameters()]


def test_its_operations_are_those_of_the_tokens_that_go_through_each_cluster():
    """Counted word by word, for words as frequent as candidates are."""
    softmax, expected = an_adaptive_softmax(), 16.0 * (8 + 2)
    for word in range(VOCAB):
        if word >= 8:
            width, num_words = (4, 12) if word < 20 else (1, 30)
            expected += probability(word) * (16 * width + width * num_words)
    assert softmax.trained_ops_per_token() == round(expected)
    assert softmax.ops_per_token() == sum(p.numel() for p in softmax.parameters())


@pytest.mark.parametrize(
    ("cutoffs", "message"),
    [
        ((), r"cutoffs \(\) must ascend"),
        ((0, 20), r"cutoffs \(0, 20\) must ascend, from at least 1 to at most 49, the last word"),
        ((20, 20), r"cutoffs \(20, 20\) must ascend"),
        ((20, 50), r"cutoffs \(20, 50\) must ascend"),
        ((10, 20, 30), r"cutoffs \(10, 20, 30\) leave the last cluster no width"),
    ],
)
def test_cutoffs_that_cannot_be_are_refused(cutoffs, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSoftmax(vocab_size=VOCAB, width=16, cutoffs=cutoffs)
