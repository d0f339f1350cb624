"""Nothing is timed before it is seen to be right: the paper's equations in plain code, and autograd of it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..moe.layer import MoE
from ..moe.losses import importance_loss, load_loss
from ..moe.routing import Routing
from .layer import Batch, Contestant, Weights, own_weights, release, train_step

NUM_TOKENS = 8  # whose outputs and gradients are compared
NEXT_TO_ZERO = 1e-5  # beside inputs of a hidden unit that are about 1, and their rounding of about 1e-7
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # norm of the difference over norm of the expected


class WrongResult(AssertionError):
    """What was to be timed computes something else than it says."""


def check(contestant: Contestant, batch: Batch, *, training: bool) -> None:
    """Run once, and compare what can be compared.

    Everyone: shape, finite values, and a gradient other than zero for each kind of parameter. Where eq. 1
    says all about the experts, also values and gradients of some tokens and experts.

    Raises:
        WrongResult: naming what differs, and how much.
    """
    with contestant.keeping(_compared(batch.routing)):
        _check(contestant, batch, training=training)
    release(contestant, batch)


def _check(contestant: Contestant, batch: Batch, *, training: bool) -> None:
    if training:
        y_TD = train_step(contestant, batch).detach()
        _require_gradients(contestant, batch)
    else:
        with torch.inference_mode():
            y_TD, _ = contestant.forward(batch.x_TD, batch.routing)
    _require_output(y_TD, batch)
    if contestant.weights is not None:
        weights = contestant.weights()
        plain = _plain_tokens(batch, weights)
        _compare("output", y_TD[:NUM_TOKENS], plain.y_TD)
        if training:
            _compare("gradient of x", _grad(batch.x_TD)[:NUM_TOKENS], plain.x_grad_TD)
            grad_N = _grad(batch.routing.weight_N)[: plain.weight_grad_N.numel()]
            _compare("gradient of G(x)", grad_N.to(y_TD.dtype), plain.weight_grad_N)
            _check_weight_gradients(batch, weights)


def check_layer(moe: MoE, batch: Batch, *, training: bool) -> None:
    """The whole layer: outputs and weight gradients by the routing it draws, and its gate on a few tokens.

    Raises:
        WrongResult: naming what differs, and how much.
    """
    y_TD, routing = moe(batch.x_TD)
    drawn = Batch(batch.x_TD, batch.grad_TD, routing)
    _compare("output", y_TD[:NUM_TOKENS], _plain_tokens(drawn, own_weights(moe)).y_TD)
    if training:
        y_TD.backward(batch.grad_TD)
        _check_weight_gradients(drawn, own_weights(moe))
        moe.zero_grad(set_to_none=True)
        _check_gate(moe, batch.x_TD[:NUM_TOKENS].detach(), batch.grad_TD[:NUM_TOKENS])
        moe.zero_grad(set_to_none=True)
        batch.x_TD.grad = None


def _check_gate(moe: MoE, x_TD: Tensor, grad_TD: Tensor) -> None:
    """Output, losses, and gradients of x and the gate, for given noise."""
    noise_TE = torch.randn(x_TD.shape[0], moe.gate.num_experts)
    plain_x_TD = x_TD.to(torch.float32, copy=True).requires_grad_()
    x_TD = x_TD.clone().requires_grad_()
    y_TD, routing = moe(x_TD, noise=noise_TE)
    loss = importance_loss(routing) + load_loss(routing)
    torch.autograd.backward([y_TD, loss], [grad_TD, None])
    gate = dict(moe.gate.named_parameters())
    plain_gate = {name: p.detach().to(torch.float32, copy=True).requires_grad_() for name, p in gate.items()}
    plain_y_TD, plain_loss = _plain_layer(
        plain_x_TD, noise_TE, **plain_gate, weights=own_weights(moe), k=moe.gate.pairs_per_token
    )
    torch.autograd.backward([plain_y_TD, plain_loss], [grad_TD.float(), None])
    _compare("output of few tokens", y_TD, plain_y_TD)
    _compare("balance losses", loss.to(x_TD.dtype), plain_loss)
    _compare("gradient of x through the gate", _grad(x_TD), _grad(plain_x_TD))
    for name, parameter in gate.items():
        _compare(f"gradient of {name}", _grad(parameter).to(x_TD.dtype), _grad(plain_gate[name]))


def _check_weight_gradients(batch: Batch, weights: Weights) -> None:
    """The weights of the first and the last expert in use, over all of their tokens.

    Without the hidden units that are next to 0 for some token: to which side rounding takes them decides
    whether that token counts, and is nobody's mistake.
    """
    routing = batch.routing
    for expert in _compared(routing):
        pairs = routing.expert_N == expert
        x_RD, grad_RD = (t_TD.detach()[routing.token_N[pairs]].float() for t_TD in batch[:2])
        w_in_DH = weights.w_in_EDH[expert].to(torch.float32, copy=True).requires_grad_()
        w_out_HD = weights.w_out_EHD[expert].to(torch.float32, copy=True).requires_grad_()
        in_RH = x_RD @ w_in_DH
        y_RD = in_RH.relu() @ w_out_HD
        y_RD.backward(routing.weight_N.detach()[pairs, None] * grad_RD)
        is_clear_H = (in_RH.abs() > NEXT_TO_ZERO).all(dim=0)
        for name, grad, plain, units in (
            ("w_in", weights.grad_in_EDH, w_in_DH, (slice(None), is_clear_H)),
            ("w_out", weights.grad_out_EHD, w_out_HD, (is_clear_H,)),
        ):
            if grad is None or (isinstance(grad, Mapping) and expert not in grad):
                raise WrongResult(f"{name} has no gradient of expert {expert}")
            _compare(f"gradient of {name} of expert {expert}", grad[expert][units], _grad(plain)[units])


def _compared(routing: Routing) -> set[int]:
    """The first and the last expert in use."""
    used = routing.expert_N.unique()
    return {int(used[0]), int(used[-1])}


class _Plain(NamedTuple):
    """Of the first tokens: outputs, and the gradients of x and of G(x)."""

    y_TD: Tensor
    x_grad_TD: Tensor
    weight_grad_N: Tensor


def _plain_tokens(batch: Batch, weights: Weights) -> _Plain:
    """Eq. 1 for the first tokens, with the gates' values as they are, in float32."""
    routing = batch.routing
    x_TD = batch.x_TD.detach()[:NUM_TOKENS].to(torch.float32, copy=True).requires_grad_()
    pairs = routing.token_N < NUM_TOKENS
    token_N, expert_N = routing.token_N[pairs], routing.expert_N[pairs]
    weight_N = routing.weight_N.detach()[pairs].clone().requires_grad_()
    y_TD = _plain_mixture(x_TD, token_N, expert_N, weight_N, weights)
    x_grad_TD, weight_grad_N = torch.autograd.grad(y_TD, [x_TD, weight_N], batch.grad_TD[:NUM_TOKENS].float())
    return _Plain(y_TD.detach(), x_grad_TD, weight_grad_N)


def _plain_layer(
    x_TD: Tensor, noise_TE: Tensor, w_gate: Tensor, w_noise: Tensor, *, weights: Weights, k: int
) -> tuple[Tensor, Tensor]:
    """Eq. 1 to 11: y [T, D] and the sum of both losses."""
    clean_TE = x_TD @ w_gate
    std_TE = F.softplus(x_TD @ w_noise)
    noisy_TE = clean_TE + noise_TE * std_TE
    best_TK, expert_TK = noisy_TE.topk(k)
    gates_TK = best_TK.softmax(-1)
    num_tokens, num_experts = noisy_TE.shape
    token_N = torch.arange(num_tokens).repeat_interleave(k)
    y_TD = _plain_mixture(x_TD, token_N, expert_TK.flatten(), gates_TK.flatten(), weights)
    importance_E = torch.zeros_like(noisy_TE).scatter(1, expert_TK, gates_TK).sum(0)
    if k == num_experts:
        return y_TD, _squared_cv(importance_E)
    others_TEE = noisy_TE[:, None].masked_fill(torch.eye(num_experts, dtype=torch.bool), -torch.inf)
    kth_excluding_TE = others_TEE.topk(k).values[..., -1]
    load_E = torch.distributions.Normal(0.0, 1.0).cdf((clean_TE - kth_excluding_TE) / std_TE).sum(0)
    return y_TD, _squared_cv(importance_E) + _squared_cv(load_E)


def _plain_mixture(
    x_TD: Tensor, token_N: Tensor, expert_N: Tensor, weight_N: Tensor, weights: Weights
) -> Tensor:
    """Eq. 1, pair by pair."""
    y_TD = torch.zeros_like(x_TD)
    for token, expert, weight in zip(token_N.tolist(), expert_N.tolist(), weight_N, strict=True):
        y_D = (x_TD[token] @ weights.w_in_EDH[expert].float()).relu() @ weights.w_out_EHD[expert].float()
        y_TD = y_TD.index_add(0, torch.tensor([token]), (weight * y_D)[None])
    return y_TD


def _squared_cv(value_E: Tensor) -> Tensor:
    return value_E.var(correction=0) / value_E.mean().square()


def _require_output(y_TD: Tensor, batch: Batch) -> None:
    if y_TD.shape != batch.x_TD.shape:
        raise WrongResult(f"output: its shape {[*y_TD.shape]} is not {[*batch.x_TD.shape]}")
    if not (y_TD.isfinite().all() and y_TD.any()):
        raise WrongResult("output: not finite, or zero everywhere")


def _require_gradients(contestant: Contestant, batch: Batch) -> None:
    """Of x, and of one parameter of each shape at least: an expert without tokens has no gradient."""
    with_gradient = set()
    for parameter in (batch.x_TD, *contestant.parameters):
        if parameter.grad is not None and parameter.grad.any():
            with_gradient.add(parameter.shape)
            if not parameter.grad.isfinite().all():
                raise WrongResult(f"gradient of a parameter of shape {[*parameter.shape]}: not finite")
    for parameter in (batch.x_TD, *contestant.parameters):
        if parameter.shape not in with_gradient:
            raise WrongResult(f"gradient of all parameters of shape {[*parameter.shape]}: none, or zero")


def _compare(what: str, actual: Tensor, expected: Tensor) -> None:
    """Raise WrongResult unless the norms agree, up to the rounding of the actual's dtype."""
    difference = (actual.detach().float() - expected.detach().float()).norm()
    error = float(difference / expected.detach().float().norm())
    tolerance = TOLERANCES[actual.dtype]
    if not error <= tolerance:
        raise WrongResult(
            f"{what}: differs from the formula by {error:.2g} of its norm, more than {tolerance:.2g}"
        )


def _grad(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise WrongResult(f"a tensor of shape {[*leaf.shape]} has no gradient")
    return leaf.grad
