import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsegate.data import Dataset
from sparsegate.data.files import sealed
from sparsegate.data.parallel import TranslationDataset
from tests.data.parallel.making import dataset_of
from tests.helpers.damage import damages

FILES = ("translation.json", "vocabulary.json", "train.en-fr.fr.tokens", "valid.en-fr.en.sentences")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset_of(tmp_path_factory.mktemp("intact"), {"en-fr": 90}).directory


@pytest.fixture
def directory(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "dataset"))


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a sealed file and seal it again: not rot, but somebody's doing."""
    content = json.loads(path.read_bytes())
    del content["sha256"]
    edit(content)
    path.write_bytes(sealed(content))


def refusal(directory: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        TranslationDataset.open(directory).verify()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_token_files_are_mapped_read_only(intact: Path) -> None:
    pair = TranslationDataset.open(intact).pair("train", "en-fr")
    for side in (pair.source, pair.target):
        assert isinstance(side.token_N, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            side.token_N[0] = 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.nightly)])
def test_no_damage_is_accepted_in_silence(name: str, count: int, directory: Path) -> None:
    path = directory / name
    content = path.read_bytes()
    for kind, damaged in damages(content, count):
        path.write_bytes(damaged)
        assert refusal(directory).startswith(f"{path}: "), kind
    path.write_bytes(content)
    TranslationDataset.open(directory).verify()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, directory: Path) -> None:
    (directory / name).unlink()
    assert name in refusal(directory)


def test_what_is_no_translation_dataset_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path}: not a translation dataset (it has no translation.json); make one with "
        "`sparsegate prepare --pair`"
    )


def test_a_language_model_does_not_open_it(intact: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a dataset"):
        Dataset.open(intact)


def pair_of(content: dict[str, Any]) -> dict[str, Any]:
    return content["parts"]["train"]["en-fr"]


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda content: content.update(format=2), "translation.json: format: Input should be 1"),
        (lambda content: content.update(extra=2), "translation.json: extra: Extra inputs are not permitted"),
        (
            lambda content: content["parts"].clear(),
            "translation.json: parts: Dictionary should have at least 1",
        ),
        (
            lambda content: content["parts"]["train"].update({"../x-fr": pair_of(content)}),
            "translation.json: parts.train.../x-fr.[key]: String should match pattern",
        ),
        (
            lambda content: content["parts"]["train"].update({"en-de": pair_of(content)}),
            "vocabulary.json: has not both languages of en-de; prepare the dataset again",
        ),
        (
            lambda content: pair_of(content)["first"].update(sentences=89),
            "translation.json: parts.train.en-fr: its sides are not of equal length; prepare",
        ),
        (
            lambda content: pair_of(content)["second"].update(dtype="<u4"),
            "translation.json: parts.train.en-fr.second.dtype: <u4 does not fit the vocabulary",
        ),
        (
            lambda content: content.update(normalization="tokenized-1"),
            "vocabulary.json: not the vocabulary of ",
        ),
        (lambda content: content["vocabulary"].update(size=3), "vocabulary.json: not the vocabulary of "),
        (
            lambda content: (
                content["parts"]["train"].update({"fr-en": pair_of(content)})
                or content.update(both_directions=True)
            ),
            "translation.json: en-fr and fr-en are in both directions; prepare the dataset again",
        ),
    ],
)
def test_a_well_sealed_manifest_that_makes_no_sense_is_refused(
    edit: Callable[[dict[str, object]], object], cause: str, directory: Path
) -> None:
    change(directory / "translation.json", edit)
    assert refusal(directory).startswith(f"{directory}/{cause}")


def test_the_vocabulary_of_another_dataset_is_refused(directory: Path, tmp_path: Path) -> None:
    other = dataset_of(tmp_path / "other", {"en-fr": 50})
    shutil.copy(other.directory / "vocabulary.json", directory / "vocabulary.json")
    assert refusal(directory).startswith(f"{directory}/vocabulary.json: not the vocabulary of ")


def test_what_is_absent_is_named_with_what_there_is(intact: Path) -> None:
    dataset = TranslationDataset.open(intact)
    with pytest.raises(ValueError, match="has no part 'dev', but train, valid, test"):
        dataset.part("dev")
    with pytest.raises(ValueError, match="train has no pair 'fr-en', but en-fr"):
        dataset.pair("train", "fr-en")
