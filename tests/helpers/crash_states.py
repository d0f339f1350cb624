"""What POSIX lets a disk hold after a power cut: what is not flushed may be lost, zeroed, cut or reordered.

A file's content is sure once the file is flushed; a name in a directory (created, renamed, deleted) once that
directory is. Until then each change of a name may have reached the disk or not, on its own, in any order.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .os_shim import Call

Tree = dict[str, "bytes | Tree"]

MOST_SUBSETS_OF = 5  # pending changes of names, of which all subsets are tried; of more, the telling ones


@dataclass(eq=False)
class _File:
    flushed: bytes
    written: bytes

    def states(self) -> list[bytes]:
        """All there, all lost, long but empty, cut in half."""
        if self.written == self.flushed:
            return [self.written] * 4
        half = self.written[: len(self.written) // 2]
        return [self.written, self.flushed, bytes(len(self.written)), half]


@dataclass(eq=False)
class _Directory:
    flushed: "dict[str, _File | _Directory]" = field(default_factory=dict)
    names: "dict[str, _File | _Directory]" = field(default_factory=dict)


@dataclass(frozen=True)
class _Change:
    """One pending change in a directory: a name goes, a name comes, or both at once (a rename)."""

    directory: _Directory
    gone: str | None
    new: "tuple[str, _File | _Directory] | None"


class Disk:
    """A model of the disk below `root`: the calls are played to it, and it tells what may be left."""

    def __init__(self, root: Path, content: Tree) -> None:
        self._root_path = root
        self._root = _flushed(content)
        self._pending: list[_Change] = []

    def play(self, call: Call) -> None:
        if call.kind == "fsync":
            self._flush(self._find(call.path))
            return
        parent, name = self._find(call.path.parent), call.path.name
        match call.kind:
            case "create":
                self._change(parent, None, (name, _File(b"", b"")))
            case "mkdir":
                self._change(parent, None, (name, _Directory()))
            case "write":
                file = parent.names[name]
                file.written += call.data
            case "rename":
                assert call.target is not None
                assert call.target.parent == call.path.parent
                self._change(parent, name, (call.target.name, parent.names[name]))
            case "unlink" | "rmdir":
                self._change(parent, name, None)

    def states(self) -> Iterator[Tree]:
        """What the disk may hold if the power fails now."""
        for changes in _subsets(self._pending):
            for content in range(4):
                yield self._tree(self._root, changes, content)

    def _find(self, path: Path):
        node = self._root
        for part in path.relative_to(self._root_path).parts:
            node = node.names[part]
        return node

    def _change(self, directory: _Directory, gone, new) -> None:
        change = _Change(directory, gone, new)
        _apply(change, directory.names)
        self._pending.append(change)

    def _flush(self, node: "_File | _Directory") -> None:
        if isinstance(node, _File):
            node.flushed = node.written
        else:
            node.flushed = dict(node.names)
            self._pending = [change for change in self._pending if change.directory is not node]

    def _tree(self, directory: _Directory, changes: Sequence[_Change], content: int) -> Tree:
        names = dict(directory.flushed)
        for change in changes:
            if change.directory is directory:
                _apply(change, names)
        return {
            name: node.states()[content] if isinstance(node, _File) else self._tree(node, changes, content)
            for name, node in names.items()
        }


def crash_states(root: Path, before: Tree, calls: Sequence[Call]) -> Iterator[tuple[int, Tree]]:
    """Each different state, with the number of calls that were made before the power failed.

    Args:
        before: what was below `root`, all of it flushed.
    """
    disk, seen = Disk(root, before), set()
    for made in range(len(calls) + 1):
        if made:
            disk.play(calls[made - 1])
        for tree in disk.states():
            key = (repr(tree), made == len(calls))
            if key not in seen:
                seen.add(key)
                yield made, tree


def read_tree(path: Path) -> Tree:
    return {p.name: read_tree(p) if p.is_dir() else p.read_bytes() for p in sorted(path.iterdir())}


def write_tree(path: Path, tree: Tree) -> None:
    path.mkdir(exist_ok=True)
    for name, node in tree.items():
        if isinstance(node, dict):
            write_tree(path / name, node)
        else:
            (path / name).write_bytes(node)


def _flushed(tree: Tree) -> _Directory:
    nodes = {
        name: _flushed(node) if isinstance(node, dict) else _File(node, node) for name, node in tree.items()
    }
    return _Directory(dict(nodes), nodes)


def _apply(change: _Change, names: "dict[str, _File | _Directory]") -> None:
    if change.gone is not None:
        names.pop(change.gone, None)
    if change.new is not None:
        names[change.new[0]] = change.new[1]


def _subsets(changes: list[_Change]) -> Iterable[tuple[_Change, ...]]:
    if len(changes) <= MOST_SUBSETS_OF:
        sizes = range(len(changes) + 1)
        return itertools.chain.from_iterable(itertools.combinations(changes, size) for size in sizes)
    prefixes = [tuple(changes[:end]) for end in range(len(changes) + 1)]
    alone = [(change,) for change in changes]
    without = [tuple(c for c in changes if c is not change) for change in changes]
    return prefixes + alone + without
