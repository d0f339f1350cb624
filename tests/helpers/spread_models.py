"""A small language model spread over ranks, and the same model in one process, trained for some steps."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from sparsegate.models import LanguageModel, build
from sparsegate.models.config import MixtureLM
from sparsegate.models.gates import (
    BalancedGate,
    ExpertChoiceGate,
    GateConfig,
    HierarchicalGate,
    NoisyTopKGate,
)
from sparsegate.models.holding import EVERYTHING, Holding
from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss, threshold_loss
from sparsegate.moe.routing import BalanceSums
from sparsegate.parallel.distribute import (
    expert_parameters,
    gradient_norm,
    names_in_one_process,
    shard_experts,
    shard_the_rest,
    spread_experts,
)
from sparsegate.parallel.gradients import GradientSums
from sparsegate.parallel.holding import HoldingOfRank
from sparsegate.parallel.meshes import in_nodes
from sparsegate.parallel.sums import sum_over_ranks
from tests.helpers.ranks import gradient_group

GATES: dict[str, GateConfig] = {
    "noisy_topk": NoisyTopKGate(noise_epsilon=0.1),
    "hierarchical": HierarchicalGate(num_groups=3, k_primary=2),
    "balanced": BalancedGate(),
    "expert_choice": ExpertChoiceGate(),
}
VOCAB, STEPS, CLIP = 11, 3, 0.5


@dataclass(frozen=True)
class Case:
    """rows: sentences of each rank. selection: as in `spread_experts`. fsdp: the rest is sharded by FSDP2.

    copies: of the experts. cut: FSDP2 makes one of these copies. per_node: ranks on each node. pieces: of a
    rank's tokens.
    """

    gate: str
    rows: tuple[int, ...]
    selection: str = "rank"
    fsdp: bool = False
    num_updates: int = 10
    num_experts: int = 6
    copies: int = 1
    cut: bool = False
    pieces: int = 1
    per_node: int | None = None
    words: bool = False  # the vocabulary is spread as well
    samples: int = 0

    def __str__(self) -> str:
        how = "fsdp-" * self.fsdp + "nodes-" * (self.per_node is not None) + "cut-" * self.cut
        how += f"{self.pieces}-pieces-" if self.pieces > 1 else ""
        how += f"words-{self.samples}-" if self.words else ""
        return f"{self.gate}-{self.selection}-{how}{self.copies}-{'+'.join(map(str, self.rows))}"


@dataclass
class Trained:
    """losses: of the global batch, before each update. weights: by their names in one process."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def a_model(case: Case, holding: Holding = EVERYTHING) -> LanguageModel:
    torch.manual_seed(3)
    config = MixtureLM(
        vocab_size=VOCAB,
        width=8,
        lstm_units=8,
        dropout=0.0,
        num_experts=case.num_experts,
        k=2,
        hidden=6,
        gate=GATES[case.gate],
        softmax_samples=case.samples,
    )
    model = build(config, dtype=torch.float64, holding=holding)
    for name, parameter in model.named_parameters():
        if "w_gate" in name or "w_noise" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def a_batch(case: Case, model: LanguageModel, update: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Tokens [B, S + 1], a mask, and noise of the global batch."""
    torch.manual_seed(50 + update)
    num_rows = sum(case.rows)
    noise = {n: torch.randn(num_rows, STEPS, w, dtype=torch.float64) for n, w in model.noise_widths().items()}
    tokens = torch.randint(VOCAB, (num_rows, STEPS + 1))
    # Two sentences with one beginning would tie where experts choose, and rounding would decide.
    tokens[:, 0] = torch.randperm(VOCAB)[:num_rows]
    return tokens, torch.rand(num_rows, STEPS) < 0.8, noise


def balance(total: dict[str, BalanceSums]) -> Tensor:
    return torch.stack([importance_loss(s) + load_loss(s) + threshold_loss(s) for s in total.values()]).sum()


def loss_sums(model, tokens_BS1, mask_BS, noise) -> tuple[Tensor, dict[str, BalanceSums]]:
    output = model(tokens_BS1[:, :-1], mask_BS=mask_BS, noise=noise)
    nll_BS = model.softmax.nll(output.hidden_BSD, tokens_BS1[:, 1:])
    return (nll_BS * mask_BS).sum(), {name: routing.sums for name, routing in output.routings.items()}


def train_on_rank(mesh: DeviceMesh, case: Case) -> Trained:
    """This rank's share of some updates; weights as one process has them, its experts' alone."""
    rank, group = mesh.get_local_rank(), gradient_group(mesh.size())
    if case.copies > 1:
        shape = (case.copies, mesh.size() // case.copies)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "expert"))
    model, widths = a_model(case), a_model(case)
    nodes = None if case.per_node is None else in_nodes(mesh, ranks_per_node=case.per_node)
    if case.words:
        model = a_model(case, HoldingOfRank(mesh, nodes=nodes, shares_words=True))
    else:
        spread_experts(model, mesh, selection=case.selection, nodes=nodes, num_pieces=case.pieces)
    names = names_in_one_process(model)
    if case.cut:
        shard_experts(model, mesh)
    if case.fsdp:
        shard_the_rest(model, mesh)
    gradient_sums = GradientSums(model, mesh, group, bucket_bytes=512)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.numel()], lr=1e-2, foreach=False)
    own = slice(sum(case.rows[:rank]), sum(case.rows[: rank + 1]))
    losses, norms = [], []
    for update in range(case.num_updates):
        tokens, mask, noise = a_batch(case, widths, update)
        num_tokens = int(mask.sum())
        optimizer.zero_grad()
        nll, sums = loss_sums(model, tokens[own], mask[own], {n: draws[own] for n, draws in noise.items()})
        total = sums
        for name in mesh.mesh_dim_names:
            total = sum_over_ranks(total, mesh.get_group(name))
        with gradient_sums.overlap():
            (nll / num_tokens + balance(total)).backward()
        losses.append(float(nll.detach() / num_tokens))
        norms.append(float(gradient_norm(model, mesh)))
        clip(model, norms[-1])
        optimizer.step()
    weights = {
        names[name]: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }
    return Trained(losses=losses, norms=norms, weights={n: w.detach().clone() for n, w in weights.items()})


def train_in_one_process(case: Case, *, joined: bool) -> Trained:
    """The oracle. joined: all sentences in one call; else those of each rank by themselves."""
    model = a_model(case)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False)
    losses, norms = [], []
    for update in range(case.num_updates):
        tokens, mask, noise = a_batch(case, model, update)
        rows = [sum(case.rows)] if joined else list(case.rows)
        noises = (
            zip(*(draws.split(rows) for draws in noise.values()), strict=True) if noise else [()] * len(rows)
        )
        calls = [
            loss_sums(model, own_tokens, own_mask, dict(zip(noise, own_noise, strict=True)))
            for own_tokens, own_mask, own_noise in zip(
                tokens.split(rows), mask.split(rows), noises, strict=True
            )
        ]
        nll = torch.stack([nll for nll, _ in calls]).sum() / int(mask.sum())
        total = calls[0][1]
        for _, more in calls[1:]:
            total = {name: total[name] + more[name] for name in total}
        optimizer.zero_grad()
        (nll + balance(total)).backward()
        losses.append(nll.item())
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        clip(model, norms[-1])
        optimizer.step()
    return Trained(losses=losses, norms=norms, weights={n: w.detach() for n, w in model.state_dict().items()})


def clip(model: torch.nn.Module, norm: float) -> None:
    for parameter in model.parameters():
        parameter.grad.mul_(min(1.0, CLIP / norm))


def refusals_of_a_rank(mesh: DeviceMesh) -> list[str]:
    """What is said of a model without mixtures, of meshes of another purpose, and of uneven nodes."""
    other = DeviceMesh.from_group(mesh.get_group(), "cpu", mesh_dim_names=("tensor",))
    said = []
    for model, given in [(torch.nn.Linear(2, 2), mesh), (a_model(Case("noisy_topk", (1,))), other)]:
        try:
            spread_experts(model, given)
        except ValueError as error:
            said.append(str(error))
    try:
        in_nodes(mesh, ranks_per_node=3)
    except ValueError as error:
        said.append(str(error))
    try:
        shard_experts(a_model(Case("noisy_topk", (1,))), mesh)
    except ValueError as error:
        said.append(str(error))
    return said


def shared_experts_of_a_rank(mesh: DeviceMesh) -> tuple[int, bool]:
    """Two layers with one gate and one stack of experts between them: number of parameters, and whether the
    stack is still one."""
    layers = torch.nn.ModuleList([MoE.noisy_topk(width=4, hidden=4, num_experts=4, k=2) for _ in range(2)])
    layers[1].gate, layers[1].experts = layers[0].gate, layers[0].experts
    spread_experts(layers, mesh)
    return len([*layers.parameters()]), layers[0].experts is layers[1].experts


def held_of_a_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """Numbers that a rank keeps of the experts of a layer that four ranks share, and those of the layer."""
    moe = MoE.noisy_topk(width=4, hidden=6, num_experts=2, k=2)
    whole = sum(parameter.numel() for parameter in moe.experts.parameters())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    spread_experts(moe, mesh)
    shard_experts(moe, mesh)
    return sum(parameter.to_local().numel() for parameter in expert_parameters(moe)), whole
