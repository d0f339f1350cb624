"""What a person sees: one panel that keeps its shape, or plain lines without a flood."""

import io
import math
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sparsegate.training import display as display_module
from sparsegate.training.display import Display

ANY_NUMBER = st.floats() | st.just(0.0) | st.integers(0, 10**9).map(float)


def step_line(step: int, **values: float) -> dict:
    names = {
        "loss": 4.25,
        "perplexity": 70.1,
        "tokens_per_second": 12345.6,
        "learning_rate": 0.00052,
    } | values
    experts = {
        "moe/cv_importance": 0.06,
        "moe/cv_load": 0.05,
        "moe/max_over_mean_load": 1.14,
        "moe/dead_experts": 0,
    }
    return {
        "kind": "step",
        "step": step,
        "time": 0.0,
        **{f"train/{k}": v for k, v in names.items()},
        **experts,
    }


def evaluation_line(step: int, loss: float) -> dict:
    return {"kind": "evaluation", "step": step, "time": 0.0, "valid/loss": loss, "valid/bits_per_byte": 1.31}


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def panel(display: Display, width: int = 80) -> list[str]:
    console = terminal(width)
    with console.capture() as capture:
        console.print(display)
    return capture.get().splitlines()


def display_of(console: Console | None, total_steps: int = 50_000) -> Display:
    return Display(name="moe-32", total_steps=total_steps, console=console)


def test_the_panel_shows_the_numbers_of_the_run():
    display = display_of(terminal())
    for step in range(100, 12_401, 100):
        display.advance(step)
        display.take_in(step_line(step, loss=4.25))
    display.take_in(evaluation_line(12_000, 4.1))
    display.take_in(evaluation_line(12_200, 4.3))
    display.activity = "evaluating"
    text = "\n".join(panel(display))
    for part in (
        *("moe-32", "12,400/50,000", "25%", "left", "evaluating", "loss 4.250", "perplexity 70.11"),
        *(
            "12,346 tokens/s",
            "rate 5.20e-04",
            "CV importance 0.06",
            "CV load 0.05",
            "max/mean 1.14",
            "dead 0",
        ),
        *("loss 4.300", "bits/byte 1.310", "best at 12,000"),
    ):
        assert part in text


def test_a_model_without_experts_has_no_row_for_them():
    display = display_of(terminal())
    display.take_in({k: v for k, v in step_line(1).items() if not k.startswith("moe/")})
    assert "experts" not in "\n".join(panel(display))


def test_what_gates_lose_is_shown_where_they_lose_any():
    display = display_of(None)
    display.take_in(step_line(20) | {"moe/unrouted_share": 0.0, "moe/dropped_share": 0.0})
    assert "unrouted" not in "".join(panel(display))
    assert "dropped" not in "".join(panel(display))
    display.take_in(step_line(40) | {"moe/unrouted_share": 0.0, "moe/dropped_share": 0.0321})
    assert "dropped 3.2%" in "".join(panel(display, width=120))


def test_the_worst_of_several_layers_is_shown():
    display = display_of(terminal())
    display.take_in(step_line(1) | {"other/cv_load": 0.71, "other/max_over_mean_load": 1.01})
    text = "\n".join(panel(display))
    assert "CV load 0.71" in text
    assert "max/mean 1.14" in text


@settings(max_examples=60)
@given(
    width=st.integers(20, 200),
    numbers=st.lists(ANY_NUMBER, min_size=8, max_size=8),
    step=st.integers(1, 10**7),
)
def test_the_panel_keeps_its_shape_whatever_the_numbers_and_the_width(width, numbers, step):
    display = display_of(terminal(width), total_steps=10**7)
    display.advance(step)
    names = (
        "train/loss",
        "train/tokens_per_second",
        "train/learning_rate",
        "moe/cv_load",
        "moe/cv_importance",
    )
    tags = (*names, "moe/max_over_mean_load", "moe/dead_experts")
    for _ in range(3):
        display.take_in(step_line(step) | dict(zip(tags, numbers, strict=False)))
    display.take_in(evaluation_line(step, numbers[-1]))
    lines = panel(display, width)
    assert all(len(line) == width for line in lines)
    assert len(lines) == (7 if abs(numbers[0]) < 1e30 else 6)


def test_the_shown_loss_is_the_mean_of_the_last_ones():
    display = display_of(terminal())
    for step in range(1, 200):
        display.take_in(step_line(step, loss=9.0))
    assert "loss 9.000" in panel(display)[2]
    for step in range(200, 300):
        display.take_in(step_line(step, loss=5.0 + (-1) ** step))
    shown = float(re.search(r"loss +([\d.]+)", panel(display)[2])[1])
    assert shown == pytest.approx(5.0, abs=0.2)  # of values that are 1 away from it


def test_one_bad_value_does_not_stay_in_the_mean():
    display = display_of(terminal())
    display.take_in(step_line(1, loss=math.nan))
    assert "loss nan" in panel(display)[2]
    display.take_in(step_line(2, loss=5.0))
    assert "loss 5.000" in panel(display)[2]


def test_the_curve_falls_as_the_loss_does_and_stays_bounded():
    display = display_of(terminal())
    for step in range(1, 20_000):
        display.take_in(step_line(step, loss=10 - step / 4000))
    curve = next(line for line in panel(display) if "█" in line)
    bars = re.search("[▁-█]+", curve)[0]
    assert len(bars) > 60
    assert list(bars) == sorted(bars, reverse=True)
    assert (bars[0], bars[-1]) == ("█", "▁")


def test_a_console_that_is_not_a_terminal_gets_plain_lines_now_and_then(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(display_module, "time", clock)
    output = io.StringIO()
    display = display_of(Console(file=output, width=40), total_steps=10_000)
    display.start()
    for step in range(1, 10_001):
        clock.now += 1 / 128
        display.advance(step)
        display.show(step_line(step))
    display.show(evaluation_line(10_000, 4.1))
    display.show({"kind": "checkpoint", "step": 10_000, "time": 0.0, "path": "checkpoints/step-00010000"})
    display.say("[not markup] a warning")
    display.stop()
    text = output.getvalue()
    assert text.isascii()
    assert all(character.isprintable() or character == "\n" for character in text)
    lines = text.splitlines()
    assert [line.split()[1] for line in lines[:4]] == [
        "1/10,000",
        "3,841/10,000",
        "7,681/10,000",
        "10,000/10,000",
    ]
    assert lines[1].endswith("0:00:48 left")
    assert lines[3].endswith("0:01:18 in all")
    assert "CV load 0.05" in lines[1]
    assert lines[4].split() == ["10,000", "valid", "loss", "4.100", "bits/byte", "1.310"]
    assert lines[5].split() == ["10,000", "checkpoint", "path", "checkpoints/step-00010000"]
    assert lines[6:] == ["[not markup] a warning"]


def test_time_left_counts_from_where_the_run_was_resumed(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(display_module, "time", clock)
    display = display_of(terminal(), total_steps=1000)
    display.resume_at(900)
    display.start()
    clock.now, step = 100.0, 910
    display.advance(step)
    assert "0:15:00 left" in panel(display)[1]


def test_without_a_console_nothing_is_shown(capfd):
    display = display_of(None)
    display.start()
    display.show(step_line(1))
    display.say("nothing")
    display.stop()
    assert capfd.readouterr() == ("", "")


def test_a_live_panel_ends_below_what_was_said_above_it():
    console = terminal()
    display = display_of(console, total_steps=10)
    display.start()
    display.advance(10)
    display.show(step_line(10))
    display.show(evaluation_line(10, 4.1))
    display.stop()
    text = console.file.getvalue()
    assert "\x1b" in text
    assert text.rindex("10  valid") < text.rindex("moe-32") < text.rindex("10/10")
