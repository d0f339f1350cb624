"""From lines to lines: in order, each by itself, cut where it is too long, and always one line."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsegate.data.joint_subwords import JointSubwords
from sparsegate.decoding import BeamSearch, LineTranslator, TranslationSampling, beam_search
from sparsegate.decoding.lines import target_tokens
from sparsegate.decoding.target import Hypothesis
from sparsegate.models.translation import TranslationModel
from tests.helpers.translation_models import MIXTURES, a_translator

LINES = ["one two", "", "three", " \t ", "four five six seven", "one two"]
NARROW = BeamSearch(beam_size=2)


@pytest.fixture(scope="module")
def vocabulary() -> JointSubwords:
    return JointSubwords(merges=[], languages=["en", "fr"])


@pytest.fixture
def model(vocabulary: JointSubwords) -> TranslationModel:
    return a_translator(replace(MIXTURES, vocab_size=vocabulary.size), dtype=torch.float64)


class Echo:
    """Stands for a model that copies its source, so that what is around it can be seen."""

    def __init__(self, vocabulary: JointSubwords, *, num_best: int = 1) -> None:
        self.vocabulary, self.num_best = vocabulary, num_best
        self.seen: list[tuple[int, str]] = []

    def translations(self, model, sources, *, tokens, numbers, max_positions, keep_attention=False):
        found = []
        for source, number in zip(sources, numbers, strict=True):
            assert source[0] == self.vocabulary.language_id("fr")
            assert source[-1] == tokens.end_id
            self.seen.append((number, self.vocabulary.decode(source[1:-1])))
            best = Hypothesis(tokens=tuple(source[1:-1]), logprob=-1.0, score=-0.5, end="stop")
            found.append([best] * self.num_best)
        return found


def translator(vocabulary: JointSubwords, decoding, model=None, **options: int) -> LineTranslator:
    return LineTranslator(
        model=model, vocabulary=vocabulary, target_language="fr", decoding=decoding, **options
    )


def texts(of: LineTranslator, lines: list[str]) -> list[str]:
    return [best.text for best, *_ in of.translate(lines)]


@pytest.mark.parametrize("lines_at_once", [1, 2, 64])
def test_lines_come_in_order_and_empty_ones_stay_empty(vocabulary: JointSubwords, lines_at_once: int):
    echo = Echo(vocabulary)
    found = texts(translator(vocabulary, echo, lines_at_once=lines_at_once), LINES)
    assert found == ["one two", "", "three", "", "four five six seven", "one two"]
    assert [number for number, _ in echo.seen] == [0, 2, 4, 5]


@pytest.mark.parametrize("decoding", [NARROW, TranslationSampling(), TranslationSampling(temperature=1.0)])
def test_a_translation_does_not_depend_on_the_others(vocabulary: JointSubwords, model, decoding):
    together = texts(translator(vocabulary, decoding, model), LINES)
    assert together == texts(translator(vocabulary, decoding, model, lines_at_once=1), LINES)
    if decoding != TranslationSampling(temperature=1.0):
        assert together[0] == together[5]


def test_it_is_what_the_search_finds(vocabulary: JointSubwords, model: TranslationModel):
    source = vocabulary.encode_source("one two", target_language="fr")
    ((best,),) = beam_search(model, [source], tokens=target_tokens(vocabulary), search=NARROW)
    ((found,),) = translator(vocabulary, NARROW, model).translate(["one two"])
    assert found.score == pytest.approx(best.score)
    assert found.logprob == pytest.approx(best.logprob)


@pytest.mark.parametrize("decoding", [NARROW, TranslationSampling()])
def test_it_is_aligned_with_what_was_read_and_written(vocabulary: JointSubwords, model, decoding):
    line = "one two. three"
    align = translator(vocabulary, decoding, model, max_subwords=9, align=True)
    ((found,),) = align.translate([line])
    ((plain,),) = translator(vocabulary, decoding, model, max_subwords=9).translate([line])
    assert found.text == plain.text
    assert plain.alignments == ()
    sources = [vocabulary.encode_source(part, target_language="fr") for part in ("one two.", "three")]
    assert [each.source for each in found.alignments] == [tuple(vocabulary.names(ids)) for ids in sources]
    for alignment in found.alignments:
        assert alignment.target[-1] == "</s>"
        assert alignment.attention.shape == (len(alignment.target), len(alignment.source))
        np.testing.assert_allclose(alignment.attention.sum(axis=1), 1.0, rtol=1e-6)


def test_padding_and_names_of_languages_are_never_written(vocabulary: JointSubwords):
    tokens = target_tokens(vocabulary)
    assert set(tokens.never) == {vocabulary.pad_id, *map(vocabulary.language_id, vocabulary.languages)}


LONG = {
    "sentences": "It is a day. It is a night. It was a year! Was it a week? It was all of that; and more.",
    "words": "a word and another word and another one " * 20,
    "no space": "x" * 1000,
    "wide": "日本語の文です。" * 40,
    "one gap": "y" * 300 + " " + "z" * 300,
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("max_subwords", [1, 7, 30])
def test_a_long_line_is_translated_in_parts_that_are_all_of_it(
    vocabulary: JointSubwords, name: str, max_subwords: int
):
    echo = Echo(vocabulary)
    line = LONG[name].strip()
    (found,) = texts(translator(vocabulary, echo, max_subwords=max_subwords), [line])
    if max_subwords > 3:  # a character has up to three subwords
        assert found == line
    parts = [text for _, text in echo.seen]
    assert len(parts) > 1
    assert all(len(vocabulary.encode(part)) <= max(max_subwords, 4) for part in parts)
    assert len({number for number, _ in echo.seen}) == len(parts)


def test_it_is_cut_where_sentences_end_if_possible(vocabulary: JointSubwords):
    echo = Echo(vocabulary)
    texts(translator(vocabulary, echo, max_subwords=60), [LONG["sentences"]])
    assert [text for _, text in echo.seen] == [
        "It is a day. It is a night. It was a year!",
        "Was it a week? It was all of that; and more.",
    ]


def test_of_a_line_in_parts_scores_add_up(vocabulary: JointSubwords):
    of = translator(vocabulary, Echo(vocabulary, num_best=3), max_subwords=60)
    (found,) = of.translate([LONG["sentences"]])
    assert [(each.score, each.logprob) for each in found] == [(-1.0, -2.0)] * 3


def test_a_line_of_100_000_characters_is_cut_in_no_time(vocabulary: JointSubwords):
    line = ("lorem ipsum dolor " * 6000)[:100_000].strip()
    assert texts(translator(vocabulary, Echo(vocabulary)), [line]) == [line]


def test_control_characters_are_spaces_on_both_sides(vocabulary: JointSubwords):
    class Rude(Echo):
        def translations(self, model, sources, *, tokens, numbers, max_positions, keep_attention=False):
            tokens_of = tuple(vocabulary.encode("a\rb\x0bc\u2028d "))
            return [[Hypothesis(tokens=tokens_of, logprob=0.0, score=0.0, end="stop")] for _ in sources]

    echo = Echo(vocabulary)
    assert texts(translator(vocabulary, echo), ["a\tb\x1b[0m\x85"]) == ["a b [0m"]
    assert texts(translator(vocabulary, Rude(vocabulary)), ["x"]) == ["a b c d"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_subwords": 0}, r"^max_subwords \(0\) must be at least 1"),
        ({"lines_at_once": 0}, r"^lines_at_once \(0\) must be at least 1"),
        ({"target_language": "de"}, "^language 'de' is not in the vocabulary; it has en, fr"),
    ],
)
def test_what_cannot_be_translated_is_refused(vocabulary: JointSubwords, options, message: str):
    fields = {"target_language": "fr", "decoding": NARROW, **options}
    with pytest.raises(ValueError, match=message):
        LineTranslator(model=None, vocabulary=vocabulary, **fields)
