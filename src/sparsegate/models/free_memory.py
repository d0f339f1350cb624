"""How much memory there still is, on a GPU or for the processes of this machine or container."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, or for the CPU as Linux tells it; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_of_machine(_PROC, _CGROUPS)


def available_of_machine(proc: Path, cgroups: Path) -> int | None:
    """The least of what the machine has and of what each control group around this process may still take.

    The machine's own figure does not know the limit of a container, which kills what exceeds it. proc,
    cgroups: where these file systems are mounted.
    """
    meminfo, groups = proc / "meminfo", proc / "self" / "cgroup"
    free: list[int] = []
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    if groups.is_file():
        free += _free_of_groups(groups.read_text(), cgroups)
    return min(free, default=None)


@dataclass(frozen=True, kw_only=True)
class _Names:
    """Of a version's files, and of the counts of the pages that the kernel can drop."""

    limit: str
    usage: str
    dropped: tuple[str, str]


_V1 = _Names(
    limit="memory.limit_in_bytes",
    usage="memory.usage_in_bytes",
    dropped=("total_inactive_file", "total_active_file"),
)
_V2 = _Names(limit="memory.max", usage="memory.current", dropped=("inactive_file", "active_file"))


def _free_of_groups(groups: str, cgroups: Path) -> Iterator[int]:
    """groups: a line `number:controllers:path` for each hierarchy; that of version 2 names no controllers."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _free_around(cgroups, path, _V2)
        elif "memory" in controllers.split(","):
            yield from _free_around(cgroups / "memory", path, _V1)


def _free_around(root: Path, path: str, names: _Names) -> Iterator[int]:
    """Of a group and of those that it is in. In a container the root alone may be there: it is the group."""
    group = root / path.strip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(root) and (folder / names.limit).is_file():
            limit = (folder / names.limit).read_text().strip()
            if limit != "max":
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                dropped = sum(int(counts[name]) for name in names.dropped)
                usage = int((folder / names.usage).read_text())
                yield max(int(limit) - usage + dropped, 0)
