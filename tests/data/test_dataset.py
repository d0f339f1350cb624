import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsegate.data import Dataset, load_vocabulary
from sparsegate.data.files import sealed
from tests.data.making import dataset_of, prose
from tests.helpers.damage import damages

FILES = ("dataset.json", "vocabulary.json", "train.tokens", "train.sentences")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset_of(tmp_path_factory.mktemp("intact"), prose(120)).directory


@pytest.fixture
def directory(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "dataset"))


def change(path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    """Edit a sealed file and seal it again: not rot, but somebody's doing."""
    content = json.loads(path.read_bytes())
    del content["sha256"]
    edit(content)
    path.write_bytes(sealed(content))


def refusal(directory: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Dataset.open(directory).verify()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_counts_are_those_of_plain_python(intact: Path) -> None:
    dataset = Dataset.open(intact)
    text = prose(120)
    assert set(dataset.splits) == {"train", "valid", "test"}
    for name in dataset.splits:
        split = dataset.split(name)
        assert split.num_bytes == len(text.encode())
        assert split.num_words == len(text.split())
        assert split.num_sentences == text.count("\n") == len(split.sentence_end_N)
        assert split.num_tokens == split.num_words + split.num_sentences == len(split.token_N)
        assert dataset.vocabulary.decode(split.token_N) == text.replace(" \n", "\n")
    dataset.verify()


def test_token_files_are_mapped_read_only(intact: Path) -> None:
    split = Dataset.open(intact).split("train")
    assert isinstance(split.token_N, np.memmap)
    assert isinstance(split.sentence_end_N, np.memmap)
    assert (split.token_N.dtype, split.sentence_end_N.dtype) == (np.dtype("<u2"), np.dtype("<u8"))
    with pytest.raises(ValueError, match="read-only"):
        split.token_N[0] = 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.nightly)])
def test_no_damage_is_accepted_in_silence(name: str, count: int, directory: Path) -> None:
    path = directory / name
    content = path.read_bytes()
    for kind, damaged in damages(content, count):
        path.write_bytes(damaged)
        assert refusal(directory).startswith(f"{path}: "), kind
    path.write_bytes(content)
    Dataset.open(directory).verify()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, directory: Path) -> None:
    (directory / name).unlink()
    assert name in refusal(directory)


@pytest.mark.parametrize("name", ["train.tokens", "train.sentences"])
def test_opening_notices_a_file_of_another_size(name: str, directory: Path) -> None:
    with (directory / name).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(
        ValueError, match=rf"{name}: .* bytes, but .* were written; prepare the dataset again"
    ):
        Dataset.open(directory)


def test_every_mutation_of_one_bit_of_the_vocabulary_is_refused_when_it_is_loaded(directory: Path) -> None:
    path = directory / "vocabulary.json"
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytes([content[position] ^ (1 << position % 8)])
        path.write_bytes(content[:position] + changed + content[position + 1 :])
        with pytest.raises(ValueError, match="vocabulary.json: ") as error:
            load_vocabulary(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["absent", "file", "empty"])
def test_what_is_no_dataset_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / path) == (
        f"{tmp_path / path}: not a dataset (it has no dataset.json); make one with `sparsegate prepare`"
    )


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda content: content.update(format=2), "dataset.json: format: Input should be 1"),
        (lambda content: content.update(extra=2), "dataset.json: extra: Extra inputs are not permitted"),
        (lambda content: content.pop("splits"), "dataset.json: splits: Field required"),
        (
            lambda content: content["splits"].clear(),
            "dataset.json: splits: Dictionary should have at least 1 item",
        ),
        (
            lambda content: content["splits"].update({"../../x": content["splits"]["train"]}),
            "dataset.json: splits.../../x.[key]: String should match pattern",
        ),
        (
            lambda content: content["splits"]["train"].update(tokens=-1),
            "dataset.json: splits.train.tokens: Input should be greater than 0",
        ),
        (
            lambda content: content["splits"]["train"].update(tokens=1 << 70),
            "train.tokens: ",
        ),
        (
            lambda content: content["splits"]["train"].update(dtype="<f4"),
            "dataset.json: splits.train.dtype: String should match pattern",
        ),
        (
            lambda content: content["splits"]["train"].update(dtype="<u4"),
            "dataset.json: splits.train.dtype: <u4 does not fit the vocabulary",
        ),
        (
            lambda content: content.update(normalization="tokenized-1"),
            "vocabulary.json: not the vocabulary of ",
        ),
        (lambda content: content["vocabulary"].update(size=3), "vocabulary.json: not the vocabulary of "),
    ],
)
def test_a_well_sealed_manifest_that_makes_no_sense_is_refused(
    edit: Callable[[dict[str, object]], object], cause: str, directory: Path
) -> None:
    change(directory / "dataset.json", edit)
    assert refusal(directory).startswith(f"{directory}/{cause}")


def test_a_vocabulary_of_another_dataset_is_refused(directory: Path, tmp_path: Path) -> None:
    other = dataset_of(tmp_path / "other", prose(60))
    shutil.copy(other.directory / "vocabulary.json", directory / "vocabulary.json")
    assert refusal(directory).startswith(f"{directory}/vocabulary.json: not the vocabulary of ")


def test_a_vocabulary_of_the_same_words_with_other_counts_is_refused(directory: Path) -> None:
    path = directory / "vocabulary.json"
    change(path, lambda content: content.update(counts=content["counts"][::-1]))
    load_vocabulary(path)
    assert refusal(directory).startswith(f"{path}: damaged, its sha256 is ")


def test_tokens_with_fitting_checksums_that_make_no_sense_are_refused(directory: Path) -> None:
    path = directory / "train.tokens"
    original = np.fromfile(path, dtype="<u2")
    size = Dataset.open(directory).vocabulary.size
    for position, token in ((3, size), (3, 0), (len(original) - 1, 2)):
        changed = original.copy()
        changed[position] = token
        path.write_bytes(changed.tobytes())
        digest = hashlib.sha256(changed.tobytes()).hexdigest()
        change(
            directory / "dataset.json",
            lambda content, d=digest: content["splits"]["train"].update(tokens_sha256=d),
        )
        assert refusal(directory) == f"{path}: its tokens do not fit its sentences; prepare the dataset again"


def test_a_run_refuses_a_dataset_with_another_vocabulary(intact: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(intact)
    dataset.require_vocabulary(load_vocabulary(intact / "vocabulary.json"))
    other = dataset_of(tmp_path, prose(120), vocabulary="bytes")
    with pytest.raises(
        ValueError, match=r"made with another vocabulary \(256 bytes\) than the run's \(\d+ words\)"
    ):
        other.require_vocabulary(dataset.vocabulary)


def test_an_absent_split_is_named_with_those_there_are(intact: Path) -> None:
    with pytest.raises(ValueError, match="has no split 'dev', but train, valid, test"):
        Dataset.open(intact).split("dev")


def test_the_fingerprint_is_the_contents_and_not_the_places(
    intact: Path, directory: Path, tmp_path: Path
) -> None:
    assert Dataset.open(directory).fingerprint == Dataset.open(intact).fingerprint
    assert dataset_of(tmp_path / "elsewhere", prose(120)).fingerprint == Dataset.open(intact).fingerprint
    assert dataset_of(tmp_path / "more", prose(121)).fingerprint != Dataset.open(intact).fingerprint
