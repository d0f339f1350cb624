"""The house stands on its floors: an import only goes down."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsegate

PACKAGE = Path(sparsegate.__file__).parent

BELOW = {
    "moe": set(),
    "optim": set(),
    "data": set(),
    "benchmarking": {"moe"},
    "models": {"moe"},
    "parallel": {"moe", "models"},
    "decoding": {"moe", "models", "data"},  # it writes and scores text, so it knows vocabularies and batches
    "evaluation": {"moe", "models", "data", "decoding"},
    "inspection": {"moe", "models", "data"},
}
BELOW["training"] = set(BELOW)
BELOW["recipes"] = set(BELOW)
BELOW["cli"] = set(BELOW)

KNOW_OF_RANKS = {"parallel", "training"}
TRITON_KERNELS = Path("sparsegate/moe/kernels/triton")


def violations(package: Path) -> Iterator[str]:
    """What of a package breaks the rules, one line each."""
    for file in sorted(package.rglob("*.py")):
        part = file.relative_to(package).parts[0]
        if file.parent == package:
            continue  # the public names come from everywhere
        name = file.relative_to(package.parent)
        if part not in BELOW:
            yield f"{name}: {part} has no floor"
            continue
        source = file.read_text()
        if "torch.distributed" in source and part not in KNOW_OF_RANKS:
            yield f"{name}: {part} knows of torch.distributed"
        for module in imported_modules(source, package=".".join(name.parent.parts)):
            root, *inner = module.split(".")
            if root == "sparsegate":
                if inner[:1] != [part] and not set(inner[:1]) & BELOW[part]:
                    yield f"{name}: {part} may not import {module}"
            elif root == "triton" and name.is_relative_to(TRITON_KERNELS):
                continue
            elif part == "moe" and root != "torch" and root not in sys.stdlib_module_names:
                yield f"{name}: moe may not import {module}"


def imported_modules(source: str, *, package: str) -> Iterator[str]:
    """Absolute names of all modules that a source imports, at any depth; `package` is where it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from sparsegate import moe` names its part only in the alias
            yield from (
                [f"{module}.{alias.name}" for alias in node.names] if module == "sparsegate" else [module]
            )


def test_an_import_only_goes_down():
    assert list(violations(PACKAGE)) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("moe/layer.py", "import numpy", "moe may not import numpy"),
        ("moe/kernels/grouped.py", "import triton", "moe may not import triton"),
        ("moe/a/b.py", "from ...data import words", "moe may not import sparsegate.data"),
        ("moe/layer.py", "from .. import models", "moe may not import sparsegate.models"),
        ("models/lm.py", "from sparsegate import training", "models may not import sparsegate.training"),
        ("optim/adam.py", "def f():\n    import sparsegate.moe.layer", "may not import sparsegate.moe.layer"),
        ("data/words.py", "from sparsegate import MoE", "data may not import sparsegate.MoE"),
        ("models/lm.py", "import torch.distributed as dist", "models knows of torch.distributed"),
        ("attic/old.py", "", "attic has no floor"),
    ],
)
def test_what_goes_up_is_found(tmp_path: Path, file: str, source: str, complaint: str):
    planted = tmp_path / "sparsegate" / file
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    (found,) = violations(tmp_path / "sparsegate")
    assert complaint in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("moe/layer.py", "import math, torch\nfrom torch import nn\nfrom .routing import Routing"),
        ("moe/gating/gate.py", "from ..routing import Routing"),
        ("training/loop.py", "import torch.distributed\nfrom ..models import build"),
        ("cli/train.py", "from ..recipes import registry"),
        ("__init__.py", "from .cli.main import main"),
    ],
)
def test_what_goes_down_is_allowed(tmp_path: Path, file: str, source: str):
    planted = tmp_path / "sparsegate" / file
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    assert list(violations(tmp_path / "sparsegate")) == []
