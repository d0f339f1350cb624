"""The numbers of a run on disk: JSON lines, and the same numbers as TensorBoard events."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from .strict_json import parse_json

Line = dict[str, Any]


class JsonLog:
    """One JSON object per line, each written with one call, so that a kill damages the last line at most.

    JSON has no numbers that are not finite: they are the strings "nan", "inf" and "-inf", as `float` takes.
    """

    def __init__(self, *, path: Path) -> None:
        self._path = path

    def append(self, line: Line) -> None:
        """Raises OSError where the disk refuses; then the file is as it was."""
        content = {key: _finite_or_text(value) for key, value in line.items()}
        append_whole(self._path, json.dumps(content, allow_nan=False).encode() + b"\n")

    def truncate_after(self, step: int, *, next_batch: int | None = None) -> list[Line]:
        """Cut the file where lines of later steps begin; return the lines that stay.

        next_batch: index of the first batch to come. What is said of that one and later ones is cut as well:
        batches that were skipped are logged at the step before them.

        What is cut is a run's future: a resumed run writes it again. A half-written last line goes too.
        """
        kept, end = [], 0
        for line, line_end in _lines(self._path):
            if line["step"] > step or (next_batch is not None and line.get("batch", -1) >= next_batch):
                break
            kept.append(line)
            end = line_end
        if self._path.exists():
            os.truncate(self._path, end)
        return kept


def read_log(path: Path) -> Iterator[Line]:
    """The lines of a log, oldest first, without those that are damaged; none where there is no file."""
    return (line for line, _ in _lines(path))


def _lines(path: Path) -> Iterator[tuple[Line, int]]:
    """Each whole line, and the offset in bytes at which it ends."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for text in file:
            end += len(text)
            try:
                line = parse_json(text)
            except ValueError:
                continue
            if text.endswith(b"\n") and isinstance(line, dict) and {"kind", "step", "time"} <= line.keys():
                yield line, end


class EventFile:
    """Scalars in TensorBoard's format, one file per process of a run.

    TensorBoard's own writer hands the events to a thread, in which a full disk becomes a traceback, and an
    error at some later call; and it imports TensorFlow where that is installed. So the records are made here,
    with TensorBoard's classes, and written like the lines of the log.
    """

    def __init__(self, *, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._purge_step: int | None = None

    def purge_from(self, step: int) -> None:
        """Let readers forget what earlier files say about `step` and later ones."""
        self._purge_step = step

    def append(self, *, step: int, wall_time: float, values: Mapping[str, float]) -> None:
        """Raises OSError where the disk refuses; then the file is as it was."""
        if self._path is None:
            self._path = self._begin(wall_time)
        summary = {"value": [{"tag": tag, "simple_value": value} for tag, value in values.items()]}
        append_whole(self._path, _record(wall_time=wall_time, step=step, summary=summary))

    def _begin(self, wall_time: float) -> Path:
        """Start a file that sorts behind the ones before it: readers go by the names."""
        self._folder.mkdir(exist_ok=True)
        number = len(list(self._folder.glob("events.out.tfevents.*")))
        path = self._folder / f"events.out.tfevents.{number:06d}"
        head = _record(wall_time=wall_time, file_version="brain.Event:2")
        if self._purge_step is not None:
            head += _record(wall_time=wall_time, step=self._purge_step, session_log={"status": "START"})
        append_whole(path, head)
        return path


def _record(**fields: Any) -> bytes:
    """A TensorBoard event with its length and checksums. The imports are late because they are slow."""
    # pyrefly: ignore [missing-module-attribute]: protobuf makes the class at run time
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = BytesIO()
    RecordWriter(buffer).write(Event(**fields).SerializeToString())
    return buffer.getvalue()


def append_whole(path: Path, data: bytes) -> None:
    """Append all of `data` to the file, which is created where it is missing, or nothing.

    Raises:
        OSError: the disk refused, and the file is as it was.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _finite_or_text(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
