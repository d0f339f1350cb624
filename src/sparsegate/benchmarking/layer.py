"""What is timed: a dense layer, our experts, our whole layer, a plain loop, and the parts of routing.

All of them map the same tokens. The dense layer has hidden `k * hidden`: the multiply-adds of k experts.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..moe.dispatch import combine, dispatch, plan_rows
from ..moe.layer import MoE
from ..moe.losses import importance_loss, load_loss
from ..moe.routing import Routing
from .shape import DTYPES, Shape, too_large

Kind = Literal["dense", "experts", "sink", "layer"]


class Batch(NamedTuple):
    """Tokens [T, D], the output's gradient [T, D], and a Routing of the tokens whose weights are a leaf."""

    x_TD: Tensor
    grad_TD: Tensor
    routing: Routing


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One who is timed.

    kind: "experts" work from the Routing that they are given; "sink" is the same, but keeps no gradient of
    weights; a "layer" decides by itself and has its losses.
    note: what it computes. forward: tokens and a Routing to y [T, D] and a loss to be added, or None.
    parameters: what it owns, all of which must receive gradients. pairs_per_token: how many experts a token
    has. weights: gives the tensors w_in [E, D, H] and w_out [E, H, D] of experts that eq. 1 says all about,
    and their gradients after a step; None for others. keeping: while it is entered, the gradients of these
    experts stay until they are asked for. obstacle: why it is not run on a shape, forward and backward or
    forward alone; None: nothing. uses_given_experts: whether it reads the weights of the experts in the
    batch's Routing, and no others.
    """

    name: str
    kind: Kind
    note: str
    forward: Callable[[Tensor, Routing], tuple[Tensor, Tensor | None]]
    parameters: Sequence[Tensor]
    pairs_per_token: int
    weights: Callable[[], "Weights"] | None = None
    keeping: Callable[[Collection[int]], AbstractContextManager[object]] = nullcontext
    obstacle: Callable[[Shape, bool], str | None] = lambda shape, training: None
    uses_given_experts: bool


class Weights(NamedTuple):
    """Weights w_in [E, D, H] and w_out [E, H, D], and gradients, of all experts or those that are kept."""

    w_in_EDH: Tensor
    w_out_EHD: Tensor
    grad_in_EDH: Tensor | Mapping[int, Tensor] | None
    grad_out_EHD: Tensor | Mapping[int, Tensor] | None


def train_step(contestant: Contestant, batch: Batch) -> Tensor:
    """Forward and backward; gradients stay behind. Returns y [T, D]."""
    y_TD, loss = contestant.forward(batch.x_TD, batch.routing)
    backward(y_TD, loss, batch)
    return y_TD


def backward(y_TD: Tensor, loss: Tensor | None, batch: Batch) -> None:
    losses = [] if loss is None else [loss]
    torch.autograd.backward([y_TD, *losses], [batch.grad_TD, *[None for _ in losses]])


def release(contestant: Contestant, batch: Batch) -> None:
    """Give all gradients back, as `zero_grad(set_to_none=True)` does."""
    for leaf in (*contestant.parameters, batch.x_TD, batch.routing.weight_N):
        leaf.grad = None


def make_layer(shape: Shape) -> MoE:
    """The paper's layer with a gate that prefers some experts for some tokens, as a trained one does."""
    moe = MoE.noisy_topk(
        width=shape.width,
        hidden=shape.hidden,
        num_experts=shape.experts,
        k=shape.k,
        dtype=DTYPES[shape.dtype],
    )
    for parameter in moe.gate.parameters():
        nn.init.normal_(parameter, std=shape.width**-0.5)
    return moe


def make_batch(shape: Shape, moe: MoE) -> Batch:
    """Normal tokens, routed by the layer's gate in its present mode."""
    dtype = DTYPES[shape.dtype]
    x_TD = torch.randn(shape.tokens, shape.width, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        routing = moe.gate(x_TD)
    leaf_N = routing.weight_N.detach().requires_grad_()
    return Batch(x_TD, torch.randn(shape.tokens, shape.width, dtype=dtype), replace(routing, weight_N=leaf_N))


def dense(shape: Shape) -> Contestant:
    dtype, hidden = DTYPES[shape.dtype], shape.k * shape.hidden
    layers = nn.Sequential(
        nn.Linear(shape.width, hidden, bias=False, dtype=dtype),
        nn.ReLU(),
        nn.Linear(hidden, shape.width, bias=False, dtype=dtype),
    )
    return Contestant(
        name="dense",
        kind="dense",
        note=f"one ReLU layer of hidden {hidden:,}",
        forward=lambda x_TD, routing: (layers(x_TD), None),
        parameters=list(layers.parameters()),
        pairs_per_token=shape.k,
        uses_given_experts=False,
    )


def own_experts(shape: Shape, moe: MoE) -> Contestant:
    return Contestant(
        name="sparsegate experts",
        kind="experts",
        note="dispatch, products, combine",
        forward=lambda x_TD, routing: (moe.experts(x_TD, routing), None),
        parameters=list(moe.experts.parameters()),
        pairs_per_token=shape.k,
        uses_given_experts=True,
        weights=lambda: own_weights(moe),
    )


class _Forgetting:
    """A `GradientSink` that has no use for gradients, and keeps some in checks alone."""

    def __init__(self) -> None:
        self._wanted: Collection[int] = ()
        self._kept: dict[tuple[int, int], Tensor] = {}

    def consume(self, weight_EDH: Tensor, first_expert: int, grad_EDH: Tensor) -> None:
        for expert, grad_DH in enumerate(grad_EDH, first_expert):
            if expert in self._wanted:
                self._kept[id(weight_EDH), expert] = grad_DH.clone()

    @contextmanager
    def keeping(self, experts: Collection[int]) -> Iterator[None]:
        self._wanted = experts
        try:
            yield
        finally:
            self._wanted = ()
            self._kept.clear()

    def kept(self, weight_EDH: Tensor) -> Mapping[int, Tensor]:
        return {expert: grad_DH for (key, expert), grad_DH in self._kept.items() if key == id(weight_EDH)}


def own_sunk_experts(shape: Shape, moe: MoE) -> Contestant:
    """As an optimizer has them that updates each expert as soon as it has its gradient."""
    sink = _Forgetting()

    def forward(x_TD: Tensor, routing: Routing) -> tuple[Tensor, None]:
        moe.experts.give_gradients_to(sink)
        try:
            return moe.experts(x_TD, routing), None
        finally:
            moe.experts.give_gradients_to(None)

    def weights() -> Weights:
        w_in_EDH, w_out_EHD = moe.experts.parameters()
        return Weights(w_in_EDH.detach(), w_out_EHD.detach(), sink.kept(w_in_EDH), sink.kept(w_out_EHD))

    return Contestant(
        name="sparsegate sink",
        kind="sink",
        note="its experts, each of whose weight gradients goes to a sink that drops it",
        forward=forward,
        parameters=[],
        pairs_per_token=shape.k,
        uses_given_experts=True,
        weights=weights,
        keeping=sink.keeping,
    )


def own_layer(shape: Shape, moe: MoE) -> Contestant:
    def forward(x_TD: Tensor, _: Routing) -> tuple[Tensor, Tensor | None]:
        y_TD, routing = moe(x_TD)
        return y_TD, importance_loss(routing) + load_loss(routing) if moe.training else None

    return Contestant(
        name="sparsegate layer",
        kind="layer",
        note="noisy top-k gate, importance and load loss; no token dropped",
        forward=forward,
        parameters=list(moe.parameters()),
        pairs_per_token=shape.k,
        uses_given_experts=True,  # in evaluation its gate decides as for the batch
    )


def plain_loop(shape: Shape, moe: MoE) -> Contestant:
    w_in_EDH, w_out_EHD = moe.experts.parameters()

    def forward(x_TD: Tensor, routing: Routing) -> tuple[Tensor, None]:
        order_N = routing.expert_N.argsort(stable=True)
        token_N, weight_N = routing.token_N[order_N], routing.weight_N[order_N]
        rows = x_TD[token_N].split(routing.expert_N.bincount(minlength=shape.experts).tolist())
        # Indexing a stacked weight in the loop would make a gradient of its full size for each expert.
        triples = zip(rows, w_in_EDH.unbind(), w_out_EHD.unbind(), strict=True)
        rows_ND = torch.cat([(r_RD @ w_in_DH).relu() @ w_out_HD for r_RD, w_in_DH, w_out_HD in triples])
        weighted_ND = rows_ND * weight_N[:, None].to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, token_N, weighted_ND), None

    return Contestant(
        name="plain loop",
        kind="experts",
        note="sort, one product per expert over unbound weights, index_add",
        forward=forward,
        parameters=[w_in_EDH, w_out_EHD],
        pairs_per_token=shape.k,
        uses_given_experts=True,
        weights=lambda: own_weights(moe),
        obstacle=_loop_obstacle,
    )


def _loop_obstacle(shape: Shape, training: bool) -> str | None:
    """Backward stacks the gradients of the single experts into one of them all."""
    return too_large(2 * shape.weight_bytes + shape.working_bytes()) if training else None


def own_weights(moe: MoE) -> Weights:
    w_in_EDH, w_out_EHD = moe.experts.parameters()
    return Weights(w_in_EDH.detach(), w_out_EHD.detach(), w_in_EDH.grad, w_out_EHD.grad)


def parts(moe: MoE, batch: Batch) -> Mapping[str, Callable[[], object]]:
    """The stages around the products, one by one; forward and backward where there is a backward."""
    grad_N = torch.randn_like(batch.routing.weight_N)
    plan = plan_rows(batch.routing)

    def gate(with_losses: bool) -> None:
        routing = moe.gate(batch.x_TD)
        losses = [importance_loss(routing) + load_loss(routing)] if with_losses else []
        torch.autograd.backward([routing.weight_N, *losses], [grad_N, *[None for _ in losses]])
        _release_gate()

    def there_and_back() -> None:
        rows_ND = dispatch(batch.x_TD, plan)
        combine(rows_ND, plan, batch.routing.weight_N).to(batch.x_TD.dtype).backward(batch.grad_TD)
        _release_gate()

    def _release_gate() -> None:
        for leaf in (*moe.gate.parameters(), batch.x_TD, batch.routing.weight_N):
            leaf.grad = None

    return {
        "gate": lambda: gate(with_losses=False),
        "gate and losses": lambda: gate(with_losses=True),
        "plan": lambda: plan_rows(batch.routing),
        "dispatch and combine": there_and_back,
    }
