import pytest

from sparsegate.benchmarking.layer import Batch, make_batch, make_layer
from sparsegate.benchmarking.shape import Shape
from sparsegate.moe.layer import MoE


@pytest.fixture(params=["float32", "bfloat16"])
def shape(request: pytest.FixtureRequest) -> Shape:
    return Shape(tokens=40, width=16, hidden=24, experts=6, k=2, dtype=request.param)


@pytest.fixture
def moe(shape: Shape) -> MoE:
    return make_layer(shape)


@pytest.fixture
def batch(shape: Shape, moe: MoE) -> Batch:
    return make_batch(shape, moe)
