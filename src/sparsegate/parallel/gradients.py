"""Gradients added up over the ranks while the backward pass goes on.

    sums = GradientSums(model, mesh, dist.new_group())  # once
    ...
    with sums.overlap():
        loss.backward()  # the last one of the step

Parameters are cut into buckets in the reverse order of their making, which is about that of their gradients.
A bucket's sum begins when all of its gradients are there and the bucket before it has begun; what has not
begun by the end of the block begins then. So all ranks begin the same sums in the same order, whatever the
order in which their gradients come, and whichever of these never do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from .distribute import spread_parameters
from .meshes import DATA

# As in torch's DistributedDataParallel.
BUCKET_BYTES = 25 * 2**20


class GradientSums:
    """What adds up the gradients of a model over the ranks of a mesh.

    It is made as optimizers are, before a forward pass, for the parameters that are trained then. Those that
    FSDP2 shards are left alone: it adds up theirs.

    mesh: that the experts were spread over. group: of its ranks, which is used for nothing else in a backward
    pass, or ranks could disagree on what comes first. bucket_bytes: a larger parameter is a bucket.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        group: dist.ProcessGroup,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._trained = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        spread = set(spread_parameters(model))
        self._buckets = [(group, _buckets([p for p in self._trained if p not in spread], bucket_bytes))]
        if DATA in (mesh.mesh_dim_names or ()):  # there are copies of what is spread
            copied = [p for p in self._trained if p in spread]
            self._buckets.append((mesh.get_group(DATA), _buckets(copied, bucket_bytes)))

    @contextmanager
    def overlap(self) -> Iterator[None]:
        """Leave in `.grad` the gradients of the sum of all ranks' losses, after a block with a backward pass.

        Gradients that are there before the block, of other micro-batches, belong to them. One that a rank
        lacks counts as zero, and is there afterwards. Those of a bucket are views of one tensor afterwards.
        ValueError: in the block a gradient was added to after its sum had begun.
        """
        passes = [_Pass(group, buckets) for group, buckets in self._buckets]
        hooks = [hook for each in passes for hook in each.watch()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for each in passes:
            each.begin_the_rest()
        for each in passes:
            each.end()
        for parameter in self._trained:
            _gradient_of(parameter)


class _Pass:
    """The sums of a group in one backward pass, in the order of the buckets."""

    def __init__(self, group: dist.ProcessGroup, buckets: Sequence[Sequence[nn.Parameter]]) -> None:
        self.group, self.buckets = group, buckets
        self.awaited = [set(bucket) for bucket in buckets]
        self.under_way: list[dist.Work | None] = []

    def watch(self) -> Iterator[RemovableHandle]:
        """Have sums begin as gradients come."""
        for place, bucket in enumerate(self.buckets):
            for parameter in bucket:
                yield parameter.register_post_accumulate_grad_hook(partial(self._has_come, place))

    def begin_the_rest(self) -> None:
        for bucket in self.buckets[len(self.under_way) :]:
            self._begin(bucket)

    def end(self) -> None:
        for work in self.under_way:
            assert work is not None
            work.wait()

    def _has_come(self, place: int, parameter: Tensor) -> None:
        if place < len(self.under_way):
            raise ValueError(
                f"a gradient of shape {list(parameter.shape)} came after its sum over the ranks had begun; "
                "have one backward pass in the block, and no checkpoint with use_reentrant=True"
            )
        self.awaited[place].discard(parameter)
        while len(self.under_way) < len(self.buckets) and not self.awaited[len(self.under_way)]:
            self._begin(self.buckets[len(self.under_way)])

    def _begin(self, bucket: Sequence[nn.Parameter]) -> None:
        flat = _gradient_of(bucket[0])
        if len(bucket) > 1:
            flat = torch.cat([_gradient_of(parameter).flatten() for parameter in bucket])
            parts = flat.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        self.under_way.append(dist.all_reduce(flat, group=self.group, async_op=True))


def _buckets(parameters: Sequence[nn.Parameter], most_bytes: int) -> list[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, from the last to the first."""
    buckets: list[list[nn.Parameter]] = []
    room, dtype = 0, None
    for parameter in reversed(parameters):
        if parameter.nbytes > room or parameter.dtype != dtype:
            buckets.append([])
            room, dtype = most_bytes, parameter.dtype
        buckets[-1].append(parameter)
        room -= parameter.nbytes
    return buckets


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """Zeros, from now on, where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
