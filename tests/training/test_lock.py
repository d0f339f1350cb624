import os
import re
import stat

import pytest

from sparsegate.training.lock import run_lock
from tests.helpers.savers import fork_server, hold_lock_for_ever


def test_a_second_writer_is_refused_in_one_line(tmp_path) -> None:
    with run_lock(tmp_path):
        refusal = f"^{re.escape(str(tmp_path))}: another process [^\n]*process {os.getpid()} on [^\n]*$"
        with pytest.raises(ValueError, match=refusal), run_lock(tmp_path):
            pass
    with run_lock(tmp_path):
        pass


def test_the_lock_is_given_back_when_the_block_fails(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        raise ZeroDivisionError
    with run_lock(tmp_path):
        pass


def test_a_killed_writer_leaves_no_lock(tmp_path) -> None:
    context = fork_server()
    ours, theirs = context.Pipe()
    holder = context.Process(target=hold_lock_for_ever, args=(tmp_path, theirs))
    holder.start()
    assert ours.recv() == "held"
    with pytest.raises(ValueError, match=f"process {holder.pid} on "), run_lock(tmp_path):
        pass
    holder.kill()
    holder.join()
    with run_lock(tmp_path):
        pass


def test_two_runs_do_not_lock_each_other(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with run_lock(tmp_path / "a"), run_lock(tmp_path / "b"):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(OSError, match="lock"), run_lock(tmp_path):
        pass
    assert victim.read_text() == "mine"


def test_the_lock_is_not_inherited_by_programs(tmp_path) -> None:
    with run_lock(tmp_path):
        inode = os.stat(tmp_path / "lock").st_ino
        descriptors = [fd for fd in range(3, 256) if inode_of(fd) == inode]
        assert descriptors
        assert not any(os.get_inheritable(fd) for fd in descriptors)


def inode_of(descriptor: int) -> int | None:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_ino if stat.S_ISREG(status.st_mode) else None
