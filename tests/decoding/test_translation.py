"""Greedy and drawn translations."""

import numpy as np
import pytest
import torch

from sparsegate.decoding import MaxLength, TranslationSampling, sample_translations
from tests.helpers.tolerances import assert_close
from tests.helpers.translation_models import a_talker
from tests.helpers.translation_oracles import TOKENS, plain_greedy, read

SOURCES = [[3, 5, 4], [4], [], [5, 5, 3, 4, 3, 3], [3, 4]]
of_each_kind = pytest.mark.parametrize("kind", ["mixtures", "balanced", "feeding", "additive"])


def sampled(model, sources, *, max_tokens=4096, keep_attention=False, **options):
    return sample_translations(
        model,
        sources,
        tokens=TOKENS,
        sampling=TranslationSampling(**options),
        max_tokens=max_tokens,
        keep_attention=keep_attention,
    )


@of_each_kind
def test_greedy_is_an_argmax_loop(kind):
    for seed in range(2):
        model = a_talker(kind, seed=seed, end_bias=-0.5)
        length = MaxLength(ratio=1.0, extra=4)
        for source, found in zip(SOURCES, sampled(model, SOURCES, max_length=length), strict=True):
            assert found.tokens == plain_greedy(model, source, length.of(len(source)))


@of_each_kind
def test_a_log_probability_is_that_of_the_tokens_and_the_end(kind):
    model = a_talker(kind)
    for temperature in (0.0, 1.0):
        found = sampled(model, SOURCES, temperature=temperature, keep_attention=True)
        for source, each in zip(SOURCES, found, strict=True):
            after = read(model, source, each.tokens)
            steps = zip(after.logprobs, (*each.tokens, TOKENS.end_id), strict=True)
            assert each.logprob == pytest.approx(sum(logprobs[token] for logprobs, token in steps), abs=1e-9)
            assert each.score == each.logprob
            assert_close(torch.from_numpy(each.attention), after.attention, dtype=torch.float32)


def test_a_drawn_translation_does_not_depend_on_the_other_sources():
    model = a_talker("mixtures", end_bias=-1.0)
    options = {"temperature": 1.0, "seed": 5}
    together = sampled(model, SOURCES, **options)
    assert [each.tokens for each in sampled(model, SOURCES, max_tokens=1, **options)] == [
        each.tokens for each in together
    ]
    for number, source in enumerate(SOURCES):
        company = [source if index == number else [3] * index for index in range(number + 3)]
        assert sampled(model, company, **options)[number].tokens == together[number].tokens


def test_equal_sources_are_drawn_differently_and_the_same_seed_repeats_them():
    model = a_talker("mixtures", end_bias=-2.0)
    first = sampled(model, [[3, 4]] * 6, temperature=1.0, seed=1)
    assert len({each.tokens for each in first}) > 3
    assert sampled(model, [[3, 4]] * 6, temperature=1.0, seed=1) == first
    assert sampled(model, [[3, 4]] * 6, temperature=1.0, seed=2) != first


def test_first_tokens_are_as_frequent_as_the_model_says_they_are_probable():
    model = a_talker("mixtures")
    found = sampled(model, [[3, 5]] * 3000, temperature=1.0, max_length=MaxLength(ratio=0.0, extra=2))
    counts = np.bincount([[*each.tokens, TOKENS.end_id][0] for each in found], minlength=6)
    probability = np.exp(read(model, [3, 5], ()).logprobs[0])
    probability[[0, TOKENS.begin_id]] = 0.0
    expected = 3000 * probability[2:] / probability.sum()
    assert counts[:2].tolist() == [0, 0]
    # The 99.9 % point of the chi-square distribution with 3 degrees of freedom.
    assert float(((counts[2:] - expected) ** 2 / expected).sum()) < 16.3


def test_top_k_of_one_is_greedy_at_any_temperature():
    model = a_talker("mixtures")
    assert sampled(model, SOURCES, temperature=2.0, top_k=1) == sampled(model, SOURCES)


def test_a_translation_has_at_most_its_length_and_says_so():
    length = MaxLength(ratio=2.0, extra=1)
    model = a_talker("mixtures", end_bias=-50.0)
    for source, each in zip(SOURCES, sampled(model, SOURCES, max_length=length), strict=True):
        assert len(each.tokens) + 1 == length.of(len(source))
        assert each.end == "length"
    ended = sampled(a_talker("mixtures", end_bias=50.0), SOURCES)
    assert {(each.tokens, each.end) for each in ended} == {((), "stop")}


def test_a_model_whose_training_diverged_is_refused():
    model = a_talker("mixtures")
    with torch.no_grad():
        model.softmax.bias[3] = torch.nan
    with pytest.raises(ValueError, match=r"^the model's output is not finite"):
        sampled(model, SOURCES)


def test_no_sources_have_no_translations():
    assert sampled(a_talker("mixtures"), []) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TranslationSampling(temperature=-1.0), r"temperature \(-1.0\) must be from 0 to 1000"),
        (lambda: TranslationSampling(top_k=0), r"top_k \(0\) must be at least 1"),
        (lambda: MaxLength(ratio=-1.0), r"max_length.ratio \(-1.0\) must be from 0 to 1000"),
        *[
            (
                lambda extra=extra: MaxLength(extra=extra),
                rf"max_length.extra \({extra}\) must be a whole number, at least 1",
            )
            for extra in (0, 4.5, float("inf"), float("nan"))
        ],
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()
