"""What the GPU benchmark checks, on a small layer; and that it says where it cannot run."""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_its_check_passes(activation):
    assert gpu.check(gpu.Case(12, 6, 5, 3, 2, activation), DEVICE, torch.float32) < 1e-5


def test_its_check_finds_a_wrong_kernel(monkeypatch):
    right = gpu.ours
    monkeypatch.setattr(gpu, "ours", lambda *given: 1.01 * right(*given))
    assert gpu.check(gpu.Case(12, 6, 5, 3, 2, "relu"), DEVICE, torch.float32) > 1e-3


def test_operations_are_counted_by_the_formula():
    assert gpu.Case(10, 6, 5, 3, 2, "swiglu").ops() == 6 * 10 * 6 * 5 * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert capsys.readouterr().err == "benchmarks.gpu: no CUDA device here\n"
