"""Checkpoints made to do harm by somebody who knows the format: most have a manifest of right digests."""

import gzip
import hashlib
import io
import json
import marshal
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch


def manifest_of(
    path: Path, *, step: int, format_number: int = 1, names: dict[str, str] | None = None
) -> bytes:
    """The manifest of the files in `path`, made from its description alone.

    Args:
        names: what the manifest calls some of the files.
    """
    files = {}
    # state.json is written last.
    for file in sorted(path.iterdir(), key=lambda file: (file.name == "state.json", file.name)):
        if file.name != "MANIFEST.json":
            data = file.read_bytes()
            name = (names or {}).get(file.name, file.name)
            files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return sign({"format": format_number, "step": step, "files": files})


def sign(manifest: dict) -> bytes:
    """A manifest's text, its own digest at the end."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=2).encode() + b"\n"


class Payload:
    """Unpickling it runs a command that leaves a mark, a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.mark}'",)


def pickles(mark: Path) -> dict[str, bytes]:
    """The payload in all the wrappings that loaders of models open."""
    payload = Payload(mark)
    torch_zip, torch_legacy, numpy_file, numpy_zip, tar, zipped = (io.BytesIO() for _ in range(6))
    torch.save(payload, torch_zip)
    torch.save(payload, torch_legacy, _use_new_zipfile_serialization=False)
    objects = np.array([payload], dtype=object)
    np.save(numpy_file, objects, allow_pickle=True)
    np.savez(numpy_zip, objects)
    plain = pickle.dumps(payload)
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("../../escaped", "data.pkl"):
            member = tarfile.TarInfo(name)
            member.size = len(plain)
            archive.addfile(member, io.BytesIO(plain))
    with zipfile.ZipFile(zipped, "w") as archive:
        for name in ("../../escaped", "/tmp/escaped", "archive/data.pkl", "archive/version"):
            archive.writestr(name, plain)
    code = compile(f"import os; os.system('touch {mark}')", "x", "exec")
    return {
        "pickle 0": pickle.dumps(payload, protocol=0),
        "pickle 2": pickle.dumps(payload, protocol=2),
        "pickle 5": pickle.dumps(payload, protocol=5),
        "pickle in a pickle": pickle.dumps({"state_dict": {"w": plain}, "next": payload}),
        "torch.save": torch_zip.getvalue(),
        "torch.save, legacy": torch_legacy.getvalue(),
        "npy of objects": numpy_file.getvalue(),
        "npz of objects": numpy_zip.getvalue(),
        "tar with ../": tar.getvalue(),
        "zip with ../": zipped.getvalue(),
        "gzip": gzip.compress(plain),
        "marshal": marshal.dumps(code),
        "python": f"import os; os.system('touch {mark}')\n".encode(),
        "shell": f"#!/bin/sh\ntouch '{mark}'\n".encode(),
        "yaml": f"!!python/object/apply:os.system ['touch {mark}']\n".encode(),
    }


def corpus(directory: Path, mark: Path, outside: Path) -> list[str]:
    """Write the hostile checkpoints, one in each folder of `directory`; the names of the folders.

    Args:
        mark: a file that appears if anything of them is run.
        outside: a directory with a whole checkpoint that no other may reach.
    """
    wrapped = pickles(mark)
    cases: dict[str, Callable[[Path], None]] = {}
    for name, data in wrapped.items():
        cases[f"{name} as tensors"] = partial(replace_file, file="model.safetensors", data=data)
    for name in ("pickle 0", "torch.save", "python", "yaml"):
        cases[f"{name} as state"] = partial(replace_file, file="state.json", data=wrapped[name])
        cases[f"{name} as manifest"] = partial(overwrite, file="MANIFEST.json", data=wrapped[name])
    extras = {
        "optimizer.pt": "torch.save",
        ".metadata": "pickle 2",
        "sitecustomize.py": "python",
        "x.so": "shell",
    }
    for file, name in extras.items():
        cases[f"{file} beside the others"] = partial(overwrite, file=file, data=wrapped[name])
    cases |= {
        "optimizer.pt in the manifest": partial(
            replace_file, file="optimizer.pt", data=wrapped["torch.save"]
        ),
        "tensors, then a zip": partial(append, data=wrapped["torch.save"]),
        "a pickle in the header": partial(
            change_header, entry={"dtype": "O", "shape": [1], "data_offsets": [0, 8]}
        ),
        "__reduce__ in the header": partial(
            change_header, entry={"__reduce__": "os.system", "args": [f"touch {mark}"]}
        ),
        "a link to tensors outside": partial(link, target=outside / "model.safetensors"),
        "a link to a device": partial(link, target=Path("/dev/zero")),
        "a pipe": pipe,
        "names with ../": partial(rename_in_manifest, name="../outside/model.safetensors"),
        "names with a root": partial(rename_in_manifest, name=str(outside / "model.safetensors")),
        "names with NUL": partial(rename_in_manifest, name="model\0.safetensors"),
        "names of 300 characters": partial(rename_in_manifest, name=f"{'m' * 300}.safetensors"),
        "a name of code": partial(rename_in_manifest, name="__import__('os').system('id').safetensors"),
        "a checkpoint that is a link": partial(link_all, target=outside),
        "a header of 8 MB of lists": partial(replace_file, file="model.safetensors", data=header_bomb()),
        "a state of 8 MB of brackets": partial(replace_file, file="state.json", data=b"[" * (8 << 20)),
        "a state of 8 MB of lists": partial(
            replace_file, file="state.json", data=b"[" + b"[]," * 2_700_000 + b"0]"
        ),
        "a state of 64 MB of zeros": sparse_state,
        "a manifest of 1 GB of zeros": sparse_manifest,
        "tensors of 2**62 bytes": partial(
            change_header, entry={"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}
        ),
    }
    for index, (name, build) in enumerate(cases.items()):
        path = directory / f"{index:02d} {name.replace('/', '|')}" / "step-00000001"
        shutil.copytree(outside, path)
        build(path)
    return sorted(os.listdir(directory))


def resign(path: Path, names: dict[str, str] | None = None) -> None:
    (path / "MANIFEST.json").write_bytes(manifest_of(path, step=1, names=names))


def overwrite(path: Path, *, file: str, data: bytes) -> None:
    (path / file).write_bytes(data)


def replace_file(path: Path, *, file: str, data: bytes) -> None:
    (path / file).write_bytes(data)
    resign(path)


def append(path: Path, *, data: bytes) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes() + data)
    resign(path)


def change_header(path: Path, *, entry: dict) -> None:
    text = json.dumps({"w": entry}).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    resign(path)


def rename_in_manifest(path: Path, *, name: str) -> None:
    resign(path, {"model.safetensors": name})
    (path / "model.safetensors").unlink()


def link(path: Path, *, target: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(target)


def link_all(path: Path, *, target: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def header_bomb() -> bytes:
    text = b'{"w":[' + b"[]," * 2_700_000 + b"0]}"
    return len(text).to_bytes(8, "little") + text


def sparse_state(path: Path) -> None:
    os.truncate(path / "state.json", 64 << 20)
    resign(path)


def sparse_manifest(path: Path) -> None:
    os.truncate(path / "MANIFEST.json", 1 << 30)
