"""Embedding and softmax whose words are spread over ranks.

Word w stands on rank w mod W: vocabularies are sorted, frequent words first, and of consecutive words the
first rank would have most of what is asked for. Every rank asks for the rows that its tokens and the
candidates need, each once, and gradients go back the same way to be added up where the row stands. In the
softmax over all words every rank is given all ranks' hidden values instead, and returns two numbers for each.

All ranks of the mesh call them together, a rank without tokens too, and equally often in backward.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..models.cross_entropy import target_and_logsumexp
from ..models.softmax import Part, Softmax, draw_log_uniform, nll_among, reset_bias
from ..moe.routing import count
from .drawing import draw_rows
from .exchange import Rows, exchange
from .placement import words_of


class ShardedEmbedding(nn.Module):
    """An embedding of which this rank has the rows of its words: weight [own words, width].

    sparse: whether the weight is left a sparse gradient; false at first. mesh: of one dimension.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        std: float,
        mesh: DeviceMesh,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        own = words_of(mesh.get_local_rank(), vocab_size=vocab_size, num_ranks=mesh.size())
        self.sparse = False
        self.mesh = mesh
        self.weight = nn.Parameter(torch.empty(len(own), width, device=device, dtype=dtype))
        for deviation in (1.0, std):  # torch's embedding has drawn once before it is given its weights
            draw_rows(self.weight, std=deviation, own=own, num_rows=vocab_size)

    def forward(self, word: Tensor) -> Tensor:
        """Rows [..., width] of words int64 [...]."""
        (rows_ND,) = look_up([self.weight], word.flatten(), self.mesh, sparse=self.sparse)
        return rows_ND.view(*word.shape, self.weight.shape[1])


class ShardedSoftmax(Softmax):
    """`OutputSoftmax` of which this rank has its words: weight [own words, width], bias [own words].

    Candidates are those that the first rank draws, for the tokens of all. mesh: of one dimension.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        num_samples: int,
        mesh: DeviceMesh,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        own = words_of(mesh.get_local_rank(), vocab_size=vocab_size, num_ranks=mesh.size())
        self.vocab_size = vocab_size
        self.num_samples = num_samples
        self.sparse = False
        self.mesh = mesh
        self.weight = nn.Parameter(torch.empty(len(own), width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(len(own), device=device, dtype=dtype))
        reset_bias(self.bias, own, num_samples=num_samples, vocab_size=vocab_size)
        draw_rows(self.weight, std=width**-0.5, own=own, num_rows=vocab_size)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, hidden: Tensor) -> Tensor:
        raise ValueError("the logits of all words are in no one place: load the model in one process")

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """As `OutputSoftmax.nll`, of this rank's tokens."""
        hidden_TD, target_T = hidden.reshape(-1, hidden.shape[-1]), target.flatten()
        nll = self._sampled_nll if self.training and self.num_samples else self._nll
        return nll(hidden_TD, target_T).view_as(target)

    def use_sparse_gradients(self) -> list[nn.Parameter]:
        """The weight, where a step sees a sample of the words."""
        self.sparse = bool(self.num_samples)
        return [self.weight] if self.sparse else []

    def ops_per_token(self) -> int:
        """Those of all ranks."""
        return self.vocab_size * self.weight.shape[1]

    def parts(self) -> list[Part]:
        """Of all ranks together."""
        return [Part(1.0, self.num_samples or self.vocab_size, self.weight.shape[1])]

    def trained_ops_per_token(self) -> int:
        """Those of all ranks."""
        return sum(part.num_words * part.width for part in self.parts())

    def _draw(self) -> Tensor:
        """The candidates of all ranks' tokens, int64 [num_samples]."""
        sample_S = draw_log_uniform(self.num_samples, self.vocab_size, device=self.bias.device)
        dist.broadcast(sample_S, group=self.mesh.get_group(), group_src=0)
        return sample_S

    def _sampled_nll(self, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        word_N = torch.cat([target_T, self._draw()])
        weight_ND, bias_N = look_up([self.weight, self.bias], word_N, self.mesh, sparse=self.sparse)
        return nll_among(hidden_TD, word_N, weight_ND, bias_N, vocab_size=self.vocab_size)

    def _nll(self, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        rank, num_ranks, group = self.mesh.get_local_rank(), self.mesh.size(), self.mesh.get_group()
        rows = _a_copy_to_each(target_T, group)
        copies = [tensor.expand(num_ranks, *tensor.shape).flatten(0, 1) for tensor in (hidden_TD, target_T)]
        hidden_RD, target_R = exchange(copies, [rows, rows], group)
        place_R = torch.where(target_R % num_ranks == rank, target_R // num_ranks, -1)
        found_R2 = torch.stack(target_and_logsumexp(hidden_RD, self.weight, self.bias, place_R), dim=1)
        (back_N2,) = exchange([found_R2], [rows.reversed()], group)
        logit_WT, logsumexp_WT = back_N2.view(num_ranks, len(target_T), 2).unbind(dim=2)
        return logsumexp_WT.logsumexp(dim=0) - logit_WT.sum(dim=0)


def look_up(tables: Sequence[Tensor], word_N: Tensor, mesh: DeviceMesh, *, sparse: bool) -> list[Tensor]:
    """The rows of any words, out of tables of which each rank has those of its own; see `words_of`.

    sparse: whether matrices among the tables are left sparse gradients. The host waits once, for the counts.
    """
    num_ranks, group = mesh.size(), mesh.get_group()
    # A number for each word that sorts by the rank that has it.
    most_rows = 1 << 40
    number_U, place_N = torch.unique(
        word_N % num_ranks * most_rows + word_N // num_ranks, return_inverse=True
    )
    asked_W = count(number_U // most_rows, num_ranks)
    answered_W = torch.empty_like(asked_W)
    dist.all_to_all_single(answered_W, asked_W, group=group)
    asked, answered = torch.stack([asked_W, answered_W]).tolist()
    rows = Rows(sent_W=tuple(asked), received_W=tuple(answered))
    (row_Q,) = exchange([(number_U % most_rows).to(torch.int32)], [rows], group)
    own = [
        F.embedding(row_Q, table, sparse=sparse) if table.dim() == 2 else table.index_select(0, row_Q)
        for table in tables
    ]
    back = exchange(own, [rows.reversed()] * len(own), group)
    return [rows_U.index_select(0, place_N) for rows_U in back]


def _a_copy_to_each(target_T: Tensor, group: dist.ProcessGroup) -> Rows:
    """Each rank sends all its tokens to each."""
    num_tokens, num_ranks = len(target_T), dist.get_world_size(group)
    sizes_W1 = target_T.new_empty(num_ranks, 1)
    dist.all_gather(list(sizes_W1), target_T.new_full((1,), num_tokens), group=group)
    return Rows(sent_W=(num_tokens,) * num_ranks, received_W=tuple(sizes_W1.flatten().tolist()))
