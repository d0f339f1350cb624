"""Implementation: how a layer that nobody here wrote shows its logits, noise, gates and losses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

OfTokens: TypeAlias = Callable[[Tensor], Tensor]
OfBatch: TypeAlias = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A layer, and what of its inside it exposes; None (or False) means that it does not.

    Laws that need what is absent are skipped. Functions follow the module: the suite changes the weights, the
    dtype (`.double()`) and the mode (`.train()`) of `module`, and what they return must change with it. None
    of them detaches. In each, x_TD is [T, width] of the module's dtype; mask_T is bool [T], true for real
    tokens, None: all are; noise_TE is [T, num_experts], standard normal, None: the layer draws its own in
    training mode, from torch's global generator, and uses none in evaluation mode.

    module: the layer. width: of input and output. num_experts: E. k: experts of each token.
    forward: (x_TD, mask_T, noise_TE) -> y_TD. None: the module is called with [1, T, width] and returns a
        tensor of that shape, or a tuple that begins with one.
    takes_mask, takes_noise: whether the functions use the mask and the noise that they are given.
    gates: (x_TD, mask_T, noise_TE) -> [T, E], G(x) of eq. 1, zeros included.
    logits: x_TD -> [T, E], x W_g of eq. 4, without the noise.
    noise_std: x_TD -> [T, E], the noise's standard deviation in eq. 4. None: the layer has no noise.
    noise_epsilon: what is added to the softplus in it (the paper: 0; the authors' published code: 0.01).
    load: (x_TD, mask_T, noise_TE) -> [E], the smooth load of eq. 10, in training mode.
    importance_loss, load_loss: (x_TD, mask_T, noise_TE) -> scalar, eq. 7 and 11 without their weights.
    expert: (index, rows_RD) -> rows_RD, expert `index` alone, without its gate.
    swap: permutes the experts and their gate columns in place: expert i becomes what permutation[i] was.

    Raises:
        ValueError: a number that cannot be, or one field without another that it needs.
    """

    module: nn.Module
    width: int
    num_experts: int | None = None
    k: int | None = None
    forward: OfBatch | None = None
    takes_mask: bool = False
    takes_noise: bool = False
    gates: OfBatch | None = None
    logits: OfTokens | None = None
    noise_std: OfTokens | None = None
    noise_epsilon: float = 0.0
    load: OfBatch | None = None
    importance_loss: OfBatch | None = None
    load_loss: OfBatch | None = None
    expert: Callable[[int, Tensor], Tensor] | None = None
    swap: Callable[[Sequence[int]], None] | None = None

    def __post_init__(self) -> None:
        for name, value in [("width", self.width), ("num_experts", self.num_experts), ("k", self.k)]:
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if self.k is not None and self.num_experts is not None and self.k > self.num_experts:
            raise ValueError(f"k ({self.k}) must not exceed num_experts ({self.num_experts})")
        if self.takes_noise and self.num_experts is None:
            raise ValueError("takes_noise: the noise is [T, num_experts]; give num_experts")
        if (self.takes_noise or self.takes_mask) and self.forward is None:
            raise ValueError("takes_noise and takes_mask: only `forward` can be given them; give forward")
        if (self.expert is not None or self.swap is not None) and self.num_experts is None:
            raise ValueError("expert and swap: they name experts by index; give num_experts")

    def output(self, x_TD: Tensor, mask_T: Tensor | None = None, noise_TE: Tensor | None = None) -> Tensor:
        """y_TD by `forward`, or by the module itself where that is absent.

        Raises:
            ValueError: the output has another shape than the input.
        """
        if self.forward is not None:
            given, y = x_TD, self.forward(x_TD, mask_T, noise_TE)
        else:
            given = x_TD[None]
            result = self.module(given)
            y = result[0] if isinstance(result, tuple) else result
        if y.shape != given.shape:
            raise ValueError(f"the output's shape {[*y.shape]} must be that of the input, {[*given.shape]}")
        return y.reshape(x_TD.shape)
