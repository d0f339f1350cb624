import hashlib
import json
import os
import re
import warnings

import pytest
import torch

from sparsegate.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from sparsegate.training.strict_json import MAX_JSON_BYTES
from tests.helpers.checkpoints import (
    assert_is_of,
    assert_same_tensors,
    latest_step,
    save,
    unfinished,
)
from tests.helpers.hostile import manifest_of
from tests.helpers.os_shim import Call, OsShim


def steps(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def break_checkpoint(path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path) -> None:
    path = save(tmp_path / "checkpoints", 123)
    assert path == tmp_path / "checkpoints" / "step-00000123"
    assert_is_of(load_checkpoint(path), 123)


def test_non_finite_and_signed_zero_tensors_keep_their_bits(tmp_path) -> None:
    values = torch.tensor([0x7FC00001, 0x7F800000, 0x80000000 - 2**32, 1], dtype=torch.int32).view(
        torch.float32
    )
    path = save_checkpoint(tmp_path, step=1, tensors={"model": {"w": values}}, state={}, keep=[])
    assert_same_tensors(load_checkpoint(path).tensors, {"model": {"w": values}})


def test_what_is_loaded_is_a_copy_of_its_own(tmp_path) -> None:
    path = save(tmp_path, 1)
    first, second = load_checkpoint(path), load_checkpoint(path)
    for tensor in first.tensors["model"].values():
        tensor.zero_()
    assert_is_of(second, 1)
    assert_is_of(load_checkpoint(path), 1)


def test_files_that_are_not_wanted_are_proved_and_not_kept(tmp_path) -> None:
    path = save(tmp_path, 1)
    whole = load_checkpoint(path)
    assert len(whole.tensors) > 1
    model = load_checkpoint(path, only=["model"])
    assert model.tensors.keys() == {"model"}
    assert_same_tensors(model.tensors, {"model": whole.tensors["model"]})
    other = next(name for name in whole.tensors if name != "model")
    data = bytearray((path / f"{other}.safetensors").read_bytes())
    data[-1] ^= 1
    (path / f"{other}.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=rf"{other}\.safetensors: damaged"):
        load_checkpoint(path, only=["model"])


def test_what_a_file_is_read_into_is_given_out(tmp_path) -> None:
    path = save(tmp_path, 1)
    expected = load_checkpoint(path).tensors["model"]
    own = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    found = load_checkpoint(path, targets={"model": lambda described: own}).tensors["model"]
    assert_same_tensors({"model": own}, {"model": expected})
    assert all(found[name] is own[name] for name in own)


def test_the_manifest_is_what_its_description_says(tmp_path) -> None:
    path = save(tmp_path, 7)
    assert (path / "MANIFEST.json").read_bytes() == manifest_of(path, step=7)
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    assert set(manifest["files"]) == {path.name for path in path.iterdir()} - {"MANIFEST.json"}
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_all_checkpoints_but_the_new_and_the_kept_are_deleted(tmp_path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep={2, step - 1})
    assert steps(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    save(tmp_path, 6)
    assert steps(tmp_path) == ["step-00000006"]


def test_no_checkpoint_at_all_is_none(tmp_path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def test_the_latest_is_the_greatest_step_not_the_last_name(tmp_path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, keep={99_999_999})
    assert latest_step(tmp_path) == 100_000_000


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_that_names_the_file(tmp_path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep={1, 2})
    break_checkpoint(tmp_path / "step-00000003")
    told: list[str] = []
    assert latest_checkpoint(tmp_path, warn=told.append) == tmp_path / "step-00000002"
    assert len(told) == 1
    assert re.fullmatch("[^\n]*step-00000003/model.safetensors: damaged: its SHA-256[^\n]*", told[0])
    with pytest.warns(UserWarning, match=r"step-00000003/model\.safetensors: damaged"):
        latest_checkpoint(tmp_path)


def test_if_all_are_damaged_that_is_an_error(tmp_path) -> None:
    for step in (1, 2):
        break_checkpoint(save(tmp_path, step, keep={1}))
    with pytest.raises(ValueError, match="^[^\n]*no checkpoint can be used[^\n]*$"):
        latest_checkpoint(tmp_path, warn=lambda message: None)


def test_a_step_that_is_saved_again_is_replaced(tmp_path) -> None:
    save_checkpoint(tmp_path, step=4, tensors={}, state={"old": True}, keep=[])
    save(tmp_path, 4)
    assert steps(tmp_path) == ["step-00000004"]
    assert latest_step(tmp_path) == 4


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(tmp_path) -> None:
    save(tmp_path, 3)
    break_checkpoint(save(tmp_path, 4, keep={3}))
    assert latest_step(tmp_path) == 3
    save(tmp_path, 4, keep={3})
    assert latest_step(tmp_path) == 4
    assert unfinished(tmp_path) == []


def test_what_a_killed_writer_left_is_ignored_and_removed(tmp_path) -> None:
    save(tmp_path, 1)
    for name in (".tmp-step-00000002", ".old-step-00000000", ".tmp-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-best.json").write_text("{")
    (tmp_path / "notes.txt").write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_step(tmp_path) == 1
    save(tmp_path, 2, keep={1})
    assert steps(tmp_path) == ["notes.txt", "step-00000001", "step-00000002"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch) -> None:
    save(tmp_path, 1)
    rename = os.rename

    def refuse(source, target) -> None:
        if str(target).endswith(".old-step-00000001"):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.warns(UserWarning, match="cannot delete an old checkpoint: .*Permission denied"):
        save(tmp_path, 2)
    assert latest_step(tmp_path) == 2


@pytest.mark.parametrize("step", [0, 10])
@pytest.mark.parametrize(
    ("tensors", "state", "cause"),
    [
        ({"model": {"w": torch.eye(2).to_sparse()}}, {}, "model: tensor 'w' is torch.sparse_coo"),
        ({"model": {}}, {"curve": [float("nan")]}, r"state.curve\[0\] is nan"),
        ({"../model": {}}, {}, r"tensors \('../model.safetensors'\) must be named by small letters"),
        ({"": {}}, {}, "must be named by small letters"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path, step, tensors, state, cause
) -> None:
    save(tmp_path / "checkpoints", 5)
    with pytest.raises(ValueError, match=f"^[^\n]*{cause}[^\n]*$"):
        save_checkpoint(tmp_path / "checkpoints", step=step, tensors=tensors, state=state, keep=[])
    assert steps(tmp_path) == ["checkpoints"]
    assert steps(tmp_path / "checkpoints") == ["step-00000005"]


@pytest.mark.parametrize("kind", ["mkdir", "create", "write", "fsync", "rename"])
def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch, kind) -> None:
    save(tmp_path, 1)

    def interrupt(call: Call) -> None:
        if call.kind == kind:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        OsShim(patch, tmp_path).before = interrupt
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert steps(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("step-00000099", "there is no such checkpoint"),
        ("file", "not a directory"),
        ("step-00000002", "its name must be step-00000001"),
        ("best", "its name must be step-00000001"),
        ("link", "not a directory"),
        ("empty", "MANIFEST.json: missing"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_a_cure(tmp_path, name, cause) -> None:
    path = save(tmp_path, 1)
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "empty").mkdir()
    if name in ("step-00000002", "best"):
        path.rename(tmp_path / name)
    with pytest.raises(
        ValueError, match=f"^{tmp_path / name}[^\n]*{cause}[^\n]*; restore it from a copy[^\n]*$"
    ):
        load_checkpoint(tmp_path / name)


def test_a_state_over_the_limit_is_refused_before_it_is_read(tmp_path) -> None:
    path = save(tmp_path, 1)
    os.truncate(path / "state.json", MAX_JSON_BYTES + 1)
    (path / "MANIFEST.json").write_bytes(manifest_of(path, step=1))
    for use in (load_checkpoint, lambda path: latest_checkpoint(tmp_path, warn=lambda message: None)):
        with pytest.raises(ValueError, match="MANIFEST.json: state.json of [0-9,]+ bytes is over the limit"):
            use(path)


def test_another_format_is_told_apart_from_damage(tmp_path) -> None:
    path = save(tmp_path, 1)
    (path / "MANIFEST.json").write_bytes(manifest_of(path, step=1, format_number=2))
    with pytest.raises(ValueError, match="format 2, where this version of sparsegate reads format 1"):
        load_checkpoint(path)
