"""Whatever the documents name is there, and their code runs."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from sparsegate.cli.main import VERBS
from sparsegate.cli.verb import parse
from sparsegate.recipes.registry import RECIPES

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

FOLDERS = ("src/", "tests/", "docs/", "examples/", "benchmarks/")
PARTS = tuple(f"{part.name}/" for part in ROOT.glob("src/sparsegate/*/"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)#\s]+)\)")


def named(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(document.read_text()) if found == language]


def spans(document: Path) -> list[str]:
    return SPAN.findall(FENCE.sub("", document.read_text()))


def missing_name(span: str) -> str | None:
    """What a span like `moe/layer.py`, `moe/layer.py::MoE.forward` or `tests/x.py::test_y` names in vain."""
    path, _, names = span.partition("::")
    if not path.startswith(FOLDERS + PARTS) or re.search(r"[^\w./-]", path):
        return None
    file = ROOT / ("src/sparsegate" if path.startswith(PARTS) else "") / path
    if not file.exists():
        return span
    defined = [re.search(rf"(def|class) {n}\b|^{n} =", file.read_text(), re.M) for n in names.split(".") if n]
    return None if all(defined) else span


def commands(text: str) -> list[list[str]]:
    """The words of each `sparsegate`, `make` and `python -m benchmarks...` line, continued lines joined."""
    lines = [line.split("#")[0] for line in text.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"[|<>]", line)]
    ours = re.compile(r"(sparsegate|make|python -m benchmarks\S*)( |$)")
    return [shlex.split(part) for part in parts if ours.match(part)]


def benchmark_source(module: str) -> str:
    """Its text, and that of the benchmarks from which it may have its options."""
    text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    return text + "".join(map(benchmark_source, re.findall(r"^from (benchmarks\.\w+) import", text, re.M)))


def check_command(words: list[str]) -> None:
    """Fail if a verb, a recipe, an option or a target does not exist."""
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{word}:", makefile, re.M) for word in words[1:] if "=" not in word), words
    elif words[0] == "python":
        options = benchmark_source(words[2])
        assert all(f'"{word}"' in options for word in words[3:] if word.startswith("--")), words
    elif words[1:] and words[1] not in ("VERB", "--help", "--version"):
        name, *rest = words[1:]
        assert name in VERBS, words
        if rest and {"NAME", "--help"}.isdisjoint(rest):
            parse(import_module(f"sparsegate.cli.{name}").VERB, rest, name=name, summary="")


def in_span(span: str) -> list[list[str]]:
    """The command in a span, unless it is a word about one: `make`, `sparsegate train`."""
    return [words for words in commands(span) if len(words) > 2 or words[0] == "make"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_path_and_test_that_is_named_is_there(document):
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    broken = [link for link in links if not (document.parent / link).exists()]
    assert broken == []
    assert [span for span in spans(document) if missing_name(span)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_command_has_its_verb_its_recipe_and_its_options(document):
    for words in [w for code in blocks(document, "sh") for w in commands(code)]:
        check_command(words)
    for words in [w for span in spans(document) for w in in_span(span)]:
        check_command(words)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=named)
def test_the_python_in_it_runs_as_one_program(document, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks(document, "python")))
    subprocess.run([sys.executable, "-W", "error", program], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize(
    "span",
    [
        "moe/layers.py",
        "moe/layer.py::MoF",
        "tests/test_docs.py::test_that_is_not_there",
        "docs/nothing.md",
    ],
)
def test_a_name_without_a_thing_is_found(span):
    assert missing_name(span) == span


@pytest.mark.parametrize(
    "command",
    [
        "make quickstarts",
        "sparsegate training moe-32",
        "sparsegate train moe-33 --data datasets/book",
        "sparsegate train moe-32 --model.experts 3",
        "python -m benchmarks.layer --experts-none 4",
    ],
)
def test_a_command_that_does_not_exist_is_found(command):
    with pytest.raises((AssertionError, ValueError)):
        check_command(commands(command)[0])


def test_every_recipe_is_named_somewhere():
    text = "".join(document.read_text() for document in DOCUMENTS)
    assert [name for name in RECIPES if f"`{name}`" not in text] == []
