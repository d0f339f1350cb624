"""What the GPU benchmark checks, on a small layer; and that it says where it cannot run."""

import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu, gpu_code
from benchmarks.gpu_contestants import CONTESTANTS, Built, Case, operands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Case(12, 6, 5, 3, 2, "relu")


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_its_check_passes(activation):
    assert gpu.check(SMALL._replace(activation=activation), DEVICE, torch.float32) < 1e-5


def test_its_check_finds_a_wrong_kernel(monkeypatch):
    right = gpu.ours

    def wrong(case, given):
        call, *rest = right(case, given)
        return Built(lambda: (1.01 * call()[0],), *rest)

    monkeypatch.setattr(gpu, "ours", wrong)
    assert gpu.check(SMALL, DEVICE, torch.float32) > 1e-3
    given = operands(SMALL, DEVICE, torch.float32)
    assert gpu.wrongness(wrong(SMALL, given), given, "relu") > 1e-3


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("name", ["triton", "F.grouped_mm"])
def test_contestants_compute_the_same(name, activation):
    case = Case(12, 16, 8, 3, 2, activation)
    given = operands(case, DEVICE, torch.float32)
    assert gpu.wrongness(CONTESTANTS[name](case, given), given, activation) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the layer takes this kernel on CUDA devices alone")
@pytest.mark.parametrize("name", gpu.LAYERS)
def test_a_whole_layer_takes_a_step(name):
    case = SMALL._replace(experts=32)
    given = operands(case, DEVICE, torch.float32)
    gpu.step(CONTESTANTS[name](case, given), torch.ones_like(given.x_TD))


def test_its_check_of_grouped_products_passes_and_finds_wrong_ones(monkeypatch):
    assert gpu.check_groups(DEVICE, torch.float32) < 1e-5
    right = gpu.grouped_products
    monkeypatch.setattr(gpu, "grouped_products", lambda *args, **options: 1.01 * right(*args, **options))
    assert gpu.check_groups(DEVICE, torch.float32) > 1e-3


def test_its_check_of_the_choice_passes_and_finds_a_wrong_one(monkeypatch):
    assert gpu.check_choice(DEVICE) < 1e-4
    right = gpu.equations
    monkeypatch.setattr(
        gpu, "equations", lambda *args, **options: right(*args, **{**options, "noise_epsilon": 0.02})
    )
    assert gpu.check_choice(DEVICE) > 1e-3


def test_operations_are_counted_by_the_formula():
    assert Case(10, 6, 5, 3, 2, "swiglu").ops() == 6 * 10 * 6 * 5 * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert capsys.readouterr().err == "benchmarks.gpu: no CUDA device here\n"


def test_where_nothing_can_be_compiled_ahead_it_goes_on(monkeypatch, capsys):
    def dies(*args):
        raise BrokenProcessPool("a compiler was killed")

    monkeypatch.setattr(gpu_code, "side_by_side", dies)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    gpu.compile_ahead([SMALL])
    assert "nothing is compiled ahead: BrokenProcessPool: a compiler was killed" in capsys.readouterr().err


def test_rows_that_are_done_are_not_measured_again_and_foreign_errors_are_told(monkeypatch):
    measured = []

    def measure(case, name, roof):
        measured.append((name, case))
        if name == "liger-kernel":
            raise ImportError("no module")
        return {**case._asdict(), "kernel": name, "both ms": 1.0}

    monkeypatch.setattr(gpu, "dense_rate", lambda: 1.0)
    monkeypatch.setattr(gpu, "measure", measure)
    rows = list(gpu.new_rows("models", [], 1e9))
    cases = gpu.FAMILIES["models"]
    assert measured == [(name, case) for name in CONTESTANTS for case in cases]
    assert {row["not there"] for row in rows if "not there" in row} == {"ImportError: no module"}
    assert list(gpu.new_rows("models", rows[1:], 1e9)) == rows[:1]
    assert list(gpu.new_rows("models", [], -1.0)) == []
