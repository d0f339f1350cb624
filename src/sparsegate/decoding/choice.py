"""Which token comes next: greedy, or drawn from the probabilities with temperature, top-k and top-p."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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


def candidates(
    logits_BV: Tensor, *, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """The tokens to draw from, and log-probabilities up to a constant of each row.

    logits_BV: of any floating dtype. temperature: above 0. Returns score_BK in float64, minus infinity for
    tokens that are not to be drawn, and token_BK; K is the vocabulary or `top_k`, and the order is by
    falling probability if there is a `top_k` or a `top_p`.
    """
    logits_BV = logits_BV.double()
    score_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature
    num_rows, vocab_size = score_BV.shape
    if top_k is None and top_p is None:
        return score_BV, torch.arange(vocab_size, device=score_BV.device).expand(num_rows, -1)
    score_BK, token_BK = score_BV.topk(min(top_k or vocab_size, vocab_size), dim=-1)
    if top_p is not None:
        probability_BK = score_BK.softmax(dim=-1)
        before_BK = probability_BK.cumsum(dim=-1) - probability_BK
        before_BK[:, 0] = 0.0
        score_BK = score_BK.masked_fill(before_BK >= top_p, -torch.inf)
    return score_BK, token_BK


@torch.inference_mode()
def choose(
    logits_BV: Tensor, *, sampling: Sampling, draws: Sequence[np.random.PCG64], never: int | None
) -> list[int]:
    """The next token of each row.

    draws: the randomness of each row, which moves on if the temperature is not 0. A token is drawn as the
    one whose score plus Gumbel noise is greatest. Other than inverting the cumulative distribution this
    hardly ever changes with the last bits of the logits, which depend on how many rows there are. never: a
    token that is not to be chosen.

    Raises:
        ValueError: a row's greatest logit is not finite.
    """
    if never is not None:
        logits_BV = logits_BV.index_fill(1, torch.tensor([never], device=logits_BV.device), -torch.inf)
    if not torch.isfinite(logits_BV.amax(dim=-1)).all():
        raise ValueError("the model's output is not finite: its training diverged; use an earlier checkpoint")
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1).tolist()
    score_BK, token_BK = candidates(
        logits_BV, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )
    noise_BK = np.stack([_gumbel(bits, score_BK.shape[1]) for bits in draws])
    best_B1 = (score_BK + torch.from_numpy(noise_BK).to(score_BK.device)).argmax(dim=-1, keepdim=True)
    return token_BK.gather(1, best_B1)[:, 0].tolist()


def _gumbel(bits: np.random.PCG64, size: int) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise, finite, that does not depend on the version of NumPy."""
    uniform = ((bits.random_raw(size) >> np.uint64(12)) + 0.5) * 2.0**-52
    return -np.log(-np.log1p(-uniform))


def _require(name: str, value: object, fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"{name} ({value}) must be {what}")
