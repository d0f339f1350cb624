"""Which token comes next: greedy, or drawn from the probabilities with temperature, top-k and top-p."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Reals = npt.NDArray[np.floating[Any]]

_MAX_TOKENS = 1_000_000
_MAX_TEMPERATURE = 1000.0
_MAX_STOPS = 64
_MAX_STOP_LENGTH = 1000


class Drawing(Protocol):
    """How the next token is drawn; the meanings stand in `Sampling`."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def seed(self) -> int: ...


def require_drawing(drawing: Drawing) -> None:
    """Refuse what no token can be drawn with."""
    fits = 0 <= drawing.temperature <= _MAX_TEMPERATURE
    _require("temperature", drawing.temperature, fits, f"from 0 to {_MAX_TEMPERATURE:g}")
    _require("top_k", drawing.top_k, drawing.top_k is None or drawing.top_k >= 1, "at least 1")
    fits = drawing.top_p is None or 0 < drawing.top_p <= 1
    _require("top_p", drawing.top_p, fits, "above 0 and at most 1")
    _require("seed", drawing.seed, 0 <= drawing.seed < 1 << 63, "from 0 to 2**63 - 1")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a text goes on, and when it ends.

    max_tokens: end after this many tokens.
    temperature: the logits are divided by it; below 1 favours the probable, 0 takes the most probable token.
    top_k: draw from the k most probable tokens. None: from all.
    top_p: of these, draw from the fewest most probable whose probabilities add up to p. None: from all.
    stop: end before any of these texts; the end of a sentence is the text of a line feed.
    seed: of the draws. Each prompt has its own, which depend on the seed and the prompt's number alone.
    allow_unknown: whether `<unk>` may be written.
    """

    max_tokens: int = 100
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ("\n",)
    seed: int = 0
    allow_unknown: bool = False

    def __post_init__(self) -> None:
        _require(
            "max_tokens", self.max_tokens, 1 <= self.max_tokens <= _MAX_TOKENS, f"from 1 to {_MAX_TOKENS:,}"
        )
        require_drawing(self)
        fits = (
            not isinstance(self.stop, str)
            and len(self.stop) <= _MAX_STOPS
            and all(1 <= len(text) <= _MAX_STOP_LENGTH for text in self.stop)
        )
        what = f"a tuple of at most {_MAX_STOPS} texts of 1 to {_MAX_STOP_LENGTH:,} characters"
        _require("stop", reprlib.repr(self.stop), fits, what)


def restrict(
    logits_BV: _Reals, *, temperature: float, top_k: int | None, top_p: float | None
) -> npt.NDArray[np.float64]:
    """Log-probabilities to draw with, up to a constant in each row: minus infinity for what is not drawn.

    logits_BV: float32 or float64; minus infinity is a token not to be drawn. temperature: above 0. Tokens
    that are exactly as probable as the last of the top k or top p stay with it.
    """
    greatest_B1 = logits_BV.max(axis=-1, keepdims=True).astype(np.float64)
    score_BV = _scaled(logits_BV - greatest_B1, temperature)
    if top_k is None and top_p is None:
        return score_BV
    num_rows, vocab_size = logits_BV.shape
    k = min(top_k or vocab_size, vocab_size)
    top_BK = np.sort(np.partition(logits_BV, vocab_size - k, axis=-1)[:, vocab_size - k :], axis=-1)[:, ::-1]
    last_B1 = np.full((num_rows, 1), k - 1)
    if top_p is not None:
        weight_BK = np.exp(_scaled(top_BK - greatest_B1, temperature))
        before_BK = weight_BK.cumsum(axis=-1) - weight_BK
        enough_B1 = top_p * weight_BK.sum(axis=-1, keepdims=True)
        last_B1 = (before_BK < enough_B1).sum(axis=-1, keepdims=True) - 1
    return np.where(logits_BV < np.take_along_axis(top_BK, last_B1, axis=-1), -np.inf, score_BV)


def _scaled(score: npt.NDArray[np.float64], temperature: float) -> npt.NDArray[np.float64]:
    with np.errstate(over="ignore"):  # next to a temperature of 0 all others are infinitely less probable
        return score / temperature


def choose(
    logits_BV: Tensor, *, sampling: Drawing, draws: Sequence[np.random.PCG64], never: int | None
) -> list[int]:
    """The next token of each row.

    draws: the randomness of each row, which moves on if the temperature is not 0. A token is drawn as the one
        whose score plus Gumbel noise is greatest. Other than inverting the cumulative distribution this
        hardly ever changes with the last bits of the logits, which depend on how many rows there are.
    never: a token that is not to be chosen.

    Raises:
        ValueError: a row's greatest logit is not finite.
    """
    # On the CPU and in the logits' own precision, in which NumPy sorts ten times faster than torch.
    dtype = torch.promote_types(logits_BV.dtype, torch.float32)
    host_BV = logits_BV.detach().cpu().to(dtype, copy=True).numpy()
    if never is not None:
        host_BV[:, never] = -np.inf
    require_finite(host_BV.max(axis=-1))
    if sampling.temperature == 0:
        return host_BV.argmax(axis=-1).tolist()
    score_BV = restrict(host_BV, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    noise_BV = np.stack([_gumbel(bits, score_BV.shape[1]) for bits in draws])
    return (score_BV + noise_BV).argmax(axis=-1).tolist()


def require_finite(best_B: npt.NDArray[Any]) -> None:
    """Refuse rows whose greatest logit or log-probability is no finite number."""
    if not np.isfinite(best_B).all():
        raise ValueError("the model's output is not finite: its training diverged; use an earlier checkpoint")


def _gumbel(bits: np.random.PCG64, size: int) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise, finite, that does not depend on the version of NumPy."""
    uniform = ((bits.random_raw(size) >> np.uint64(12)) + 0.5) * 2.0**-52
    return -np.log(-np.log(uniform))


def _require(name: str, value: object, fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"{name} ({value}) must be {what}")
