"""Which token comes next: greedy, or drawn from the probabilities with temperature, top-k and top-p."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

_Floats = npt.NDArray[np.float64]

_MAX_TOKENS = 1_000_000
_MAX_TEMPERATURE = 1000.0
_MAX_STOPS = 64
_MAX_STOP_LENGTH = 1000


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a text goes on, and when it ends.

    max_tokens: end after this many tokens. temperature: the logits are divided by it, so that below 1 the
    probable is favoured; 0 takes the most probable. top_k: draw from the k most probable tokens. None: from
    all. top_p: of these, draw from the fewest most probable whose probabilities add up to p. None: from
    all. stop: end before any of these texts; the end of a sentence is the text of a line feed. seed: of the
    draws. Each prompt has its own, which depend on the seed and the prompt's number alone. allow_unknown:
    whether `<unk>` may be written.
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
        fits = 0 <= self.temperature <= _MAX_TEMPERATURE
        _require("temperature", self.temperature, fits, f"from 0 to {_MAX_TEMPERATURE:g}")
        _require("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1")
        _require("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        _require("seed", self.seed, 0 <= self.seed < 1 << 63, "from 0 to 2**63 - 1")
        fits = len(self.stop) <= _MAX_STOPS and all(1 <= len(text) <= _MAX_STOP_LENGTH for text in self.stop)
        what = f"at most {_MAX_STOPS} texts of 1 to {_MAX_STOP_LENGTH:,} characters"
        _require("stop", f"{len(self.stop)} texts", fits, what)


def restrict(logits_BV: _Floats, *, temperature: float, top_k: int | None, top_p: float | None) -> _Floats:
    """Log-probabilities to draw with, up to a constant in each row; minus infinity for tokens not to be drawn.

    logits_BV: float64; minus infinity is a token not to be drawn. temperature: above 0. Tokens that are exactly as
    probable as the last of the top k or top p stay with it.
    """
    with np.errstate(
        over="ignore"
    ):  # next to a temperature of 0, all but the most probable are infinitely less so
        score_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
    if top_k is not None and top_k < score_BV.shape[1]:
        least_B1 = np.partition(score_BV, -top_k, axis=-1)[:, -top_k, None]
        score_BV[score_BV < least_B1] = -np.inf
    if top_p is not None:
        probability_BV = np.exp(score_BV)
        probability_BV /= probability_BV.sum(axis=-1, keepdims=True)
        sorted_BV = np.sort(probability_BV, axis=-1)[:, ::-1]
        before_BV = sorted_BV.cumsum(axis=-1) - sorted_BV
        last_B1 = (before_BV < top_p).sum(axis=-1, keepdims=True) - 1
        score_BV[probability_BV < np.take_along_axis(sorted_BV, last_B1, axis=-1)] = -np.inf
    return score_BV


def choose(
    logits_BV: Tensor, *, sampling: Sampling, draws: Sequence[np.random.PCG64], never: int | None
) -> list[int]:
    """The next token of each row.

    draws: the randomness of each row, which moves on if the temperature is not 0. A token is drawn as the one whose
    score plus Gumbel noise is greatest. Other than inverting the cumulative distribution this hardly ever changes
    with the last bits of the logits, which depend on how many rows there are. never: a token that is not to be
    chosen.

    Raises:
        ValueError: a row's greatest logit is not finite.
    """
    # On the CPU, where NumPy sorts ten times faster than torch does.
    exact_BV = np.array(logits_BV.detach().double().cpu())
    if never is not None:
        exact_BV[:, never] = -np.inf
    if not np.isfinite(exact_BV.max(axis=-1)).all():
        raise ValueError("the model's output is not finite: its training diverged; use an earlier checkpoint")
    if sampling.temperature == 0:
        return exact_BV.argmax(axis=-1).tolist()
    score_BV = restrict(
        exact_BV, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )
    noise_BV = np.stack([_gumbel(bits, score_BV.shape[1]) for bits in draws])
    return (score_BV + noise_BV).argmax(axis=-1).tolist()


def _gumbel(bits: np.random.PCG64, size: int) -> _Floats:
    """Standard Gumbel noise, finite, that does not depend on the version of NumPy."""
    uniform = ((bits.random_raw(size) >> np.uint64(12)) + 0.5) * 2.0**-52
    return -np.log(-np.log(uniform))


def _require(name: str, value: object, fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"{name} ({value}) must be {what}")
