"""Some rows of a table that is drawn at random are those of the whole table."""

import pytest
import torch
from torch import nn

from sparsegate.parallel import drawing
from sparsegate.parallel.drawing import draw_rows

OWN = {"first": range(3), "middle": range(2, 9), "last": range(9, 11), "every third": range(1, 11, 3)}


@pytest.mark.parametrize("shape", [(11, 16), (11, 3), (11,), (11, 5, 7), (11, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
@pytest.mark.parametrize("block", [1, 64])
def test_rows_are_those_of_the_whole_and_so_is_what_is_drawn_next(shape, dtype, own, block, monkeypatch):
    monkeypatch.setattr(drawing, "_BLOCK", block)
    torch.manual_seed(4)
    whole = nn.init.normal_(torch.empty(shape, dtype=dtype), std=0.3)
    after = torch.rand(3)
    for rows in (range(11), own):
        some = torch.full((len(rows), *shape[1:]), torch.nan, dtype=dtype)
        torch.manual_seed(4)
        draw_rows(some, std=0.3, own=rows, num_rows=11)
        assert torch.equal(some, whole[list(rows)])
        assert torch.equal(torch.rand(3), after)
