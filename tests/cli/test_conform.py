"""`sparsegate conform`."""

import json
import sys
from pathlib import Path

import pytest

from sparsegate.cli.main import main
from sparsegate.evaluation.conformance.suite import LAWS

Capture = pytest.CaptureFixture[str]

LAYERS = '''
import torch

print("a layer is made")


class Dropping(torch.nn.Module):
    """Only the first token of a batch comes through."""

    def __init__(self, *, width=4, name="x"):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):
        y = self.linear(x)
        return torch.cat([y[:, :1], y[:, 1:] - y[:, 1:]], dim=1), "a loss"


def raises():
    raise RuntimeError("two\\nlines")


def leaves():
    raise SystemExit(5)


def number():
    return 3


def identity():
    return torch.nn.Identity()


same = torch.nn.Identity()


def shared():
    return same


constant = 3
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder holds `layers.py` and `broken.py`."""
    (tmp_path / "layers.py").write_text(LAYERS)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "layers", raising=False)


def test_our_own_layer_passes_every_law(capsys: Capture):
    assert main(["conform", "sparsegate.evaluation.conformance.own:noisy_topk"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:-1] == [f"passed   {law.name}" for law in LAWS]
    assert shown[-1] == f"{len(LAWS)} passed, 0 failed, 0 skipped"


@pytest.mark.usefixtures("here")
def test_a_law_that_fails_is_named_with_its_numbers_and_the_exit_code_is_1(capsys: Capture):
    assert main(["conform", "layers:Dropping", "--width", "4"]) == 1
    told = capsys.readouterr()
    lines = told.out.splitlines()
    at = lines.index("failed   token-does-not-see-its-company")
    assert lines[at + 1].startswith(" " * 9 + "In evaluation mode a token alone")
    assert "eq. 1" in lines[at + 1]
    assert "output in company, against alone" in lines[at + 2]
    assert "expected" in lines[at + 2]
    assert "skipped  gates-sum-to-1  not exposed: gates" in lines
    assert "a layer is made" in told.err
    assert "a layer is made" not in told.out


@pytest.mark.usefixtures("here")
def test_json_is_one_object_with_every_number(capsys: Capture):
    assert main(["conform", "layers:Dropping", "width=6", "name=text", "--width", "6", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == "layers:Dropping"
    assert [law["name"] for law in report["laws"]] == [law.name for law in LAWS]
    for result in ("passed", "failed", "skipped"):
        assert report[result] == sum(law["result"] == result for law in report["laws"])
    (company,) = (law for law in report["laws"] if law["name"] == "token-does-not-see-its-company")
    assert company["source"].startswith("eq. 1")
    (number,) = company["numbers"]
    assert abs(number["measured"] - number["expected"]) > number["tolerance"]
    (skipped,) = (law for law in report["laws"] if law["name"] == "gates-sum-to-1")
    assert skipped["reason"] == "not exposed: gates"


@pytest.mark.usefixtures("here")
def test_one_law_can_be_tried_alone(capsys: Capture):
    words = ["conform", "layers:Dropping", "--width", "4", "--law", "output-is-finite"]
    assert main(words) == 0
    assert capsys.readouterr().out == "passed   output-is-finite\n1 passed, 0 failed, 0 skipped\n"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["layers"], "target (layers) must be PACKAGE:FACTORY, such as sparsegate."),
        (["layers:"], "target (layers:) must be PACKAGE:FACTORY, such as sparsegate."),
        (
            ["nowhere.at_all:x"],
            "target (nowhere.at_all:x): importing nowhere.at_all raised ModuleNotFoundError",
        ),
        (["broken:x"], "target (broken:x): importing broken raised ZeroDivisionError: division by zero; "),
        (["layers:identiti"], "target (layers:identiti): layers has no identiti; did you mean identity?"),
        (
            ["layers:Dropping.zzz"],
            "target (layers:Dropping.zzz): layers has no zzz; name a function or class",
        ),
        (["layers:constant"], "target (layers:constant): constant is of type int and cannot be called; name"),
        (["layers:raises"], "target (layers:raises): its call raised RuntimeError: two lines; it must make"),
        (["layers:leaves"], "target (layers:leaves): its call raised SystemExit: 5; it must make"),
        (
            ["layers:identity", "a=1"],
            "target (layers:identity): its call raised TypeError: identity() got an",
        ),
        (
            ["layers:number"],
            "target (layers:number): its call returned a int; it must return a torch.nn.Module",
        ),
        (
            ["layers:identity"],
            "--width: layers:identity makes a Identity, which does not say the width of its",
        ),
        (["layers:identity", "--width", "0"], "--width (0) must be at least 1"),
        (
            ["sparsegate.evaluation.conformance.own:noisy_topk", "--width", "3"],
            "--width (3): sparsegate.evaluation.conformance.own:noisy_topk says 16 itself; leave --width out",
        ),
        (
            ["layers:shared", "--width", "4"],
            "target (layers:shared): two calls returned the same module; it must",
        ),
        (["layers:identity", "a"], "argument (a) must be KEY=VALUE, such as num_experts=8"),
        (
            ["layers:identity", "--law", "gates-sum-to-2"],
            "--law (gates-sum-to-2): no such law; did you mean gate",
        ),
        (["layers:identity", "--law", "xyzzy"], "--law (xyzzy): no such law; there are output-is-finite, "),
    ],
)
def test_what_cannot_be_tried_is_refused_in_one_line(words: list[str], line: str, capsys: Capture):
    assert main(["conform", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.replace("a layer is made\n", "").startswith(f"sparsegate conform: {line}")
    assert told.err.replace("a layer is made\n", "").count("\n") == 1
