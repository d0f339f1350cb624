"""Products on the CPU: torch.mm's values, whichever library computes them."""

import pytest
import torch

from sparsegate.moe.kernels import products
from sparsegate.moe.kernels.products import _suits_onednn, multiply, product
from tests.helpers.tolerances import TOLERANCES, assert_close


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 50])
@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("fewest", [0, products._FEWEST_NUMBERS], ids=["large", "small"])
def test_values_are_those_of_a_product(dtype, num_rows, layout, fewest, monkeypatch):
    monkeypatch.setattr(products, "_FEWEST_NUMBERS", fewest)
    left_ND = torch.randn(num_rows, 6, dtype=dtype)
    right_DH = {
        "rows": lambda: torch.randn(6, 5),
        "columns": lambda: torch.randn(5, 6).t(),
        "neither": lambda: torch.randn(6, 10)[:, ::2],
    }[layout]().to(dtype)
    expected = left_ND.double() @ right_DH.double()
    assert_close(product(left_ND, right_DH), expected, dtype=dtype)
    out_NH = torch.empty(num_rows, 5, dtype=dtype)
    multiply(left_ND, right_DH, out=out_NH)
    assert_close(out_NH, expected, dtype=dtype)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")  # of the flags themselves
def test_onednn_multiplies_float32_unless_the_user_turned_it_off():
    left_ND, right_DH = torch.randn(8, 512), torch.randn(512, 1024)
    assert _suits_onednn(left_ND, right_DH)
    assert not _suits_onednn(left_ND, right_DH[:, :1000].contiguous())
    assert _suits_onednn(torch.randn(9, 512), right_DH[:, :1000].contiguous())
    assert not _suits_onednn(left_ND.double(), right_DH.double())
    assert not _suits_onednn(left_ND[:2], right_DH)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _suits_onednn(left_ND, right_DH)
