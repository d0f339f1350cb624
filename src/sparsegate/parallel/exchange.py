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

    All ranks call it alike. The tensors travel at the same time. It is differentiable, once: gradients travel
    back the same way, those of the tensors that need one, which are to be the same tensors on all ranks.
    """
    return receive(send(tensors, rows, group))


def send(tensors: Sequence[Tensor], rows: Sequence[Rows], group: dist.ProcessGroup) -> "UnderWay":
    """Begin an `exchange`. What is computed before `receive` is computed while the rows travel.

    So it is in backward, which goes the other way: gradients set out where rows were received, and are waited
    for where these were sent.
    """
    under_way = UnderWay(tuple(rows), group)
    under_way.arriving = _Send.apply(under_way, *tensors)
    return under_way


def receive(under_way: "UnderWay") -> tuple[Tensor, ...]:
    """Wait for what came, once for each `send`."""
    received = _Receive.apply(under_way, *under_way.arriving)
    under_way.arriving = ()
    return received


class UnderWay:
    """Rows between `send` and `receive`: arriving are not to be read before."""

    def __init__(self, rows: tuple[Rows, ...], group: dist.ProcessGroup) -> None:
        self.rows, self.group = rows, group
        self.arriving: tuple[Tensor, ...] = ()
        self.needs_grad: tuple[bool, ...] = ()
        self.forth: _Travel | None = None
        self.back: _Travel | None = None


class _Travel:
    """Collectives that have begun, all tensors at the same time."""

    def __init__(self, tensors: Sequence[Tensor], rows: Sequence[Rows], group: dist.ProcessGroup) -> None:
        # What is sent must live as long as they last.
        self.sent = [tensor.contiguous() for tensor in tensors]
        self.received = tuple(
            tensor.new_empty(to.num_received, *tensor.shape[1:])
            for tensor, to in zip(tensors, rows, strict=True)
        )
        self.works = [
            dist.all_to_all_single(
                into, tensor, list(to.received_W), list(to.sent_W), group=group, async_op=True
            )
            for into, tensor, to in zip(self.received, self.sent, rows, strict=True)
        ]

    def end(self) -> tuple[Tensor, ...]:
        for work in self.works:
            assert work is not None
            work.wait()
        return self.received


class _Send(torch.autograd.Function):
    """Torch's own differentiable all-to-all is deprecated in one module and private in another."""

    @staticmethod
    def forward(ctx: Any, under_way: UnderWay, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.under_way = under_way
        under_way.needs_grad = ctx.needs_input_grad[1:]
        under_way.forth = _Travel(tensors, under_way.rows, under_way.group)
        return under_way.forth.received

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        travel, ctx.under_way.back = ctx.under_way.back, None
        came = iter(travel.end())
        return None, *(next(came) if needs else None for needs in ctx.under_way.needs_grad)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: UnderWay, *arriving: Tensor) -> tuple[Tensor, ...]:
        ctx.under_way = under_way
        travel, under_way.forth = under_way.forth, None
        assert travel is not None
        return tuple(tensor.view_as(tensor) for tensor in travel.end())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Returns what it sends, which has the shapes that autograd asks for; `_Send` has what comes."""
        if torch.is_grad_enabled():  # as it is in a backward pass that is to be differentiated
            raise RuntimeError("rows that travel between ranks have first derivatives alone")
        under_way = ctx.under_way
        needed = [index for index, needs in enumerate(under_way.needs_grad) if needs]
        rows = [under_way.rows[index].reversed() for index in needed]
        under_way.back = _Travel([grad_outputs[index] for index in needed], rows, under_way.group)
        return None, *(
            grad if needs else None for grad, needs in zip(grad_outputs, under_way.needs_grad, strict=True)
        )
