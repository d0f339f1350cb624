"""Checkpoints: directories of safetensors and JSON under a manifest of digests. Nothing in them is ever run.

    step-00000123/MANIFEST.json  model.safetensors  optimizer.safetensors  state.safetensors  state.json

A checkpoint is there whole or not at all (see `storage`), is given out only if every byte is the one that was
written, and is deleted only when another one is on the disk.
"""

import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from .parts import DIGESTS, Share, group_of, is_part, read_parts, read_words
from .storage import (
    REPLACED,
    RETIRED,
    UNFINISHED,
    CannotSave,
    FileDigest,
    FileReader,
    directory_atomically,
    make_directory,
    read_file,
    read_json,
    read_small,
    remove_leftovers,
    retire,
    write_file,
)
from .strict_json import MAX_JSON_BYTES, Json, is_count, parse_json, to_json_bytes
from .tensor_file import Targets, encode_tensors, read_tensors

FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"

_TENSOR_FILE = re.compile(r"[a-z][a-z0-9_]{0,63}\.safetensors")
_DIRECTORY = re.compile(r"(?:\.replaced-)?step-([0-9]{8,18})")
_ENDING = ".safetensors"
_SHA256 = re.compile(r"[0-9a-f]{64}")
WriteFiles = Callable[[], dict[str, FileDigest]]
_CURE = "restore it from a copy, or remove this checkpoint to go back to the one before"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at `step`: tensors by file and name, on the CPU, bit for bit; and the state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Json]


@dataclass(frozen=True)
class _Manifest:
    step: int
    files: dict[str, FileDigest]

    def to_bytes(self) -> bytes:
        """The one text of this manifest, its own digest at the end."""
        files = {name: asdict(digest) for name, digest in self.files.items()}
        value = {"format": FORMAT, "step": self.step, "files": files}
        own = hashlib.sha256(to_json_bytes(value, name=MANIFEST)).hexdigest()
        return to_json_bytes({**value, "sha256": own}, name=MANIFEST, indent=2) + b"\n"


def checkpoint_name(step: int) -> str:
    """The directory's name: `step-00000123`."""
    return f"step-{step:08d}"


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Json],
    keep: Collection[int],
    write_together: Callable[[Path, WriteFiles], Mapping[str, FileDigest]] | None = None,
) -> Path:
    """Write the checkpoint of `step`, then delete all others in `directory` whose step is not in `keep`.

    Args:
        tensors: file name without its ending -> tensor name -> tensor of any device and plain dtype.
        state: what JSON holds exactly.
        write_together: writes all files of tensors into the folder that it is given, before anyone sees it,
            those of `tensors` by calling what it is given, and returns what they are by their names: other
            ranks write there as well (`rank_checkpoint`).

    Returns:
        The new checkpoint, complete and on the disk. A checkpoint of the same step is replaced.

    Raises:
        ValueError: naming the tensor or the entry that cannot be stored; nothing has been written.
        CannotSave: nothing has changed: the checkpoint before is the latest.
    """
    assert step >= 0, step
    encoded = {f"{name}.safetensors": encode_tensors(group, name=name) for name, group in tensors.items()}
    for name in encoded:
        if not _TENSOR_FILE.fullmatch(name):
            raise ValueError(f"tensors ({name!r}) must be named by small letters, digits and _")
    state_bytes = to_json_bytes(dict(state), name="state")
    target = directory / checkpoint_name(step)
    try:
        make_directory(directory)
        remove_leftovers(directory, UNFINISHED, RETIRED)
        with directory_atomically(target) as temporary:

            def write_files() -> dict[str, FileDigest]:
                return {name: write_file(temporary / name, file.chunks()) for name, file in encoded.items()}

            files = {**(write_together(temporary, write_files) if write_together else write_files())}
            files[STATE] = write_file(temporary / STATE, [state_bytes])
            write_file(temporary / MANIFEST, [_Manifest(step, files).to_bytes()])
    except OSError as error:
        needed = sum(file.size for file in encoded.values()) + len(state_bytes)
        raise CannotSave(target, needed=needed, cause=error) from error
    delete_others(directory, {step, *keep})
    return target


def delete_others(directory: Path, keep: Collection[int]) -> None:
    """Delete the checkpoints whose steps are not in `keep`. Warns where the disk refuses."""
    try:
        for (step, _), name in _candidates(directory):
            if name.startswith(REPLACED) or step not in keep:
                retire(directory / name)
    except OSError as error:
        warnings.warn(f"{directory}: cannot delete an old checkpoint: {error}", stacklevel=3)


def latest_checkpoint(directory: Path, *, warn: Callable[[str], None] = warnings.warn) -> Path | None:
    """The newest checkpoint of which every byte is right; None if there is none at all.

    Args:
        warn: is told in one line about each newer one that is damaged.

    Raises:
        ValueError: there are checkpoints, all damaged.
    """
    return newest_whole(directory, candidates(directory), verify=verify, warn=warn)


def candidates(directory: Path) -> list[str]:
    """Names of what looks like a checkpoint, the newest first."""
    return [name for _, name in sorted(_candidates(directory), reverse=True)]


def newest_whole(
    directory: Path, names: Iterable[str], *, verify: Callable[[Path], None], warn: Callable[[str], None]
) -> Path | None:
    """The first of the checkpoints that `verify` finds no fault with; see `latest_checkpoint`."""
    problem = None
    for name in names:
        try:
            verify(directory / name)
        except (ValueError, OSError) as error:
            if not name.startswith(REPLACED):
                problem = error
                warn(f"{error}; going back to the checkpoint before")
        else:
            return directory / name
    if problem is not None:
        raise ValueError(f"{directory}: no checkpoint can be used; the oldest: {problem}")
    return None


def load_checkpoint(
    path: Path,
    *,
    share: Share | None = None,
    word_share: Share | None = None,
    only: Collection[str] | None = None,
    targets: Mapping[str, Targets] | None = None,
) -> Checkpoint:
    """Everything in a checkpoint, after each of its digests has been verified.

    What ranks wrote in parts is put together as one process has it, with all experts. share: only these of
    the experts, out of a checkpoint that ranks wrote; one of a single process is given out whole. word_share:
    the same of the words of a vocabulary that was spread.

    only: files whose tensors are wanted; others are proved, and none of them is kept. None: all.

    targets: by file, what its tensors are read into, as `read_tensors` says, without which there would be
    two of each. Those of stacked experts that ranks wrote are taken part by part.

    Raises:
        ValueError: one line that names the file, what is wrong with it, and the cure. What was to be read
            into is not to be used then: it may be half of each.
    """
    into = targets or {}
    try:
        manifest = _read_manifest(path)
        state = read_json(path / STATE, expected=manifest.files[STATE])
        if not isinstance(state, dict):
            raise ValueError(f"{path / STATE}: not a JSON object")
        stems = {
            name.removesuffix(_ENDING): digest for name, digest in manifest.files.items() if name != STATE
        }
        wanted = {stem for stem in stems if only is None or stem in only or stem == DIGESTS}
        tensors: dict[str, dict[str, Tensor]] = {}
        for stem, digest in stems.items():
            if is_part(stem):
                continue
            read = _reader_into(into.get(stem)) if stem in wanted else _read_nothing
            found = read_file(path / (stem + _ENDING), read, expected=digest)
            if stem in wanted:
                tensors[stem] = found
        # What is used of these files is proved expert by expert, so that the one that is altered has a name.
        digests = {
            name: digest
            for name, digest in tensors.pop(DIGESTS, {}).items()
            if only is None or name.partition("/")[0] in only
        }
        parts = read_parts(
            stems,
            digests,
            lambda stem, places: read_file(path / (stem + _ENDING), _reader_into(places)),
            share,
            into,
        )
        words = read_words(
            [stem for stem in stems if only is None or group_of(stem) in only],
            lambda stem, places: read_file(
                path / (stem + _ENDING), _reader_into(places), expected=stems[stem]
            ),
            word_share,
            into,
        )
        for group, stacked in [*parts.items(), *words.items()]:
            tensors[group] = tensors.get(group, {}) | stacked
    except ValueError as error:
        raise ValueError(f"{error}; {_CURE}") from error
    return Checkpoint(manifest.step, tensors, state)


def _reader_into(targets: Targets | None) -> Callable[[FileReader], dict[str, Tensor]]:
    return lambda reader: read_tensors(reader, targets)[0]


def _read_nothing(reader: FileReader) -> dict[str, Tensor]:
    return {}


def verify(path: Path, *, share: Share | None = None) -> None:
    """Compare every file of a checkpoint with its digest; share: a part of the files.

    ValueError: one line that names the first file that is not what was written.
    """
    files = sorted(_read_manifest(path).files.items(), key=lambda entry: -entry[1].size)
    for name, digest in files if share is None else files[share.rank :: share.num_ranks]:
        read_file(path / name, _read_nothing, expected=digest)


def _read_manifest(path: Path) -> _Manifest:
    if not os.path.lexists(path):
        raise ValueError(f"{path}: there is no such checkpoint")
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise ValueError(f"{path}: not a directory, so no checkpoint")
    manifest = read_file(path / MANIFEST, lambda reader: _parse_manifest(bytes(read_small(reader))))
    name = checkpoint_name(manifest.step)
    if path.name.removeprefix(REPLACED) != name:
        raise ValueError(f"{path}: holds step {manifest.step}, so its name must be {name}")
    unknown = set(os.listdir(path)) - set(manifest.files) - {MANIFEST}
    if unknown:
        raise ValueError(f"{path}: holds {min(unknown)[:100]!r}, which is not in {MANIFEST}")
    return manifest


def _parse_manifest(data: bytes) -> _Manifest:
    match parse_json(data):
        case {"format": int(found)} if found != FORMAT:
            raise ValueError(f"format {found}, where this version of sparsegate reads format {FORMAT}")
        case {"step": step, "files": dict(entries)} if is_count(step) and STATE in entries:
            manifest = _Manifest(step, {name: _parse_entry(name, entry) for name, entry in entries.items()})
        case _:
            raise ValueError(f"damaged: it does not tell of a step and its files, {STATE} among them")
    # A manifest has one text, which ends in its own digest: a digit changed in it shows, and so does a space.
    if manifest.to_bytes() != data:
        raise ValueError("damaged: its text is not the one that its SHA-256 was taken of")
    return manifest


def _parse_entry(name: str, entry: Json) -> FileDigest:
    if name != STATE and not _TENSOR_FILE.fullmatch(name):
        raise ValueError(f"the file name {name[:100]!r} is none that a checkpoint has")
    match entry:
        case {"size": size, "sha256": str(sha256)} if is_count(size) and _SHA256.fullmatch(sha256):
            if name == STATE and size > MAX_JSON_BYTES:
                raise ValueError(f"{name} of {size:,} bytes is over the limit of {MAX_JSON_BYTES:,}")
            return FileDigest(size, sha256)
    raise ValueError(f"damaged: no size and SHA-256 for {name}")


def _candidates(directory: Path) -> list[tuple[tuple[int, bool], str]]:
    """What looks like a checkpoint, with a key that sorts the newest last, a replaced one before the new."""
    if not directory.is_dir():
        return []
    matches = [match for name in os.listdir(directory) if (match := _DIRECTORY.fullmatch(name))]
    return [((int(match[1]), not match[0].startswith(REPLACED)), match[0]) for match in matches]
