import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsegate import load
from sparsegate.cli import progress, translate
from sparsegate.cli.main import main
from sparsegate.decoding import BeamSearch, TranslationSampling

Capture = pytest.CaptureFixture[str]
Put = Callable[[bytes], None]
TEXT = b"The 3 cats sat.\n\nThe 4 cats\n"
LINES = ["The 3 cats sat.", "", "The 4 cats"]


@pytest.fixture(autouse=True)
def in_folder(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(book)


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    return lambda: capfd.readouterr().out.split("\n")[:-1]


def test_standard_input_is_translated_line_by_line(standard_input: Put, said):
    standard_input(TEXT)
    assert main(["translate", "runs/en-fr"]) == 0
    found = said()
    assert found == list(load("runs/en-fr").translate(LINES))
    assert found[1] == ""


def test_files_are_translated_one_after_the_other(tmp_path: Path, said):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(TEXT)
    assert main(["translate", "runs/en-fr", str(tmp_path / "a"), str(tmp_path / "b"), "--greedy"]) == 0
    once = list(load("runs/en-fr").translate(LINES, decoding=TranslationSampling()))
    assert said() == once * 2


def test_options_and_files_come_in_any_order(tmp_path: Path, standard_input: Put, said):
    (tmp_path / "a").write_bytes(TEXT)
    once = list(load("runs/en-fr").translate(LINES, decoding=TranslationSampling()))
    assert main(["translate", "--greedy", "runs/en-fr", "--to", "fr", str(tmp_path / "a")]) == 0
    assert said() == once
    standard_input(TEXT)
    assert main(["translate", "runs/en-fr", str(tmp_path / "a"), "--greedy", "-"]) == 0
    assert said() == once * 2


def test_a_missing_file_shows_before_anything_is_translated(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "a").write_bytes(TEXT)
    assert main(["translate", "runs/en-fr", str(tmp_path / "a"), str(tmp_path / "b"), "--greedy"]) == 2
    told = capfd.readouterr()
    assert told.out == ""
    assert "b: No such file or directory" in told.err


def test_what_is_done_is_there_when_a_long_line_breaks_off(
    standard_input: Put, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The lines before it are not lost with those that were read together with them."""
    standard_input(b"The end\n\n" + b"The cats sat. " * 400 + b"\nThe end\n")
    plain = TranslationSampling.translations

    def broken(of: TranslationSampling, model: object, sources: list[object], **others: object):
        if len(sources) < 8 and sources:
            raise KeyboardInterrupt
        return plain(of, model, sources, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(TranslationSampling, "translations", broken)
    words = ["--greedy", "--max-subwords", "40", "--batch-size", "4"]
    assert main(["translate", "runs/en-fr", *words]) == 130
    assert capfd.readouterr().out.count("\n") == 2


@pytest.mark.parametrize("batch_size", ["1", "2", "64"])
def test_what_is_translated_at_the_same_time_changes_nothing(standard_input: Put, said, batch_size: str):
    standard_input(TEXT * 3)
    words = ["--temperature", "1", "--seed", "4", "--batch-size", batch_size]
    assert main(["translate", "runs/en-fr", *words]) == 0
    sampling = TranslationSampling(temperature=1.0, seed=4)
    assert said() == list(load("runs/en-fr").translate(LINES * 3, decoding=sampling))


def test_several_translations_come_with_their_scores(standard_input: Put, said):
    standard_input(TEXT)
    assert main(["translate", "runs/en-fr", "--n-best", "3", "--beam", "4"]) == 0
    rows = [row.split("\t") for row in said()]
    translator = load("runs/en-fr").translator(decoding=BeamSearch(beam_size=4, num_best=3))
    expected = [
        [str(number), f"{each.score:.4f}", each.text]
        for number, several in enumerate(translator.translate(LINES))
        for each in several
    ]
    assert rows == expected
    standard_input(TEXT)
    assert main(["translate", "runs/en-fr", "--n-best", "3", "--beam", "4", "--json"]) == 0
    objects = [json.loads(line) for line in said()]
    assert [each["source"] for each in objects] == LINES
    assert [t["text"] for each in objects for t in each["translations"]] == [row[2] for row in expected]


def test_attention_is_of_each_subword_of_each_translation(standard_input: Put, said):
    standard_input(TEXT)
    assert main(["translate", "runs/en-fr", "--n-best", "2", "--attention"]) == 0
    objects = [json.loads(line) for line in said()]
    assert [each["source"] for each in objects] == LINES
    for each in objects:
        for translation in each["translations"]:
            for alignment in translation["alignments"]:
                assert alignment["source"][0] == "<2fr>"
                assert "".join(alignment["source"][1:-1]).strip() == each["source"]
                assert alignment["target"][-1] == "</s>"
                assert len(alignment["attention"]) == len(alignment["target"])
                assert all(sum(row) == pytest.approx(1, abs=0.01) for row in alignment["attention"])
    assert [len(each["translations"][0]["alignments"]) for each in objects] == [1, 0, 1]


def test_alpha_and_beta_are_those_of_the_score(standard_input: Put, said):
    standard_input(TEXT)
    assert main(["translate", "runs/en-fr", "--alpha", "0", "--beta", "0", "--n-best", "1", "--json"]) == 0
    for line in said():
        for each in json.loads(line)["translations"]:
            assert each["score"] == each["logprob"]


def test_one_model_translates_into_several_languages(standard_input: Put, said):
    for words, to in ((["--to", "fr"], "fr"), (["--from", "fr"], "en")):
        standard_input(TEXT)
        assert main(["translate", "runs/many", "--greedy", *words]) == 0
        assert said() == list(load("runs/many").translate(LINES, to=to, decoding=TranslationSampling()))


@pytest.mark.parametrize(
    ("bad", "message"),
    [(b"b\xffd", "byte 0xff is not UTF-8"), (b"n\0l", "a NUL byte")],
)
def test_what_stands_before_a_bad_line_is_translated(standard_input: Put, capfd, bad: bytes, message: str):
    standard_input(b"The 3 cats\n\x1b[0m\ttab\n" + bad + b"\nnever\n")
    assert main(["translate", "runs/en-fr", "--greedy"]) == 2
    out, err = capfd.readouterr()
    assert out.count("\n") == 2
    assert err.startswith(f"sparsegate translate: standard input, line 3: {message}")
    assert err.count("\n") == 1


def test_bad_bytes_are_replaced_where_that_is_asked_for(standard_input: Put, said):
    standard_input(b"The 3 cats\nb\xffd n\0l\nThe end")
    assert main(["translate", "runs/en-fr", "--greedy", "--replace-bad-bytes", "--json"]) == 0
    assert [json.loads(line)["source"] for line in said()] == [
        "The 3 cats",
        "b\N{REPLACEMENT CHARACTER}d n\N{REPLACEMENT CHARACTER}l",
        "The end",
    ]


def test_a_line_of_100_000_characters_is_one_line(standard_input: Put, said):
    standard_input(b"The cats sat. " * 7200 + b"\nThe end\n")
    words = ["--greedy", "--max-subwords", "250", "--batch-size", "2000"]
    assert main(["translate", "runs/en-fr", *words]) == 0
    assert len(said()) == 2


def test_long_inputs_tell_how_far_they_are(
    standard_input: Put, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    standard_input(TEXT)
    assert main(["translate", "runs/en-fr", "--greedy"]) == 0
    assert capfd.readouterr().err.startswith("lines translated: 3, ")
    standard_input(b"The end\n" + b"The cats sat. " * 90)
    assert main(["translate", "runs/en-fr", "--greedy", "--max-subwords", "40", "--batch-size", "2"]) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "parts" in line]
    assert told[0].startswith("lines translated: 1, and 8 of ")
    assert told[0].endswith(" parts of the next")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("runs/book", "runs/book: is the run of a language model"),
        ("nowhere", "nowhere: not a run"),
        ("runs/many", "give --to with one of en, fr"),
        ("runs/many --to de", "--to (de): not a language of runs/many, which has en, fr"),
        ("runs/en-fr --to en", "was not trained for that pair, but for en-fr"),
        ("runs/en-fr absent.txt", "absent.txt: No such file"),
        ("runs/en-fr --n-best 0", "--n-best (0) must be at least 1"),
        ("runs/en-fr --beam 0", "--beam (0) must be at least 1"),
        ("runs/en-fr --batch-size 0", "--batch-size (0) must be at least 1"),
        ("runs/en-fr --max-subwords 0", "--max-subwords (0) must be at least 1"),
        ("runs/en-fr --greedy --beam 3", "--beam: is for beam search; leave it or --greedy out"),
        ("runs/en-fr --greedy --n-best 3", "--n-best: is for beam search"),
        ("runs/en-fr --greedy --temperature 1", "--greedy: is not drawn"),
        ("runs/en-fr --top-k 3", "--top-k: is for drawn translations"),
        ("runs/en-fr --temperature -1", "--temperature (-1.0) must be from 0"),
        ("runs/en-fr --checkpoint 15", "has no checkpoint of step 15; there are: "),
    ],
)
def test_bad_input_is_refused_in_one_line(words: str, message: str, standard_input: Put, capsys: Capture):
    standard_input(TEXT)
    assert main(["translate", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparsegate translate: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", ["generate", "score"])
def test_verbs_of_language_models_refuse_translation_models(verb: str, capsys: Capture):
    assert main([verb, "runs/en-fr"]) == 2
    assert "runs/en-fr: is the run of a translation model" in capsys.readouterr().err


def test_the_examples_are_read():
    assert all(shlex.split(line) for line in translate.EXAMPLE.strip().splitlines())
