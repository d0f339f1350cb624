"""Well-known corpora, which are too large, and not ours, to be kept with the tests."""

import os
from pathlib import Path

import pytest

from sparsegate.data.parallel import (
    ParallelText,
    clean_line,
    parse_parallel_text,
    prepare_translation,
)

pytestmark = pytest.mark.skipif(
    "SPARSEGATE_DATA" not in os.environ,
    reason="SPARSEGATE_DATA does not name a folder with mt/newstest2014.en-fr.tsv etc.",
)


def text(pair: str, name: str, fields: str = "") -> ParallelText:
    return parse_parallel_text(f"{pair}:{os.environ['SPARSEGATE_DATA']}/{name}{fields}")


def test_the_news_tests_have_their_standard_counts_and_every_line_comes_back(tmp_path: Path) -> None:
    names = {"en-fr": [3003, 3000, 3003], "en-de": [3003, 3000, 3003]}
    for pair, counts in names.items():
        texts = [text(pair, f"mt/newstest{year}.{pair}.tsv") for year in (2012, 2013, 2014)]
        dataset = prepare_translation(
            output=tmp_path / pair, train=texts[:1], valid=texts[1:2], test=texts[2:], vocabulary_size=4000
        )
        kept = [dataset.pair(part, pair).num_examples for part in ("train", "valid", "test")]
        left_out = sum(dataset.manifest.parts["train"][pair].left_out.values())
        assert [kept[0] + left_out, *kept[1:]] == counts
        lines = texts[2].files[0].read_text(encoding="utf-8").removesuffix("\n").split("\n")
        both = dataset.pair("test", pair)
        for column, side in enumerate((both.source, both.target)):
            assert list(dataset.lines(side)) == [clean_line(line.split("\t")[column]) for line in lines]


def test_columns_of_one_file_are_pairs_of_several_languages(tmp_path: Path) -> None:
    name = "mt/multi30k.val.en-de-fr-cs.tsv"
    texts = [
        text(f"en-{language}", name, f"@1,{column}") for column, language in enumerate(("de", "fr", "cs"), 2)
    ]
    dataset = prepare_translation(output=tmp_path / "d", train=texts, vocabulary_size=2000)
    totals = [
        sum(dataset.pair(part, f"en-{language}").num_examples for part in dataset.parts)
        for language in ("de", "fr", "cs")
    ]
    assert totals == [1014] * 3
