"""Prepares translation datasets in processes that may die of it."""

from pathlib import Path

from sparsegate.data.parallel import ParallelText, prepare_translation
from tests.data.children import die_at_change


def make(output: Path, text: ParallelText) -> None:
    prepare_translation(output=output, train=[text], vocabulary_size=280, valid_share=0.1, test_share=0)


def make_and_die(output: Path, text: ParallelText, at_change: int) -> None:
    die_at_change(at_change)
    make(output, text)
