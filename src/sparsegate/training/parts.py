"""What of a checkpoint several ranks wrote: a file of each rank's experts, a digest for each expert.

    model_part_0_of_4.safetensors  model_part_1_of_4.safetensors  ...  digests.safetensors

A part has the rows that its rank had of every tensor whose first axis is experts, under the names of the
whole tensors. The digests are SHA-256, one for each row of each tensor. Loading takes the rows it wants from
the parts that have them, whatever the number of ranks was and is, and proves each row by its digest.

    model_words_0_of_4.safetensors  ...

Where the vocabulary is spread, these have each rank's words of every tensor whose first axis is words. They
are proved as whole files.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.placement import experts_of
from .tensor_file import Targets

DIGESTS = "digests"

Tensors = dict[str, Tensor]
_EXPERTS, _WORDS = "part", "words"
_PART = re.compile(rf"([a-z][a-z0-9_]*)_({_EXPERTS}|{_WORDS})_([0-9]+)_of_([0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of the experts or words are wanted: those of `rank` among `num_ranks`."""

    rank: int
    num_ranks: int

    def of(self, num_experts: int) -> range:
        return experts_of(self.rank, num_experts=num_experts, num_ranks=self.num_ranks)


def part_name(group: str, share: Share, *, kind: str = _EXPERTS) -> str:
    """The name of a file of parts, without its ending."""
    return f"{group}_{kind}_{share.rank}_of_{share.num_ranks}"


def words_name(group: str, share: Share) -> str:
    """The name of a file of words, without its ending."""
    return part_name(group, share, kind=_WORDS)


def is_part(name: str) -> bool:
    """Whether a file is one of parts, by its name without the ending."""
    return _PART.fullmatch(name) is not None


def group_of(name: str) -> str:
    """What a file is of, by its name without the ending."""
    match = _PART.fullmatch(name)
    return name if match is None else match[1]


def digests_of(tensor: Tensor) -> Tensor:
    """SHA-256 of each row: of its dtype and shape, then its bytes. uint8 [E, 32]."""
    kind = hashlib.sha256(f"{tensor.dtype} {[*tensor.shape[1:]]}".encode())
    digests_E32 = torch.empty(len(tensor), 32, dtype=torch.uint8)
    for row, digest in zip(tensor.detach().cpu().contiguous(), digests_E32.numpy(), strict=True):
        sha256 = kind.copy()
        sha256.update(row.flatten().view(torch.uint8).numpy().data)
        digest[:] = bytearray(sha256.digest())
    return digests_E32


def read_parts(
    names: Iterable[str],
    digests: Mapping[str, Tensor],
    read: Callable[[str, Targets], Tensors],
    share: Share | None,
    targets: Mapping[str, Targets],
) -> dict[str, Tensors]:
    """The wanted rows of all stacked tensors, by group and name; None: all of them.

    names: of the files, without endings. digests: `GROUP/NAME` to [E, 32]. read: reads a file of a name into
    what it is told. targets: by group, what the wanted rows are to be in; in memory of their own where it
    does not say. One part is beside them, if none of it can be read into its place.

    ValueError: names the first expert that is missing or altered.
    """
    found: dict[str, Tensors] = {}
    for group, wanted in _by_group(digests).items():
        all_rows = {name: range(len(digest)) for name, digest in wanted.items()}
        rows = all_rows if share is None else {name: share.of(len(r)) for name, r in all_rows.items()}
        found[group] = {}
        for part in _files_of(group, names, _EXPERTS):
            have = {name: part.of(len(digest)) for name, digest in wanted.items()}
            want = {name: _overlap(have[name], rows[name]) for name in wanted}
            if not any(want.values()):
                continue
            places: Tensors = {}

            def put(
                described: Mapping[str, Tensor],
                group: str = group,
                have: dict[str, range] = have,
                want: dict[str, range] = want,
                rows: dict[str, range] = rows,
                places: Tensors = places,
            ) -> Tensors:
                found[group] = found[group] or _places(described, rows, targets.get(group))
                for name, place in found[group].items():
                    first = rows[name].start
                    places[name] = place[want[name].start - first : want[name].stop - first]
                # Only what is as the file has it can be proved by its digests.
                return {
                    name: place
                    for name, place in places.items()
                    if name in described
                    and have[name] == want[name]
                    and place.device.type == "cpu"
                    and (place.dtype, place.shape) == (described[name].dtype, described[name].shape)
                }

            tensors = _read_part(part_name(group, part), have, wanted, lambda file: read(file, put))
            for name, place in places.items():
                if tensors[name] is not place:
                    first = have[name].start
                    place.copy_(tensors[name][want[name].start - first : want[name].stop - first])
    return found


def _places(described: Mapping[str, Tensor], rows: Mapping[str, range], targets: Targets | None) -> Tensors:
    """Where the wanted rows of stacked tensors go; described: any part of these, on the meta device."""
    whole = {
        name: described[name].new_empty(len(wanted), *described[name].shape[1:])
        for name, wanted in rows.items()
        if name in described and described[name].dim()
    }
    given = {} if targets is None else targets(whole)
    return {
        name: given[name].detach() if name in given else torch.empty_like(tensor, device="cpu")
        for name, tensor in whole.items()
    }


def read_words(
    names: Iterable[str],
    read: Callable[[str, Targets | None], Tensors],
    share: Share | None,
    targets: Mapping[str, Targets],
) -> dict[str, Tensors]:
    """The wanted rows of all tensors whose first axis is words, by group and name; None: all of them.

    names: of the files, without endings. read: reads a file of a name, whose bytes are all right, into what
    it is told. targets: by group, what the wanted rows are to be in. Those that another number of ranks wrote
    are beside them first.

    ValueError: words are missing.
    """
    names = [name for name in names if (match := _PART.fullmatch(name)) and match[2] == _WORDS]
    found: dict[str, Tensors] = {}
    for group in dict.fromkeys(group_of(name) for name in names):
        parts, into = _files_of(group, names, _WORDS), targets.get(group)
        if share is not None and share.num_ranks == len(parts):
            found[group] = read(words_name(group, share), into)
            continue
        pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for part in parts:
            for name, rows in read(words_name(group, part), None).items():
                if not rows.dim():
                    raise ValueError(f"{words_name(group, part)}: {name} has no words")
                word_N = part.rank + part.num_ranks * torch.arange(len(rows))
                if share is not None:
                    is_wanted_N = word_N % share.num_ranks == share.rank
                    word_N, rows = word_N[is_wanted_N], rows[is_wanted_N]
                pieces.setdefault(name, []).append((word_N, rows))
        found[group] = {name: _in_order(name, own, share) for name, own in pieces.items()}
        for name, place in ({} if into is None else into(found[group])).items():
            found[group][name] = place.detach().copy_(found[group][name])
    return found


def _in_order(name: str, pieces: list[tuple[Tensor, Tensor]], share: Share | None) -> Tensor:
    """The rows in the order of their words, which are all there."""
    words = torch.cat([word_N for word_N, _ in pieces])
    word_N, order_N = words.sort()
    first, step = (0, 1) if share is None else (share.rank, share.num_ranks)
    if not torch.equal(word_N, first + step * torch.arange(len(word_N))):
        raise ValueError(f"words of {name} are missing")
    return torch.cat([rows for _, rows in pieces])[order_N]


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


def _files_of(group: str, names: Iterable[str], kind: str) -> list[Share]:
    """The parts of a group, in the order of the ranks that wrote them."""
    matches = [match for name in names if (match := _PART.fullmatch(name))]
    matches = [match for match in matches if (match[1], match[2]) == (group, kind)]
    parts = sorted(int(match[3]) for match in matches)
    if not parts or {int(match[4]) for match in matches} != {len(parts)} or parts != [*range(len(parts))]:
        raise ValueError(f"the parts of {group} are not complete: there are {len(parts)}")
    return [Share(rank=part, num_ranks=len(parts)) for part in parts]


def _overlap(a: range, b: range) -> range:
    first = max(a.start, b.start)
    return range(first, max(first, min(a.stop, b.stop)))


def _numbers(experts: range) -> str:
    return f"{experts.start} to {experts.stop - 1}"
