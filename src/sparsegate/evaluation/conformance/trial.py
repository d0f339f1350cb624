"""What laws are tried with: layers as after some training, tokens, noise, finite differences."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .implementation import Implementation
from .law import Factory, NotApplicable, Number

NUM_TOKENS = 64
# A law that draws at random has one fixed seed. Five standard errors leave room for every seed.
STANDARD_ERRORS = 5.0
_STEP = 1e-6


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An implementation whose weights are no longer those of the start.

    tolerance: how far equal values may lie apart, relative to their size: the rounding of its arithmetic.
    """

    implementation: Implementation
    tolerance: float

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable ones, by name."""
        return {n: p for n, p in self.implementation.module.named_parameters() if p.requires_grad}

    @property
    def like(self) -> Tensor:
        """An empty tensor of the module's device and dtype."""
        first = next((p for p in self.implementation.module.parameters() if p.is_floating_point()), None)
        return torch.empty(0) if first is None else first.detach().new_empty(0)

    def tokens(self, num_tokens: int = NUM_TOKENS) -> Tensor:
        """[num_tokens, width], normal, all different in kind."""
        return torch.randn(num_tokens, self.implementation.width).to(self.like)

    def crowd(self, num_tokens: int = NUM_TOKENS) -> Tensor:
        """Tokens of which three in four are nearly equal, so that all of these want the same experts."""
        x_TD = torch.randn(num_tokens, self.implementation.width)
        alike = num_tokens * 3 // 4
        x_TD[:alike] = x_TD[0] + 0.1 * x_TD[:alike]
        return x_TD[torch.randperm(num_tokens)].to(self.like)

    def noise(self, num_tokens: int = NUM_TOKENS) -> Tensor | None:
        """[num_tokens, E], standard normal; None where the implementation does not take it."""
        if not self.implementation.takes_noise:
            return None
        return torch.randn(num_tokens, self.implementation.num_experts or 0).to(self.like)

    def output(self, x_TD: Tensor, mask_T: Tensor | None = None, noise_TE: Tensor | None = None) -> Tensor:
        """y_TD of a copy of the input; what the implementation draws is the same in each call."""
        with draws_of(1):
            return self.implementation.output(x_TD.clone(), mask_T, noise_TE)

    def train(self) -> Implementation:
        self.implementation.module.train()
        return self.implementation

    def evaluate(self) -> Implementation:
        self.implementation.module.eval()
        return self.implementation

    def train_if_noise_is_taken(self) -> Implementation:
        """Training mode where its noise can be given, evaluation mode where there is none to give."""
        return self.train() if self.implementation.takes_noise else self.evaluate()


def as_built(make: Factory) -> Trial:
    """The implementation as its factory makes it, in float32."""
    implementation = make()
    implementation.module.float()
    return Trial(implementation=implementation, tolerance=2e-5)


@torch.no_grad()
def trained(make: Factory) -> Trial:
    """As after some training: the start's zeros and ties are gone, and logits are of order one."""
    trial = as_built(make)
    for parameter in trial.parameters.values():
        parameter += torch.randn(parameter.shape).to(parameter) / trial.implementation.width**0.5
    return trial


def in_float64(make: Factory) -> Trial:
    """The same in float64, for finite differences.

    Raises:
        NotApplicable: the implementation refuses float64, or computes in less.
    """
    trial = trained(make)
    trial.implementation.module.double()
    trial.train()
    x_TD, noise_TE = trial.tokens(), trial.noise()
    along_TD, cotangent_TD = torch.randn_like(x_TD), torch.randn_like(x_TD)
    try:
        y_TD = trial.output(x_TD, None, noise_TE).detach()
    except Exception as error:
        raise NotApplicable(f"it refuses float64: {one_line(error)}") from error
    if y_TD.dtype != torch.float64:
        raise NotApplicable(f"it answers float64 with {str(y_TD.dtype).removeprefix('torch.')}")

    def value(steps: int) -> float:
        with torch.no_grad():
            y_TD = trial.output(x_TD + steps * 1e-7 * along_TD, None, noise_TE)
            return float((y_TD * cotangent_TD).sum())

    # The third difference of a smooth function vanishes here; what is rounded to float32 inside, jumps.
    jump = abs(value(3) - 3 * value(2) + 3 * value(1) - value(0))
    if jump > 1e-10 * float((y_TD * cotangent_TD).abs().sum()):
        raise NotApplicable(f"part of it computes in less than float64: its output jumps by {jump:.1e}")
    return Trial(implementation=trial.implementation, tolerance=1e-7)


def exact(make: Factory) -> Trial:
    """In float64, or where that is refused in float32, with the tolerance of the one or the other."""
    state = torch.get_rng_state()
    try:
        return in_float64(make)
    except NotApplicable:
        torch.set_rng_state(state)
        return trained(make)


def difference(what: str, measured: Tensor, expected: Tensor, tolerance: float) -> Number:
    """The entry of two tensors where they lie furthest apart; the tolerance is relative to their size."""
    if measured.shape != expected.shape:
        raise ValueError(f"{what}: the shape {[*measured.shape]} must be {[*expected.shape]}")
    measured_N, expected_N = (v.detach().double().flatten() for v in (measured, expected))
    if not measured_N.numel():
        return Number(what=f"{what}, empty", measured=0.0, expected=0.0)
    worst = int((measured_N - expected_N).abs().nan_to_num(torch.inf).argmax())
    size = max(1.0, float(expected_N.abs().nan_to_num().max()))
    where = [int(i) for i in torch.unravel_index(torch.tensor(worst), measured.shape)]
    return Number(
        what=f"{what}, greatest difference at {where}" if where else what,
        measured=float(measured_N[worst]),
        expected=float(expected_N[worst]),
        tolerance=tolerance * size,
    )


def worst(numbers: Sequence[Number]) -> Number:
    """Of several comparisons the one that is furthest from holding."""

    def badness(number: Number) -> float:
        error = abs(number.measured - number.expected)
        return error / max(number.tolerance, 1e-300) if error == error else torch.inf

    return max(numbers, key=badness)


def gradients(value: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a scalar; zeros for what it does not depend on."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(tensor) for tensor in of)
    return torch.autograd.grad(value, of, allow_unused=True, materialize_grads=True)


def finite_differences(value: Callable[[], Tensor], of: dict[str, Tensor]) -> Iterator[Number]:
    """The derivative of a scalar along a random direction of each tensor, by autograd and by differences.

    Random draws within `value` repeat themselves. Tensors are float64, and keep their values.
    """

    def again() -> Tensor:
        with draws_of(1):
            return value()

    def moved(tensor: Tensor, place: Tensor) -> Tensor:
        tensor.copy_(place)
        return again()

    start = again()
    size = max(1.0, abs(float(start.detach())))
    for (name, tensor), gradient in zip(of.items(), gradients(start, list(of.values())), strict=True):
        along = torch.randn_like(tensor)
        along /= along.norm().clamp_min(1e-300)
        with torch.no_grad():
            before = tensor.clone()
            above = float(moved(tensor, before + _STEP * along))
            below = float(moved(tensor, before - _STEP * along))
            tensor.copy_(before)
        slope = (above - below) / (2 * _STEP)
        yield Number(
            what=f"derivative by {name}",
            measured=float((gradient * along).sum()),
            expected=slope,
            tolerance=1e-5 * abs(slope) + 1e-8 * size,
        )


@contextmanager
def draws_of(seed: int) -> Iterator[None]:
    """Random numbers of a seed inside, and the generators as they were afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        # torch.manual_seed does the same, and prints a stack for devices that are not there.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def one_line(error: BaseException) -> str:
    """An exception in one line of reasonable length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else f"{text[:200]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
