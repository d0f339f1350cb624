"""Who computes the experts of a case on a GPU: ours, torch's grouped product, and peers that are installed.

Peers are given our weights in their own layout, so that their results can be checked; a peer that cannot be
imported, or that cannot compute a case, says why by an exception. They are no dependencies: `transformers`,
`liger-kernel` and ScatterMoE (a folder `scattermoe` on PYTHONPATH) are timed where they are there.
"""

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsegate import Hierarchical, MoE, importance_loss, load_loss
from sparsegate.moe.dispatch import combine, dispatch, plan_rows
from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.experts.swiglu import SwiGLU
from sparsegate.moe.gating.gate import Gate
from sparsegate.moe.gating.noisy_topk import NoisyTopK
from sparsegate.moe.kernels import reference
from sparsegate.moe.kernels.choice import MOST_CHOSEN_FROM
from sparsegate.moe.routing import LogitSums, Routing


class Case(NamedTuple):
    """Tokens, width, hidden width, experts, experts of a token, activation."""

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int
    activation: str

    def ops(self) -> int:
        """Of the forward pass, two for each multiply-add."""
        matrices = 3 if self.activation == "swiglu" else 2
        return 2 * matrices * self.tokens * self.k * self.width * self.hidden

    @property
    def is_gated(self) -> bool:
        return self.activation == "swiglu"


class Operands(NamedTuple):
    """Input, weights, and a random routing with balanced counts.

    w_in_EDS: S = H, or 2H for SwiGLU, the columns that silu is taken of first. weight_N: of routing's pairs.
    """

    x_TD: Tensor
    w_in_EDS: Tensor
    w_out_EHD: Tensor
    weight_N: Tensor
    routing: Routing

    def leaves(self) -> list[Tensor]:
        return [self.x_TD, self.w_in_EDS, self.w_out_EHD, self.weight_N]


class Built(NamedTuple):
    """A contestant for one case. call: y_TD first, then what else backward starts from.

    leaves: get gradients, the input first. comparable: it computes with the routing of the operands.
    """

    call: Callable[[], tuple[Tensor, ...]]
    leaves: list[Tensor]
    comparable: bool = True


def operands(case: Case, device: str, dtype: torch.dtype) -> Operands:
    """Random ones."""
    score_TE = torch.rand(case.tokens, min(case.experts, 4096), device=device)
    expert_TK = score_TE.topk(case.k).indices * (case.experts // score_TE.shape[1])
    expert_TK += torch.randint(case.experts // score_TE.shape[1], expert_TK.shape, device=device)
    routing = _routing(expert_TK, torch.rand(case.tokens, case.k, device=device), case)
    made = [torch.randn(size, device=device, dtype=dtype) for size in _sizes(case)]
    for weight in made[1:]:
        weight.mul_(weight.shape[1] ** -0.5)
    return _with_gradients(made, routing)


def untouched(case: Case, dtype: torch.dtype) -> Operands:
    """Of the same shapes on the CPU, of which only the routing takes memory."""
    expert_TK = (torch.arange(case.tokens * case.k) % case.experts).view(case.tokens, case.k)
    routing = _routing(expert_TK, torch.ones(case.tokens, case.k), case)
    return _with_gradients([torch.empty(size, dtype=dtype) for size in _sizes(case)], routing)


def _sizes(case: Case) -> list[tuple[int, ...]]:
    columns = case.hidden * (2 if case.is_gated else 1)
    return [
        (case.tokens, case.width),
        (case.experts, case.width, columns),
        (case.experts, case.hidden, case.width),
    ]


def _routing(expert_TK: Tensor, weight_TK: Tensor, case: Case) -> Routing:
    return Routing.of_token_choice(
        logit_sums=LogitSums(weight_TK.new_zeros(1, case.experts), weight_TK.new_zeros(())),
        expert_TK=expert_TK,
        weight_TK=weight_TK,
        mask_T=None,
        load_E=weight_TK.new_zeros(case.experts),
    )


def _with_gradients(made: list[Tensor], routing: Routing) -> Operands:
    return Operands(*(t.requires_grad_() for t in (*made, routing.weight_N.detach())), routing)


def composed(product: Any, given: Operands, activation: str) -> Tensor:
    """The layer with any grouped product."""
    plan = plan_rows(given.routing)
    pre_NS = product(dispatch(given.x_TD, plan), given.w_in_EDS, plan.end_E)
    gate_NH, *up_NH = pre_NS.chunk(2, dim=-1) if activation == "swiglu" else (pre_NS,)
    hidden_NH = F.silu(gate_NH) * up_NH[0] if up_NH else gate_NH.relu()
    return combine(product(hidden_NH, given.w_out_EHD, plan.end_E), plan, given.weight_N).to(given.x_TD.dtype)


def plain(given: Operands, activation: str) -> Tensor:
    """What all others must agree with."""
    return composed(reference.grouped_product, given, activation)


def ours(case: Case, given: Operands) -> Built:
    from sparsegate.moe.kernels.triton.feed_forward import feed_forward

    def call() -> tuple[Tensor]:
        *tensors, routing = given
        return (feed_forward(*tensors, plan_rows(routing), case.activation),)

    return Built(call, given.leaves())


def our_layer(case: Case, given: Operands) -> Built:
    """Noisy top-k and both losses around the same kernels; its gate chooses for itself."""
    kernel = "triton" if case.experts <= MOST_CHOSEN_FROM else None
    gate = NoisyTopK(width=case.width, num_experts=case.experts, k=case.k, kernel=kernel, **_like(given))
    return _layer(gate, case, given)


def our_hierarchy(case: Case, given: Operands) -> Built:
    """The same with groups of 16 experts, of which a token goes to k, and to one expert in each."""
    num_groups = case.experts // 16
    if case.experts % 16 or num_groups < case.k:
        raise ValueError(f"{case.experts} experts are no {case.k} groups of 16")
    gate = Hierarchical.noisy_topk(
        width=case.width,
        num_experts=case.experts,
        num_groups=num_groups,
        k_primary=case.k,
        k_secondary=1,
        kernel="triton",
        **_like(given),
    )
    return _layer(gate, case, given)


def _like(given: Operands) -> dict[str, Any]:
    return {"device": given.x_TD.device, "dtype": given.x_TD.dtype}


def _layer(gate: Gate, case: Case, given: Operands) -> Built:
    kind = SwiGLU if case.is_gated else FeedForward
    experts = kind(
        width=case.width,
        hidden=case.hidden,
        num_experts=case.experts,
        kernel="triton",
        **_like(given) | {"device": "meta"},
    )
    experts.w_in, experts.w_out = nn.Parameter(given.w_in_EDS), nn.Parameter(given.w_out_EHD)
    moe = MoE(gate=gate, experts=experts)

    def call() -> tuple[Tensor, Tensor]:
        y_TD, routing = moe(given.x_TD)
        return y_TD, importance_loss(routing) + load_loss(routing)

    return Built(call, [given.x_TD, *moe.parameters()], comparable=False)


def grouped_mm(case: Case, given: Operands) -> Built:
    def product(rows_ND: Tensor, weight_EDH: Tensor, end_E: Tensor) -> Tensor:
        return F.grouped_mm(rows_ND, weight_EDH, offs=end_E.to(torch.int32))

    return Built(lambda: (composed(product, given, case.activation),), given.leaves())


def _tables(case: Case, given: Operands) -> tuple[Tensor, Tensor]:
    """Expert and weight of each token's pairs; the weights need gradients."""
    expert_TK = given.routing.expert_N.view(case.tokens, case.k)
    return expert_TK, given.weight_N.detach().view(case.tokens, case.k).clone().requires_grad_()


def _own(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().contiguous())


def transformers_grouped_mm(case: Case, given: Operands) -> Built:
    config = SimpleNamespace(
        num_experts=case.experts,
        n_routed_experts=case.experts,
        hidden_size=case.width,
        moe_intermediate_size=case.hidden,
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="relu",
        _experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        if case.is_gated:
            experts = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeExperts(
                config
            )
        else:
            modeling = import_module("transformers.models.nemotron_h.modeling_nemotron_h")
            experts = modeling.NemotronHExperts(config)
    name = "gate_up_proj" if case.is_gated else "up_proj"
    setattr(experts, name, _own(given.w_in_EDS.transpose(1, 2)))
    experts.down_proj = _own(given.w_out_EHD.transpose(1, 2))
    expert_TK, weight_TK = _tables(case, given)
    return Built(
        lambda: (experts(given.x_TD, expert_TK, weight_TK.to(given.x_TD.dtype)),),
        [given.x_TD, weight_TK, *experts.parameters()],
    )


def liger(case: Case, given: Operands) -> Built:
    if not case.is_gated:
        raise ValueError("SwiGLU alone")
    function = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    weights = [_own(weight.transpose(1, 2)) for weight in (given.w_in_EDS, given.w_out_EHD)]
    expert_TK, weight_TK = _tables(case, given)
    index_TK = expert_TK.to(torch.int32)
    return Built(
        lambda: (function.apply(given.x_TD, *weights, index_TK, weight_TK),),
        [given.x_TD, weight_TK, *weights],
    )


def scattermoe(case: Case, given: Operands) -> Built:
    modules = import_module("scattermoe.mlp")
    kind, activation = (modules.GLUMLP, nn.SiLU()) if case.is_gated else (modules.MLP, nn.ReLU())
    with torch.device("meta"):
        mlp = kind(case.width, case.hidden, case.experts, case.k, activation=activation)
    w_in_EDS = given.w_in_EDS
    if case.is_gated:  # its gate is the second half of the columns
        w_in_EDS = torch.cat(w_in_EDS.chunk(2, dim=2)[::-1], dim=2)
    mlp.experts.weight = _own(w_in_EDS.transpose(1, 2))
    mlp.output_experts.weight = _own(given.w_out_EHD.transpose(1, 2))
    expert_TK, weight_TK = _tables(case, given)
    return Built(
        lambda: (mlp(given.x_TD, weight_TK.to(given.x_TD.dtype), expert_TK),),
        [given.x_TD, weight_TK, mlp.experts.weight, mlp.output_experts.weight],
    )


CONTESTANTS: dict[str, Callable[[Case, Operands], Built]] = {
    "triton": ours,
    "triton, whole layer": our_layer,
    "triton, hierarchical layer": our_hierarchy,
    "F.grouped_mm": grouped_mm,
    "transformers grouped_mm": transformers_grouped_mm,
    "liger-kernel": liger,
    "scattermoe": scattermoe,
}
