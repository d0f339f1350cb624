import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsegate import load
from sparsegate.cli import generate
from sparsegate.cli.main import main
from sparsegate.decoding import Sampling

Put = Callable[[bytes], None]


@pytest.fixture(autouse=True)
def in_folder(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(book)


@pytest.mark.parametrize("line", generate.EXAMPLE.strip().splitlines())
def test_the_examples_work(line: str, standard_input: Put, capsys: pytest.CaptureFixture[str]):
    standard_input(b"The\nA\n")
    assert main(shlex.split(line.split("<")[0])[1:]) == 0
    out, err = capsys.readouterr()
    assert out
    assert err == ""


def test_the_options_reach_the_model(capsys: pytest.CaptureFixture[str]):
    words = (
        "generate runs/book --prompt The --prompt a --samples 2 --json --max-tokens 30 --temperature 0.7 "
        "--top-k 50 --top-p 0.9 --stop e --stop s --seed 3 --batch-size 3 --checkpoint last"
    )
    assert main(words.split()) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sampling = Sampling(max_tokens=30, temperature=0.7, top_k=50, top_p=0.9, stop=("e", "s", "\n"), seed=3)
    trained = load("runs/book", checkpoint="last")
    expected = trained.generate(["The", "The", "a", "a"], sampling=sampling)
    assert rows == [
        {"prompt": text.prompt, "text": text.text, "tokens": list(text.tokens), "end": text.end}
        for text in expected
    ]


def test_what_is_written_piece_by_piece_is_what_json_says(capsys: pytest.CaptureFixture[str]):
    words = ["generate", "runs/book", "--prompt", "The cats", "--max-tokens", "40", "--multiline"]
    assert main([*words, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert len(row["tokens"]) == 40
    assert main(words) == 0
    assert capsys.readouterr().out == f"The cats{row['text']}\n"


def test_each_line_of_standard_input_is_a_prompt(standard_input: Put, capsys: pytest.CaptureFixture[str]):
    standard_input("The\n\ndög\n".encode())
    assert main(["generate", "runs/book", "--json", "--max-tokens", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["The", "", "dög"]


def test_texts_stand_on_a_line_each(capsys: pytest.CaptureFixture[str]):
    words = "generate runs/book --prompt The --prompt a --max-tokens 3 --temperature 0"
    assert main(words.split()) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("The")
    assert second.startswith("a")


def test_an_empty_prompt_is_a_prompt(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "runs/book", "--prompt", "", "--json", "--max-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == ""


@pytest.mark.parametrize(
    "words",
    [
        "nowhere --prompt x",
        "runs/book --prompt x --max-tokens 0",
        "runs/book --prompt x --max-tokens 1000000000",
        "runs/book --prompt x --max-tokens 9" + "9" * 400,
        "runs/book --prompt x --max-tokens 1.5",
        "runs/book --prompt x --temperature -1",
        "runs/book --prompt x --temperature nan",
        "runs/book --prompt x --temperature inf",
        "runs/book --prompt x --temperature hot",
        "runs/book --prompt x --top-k 0",
        "runs/book --prompt x --top-p 0",
        "runs/book --prompt x --top-p nan",
        "runs/book --prompt x --top-p 1.5",
        "runs/book --prompt x --seed -1",
        "runs/book --prompt x --seed 99999999999999999999",
        "runs/book --prompt x --samples 0",
        "runs/book --prompt x --batch-size -2",
        "runs/book --prompt x --stop=",
        "runs/book --prompt \udcff",
        "runs/book --prompt x --stop \udcff",
        "runs/book --prompt x --temprature 1",
        "runs/book --prompt",
    ],
)
def test_bad_input_is_refused_in_one_line(words: str, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparsegate generate: ")
    assert err.count("\n") == 1
