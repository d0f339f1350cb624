"""Data-parallel training of the layer equals one process, whoever receives how many tokens."""

import pytest
import torch

from tests.helpers.moe_ranks import build, gradients_of_ranks, loss_of, whole_batch
from tests.helpers.tolerances import assert_close


@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        ("feed_forward", 9),
        pytest.param("feed_forward", 12, marks=pytest.mark.nightly, id="a rank without a token"),
        pytest.param("modules", 9, marks=pytest.mark.nightly),
    ],
)
def test_two_ranks_with_uneven_tokens_have_the_gradients_of_one_process(kind, cut, tmp_path):
    moe = build(kind)
    loss, sums = loss_of(moe, whole_batch(), others=None)
    loss.backward()
    assert sums.count_E[3:].tolist() == [0, 0]
    for ours in gradients_of_ranks(kind, cut=cut, folder=tmp_path):
        for name, parameter in moe.named_parameters():
            assert_close(ours[name], parameter.grad)


def test_the_whole_batch_leaves_experts_without_tokens_a_gradient_of_zero():
    moe = build("feed_forward")
    loss, _ = loss_of(moe, whole_batch(), others=None)
    loss.backward()
    assert not moe.experts.w_in.grad[3:].any()
    assert torch.stack([g.any() for g in moe.experts.w_in.grad[:3]]).all()
