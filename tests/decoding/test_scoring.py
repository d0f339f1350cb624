import math

import pytest
import torch

from sparsegate.data import ByteVocabulary, WordVocabulary
from sparsegate.data.normalization import TOKENIZED
from sparsegate.decoding import scoring
from sparsegate.decoding.scoring import score, score_lines
from tests.helpers.language_models import tiny_adaptive, tiny_mixture, tiny_recurrent, token_by_token

BYTES = ByteVocabulary(normalization=TOKENIZED)
WORDS = WordVocabulary(
    words=["</s>", "<unk>", "a", "b", "c"], counts=[1, 1, 1, 1, 1], normalization=TOKENIZED
)
LINES = ["a b c", "", "c", "b b b a c", "a x b", "   "]


def expected_logprobs(model, vocabulary, line):
    tokens = [*vocabulary.encode(line), vocabulary.end_id]
    logprobs_SV = token_by_token(model, [vocabulary.end_id, *tokens[:-1]])
    return [float(logprobs_SV[step, token]) for step, token in enumerate(tokens)]


@pytest.mark.parametrize("make_model", [tiny_mixture, tiny_recurrent, tiny_adaptive])
@pytest.mark.parametrize("vocabulary", [BYTES, WORDS], ids=["bytes", "words"])
@pytest.mark.parametrize("max_tokens", [1, 7, 4096])
def test_log_probabilities_are_those_of_the_model_read_token_by_token(
    make_model, vocabulary, max_tokens, monkeypatch
):
    monkeypatch.setattr(scoring, "_MAX_TOKENS", max_tokens)
    model = make_model(vocabulary.size)
    results = list(score(model, vocabulary, LINES))
    assert [scored.text for scored in results] == LINES
    for scored in results:
        assert scored.tokens == (*vocabulary.encode(scored.text), vocabulary.end_id)
        expected = expected_logprobs(model, vocabulary, scored.text)
        assert scored.logprobs == pytest.approx(expected, abs=1e-4)
        assert scored.total == pytest.approx(sum(expected), abs=1e-3)


def test_scores_in_float64_are_exact():
    model = tiny_mixture(WORDS.size, dtype=torch.float64)
    for scored in score_lines(model, WORDS, LINES):
        assert scored.logprobs == pytest.approx(expected_logprobs(model, WORDS, scored.text), abs=1e-12)


def test_probabilities_of_all_lines_add_up_to_one():
    """A language model is a distribution over sentences: those of at most two words, and what is longer."""
    model = tiny_mixture(WORDS.size, dtype=torch.float64)
    words = ["<unk>", "a", "b", "c"]
    short = ["", *words, *(f"{first} {second}" for first in words for second in words)]
    complete = sum(math.exp(scored.total) for scored in score_lines(model, WORDS, short))
    longer = 0.0
    for line in (f"{first} {second}" for first in words for second in words):
        *logprobs, end = score_lines(model, WORDS, [line])[0].logprobs
        longer += math.exp(sum(logprobs)) * (1 - math.exp(end))
    assert complete + longer == pytest.approx(1, abs=1e-12)


def test_a_line_scores_the_same_in_any_company():
    model = tiny_mixture(BYTES.size)
    lines = [f"{'word ' * (index % 7)}{index}" for index in range(60)]
    together = [scored.total for scored in score(model, BYTES, lines)]
    alone = [score_lines(model, BYTES, [line])[0].total for line in lines]
    assert together == pytest.approx(alone, abs=1e-3)


def test_unknown_words_are_counted():
    results = score_lines(tiny_mixture(WORDS.size), WORDS, ["a x y", "a", "<unk>"])
    assert [scored.num_unknown for scored in results] == [2, 0, 1]
    assert [s.num_unknown for s in score_lines(tiny_mixture(BYTES.size), BYTES, ["\x01"])] == [0]


def test_lines_are_read_as_they_are_needed(monkeypatch):
    monkeypatch.setattr(scoring, "_WINDOW", 10)
    taken = []

    def lines():
        for index in range(1000):
            taken.append(index)
            yield "a"

    results = score(tiny_recurrent(WORDS.size), WORDS, lines())
    next(results)
    assert len(taken) == 10


def test_scoring_leaves_no_mode_behind():
    model = tiny_mixture(WORDS.size)
    results = score(model, WORDS, ["a", "b"])
    next(results)
    assert model.training
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    # Gradients still flow through the weights.
    model(torch.tensor([[2]])).hidden_BSD.sum().backward()


def test_a_line_feed_in_a_line_is_refused():
    with pytest.raises(ValueError, match="line feed"):
        score_lines(tiny_recurrent(WORDS.size), WORDS, ["a\nb"])


def test_no_lines_have_no_scores():
    assert list(score(tiny_recurrent(WORDS.size), WORDS, [])) == []


def test_a_very_long_line_goes_through_the_model_in_pieces(monkeypatch):
    model = tiny_recurrent(BYTES.size)
    shapes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, **rest: shapes.append(x.shape) or forward(x, **rest))
    line = "the quick brown fox " * 600
    [long] = score_lines(model, BYTES, [line])
    assert max(rows * steps for rows, steps in shapes) <= 4096
    [prefix] = score_lines(model, BYTES, [line[:3000]])
    assert long.logprobs[:3000] == pytest.approx(prefix.logprobs[:3000], abs=1e-4)
