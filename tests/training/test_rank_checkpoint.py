"""A checkpoint that ranks write loads at any number of ranks, expert by expert, or names what is wrong."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsegate.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from sparsegate.training.parts import Share, digests_of
from sparsegate.training.storage import FileDigest, write_file
from sparsegate.training.tensor_file import encode_tensors
from tests.helpers.checkpoints import unfinished
from tests.helpers.rank_savers import (
    assert_loads,
    failing_save_of_a_rank,
    latest_of_a_rank,
    save_of_a_rank,
    slow_work_of_a_rank,
)


@pytest.fixture(params=[1, 3, 4])
def saved(request, ranks, tmp_path) -> Path:
    return Path(ranks.run(save_of_a_rank, request.param, str(tmp_path), 7)[0])


@pytest.fixture
def saved_at_4(ranks, tmp_path) -> Path:
    return Path(ranks.run(save_of_a_rank, 4, str(tmp_path), 7)[0])


def test_it_loads_bit_for_bit_at_any_number_of_ranks(saved):
    assert_loads(saved, None)
    for num_ranks in (1, 2, 3, 4, 8):
        for rank in range(num_ranks):
            assert_loads(saved, Share(rank=rank, num_ranks=num_ranks))
    assert latest_checkpoint(saved.parent) == saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [None, *(Share(rank=rank, num_ranks=3) for rank in range(3))])
def test_stacked_experts_are_read_into_what_they_are_given(dtype, share, saved_at_4):
    """Parts of which only some rows are wanted, or of another dtype, are copied."""
    expected = load_checkpoint(saved_at_4, share=share).tensors["model"]
    own = {name: torch.zeros_like(tensor).to(dtype) for name, tensor in expected.items()}

    def targets(described):
        return {name: own[name] for name in described}

    found = load_checkpoint(saved_at_4, share=share, targets={"model": targets}).tensors["model"]
    for name, tensor in expected.items():
        assert torch.equal(own[name], tensor.to(dtype))
        assert found[name].data_ptr() == own[name].data_ptr()


def test_every_rank_wrote_its_own_experts(saved_at_4):
    names = sorted(path.name for path in saved_at_4.glob("model_part*"))
    assert names == [f"model_part_{rank}_of_4.safetensors" for rank in range(4)]
    assert [len(load_file(saved_at_4 / name)["moe.experts.w_in"]) for name in names] == [3, 2, 2, 2]


@pytest.mark.parametrize("wanted", [None, Share(rank=1, num_ranks=3)])
def test_an_altered_expert_is_refused_by_its_name(wanted, saved_at_4):
    """Also where the manifest was altered with it."""
    file = saved_at_4 / "model_part_1_of_4.safetensors"
    tensors = load_file(file)
    tensors["moe.experts.w_in"][1, 0, 0] += 1
    rewrite(file, tensors)
    with pytest.raises(ValueError, match=r"expert 4 of moe\.experts\.w_in is not the one that was saved"):
        load_checkpoint(saved_at_4, share=wanted)


def test_an_expert_of_another_dtype_with_the_same_bytes_is_refused(saved_at_4):
    file = saved_at_4 / "model_part_0_of_4.safetensors"
    tensors = load_file(file)
    tensors["moe.experts.w_in"] = tensors["moe.experts.w_in"].view(torch.int32)
    rewrite(file, tensors)
    with pytest.raises(ValueError, match=r"expert 0 of moe\.experts\.w_in is not the one"):
        load_checkpoint(saved_at_4)


def test_a_missing_expert_is_refused_by_its_name(saved_at_4):
    file = saved_at_4 / "model_part_2_of_4.safetensors"
    tensors = load_file(file)
    tensors["two.w_in"] = tensors["two.w_in"][:1].clone()
    rewrite(file, tensors)
    with pytest.raises(ValueError, match=r"model_part_2_of_4: experts 4 to 5 of two\.w_in are missing"):
        load_checkpoint(saved_at_4)


def test_altered_words_are_refused_where_they_are_read(saved_at_4):
    file = saved_at_4 / "model_words_1_of_4.safetensors"
    tensors = load_file(file)
    tensors["softmax.bias"][0] += 1
    save_file(tensors, file)
    share = Share(rank=0, num_ranks=4)
    assert (
        len(load_checkpoint(saved_at_4, share=share, word_share=share).tensors["model"]["softmax.bias"]) == 3
    )
    for word_share in (None, Share(rank=1, num_ranks=4), Share(rank=0, num_ranks=3)):
        with pytest.raises(ValueError, match="model_words_1_of_4"):
            load_checkpoint(saved_at_4, word_share=word_share)


@pytest.mark.parametrize("alter", [lambda t: t[:1].clone(), lambda t: t[0].clone()], ids=["fewer", "none"])
def test_missing_words_are_refused_by_the_name_of_their_tensor(alter, saved_at_4):
    """Also where the manifest was altered with them."""
    file = saved_at_4 / "model_words_1_of_4.safetensors"
    tensors = load_file(file)
    tensors["softmax.bias"] = alter(tensors["softmax.bias"])
    rewrite(file, tensors)
    with pytest.raises(ValueError, match=r"softmax\.bias"):
        load_checkpoint(saved_at_4)


@pytest.mark.parametrize("in_manifest", [True, False])
def test_a_missing_part_is_refused_by_its_experts(in_manifest, saved_at_4):
    (saved_at_4 / "model_part_3_of_4.safetensors").unlink()
    if not in_manifest:
        rewrite_manifest(saved_at_4)
    message = r"missing; it has experts 7 to 8 of moe\.experts\.w_in" if in_manifest else "are not complete"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved_at_4)


def test_a_part_that_is_not_wanted_is_not_read(saved_at_4):
    (saved_at_4 / "model_part_3_of_4.safetensors").write_bytes(b"")
    assert_loads(saved_at_4, Share(rank=0, num_ranks=4))
    with pytest.raises(ValueError, match="model_part_3_of_4"):
        load_checkpoint(saved_at_4, share=Share(rank=1, num_ranks=2))


@pytest.mark.parametrize(
    ("digests", "part", "message"),
    [
        (torch.ones((), dtype=torch.uint8), torch.ones(4, 3), "is not one SHA-256 for each expert"),
        (torch.ones(4, 5, dtype=torch.uint8), torch.ones(4, 3), "is not one SHA-256 for each expert"),
        (torch.ones(4, 32), torch.ones(4, 3), "is not one SHA-256 for each expert"),
        (torch.ones(1, 32, dtype=torch.uint8), torch.ones(()), r"experts 0 to 0 of w are missing"),
        (
            torch.ones(4, 32, dtype=torch.uint8),
            torch.ones(4, 3),
            "expert 0 of w is not the one that was saved",
        ),
    ],
)
def test_odd_tensors_with_right_sums_are_refused_in_one_line(digests, part, message, tmp_path):
    path = written_in_parts(tmp_path, {"w": part}, {"model/w": digests})
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_a_group_may_be_parts_alone(tmp_path):
    """There may be no tensor that all ranks have."""
    w = torch.arange(6.0).view(3, 2)
    path = written_in_parts(tmp_path, {"w": w}, {"model/w": digests_of(w)})
    assert torch.equal(load_checkpoint(path).tensors["model"]["w"], w)


@pytest.mark.parametrize(
    ("who", "file"),
    [(2, "model_part_2"), (0, "optimizer_part_0"), (0, "digests"), (1, "model_words_1")],
    ids=str,
)
def test_when_one_rank_cannot_write_none_has_saved(who, file, ranks, tmp_path):
    before = Path(ranks.run(save_of_a_rank, 3, str(tmp_path), 7)[0])
    said = ranks.run(failing_save_of_a_rank, 3, str(tmp_path), 8, who, file)
    assert all("CannotSave" in words and "No space left" in words for words in said), said
    assert not any("(0 bytes needed" in words for words in said)
    assert latest_checkpoint(tmp_path) == before
    assert unfinished(tmp_path) == []
    ranks.run(save_of_a_rank, 3, str(tmp_path), 8)
    assert_loads(tmp_path / "step-00000008", None)


def written_in_parts(folder: Path, part: dict, digests: dict) -> Path:
    """A checkpoint of one part and nothing else, under a manifest that fits."""

    def write_together(temporary: Path, write_common) -> dict[str, FileDigest]:
        files = {"model_part_0_of_1": part, "digests": digests}
        return {
            f"{name}.safetensors": write_file(
                temporary / f"{name}.safetensors", encode_tensors(tensors, name=name).chunks()
            )
            for name, tensors in files.items()
        }

    return save_checkpoint(folder, step=1, tensors={}, state={}, keep=(), write_together=write_together)


def test_each_file_is_verified_by_one_rank(saved_at_4, ranks):
    found = ranks.run(latest_of_a_rank, 3, str(saved_at_4.parent))
    assert {(name, len(warnings)) for name, warnings, _ in found} == {(saved_at_4.name, 0)}
    files = json.loads((saved_at_4 / "MANIFEST.json").read_text())["files"]
    assert sorted(name for _, _, read in found for name in read) == sorted(files)
    assert all(len(read) <= 1 + len(files) // 3 for _, _, read in found)


def test_what_any_rank_finds_damaged_is_passed_over_by_all(saved_at_4, ranks):
    newer = Path(ranks.run(save_of_a_rank, 2, str(saved_at_4.parent), 8, [7])[0])
    for file in newer.glob("*.safetensors"):
        altered = bytearray(file.read_bytes())
        altered[-1] ^= 1
        whole, _ = file.read_bytes(), file.write_bytes(altered)
        found = ranks.run(latest_of_a_rank, 3, str(saved_at_4.parent))
        assert {name for name, _, _ in found} == {saved_at_4.name}
        assert f"{file.name}: damaged" in found[0][1][0]
        file.write_bytes(whole)
    assert {name for name, _, _ in ranks.run(latest_of_a_rank, 3, str(newer.parent))} == {newer.name}


def test_a_rank_that_works_for_longer_than_ranks_wait_ends_nothing(ranks):
    expected = ["done by 0", "done by 1", "done by 2"]
    assert ranks.run(slow_work_of_a_rank, 3, 1, 8.0, 5.0, False) == expected


def test_work_that_fails_on_one_rank_fails_there_when_all_are_done(ranks):
    expected = ["done by 0", "it failed", "done by 2"]
    assert ranks.run(slow_work_of_a_rank, 3, 1, 0.1, 20.0, True) == expected


def rewrite(file: Path, tensors: dict) -> None:
    """Another content, and a manifest that says so."""
    save_file(tensors, file)
    rewrite_manifest(file.parent)


def rewrite_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    del manifest["sha256"]
    for name in list(manifest["files"]):
        if not (folder / name).exists():
            del manifest["files"][name]
            continue
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")
