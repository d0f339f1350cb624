"""A device that is not there: its numbers are the CPU's, and its rules are a GPU's.

Its tensors do not mix with the CPU's, but for scalars, and whoever waits for its numbers is counted. So what
was written for a GPU shows without one where a tensor was left on the wrong side, and where the host waits.
torch has one name for a device of one's own, for the whole process: `PretendedDevice` has a process for it.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

from sparsegate.moe.experts import stacked
from sparsegate.moe.experts.drawing import Normal, draw_experts
from sparsegate.moe.kernels import choice
from sparsegate.recipes import load
from sparsegate.training import loop, making, memory

NAME = "pretended"

_aten = torch.ops.aten
# What has to know numbers that a device may still be computing, whatever it is given.
_WAITING = {
    _aten._coalesce.default,
    _aten._local_scalar_dense.default,
    _aten._unique2.default,
    _aten.bincount.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.repeat_interleave.Tensor,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
}


_waits: Counter[str] = Counter()


_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


class PretendedDevice:
    """A process that has it; tests hand it functions."""

    def __init__(self) -> None:
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What it returns, or raises."""
        return self._process.submit(function, *arguments).result()

    def stop(self) -> None:
        self._process.shutdown()


class _There(Tensor):
    """inner: its numbers, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "_There":
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=there(),
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(function, args, kwargs or {})


def there() -> torch.device:
    return torch.device(NAME, 0)


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts the operators for which the host waits meanwhile."""
    _waits.clear()
    yield _waits


def _dispatch(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what is asked for there."""
    given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    copies = function in (_aten.copy_.default, _aten._to_copy.default)
    if not copies and any(value.dim() and not isinstance(value, _There) for value in given):
        raise RuntimeError(f"{function}: some of its tensors are on {NAME}, and others on the CPU")
    device = kwargs.get("device")
    if function is _aten.copy_.default:
        comes_back = not isinstance(args[0], _There)
    else:
        comes_back = device is not None and torch.device(device).type != NAME
    if function in _WAITING or (copies and comes_back) or _picks_by_truth(function, args):
        _waits[str(function)] += 1
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    found = _OWN.get(function, function)(*_inner(args), **_inner(kwargs))
    written = _written(function, args, kwargs)
    if written and found is not None:
        return written[0] if len(written) == 1 else tuple(written)
    if comes_back:
        return found
    with torch.inference_mode(False):  # in which a tensor of another class cannot be detached
        return pytree.tree_map_only(Tensor, _There, found)


def _picks_by_truth(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is indexing by a mask, of which a device has to count the true values."""
    if function not in _INDEXING:
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that the operator writes into, and returns."""
    names = [argument.name for argument in function._schema.arguments]
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    return [
        values[argument.name]
        for argument in function._schema.arguments
        if argument.name in values and argument.alias_info is not None and argument.alias_info.is_write
    ]


def _inner(values: Any) -> Any:
    return pytree.tree_map_only(_There, lambda value: value.inner, values)


def _lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    c_BU: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What torch has for GPUs alone, where it takes an LSTM apart."""
    z = input_gates + hidden_gates
    if input_bias is not None and hidden_bias is not None:
        z = z + input_bias + hidden_bias
    i, f, g, o = z.chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_BU = f * c_BU + i * g
    return o * c_BU.tanh(), c_BU, torch.cat([i, f, g, o], dim=1)


def _lstm_cell_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    before_BU: Tensor,
    c_BU: Tensor,
    activated: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    i, f, g, o = activated.chunk(4, dim=1)
    tanh = c_BU.tanh()
    grad_h = torch.zeros_like(c_BU) if grad_h is None else grad_h
    grad_c = grad_h * o * (1 - tanh * tanh) + (0 if grad_c is None else grad_c)
    grads = [
        grad_c * g * i * (1 - i),
        grad_c * before_BU * f * (1 - f),
        grad_c * i * (1 - g * g),
        grad_h * tanh * o * (1 - o),
    ]
    grad_z = torch.cat(grads, dim=1)
    return grad_z, grad_c * f, grad_z.sum(dim=0) if has_bias else None


_OWN = {
    _aten._thnn_fused_lstm_cell.default: _lstm_cell,
    _aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_cell_backward,
}


def _draw_experts(draws: Sequence[Normal], *, own: range) -> None:
    """What is drawn on the CPU: the real one takes a stack of another class for one that is spread."""
    copies = [Normal(stack=torch.empty_like(draw.stack, device="cpu"), std=draw.std) for draw in draws]
    draw_experts(copies, own=own)
    with torch.no_grad():
        for draw, copy in zip(draws, copies, strict=True):
            draw.stack.copy_(copy.stack)


_libraries: list[torch.library.Library] = []


def _begin() -> None:
    """Let this process have the device, and sparsegate take it for a GPU."""
    os.environ["TRITON_INTERPRET"] = "1"  # whatever GPU there is: read when triton is imported, later
    torch.set_num_threads(1)
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # of which autocast makes no use here
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)

    def empty(size: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        return _There(torch.empty(size, dtype=dtype, device="cpu"))

    def empty_strided(
        size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **options: Any
    ) -> Tensor:
        return _There(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        """For `torch.tensor`, which passes the class of a tensor by."""
        _inner(target).copy_(_inner(source))
        return target

    made = torch.library.Library("aten", "IMPL", "PrivateUse1")
    made.impl("empty.memory_format", empty)
    made.impl("empty_strided", empty_strided)
    made.impl("_copy_from", copy_from)
    cast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    cast.fallback(torch.library.fallthrough_kernel)
    _libraries.extend([made, cast])
    for module in (load, loop, making, memory):
        module.resolve_device = lambda device: torch.device("cpu") if device == "cpu" else there()
    stacked.draw_experts = _draw_experts
    choice.without_triton = making.without_triton = lambda device: None
