"""What is free, by the files in which Linux tells it: of the machine, and of the groups around a process."""

from pathlib import Path

import pytest
import torch

from sparsegate.models.free_memory import available_memory, available_of_machine

UNLIMITED = 9223372036854771712  # what version 1 says of a group without a limit
MACHINE = 8 * 2**30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def machine(root: Path, groups: str | None, files: dict[str, str]) -> int | None:
    proc = {"meminfo": f"MemTotal: 16777216 kB\nMemAvailable: {MACHINE // 1024} kB\nHugePages_Total: 0\n"}
    if groups is not None:
        proc["self/cgroup"] = groups
    write(root / "proc", proc)
    write(root / "cgroup", files)
    return available_of_machine(root / "proc", root / "cgroup")


def v2(folder: str, *, limit: int | str, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    return {
        f"{folder}memory.max": f"{limit}\n",
        f"{folder}memory.current": f"{usage}\n",
        f"{folder}memory.stat": f"anon 7\ninactive_file {inactive}\nactive_file {active}\n",
    }


def v1(folder: str, *, limit: int, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    """Counts of a group alone, without `total_`, leave out the groups in it."""
    counts = {"inactive_file": 1, "total_inactive_file": inactive, "total_active_file": active}
    return {
        f"memory/{folder}memory.limit_in_bytes": f"{limit}\n",
        f"memory/{folder}memory.usage_in_bytes": f"{usage}\n",
        f"memory/{folder}memory.stat": "".join(f"{name} {number}\n" for name, number in counts.items()),
    }


V1_LINES = "9:name=systemd:/\n4:{}:{}\n1:cpu:/other\n0::/\n"
CASES = {
    "no groups": (None, {}, MACHINE),
    "version 2, the container's group is the root": ("0::/\n", v2("", limit=5000, usage=3000), 2000),
    "version 2, without a limit": ("0::/a\n", v2("a/", limit="max", usage=3000), MACHINE),
    "version 2, more than the machine has": ("0::/a\n", v2("a/", limit=1 << 50, usage=3000), MACHINE),
    "version 2, pages of files can be dropped": (
        "0::/a\n",
        v2("a/", limit=5000, usage=3000, inactive=100, active=20),
        2120,
    ),
    "version 2, the group around it is tighter": (
        "0::/pod/a\n",
        v2("pod/a/", limit=9000, usage=3000) | v2("pod/", limit=7000, usage=6500),
        500,
    ),
    "version 2, a path outside of the container": (
        "0::/somewhere/else\n",
        v2("", limit=5000, usage=3000),
        2000,
    ),
    "version 2, a path above the container": ("0::/../a\n", v2("", limit=5000, usage=3000), 2000),
    "version 2, all is taken": ("0::/\n", v2("", limit=5000, usage=5001), 0),
    "version 1": (
        V1_LINES.format("memory", "/docker/1"),
        v1("docker/1/", limit=5000, usage=3000, inactive=100, active=20)
        | v1("", limit=UNLIMITED, usage=9000),
        2120,
    ),
    "version 1, in a container": (
        V1_LINES.format("cpu,memory", "/docker/1"),
        v1("", limit=5000, usage=3000),
        2000,
    ),
    "version 1, without a limit": (
        V1_LINES.format("memory", "/a"),
        v1("a/", limit=UNLIMITED, usage=3000),
        MACHINE,
    ),
    "version 1, a path with a colon": (V1_LINES.format("memory", "/a:b"), v1("a:b/", limit=50, usage=3), 47),
}


@pytest.mark.parametrize(("groups", "files", "free"), CASES.values(), ids=CASES)
def test_free_is_the_least_of_the_machine_and_of_every_group_around(
    groups: str | None, files: dict[str, str], free: int, tmp_path: Path
):
    assert machine(tmp_path, groups, files) == free


def test_where_nobody_tells_nothing_is_known(tmp_path: Path):
    assert available_of_machine(tmp_path / "proc", tmp_path / "cgroup") is None


def test_this_machine_has_memory():
    free = available_memory(torch.device("cpu"))
    assert free is None or free > 2**20
