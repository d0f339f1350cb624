"""`sparsegate doctor`."""

import json

import pytest
import torch

from sparsegate.cli.main import main
from sparsegate.moe.kernels.choice import KERNELS


def test_it_tells_the_kernel_of_every_dtype_and_why_not_the_others(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["torch"] == torch.__version__
    on_cpu = [row for row in report["kernels"] if row["device"] == "cpu"]
    assert {row["dtype"]: row["kernel"] for row in on_cpu} == dict.fromkeys(
        ("float32", "bfloat16", "float16", "float64"), "threaded"
    )
    for row in report["kernels"]:
        assert {row["kernel"], *row["others"]} == set(KERNELS)


def test_it_prints_the_same_for_people(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "cpu bfloat16: threaded" in out
    assert "grouped_mm  is for CUDA devices, not for cpu" in out
    assert "can be used by name, kernel='loop'" in out


@pytest.mark.parametrize("option", ["--experts", "--width", "--hidden"])
def test_a_size_below_one_is_refused(option, capsys):
    assert main(["doctor", option, "0"]) == 2
    assert capsys.readouterr().err == f"sparsegate doctor: {option} (0) must be at least 1\n"
