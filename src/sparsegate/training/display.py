"""A run on the console: a live panel on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..inspection.balance import BALANCE_METRICS

_PLAIN_SECONDS = 30.0
_SMOOTHING = 0.9
_BARS = "▁▂▃▄▅▆▇█"


class Display:
    """Knows how a line of the log looks. Losses of single steps are noisy: the panel shows their running mean."""

    def __init__(self, *, name: str, total_steps: int, console: Console | None) -> None:
        self._name, self._total_steps = name, total_steps
        self._console = console
        live = console is not None and console.is_terminal and not console.is_dumb_terminal
        self._live = Live(self, console=console, refresh_per_second=4) if live else None
        self.activity = ""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def advance(self, step: int) -> None: ...
    def resume_at(self, step: int) -> None: ...
    def show(self, line: dict[str, Any]) -> None: ...
    def say(self, message: str) -> None: ...
