import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sparsegate.data import WordVocabulary
from sparsegate.data.normalization import TOKENIZED
from sparsegate.decoding.scoring import score
from sparsegate.evaluation.perplexity import Evaluation, evaluate
from tests.helpers.language_models import tiny_mixture, tiny_recurrent, token_by_token

VOCABULARY = WordVocabulary(
    words=["</s>", "<unk>", "a", "b", "c"], counts=[1, 1, 1, 1, 1], normalization=TOKENIZED
)
LINES = ["a b c a", "x", "b b b a c c a b", "", "c a x", "a"]
END = VOCABULARY.end_id


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """A text that is its own dataset."""

    lines: list[str]
    end_id = END

    @property
    def token_N(self):
        return VOCABULARY.encode_lines(self.lines).astype(np.uint16)

    @property
    def sentence_end_N(self):
        return (np.flatnonzero(self.token_N == END) + 1).astype(np.uint64)

    @property
    def num_words(self):
        return sum(len(line.split()) for line in self.lines)

    @property
    def num_bytes(self):
        return sum(len(line.encode()) + 1 for line in self.lines)


TEXT = Sentences(lines=LINES)


def plain_nll(model, tokens, first_input):
    logprobs_SV = token_by_token(model, [first_input, *tokens[:-1]])
    return -sum(float(logprobs_SV[step, token]) for step, token in enumerate(tokens))


@pytest.mark.parametrize("make_model", [tiny_mixture, tiny_recurrent])
@pytest.mark.parametrize(("batch_size", "num_steps"), [(1, 1), (1, 5), (1, 1000), (3, 4), (7, 2), (500, 3)])
def test_a_stream_is_every_lane_read_token_by_token(make_model, batch_size, num_steps):
    model = make_model(VOCABULARY.size, dtype=torch.float64)
    tokens = TEXT.token_N.tolist()
    length = math.ceil(len(tokens) / batch_size)
    expected = sum(
        plain_nll(model, tokens[start : start + length], tokens[start - 1] if start else END)
        for start in range(0, len(tokens), length)
    )
    result = evaluate(model, TEXT, batch_size=batch_size, num_steps=num_steps)
    assert result.nll_nats == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("batch_size", "num_steps"), [(1, 1), (3, 4), (50, 50)])
def test_sentences_by_themselves_are_as_likely_as_their_scores_say(batch_size, num_steps):
    model = tiny_mixture(VOCABULARY.size, dtype=torch.float64)
    expected = -sum(scored.total for scored in score(model, VOCABULARY, LINES))
    result = evaluate(model, TEXT, batch_size=batch_size, num_steps=num_steps, context="sentence")
    assert result.nll_nats == pytest.approx(expected, abs=1e-10)


def test_sentences_are_all_read_however_many_are_sorted_at_once(monkeypatch):
    monkeypatch.setattr("sparsegate.evaluation.perplexity._SORTED_AT_ONCE", 4)
    model = tiny_mixture(VOCABULARY.size, dtype=torch.float64)
    expected = -sum(scored.total for scored in score(model, VOCABULARY, LINES))
    result = evaluate(model, TEXT, batch_size=2, num_steps=4, context="sentence")
    assert result.nll_nats == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("context", ["stream", "sentence"])
def test_balance_is_summed_over_every_token_once(context):
    model = tiny_mixture(VOCABULARY.size)
    result = evaluate(model, TEXT, batch_size=3, num_steps=4, context=context)
    sums = result.sums["moe"]
    assert int(sums.num_tokens) == len(TEXT.token_N)
    assert int(sums.count_E.sum()) == 2 * len(TEXT.token_N)
    assert float(sums.importance_E.sum()) == pytest.approx(len(TEXT.token_N), abs=1e-4)
    assert sums.importance_E.dtype == sums.load_E.dtype == torch.float64
    # Ordinary tensors, which may take part in what comes after.
    assert not any(part.is_inference() for part in (sums.importance_E, sums.count_E, sums.load_E))


def test_one_batch_has_the_balance_of_one_forward_pass():
    model = tiny_mixture(VOCABULARY.size)
    sums = evaluate(model, TEXT, batch_size=1, num_steps=1000).sums["moe"]
    model.eval()
    tokens = TEXT.token_N.tolist()
    expected = model(torch.tensor([[END, *tokens[:-1]]])).routings["moe"].sums
    assert torch.equal(sums.count_E, expected.count_E)
    torch.testing.assert_close(sums.importance_E.float(), expected.importance_E)


def test_a_model_without_mixtures_has_no_sums():
    assert evaluate(tiny_recurrent(VOCABULARY.size), TEXT, batch_size=2, num_steps=4).sums == {}


def test_counts_are_those_of_the_text():
    model = tiny_recurrent(VOCABULARY.size)
    result = evaluate(model, TEXT, batch_size=2, num_steps=4, unknown_id=VOCABULARY.unknown_id)
    assert (result.num_tokens, result.num_sentences, result.num_unknown) == (23, 6, 2)
    assert (result.num_words, result.num_bytes) == (17, TEXT.num_bytes)
    assert evaluate(model, TEXT, batch_size=2, num_steps=4).num_unknown == 0


def test_measures_are_their_definitions():
    nll = 10 * math.log(8)
    result = Evaluation(
        nll_nats=nll,
        num_tokens=10,
        num_sentences=2,
        num_words=13,
        num_bytes=60,
        num_unknown=1,
        sums={},
    )
    assert result.perplexity == pytest.approx(8)
    assert result.word_perplexity == pytest.approx(8 ** (10 / 15))
    assert result.bits_per_byte == pytest.approx(30 / 60)
    assert result.unknown_share == 0.1
    assert result.metrics() == {
        "loss": pytest.approx(math.log(8)),
        "perplexity": result.perplexity,
        "word_perplexity": result.word_perplexity,
        "bits_per_byte": result.bits_per_byte,
        "unknown_share": 0.1,
    }


def test_what_is_not_known_is_not_among_the_metrics():
    result = Evaluation(
        nll_nats=1e6,
        num_tokens=1,
        num_sentences=1,
        num_words=None,
        num_bytes=None,
        num_unknown=0,
        sums={},
    )
    assert result.word_perplexity is None
    assert result.bits_per_byte is None
    assert result.metrics() == {"loss": 1e6, "perplexity": math.inf, "unknown_share": 0.0}


def test_progress_adds_up_to_all_tokens():
    taken = []
    evaluate(tiny_recurrent(VOCABULARY.size), TEXT, batch_size=5, num_steps=2, progress=taken.append)
    assert sum(taken) == len(TEXT.token_N)
    assert len(taken) > 1


def test_the_model_is_left_in_the_mode_it_was_in():
    model = tiny_mixture(VOCABULARY.size)
    model.layers["moe"].eval()
    before = [module.training for module in model.modules()]
    first = evaluate(model, TEXT, batch_size=5, num_steps=2)
    assert [module.training for module in model.modules()] == before
    # Neither dropout nor noise takes part.
    assert evaluate(model, TEXT, batch_size=5, num_steps=2).nll_nats == first.nll_nats


@pytest.mark.parametrize("name", ["batch_size", "num_steps"])
def test_sizes_below_one_are_refused(name):
    sizes = {"batch_size": 2, "num_steps": 2, name: 0}
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be at least 1"):
        evaluate(tiny_recurrent(VOCABULARY.size), TEXT, **sizes)


def test_a_large_vocabulary_is_read_in_pieces_of_the_same_sum(monkeypatch):
    model = tiny_recurrent(VOCABULARY.size, dtype=torch.float64)
    whole = evaluate(model, TEXT, batch_size=3, num_steps=4)
    monkeypatch.setattr("sparsegate.models.cross_entropy.MAX_LOGITS", 11)
    monkeypatch.setattr("sparsegate.models.cross_entropy._BLOCK_LOGITS", 0)
    monkeypatch.setattr("sparsegate.models.cross_entropy._LEAST_WORDS", 2)
    pieces = evaluate(model, TEXT, batch_size=3, num_steps=4)
    assert pieces.nll_nats == pytest.approx(whole.nll_nats, abs=1e-12)
