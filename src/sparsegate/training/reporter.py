"""What a person sees of a run while it trains, and what stays of it in the run's folder."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from torch import Tensor

from ..inspection.balance import balance_metrics
from ..moe.routing import BalanceSums
from ..parallel.placement import split
from .display import Display, exp
from .log import EventFile, JsonLog, Line


class Reporter:
    """Shows a run on the console, and keeps its numbers in `log.jsonl` and `tensorboard/`, named alike.

    folder: of the run; it exists. total_steps: of the whole run, also those before a resume. name: what the
    display calls the run. log_every: steps from one line of the log to the next; the first and the last step
    have one too. console: None shows nothing; one that is not a terminal gets a plain line now and then.
    expert_ranks: that the experts are spread over.

    Steps are counted from 1: `step` is the number of optimizer steps done. A line of the log has `kind`
    ("step", "evaluation", or an event's), `step`, `time` (seconds since 1970) and the values. Numbers that
    are not finite are the strings "nan", "inf" and "-inf". The metrics of a step are named `train/NAME`,
    those of an evaluation `valid/NAME`, those of a layer's experts `LAYER/NAME`. TensorBoard gets the values
    of steps and evaluations.

    A log that cannot be written (full disk) is no reason to stop training: it is said once, and the lines
    that the disk refuses are missing from the file.
    """

    def __init__(
        self,
        *,
        folder: Path,
        total_steps: int,
        name: str,
        log_every: int,
        console: Console | None,
        expert_ranks: int = 1,
    ) -> None:
        self._folder = folder
        self._log = JsonLog(path=folder / "log.jsonl")
        self._events = EventFile(folder=folder / "tensorboard")
        self._display = Display(name=name, total_steps=total_steps, console=console)
        self._total_steps, self._log_every, self._expert_ranks = total_steps, log_every, expert_ranks
        self._step = 0
        self._tokens: float | Tensor = 0
        self._since = time.monotonic()
        self._told = False

    def __enter__(self) -> "Reporter":
        self._display.start()
        self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.stop()

    def resume_at(self, step: int, *, next_batch: int | None = None) -> None:
        """Continue the log of a run that is resumed after `step` steps: forget what it says about later ones.

        next_batch: index of the batch that comes next; events that name it or later ones are forgotten too.
        The log then goes on as if the run had never stopped; `time` and `train/tokens_per_second` vary.

        Raises:
            OSError: the log cannot be read or shortened.
        """
        for line in self._log.truncate_after(step, next_batch=next_batch):
            self._display.take_in(line)
        self._events.purge_from(step + 1)
        self._display.resume_at(step)
        self._step = step

    def step(
        self,
        step: int,
        metrics: Mapping[str, float | Tensor],
        balance: Mapping[str, BalanceSums] | None = None,
    ) -> None:
        """Report an optimizer step. Reads values from the device only where the step is logged.

        metrics: numbers or scalar tensors. `loss` is in nats per token; its exponential is reported beside
        it, as `perplexity`. `tokens` is the number of real tokens in this step; `tokens_per_second` comes
        from those since the line before, and from the time since then that was not spent in `doing`.
        balance: sums of this step's gates, by layer name; reported as `balance_metrics`.
        """
        self._step = step
        self._tokens = self._tokens + metrics.get("tokens", 0)
        self._display.advance(step)
        if step % self._log_every == 0 or step in (1, self._total_steps):
            self._write("step", self._step_values(metrics, balance or {}))

    def evaluation(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Report an evaluation on held-out text. metrics: as in `step`, `loss` decides which is best."""
        self._step = step
        self._write("evaluation", _named("valid/", metrics))

    def event(self, kind: str, **fields: Any) -> None:
        """Report what happens between steps ("checkpoint", "skipped", "resume", ...), with plain values.

        Its step is the one reported last, unless `step` is among the fields.
        """
        self._write(kind, {"step": self._step} | fields)

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Show what keeps the run from training ("evaluating"), and leave its time out of the speed."""
        began = time.monotonic()
        self._display.activity = activity
        try:
            yield
        finally:
            self._display.activity = ""
            self._since += time.monotonic() - began

    def _step_values(
        self, metrics: Mapping[str, float | Tensor], balance: Mapping[str, BalanceSums]
    ) -> dict[str, float]:
        values = _named("train/", metrics)
        for layer, sums in balance.items():
            several = self._expert_ranks > 1
            ranks = split(len(sums.count_E), self._expert_ranks) if several else ()
            found = balance_metrics(sums, ranks=ranks)
            values |= {f"{layer}/{key}": value for key, value in found.items()}
        now = time.monotonic()  # after the values were read, so after the device has finished this step
        if "tokens" in metrics:
            values["train/tokens_per_second"] = float(self._tokens) / max(now - self._since, 1e-9)
        self._tokens, self._since = 0, now
        return values

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        line: Line = {"kind": kind, "step": self._step, "time": time.time(), **values}
        self._display.show(line)
        try:
            self._log.append(line)
            if kind in ("step", "evaluation"):
                self._events.append(step=line["step"], wall_time=line["time"], values=values)
        except OSError as error:
            if not self._told:
                self._told = True
                self._display.say(f"{self._folder}: cannot write the log, training goes on: {error.strerror}")


class Silence:
    """A reporter that nobody listens to: of the ranks that do not report."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def resume_at(self, step: int, *, next_batch: int | None = None) -> None:
        pass

    def step(
        self,
        step: int,
        metrics: Mapping[str, float | Tensor],
        balance: Mapping[str, BalanceSums] | None = None,
    ) -> None:
        pass

    def evaluation(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        pass

    def event(self, kind: str, **fields: Any) -> None:
        pass

    def doing(self, activity: str) -> AbstractContextManager[None]:
        return nullcontext()


def _named(prefix: str, metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """The metrics on the host, under their full names, with the perplexity behind the loss."""
    values: dict[str, float] = {}
    for key, value in metrics.items():
        values[prefix + key] = float(value)
        if key == "loss":
            values[prefix + "perplexity"] = exp(float(value))
    return values
