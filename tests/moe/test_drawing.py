"""Some rows of a tensor that is drawn at random are those of the whole tensor."""

import pytest
import torch
from torch import nn

from sparsegate.moe import drawing
from sparsegate.moe.drawing import draw_normal
from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.experts.swiglu import SwiGLU

OWN = {"first": range(3), "middle": range(2, 9), "last": range(9, 11), "every third": range(1, 11, 3)}


@pytest.mark.parametrize("shape", [(11, 16), (11, 3), (11,), (11, 5, 7), (11, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
@pytest.mark.parametrize("block", [1, 64])
def test_rows_are_those_of_the_whole_and_so_is_what_is_drawn_next(shape, dtype, own, block, monkeypatch):
    monkeypatch.setattr(drawing, "_BLOCK", block)
    whole = torch.full(shape, torch.nan, dtype=dtype)
    torch.manual_seed(4)
    draw_normal(whole, std=0.3, own=range(11), num_rows=11)
    after = torch.rand(3)
    if dtype != torch.bfloat16:
        torch.manual_seed(4)
        assert torch.equal(whole, nn.init.normal_(torch.empty(shape, dtype=dtype), std=0.3))
    some = torch.full((len(own), *shape[1:]), torch.nan, dtype=dtype)
    torch.manual_seed(4)
    draw_normal(some, std=0.3, own=own, num_rows=11)
    assert torch.equal(some, whole[list(own)])
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("kind", [FeedForward, SwiGLU])
@pytest.mark.parametrize("storage", [None, torch.bfloat16], ids=str)
def test_experts_made_alone_have_the_weights_that_they_have_among_all(kind, storage):
    options = {"width": 3, "hidden": 5, "num_experts": 7, "storage": storage}
    torch.manual_seed(1)
    whole = kind(**options)
    torch.manual_seed(1)
    part = kind(**options, own=range(2, 5))
    assert part.num_experts == 3
    for name, weight in part.named_parameters():
        assert torch.equal(weight, whole.get_parameter(name)[2:5])
