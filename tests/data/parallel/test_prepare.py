import json
import signal
from pathlib import Path

import numpy as np
import pytest

from sparsegate.data.parallel import (
    LengthFilter,
    ParallelText,
    TranslationDataset,
    clean_line,
    parse_parallel_text,
    prepare_translation,
)
from tests.data.children import start
from tests.data.making import write
from tests.data.parallel.children import make, make_and_die
from tests.data.parallel.making import dataset_of, pairs, text_of, tsv


def lines_of(dataset: TranslationDataset, part: str, pair: str) -> list[tuple[str, str]]:
    both = dataset.pair(part, pair)
    return list(zip(dataset.lines(both.source), dataset.lines(both.target), strict=True))


def test_the_lines_of_a_dataset_are_those_of_its_files(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"en-fr": 90, "de-en": 70}, both_directions=True)
    dataset.verify()
    assert lines_of(dataset, "train", "en-fr") == pairs("en", "fr", range(90))
    assert lines_of(dataset, "train", "de-en") == pairs("de", "en", range(70))
    assert lines_of(dataset, "train", "en-de") == [pair[::-1] for pair in pairs("de", "en", range(70))]
    assert lines_of(dataset, "test", "fr-en") == [pair[::-1] for pair in pairs("en", "fr", range(2000, 2040))]
    assert list(dataset.part("valid")) == ["en-fr", "fr-en", "de-en", "en-de"]
    assert dataset.vocabulary.languages == ("de", "en", "fr")


def test_counts_are_those_of_plain_python(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"en-fr": 50})
    assert list(dataset.part("train")) == ["en-fr"]
    pair = dataset.pair("train", "en-fr")
    assert pair.num_examples == 50
    for place, side in enumerate((pair.source, pair.target)):
        several = [both[place] for both in pairs("en", "fr", range(50))]
        assert side.num_sentences == 50
        assert side.num_words == sum(len(line.split()) for line in several)
        assert side.num_bytes == sum(len(line.encode()) + 1 for line in several)
        ids = [token for line in several for token in (*dataset.vocabulary.encode(line), 2)]
        assert side.token_N.tolist() == ids
        assert side.num_tokens == len(ids)


def test_texts_of_a_pair_are_joined_in_their_order_whatever_their_form(tmp_path: Path) -> None:
    first = text_of(tmp_path, "en-fr", range(30))
    several = pairs("en", "fr", range(30, 50))
    for place, language in enumerate(("en", "fr")):
        write(tmp_path / f"b.{language}", "".join(f"{pair[place]}\n" for pair in several))
    second = parse_parallel_text(f"en-fr:{tmp_path}/b.en,{tmp_path}/b.fr")
    options = {"vocabulary_size": 300, "valid_share": 0, "test_share": 0}
    dataset = prepare_translation(output=tmp_path / "d", train=[first, second], **options)
    assert lines_of(dataset, "train", "en-fr") == pairs("en", "fr", range(50))
    sources = dataset.manifest.parts["train"]["en-fr"].sources
    assert [(source.name, source.fields) for source in sources] == [
        ("train.en-fr.tsv", ["1", "2"]),
        ("b.en", []),
        ("b.fr", []),
    ]


def test_train_pairs_are_filtered_and_counted_and_others_are_kept(tmp_path: Path) -> None:
    several = [("a b", "c d"), ("", "c"), ("a", " \x85"), ("a " * 20, "c"), ("a", "dddddddd"), ("x", "y")]
    train, test = (
        ParallelText(languages=("en", "fr"), files=(tsv(tmp_path / name, several),))
        for name in ("train.tsv", "test.tsv")
    )
    dataset = prepare_translation(
        output=tmp_path / "d",
        train=[train],
        test=[test],
        vocabulary_size=262,
        filters=LengthFilter(max_subwords=16, max_ratio=4),
    )
    assert lines_of(dataset, "train", "en-fr") == [("a b", "c d"), ("x", "y")]
    assert dataset.manifest.parts["train"]["en-fr"].left_out == {"empty": 2, "too_long": 1, "ratio": 1}
    assert lines_of(dataset, "test", "en-fr") == [(clean_line(a), clean_line(b)) for a, b in several]
    assert dataset.manifest.parts["test"]["en-fr"].left_out == {}
    dataset.verify()


def test_held_out_pairs_are_apart_by_their_first_side_in_all_pairs(tmp_path: Path) -> None:
    texts = [text_of(tmp_path, pair, range(400)) for pair in ("en-fr", "en-de")]
    dataset = prepare_translation(
        output=tmp_path / "d", train=texts, vocabulary_size=300, valid_share=0.1, test_share=0.2
    )
    english = {
        part: [set(dataset.lines(pair.source)) for pair in dataset.part(part).values()]
        for part in dataset.parts
    }
    assert english.keys() == {"train", "valid", "test"}
    assert all(first == second for first, second in english.values())
    assert [len(english[part][0]) / 400 for part in ("valid", "test")] == pytest.approx([0.1, 0.2], abs=0.05)
    assert sum(len(first) for first, _ in english.values()) == 400
    for pair in ("en-fr", "en-de"):
        together = [line for part in dataset.parts for line in lines_of(dataset, part, pair)]
        assert sorted(together) == sorted(pairs("en", pair[3:], range(400)))


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (dataset_of(tmp_path / name, {"en-fr": 60}).directory for name in ("one", "other"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert len(names) == 2 + 3 * 4
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_subwords_are_taken_over(tmp_path: Path) -> None:
    old = dataset_of(tmp_path / "old", {"en-fr": 60, "en-de": 60})
    text = text_of(tmp_path, "fr-de", range(50))
    new = prepare_translation(output=tmp_path / "new", train=[], test=[text], vocabulary_from=old.directory)
    new.require_vocabulary(old.vocabulary)
    assert list(new.parts) == ["test"]
    with pytest.raises(ValueError, match="made with other subwords"):
        dataset_of(tmp_path / "other", {"en-fr": 30}).require_vocabulary(old.vocabulary)


def test_progress_counts_every_pass(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    dataset_of(tmp_path, {"en-fr": 60}, progress=lambda done, total: steps.append((done, total)))
    train, valid, test = (
        (tmp_path / f"{part}.en-fr.tsv").stat().st_size for part in ("train", "valid", "test")
    )
    assert steps[-1] == (2 * train + valid + test, 2 * train + valid + test)
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"vocabulary_size": 261}, r"vocabulary_size \(261\) must be at least 262, such as 32768"),
        ({"valid_share": 1.5}, r"valid_share \(1.5\) must be at least 0 and less than 1"),
        ({"valid_share": 0.6, "test_share": 0.5}, r"valid_share and test_share \(1.1 together\) must leave"),
        ({"train": []}, "train: no parallel text; give at least one pair"),
        ({"filters": LengthFilter(max_subwords=1)}, "train, en-fr: no pair of train.en-fr.tsv is left "),
        ({"valid_share": 1e-9}, r"valid, en-fr: no pair of train.en-fr.tsv is left \(none read\); give more"),
    ],
)
def test_impossible_options_are_refused_and_nothing_is_made(
    options: dict[str, object], cause: str, tmp_path: Path
) -> None:
    given = {"train": [text_of(tmp_path, "en-fr", range(1, 90))], "vocabulary_size": 300, **options}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=cause) as error:
        prepare_translation(output=tmp_path / "new", **given)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_subwords_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    old = dataset_of(tmp_path / "old", {"en-fr": 60}).directory
    text = text_of(tmp_path, "en-de", range(50))
    with pytest.raises(ValueError, match="language 'de' is not in the vocabulary; it has en, fr"):
        prepare_translation(output=tmp_path / "new", train=[text], vocabulary_from=old)
    with pytest.raises(ValueError, match="vocabulary_from brings its size; leave out vocabulary_size"):
        prepare_translation(output=tmp_path / "new", train=[text], vocabulary_from=old, vocabulary_size=400)
    with pytest.raises(ValueError, match="train: no text to make subwords from"):
        prepare_translation(output=tmp_path / "new", train=[], test=[text])


def test_both_orders_of_a_pair_and_both_directions_are_refused(tmp_path: Path) -> None:
    texts = [text_of(tmp_path, pair, range(50)) for pair in ("en-fr", "fr-en")]
    options = {"train": texts, "vocabulary_size": 300}
    with pytest.raises(ValueError, match="both_directions: en-fr and fr-en are given; give one"):
        prepare_translation(output=tmp_path / "new", both_directions=True, **options)
    assert list(prepare_translation(output=tmp_path / "new", **options).part("train")) == ["en-fr", "fr-en"]


def test_an_error_in_the_middle_of_a_file_leaves_nothing(tmp_path: Path) -> None:
    good = "".join("one\tun\n" for _ in range(9000)).encode()
    path = write(tmp_path / "a.tsv", good + b"b\xffd\tbon\n" + good)
    with pytest.raises(ValueError, match="a.tsv, line 9001: byte 0xff is not UTF-8"):
        prepare_translation(
            output=tmp_path / "new", train=[parse_parallel_text(f"en-fr:{path}")], vocabulary_size=300
        )
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "new/precious", "precious")
    with pytest.raises(FileExistsError, match="exists already and is not an empty directory"):
        prepare_translation(output=tmp_path / "new", train=[text_of(tmp_path, "en-fr", range(9))])


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_kill_before_any_change_leaves_a_complete_dataset_or_none(every: int, tmp_path: Path) -> None:
    outcomes = []
    for at_change in range(1, 100, every):
        folder = tmp_path / str(at_change)
        text = text_of(folder, "en-fr", range(60))
        process = start(make_and_die, folder / "dataset", text, at_change)
        process.join()
        outcomes.append((folder / "dataset").exists())
        if outcomes[-1]:
            TranslationDataset.open(folder / "dataset").verify()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if not outcomes[-1]:
            make(folder / "dataset", text)
            assert sorted(folder.iterdir()) == sorted([folder / "dataset", *text.files])
    assert process.exitcode == 0
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) * every > 10


def test_the_manifest_tells_how_it_was_made(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"en-fr": 60}, filters=LengthFilter(max_subwords=99))
    stored = json.loads((dataset.directory / "translation.json").read_bytes())
    assert stored["cleaning"] == "clean-1"
    assert stored["filters"] == {"max_subwords": 99, "max_ratio": 9.0}
    assert stored["held_out"] is None
    (source,) = stored["parts"]["train"]["en-fr"]["sources"]
    assert source["bytes"] == (tmp_path / "train.en-fr.tsv").stat().st_size
    assert len(source["sha256"]) == 64
    assert np.dtype(stored["parts"]["train"]["en-fr"]["first"]["dtype"]).itemsize == 2
