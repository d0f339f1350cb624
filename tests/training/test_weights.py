import pytest
import safetensors.torch
import torch

from sparsegate.training.storage import CannotSave
from sparsegate.training.weights import export_weights, load_weights
from tests.helpers.checkpoints import assert_same_tensors, same_bits, tensors_of
from tests.helpers.damage import damages
from tests.helpers.os_shim import OsShim

TENSORS = {key: tensor for group in tensors_of(1).values() for key, tensor in group.items()}
METADATA = {"model": "moe-4", "license": "Apache-2.0"}


def test_weights_and_metadata_come_back(tmp_path) -> None:
    export_weights(tmp_path / "moe.safetensors", TENSORS, METADATA)
    tensors, metadata = load_weights(tmp_path / "moe.safetensors")
    assert metadata == METADATA
    assert_same_tensors({"": tensors}, {"": TENSORS})


def test_any_safetensors_reader_opens_them(tmp_path) -> None:
    export_weights(tmp_path / "moe.safetensors", TENSORS, METADATA)
    found = safetensors.torch.load_file(tmp_path / "moe.safetensors")
    assert set(found) == set(TENSORS)
    assert all(same_bits(found[key], TENSORS[key]) for key in TENSORS)


def test_no_damage_changes_a_tensor_in_silence(tmp_path) -> None:
    path = tmp_path / "moe.safetensors"
    export_weights(path, TENSORS, METADATA)
    for name, data in damages(path.read_bytes(), 200):
        path.write_bytes(data)
        try:
            tensors, metadata = load_weights(path)
        except ValueError as error:
            message = str(error)
        else:
            # A change of a space in the header may go through: it changes nothing.
            message = str(path)
            assert metadata == METADATA, name
            assert_same_tensors({"": tensors}, {"": TENSORS})
        assert message.startswith(str(path)), name
        assert "\n" not in message, name


def test_weights_without_a_digest_are_refused(tmp_path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="instead of None; get the file again"):
        load_weights(tmp_path / "foreign.safetensors")


def test_the_old_weights_stay_when_the_disk_is_full(tmp_path, monkeypatch) -> None:
    path = tmp_path / "moe.safetensors"
    export_weights(path, TENSORS, METADATA)

    def full(call: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        OsShim(patch, tmp_path).before = full
        with pytest.raises(CannotSave, match="No space left"):
            export_weights(path, {"a": torch.zeros(5)}, {})
    assert load_weights(path)[1] == METADATA
