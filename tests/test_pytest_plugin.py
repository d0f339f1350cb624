"""`pytest --conform PACKAGE:FACTORY`."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from sparsegate.evaluation.conformance.suite import LAWS

ROOT = Path(__file__).parent.parent
LAYER = """
import torch
from sparsegate import Implementation

class Layer(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) if len(x[0]) else 1 / 0

def make():
    return Implementation(module=Layer(4, 4), width=4)
"""


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A run in a folder of its own, with no other plugin, and where warnings are errors."""
    (folder / "layer.py").write_text(LAYER)
    (folder / "test_other.py").write_text("def test_other(): pass")
    options = ["-p", "sparsegate.pytest_plugin", "-p", "no:cacheprovider", "-W", "error", "-rfs"]
    paths = [str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *words],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_each_law_is_a_test_that_passes_is_skipped_or_shows_its_numbers(tmp_path: Path):
    done = run_pytest(tmp_path, "--conform", "layer:make")
    black_box = [law for law in LAWS if not law.needs]
    assert f"1 failed, {len(black_box) - 1} passed, {len(LAWS) - len(black_box)} skipped" in done.stdout
    assert "FAILED conform::empty-batch-is-a-batch" in done.stdout
    assert "No tokens give no outputs, and no error. (use: a rank" in done.stdout
    assert "ZeroDivisionError: division by zero" in done.stdout
    assert "not exposed: gates" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 1


def test_paths_are_run_as_well_and_laws_are_chosen_by_name(tmp_path: Path):
    done = run_pytest(tmp_path, "--conform", "layer:make", "test_other.py", "-k", "other or output-is-finite")
    assert "2 passed" in done.stdout
    assert done.returncode == 0


def test_a_target_that_cannot_be_imported_is_one_line(tmp_path: Path):
    done = run_pytest(tmp_path, "--conform", "layer:mak")
    assert "ERROR: --conform: target (layer:mak): layer has no mak; did you mean make?" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 4


def test_without_the_option_nothing_changes_and_nothing_waits_for_torch(tmp_path: Path):
    (tmp_path / "test_torch.py").write_text("import sys\ndef test_torch(): assert 'torch' not in sys.modules")
    done = run_pytest(tmp_path)
    assert "2 passed" in done.stdout
    assert done.returncode == 0


def test_the_plugin_is_declared_under_the_name_of_its_module():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert declared == {"sparsegate.pytest_plugin": "sparsegate.pytest_plugin"}
