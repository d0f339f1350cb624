"""The output layer: from the last hidden layer to a distribution over the vocabulary."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cross_entropy import linear_cross_entropy, target_and_logsumexp

# Of the width, from an adaptive softmax's cluster to the next; 4 is the paper's that it is from, and torch's.
_DIVISOR = 4


class Part(NamedTuple):
    """A cross entropy of a step of training: of which share of the tokens, over how many words, how wide."""

    share: float
    num_words: int
    width: int


class Softmax(nn.Module, ABC):
    """What models ask of an output layer; its words are numbers below `vocab_size`."""

    vocab_size: int

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden [..., width]; log-probabilities are some."""

    @abstractmethod
    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood in nats, float32 at least, of the shape of `target`.

        hidden: [..., width]. target: int64 [...]. Of many tokens and words the logits are never there at
        once. What training mode computes may be something else that is cheaper, and no likelihood.
        """

    @abstractmethod
    def use_sparse_gradients(self) -> list[nn.Parameter]:
        """Leave sparse gradients to tables of which a step touches few rows, from now on; return these."""

    @abstractmethod
    def ops_per_token(self) -> int:
        """Multiply-adds per token over the whole vocabulary; the paper's metric leaves them out."""

    @abstractmethod
    def parts(self) -> list[Part]:
        """What a step of training computes, where words are as frequent as `draw_log_uniform` draws them."""

    @abstractmethod
    def trained_ops_per_token(self) -> int:
        """Multiply-adds per token of a step of training, forward, for words of that frequency."""


class OutputSoftmax(Softmax):
    """Softmax over the whole vocabulary; training may look at a sample of it.

    Parameters: weight [V, width], bias [V].

    num_samples: 0 trains with all words. Else a step draws this many candidates from a log-uniform
    distribution, the same for all its tokens, and `nll` in training mode is the loss of telling the target
    from them (sampled softmax, Jean et al. 2015; section 5.1 trains with 8,192): logits are corrected by the
    logarithm of the chance to be a candidate, and a candidate that is the target is left out. It is no
    likelihood; evaluation mode always computes the exact one. The vocabulary is to be sorted, frequent words
    first. Biases begin at the logarithm of that distribution, where those of all words begin at 0: the model
    then knows how frequent words are, candidates are drawn as they weigh, and rare ones, which are seldom
    among them, need not be unlearned.

    sparse: whether the sampled loss leaves the weight a sparse gradient, of its rows of targets and
    candidates; false at first.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        num_samples: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_samples < 0:
            raise ValueError(f"num_samples ({num_samples}) must be at least 1, or 0 for all words")
        self.vocab_size = vocab_size
        self.num_samples = num_samples
        self.sparse = False
        self.weight = nn.Parameter(torch.empty(vocab_size, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(vocab_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        reset_bias(
            self.bias, range(self.vocab_size), num_samples=self.num_samples, vocab_size=self.vocab_size
        )

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """As of every softmax; in training mode with `num_samples` the sampled loss."""
        hidden_TD, target_T = hidden.reshape(-1, hidden.shape[-1]), target.flatten()
        if self.training and self.num_samples:
            return self.sampled_nll(hidden_TD, target_T, self.draw()).view_as(target)
        return linear_cross_entropy(hidden_TD, self.weight, self.bias, target_T).view_as(target)

    def draw(self) -> Tensor:
        """Candidates of a step, int64 [num_samples]."""
        return draw_log_uniform(self.num_samples, self.vocab_size, device=self.device)

    def nll_and_uniform(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The exact `nll`, and the mean of -log p over all words: what label smoothing is made of."""
        logits = self(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logsumexp = logits.logsumexp(dim=-1)
        return (
            logsumexp - logits.gather(-1, target[..., None]).squeeze(-1),
            logsumexp - logits.mean(dim=-1),
        )

    def sampled_nll(self, hidden_TD: Tensor, target_T: Tensor, sample_S: Tensor) -> Tensor:
        """-log of the target's share among itself and the candidates, [T].

        sample_S: int64, sorted; of a word that was drawn several times the first counts.
        """
        word_N = torch.cat([target_T, sample_S])
        weight_ND, bias_N = F.embedding(word_N, self.weight, sparse=self.sparse), self.bias[word_N]
        return nll_among(hidden_TD, word_N, weight_ND, bias_N, vocab_size=self.vocab_size)

    def use_sparse_gradients(self) -> list[nn.Parameter]:
        """The weight, where a step sees a sample of the words."""
        self.sparse = bool(self.num_samples)
        return [self.weight] if self.sparse else []

    def ops_per_token(self) -> int:
        return self.weight.numel()

    def parts(self) -> list[Part]:
        return [Part(1.0, self.num_samples or self.vocab_size, self.weight.shape[1])]

    def trained_ops_per_token(self) -> int:
        return sum(part.num_words * part.width for part in self.parts())


def nll_among(
    hidden_TD: Tensor, word_N: Tensor, weight_ND: Tensor, bias_N: Tensor, *, vocab_size: int
) -> Tensor:
    """The sampled loss [T] of the targets, which are the first T words, among the candidates after them.

    weight_ND, bias_N: of the words.
    """
    num_tokens = len(hidden_TD)
    target_T, sample_S = word_N[:num_tokens], word_N[num_tokens:]
    chance_N = log_chance(word_N, num_samples=len(sample_S), vocab_size=vocab_size)
    target_logit_T = (hidden_TD * weight_ND[:num_tokens]).sum(dim=1) + bias_N[:num_tokens]
    is_again_S = F.pad(sample_S[1:] == sample_S[:-1], (1, 0))
    dtype = torch.promote_types(target_logit_T.dtype, torch.float32)
    target_logit_T = target_logit_T.to(dtype) - chance_N[:num_tokens].to(dtype)
    bias_S = bias_N[num_tokens:].to(dtype) - chance_N[num_tokens:].to(dtype)
    _, sum_T = target_and_logsumexp(
        hidden_TD,
        weight_ND[num_tokens:],
        bias_S.masked_fill(is_again_S, -torch.inf),
        torch.full_like(target_T, -1),
    )
    # A target among the candidates is in their sum already.
    place_T = torch.searchsorted(sample_S, target_T).clamp_max(len(sample_S) - 1)
    with_target_T = torch.logaddexp(sum_T, target_logit_T)
    return torch.where(sample_S[place_T] == target_T, sum_T, with_target_T) - target_logit_T


class AdaptiveSoftmax(Softmax):
    """Softmax in two steps, for vocabularies that are sorted, frequent words first (Grave et al. 2017).

    The head knows the words below the first cutoff, and one more for each cluster of rarer words between a
    cutoff and the next; a cluster's own words are told apart in a fourth of the width of the one before. It
    is a distribution over all words, in training as well, which costs little as most tokens are frequent.

    Parameters, names and initialisation are those of torch's `AdaptiveLogSoftmaxWithLoss`, without biases.

    cutoffs: ascending, from 1 to V - 1.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        cutoffs: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_cutoffs(cutoffs, vocab_size=vocab_size, width=width, name="cutoffs")
        self.vocab_size = vocab_size
        self.clusters = nn.AdaptiveLogSoftmaxWithLoss(
            width, vocab_size, list(cutoffs), div_value=_DIVISOR, device=device, dtype=dtype
        )

    @property
    def device(self) -> torch.device:
        return self.clusters.head.weight.device

    def forward(self, hidden: Tensor) -> Tensor:
        log_probability_TV = self.clusters.log_prob(hidden.reshape(-1, hidden.shape[-1]))
        return log_probability_TV.view(*hidden.shape[:-1], self.vocab_size)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        # Not the library's: its loss has all logits of a cluster at once, and fails under autocast.
        hidden_TD, target_T = hidden.reshape(-1, hidden.shape[-1]), target.flatten()
        head_target_T, of_clusters = target_T, []
        for number, (words, (project, head)) in enumerate(self._tail()):
            is_inside_T = (target_T >= words.start) & (target_T < words.stop)
            head_target_T = head_target_T.masked_fill(is_inside_T, self.clusters.shortlist_size + number)
            row_N = is_inside_T.nonzero()[:, 0]
            narrow_ND = project(hidden_TD.index_select(0, row_N))
            # Also of no token: a cluster's gradient is then zero and not absent.
            nll_N = linear_cross_entropy(narrow_ND, head.weight, None, target_T[row_N] - words.start)
            of_clusters.append((row_N, nll_N))
        nll_T = linear_cross_entropy(hidden_TD, self.clusters.head.weight, None, head_target_T)
        for row_N, nll_N in of_clusters:
            nll_T = nll_T.index_add(0, row_N, nll_N)
        return nll_T.view_as(target)

    def use_sparse_gradients(self) -> list[nn.Parameter]:
        """None: a step touches all words of the head, and of each cluster that it has a word of."""
        return []

    def ops_per_token(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def parts(self) -> list[Part]:
        head = self.clusters.head
        parts = [Part(1.0, head.out_features, head.in_features)]
        for words, (_, cluster) in self._tail():
            share = math.log((words.stop + 1) / (words.start + 1)) / math.log(self.vocab_size + 1)
            parts.append(Part(share, len(words), cluster.in_features))
        return parts

    def trained_ops_per_token(self) -> int:
        head, *clusters = self.parts()
        width = head.width  # from which each cluster projects
        ops = sum(part.share * part.width * (part.num_words + width) for part in clusters)
        return head.num_words * width + round(ops)

    def _tail(self) -> Iterator[tuple[range, tuple[nn.Linear, nn.Linear]]]:
        """Each cluster's words, and its two layers."""
        for (first, end), layers in zip(pairwise(self.clusters.cutoffs), self.clusters.tail, strict=True):
            project, head = cast(nn.Sequential, layers)
            yield range(first, end), (cast(nn.Linear, project), cast(nn.Linear, head))


def require_cutoffs(cutoffs: Sequence[int], *, vocab_size: int, width: int, name: str) -> None:
    """ValueError, with the name of the option, where an adaptive softmax cannot have these cutoffs."""
    shown = ", ".join(map(str, cutoffs))
    if not cutoffs or any(a >= b for a, b in pairwise((0, *cutoffs, vocab_size))):
        raise ValueError(
            f"{name} ({shown}) must ascend, from at least 1 to at most {vocab_size - 1}, the last word"
        )
    if width < _DIVISOR ** len(cutoffs):
        raise ValueError(
            f"{name} ({shown}) leave the last cluster no width: each has a fourth of the one before, and the "
            f"model's width is {width}; use fewer"
        )


def draw_log_uniform(num_samples: int, vocab_size: int, *, device: torch.device) -> Tensor:
    """Candidates, int64 [S], sorted: word w with probability log((w + 2) / (w + 1)) / log(V + 1)."""
    uniform_S = torch.rand(num_samples, dtype=torch.float64, device=device)
    word_S = (uniform_S * math.log(vocab_size + 1)).exp().floor().to(torch.int64) - 1
    return word_S.clamp(0, vocab_size - 1).sort().values


def log_uniform(word_N: Tensor, *, vocab_size: int) -> Tensor:
    """The probability with which each word is drawn, float64."""
    word_N = word_N.to(torch.float64)
    return ((word_N + 2) / (word_N + 1)).log() / math.log(vocab_size + 1)


def log_chance(word_N: Tensor, *, num_samples: int, vocab_size: int) -> Tensor:
    """Logarithm of the chance that a word is among the candidates: log(1 - (1 - p)^S), float64."""
    p_N = log_uniform(word_N, vocab_size=vocab_size)
    return (-torch.expm1(num_samples * torch.log1p(-p_N))).log()


@torch.no_grad()
def reset_bias(bias_N: Tensor, words: range, *, num_samples: int, vocab_size: int) -> None:
    """Let the biases of these words begin: at 0, or with samples at the logarithm of `log_uniform`."""
    if num_samples:
        word_N = torch.arange(words.start, words.stop, words.step, device=bias_N.device)
        bias_N.copy_(log_uniform(word_N, vocab_size=vocab_size).log())
    else:
        bias_N.zero_()
