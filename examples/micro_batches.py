"""Balance losses of a whole batch, exactly, while its parts go through the model one after the other.

    python examples/micro_batches.py

The losses are functions of sums over the batch. A first pass without gradients finds these sums, and with
them the derivative of the losses with respect to each sum. In the second pass each part contributes that
derivative times its own sums: its gradient is the part's share of the gradient of the whole. Both passes use
the same noise.
"""

from functools import reduce
from operator import add

import torch
from torch import Tensor

from sparsegate import BalanceSums, MoE, importance_loss, load_loss

NUM_EXPERTS, WIDTH = 8, 16


def balance(sums: BalanceSums) -> Tensor:
    return 0.1 * importance_loss(sums) + 0.1 * load_loss(sums)


def task_sum(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum()


def differentiable(sums: BalanceSums) -> list[Tensor]:
    """All sums but the counts."""
    return [value for value in vars(sums).values() if value.is_floating_point()]


def gradients(moe: MoE) -> dict[str, Tensor]:
    """The gradients that stand in the parameters, taken out of them."""
    found = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    moe.zero_grad(set_to_none=True)
    return found


def of_the_whole_batch(moe: MoE, x: Tensor, target: Tensor, noise: Tensor) -> dict[str, Tensor]:
    y, routing = moe(x, noise=noise)
    (task_sum(y, target) / len(x) + balance(routing.sums)).backward()
    return gradients(moe)


def part_by_part(moe: MoE, x: Tensor, target: Tensor, noise: Tensor, *, size: int) -> dict[str, Tensor]:
    parts = list(zip(x.split(size), target.split(size), noise.split(size), strict=True))
    with torch.no_grad():
        total = reduce(add, (moe(part, noise=draws)[1].sums for part, _, draws in parts))

    totals = [value.requires_grad_() for value in differentiable(total)]
    slopes = torch.autograd.grad(balance(total), totals, materialize_grads=True, allow_unused=True)

    for part, part_target, draws in parts:
        y, routing = moe(part, noise=draws)
        own = differentiable(routing.sums)
        linear = torch.stack([(slope * value).sum() for slope, value in zip(slopes, own, strict=True)]).sum()
        (task_sum(y, part_target) / len(x) + linear).backward()  # the count is that of the whole batch
    return gradients(moe)


def main() -> None:
    torch.manual_seed(0)
    moe = MoE.noisy_topk(width=WIDTH, hidden=32, num_experts=NUM_EXPERTS, k=2, dtype=torch.float64)
    x, target = torch.randn(2, 48, WIDTH, dtype=torch.float64)
    noise = torch.randn(48, NUM_EXPERTS, dtype=torch.float64)
    whole = of_the_whole_batch(moe, x, target, noise)
    parts = part_by_part(moe, x, target, noise, size=12)
    for name, gradient in whole.items():
        difference = (gradient - parts[name]).abs().max() / gradient.abs().max()
        print(f"{name}: relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
