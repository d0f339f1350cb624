"""When the disk refuses a save, the checkpoint before is intact and the latest, and nothing else is left."""

import errno
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparsegate.training.checkpoint import CannotSave
from tests.helpers.checkpoints import latest_step, save, unfinished
from tests.helpers.crash_states import read_tree
from tests.helpers.os_shim import Call, OsShim

POINTS = 10
NUMEL = 20_000  # 0.3 MB in all
FAULTS = {"full": errno.ENOSPC, "quota": errno.EDQUOT, "failing": errno.EIO, "read-only": errno.EROFS}
WRITING = ("create", "mkdir", "write", "fsync")


def assert_refused(directory: Path, before: dict) -> None:
    """The save of step 9 fails in one line that tells path, need and free bytes; step 5 is untouched."""
    with pytest.raises(CannotSave, match="^[^\n]+$") as refusal:
        save(directory, 9, numel=NUMEL)
    target = re.escape(str(directory / "step-00000009"))
    sizes = re.match(
        rf"{target}: cannot save: .+ \(([0-9,]+) bytes needed, ([0-9,]+) free\); ", str(refusal.value)
    )
    assert sizes, refusal.value
    content = sum(map(len, before["step-00000005"].values()))
    assert 0.9 * content < int(sizes[1].replace(",", "")) <= content
    assert read_tree(directory) == before
    assert latest_step(directory, numel=NUMEL) == 5


def calls_of_a_save(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    with monkeypatch.context() as patch:
        shim = OsShim(patch, directory)
        save(directory, 9, keep={5}, numel=NUMEL)
    return shim.calls


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("point", range(POINTS))
def test_a_refused_call_at_any_point_of_a_save_changes_nothing(tmp_path, monkeypatch, fault, point) -> None:
    save(tmp_path / "example", 5, numel=NUMEL)
    calls = calls_of_a_save(tmp_path / "example", monkeypatch)
    first = point * (len(calls) - 1) // (POINTS - 1)
    directory = tmp_path / "checkpoints"
    save(directory, 5, numel=NUMEL)
    before = read_tree(directory)
    with monkeypatch.context() as patch:
        shim, seen = OsShim(patch, directory), iter(range(10_000))

        def refuse(call: Call) -> None:
            # From its first refusal on, a full disk takes no more data; names can still be changed.
            index = next(seen)
            if index == first or (index > first and call.kind in WRITING):
                raise OSError(FAULTS[fault], os.strerror(FAULTS[fault]))

        shim.before = refuse
        assert_refused(directory, before)
    save(directory, 9, numel=NUMEL)
    assert latest_step(directory, numel=NUMEL) == 9


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses every write beyond `size` bytes of a file, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("point", range(POINTS))
def test_a_limit_of_the_kernel_at_any_size_changes_nothing(tmp_path, point) -> None:
    path = save(tmp_path, 5, numel=NUMEL)
    before = read_tree(tmp_path)
    largest = max(file.stat().st_size for file in path.iterdir())
    with largest_file(largest * point // POINTS):
        assert_refused(tmp_path, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 2 MB of its own, where the test may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "sparsegate-test", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a filesystem")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_at_any_point_keeps_the_checkpoint_before(small_disk) -> None:
    directory = small_disk / "checkpoints"
    path = save(directory, 5, numel=NUMEL)
    before, size = read_tree(directory), sum(file.stat().st_size for file in path.iterdir())
    for point in range(POINTS):
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "filler").write_bytes(bytes(free - size * point // POINTS))
        assert_refused(directory, before)
        (small_disk / "filler").unlink()
    save(directory, 9, numel=NUMEL)
    assert latest_step(directory, numel=NUMEL) == 9


def test_a_read_only_disk_keeps_the_checkpoint_before(small_disk) -> None:
    directory = small_disk / "checkpoints"
    save(directory, 5, numel=NUMEL)
    before = read_tree(directory)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_refused(directory, before)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_directory_keeps_the_checkpoint_before(tmp_path) -> None:
    directory = tmp_path / "checkpoints"
    save(directory, 5, numel=NUMEL)
    before = read_tree(directory)
    directory.chmod(0o555)
    try:
        assert_refused(directory, before)
    finally:
        directory.chmod(0o755)


def test_a_file_in_the_place_of_the_directory_is_told(tmp_path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(CannotSave, match="checkpoints/step-00000009: cannot save: File exists"):
        save(tmp_path / "checkpoints", 9)
    assert (tmp_path / "checkpoints").read_text() == "mine"
    assert unfinished(tmp_path) == ["checkpoints"]
