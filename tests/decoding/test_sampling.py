import math

import numpy as np
import pytest
import torch

from sparsegate.data import ByteVocabulary, CharacterVocabulary, SubwordVocabulary, WordVocabulary
from sparsegate.data.normalization import PLAIN, TOKENIZED
from sparsegate.decoding import sampling as sampling_module
from sparsegate.decoding.choice import Sampling
from sparsegate.decoding.sampling import generate, stream
from tests.helpers.language_models import tiny_adaptive, tiny_mixture, tiny_recurrent, token_by_token

WORDS = WordVocabulary(
    words=["</s>", "<unk>", "a", "b", "c", "d"], counts=[1, 1, 1, 1, 1, 1], normalization=TOKENIZED
)
BYTES = ByteVocabulary(normalization=PLAIN)
CHARACTERS = CharacterVocabulary(
    characters=["</s>", "<unk>", *"abc d"], counts=[1] * 7, normalization=TOKENIZED
)
SUBWORDS = SubwordVocabulary.train(
    [["the cat sat on the mat", "the dog sat on the cat", "größer als"] * 5], size=290, normalization=PLAIN
)
VOCABULARIES = {"words": WORDS, "bytes": BYTES, "characters": CHARACTERS, "subwords": SUBWORDS}
PROMPTS = ["a b", "", "c c c c c c c a", "a", "b\nc"]
each_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)


def outputs(model, vocabulary, prompts, batch_size=32, **options):
    return list(generate(model, vocabulary, prompts, sampling=Sampling(**options), batch_size=batch_size))


def argmax_loop(model, vocabulary, prompt, max_tokens):
    """Greedy decoding that reads everything anew for every token."""
    tokens = []
    while len(tokens) < max_tokens and vocabulary.end_id not in tokens:
        inputs = [vocabulary.end_id, *vocabulary.encode_text(prompt), *tokens]
        logprobs_V = token_by_token(model, inputs)[-1]
        if vocabulary.unknown_id is not None:
            logprobs_V[vocabulary.unknown_id] = -math.inf
        tokens.append(int(logprobs_V.argmax()))
    return tuple(tokens)


@each_vocabulary
@pytest.mark.parametrize("make_model", [tiny_mixture, tiny_adaptive])
def test_temperature_zero_is_an_argmax_loop(vocabulary, make_model):
    model = make_model(vocabulary.size)
    results = outputs(model, vocabulary, PROMPTS, 2, temperature=0.0, max_tokens=6)
    assert [result.prompt for result in results] == PROMPTS
    for result in results:
        assert result.tokens == argmax_loop(model, vocabulary, result.prompt, 6)


def test_long_prompts_are_read_in_pieces(monkeypatch):
    model = tiny_mixture(WORDS.size)
    prompts = ["a b c d " * 30, "c b"]
    whole = outputs(model, WORDS, prompts, temperature=0.0)
    monkeypatch.setattr(sampling_module, "_MAX_TOKENS", 10)
    shapes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, **rest: shapes.append(x.shape) or forward(x, **rest))
    assert outputs(model, WORDS, prompts, temperature=0.0) == whole
    assert max(rows * steps for rows, steps in shapes) <= 10


@each_vocabulary
def test_what_a_prompt_becomes_does_not_depend_on_the_other_prompts(vocabulary):
    model = tiny_mixture(vocabulary.size)
    options = {"max_tokens": 30, "stop": (), "seed": 5}
    together = outputs(model, vocabulary, PROMPTS, 3, **options)
    others = ["d " * index for index in range(7)]
    for number, prompt in enumerate(PROMPTS):
        company = [prompt if index == number else others[index] for index in range(len(others))]
        assert outputs(model, vocabulary, company, **options)[number] == together[number]


def test_equal_prompts_go_on_differently_and_the_same_seed_repeats_them():
    model = tiny_mixture(WORDS.size, scale=1.0)
    first = outputs(model, WORDS, ["a"] * 4, stop=(), seed=1)
    assert len({result.tokens for result in first}) == 4
    assert outputs(model, WORDS, ["a"] * 4, stop=(), seed=1) == first
    assert outputs(model, WORDS, ["a"] * 4, stop=(), seed=2) != first


def test_next_tokens_are_as_frequent_as_the_model_says_they_are_probable():
    model = tiny_mixture(WORDS.size)
    results = outputs(model, WORDS, ["a b"] * 4000, 500, max_tokens=1, allow_unknown=True)
    counts = np.bincount([result.tokens[0] for result in results], minlength=WORDS.size)
    logprobs_V = token_by_token(model, [WORDS.end_id, *WORDS.encode("a b")])[-1]
    expected = 4000 * logprobs_V.exp().numpy()
    # The 99.9 % point of the chi-square distribution with 5 degrees of freedom.
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5


def test_unknown_words_are_not_written_unless_allowed():
    model = tiny_mixture(WORDS.size, scale=0.1)
    written = {
        allowed: {
            token
            for result in outputs(model, WORDS, ["a"] * 10, stop=(), allow_unknown=allowed)
            for token in result.tokens
        }
        for allowed in (False, True)
    }
    assert WORDS.unknown_id not in written[False]
    assert WORDS.unknown_id in written[True]


@each_vocabulary
def test_text_ends_before_the_stop_and_tokens_with_it(vocabulary):
    model = tiny_mixture(vocabulary.size, scale=0.5)
    for result in outputs(model, vocabulary, ["a"] * 20, max_tokens=100, stop=("\n",)):
        assert (result.end == "stop") == vocabulary.decode(result.tokens[-1:]).endswith("\n")
        assert "\n" not in result.text
        assert vocabulary.end_id not in result.tokens[:-1]


def test_a_stop_may_span_tokens_and_begin_anywhere_in_them():
    model = tiny_mixture(BYTES.size, scale=0.1)
    stops = ("ab", "ü", "\x00")
    results = outputs(model, BYTES, ["x"] * 40, max_tokens=150, stop=stops)
    assert any(result.end == "stop" for result in results)
    for result in results:
        text = bytes(result.tokens).decode(errors="replace")
        found = [text.find(stop) for stop in stops if stop in text]
        assert (result.end == "stop") == bool(found)
        assert result.text == (text[: min(found)] if found else text)


def test_text_goes_on_over_ends_of_sentences_where_they_are_no_stop():
    results = outputs(tiny_mixture(WORDS.size, scale=0.1), WORDS, ["a"] * 10, max_tokens=50, stop=())
    assert all(len(result.tokens) == 50 and result.end == "length" for result in results)
    assert all("\n" in result.text for result in results)


def test_prompt_and_text_together_are_spaced_as_the_vocabulary_spaces_them():
    [result] = outputs(tiny_mixture(WORDS.size), WORDS, ["a b"], max_tokens=3, stop=(), temperature=0.0)
    assert result.prompt + result.text == WORDS.decode([*WORDS.encode("a b"), *result.tokens])
    assert result.text[0] in " \n"


@each_vocabulary
@pytest.mark.parametrize("stop", [(), ("\n",), ("a", "th", "\n\n")], ids=["none", "end", "several"])
def test_a_stream_is_what_generate_writes(vocabulary, stop):
    model = tiny_mixture(vocabulary.size, scale=0.3)
    for prompt in ("a b", "", "ü\n"):
        sampling = Sampling(max_tokens=40, seed=1, stop=stop)
        [whole] = generate(model, vocabulary, [prompt], sampling=sampling)
        pieces = list(stream(model, vocabulary, prompt, sampling=sampling))
        assert "".join(pieces) == whole.text
        assert len(pieces) == len(whole.tokens)


def test_prompts_are_taken_as_there_is_room_for_them():
    taken = []

    def prompts():
        for index in range(100):
            taken.append(index)
            yield "a"

    results = generate(
        tiny_recurrent(WORDS.size), WORDS, prompts(), sampling=Sampling(max_tokens=3), batch_size=4
    )
    next(results)
    assert len(taken) == 4


def test_generating_leaves_no_mode_behind():
    model = tiny_mixture(WORDS.size)
    results = generate(model, WORDS, ["a", "b"], sampling=Sampling(max_tokens=3))
    next(results)
    assert model.training
    assert not torch.is_inference_mode_enabled()
    model(torch.tensor([[2]])).hidden_BSD.sum().backward()


def test_no_prompts_have_no_texts():
    assert outputs(tiny_recurrent(WORDS.size), WORDS, []) == []


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"batch_size \(0\)"):
        outputs(tiny_recurrent(WORDS.size), WORDS, ["a"], 0)
