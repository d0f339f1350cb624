"""How kernels are launched: which shape is taken, and what a compilation that fails leaves behind."""

from concurrent.futures import Future
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime import _async_compile

from sparsegate.moe.kernels.triton import launch
from sparsegate.moe.kernels.triton.launch import Shape

SHAPES = [Shape(128, 256, 64, warps=8, stages=stages, programs=1) for stages in (3, 4)]


@pytest.mark.parametrize("fails", ["when it is begun", "in its thread"])
def test_a_compilation_that_fails_leaves_others_alone(fails):
    def compile() -> Future | None:
        if fails == "when it is begun":
            raise OSError("no space")

        def run() -> None:
            raise OSError("no space")

        return _async_compile.active_mode.get().submit("key", run, lambda kernel: None)

    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            launch.compile_in_threads(compile)
        assert _async_compile.active_mode.get() is None
    assert launch.compile_in_threads(lambda: 3) == 3


def test_what_was_measured_runs_while_a_graph_is_captured_else_the_first(monkeypatch):
    stages, capturing = [], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(launch, "_measure", lambda kernel, candidates, run: candidates[1])
    monkeypatch.setattr(launch, "_fastest", {})
    kernel = Mock(run=lambda *args, num_stages, **options: stages.append(num_stages))

    def call(width: int) -> int:
        launch.launch(kernel, SHAPES, lambda shape: 1, torch.empty(1), cut={"inner": width})
        return stages[-1]

    assert call(64) == 4
    capturing.append(True)
    assert call(64) == 4
    assert call(128) == 3
    capturing.clear()
    assert call(128) == 4


def test_shapes_that_do_not_compile_are_passed_over(monkeypatch):
    def run(shape: Shape, warmup: bool = False) -> None:
        if shape == SHAPES[0]:
            raise launch.PTXASError("too many registers")

    monkeypatch.setattr(launch.triton.testing, "do_bench", lambda run, **options: run() or 1.0)
    kernel = Mock(__name__="kernel")
    assert launch._measure(kernel, SHAPES, run) == SHAPES[1]
    with pytest.raises(RuntimeError, match="no tile shape fits this device"):
        launch._measure(kernel, SHAPES[:1], run)
