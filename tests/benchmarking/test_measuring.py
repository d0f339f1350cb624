import json
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from sparsegate.benchmarking import measuring
from sparsegate.benchmarking.measuring import circumstances, markdown, median_ratio, seconds, store


def test_functions_are_called_in_turn_and_the_first_round_is_not_counted():
    calls: list[str] = []
    times = seconds(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repeats=2,
        before=lambda: calls.append("-"),
    )
    assert "".join(calls) == "-a-b" * 3
    assert [len(own) for own in times.values()] == [2, 2]


def test_a_rate_is_the_median_of_the_ratios_and_not_the_ratio_of_the_medians():
    assert median_ratio([1.0, 2.0, 9.0], [1.0, 4.0, 3.0]) == 1.0  # ratios 1, 0.5, 3; medians 2 over 3


def test_a_table_has_a_line_for_each_row():
    assert markdown([{"a": 0.12345, "b": None}, {"a": 12345.6, "b": 4096}]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 0.123 |  |",
        "| 12,346 | 4,096 |",
    ]


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (
            ["/usr/bin/python3", "-m", "benchmarks.layer", "--threads", "2"],
            "python3 -m benchmarks.layer --threads 2",
        ),
        (
            ["/venv/bin/python", "/venv/bin/sparsegate", "bench", "layer", "--out", "a/b"],
            "sparsegate bench layer --out a/b",
        ),
    ],
)
def test_a_command_is_stored_as_one_types_it(argv: list[str], command: str):
    assert measuring._command(argv) == command


def git(folder: Path, *words: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True, stdout=-3
    )


def test_the_commit_is_told_of_a_tracked_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tracked, installed = tmp_path / "tracked.py", tmp_path / "installed.py"
    for file in (tracked, installed):
        file.touch()
    assert measuring._commit(tracked) is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "tracked.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert measuring._commit(tracked)
    assert measuring._commit(installed) is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert measuring._commit(tracked) is None


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(measuring, "version", absent)
    assert circumstances()["version"] is None


def test_what_is_stored_can_be_read_and_nothing_is_infinite(tmp_path: Path):
    path = store(tmp_path / "new/x.json", {**circumstances(), "rows": [1]})
    assert json.loads(path.read_text())["rows"] == [1]
    with pytest.raises(ValueError, match="JSON compliant"):
        store(path, {"rate": float("inf")})
