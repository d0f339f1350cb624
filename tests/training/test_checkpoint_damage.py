"""No damaged checkpoint is taken in silence, and no hostile one ends in anything but one line."""

import copy
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch

from sparsegate.training.checkpoint import latest_checkpoint, load_checkpoint
from tests.helpers.checkpoints import assert_is_of, latest_step, same_bits, save, tensors_of
from tests.helpers.damage import damages
from tests.helpers.hostile import manifest_of, sign

FILES = ["MANIFEST.json", "state.json", "model.safetensors", "optimizer.safetensors", "state.safetensors"]
SECONDS = 5.0


def refusal(path: Path) -> str:
    """Why the checkpoint is refused, in one line and soon."""
    begin = time.process_time()
    with pytest.raises(ValueError, match="^[^\n]+$") as error:
        load_checkpoint(path)
    assert time.process_time() - begin < SECONDS
    return str(error.value)


def assert_no_damage_is_silent(directory: Path, file: str, count: int) -> None:
    """Each damaged form of the file is refused by name, and a run goes back to the checkpoint before."""
    save(directory, 1)
    path = save(directory, 2, keep={1})
    whole = (path / file).read_bytes()
    for name, data in damages(whole, count):
        (path / file).write_bytes(data)
        message = refusal(path)
        assert message.startswith(f"{path / file}: "), name
        assert "damaged: " in message or file == "MANIFEST.json", name
        told: list[str] = []
        assert latest_checkpoint(directory, warn=told.append) == directory / "step-00000001", name
        assert [line.startswith(f"{path / file}: ") for line in told] == [True], name
    (path / file).write_bytes(whole)
    assert latest_step(directory) == 2


@pytest.mark.parametrize("file", FILES)
def test_no_damage_to_a_file_is_silent(tmp_path, file) -> None:
    assert_no_damage_is_silent(tmp_path, file, 100)


@pytest.mark.nightly
@pytest.mark.parametrize("file", FILES)
def test_none_of_500_damages_to_a_file_is_silent(tmp_path, file) -> None:
    assert_no_damage_is_silent(tmp_path, file, 500)


def test_the_same_damages_are_silent_without_digests(tmp_path) -> None:
    whole = (save(tmp_path, 1) / "optimizer.safetensors").read_bytes()
    silent = 0
    for _, data in damages(whole, 100):
        try:
            found = safetensors.torch.load(data)
        except safetensors.SafetensorError:
            continue
        expected = tensors_of(1)["optimizer"]
        silent += any(key not in found or not same_bits(found[key], expected[key]) for key in expected)
    assert silent > 20


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_told(tmp_path, file) -> None:
    path = save(tmp_path, 1)
    (path / file).unlink()
    assert refusal(path).startswith(f"{path / file}: missing; restore it from a copy")


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_checkpoint_is_told(tmp_path, file) -> None:
    other, path = save(tmp_path, 1), save(tmp_path, 2, keep={1})
    shutil.copy(other / file, path / file)
    assert str(path) in refusal(path)
    assert latest_step(tmp_path) == 1


def test_files_that_changed_places_are_told(tmp_path) -> None:
    path = save(tmp_path, 1)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes((path / "optimizer.safetensors").read_bytes())
    (path / "optimizer.safetensors").write_bytes(data)
    assert "model.safetensors: damaged" in refusal(path)


@pytest.mark.parametrize(
    "name", ["extra.safetensors", "data.pkl", ".hidden", "model.safetensors.bak", "two\nlines"]
)
def test_a_file_that_is_not_in_the_manifest_is_told(tmp_path, name) -> None:
    path = save(tmp_path, 1)
    (path / name).write_bytes(b"")
    assert f"holds {name!r}, which is not in MANIFEST.json" in refusal(path)


ODD_VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2**63,
    2**70,
    10**400,
    1.5,
    1e308,
    "",
    "x",
    "a\nb",
    "../../etc/passwd",
    "\0",
]
ODD_VALUES += [[], [0], {}, {"a": 1}, "x" * 100_000, [[[[]]]], "\ud800", [None] * 10_000]


def odd_forms(value: object, count: int) -> Iterator[object]:
    """Copies of a JSON value in which something, somewhere, is another thing, or gone, or renamed."""
    choose = random.Random(0)
    for _ in range(count):
        root = [copy.deepcopy(value)]
        parent, key = choose.choice(list(places(root)))
        match choose.randrange(4):
            case 0 if isinstance(parent, dict):
                parent[choose.choice(["", "x", "__metadata__", "\n", "size"])] = parent.pop(key)
            case 1 if parent is not root:
                del parent[key]
            case _:
                parent[key] = copy.deepcopy(choose.choice(ODD_VALUES))
        yield root[0]


def places(node: object) -> Iterator[tuple]:
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, entry in entries:
        yield node, key
        yield from places(entry)


def outcome(path: Path) -> str | None:
    """None if the checkpoint loads; otherwise the line that refuses it."""
    begin = time.process_time()
    try:
        load_checkpoint(path)
        line = None
    except ValueError as error:
        line = str(error)
    assert time.process_time() - begin < SECONDS
    assert line is None or (len(line.splitlines()) == 1 and line.startswith(str(path)))
    return line


def assert_odd_manifests_are_refused(directory: Path, count: int) -> None:
    path = save(directory, 1)
    whole = json.loads((path / "MANIFEST.json").read_bytes())
    del whole["sha256"]
    for odd in odd_forms(whole, count):
        if repr(odd) != repr(whole):
            signed = sign(odd) if isinstance(odd, dict) else json.dumps(odd).encode()
            (path / "MANIFEST.json").write_bytes(signed)
            assert outcome(path) is not None, odd


def assert_odd_headers_are_refused_or_read_as_the_library_does(directory: Path, count: int) -> None:
    path = save(directory, 1)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    read = 0
    for odd in odd_forms(json.loads(whole[8:length]), count):
        text = json.dumps(odd).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + whole[length:])
        (path / "MANIFEST.json").write_bytes(manifest_of(path, step=1))
        if outcome(path) is None:
            found, expected = load_checkpoint(path).tensors["model"], safetensors.torch.load_file(file)
            assert set(found) == set(expected)
            assert all(same_bits(found[key], expected[key]) for key in expected)
            read += 1
    assert 0 < read < count / 2


def assert_odd_states_are_refused_or_read(directory: Path, count: int) -> None:
    path = save(directory, 1)
    whole = json.loads((path / "state.json").read_bytes())
    for odd in odd_forms(whole, count):
        (path / "state.json").write_text(json.dumps(odd))
        (path / "MANIFEST.json").write_bytes(manifest_of(path, step=1))
        assert (outcome(path) is None) == isinstance(odd, dict)
        if isinstance(odd, dict):
            assert load_checkpoint(path).state == odd


CHECKS = [
    assert_odd_manifests_are_refused,
    assert_odd_headers_are_refused_or_read_as_the_library_does,
    assert_odd_states_are_refused_or_read,
]


@pytest.mark.parametrize("check", CHECKS)
def test_odd_json_with_right_digests_ends_in_a_value_or_one_line(tmp_path, check) -> None:
    check(tmp_path, 150)


@pytest.mark.nightly
@pytest.mark.parametrize("check", CHECKS)
def test_2000_odd_jsons_with_right_digests_end_in_a_value_or_one_line(tmp_path, check) -> None:
    check(tmp_path, 2000)


def test_the_untouched_checkpoint_loads_after_all(tmp_path) -> None:
    path = save(tmp_path, 1)
    (path / "MANIFEST.json").write_bytes(manifest_of(path, step=1))
    assert_is_of(load_checkpoint(path), 1)
