"""Rows that travel between the ranks of a group, all to all, with uneven counts, forward and backward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How many rows this rank sends to each rank of a group, and receives from each: host numbers."""

    sent_W: tuple[int, ...]
    received_W: tuple[int, ...]

    @property
    def num_sent(self) -> int:
        return sum(self.sent_W)

    @property
    def num_received(self) -> int:
        return sum(self.received_W)

    def reversed(self) -> "Rows":
        """The way back."""
        return Rows(sent_W=self.received_W, received_W=self.sent_W)


def exchange(tensors: Sequence[Tensor], rows: Sequence[Rows], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Send each tensor's rows, which stand in the order of their ranks; return what came, in that order too.

    All ranks call it alike. The tensors travel at the same time. It is differentiable: gradients travel back
    the same way, those of the tensors that need one, which are to be the same tensors on all ranks.
    """
    return _Exchange.apply(tuple(rows), group, *tensors)


class _Exchange(torch.autograd.Function):
    """Torch's own differentiable all-to-all is deprecated in one module and private in another."""

    @staticmethod
    def forward(
        ctx: Any, rows: tuple[Rows, ...], group: dist.ProcessGroup, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.rows, ctx.group = rows, group
        return _all_to_all(tensors, rows, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        needed = [index for index, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        rows = [ctx.rows[index].reversed() for index in needed]
        back = iter(exchange([grad_outputs[index] for index in needed], rows, ctx.group))
        return None, None, *(next(back) if needs else None for needs in ctx.needs_input_grad[2:])


def _all_to_all(
    tensors: Sequence[Tensor], rows: Sequence[Rows], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    received = tuple(
        tensor.new_empty(to.num_received, *tensor.shape[1:]) for tensor, to in zip(tensors, rows, strict=True)
    )
    under_way = [
        dist.all_to_all_single(
            into, tensor.contiguous(), list(to.received_W), list(to.sent_W), group=group, async_op=True
        )
        for into, tensor, to in zip(received, tensors, rows, strict=True)
    ]
    for work in under_way:
        assert work is not None
        work.wait()
    return received
