"""A run on the console: a live panel on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_PLAIN_SECONDS = 30.0

# What the panel has room for, in this order, and how it is written.
_TRAIN = ("loss", "perplexity", "tokens_per_second", "learning_rate")
_VALID = ("loss", "perplexity", "bits_per_byte", "bleu")
_EVALUATION = ("loss", "perplexity", "word_perplexity", "bits_per_byte", "bleu", "chrf2")
_BALANCE = ("cv_load", "cv_importance", "max_over_mean_load", "max_over_mean_rank_load", "dead_experts")
_LOST = ("unrouted_share", "dropped_share")  # where any is: most gates lose nothing
_LABELS = {
    "tokens_per_second": "tokens/s",
    "learning_rate": "rate",
    "word_perplexity": "per word",
    "bits_per_byte": "bits/byte",
    "bleu": "BLEU",
    "chrf2": "chrF",
    "cv_importance": "CV importance",
    "cv_load": "CV load",
    "max_over_mean_load": "max/mean",
    "max_over_mean_rank_load": "of ranks",
    "dead_experts": "dead",
    "unrouted_share": "unrouted",
    "dropped_share": "dropped",
}
_FORMATS = {
    "loss": ".3f",
    "perplexity": "#.4g",
    "word_perplexity": "#.4g",
    "tokens_per_second": ",.0f",
    "bits_per_byte": ".3f",
    "bleu": ".2f",
    "chrf2": ".2f",
    "learning_rate": ".2e",
    "cv_importance": ".2f",
    "cv_load": ".2f",
    "max_over_mean_load": ".2f",
    "max_over_mean_rank_load": ".2f",
    "dead_experts": ",.0f",
    "unrouted_share": ".1%",
    "dropped_share": ".1%",
}
_ALARMING = {"cv_importance": 1.0, "cv_load": 1.0, "dead_experts": 0.0}  # yellow above this
_KIND_STYLES = {"evaluation": "green", "skipped": "yellow", "warning": "yellow"}


class Display:
    """Shows the lines of the log as they are written.

    console: None shows nothing. On a terminal a panel stays at the bottom, and evaluations and events scroll
    by above it; elsewhere there is a plain line every half minute, and one for each evaluation and event.
    activity: what keeps the run from training, or "".

    The loss of one step is noisy: what is shown is a running mean over the last few logged steps. Of several
    layers with experts, the worst is shown. A console that cannot be written to (a closed pipe, a full disk
    behind it) is left alone from then on.
    """

    def __init__(self, *, name: str, total_steps: int, console: Console | None) -> None:
        self._name, self._total_steps, self._console = name, total_steps, console
        self._live: Live | None = None
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(self, console=console, refresh_per_second=4)
        self.activity = ""
        self._step = self._first_step = 0
        self._began = time.monotonic()
        self._spoke_at = -math.inf
        self._loss = _RunningMean(rate=0.3)
        self._curve = _Curve(label="loss     ")
        self._train: dict[str, float] = {}
        self._valid: dict[str, float] = {}
        self._best = (math.inf, 0)

    def start(self) -> None:
        self._began = time.monotonic()
        if self._live is not None:
            self._attempt(self._live.start)

    def stop(self) -> None:
        if self._live is not None:
            self._attempt(self._live.stop)

    def resume_at(self, step: int) -> None:
        self._step = self._first_step = step
        self._began = time.monotonic()

    def advance(self, step: int) -> None:
        self._step = step

    def take_in(self, line: Mapping[str, Any]) -> None:
        """Know a line of the log without showing it."""
        if line["kind"] == "step":
            self._train = _values(line)
            if "train/loss" in self._train:
                loss = self._loss.add(self._train["train/loss"])
                self._curve.add(loss)
                self._train |= {"train/loss": loss, "train/perplexity": exp(loss)}
        elif line["kind"] == "evaluation":
            self._valid = _values(line)
            self._best = min(self._best, (self._valid.get("valid/loss", math.inf), line["step"]))

    def show(self, line: Mapping[str, Any]) -> None:
        """Know a line of the log, and show it."""
        self.take_in(line)
        if line["kind"] != "step":
            self._print(_event_text(line))
        elif self._live is None and (self._is_time_to_speak() or line["step"] == self._total_steps):
            self._print(self._plain_text())

    def say(self, message: str) -> None:
        self._print(Text(message, style="yellow"))

    def __rich__(self) -> RenderableType:
        """The panel, as it is now."""
        bar = Table.grid(padding=(0, 2, 0, 0), expand=True)
        bar.add_column(ratio=1)
        for _ in range(3):
            bar.add_column(no_wrap=True)
        bar.add_row(
            ProgressBar(total=self._total_steps, completed=self._step, complete_style="cyan"),
            Text(f"{self._step:,}/{self._total_steps:,}", style="bold"),
            Text(self._percent()),
            Text(self._time_left(), style="cyan"),
        )
        return Panel(
            Group(bar, *_aligned(self._rows()), self._curve),
            box=box.ROUNDED,
            border_style="bright_black",
            title=Text(self._name, style="bold"),
            title_align="left",
            subtitle=Text(self.activity, style="cyan"),
            subtitle_align="left",
        )

    def _rows(self) -> Iterator[list[Text]]:
        if self._train:
            yield [Text("train", style="dim"), *_cells(self._train, "train/", _TRAIN)]
        if balance := _worst_of_layers(self._train):
            yield [Text("experts", style="dim"), *_cells(balance, "", _BALANCE + _LOST)]
        if self._valid:
            yield [Text("valid", style="dim"), *_cells(self._valid, "valid/", _VALID), *self._best_cell()]

    def _best_cell(self) -> list[Text]:
        return [Text(f"best at {self._best[1]:,}", style="green")] if self._best[1] else []

    def _plain_text(self) -> Text:
        head = Text(f"{self._name}  {self._step:,}/{self._total_steps:,} ({self._percent()})")
        balance = _worst_of_layers(self._train)
        cells = [*_cells(self._train, "train/", _TRAIN), *_cells(balance, "", _BALANCE + _LOST)]
        return Text("  ").join([head, *cells, Text(self._time_left())])

    def _percent(self) -> str:
        return f"{self._step / self._total_steps:.0%}"

    def _is_time_to_speak(self) -> bool:
        due = time.monotonic() - self._spoke_at >= _PLAIN_SECONDS
        if due:
            self._spoke_at = time.monotonic()
        return due

    def _time_left(self) -> str:
        done, to_do = self._step - self._first_step, self._total_steps - self._step
        elapsed = time.monotonic() - self._began
        if to_do <= 0:
            return f"{_duration(elapsed)} in all"
        return f"{_duration(elapsed * to_do / done)} left" if done > 0 else "-:--:-- left"

    def _print(self, text: Text) -> None:
        if self._console is not None:
            console = self._console
            self._attempt(lambda: console.print(text, soft_wrap=True, highlight=False))

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (OSError, SystemExit):  # rich raises SystemExit where the reader of a pipe is gone
            self._console = self._live = None


class _RunningMean:
    """Exponentially weighted mean without bias towards its start; begins anew after a non-finite value."""

    def __init__(self, *, rate: float) -> None:
        self._rate, self._sum, self._weight = rate, 0.0, 0.0

    def add(self, value: float) -> float:
        if not math.isfinite(value):
            self._sum = self._weight = 0.0
            return value
        self._sum += self._rate * (value - self._sum)
        self._weight += self._rate * (1 - self._weight)
        return self._sum / self._weight


class _Curve:
    """A quantity over time, as one line of bars as wide as there is room.

    Keeps a bounded number of values, evenly thinned out.
    """

    _BARS = "▁▂▃▄▅▆▇█"
    _MOST = 1024
    _LARGEST = 1e30  # so that differences of what is drawn are finite

    def __init__(self, *, label: str) -> None:
        self._label = label
        self._values: list[float] = []
        self._num_added, self._stride = 0, 1

    def add(self, value: float) -> None:
        if self._num_added % self._stride == 0 and abs(value) < self._LARGEST:
            self._values.append(value)
        self._num_added += 1
        if len(self._values) > self._MOST:
            self._values, self._stride = self._values[::2], self._stride * 2

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        values = self._values
        if len(values) < 2 or options.ascii_only:
            return
        width = min(max(options.max_width - len(self._label), 2), len(values))
        columns = [values[i * (len(values) - 1) // (width - 1)] for i in range(width)]
        low, high = min(columns), max(columns)
        span = (high - low) or 1.0
        bars = "".join(self._BARS[round((value - low) / span * 7)] for value in columns)
        yield Text.assemble((self._label, "dim"), (bars, "blue"))


def exp(value: float) -> float:
    """e to the power of `value`; infinity where that is too large for a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in line.items() if key not in ("kind", "step", "time")}


def _worst_of_layers(values: Mapping[str, float]) -> dict[str, float]:
    """The largest value of each balance metric over the layers: larger is worse for all of them."""
    worst: dict[str, float] = {}
    for tag, value in values.items():
        key = tag.rpartition("/")[2]
        if key in _BALANCE or (key in _LOST and value > 0):
            worst[key] = max(worst.get(key, value), value)
    return worst


def _aligned(rows: Iterable[list[Text]]) -> Iterator[Text]:
    """Each row as one line, with its cells in columns; a line that is too long loses its end."""
    rows = list(rows)
    widths = [max(cell.cell_len for cell in column if cell) for column in zip_longest(*rows)]
    for row in rows:
        for cell, width in zip(row, widths, strict=False):
            cell.pad_right(width - cell.cell_len)
        line = Text("  ").join(row)
        line.no_wrap, line.overflow = True, "ellipsis"
        line.rstrip()
        yield line


def _cells(values: Mapping[str, float], prefix: str, keys: Iterable[str]) -> Iterator[Text]:
    return (_cell(key, values[prefix + key]) for key in keys if prefix + key in values)


def _cell(key: str, value: float) -> Text:
    style = "bold yellow" if value > _ALARMING.get(key, math.inf) else "bold"
    number, label = (_number(key, value), style), (_label(key), "dim")
    first, second = (number, label) if key == "tokens_per_second" else (label, number)
    return Text.assemble(first, " ", second)


def _label(key: str) -> str:
    return _LABELS.get(key, key.replace("_", " "))


def _number(key: str, value: float) -> str:
    if abs(value) >= 1e9:
        return f"{value:.2e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return format(value, _FORMATS.get(key, ".4g" if isinstance(value, float) else ","))


def _event_text(line: Mapping[str, Any]) -> Text:
    """`12,000  valid  loss 4.391  perplexity 80.72`"""
    kind, style = line["kind"], _KIND_STYLES.get(line["kind"], "dim")
    if kind == "evaluation":
        kind, cells = "valid", list(_cells(line, "valid/", _EVALUATION))
    else:
        cells = [_field(key, value) for key, value in line.items() if key not in ("kind", "step", "time")]
    return Text("  ").join([Text(f"{line['step']:>7,}  {kind}", style=style), *cells])


def _field(key: str, value: Any) -> Text:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _cell(key, value)
    if key == "message":
        return Text(str(value))
    return Text.assemble((_label(key), "dim"), " ", str(value))


def _duration(seconds: float) -> str:
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock
