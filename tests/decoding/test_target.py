"""Target sentences on their way: which ids there may be, and what is computed in which precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsegate.decoding import (
    BeamSearch,
    TargetTokens,
    TranslationSampling,
    beam_search,
    sample_translations,
)
from sparsegate.decoding.inference import evaluation_mode
from sparsegate.decoding.target import Targets, groups
from tests.helpers.tolerances import assert_close
from tests.helpers.translation_models import a_talker
from tests.helpers.translation_oracles import TOKENS, gnmt_score, read

SOURCES = [[3, 5, 4], [4], [], [5, 5, 3, 4, 3, 3]]
DECODERS = {
    "beam": lambda model, sources, tokens, **options: [
        found[0] for found in beam_search(model, sources, tokens=tokens, search=BeamSearch(), **options)
    ],
    "greedy": lambda model, sources, tokens, **options: sample_translations(
        model, sources, tokens=tokens, sampling=TranslationSampling(), **options
    ),
}
by_each_decoder = pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"end_id": -1}, r"tokens \(-1\) must have ids of at least 0"),
        ({"begin_id": -2}, r"tokens \(-2\) must have ids of at least 0"),
        ({"never": (0, -3)}, r"tokens \(-3\) must have ids of at least 0"),
        (
            {"never": (0, 2)},
            r"tokens.never \(2\) must not have tokens.end_id in it: no translation could end",
        ),
    ],
)
def test_tokens_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(TOKENS, **wrong)


@by_each_decoder
@pytest.mark.parametrize(
    ("wrong", "token"), [({"begin_id": 6}, 6), ({"end_id": 99}, 99), ({"never": (0, 7)}, 7)]
)
def test_tokens_outside_the_vocabulary_are_no_fault_of_the_model(decode, wrong, token):
    message = rf"^tokens \({token}\) must have ids from 0 to 5, those of the model's vocabulary; is it of .*$"
    with pytest.raises(ValueError, match=message):
        decode(a_talker("mixtures"), SOURCES, replace(TOKENS, **wrong))


@by_each_decoder
@pytest.mark.parametrize("token", [-1, 6, 77])
def test_sources_outside_the_vocabulary_are_refused(decode, token):
    with pytest.raises(ValueError, match=rf"^sources \({token}\) must have ids from 0 to 5, those of .*$"):
        decode(a_talker("mixtures"), [[3], [4, token]], TOKENS)


@by_each_decoder
def test_a_target_may_begin_with_what_it_ends_with(decode):
    """As well as with another token that the model reads alike."""
    model = a_talker("mixtures", end_bias=-1.0)
    with torch.no_grad():
        model.embedding["shared"].weight[TOKENS.begin_id] = model.embedding["shared"].weight[TOKENS.end_id]
    ours = decode(model, SOURCES, TargetTokens(begin_id=2, end_id=2, never=(0, 1)))
    assert ours == decode(model, SOURCES, TargetTokens(begin_id=1, end_id=2, never=(0,)))
    assert any(each.tokens for each in ours)
    assert len(decode(model, SOURCES, TargetTokens(begin_id=2, end_id=2))) == len(SOURCES)


@pytest.mark.parametrize("max_tokens", [0, -5])
@by_each_decoder
def test_no_room_for_a_single_token_is_refused(decode, max_tokens):
    for sources in (SOURCES, []):
        with pytest.raises(ValueError, match=rf"^max_tokens \({max_tokens}\) must be at least 1$"):
            decode(a_talker("mixtures"), sources, TOKENS, max_tokens=max_tokens)


def test_a_group_holds_as_many_rows_as_there_is_room_for():
    def sizes(**options):
        return [len(group) for group in groups([[3] * 20] * 7, **options)]

    assert sizes(rows_per_source=4, max_tokens=3 * 4 * 20) == [3, 3, 1]
    assert sizes(rows_per_source=4, max_tokens=3 * 4 * 20 - 1) == [2, 2, 2, 1]
    assert sizes(rows_per_source=1, max_tokens=1) == [1] * 7


def begun(model, sources, tokens=TOKENS):
    with evaluation_mode(model), torch.inference_mode():
        return Targets.begin(model, sources, tokens=tokens, keep_attention=True)


@pytest.mark.parametrize("kind", ["mixtures", "feeding"])
def test_of_a_bfloat16_model_attention_is_added_up_and_probabilities_are_computed_in_float32(kind):
    model = a_talker(kind).bfloat16()
    targets = begun(model, SOURCES)
    is_last_R = np.zeros(len(SOURCES), dtype=bool)
    state, attention = None, torch.zeros_like(targets.coverage_RU)
    for token in (TOKENS.begin_id, 3, 4):
        assert targets.coverage_RU.dtype == targets.attention_RSU.dtype == torch.float32
        with evaluation_mode(model), torch.inference_mode():
            logprob_RV = targets.read(np.full(len(SOURCES), token), is_last_R)
            out = model.decode(torch.full((len(SOURCES), 1), token), targets.memory, state=state)
            logits_RV = model.softmax(out.hidden_BSD[:, 0])
        state, attention = out.state, attention + out.attention_BSU[:, 0].float()
        assert logits_RV.dtype == torch.bfloat16
        expected_RV = logits_RV.double().log_softmax(dim=-1)
        assert logprob_RV[:, :2].eq(-torch.inf).all()
        assert_close(logprob_RV[:, 2:], expected_RV[:, 2:], dtype=torch.float32)
        assert_close(targets.coverage_RU, attention)


@pytest.mark.parametrize("kind", ["mixtures", "recurrent"])
def test_scores_of_a_bfloat16_model_are_close_to_those_of_float32(kind):
    search = BeamSearch(beam_size=3, coverage_penalty=1.0)
    model, half = a_talker(kind).float(), a_talker(kind).bfloat16()
    for source, [best, *_] in zip(
        SOURCES, beam_search(half, SOURCES, tokens=TOKENS, search=search), strict=True
    ):
        tokens = (*best.tokens, TOKENS.end_id)
        after, after_half = (read(each, source, best.tokens) for each in (model, half))
        logprob_T, logprob_half_T = (
            [logprobs[token] for logprobs, token in zip(each.logprobs, tokens, strict=True)]
            for each in (after, after_half)
        )
        # Step by step, since in a sum the rounding of many adds up.
        assert logprob_half_T == pytest.approx(logprob_T, abs=0.06)
        logprob = sum(logprob_half_T)
        assert best.logprob == pytest.approx(logprob, abs=0.1)
        assert best.score == pytest.approx(gnmt_score(logprob, after_half.attention, search), abs=0.2)
