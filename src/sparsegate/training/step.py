"""One training step: loss and gradient of one batch, checked, then applied."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..models import LayeredModel
from ..moe.losses import importance_loss, load_loss, switch_loss, threshold_loss, z_loss
from ..moe.routing import BalanceSums
from .config import LossConfig, RunConfig
from .gradients import gradients_of
from .ranks import ALONE, Ranks
from .tasks.task import Forward, Part, State, SumsByLayer

# Of a group of an optimizer: its learning rate over that of the step.
RATE = "rate"


class NonFinite(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """What a batch says, before anything is changed; the gradients themselves stand in `.grad`.

    nll: mean negative log-likelihood per token, nats. balance: the weighted balance losses. norm: global norm
    of the gradients before clipping. sums: of the whole batch, by layer. state: what recurrent layers carry
    on.
    """

    nll: float
    balance: float
    norm: float
    num_tokens: int
    sums: SumsByLayer
    state: State

    @property
    def finite(self) -> bool:
        return math.isfinite(self.nll) and math.isfinite(self.balance) and math.isfinite(self.norm)


def compute_gradient(
    model: LayeredModel, parts: Sequence[Part], config: RunConfig, ranks: Ranks = ALONE
) -> Gradient:
    """Leave in `.grad` the gradient of a batch's loss: the mean loss per token plus the balance losses.

    Every part is scaled by the token count of the whole batch, so that the gradients of micro-batches simply
    add up. With several of them and `balance = "batch"` the losses are those of the joined batch, exactly: a
    first pass without gradients finds the batch's sums, and each part then contributes the derivative of the
    loss at these sums times its own sums. Nothing but `.grad` changes, and the experts that are updated in
    the backward pass; no loss that is not finite has one.

    ranks: the parts are this rank's, equally many on each, and the batch is that of all of them: what is
    returned is of the whole batch, but for `state`. They go through the backward pass together, whatever
    their losses are.
    """
    num_tokens = int(ranks.sum(sum(part.num_tokens for part in parts))[0])
    joined = config.training.balance == "batch"
    slope = None
    if len(parts) > 1 and joined and model.has_mixtures():
        with torch.no_grad():
            total = add_sums([_forward(model, part, config).sums for part in parts])
            slope = balance_slope(ranks.total(total), config.losses)
    model.zero_grad(set_to_none=True)
    outputs, nll, part_losses, is_finite = [], 0.0, 0.0, True
    for part in parts:
        output = _forward(model, part, config)
        losses = output.losses()
        if slope is not None:
            part_balance = linear_in_sums(output.sums, slope)
        elif joined:
            part_balance = balance_loss(ranks.total(output.sums), config.losses)
        else:
            part_balance = balance_loss(output.sums, config.losses) / (len(parts) * ranks.num_ranks)
        loss = losses.trained / num_tokens + part_balance
        is_finite = is_finite and bool(loss.isfinite())
        if is_finite or ranks.num_ranks > 1:  # or the weights that are updated in backward would be spoiled
            with ranks.adding_up_gradients(model) if part is parts[-1] else nullcontext():
                loss.backward()
        nll, part_losses = nll + (losses.nll / num_tokens).item(), part_losses + part_balance.item()
        outputs.append((output.sums, output.state))
    sums = ranks.total(add_sums([pytree.tree_map(torch.Tensor.detach, s) for s, _ in outputs]))
    nll, part_losses = ranks.sum(nll, part_losses)
    return Gradient(
        nll=nll,
        balance=float(balance_loss(sums, config.losses)) if joined else part_losses,
        norm=ranks.gradient_norm(model) if is_finite or ranks.num_ranks > 1 else math.nan,
        num_tokens=num_tokens,
        sums=sums,
        state=_join_states([state for _, state in outputs]),
    )


def apply_gradient(
    model: LayeredModel,
    optimizers: Sequence[torch.optim.Optimizer],
    gradient: Gradient,
    *,
    learning_rate: float,
    clip_norm: float,
) -> None:
    """Clip the finite gradient that stands in `.grad` to a global norm, and update the weights."""
    assert gradient.finite
    scale = clip_norm / (gradient.norm + 1e-6)
    if scale < 1:
        for values in gradients_of(model):
            values.mul_(scale)
    set_learning_rate(optimizers, learning_rate)
    for optimizer in optimizers:
        optimizer.step()


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Of the next step; before a backward pass that updates weights."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get(RATE, 1.0)


def balance_loss(sums: Mapping[str, BalanceSums], weights: LossConfig) -> Tensor:
    """The weighted losses of what gates decided, added over the layers; 0 without mixtures."""
    losses = [
        weights.importance * importance_loss(s)
        + weights.load * load_loss(s)
        + weights.switch * switch_loss(s)
        + weights.z * z_loss(s)
        + weights.threshold * threshold_loss(s)
        for s in sums.values()
    ]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def balance_slope(total: SumsByLayer, weights: LossConfig) -> list[Tensor | None]:
    """Derivative of the balance loss with respect to each leaf of the total sums; None for integer leaves."""
    leaves, spec = pytree.tree_flatten(total)
    leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    with torch.enable_grad():
        loss = balance_loss(pytree.tree_unflatten(leaves, spec), weights)
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    slopes = iter(torch.autograd.grad(loss, inputs, allow_unused=True))
    return [next(slopes) if leaf.requires_grad else None for leaf in leaves]


def linear_in_sums(part: SumsByLayer, slope: list[Tensor | None]) -> Tensor:
    """The surrogate loss of one part: its gradient is the part's share of the batch's balance gradient."""
    terms = [
        (leaf * leaf_slope).sum()
        for leaf, leaf_slope in zip(pytree.tree_leaves(part), slope, strict=True)
        if leaf_slope is not None
    ]
    return torch.stack(terms).sum()


def add_sums(parts: list[SumsByLayer]) -> SumsByLayer:
    """Sums of the joined batch, by layer."""
    total = parts[0]
    for part in parts[1:]:
        total = {name: total[name] + part[name] for name in total}
    return total


def _forward(model: LayeredModel, part: Part, config: RunConfig) -> Forward:
    """One pass in training mode; equal whenever it is repeated, dropout and noise included."""
    torch.manual_seed(part.seed)
    device = model.softmax.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=config.training.precision == "bfloat16"):
        return part.forward()


def _join_states(states: list[State]) -> State:
    """The carried states of all rows, cut off from the graph that made them."""
    return {
        name: (
            torch.cat([state[name][0] for state in states], dim=1).detach(),
            torch.cat([state[name][1] for state in states], dim=1).detach(),
        )
        for name in states[0]
    }
