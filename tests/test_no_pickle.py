"""Nothing in the package can run what it reads: its own syntax tells that it has no pickle, eval or shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsegate

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
    "code",
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "execfile"),
    *("torch.load", "torch.save", "torch.hub.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
    *("os.system", "os.popen", "os.execv", "os.spawnv", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *(
        "dist.broadcast_object_list",
        "dist.all_gather_object",
        "dist.gather_object",
        "dist.scatter_object_list",
    ),
    *("dcp.load", "dcp.save", "checkpoint.load", "pd.read_pickle", "pandas.read_pickle"),
}
TRUE_ARGUMENTS = {"shell", "trust_remote_code", "allow_pickle"}


def findings(source: str) -> Iterator[str]:
    """The line and the name of each forbidden thing."""
    tree = ast.parse(source)
    aliases = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                aliases |= {name.asname or name.name: name.name for name in names}
                yield from (
                    f"{node.lineno}: import {n.name}" for n in names if n.name.split(".")[0] in MODULES
                )
            case ast.ImportFrom(module, names):
                aliases |= {name.asname or name.name: f"{module}.{name.name}" for name in names}
                if (module or "").split(".")[0] in MODULES and node.level == 0:
                    yield f"{node.lineno}: from {module} import"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            first, _, rest = name.partition(".")
            whole = ".".join(filter(None, [aliases.get(first, first), rest]))
            if name in CALLS or whole in CALLS or whole.replace("torch.distributed", "dist") in CALLS:
                yield f"{node.lineno}: {whole}()"
            for keyword in node.keywords:
                if keyword.arg in TRUE_ARGUMENTS and not is_false(keyword.value):
                    yield f"{node.lineno}: {keyword.arg}="
                if keyword.arg == "weights_only" and is_false(keyword.value):
                    yield f"{node.lineno}: weights_only=False"


def dotted(node: ast.expr) -> str:
    match node:
        case ast.Name(name):
            return name
        case ast.Attribute(value, name):
            return f"{dotted(value)}.{name}"
    return "?"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_the_package_runs_nothing_that_it_reads() -> None:
    package = Path(sparsegate.__file__).parent
    files = sorted(package.rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(package)}:{finding}" for file in files for finding in findings(file.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, _pickle as p",
        "from pickle import loads",
        "def f():\n    import dill",
        "eval('1')",
        "exec('1')",
        "torch.load(path, weights_only=True)",
        "from torch import load as read\nread(path)",
        "import torch as t\nt.save(x, path)",
        "yaml.load(text)",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "os.system('ls')",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "import torch.distributed as dist\ndist.broadcast_object_list(x)",
        "import torch\ntorch.distributed.all_gather_object(x, y)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(x)",
    ],
)
def test_each_forbidden_thing_is_found(source) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.load(file)",
        "np.load(path, allow_pickle=False)",
        "np.load(path)",
        "model.eval()",
        "torch.compile(model)",
        "re.compile('x')",
        "from .code import x",
        "subprocess.run(['ls'])",
    ],
)
def test_what_is_harmless_is_not_found(source) -> None:
    assert not list(findings(source))
