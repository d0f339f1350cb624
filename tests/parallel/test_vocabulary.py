"""Tables whose words are spread over ranks: rows, losses and gradients are those of the whole tables."""

import pytest
import torch

from tests.helpers.tolerances import assert_close
from tests.helpers.word_ranks import (
    Case,
    looked_up_by_a_rank,
    nll_in_one_process,
    nll_of_a_rank,
    of_rank,
    refusal_of_a_rank,
    tables,
    tokens,
)

SIZES = [(30,), (7, 12), (0, 5), (4, 0, 31), (0, 0, 0)]


@pytest.mark.parametrize("case", [Case(sizes) for sizes in SIZES], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_and_their_gradients_are_those_of_the_whole_table(case, sparse, ranks):
    found = ranks.run(looked_up_by_a_rank, len(case.sizes), case, sparse)
    whole = [table.requires_grad_() for table in tables()]
    word_N, _, weight_N = tokens(case)
    (whole[0][word_N].sum(dim=1) * weight_N + whole[1][word_N] * weight_N).sum().backward()
    for rank, (rows, gradients, _) in enumerate(found):
        own_N, *_ = of_rank(case, rank, tokens(case))
        for row, gradient, table in zip(rows, gradients, whole, strict=True):
            assert torch.equal(row, table[own_N])
            assert_close(gradient, table.grad[rank :: len(found)])


def test_each_word_is_sent_once_to_each_rank_that_asks_for_it(ranks):
    case = Case((40, 3, 0))
    for rank, (_, _, received) in enumerate(ranks.run(looked_up_by_a_rank, 3, case, False)):
        word_N, *_ = of_rank(case, rank, tokens(case))
        assert received == len(word_N.unique())


@pytest.mark.parametrize("at_once", [1 << 24, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_exact_loss_is_that_of_one_process_in_pieces_too(sizes, at_once, ranks):
    case = Case(sizes, at_once)
    nll_T, grad_hidden_TD, grads = nll_in_one_process(case)
    for rank, (own_T, own_TD, own) in enumerate(ranks.run(nll_of_a_rank, len(sizes), case)):
        assert_close(own_T, nll_T.split(sizes)[rank])
        assert_close(own_TD, grad_hidden_TD.split(sizes)[rank])
        for found, expected in zip(own, grads, strict=True):
            assert_close(found, expected[rank :: len(sizes)])


def test_fewer_words_than_ranks_are_refused(ranks):
    assert ranks.run(refusal_of_a_rank, 3)[0].startswith(
        "ranks that share the vocabulary (3) must not exceed its 2 words"
    )
