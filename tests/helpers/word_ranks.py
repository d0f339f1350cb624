"""Tables of a vocabulary on ranks, and whole."""

from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sparsegate.models import cross_entropy
from sparsegate.models.softmax import OutputSoftmax
from sparsegate.parallel.vocabulary import ShardedSoftmax, look_up

VOCAB, WIDTH = 11, 4


@dataclass(frozen=True)
class Case:
    """sizes: number of words or tokens of each rank. at_once: words whose logits there are."""

    sizes: tuple[int, ...]
    at_once: int = 1 << 24

    def __str__(self) -> str:
        return f"{'+'.join(map(str, self.sizes))}-{self.at_once}"


def tables() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(VOCAB, WIDTH, dtype=torch.float64), torch.randn(VOCAB, dtype=torch.float64)]


def tokens(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Of all ranks: words, hidden values, and a number to weigh each by."""
    torch.manual_seed(2)
    total = sum(case.sizes)
    return (
        torch.randint(VOCAB, (total,)),
        torch.randn(total, WIDTH, dtype=torch.float64),
        torch.randn(total, dtype=torch.float64),
    )


def of_rank(case: Case, rank: int, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor.split(case.sizes)[rank] for tensor in tensors]


def looked_up_by_a_rank(mesh: DeviceMesh, case: Case, sparse: bool) -> tuple[list[Tensor], list[Tensor], int]:
    """Rows, gradients of the rank's share, and how many rows it was sent."""
    rank, num_ranks, received = mesh.get_local_rank(), mesh.size(), []
    own = [table[rank::num_ranks].clone().requires_grad_() for table in tables()]
    word_N, _, weight_N = of_rank(case, rank, tokens(case))
    collective = dist.all_to_all_single

    def counting(into, tensor, *rest, **options):
        received.extend([len(into)] if into.shape[1:] == (WIDTH,) else [])
        return collective(into, tensor, *rest, **options)

    with mock.patch.object(dist, "all_to_all_single", counting):
        rows = look_up(own, word_N, mesh, sparse=sparse)
    (rows[0].sum(dim=1) * weight_N + rows[1] * weight_N).sum().backward()
    assert own[0].grad.is_sparse == sparse
    return [row.detach() for row in rows], [t.grad.to_dense() for t in own], received[0]


def nll_of_a_rank(mesh: DeviceMesh, case: Case) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The exact loss of the rank's tokens, its gradients by the hidden values and the rank's share."""
    rank = mesh.get_local_rank()
    softmax = ShardedSoftmax(
        vocab_size=VOCAB, width=WIDTH, num_samples=5, mesh=mesh, dtype=torch.float64
    ).eval()
    whole = OutputSoftmax(vocab_size=VOCAB, width=WIDTH, num_samples=5, dtype=torch.float64)
    assert torch.equal(softmax.bias, whole.bias[rank :: mesh.size()])
    with torch.no_grad():
        for parameter, table in zip(softmax.parameters(), tables(), strict=True):
            parameter.copy_(table[rank :: mesh.size()])
    target_T, hidden_TD, weight_T = of_rank(case, rank, tokens(case))
    hidden_TD = hidden_TD.clone().requires_grad_()
    most, plain = [], torch.nn.functional.linear

    def watched(hidden_TD, weight_BD, *rest):
        most.append(len(weight_BD))
        return plain(hidden_TD, weight_BD, *rest)

    with (
        mock.patch.object(cross_entropy, "block_words", return_value=case.at_once),
        mock.patch.object(cross_entropy.F, "linear", watched),
    ):
        nll_T = softmax.nll(hidden_TD, target_T)
        (nll_T * weight_T).sum().backward()
    assert max(most) == min(case.at_once, len(softmax.bias))
    return nll_T.detach(), hidden_TD.grad, [p.grad for p in softmax.parameters()]


def nll_in_one_process(case: Case) -> tuple[Tensor, Tensor, list[Tensor]]:
    softmax = OutputSoftmax(vocab_size=VOCAB, width=WIDTH, dtype=torch.float64)
    with torch.no_grad():
        for parameter, table in zip(softmax.parameters(), tables(), strict=True):
            parameter.copy_(table)
    target_T, hidden_TD, weight_T = tokens(case)
    hidden_TD.requires_grad_()
    nll_T = softmax.nll(hidden_TD, target_T)
    (nll_T * weight_T).sum().backward()
    return nll_T.detach(), hidden_TD.grad, [p.grad for p in softmax.parameters()]


def refusal_of_a_rank(mesh: DeviceMesh) -> str:
    """What is said of fewer words than ranks."""
    try:
        ShardedSoftmax(vocab_size=2, width=WIDTH, num_samples=0, mesh=mesh)
    except ValueError as error:
        return str(error)
    return ""
