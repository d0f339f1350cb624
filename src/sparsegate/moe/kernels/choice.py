"""Which kernel computes stacked experts: one table, in the order of preference. And which a gate's choice."""

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..dispatch import Plan
from . import noisy_choice, threaded, threaded_choice, unfused
from .activations import ActivationName
from .grouped import grouped_product
from .grouped_mm import grouped_mm_product
from .sink import GradientSink, with_whole_gradients

_LOG = logging.getLogger(__name__)

MOST_CHOSEN_FROM = 4096  # experts, of which a row fits into the registers of a program on a GPU


class FeedForwardKernel(Protocol):
    """The function that every kernel is; `unfused.feed_forward` tells its first arguments.

    dtype: of the products, to which input and weights are cast; None: the one that they share. sink: gets the
    weights' gradients, and autograd is told of none; None: they are autograd's.
    """

    def __call__(
        self,
        x_TD: Tensor,
        w_in_EDS: Tensor,
        w_out_EHD: Tensor,
        weight_N: Tensor,
        plan: Plan,
        *,
        activation: ActivationName,
        recompute: bool,
        dtype: torch.dtype | None = None,
        sink: GradientSink | None = None,
    ) -> Tensor: ...


class Setting(NamedTuple):
    """What a kernel must suit. device: its type. dtype: of the products."""

    device: str
    dtype: torch.dtype
    num_experts: int
    width: int
    hidden: int


class Kernel(NamedTuple):
    """One way to compute experts. unsuited: why it cannot be used in a setting, None where it can."""

    name: str
    what: str
    unsuited: Callable[[Setting], str | None]
    load: Callable[[], FeedForwardKernel]


def feed_forward_kernel(name: str | None, setting: Setting) -> FeedForwardKernel:
    """The kernel of that name; None: the first of the table that suits. It is logged once.

    ValueError: a name that is not in the table, or a kernel that does not suit, with one that does.
    """
    return KERNELS[_constant(name, *setting)].load()


@torch.compiler.assume_constant_result
def _constant(name: str | None, *setting: Any) -> str:
    """`chosen_kernel` for a compiler, which does not look into it: that is why it takes plain values."""
    return chosen_kernel(name, Setting(*setting))


@cache
def chosen_kernel(name: str | None, setting: Setting) -> str:
    """The name of that kernel."""
    reasons = {kernel.name: kernel.unsuited(setting) for kernel in KERNELS.values()}
    first = next(kernel for kernel, reason in reasons.items() if reason is None)
    if name is None:
        passed_over = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items() if reason)
        _LOG.info("experts on %s in %s: kernel %s (%s)", setting.device, setting.dtype, first, passed_over)
        return first
    if name not in reasons:
        raise ValueError(f"kernel ({name!r}) must be one of {', '.join(reasons)}")
    if reasons[name] is not None:
        raise ValueError(f"kernel ({name!r}) {reasons[name]}: {first!r} can be used")
    return name


@torch.compiler.assume_constant_result
def grouped_kernel(name: str | None, *setting: Any) -> str:
    """The kernel of grouped products without experts around them, as gates of groups have.

    name: "loop", or "triton", whose host waits for no count; None: "loop". setting: fields of a `Setting`.
    ValueError: another name, or one that does not suit.
    """
    if name is None or name == "loop":
        return "loop"
    if name != "triton":
        raise ValueError(f"kernel ({name!r}) must be one of loop, triton")
    reason = _triton_unsuited(Setting(*setting))
    if reason is not None:
        raise ValueError(f"kernel ({name!r}) {reason}: 'loop' can be used")
    return name


def noisy_choice_kernel(name: str | None, *setting: Any) -> noisy_choice.NoisyChoiceKernel:
    """The kernel of a noisy gate's choice.

    name: "threaded", "equations", or "triton"; None: "threaded" on the CPU, elsewhere "equations". setting:
    device type, dtype of the logits, and experts to choose from. ValueError: another name, or one that does
    not suit.
    """
    match _choice_kernel_name(name, *setting):
        case "threaded":
            return threaded_choice.noisy_choice
        case "triton":
            from .triton import noisy_choice as fused  # triton is no dependency: imported by who chose it

            return fused.noisy_choice
    return noisy_choice.equations


@torch.compiler.assume_constant_result
def _choice_kernel_name(name: str | None, device: str, dtype: torch.dtype, num_experts: int) -> str:
    first = "threaded" if device == "cpu" else "equations"
    if name in (None, first, "equations"):
        return name or first
    if name == "threaded":
        reason = f"is for the CPU, not for {device}"
    elif name != "triton":
        raise ValueError(f"kernel ({name!r}) must be one of threaded, equations, triton")
    elif dtype != torch.float32:
        reason = f"does not compute in {dtype}"
    elif num_experts > MOST_CHOSEN_FROM:
        reason = f"chooses from at most {MOST_CHOSEN_FROM:,} experts, not {num_experts:,}"
    else:
        reason = without_triton(device)
    if reason is not None:
        raise ValueError(f"kernel ({name!r}) {reason}: {first!r} can be used")
    return "triton"


def _threaded_unsuited(setting: Setting) -> str | None:
    return None if setting.device == "cpu" else f"is for the CPU, not for {setting.device}"


def _grouped_mm_unsuited(setting: Setting) -> str | None:
    if setting.device != "cuda":
        return f"is for CUDA devices, not for {setting.device}"
    if setting.dtype != torch.bfloat16:
        return f"computes in bfloat16, not in {setting.dtype}"
    if setting.num_experts >= 1024:
        return f"takes fewer than 1,024 experts, not {setting.num_experts:,}"
    if setting.width % 8 or setting.hidden % 8:
        return f"needs widths that 8 divides, not {setting.width} and {setting.hidden}"
    return None


def _triton_unsuited(setting: Setting) -> str | None:
    if setting.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"does not compute in {setting.dtype}"
    return without_triton(setting.device)


def without_triton(device: str) -> str | None:
    """Why kernels written in Triton cannot be used on a type of device; None where they can."""
    if device != "cuda":
        return f"is for CUDA devices, not for {device}"
    if find_spec("triton") is None:
        return "needs triton, which is not installed"
    return None


def _load_triton() -> FeedForwardKernel:
    from .triton.feed_forward import feed_forward  # triton is no dependency: imported by who chose it

    return feed_forward


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            name="threaded",
            what="fused, expert by expert, several at once",
            unsuited=_threaded_unsuited,
            load=lambda: threaded.feed_forward,
        ),
        Kernel(
            name="grouped_mm",
            what="torch's grouped product between dispatch and combine",
            unsuited=_grouped_mm_unsuited,
            load=lambda: with_whole_gradients(partial(unfused.feed_forward, product=grouped_mm_product)),
        ),
        Kernel(
            name="loop",
            what="one product per expert between dispatch and combine; any device, derivatives of any order",
            unsuited=lambda setting: None,
            load=lambda: with_whole_gradients(partial(unfused.feed_forward, product=grouped_product)),
        ),
        # Behind the one that always suits, so used only by name: proven in Triton's interpreter, but not yet
        # run on a device (docs/performance.md).
        Kernel(
            name="triton",
            what="fused kernels; no second derivatives",
            unsuited=_triton_unsuited,
            load=_load_triton,
        ),
    )
}
