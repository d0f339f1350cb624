"""A shim before the system calls that change files: it records them, and lets a test refuse any of them.

Flushes are recorded, not made: no test cuts the power of the machine that it runs on, and they are slow.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


class Killed(BaseException):
    """The process is dead: from here on no call of it does anything."""


@dataclass(frozen=True)
class Call:
    """One call: create, write, fsync, rename, mkdir, unlink or rmdir."""

    kind: str
    path: Path
    target: Path | None = None
    data: bytes = b""


class OsShim:
    """Stands in for `os.open`, `os.write`, ... below `root`; `before` is called first and may raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.calls: list[Call] = []
        self.before: Callable[[Call], None] = lambda call: None
        self._root = root
        self._open_paths: dict[int, Path] = {}
        self._real = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "replace")}
        self._real |= {name: getattr(os, name) for name in ("mkdir", "unlink", "rmdir")}
        for name in self._real:
            monkeypatch.setattr(os, name, getattr(self, f"_{name}"))

    def _tell(self, call: Call) -> None:
        if call.path.is_relative_to(self._root):
            self.before(call)
            self.calls.append(call)

    def _path(self, path: str | os.PathLike[str], dir_fd: int | None) -> Path:
        return Path(path) if dir_fd is None else self._open_paths[dir_fd] / path

    def _open(self, path, flags, mode=0o777, *, dir_fd=None):
        whole = self._path(path, dir_fd)
        if flags & os.O_CREAT:
            self._tell(Call("create", whole))
        descriptor = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        self._open_paths[descriptor] = whole
        return descriptor

    def _write(self, descriptor, data):
        if descriptor in self._open_paths:
            self._tell(Call("write", self._open_paths[descriptor], data=bytes(data)))
        return self._real["write"](descriptor, data)

    def _fsync(self, descriptor):
        if descriptor in self._open_paths:
            self._tell(Call("fsync", self._open_paths[descriptor]))

    def _rename(self, source, target):
        self._tell(Call("rename", Path(source), Path(target)))
        self._real["rename"](source, target)

    def _replace(self, source, target):
        self._tell(Call("rename", Path(source), Path(target)))
        self._real["replace"](source, target)

    def _mkdir(self, path, mode=0o777, *, dir_fd=None):
        self._tell(Call("mkdir", self._path(path, dir_fd)))
        self._real["mkdir"](path, mode, dir_fd=dir_fd)

    def _unlink(self, path, *, dir_fd=None):
        self._tell(Call("unlink", self._path(path, dir_fd)))
        self._real["unlink"](path, dir_fd=dir_fd)

    def _rmdir(self, path, *, dir_fd=None):
        self._tell(Call("rmdir", self._path(path, dir_fd)))
        self._real["rmdir"](path, dir_fd=dir_fd)
