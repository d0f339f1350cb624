"""The Triton kernels against the plain products: on a GPU where there is one, else in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

from sparsegate.moe.dispatch import Plan, combine, dispatch, plan_rows
from sparsegate.moe.kernels import reference
from sparsegate.moe.kernels.triton import feed_forward as operators
from sparsegate.moe.kernels.triton.feed_forward import feed_forward
from sparsegate.moe.kernels.triton.schedule import Schedule, make_schedule
from sparsegate.moe.kernels.triton.schedule import _make_schedule as make_schedule_operator
from sparsegate.moe.routing import Routing, only_group, sums_of_logits
from tests.helpers.tolerances import assert_close

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ACTIVATIONS = ("relu", "swiglu")


def a_routing(num_tokens: int, num_experts: int, k: int, *, chosen=None, mask_T=None) -> Routing:
    logit_TE = torch.randn(num_tokens, num_experts, device=DEVICE)
    weight_TK, expert_TK = logit_TE.softmax(-1).topk(k)
    return Routing.of_token_choice(
        logit_sums=sums_of_logits(logit_TE, only_group(mask_T)),
        expert_TK=expert_TK if chosen is None else chosen,
        weight_TK=weight_TK,
        mask_T=mask_T,
        load_E=None,
    )


def operands(routing: Routing, activation: str, *, width=21, hidden=19, dtype=torch.float32) -> list[Tensor]:
    """x, w_in, w_out and the gate's weights, all of which need a gradient."""
    columns = hidden * (2 if activation == "swiglu" else 1)
    shapes = [
        (routing.pairs_T.shape[0], width),
        (routing.num_experts, width, columns),
        (routing.num_experts, hidden, width),
    ]
    made = [torch.randn(shape, device=DEVICE) / shape[-2] ** 0.5 for shape in shapes[1:]]
    made = [torch.randn(shapes[0], device=DEVICE), *made]
    weight_N = routing.weight_N.detach().clone()
    return [t.to(dtype).requires_grad_() for t in made] + [weight_N.requires_grad_()]


def plain(x_TD, w_in_EDS, w_out_EHD, weight_N, plan: Plan, activation: str) -> Tensor:
    pre_NS = reference.grouped_product(dispatch(x_TD, plan), w_in_EDS, plan.end_E)
    if activation == "relu":
        hidden_NH = pre_NS.relu()
    else:
        gate_NH, up_NH = pre_NS.chunk(2, dim=-1)
        hidden_NH = F.silu(gate_NH) * up_NH
    return combine(reference.grouped_product(hidden_NH, w_out_EHD, plan.end_E), plan, weight_N)


def assert_equal_to_plain(routing: Routing, activation: str, given: list[Tensor], **options) -> None:
    """Values and all gradients, against the same in float64."""
    plan, dtype = plan_rows(routing), given[0].dtype
    ours = feed_forward(*given, plan, activation, **options)
    assert ours.dtype == dtype
    cotangent = torch.randn(ours.shape, device=DEVICE).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in given]
    theirs = plain(*wide, plan, activation)
    found = ours, *torch.autograd.grad(ours, given, cotangent)
    expected = theirs, *torch.autograd.grad(theirs, wide, cotangent.double())
    for our_value, their_value in zip(found, expected, strict=True):
        assert_close(our_value, their_value, dtype=dtype, scale=4)


@pytest.mark.parametrize(
    ("dtype", "recompute"),
    [
        *((dtype, recompute) for dtype in (torch.float32, torch.bfloat16) for recompute in (False, True)),
        (torch.float16, False),
    ],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_equal_the_plain_product(activation, dtype, recompute):
    routing = a_routing(23, 5, 2)
    assert_equal_to_plain(
        routing, activation, operands(routing, activation, dtype=dtype), recompute=recompute
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts_without_rows_skewed_counts_and_wide_matrices(activation):
    chosen = torch.where(torch.arange(70, device=DEVICE)[:, None] < 66, 3, torch.tensor([[1]], device=DEVICE))
    routing = a_routing(70, 5, 1, chosen=chosen)
    assert_equal_to_plain(routing, activation, operands(routing, activation, width=150, hidden=33))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_padding_leaves_no_trace_even_if_it_is_nan(activation):
    mask_T = torch.arange(20, device=DEVICE) % 3 > 0
    routing = a_routing(20, 4, 2, mask_T=mask_T)
    plan, given = plan_rows(routing), operands(routing, activation)
    padded = given[0].detach().masked_fill(~mask_T[:, None], torch.nan).requires_grad_()
    y_TD = feed_forward(padded, *given[1:], plan, activation)
    cotangent = torch.ones_like(y_TD).masked_fill(~mask_T[:, None], torch.nan)
    found = torch.autograd.grad(y_TD, (padded, *given[1:]), cotangent)
    assert not y_TD[~mask_T].any()
    assert not found[0][~mask_T].any()
    assert not found[3].unflatten(0, (20, 2))[~mask_T].any()
    assert all(gradient.isfinite().all() for gradient in found)
    assert_equal_to_plain(routing, activation, given)


def test_a_token_may_have_any_number_of_pairs():
    chosen_TE = torch.rand(19, 6, device=DEVICE) < 0.4
    logit_TE = torch.randn(19, 6, device=DEVICE)
    routing = Routing.of_batch_choice(
        logit_sums=sums_of_logits(logit_TE, None),
        chosen_TE=chosen_TE,
        weight_TE=logit_TE.sigmoid(),
        num_pairs=int(chosen_TE.sum()) + 3,
        mask_T=None,
        threshold=logit_TE.new_zeros(()),
    )
    assert routing.pairs_per_token is None
    assert_equal_to_plain(routing, "relu", operands(routing, "relu"))


def test_no_tokens_give_no_rows_and_zero_gradients():
    routing = a_routing(0, 3, 2)
    given = operands(routing, "swiglu")
    y_TD = feed_forward(*given, plan_rows(routing), "swiglu")
    assert y_TD.shape == (0, 21)
    assert not any(g.any() for g in torch.autograd.grad(y_TD.sum(), given))


def test_thousands_of_experts_for_few_tokens():
    routing = a_routing(6, 1500, 2)
    assert_equal_to_plain(routing, "relu", operands(routing, "relu", width=5, hidden=4))


def test_memory_layout_makes_no_difference():
    routing = a_routing(17, 4, 2)
    plan, given = plan_rows(routing), operands(routing, "swiglu")
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in given[:3]]
    assert not any(t.is_contiguous() for t in strided)
    ours = feed_forward(*strided, given[3], plan, "swiglu")
    theirs = feed_forward(*given, plan, "swiglu")
    assert_close(ours, theirs)
    found = torch.autograd.grad(ours.sum(), (*strided, given[3]))  # a gradient of strides 0
    for our_gradient, their_gradient in zip(
        found, torch.autograd.grad(theirs, given, torch.ones_like(theirs)), strict=True
    ):
        assert_close(our_gradient, their_gradient)


def test_the_same_call_gives_the_same_bits():
    routing = a_routing(30, 4, 3)
    plan, given = plan_rows(routing), operands(routing, "relu")
    first, second = (feed_forward(*given, plan, "relu") for _ in range(2))
    assert torch.equal(first, second)
    for a, b in zip(
        torch.autograd.grad(first.sum(), given), torch.autograd.grad(second.sum(), given), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ends", [[0, 0, 0], [3, 3, 40], [17, 33, 34]])
def test_every_row_in_use_lies_in_one_tile_of_its_expert(ends):
    schedule = make_schedule(torch.tensor(ends), 40)
    rows = 16  # of a tile, by the mean of 13 rows
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    expected = [expert for expert, count in enumerate(counts) for _ in range(0, count, rows)]
    num_tiles = int(schedule.first_tile_E1[-1])
    assert schedule.expert_of_tile[:num_tiles].tolist() == expected
    assert schedule.first_row_E1.tolist() == [0, *ends]


@pytest.mark.parametrize("keep", [True, False])
def test_the_operator_keeps_what_it_registers(keep):
    plan, given, schedule = few("relu")
    of_plan = (plan.order_N, plan.row_N, plan.token_N, plan.pairs_T)
    torch.library.opcheck(
        operators._feed_forward,
        (*given, *of_plan, *schedule, plan.pairs_per_token, False, keep, torch.float32),
    )


@pytest.mark.parametrize("activation", [pytest.param("relu", marks=pytest.mark.nightly), "swiglu"])
def test_the_other_operators_keep_what_they_register(activation):
    """Each by itself. None has a derivative, so no input needs one."""
    plan, given, schedule = few(activation)
    x_TD, w_in_EDS, w_out_EHD, weight_N = (tensor.detach() for tensor in given)
    gated, grad_y_TD = activation == "swiglu", torch.randn_like(x_TD)
    torch.library.opcheck(make_schedule_operator, (plan.end_E, 18))
    up = x_TD, w_in_EDS, plan.token_N, *schedule, gated
    torch.library.opcheck(operators._hidden, up)
    kept = operators._hidden(*up)
    of_rows = grad_y_TD, w_out_EHD, weight_N, kept, plan.order_N, plan.token_N, *schedule, gated
    torch.library.opcheck(operators._hidden_gradient, of_rows)
    grad_pre_NS, weighted_NH, _ = operators._hidden_gradient(*of_rows)
    torch.library.opcheck(
        operators._input_gradient,
        (grad_pre_NS, w_in_EDS, plan.row_N, plan.pairs_T, *schedule, plan.pairs_per_token),
    )
    for left, right, gather_left in ((x_TD, grad_pre_NS, True), (weighted_NH, grad_y_TD, False)):
        torch.library.opcheck(
            operators._weight_gradient, (left, right, plan.token_N, schedule.first_row_E1, 1, 3, gather_left)
        )


def few(activation: str) -> tuple[Plan, list[Tensor], Schedule]:
    """Nine tokens, two experts of three for each."""
    routing = a_routing(9, 3, 2)
    plan = plan_rows(routing)
    return plan, operands(routing, activation, width=6, hidden=5), make_schedule(plan.end_E, 18)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_it_compiles_to_one_graph_for_any_number_of_tokens():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(feed_forward, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (23, 31, 40):
        routing = a_routing(num_tokens, 4, 2)
        plan, given = plan_rows(routing), operands(routing, "swiglu", width=6, hidden=5)
        ours, theirs = compiled(*given, plan, "swiglu"), feed_forward(*given, plan, "swiglu")
        assert_close(ours, theirs)
        for a, b in zip(
            torch.autograd.grad(ours.square().sum(), given),
            torch.autograd.grad(theirs.square().sum(), given),
            strict=True,
        ):
            assert_close(a, b)
    assert counter.frame_count == 1


def test_autocast_computes_in_its_dtype_and_returns_that_of_x():
    routing = a_routing(9, 3, 2)
    plan, given = plan_rows(routing), operands(routing, "swiglu")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y_TD = feed_forward(*given, plan, "swiglu")
    assert y_TD.dtype == torch.float32
    assert_close(y_TD, plain(*given, plan, "swiglu"), dtype=torch.bfloat16)
    assert {g.dtype for g in torch.autograd.grad(y_TD.sum(), given)} == {torch.float32}


def test_a_second_derivative_says_which_kernel_has_it():
    routing = a_routing(5, 3, 1)
    given = operands(routing, "relu")
    y_TD = feed_forward(*given, plan_rows(routing), "relu")
    (grad_x_TD,) = torch.autograd.grad(y_TD.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="use the kernel 'loop'"):
        grad_x_TD.sum().backward()


@pytest.mark.parametrize(("dtype", "activation"), [(torch.float64, "relu"), (torch.float32, "tanh")])
def test_what_it_cannot_compute_is_refused(dtype, activation):
    routing = a_routing(5, 3, 1)
    with pytest.raises(ValueError, match="loop|activation"):
        feed_forward(*operands(routing, "relu", dtype=dtype), plan_rows(routing), activation)


def test_backward_makes_no_zeros_for_what_is_kept():
    class NoZeros(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten.zeros.default, args
            return function(*args, **kwargs or {})

    routing = a_routing(12, 4, 2)
    x_TD, *rest = operands(routing, "swiglu")
    y_TD = feed_forward(x_TD, *rest, plan_rows(routing), "swiglu")
    grad_TD = torch.ones_like(y_TD)
    with NoZeros():
        y_TD.backward(grad_TD)
