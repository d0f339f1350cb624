"""The sizes that a figure belongs to, and what follows from them: operations, bytes, memory."""

from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer of ReLU experts and its batch.

    tokens: of a batch. width: of input and output. hidden: of each expert. k: experts per token. dtype: of
    input and weights, a key of `DTYPES`.
    """

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("tokens", "width", "hidden", "experts", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.experts < 2:
            raise ValueError(
                f"experts ({self.experts}) must be at least 2, so that there is something to decide"
            )
        if self.experts < self.k:
            raise ValueError(f"experts ({self.experts}) must be at least k ({self.k})")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype ({self.dtype}) must be one of {', '.join(DTYPES)}")

    @property
    def pairs(self) -> int:
        return self.tokens * self.k

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert."""
        return 2 * self.width * self.hidden * self.item_bytes

    @property
    def weight_bytes(self) -> int:
        """Weights of all experts; their gradients are as many."""
        return self.experts * self.expert_bytes

    def flops(self, *, pairs_per_token: int, training: bool) -> int:
        """Floating-point operations of the experts' products; backward is twice the forward pass."""
        forward = 4 * self.tokens * pairs_per_token * self.width * self.hidden
        return 3 * forward if training else forward

    def working_bytes(self) -> int:
        """About what a forward and backward pass holds beside weights and gradients of experts.

        Rows of the pairs before, between and after the products with their gradients, some tensors of tokens
        times experts in the gate, and the dense layer.
        """
        rows = 4 * self.pairs * (self.width + self.hidden) * self.item_bytes
        gate = 8 * self.tokens * self.experts * 4
        return rows + gate + 2 * self.k * self.expert_bytes


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in _CONTAINER_LIMITS:
        if limit.exists() and used.exists() and limit.read_text().strip() != "max":
            available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


_CGROUP = Path("/sys/fs/cgroup")
_CONTAINER_LIMITS = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)


def require_memory(shape: Shape, *, training: bool) -> None:
    """Refuse, before anything is allocated, a shape that does not fit.

    Raises:
        ValueError: naming what is needed and what there is.
    """
    needed = shape.weight_bytes * (2 if training else 1) + shape.working_bytes()
    available = available_bytes()
    if available is not None and needed > available:
        raise ValueError(
            f"experts ({shape.experts:,}) with tokens ({shape.tokens:,}) need {gigabytes(needed)} of memory, "
            f"and {gigabytes(available)} are free; take fewer of either, or a smaller width or hidden"
        )


def too_large(num_bytes: int) -> str | None:
    """Why so much more memory cannot be had; None if it can."""
    available = available_bytes()
    if available is None or num_bytes <= available:
        return None
    return f"needs {gigabytes(num_bytes)} more memory, {gigabytes(available)} are free"


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
