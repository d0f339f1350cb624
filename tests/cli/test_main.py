import contextlib
import errno
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsegate.cli.main import VERBS, main
from sparsegate.cli.verb import Verb, parse
from sparsegate.training.checkpoint import CannotSave
from sparsegate.training.step import NonFinite

Plant = Callable[[Verb], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Adds a verb, `sparsegate toy`."""

    def plant_toy(verb: Verb) -> None:
        monkeypatch.setitem(VERBS, "toy", "Play.")
        monkeypatch.setitem(sys.modules, "sparsegate.cli.toy", SimpleNamespace(VERB=verb))

    return plant_toy


def toy(run: Callable[[Namespace], int]) -> Verb:
    return Verb(example="sparsegate toy", add_arguments=lambda parser: None, run=run)


def failing(error: BaseException) -> Verb:
    def run(args: Namespace) -> int:
        raise error

    return toy(run)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("model.k (9) must\nnot exceed 4"), 2, "model.k (9) must not exceed 4"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "'utf-8' codec can't decode"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 2, "a.txt: No such file"),
        (FileExistsError("out: exists already"), 2, "out: exists already"),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), 2, "a.txt: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "d/x"), 3, "d/x: No space left on device"),
        (
            CannotSave(Path("d"), needed=5, cause=OSError(errno.EIO, "bad disk")),
            3,
            "d: cannot save: bad disk",
        ),
        (NonFinite("10 steps in a row"), 4, "10 steps in a row"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "cannot write: No space left on device"),
        (MemoryError("Unable to allocate 9 EiB"), 2, "out of memory: Unable to allocate 9 EiB; ask for less"),
        (RuntimeError("[enforce] not enough memory: you tried"), 2, "out of memory: [enforce] not enough"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    plant: Plant, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
):
    plant(failing(error))
    assert main(["toy"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sparsegate toy: {line}")
    assert err.count("\n") == 1


def test_the_exit_code_of_a_verb_is_that_of_the_command(plant: Plant):
    for code in (0, 1):
        plant(toy(lambda args, code=code: code))
        assert main(["toy"]) == code


def test_a_fault_of_ours_is_no_fault_of_the_user(plant: Plant):
    plant(failing(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        main(["toy"])


def test_debug_adds_the_traceback(plant: Plant, capsys: pytest.CaptureFixture[str]):
    plant(failing(ValueError("wrong")))
    assert main(["toy", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("sparsegate toy: wrong\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["prepaer"], "sparsegate: prepaer: no such verb; did you mean prepare?"),
        (["xyzzy"], "sparsegate: xyzzy: no such verb; see sparsegate --help"),
        (
            ["prepare", "a", "--outptu", "b"],
            "sparsegate prepare: --outptu: no such option; did you mean --output?",
        ),
        (
            ["prepare", "a", "--outptu=b"],
            "sparsegate prepare: --outptu: no such option; did you mean --output?",
        ),
        (["prepare", "a"], "sparsegate prepare: the following arguments are required: --output; see"),
        (["prepare", "a", "--output", "b", "--vocabulary-size", "x"], "sparsegate prepare: argument --voc"),
        (["prepare", "a", "--output", "b", "--vocabulary", "wrods"], "sparsegate prepare: argument --voc"),
        (["prepare", "a", "--output", "b", "-x"], "sparsegate prepare: unrecognized arguments: -x; see"),
    ],
)
def test_wrong_words_are_refused_in_one_line(capsys: pytest.CaptureFixture[str], words: list[str], line: str):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_a_file_that_is_missing_brings_the_nearest_name(
    plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "valid.txt").touch()
    plant(toy(lambda args: len((tmp_path / "vaild.txt").read_text())))
    assert main(["toy"]) == 2
    assert capsys.readouterr().err.endswith(f"did you mean {tmp_path / 'valid.txt'}?\n")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_verb(capsys: pytest.CaptureFixture[str], words: list[str]):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +{re.escape(VERBS[name])}$", out, re.MULTILINE) for name in VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_a_verb_shows_an_example(capsys: pytest.CaptureFixture[str], name: str):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert re.search(rf"^example:\n  .*sparsegate {name} ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("name", VERBS)
def test_examples_hold_no_option_that_does_not_exist(name: str):
    verb: Verb = import_module(f"sparsegate.cli.{name}").VERB
    lines = [line for line in verb.example.strip().splitlines() if f"sparsegate {name}" in line]
    assert lines
    for line in lines:
        words = re.split(r"[|<>]", line.partition(f"sparsegate {name}")[2])[0]
        with contextlib.suppress(FileNotFoundError):  # the run that the example goes on with
            parse(verb, shlex.split(words), name=name, summary="")


def test_help_does_not_wait_for_torch():
    script = (
        "import sys; from sparsegate.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_reader_that_goes_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sparsegate", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
