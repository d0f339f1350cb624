import re
from dataclasses import replace

import pytest

from sparsegate.benchmarking import shape as module
from sparsegate.benchmarking.layer import make_layer
from sparsegate.benchmarking.shape import Shape, require_memory


def test_bytes_and_operations_are_those_of_the_layer(shape: Shape):
    moe = make_layer(shape)
    assert shape.weight_bytes == sum(p.nbytes for p in moe.experts.parameters())
    forward = 2 * shape.pairs * moe.experts.ops_per_pair()  # a multiply-add is two operations
    assert shape.flops(pairs_per_token=shape.k, training=False) == forward
    assert shape.flops(pairs_per_token=shape.k, training=True) == 3 * forward


def test_what_does_not_fit_is_refused_with_both_sizes(shape: Shape, monkeypatch: pytest.MonkeyPatch):
    large = replace(shape, experts=1 << 40)
    monkeypatch.setattr(module, "available_bytes", lambda: 3_000_000_000)
    with pytest.raises(
        ValueError, match=re.escape("experts (1,099,511,627,776) with tokens (40) need ")
    ) as told:
        require_memory(large, training=True)
    assert "and 3.0 GB are free" in str(told.value)
    require_memory(shape, training=True)
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    require_memory(large, training=True)
