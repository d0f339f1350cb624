"""The experts of a checkpoint that several ranks wrote: a file of each rank's, a digest for each expert.

    model_part_0_of_4.safetensors  model_part_1_of_4.safetensors  ...  digests.safetensors

A part has the rows that its rank had of every tensor whose first axis is experts, under the names of the
whole tensors. The digests are SHA-256, one for each row of each tensor. Loading takes the rows it wants from
the parts that have them, whatever the number of ranks was and is, and proves each row by its digest.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.placement import experts_of

DIGESTS = "digests"

Tensors = dict[str, Tensor]
_PART = re.compile(r"([a-z][a-z0-9_]*)_part_([0-9]+)_of_([0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of the experts are wanted: those of `rank` among `num_ranks`."""

    rank: int
    num_ranks: int

    def of(self, num_experts: int) -> range:
        return experts_of(self.rank, num_experts=num_experts, num_ranks=self.num_ranks)


def part_name(group: str, share: Share) -> str:
    """The name of a file of parts, without its ending."""
    return f"{group}_part_{share.rank}_of_{share.num_ranks}"


def is_part(name: str) -> bool:
    """Whether a file is one of parts, by its name without the ending."""
    return _PART.fullmatch(name) is not None


def digests_of(tensor: Tensor) -> Tensor:
    """SHA-256 of each row: of its dtype and shape, then its bytes. uint8 [E, 32]."""
    kind = hashlib.sha256(f"{tensor.dtype} {[*tensor.shape[1:]]}".encode())
    rows = tensor.detach().cpu().contiguous().reshape(tensor.shape[0], -1).view(torch.uint8).numpy()
    digests = bytearray()
    for row in rows:
        sha256 = kind.copy()
        sha256.update(row.data)
        digests += sha256.digest()
    return torch.frombuffer(digests, dtype=torch.uint8).view(-1, 32)


def read_parts(
    names: Iterable[str], digests: Mapping[str, Tensor], read: Callable[[str], Tensors], share: Share | None
) -> dict[str, Tensors]:
    """The wanted rows of all stacked tensors, by group and name; None: all of them.

    names: of the files, without endings. digests: `GROUP/NAME` to [E, 32]. read: reads a file of a name.

    ValueError: names the first expert that is missing or altered.
    """
    found: dict[str, Tensors] = {}
    for group, wanted in _by_group(digests).items():
        files = _files_of(group, names)
        pieces: dict[str, list[Tensor]] = {name: [] for name in wanted}
        for part in files:
            have = {name: part.of(len(digest)) for name, digest in wanted.items()}
            want = {
                n: have[n] if share is None else _overlap(have[n], share.of(len(wanted[n]))) for n in wanted
            }
            if not any(want.values()):
                continue
            tensors = _read_part(part_name(group, part), have, wanted, read)
            for name, experts in want.items():
                first = have[name].start
                rows = tensors[name][experts.start - first : experts.stop - first]
                pieces[name].append(rows)
        found[group] = {name: torch.cat(rows) for name, rows in pieces.items()}
    return found


def _read_part(
    file: str, have: dict[str, range], digests: Mapping[str, Tensor], read: Callable[[str], Tensors]
) -> Tensors:
    """A file of parts in which every expert is there and is what it was."""
    try:
        tensors = read(file)
    except ValueError as error:
        name, experts = next(iter(have.items()))
        raise ValueError(f"{error}; it has experts {_numbers(experts)} of {name}") from error
    for name, experts in have.items():
        if name not in tensors or tensors[name].shape[:1] != (len(experts),):
            raise ValueError(f"{file}: experts {_numbers(experts)} of {name} are missing")
        same_E = (digests_of(tensors[name]) == digests[name][experts.start : experts.stop]).all(dim=1)
        if not same_E.all():
            expert = experts[int(same_E.int().argmin())]
            raise ValueError(f"{file}: expert {expert} of {name} is not the one that was saved")
    return tensors


def _by_group(digests: Mapping[str, Tensor]) -> dict[str, Tensors]:
    groups: dict[str, Tensors] = {}
    for path, digest in digests.items():
        if digest.dtype != torch.uint8 or digest.shape[1:] != (32,):
            raise ValueError(f"{DIGESTS}: {path} is not one SHA-256 for each expert")
        group, _, name = path.partition("/")
        groups.setdefault(group, {})[name] = digest
    return groups


def _files_of(group: str, names: Iterable[str]) -> list[Share]:
    """The parts of a group, in the order of the ranks that wrote them."""
    matches = [match for name in names if (match := _PART.fullmatch(name)) and match[1] == group]
    parts = sorted(int(match[2]) for match in matches)
    if not parts or {int(match[3]) for match in matches} != {len(parts)} or parts != [*range(len(parts))]:
        raise ValueError(f"the parts of {group} are not complete: there are {len(parts)}")
    return [Share(rank=part, num_ranks=len(parts)) for part in parts]


def _overlap(a: range, b: range) -> range:
    first = max(a.start, b.start)
    return range(first, max(first, min(a.stop, b.stop)))


def _numbers(experts: range) -> str:
    return f"{experts.start} to {experts.stop - 1}"
