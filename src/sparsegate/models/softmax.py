"""The output layer: from the last hidden layer to a distribution over the vocabulary."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OutputSoftmax(nn.Module):
    """Softmax over the whole vocabulary; training may look at a sample of it.

    Parameters: weight [V, width], bias [V].

    num_samples: 0 trains with all words. Else a step draws this many candidates from a log-uniform
    distribution, the same for all its tokens, and `nll` in training mode is the loss of telling the target
    from them (sampled softmax, Jean et al. 2015; section 5.1 trains with 8,192): logits are corrected by the
    logarithm of the chance to be a candidate, and a candidate that is the target is left out. It is no
    likelihood; evaluation mode always computes the exact one. The vocabulary is to be sorted, frequent words
    first.

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
        self.num_samples = num_samples
        self.sparse = False
        self.weight = nn.Parameter(torch.empty(vocab_size, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(vocab_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden [..., width]."""
        return F.linear(hidden, self.weight, self.bias)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood in nats, float32 at least, of the shape of `target`.

        hidden: [..., width]. target: int64 [...]. In training mode with `num_samples` the sampled loss.
        """
        hidden_TD, target_T = hidden.reshape(-1, hidden.shape[-1]), target.flatten()
        if self.training and self.num_samples:
            return self.sampled_nll(hidden_TD, target_T, self.draw()).view_as(target)
        logits_TV = self(hidden_TD)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        return F.cross_entropy(logits_TV, target_T, reduction="none").view_as(target)

    def draw(self) -> Tensor:
        """Candidates of a step, int64 [num_samples]."""
        return draw_log_uniform(self.num_samples, len(self.bias), device=self.bias.device)

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
        num_tokens = len(target_T)
        word_N = torch.cat([target_T, sample_S])
        weight_ND, bias_N = F.embedding(word_N, self.weight, sparse=self.sparse), self.bias[word_N]
        chance_N = log_chance(word_N, num_samples=len(sample_S), vocab_size=len(self.bias))
        target_logit_T = (hidden_TD * weight_ND[:num_tokens]).sum(dim=1) + bias_N[:num_tokens]
        logit_TS = F.linear(hidden_TD, weight_ND[num_tokens:], bias_N[num_tokens:])
        dtype = torch.promote_types(logit_TS.dtype, torch.float32)
        logit_TS = logit_TS.to(dtype) - chance_N[num_tokens:].to(dtype)
        is_again_S = F.pad(sample_S[1:] == sample_S[:-1], (1, 0))
        logit_TS = logit_TS.masked_fill(is_again_S | (sample_S == target_T[:, None]), -torch.inf)
        target_logit_T = target_logit_T.to(dtype) - chance_N[:num_tokens].to(dtype)
        return torch.cat([target_logit_T[:, None], logit_TS], dim=1).logsumexp(dim=1) - target_logit_T

    def ops_per_token(self) -> int:
        """Multiply-adds per token over the whole vocabulary; the paper's metric leaves them out."""
        return self.weight.numel()


def draw_log_uniform(num_samples: int, vocab_size: int, *, device: torch.device) -> Tensor:
    """Candidates, int64 [S], sorted: word w with probability log((w + 2) / (w + 1)) / log(V + 1)."""
    uniform_S = torch.rand(num_samples, dtype=torch.float64, device=device)
    word_S = (uniform_S * math.log(vocab_size + 1)).exp().floor().to(torch.int64) - 1
    return word_S.clamp(0, vocab_size - 1).sort().values


def log_chance(word_N: Tensor, *, num_samples: int, vocab_size: int) -> Tensor:
    """Logarithm of the chance that a word is among the candidates: log(1 - (1 - p)^S), float64."""
    word_N = word_N.to(torch.float64)
    p_N = ((word_N + 2) / (word_N + 1)).log() / math.log(vocab_size + 1)
    return (-torch.expm1(num_samples * torch.log1p(-p_N))).log()
