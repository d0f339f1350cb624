"""Data-parallel training of the layer equals one process, whoever receives how many tokens."""

import pytest
import torch

from tests.helpers.moe_ranks import Case, build, gradients_on_ranks, loss_of, whole_batch
from tests.helpers.tolerances import assert_close

CASES = [Case("feed_forward", 9), Case("feed_forward", 12), Case("modules", 7)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return gradients_on_ranks(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_with_uneven_tokens_have_the_gradients_of_one_process(case, found):
    moe = build(case.kind)
    loss, sums = loss_of(moe, whole_batch(), others=None)
    loss.backward()
    assert sums.count_E[3:].tolist() == [0, 0, 0]
    for ours in found[case]:
        for name, parameter in moe.named_parameters():
            assert_close(ours[name], parameter.grad)


def test_the_whole_batch_leaves_experts_without_tokens_a_gradient_of_zero():
    moe = build("feed_forward")
    loss, _ = loss_of(moe, whole_batch(), others=None)
    loss.backward()
    assert not moe.experts.w_in.grad[3:].any()
    assert torch.stack([g.any() for g in moe.experts.w_in.grad[:3]]).all()
