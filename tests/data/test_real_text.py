"""The standard counts of well-known corpora, which are too large, and not ours, to be kept with the tests."""

import os
from pathlib import Path

import pytest

from sparsegate.data import TextOptions, prepare

pytestmark = pytest.mark.skipif(
    "SPARSEGATE_DATA" not in os.environ,
    reason="SPARSEGATE_DATA does not name a folder with lm/ptb.train.txt etc.",
)


def text(name: str) -> list[Path]:
    return [Path(os.environ["SPARSEGATE_DATA"]) / "lm" / name]


def test_the_penn_treebank_has_its_ten_thousand_types_and_standard_counts(tmp_path: Path) -> None:
    dataset = prepare(
        output=tmp_path / "ptb",
        train=text("ptb.train.txt"),
        valid=text("ptb.valid.txt"),
        test=text("ptb.test.txt"),
        vocabulary="words",
        tokenized=True,
    )
    assert dataset.vocabulary.size == 10_000
    assert {name: split.num_tokens for name, split in dataset.splits.items()} == {
        "train": 929_589,
        "valid": 73_760,
        "test": 82_430,
    }
    dataset.verify()


def test_wikitext_2_has_its_standard_counts(tmp_path: Path) -> None:
    dataset = prepare(
        output=tmp_path / "wikitext-2",
        train=text("wikitext2.valid.tokens"),
        test=text("wikitext2.test.tokens"),
        vocabulary="words",
        tokenized=True,
        text=TextOptions(keep_blank_lines=True),
    )
    assert {name: split.num_tokens for name, split in dataset.splits.items()} == {
        "train": 217_646,
        "test": 245_569,
    }


def test_subwords_give_back_real_text_byte_for_byte(tmp_path: Path) -> None:
    path = text("c4.sample.txt")[0]
    dataset = prepare(
        output=tmp_path / "c4",
        train=[path],
        vocabulary="subwords",
        vocabulary_size=2000,
        valid_share=0,
        test_share=0,
        text=TextOptions(keep_blank_lines=True),
    )
    expected = path.read_bytes().decode().replace("\r\n", "\n").removesuffix("\n") + "\n"
    assert dataset.vocabulary.decode(dataset.split("train").token_N) == expected
