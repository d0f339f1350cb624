"""Other mixtures, where they are installed: built to the same width, hidden and number of experts.

They are imported by name when they are asked for, and are no dependencies of this package. What one of them
cannot do, or not in the memory that is free, is reported as a reason instead of a figure.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..moe.layer import MoE
from ..moe.routing import Routing
from .layer import Contestant, Weights
from .shape import DTYPES, Shape, too_large

MOST_EAGER_EXPERTS = 32
ONE_HOT_COPIES = 8  # of the tensor tokens x experts x capacity, forward and backward

Forward = Callable[[Tensor, Routing], tuple[Tensor, Tensor | None]]


class Absent(NamedTuple):
    """One who is not timed, and why."""

    name: str
    reason: str


class Request(NamedTuple):
    """What a peer is built for. moe: ours, whose weights are taken over where that is possible."""

    shape: Shape
    moe: MoE
    training: bool
    davidmrau: Path | None


def peers_of(package: str, request: Request) -> Iterator[Contestant | Absent]:
    """The peers of one package, whose names begin with it."""
    shape = request.shape
    # Weights; gradients of whoever is at work; and a copy of them, which loops over experts make.
    reason = too_large(shape.weight_bytes * (3 if request.training else 1) + shape.working_bytes())
    if reason is not None:
        yield Absent(package, reason)
        return
    try:
        yield from PACKAGES[package](request)
    except ModuleNotFoundError as error:
        yield Absent(package, f"not installed ({error.name} is missing)")
    except Exception as error:  # of foreign code, which can raise anything
        yield Absent(package, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _transformers(request: Request) -> Iterator[Contestant]:
    """The experts of Nemotron-H, which are ours with transposed weights, in all implementations."""
    experts = _nemotron_experts(request.shape, request.moe)
    shape = request.shape

    def given(implementation: str) -> Forward:
        def forward(x_TD: Tensor, routing: Routing) -> tuple[Tensor, None]:
            experts.config._experts_implementation = implementation
            expert_TK, weight_TK = (t_N.view(-1, shape.k) for t_N in (routing.expert_N, routing.weight_N))
            return experts(x_TD, expert_TK, weight_TK), None

        return forward

    implementations = {
        "grouped_mm": ("one grouped product", lambda shape, training: None),
        "batched_mm": ("a copy of its expert's weights for each pair", _batched_mm_obstacle),
        "eager": ("a loop over indexed weights, whose gradients are of full size each", _eager_obstacle),
    }
    for implementation, (how, obstacle) in implementations.items():
        yield Contestant(
            name=f"transformers {implementation}",
            kind="experts",
            note=f"NemotronHExperts, relu; {how}",
            forward=given(implementation),
            parameters=list(experts.parameters()),
            pairs_per_token=shape.k,
            uses_given_experts=True,
            weights=lambda: _nemotron_weights(experts),
            obstacle=obstacle,
        )
    yield _transformers_layer(shape, experts)


def _nemotron_experts(shape: Shape, moe: MoE) -> Any:
    modeling = import_module("transformers.models.nemotron_h.modeling_nemotron_h")
    config = SimpleNamespace(
        n_routed_experts=shape.experts,
        hidden_size=shape.width,
        moe_intermediate_size=shape.hidden,
        moe_latent_size=None,
        mlp_hidden_act="relu",
        _experts_implementation="grouped_mm",
    )
    experts = modeling.NemotronHExperts(config).to(DTYPES[shape.dtype])
    w_in_EDH, w_out_EHD = moe.experts.parameters()
    with torch.no_grad():
        experts.up_proj.copy_(w_in_EDH.transpose(1, 2))
        experts.down_proj.copy_(w_out_EHD.transpose(1, 2))
    return experts


def _nemotron_weights(experts: Any) -> Weights:
    up_EHD, down_EDH = experts.up_proj, experts.down_proj
    in_EDH, out_EHD = (None if p.grad is None else p.grad.transpose(1, 2) for p in (up_EHD, down_EDH))
    return Weights(up_EHD.detach().transpose(1, 2), down_EDH.detach().transpose(1, 2), in_EDH, out_EHD)


def _transformers_layer(shape: Shape, experts: Any) -> Contestant:
    modeling = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = SimpleNamespace(
        num_experts_per_tok=shape.k, num_experts=shape.experts, norm_topk_prob=True, hidden_size=shape.width
    )
    router = modeling.Qwen3MoeTopKRouter(config).to(DTYPES[shape.dtype])
    nn.init.normal_(router.weight, std=shape.width**-0.5)

    def forward(x_TD: Tensor, _: Routing) -> tuple[Tensor, None]:
        experts.config._experts_implementation = "grouped_mm"
        _, weight_TK, expert_TK = router(x_TD)
        return experts(x_TD, expert_TK, weight_TK), None

    return Contestant(
        name="transformers layer",
        kind="layer",
        note="Qwen3's softmax top-k router, then grouped_mm; no noise, no balance loss, no token dropped",
        forward=forward,
        parameters=[*router.parameters(), *experts.parameters()],
        pairs_per_token=shape.k,
        uses_given_experts=False,
    )


def _batched_mm_obstacle(shape: Shape, training: bool) -> str | None:
    """It copies the weights of its expert for each pair, and in backward makes their gradients."""
    return too_large((3 if training else 1) * shape.pairs * shape.expert_bytes)


def _eager_obstacle(shape: Shape, training: bool) -> str | None:
    if training and shape.experts > MOST_EAGER_EXPERTS:
        return f"its backward is quadratic in the experts; timed up to {MOST_EAGER_EXPERTS}"
    return None


def _mixture_of_experts(request: Request) -> Iterator[Contestant]:
    shape = request.shape
    module = import_module("mixture_of_experts").MoE(
        dim=shape.width, num_experts=shape.experts, hidden_dim=shape.hidden, activation=nn.ReLU
    )
    module = module.to(DTYPES[shape.dtype]).train(request.training)

    def forward(x_TD: Tensor, _: Routing) -> tuple[Tensor, Tensor]:
        y_BTD, loss = module(x_TD[None])
        return y_BTD[0], loss

    yield Contestant(
        name="mixture-of-experts",
        kind="layer",
        note=(
            "top-2 only, and its rate counts 2 experts per token; balance loss, no noise; one-hot dispatch; "
            "the second expert is left out at random if its gate is small; drops what is over "
            "1.25 * tokens / experts (in evaluation 2)"
        ),
        forward=forward,
        parameters=list(module.parameters()),
        pairs_per_token=2,
        uses_given_experts=False,
        obstacle=_one_hot_obstacle(2),
    )


def _st_moe_pytorch(request: Request) -> Iterator[Contestant | Absent]:
    shape = request.shape
    package = import_module("st_moe_pytorch")
    if shape.k < 2:
        yield Absent("st-moe-pytorch", "needs k of at least 2")
        return

    def expert() -> nn.Module:
        first = nn.Linear(shape.width, shape.hidden, bias=False)
        return nn.Sequential(first, nn.ReLU(), nn.Linear(shape.hidden, shape.width, bias=False))

    module = package.MoE(
        dim=shape.width,
        num_experts=shape.experts,
        gating_top_n=shape.k,
        experts=nn.ModuleList([expert() for _ in range(shape.experts)]),
    )
    module = module.to(DTYPES[shape.dtype]).train(request.training)

    def forward(x_TD: Tensor, _: Routing) -> tuple[Tensor, Tensor]:
        y_BTD, loss, *_others = module(x_TD[None])
        return y_BTD[0], loss.sum()

    yield Contestant(
        name="st-moe-pytorch",
        kind="layer",
        note=(
            "balance and z loss, no noise; one-hot dispatch; experts beyond a token's first are left out at "
            "random if their gate is small; drops what is over 1.25 * tokens / experts (in evaluation 2)"
        ),
        forward=forward,
        parameters=list(module.parameters()),
        pairs_per_token=shape.k,
        uses_given_experts=False,
        obstacle=_one_hot_obstacle(shape.k),
    )


def _one_hot_obstacle(k: int) -> Callable[[Shape, bool], str | None]:
    def obstacle(shape: Shape, training: bool) -> str | None:
        capacity = max(4, int((1.25 if training else 2) * shape.tokens / shape.experts))
        return too_large(ONE_HOT_COPIES * k * shape.tokens * shape.experts * capacity * 4)

    return obstacle


def _davidmrau(request: Request) -> Iterator[Contestant | Absent]:
    shape, file = request.shape, request.davidmrau
    if file is None:
        yield Absent("davidmrau", "one file on GitHub: give its path with --davidmrau")
        return
    module = _load(file).MoE(shape.width, shape.width, shape.experts, shape.hidden, k=shape.k)
    nn.init.normal_(module.w_gate, std=shape.width**-0.5)
    module = module.to(DTYPES[shape.dtype]).train(request.training)
    yield Contestant(
        name="davidmrau",
        kind="layer",
        note=(
            "noisy top-k gate, importance and load loss; no token dropped; experts have biases, and end in a "
            "softmax; its gate is drawn here, as with its zeros all tokens without noise share k experts"
        ),
        forward=lambda x_TD, _: module(x_TD),
        parameters=list(module.parameters()),
        pairs_per_token=shape.k,
        uses_given_experts=False,
    )


def _load(file: Path) -> ModuleType:
    spec = spec_from_file_location("davidmrau_moe", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: no Python file")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PACKAGES: dict[str, Callable[[Request], Iterator[Contestant | Absent]]] = {
    "transformers": _transformers,
    "mixture-of-experts": _mixture_of_experts,
    "st-moe-pytorch": _st_moe_pytorch,
    "davidmrau": _davidmrau,
}
