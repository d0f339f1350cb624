import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparsegate


def test_the_public_names_are_the_same_for_a_type_checker_and_at_run_time():
    tree = ast.parse(Path(sparsegate.__file__).read_text())
    checked = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert checked == sparsegate._HOMES


@pytest.mark.parametrize("name", sparsegate._HOMES)
def test_a_public_name_is_there(name: str):
    assert getattr(sparsegate, name).__name__ == name
    assert name in dir(sparsegate)


def test_any_other_name_is_missing():
    with pytest.raises(AttributeError, match="'sparsegate' has no attribute 'MOE'"):
        sparsegate.MOE  # noqa: B018


def test_importing_the_package_does_not_wait_for_torch():
    script = "import sys, sparsegate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
