"""Beam search against every sequence there is, and against itself in other company."""

import math
from dataclasses import replace

import pytest
import torch

from sparsegate.decoding import BeamSearch, MaxLength, TranslationSampling, beam_search, sample_translations
from sparsegate.models.gates import ExpertChoiceGate
from tests.helpers.tolerances import assert_close
from tests.helpers.translation_models import MIXTURE, MIXTURES, a_talker, a_translator
from tests.helpers.translation_oracles import TOKENS, all_translations, plain_beam_search, read

KINDS = ["mixtures", "hierarchies", "balanced", "feeding", "additive", "recurrent"]
of_each_kind = pytest.mark.parametrize("kind", KINDS)
SOURCES = [[3, 5, 4], [4], [], [5, 5, 3, 4, 3, 3], [3, 4], [4, 4, 5]]
SHORT = MaxLength(ratio=0.0, extra=4)


def searched(model, sources, search, **options):
    return beam_search(model, sources, tokens=TOKENS, search=search, **options)


def require_equal(ours, theirs):
    """Hypotheses against (score, logprob, tokens)."""
    assert [each.tokens for each in ours] == [tokens for _, _, tokens in theirs]
    assert [each.logprob for each in ours] == pytest.approx([logprob for _, logprob, _ in theirs], abs=1e-9)
    assert [each.score for each in ours] == pytest.approx([score for score, _, _ in theirs], abs=1e-9)


PENALTIES = {"none": (0.0, 0.0), "default": (0.2, 0.2), "length": (1.5, 0.0), "coverage": (0.0, 2.0)}


@pytest.mark.parametrize("penalties", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("kind", ["balanced", "feeding"])
def test_a_beam_that_is_wide_enough_finds_what_every_sequence_enumerated_finds(kind, penalties):
    model = a_talker(kind)
    search = BeamSearch(
        beam_size=200,
        length_penalty=penalties[0],
        coverage_penalty=penalties[1],
        prune=None,
        max_length=SHORT,
        num_best=1000,
    )
    for source in SOURCES[:3]:
        theirs = all_translations(model, source, search)
        assert len(theirs) == 1 + 3 + 9 + 27
        [ours] = searched(model, [source], search)
        require_equal(ours, theirs)
        [best] = searched(model, [source], replace(search, num_best=1))
        require_equal(best, theirs[:1])


@pytest.mark.parametrize("prune", [0.5, 1.5])
def test_pruning_leaves_out_what_is_far_below_the_best_and_no_more(prune):
    model = a_talker("mixtures")
    search = BeamSearch(beam_size=200, prune=prune, max_length=SHORT, num_best=1000)
    sizes = []
    for source in SOURCES[:3]:
        theirs = all_translations(model, source, search)
        [ours] = searched(model, [source], search)
        require_equal(ours, theirs)
        sizes.append(len(ours))
    assert max(sizes) < 40


@of_each_kind
@pytest.mark.parametrize("beam_size", [1, 2, 3])
def test_a_narrow_beam_is_the_search_as_it_reads_and_ending_early_changes_nothing(kind, beam_size):
    model = a_talker(kind, end_bias=-0.5)
    search = BeamSearch(beam_size=beam_size, max_length=MaxLength(ratio=1.0, extra=4), num_best=1000)
    together = searched(model, SOURCES, search)
    best = searched(model, SOURCES, replace(search, num_best=2))
    for ours, two, source in zip(together, best, SOURCES, strict=True):
        theirs = plain_beam_search(model, source, search)
        require_equal(ours, theirs)
        require_equal(two, theirs[:2])


@of_each_kind
def test_a_translation_does_not_depend_on_its_neighbours(kind):
    model = a_talker(kind)
    search = BeamSearch(beam_size=3, num_best=3)
    together = searched(model, SOURCES, search, keep_attention=True)
    for max_tokens in (1, 150):
        assert [
            [each.tokens for each in found]
            for found in searched(model, SOURCES, search, max_tokens=max_tokens)
        ] == [[each.tokens for each in found] for found in together]
    for source, found in zip(SOURCES, together, strict=True):
        [alone] = searched(model, [source], search, keep_attention=True)
        require_equal(found, [(each.score, each.logprob, each.tokens) for each in alone])
        for ours, theirs in zip(found, alone, strict=True):
            assert ours.attention.shape == (len(ours.tokens) + 1, len(source))
            assert_close(torch.from_numpy(ours.attention), torch.from_numpy(theirs.attention))


@of_each_kind
def test_what_is_computed_step_by_step_equals_the_whole_at_once(kind):
    model = a_talker(kind, end_bias=-1.0)
    search = BeamSearch(beam_size=4, num_best=4)
    for source, found in zip(SOURCES, searched(model, SOURCES, search, keep_attention=True), strict=True):
        for each in found:
            after = read(model, source, each.tokens)
            steps = zip(after.logprobs, (*each.tokens, TOKENS.end_id), strict=True)
            assert each.logprob == pytest.approx(sum(logprobs[token] for logprobs, token in steps), abs=1e-9)
            assert_close(torch.from_numpy(each.attention), after.attention, dtype=torch.float32)


@of_each_kind
def test_a_beam_of_one_without_penalties_is_greedy(kind):
    for seed in range(3):
        model = a_talker(kind, seed=seed)
        search = BeamSearch(beam_size=1, length_penalty=0.0, coverage_penalty=0.0, prune=None)
        greedy = sample_translations(model, SOURCES, tokens=TOKENS, sampling=TranslationSampling())
        for [ours], theirs in zip(searched(model, SOURCES, search), greedy, strict=True):
            assert (ours.tokens, ours.end) == (theirs.tokens, theirs.end)
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)
            assert ours.score == ours.logprob


def test_a_wider_beam_finds_a_better_score_on_the_whole():
    model = a_talker("mixtures", vocab_size=9)
    scores = [
        sum(found[0].score for found in searched(model, SOURCES, BeamSearch(beam_size=size, prune=None)))
        for size in (1, 30)
    ]
    assert scores[1] > scores[0]


@pytest.mark.parametrize(("sharpness", "least"), [(20.0, (1e-10, 1e-4)), (200.0, (0.0, 1e-11))])
def test_attention_counts_however_little_it_is_down_to_1e_10(sharpness, least):
    """Of a token that had less the logarithm would outweigh all else, and of none it is no number."""
    model = a_talker("mixtures")
    with torch.no_grad():
        model.decoder.attention.w_score.mul_(sharpness)
    search = BeamSearch(beam_size=200, coverage_penalty=0.5, prune=None, max_length=SHORT, num_best=1000)
    [ours] = searched(model, [SOURCES[0]], search)
    require_equal(ours, all_translations(model, SOURCES[0], search))
    coverage = [read(model, SOURCES[0], each.tokens).attention.sum(dim=0).min().item() for each in ours]
    assert any(least[0] <= value < least[1] for value in coverage)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_no_more_hypotheses_times_positions_are_translated_at_once_than_there_is_room_for(beam_size):
    model = a_talker("mixtures")
    sources, sizes = [[3, 4] * 10] * 5, []
    search = BeamSearch(beam_size=beam_size, max_length=SHORT)
    whole = model.decode

    def decode(target_BS, memory, **options):
        sizes.append(target_BS.shape[0] * memory.mask_BU.shape[1])
        return whole(target_BS, memory, **options)

    model.decode = decode
    searched(model, sources, search, max_tokens=2 * beam_size * 20)
    assert max(sizes) == 2 * beam_size * 20


def test_the_same_search_finds_the_same_again():
    model = a_talker("mixtures")
    search = BeamSearch(beam_size=3, num_best=3)
    assert searched(model, SOURCES, search) == searched(model, SOURCES, search)


def test_a_length_penalty_favours_long_translations_and_coverage_whole_sources():
    model = a_talker("mixtures", end_bias=1.0)

    def found(**penalties):
        search = BeamSearch(beam_size=20, prune=None, **penalties)
        return [each[0] for each in searched(model, SOURCES[:2], search, keep_attention=True)]

    short, long = found(length_penalty=0.0, coverage_penalty=0.0), found(length_penalty=3.0)
    assert sum(len(each.tokens) for each in long) > sum(len(each.tokens) for each in short)
    covered = found(length_penalty=0.0, coverage_penalty=20.0)

    def coverage(hypotheses):
        return sum(float(each.attention.sum(0).clip(max=1).sum()) for each in hypotheses)

    assert coverage(covered) > coverage(short)


def test_a_translation_has_at_most_its_length_and_says_so():
    model = a_talker("mixtures", end_bias=-50.0)
    search = BeamSearch(beam_size=2, num_best=2, max_length=MaxLength(ratio=2.0, extra=1))
    for source, found in zip(SOURCES, searched(model, SOURCES, search), strict=True):
        assert [len(each.tokens) + 1 for each in found] == [2 * len(source) + 1] * len(found)
        assert {each.end for each in found} == {"length"}
    willing = searched(a_talker("mixtures", end_bias=50.0), SOURCES, search)
    assert {(each.tokens, each.end) for found in willing for each in found if found} <= {
        ((), "stop"),
        ((), "length"),
    }


def test_what_is_never_to_be_written_is_not():
    model = a_talker("mixtures")
    with torch.no_grad():
        model.softmax.bias[:2] += 20.0
    for found in searched(model, SOURCES, BeamSearch(beam_size=3, num_best=3)):
        for each in found:
            assert not {0, TOKENS.begin_id, TOKENS.end_id} & set(each.tokens)


def test_a_very_long_source_has_a_translation():
    model = a_talker("mixtures")
    source = [3 + index % 3 for index in range(3000)]
    search = BeamSearch(beam_size=2, max_length=MaxLength(ratio=0.0, extra=5))
    [[found]] = searched(model, [source], search)
    assert math.isfinite(found.score)
    assert len(found.tokens) < 5


def test_no_sources_have_no_translations_and_nothing_is_left_behind():
    model = a_talker("mixtures")
    assert searched(model, [], BeamSearch()) == []
    [[found]] = searched(model, [[3]], BeamSearch(), keep_attention=True)
    assert model.training
    assert not torch.is_inference_mode_enabled()
    found.attention[:] += 1
    assert searched(model, [[3]], BeamSearch())[0][0].attention is None


def test_a_gate_that_chooses_over_the_batch_in_evaluation_is_refused():
    choice = replace(MIXTURE, gate=ExpertChoiceGate())
    for block in (choice, replace(MIXTURE, capacity=1.5)):
        model = a_translator(replace(MIXTURES, encoder_block=block))
        with pytest.raises(ValueError, match=r"^encoder.moe: in evaluation, too, its gate chooses over all"):
            searched(model, SOURCES, BeamSearch())


def test_a_model_whose_training_diverged_is_refused():
    model = a_talker("mixtures")
    with torch.no_grad():
        model.softmax.bias[3] = torch.nan
    with pytest.raises(ValueError, match=r"^the model's output is not finite"):
        searched(model, SOURCES, BeamSearch())


def test_scores_are_finite_at_the_greatest_penalties_and_lengths():
    greatest = BeamSearch(
        beam_size=1, length_penalty=10, coverage_penalty=100, max_length=MaxLength(ratio=1000.0)
    )
    assert math.isfinite(greatest.normalization(greatest.max_length.of(1_000_000)))
    [[found]] = searched(a_talker("mixtures", end_bias=5.0), [SOURCES[0] * 100], greatest)
    assert math.isfinite(found.score)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beam_size": 0}, r"beam_size \(0\) must be at least 1"),
        ({"num_best": 0}, r"num_best \(0\) must be at least 1"),
        ({"length_penalty": -0.1}, r"length_penalty \(-0.1\) must be from 0 to 10"),
        ({"length_penalty": 10.1}, r"length_penalty \(10.1\) must be from 0 to 10"),
        ({"coverage_penalty": float("nan")}, r"coverage_penalty \(nan\) must be from 0 to 100"),
        ({"prune": 0.0}, r"prune \(0.0\) must be above 0, or None"),
    ],
)
def test_a_search_that_is_none_is_refused(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        BeamSearch(**wrong)
