"""Checkpoints that several ranks write together, each its own experts, whole or not at all."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import WriteFiles, candidates, checkpoint_name, newest_whole, save_checkpoint, verify
from .parts import DIGESTS, Share, digests_of, part_name, words_name
from .ranks import Ranks
from .storage import UNFINISHED, CannotSave, FileDigest, write_file
from .strict_json import Json
from .tensor_file import encode_tensors

Groups = Mapping[str, Mapping[str, Tensor]]


def latest_on_ranks(directory: Path, *, warn: Callable[[str], None], ranks: Ranks) -> Path | None:
    """As `latest_checkpoint`, on all ranks, each of which reads a share of the files."""
    names = ""
    with ranks.together():
        if ranks.is_first:
            names = "/".join(candidates(directory))
    names = ranks.agree(names)
    share = Share(rank=ranks.rank, num_ranks=ranks.num_ranks)

    def verify_together(path: Path) -> None:
        with ranks.together():
            ranks.however_long(lambda: verify(path, share=share))

    return newest_whole(directory, filter(None, names.split("/")), verify=verify_together, warn=warn)


class _Agreed(OSError):
    """What failed somewhere, and is known to all ranks."""


def save_on_ranks(
    directory: Path,
    *,
    step: int,
    tensors: Groups,
    stacked: Groups,
    words: Groups,
    state: Mapping[str, Json],
    keep: Collection[int],
    ranks: Ranks,
) -> Path:
    """As `save_checkpoint`, by all ranks together, into one directory that all see.

    Args:
        tensors: equal on all ranks; the first one writes them.
        stacked: by file and name, tensors whose first axis is this rank's experts; the same names everywhere.
        words: the same of tensors whose first axis is this rank's words, where the vocabulary is spread.
        ranks: that write together.

    Raises:
        CannotSave, ValueError: on every rank when any of them fails; nothing has changed.
    """
    target = directory / checkpoint_name(step)
    if not ranks.is_first:
        try:
            _go_on(ranks)
            _write(target.with_name(UNFINISHED + target.name), stacked, words, dict, ranks)
            _go_on(ranks)
        except _Agreed as error:
            needed = sum(
                tensor.nbytes for part in (*stacked.values(), *words.values()) for tensor in part.values()
            )
            raise CannotSave(target, needed=needed, cause=error) from error
        return target

    def write_together(temporary: Path, write_common: WriteFiles) -> dict[str, FileDigest]:
        _go_on(ranks)
        files, digests = _write(temporary, stacked, words, write_common, ranks)
        encoded = encode_tensors(digests, name=DIGESTS)
        return {**files, f"{DIGESTS}.safetensors": write_file(_file(temporary, DIGESTS), encoded.chunks())}

    try:
        save_checkpoint(
            directory, step=step, tensors=tensors, state=state, keep=keep, write_together=write_together
        )
    except (OSError, ValueError) as error:
        if not isinstance(error.__cause__, _Agreed):
            _first_problem(str(error), ranks)
        raise
    _go_on(ranks)
    return target


def _write(
    folder: Path, stacked: Groups, words: Groups, write_common: WriteFiles, ranks: Ranks
) -> tuple[dict[str, FileDigest], dict[str, Tensor]]:
    """All ranks at once, each its parts; what all of them wrote, and the digests of all experts.

    write_common: writes what else this rank has to.
    """
    share = ranks.share
    own: dict[str, Json] = {}
    own_digests: dict[str, Tensor] = {}

    def write_own() -> None:
        written = write_common()
        named = {part_name(group, share): part for group, part in stacked.items()}
        named |= {words_name(group, share): part for group, part in words.items() if part}
        named = named if ranks.has_first_copy else {}
        for name, part in named.items():
            encoded = encode_tensors(part, name=name)
            written[f"{name}.safetensors"] = write_file(_file(folder, name), encoded.chunks())
        for group, part in stacked.items():
            own_digests.update({f"{group}/{each}": digests_of(tensor) for each, tensor in part.items()})
        for name, digest in written.items():
            own[name] = {"size": digest.size, "sha256": digest.sha256}

    problem = ""
    try:
        ranks.however_long(write_own)
    except (OSError, ValueError) as error:
        problem = f"rank {ranks.rank}: {error}"
    files: dict[str, FileDigest] = {}
    for answer in ranks.tell_all({"problem": problem, "files": own}):
        match answer:
            case {"problem": "", "files": dict(written)}:
                files |= {name: _parse_digest(entry) for name, entry in written.items()}
            case {"problem": str(problem)}:
                raise _Agreed(problem)
    return files, {name: torch.cat(ranks.gather(rows)) for name, rows in own_digests.items()}


def _parse_digest(entry: Json) -> FileDigest:
    match entry:
        case {"size": int(size), "sha256": str(sha256)}:
            return FileDigest(size, sha256)
    raise AssertionError(entry)


def _go_on(ranks: Ranks) -> None:
    """Together. _Agreed: another rank has told what failed there."""
    if problem := _first_problem("", ranks):
        raise _Agreed(problem)


def _first_problem(problem: str, ranks: Ranks) -> str:
    """Of any rank; "" for none."""
    return next((str(p) for p in ranks.tell_all(problem) if p), "")


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
