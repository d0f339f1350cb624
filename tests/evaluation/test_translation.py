import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.evaluation.translation import (
    TargetLikelihood,
    compare,
    one_line,
    score,
    write_lines,
    write_references,
)
from tests.data.making import lines

pytest.importorskip("sacrebleu")

WORDS = ["the", "a", "cat", "sat", "on", "mat", ",", ".", "naïve", "ça", "中", "1,234", "»", "'", "don't"]


def text(seed: int, noise: float, count: int = 60) -> list[str]:
    """Lines that are the same for every noise, but for the share of words that it replaces."""
    choose = random.Random(0)
    other = random.Random(seed)
    found = [[choose.choice(WORDS) for _ in range(choose.randrange(3, 20))] for _ in range(count)]
    return [
        " ".join(other.choice(WORDS) if other.random() < noise else word for word in line) for line in found
    ]


REFERENCES = text(0, 0.0)
GOOD = text(1, 0.1)
BAD = text(2, 0.4)


def files(folder: Path, **texts: list[str]) -> dict[str, str]:
    for name, several in texts.items():
        write_lines(folder / name, several)
    return {name: str(folder / name) for name in texts}


def command(*words: str) -> str:
    """What sacrebleu's own command line says of files."""
    done = subprocess.run(
        [sys.executable, "-m", "sacrebleu", *words], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_scores_are_those_of_the_command_line_of_sacrebleu(tmp_path: Path) -> None:
    curious = [f"{line} \t " for line in GOOD[:-2]] + ["", " \x85 two\nlines\u2028 "]
    at = files(tmp_path, references=REFERENCES, hypotheses=curious)
    options = ("-m", "bleu", "chrf", "-f", "json", "-w", "10")
    bleu, chrf = json.loads(command(at["references"], "-i", at["hypotheses"], *options))
    for found, expected in zip(score(curious, REFERENCES), (bleu, chrf), strict=True):
        assert found.name == expected["name"]
        assert found.value == pytest.approx(expected["score"], abs=1e-9)
        assert found.signature == expected["signature"]
        assert found.interval is None


def test_references_are_scored_as_they_were_published(tmp_path: Path) -> None:
    curious = ["ab\x01cd ef gh ij", "one\x9ftwo three four \x85", "a\u2028b c d e\x1f f\rg ", *REFERENCES[3:]]
    published = tmp_path / "references"
    published.write_bytes("".join(f"{line}\n" for line in curious).encode())
    hypotheses = ["ab\x01cd ef gh ij", "one two three four", "a b c d e f g", *GOOD[3:]]
    at = files(tmp_path, hypotheses=hypotheses)
    options = ("-m", "bleu", "chrf", "-f", "json", "-w", "10")
    expected = json.loads(command(str(published), "-i", at["hypotheses"], *options))
    found = [one.value for one in score(hypotheses, curious)]
    assert found == pytest.approx([one["score"] for one in expected], abs=1e-9)
    write_references(tmp_path / "written", [curious[0], curious[1].replace(" ", "\n", 1), *curious[2:]])
    assert (tmp_path / "written").read_bytes() == published.read_bytes()


def test_intervals_are_those_of_the_command_line(tmp_path: Path) -> None:
    at = files(tmp_path, references=REFERENCES, hypotheses=GOOD)
    options = ("-m", "bleu", "chrf", "--confidence", "--confidence-n", "50", "-f", "json", "-w", "10")
    expected = json.loads(command(at["references"], "-i", at["hypotheses"], *options))
    for found, one in zip(score(GOOD, REFERENCES, resamples=50), expected, strict=True):
        assert found.interval == pytest.approx(one["confidence_var"], abs=1e-3)
        assert found.signature == one["signature"]
        assert f"± {found.interval:.2f}" in str(found)


def test_a_comparison_is_that_of_the_command_line(tmp_path: Path) -> None:
    at = files(tmp_path, references=REFERENCES, bad=BAD, good=GOOD)
    options = ("-m", "bleu", "chrf", "--paired-bs", "--paired-bs-n", "100", "-f", "latex", "-w", "4")
    table = command(at["references"], "-i", at["bad"], at["good"], *options)
    # Of each measure the baseline, then the system and its p.
    values = [float(value) for value in re.findall(r"\d+\.\d{4}(?= \()", table)]
    p_values = [float(value) for value in re.findall(r"p = (\d\.\d{4})", table)]
    bleu, chrf = compare(BAD, GOOD, REFERENCES, resamples=100)
    expected = [bleu.baseline, chrf.baseline, bleu.system, chrf.system]
    assert values == pytest.approx(expected, abs=1e-4)
    assert p_values == pytest.approx([bleu.p_value, chrf.p_value], abs=1e-4)
    assert (bleu.name, chrf.name) == ("BLEU", "chrF2")
    assert min(bleu.difference, chrf.difference) > 0


def test_a_difference_is_as_probable_in_both_orders_and_a_large_one_is_not() -> None:
    forward, backward = compare(GOOD, BAD, REFERENCES), compare(BAD, GOOD, REFERENCES)
    for one, other in zip(forward, backward, strict=True):
        assert one.difference == pytest.approx(-other.difference)
        assert one.p_value == pytest.approx(other.p_value)
        assert one.difference < 0
        assert one.p_value < 0.01


def test_a_perfect_translation_scores_a_hundred_and_a_strange_one_none() -> None:
    assert [one.value for one in score(REFERENCES, REFERENCES)] == pytest.approx([100, 100])
    assert all(one.value < 1e-9 for one in score(["q"] * 60, ["xyz"] * 60))


def test_bleu_is_its_formula() -> None:
    """An oracle: n-gram precisions and brevity penalty, on words that no tokenizer would cut."""
    hypotheses, references = ["a b c d e f", "a b c d e"], ["a b c d e g", "a b c d e f g"]
    logs = 0.0
    for n in (1, 2, 3, 4):
        grams = [
            [[tuple(line.split()[i : i + n]) for i in range(len(line.split()) - n + 1)] for line in side]
            for side in (hypotheses, references)
        ]
        matched = sum(gram in theirs for ours, theirs in zip(*grams, strict=True) for gram in ours)
        logs += math.log(matched / sum(map(len, grams[0]))) / 4
    brevity = math.exp(1 - 13 / 11)
    assert score(hypotheses, references)[0].value == pytest.approx(100 * brevity * math.exp(logs))


@pytest.mark.parametrize(
    ("language", "tokenizer"), [(None, "13a"), ("fr", "13a"), ("zh", "zh"), ("zh_Hans", "zh"), ("ja", "char")]
)
def test_languages_without_spaces_are_counted_in_characters(language: str | None, tokenizer: str) -> None:
    bleu, _ = score(["猫が好き", "a b"], ["猫は好き", "a c"], target_language=language)
    assert f"|tok:{tokenizer}|" in bleu.signature
    for one in compare(["猫が好き"], ["猫は好き"], ["猫は好き"], target_language=language, resamples=2):
        assert ("BLEU" not in one.name) or f"|tok:{tokenizer}|" in one.signature


def test_a_printed_score_has_its_signature() -> None:
    bleu, chrf = score(GOOD, REFERENCES)
    assert re.fullmatch(r"BLEU \d+\.\d\d \(nrefs:1\|.*version:[\d.]+\)", str(bleu))
    assert str(chrf).startswith("chrF2 ")
    comparison = compare(BAD, GOOD, REFERENCES, resamples=10)[0]
    assert re.fullmatch(r"BLEU \S+ -> \S+ \(\+\d+\.\d\d, p = 0\.\d{3}; nrefs:1\|.*\)", str(comparison))


@given(several=st.lists(lines.map(lambda line: line + "\n x \x85\r\u2028y  "), max_size=5))
def test_hypotheses_are_written_one_per_line(
    several: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("written") / "hypotheses"
    write_lines(path, several)
    content = path.read_bytes().decode()
    assert content.count("\n") == len(several)
    assert content.splitlines() == content.split("\n")[:-1] == [one_line(line) for line in several]


def test_perplexities_come_from_sums() -> None:
    one = TargetLikelihood(nll_nats=12.0, num_subwords=6, num_words=3, num_sentences=1)
    other = TargetLikelihood(nll_nats=8.0, num_subwords=4, num_words=2, num_sentences=1)
    both = one + other
    assert both == TargetLikelihood(nll_nats=20.0, num_subwords=10, num_words=5, num_sentences=2)
    assert both.perplexity == pytest.approx(math.exp(20 / 10))
    assert both.word_perplexity == pytest.approx(math.exp(20 / 7))
    endless = TargetLikelihood(nll_nats=1e9, num_subwords=1, num_words=1, num_sentences=1)
    assert endless.perplexity == endless.word_perplexity == math.inf


def test_what_cannot_be_scored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"hypotheses \(1\) must be as many as references \(2\)"):
        score(["a"], ["a", "b"])
    with pytest.raises(ValueError, match=r"hypotheses \(2\) must be as many as references \(1\)"):
        compare(["a"], ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="hypotheses: there is none"):
        score([], [])
    with pytest.raises(ValueError, match=r"resamples \(-1\) must not be negative"):
        score(["a"], ["a"], resamples=-1)
    with pytest.raises(ValueError, match=r"resamples \(0\) must be at least 1"):
        compare(["a"], ["a"], ["a"], resamples=0)

    def missing(name: str) -> object:
        raise ModuleNotFoundError(name="sacrebleu")

    monkeypatch.setattr("sparsegate.evaluation.translation.import_module", missing)
    with pytest.raises(
        ValueError, match=r"sacrebleu: not installed; pip install 'sparsegate\[translation\]'"
    ):
        score(["a"], ["a"])
