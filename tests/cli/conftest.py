import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sparsegate.models.translation import DenseBlock
from tests.helpers.runs import LINES, make_dataset, make_run, make_translation_dataset, make_translation_run


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs and datasets that the examples of the verbs name."""
    folder = tmp_path_factory.mktemp("book")
    dataset = make_dataset(folder / "text", kind="subwords")
    make_run(folder / "runs/book", dataset)
    shutil.copytree(dataset.directory, folder / "datasets/other")
    make_dataset(folder / "bytes", kind="bytes")
    pairs = make_translation_dataset(folder / "pairs", lines=LINES[:12])
    make_translation_run(folder / "runs/en-fr", pairs)
    make_translation_run(folder / "runs/dense", pairs, block=DenseBlock(hidden=16), seed=2)
    many = make_translation_dataset(folder / "both", lines=LINES[:12], both_directions=True)
    make_translation_run(folder / "runs/many", many)
    return folder


@pytest.fixture
def standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Puts bytes on standard input."""
    with ExitStack() as files:

        def put(content: bytes) -> None:
            (tmp_path / "stdin").write_bytes(content)
            monkeypatch.setattr("sys.stdin", files.enter_context((tmp_path / "stdin").open()))

        yield put
