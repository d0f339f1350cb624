"""The kernels compile for devices that are not here, fit them, and load while they multiply."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.gpu_code import innermost_loop

Kernel = tuple[str, dict[str, Any], dict[str, Any]]


def compiled(capability: int, dtype: str, *cases: str, cache: Path) -> list[dict[str, Kernel]]:
    command = [sys.executable, "-m", "tests.helpers.compiled_kernels", str(capability), dtype, *cases]
    # Without the interpreter of the tests.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def by_call(kernels: dict[str, Kernel]) -> list[list[Kernel]]:
    """The products of each call, in all tile shapes."""
    calls = defaultdict(list)
    for name, constants, code in kernels.values():
        if "INNER" in constants:
            call = {key: value for key, value in constants.items() if key not in ("ROWS", "COLUMNS", "INNER")}
            calls[name, str(call)].append((name, constants, code))
    return list(calls.values())


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_on_hopper_four_warps_multiply_together_while_loads_go_on(activation, tmp_path):
    cases = [f"4096,1024,512,16,4,{activation}", f"8192,2048,1024,64,8,{activation}"]
    first, other = compiled(90, "bfloat16", *cases, cache=tmp_path)
    choices = [code for name, _, code in first.values() if name.startswith("_choice")]
    assert len(choices) == 2
    assert all(code["together"] and not code["local"] for code in choices)
    calls = by_call(first)
    assert len(calls) >= 6  # first product, second, gradients of hidden rows, of input and of both weights
    for name, constants, code in (each for call in calls for each in call):
        told = name, constants, code
        assert code["together"] >= 1, told
        assert code["product"] == "HGMMA", told
        assert code["products"] >= constants["INNER"] // 16, told
        assert code["copies"] >= 4, told
        assert code["spills"] == 0, told
    # What was compiled for one layer serves another: its sizes are no constants.
    assert set(map(str, by_call(other))) == set(map(str, calls))
    assert {
        key for key, (name, *_) in other.items() if "gather" not in name and "choice" not in name
    } <= first.keys()


@pytest.mark.parametrize(("capability", "dtype"), [(80, "bfloat16"), (90, "float32")])
def test_elsewhere_some_shape_of_each_product_fits_and_loads_while_it_multiplies(capability, dtype, tmp_path):
    (kernels,) = compiled(capability, dtype, "512,512,1024,16,4,swiglu", cache=tmp_path)
    for call in by_call(kernels):
        fitting = [code for *_, code in call if code["together"] and not code["spills"]]
        assert fitting, call
        assert all(code["copies"] for code in fitting), call
        assert all(code["product"] == ("FFMA" if dtype == "float32" else "HMMA") for code in fitting), call


def test_odd_sizes_compile(tmp_path):
    (kernels,) = compiled(90, "bfloat16", "70,21,19,3,2,swiglu", cache=tmp_path)
    assert all(code["together"] for *_, code in kernels.values())


def test_the_innermost_loop_is_the_shortest_that_multiplies():
    listing = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R6], desc[UR14][R38.64], P1 ;
.L_x_2:
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/               @P2 BRA `(.L_x_3) ;
        /*0050*/                   BRA `(.L_x_0) ;
.L_x_3:
        /*0060*/                   IADD3 R1, R1, 1, RZ ;
        /*0070*/               @P1 BRA `(.L_x_3) ;
""".splitlines()
    assert innermost_loop(listing) == {"LDGSTS": 1, "HGMMA": 1, "BRA": 1}
    assert innermost_loop([line for line in listing if "HGMMA" not in line]) == {}
