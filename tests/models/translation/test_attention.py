"""Attention against its equations, by loops over all pairs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsegate.models.translation.attention import AdditiveAttention, ProductAttention, masked_softmax
from tests.helpers.moe_cases import gradients
from tests.helpers.tolerances import assert_close

B, S, U, D, A = 2, 3, 4, 5, 7
KINDS = {"product": ProductAttention, "additive": AdditiveAttention}
of_each_kind = pytest.mark.parametrize("kind", KINDS)


def an_attention(kind):
    return KINDS[kind](width=D, hidden=A, dtype=torch.float64)


def some_input(num_rows=B):
    source_BUD = torch.randn(B, U, D, dtype=torch.float64, requires_grad=True)
    query_BSD = torch.randn(num_rows, S, D, dtype=torch.float64, requires_grad=True)
    return source_BUD, query_BSD, torch.arange(U) < torch.tensor([[U], [2]])


def one_score(kind, attention, x_D, y_D):
    """Eq. 21 or 22, term by term."""
    total = 0.0
    for d in range(A):
        of_x, of_y = (x_D * attention.w_source[:, d]).sum(), (y_D * attention.w_query[:, d]).sum()
        if kind == "product":
            total = total + attention.w_score[d] * torch.tanh(of_x) * torch.tanh(of_y)
        else:
            total = total + attention.w_score[d] * torch.tanh(of_x + of_y)
    return total


def attend(kind, attention, source_UD, query_D, length):
    """Weights over the first `length` of a source, 0 over the rest, and the mean of the source by them."""
    scores = [one_score(kind, attention, x_D, query_D) for x_D in source_UD[:length]]
    total = sum(score.exp() for score in scores)
    weights = [score.exp() / total for score in scores] + [torch.zeros(())] * (len(source_UD) - length)
    return sum(w * x_D for w, x_D in zip(weights, source_UD, strict=True)), torch.stack(weights)


@of_each_kind
def test_eq_21_and_22_are_their_sums_over_the_pairs(kind):
    attention = an_attention(kind)
    source_BUD, query_BSD, mask_BU = some_input()
    context, weight = attention(query_BSD, attention.remember(source_BUD, mask_BU))
    rows = [
        [attend(kind, attention, source_BUD[b], y_D, int(mask_BU[b].sum())) for y_D in query_BSD[b]]
        for b in range(B)
    ]
    theirs_context = torch.stack([torch.stack([c for c, _ in row]) for row in rows])
    theirs_weight = torch.stack([torch.stack([w for _, w in row]) for row in rows])
    assert_close(context, theirs_context)
    assert_close(weight, theirs_weight)
    cotangent, of = torch.randn_like(context), (source_BUD, query_BSD, *attention.parameters())
    for ours, theirs in zip(
        gradients((context * cotangent).sum(), *of),
        gradients((theirs_context * cotangent).sum(), *of),
        strict=True,
    ):
        assert_close(ours, theirs)


class LargestResult(TorchDispatchMode):
    """Notes the size of the largest tensor that anything returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def largest_result(kind, *, training: bool) -> int:
    attention = KINDS[kind](width=2, hidden=16)
    source, query = torch.randn(1, 50, 2, requires_grad=True), torch.randn(1, 40, 2)
    with LargestResult() as noted, torch.set_grad_enabled(training):
        context, _ = attention(query, attention.remember(source, torch.ones(1, 50, dtype=torch.bool)))
        if training:
            context.sum().backward()
    return noted.largest


def test_eq_22_is_one_product_without_a_number_for_each_pair_and_unit():
    assert largest_result("product", training=True) == 50 * 40
    assert largest_result("additive", training=False) == 50 * 40  # step by step


@of_each_kind
def test_several_queries_of_a_sentence_read_the_same_memory(kind):
    attention = an_attention(kind)
    source_BUD, query_BSD, mask_BU = some_input(num_rows=3 * B)
    context, weight = attention(query_BSD, attention.remember(source_BUD, mask_BU))
    repeated = attention.remember(source_BUD.repeat_interleave(3, 0), mask_BU.repeat_interleave(3, 0))
    for ours, theirs in zip((context, weight), attention(query_BSD, repeated), strict=True):
        assert_close(ours, theirs)


@of_each_kind
@pytest.mark.parametrize("num_rows", [1, 3])
def test_rows_that_do_not_belong_to_the_sentences_are_refused(kind, num_rows):
    attention = an_attention(kind)
    source_BUD, query_BSD, mask_BU = some_input(num_rows=num_rows)
    # Of four steps each, three rows could be shared out among two sentences all the same.
    query_BSD = torch.cat([query_BSD, query_BSD[:, :1]], dim=1)
    with pytest.raises(ValueError, match=rf"^query_BSD \({num_rows} rows\) must have equally many .* \(2\)$"):
        attention(query_BSD, attention.remember(source_BUD, mask_BU))
    none = attention.remember(source_BUD[:0], mask_BU[:0])
    with pytest.raises(ValueError, match=rf"^query_BSD \({num_rows} rows\) must have equally many .* \(0\)$"):
        attention(query_BSD, none)


@of_each_kind
def test_no_sentence_at_all_is_a_batch_as_well(kind):
    """Of a rank that has none; its weights take part in backward."""
    attention = an_attention(kind)
    source_BUD, query_BSD, mask_BU = some_input()
    memory = attention.remember(source_BUD[:0], mask_BU[:0])
    context, weight = attention(query_BSD[:0], memory)
    assert context.shape == (0, query_BSD.shape[1], source_BUD.shape[2])
    assert weight.shape == (0, query_BSD.shape[1], source_BUD.shape[1])
    for gradient in gradients(context.sum(), *attention.parameters()):
        assert not gradient.any()


@of_each_kind
def test_an_empty_source_has_no_attention_and_finite_gradients(kind):
    attention = an_attention(kind)
    source_BUD, query_BSD, mask_BU = some_input()
    mask_BU[1] = False
    context, weight = attention(query_BSD, attention.remember(source_BUD, mask_BU))
    assert not context[1].any()
    assert not weight[1].any()
    for gradient in gradients(context.sum(), source_BUD, query_BSD, *attention.parameters()):
        assert gradient.isfinite().all()


def test_weights_are_in_float32_at_least():
    attention = ProductAttention(width=D, hidden=A, dtype=torch.bfloat16)
    source_BUD, query_BSD, mask_BU = some_input()
    context, weight = attention(query_BSD.bfloat16(), attention.remember(source_BUD.bfloat16(), mask_BU))
    assert (context.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
    assert_close(weight.sum(-1), torch.ones(B, S))


def test_a_fresh_attention_looks_everywhere():
    attention = ProductAttention(width=64, hidden=64)
    source_BUD, query_BSD = torch.randn(5, 10, 64), torch.randn(5, 7, 64)
    _, weight = attention(query_BSD, attention.remember(source_BUD, torch.ones(5, 10, dtype=torch.bool)))
    assert float(weight.detach().max()) < 0.6


def test_a_memory_is_selected_by_sentence():
    attention = an_attention("product")
    source_BUD, query_BSD, mask_BU = some_input()
    memory = attention.remember(source_BUD, mask_BU)
    second = memory.select(torch.tensor([1]))
    assert second.num_sentences == 1
    assert torch.equal(attention(query_BSD[1:], second)[0], attention(query_BSD, memory)[0][1:])


def test_the_masked_softmax_is_a_softmax_of_what_is_left():
    score = torch.randn(3, 4, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [False, True, False, True], [False] * 4])
    weight = masked_softmax(score, mask)
    assert_close(weight[0], score[0].softmax(0))
    assert_close(weight[1, [1, 3]], score[1, [1, 3]].softmax(0))
    assert weight[~mask].tolist() == [0.0] * 6
