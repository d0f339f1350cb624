"""A checkpoint from a stranger is read or refused; nothing in it is ever run, followed or written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import audited_load
from tests.helpers.checkpoints import save
from tests.helpers.hostile import corpus, pickles

MEMORY_MIB = 512
MILLIONS_OF_ADDITIONS = 150  # some seven seconds


def watched_loads(whole: Path, paths: list[Path]) -> dict:
    """The outcome of each load in a process of its own, under an audit hook."""
    command = [sys.executable, audited_load.__file__, str(whole), *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def everything_below(path: Path) -> list[tuple]:
    entries = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    status = {entry: entry.lstat() for entry in entries}
    return sorted((str(e), s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for e, s in status.items())


@pytest.fixture(scope="module")
def loads(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("hostile")
    outside = save(root / "outside", 1)
    (root / "corpus").mkdir()
    names = corpus(root / "corpus", root / "mark", outside)
    before = everything_below(root)
    loads = watched_loads(root / "outside", [root / "corpus" / name for name in names])
    loads["changed"] = everything_below(root) != before
    loads["mark"] = (root / "mark").exists()
    shutil.rmtree(root)
    return loads


def test_no_hostile_checkpoint_runs_anything_or_is_loaded(loads) -> None:
    assert len(loads["outcomes"]) >= 40
    for path, load in loads["outcomes"].items():
        assert load["outcome"].startswith("ValueError: "), (path, load)
        assert len(load["outcome"].splitlines()) == 1, (path, load)
        assert path in load["outcome"], (path, load)
        assert load["events"] == [], (path, load)
        assert load["millions_of_additions"] <= MILLIONS_OF_ADDITIONS, (path, load)
    assert not loads["mark"]


def test_no_hostile_checkpoint_writes_a_file_or_fills_the_memory(loads) -> None:
    assert not loads["changed"]
    assert loads["grown_mib"] <= MEMORY_MIB


def test_the_watch_sees_what_a_pickle_does(tmp_path) -> None:
    save(tmp_path / "whole", 1)
    (tmp_path / "evil").write_bytes(pickles(tmp_path / "mark")["pickle 2"])
    load = watched_loads(tmp_path / "whole", [tmp_path / "evil"])["outcomes"][str(tmp_path / "evil")]
    kinds = {event.split()[0] for event in load["events"]}
    assert {"pickle.find_class", "os.system"} <= kinds
    assert (tmp_path / "mark").exists()
