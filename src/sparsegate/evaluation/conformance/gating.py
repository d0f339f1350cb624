"""Laws of the gate: eq. 3 to 5, its start, its gradient, its noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import equations
from .law import Factory, Law, Number, exposed
from .trial import (
    STANDARD_ERRORS,
    Trial,
    as_built,
    difference,
    exact,
    finite_differences,
    in_float64,
    trained,
    worst,
)

_NUM_DRAWS = 4096


def _drawn_gates(trial: Trial) -> Tensor:
    """Gates in training mode, with a noise that the implementation draws by itself."""
    with torch.no_grad():
        return exposed(trial.train().gates)(trial.crowd(), None, None)


def _exactly_k_gates_are_nonzero(make: Factory) -> Sequence[Number]:
    gate_TE = _drawn_gates(trial := trained(make))
    count_T = (gate_TE != 0).sum(dim=1)
    k = exposed(trial.implementation.k)
    return [
        Number(what="fewest gates of a token that are not zero", measured=int(count_T.min()), expected=k),
        Number(what="most gates of a token that are not zero", measured=int(count_T.max()), expected=k),
    ]


def _gates_sum_to_1(make: Factory) -> Sequence[Number]:
    gate_TE = _drawn_gates(trained(make))
    sum_T = gate_TE.sum(dim=1)
    return [
        Number(what="negative gates", measured=int((gate_TE < 0).sum()), expected=0),
        difference("sum of a token's gates", sum_T, torch.ones_like(sum_T), 1e-5),
    ]


def _softmax_comes_after_topk(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    implementation, x_TD = trial.train_if_noise_is_taken(), trial.crowd()
    noise_TE = trial.noise()
    with torch.no_grad():
        noisy_TE = exposed(implementation.logits)(x_TD)
        if noise_TE is not None and implementation.noise_std is not None:
            noisy_TE = noisy_TE + noise_TE * implementation.noise_std(x_TD)
        gate_TE = exposed(implementation.gates)(x_TD, None, noise_TE)
    expected_TE = equations.gates(noisy_TE, exposed(implementation.k))
    return [difference("gate", gate_TE, expected_TE, trial.tolerance)]


def _logits_are_linear(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    implementation, x_TD, z_TD = trial.train(), trial.tokens(), trial.tokens()
    with torch.no_grad():
        x_TE, z_TE, joined_TE = map(exposed(implementation.logits), (x_TD, z_TD, x_TD - z_TD))
    return [difference("logit of x - z", joined_TE, x_TE - z_TE, 10 * trial.tolerance)]


def _noise_std_is_softplus_of_linear(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    implementation, x_TD, z_TD = trial.train(), trial.tokens(), trial.tokens()

    def before_softplus(of_TD: Tensor) -> Tensor:
        return (exposed(implementation.noise_std)(of_TD) - implementation.noise_epsilon).expm1().log()

    with torch.no_grad():
        x_TE, z_TE, joined_TE = map(before_softplus, (x_TD, z_TD, x_TD - z_TD))
    # The inverse of softplus loses digits where the noise is small.
    tolerance = 1e3 * trial.tolerance
    return [difference("inverse softplus of the deviation, of x - z", joined_TE, x_TE - z_TE, tolerance)]


def _gate_starts_at_zero(make: Factory) -> Sequence[Number]:
    trial = as_built(make)
    implementation, x_TD = trial.train(), trial.tokens()
    with torch.no_grad():
        logit_TE = exposed(implementation.logits)(x_TD)
        std_TE = exposed(implementation.noise_std)(x_TD)
    at_start = torch.full_like(std_TE, 2.0).log() + implementation.noise_epsilon
    return [
        difference("logit at the start", logit_TE, torch.zeros_like(logit_TE), 0.0),
        difference("deviation of the noise at the start, softplus(0)", std_TE, at_start, 1e-6),
    ]


def _start_is_balanced(make: Factory) -> Sequence[Number]:
    trial = as_built(make)
    implementation = trial.train()
    with torch.no_grad():
        gate_TE = exposed(implementation.gates)(trial.crowd(_NUM_DRAWS), None, None)
    share_E = (gate_TE != 0).double().mean(dim=0)
    expected = exposed(implementation.k) / len(share_E)
    error = (expected * (1 - expected) / _NUM_DRAWS) ** 0.5
    expected_E = torch.full_like(share_E, expected)
    return [
        difference("share of the tokens that an expert gets", share_E, expected_E, STANDARD_ERRORS * error)
    ]


def _noise_chooses_as_often_as_stated(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    implementation = trial.train()
    x_TD = trial.tokens(2).repeat(_NUM_DRAWS, 1)
    k = exposed(implementation.k)
    with torch.no_grad():
        gate_TE = exposed(implementation.gates)(x_TD, None, None)
        clean_TE = exposed(implementation.logits)(x_TD)
        std_TE = exposed(implementation.noise_std)(x_TD)
    stated_TE = equations.gates(clean_TE + torch.randn_like(clean_TE) * std_TE, k)
    numbers = []
    for token in range(2):
        share_E, stated_E = ((g[token::2] != 0).double().mean(dim=0) for g in (gate_TE, stated_TE))
        p_E = (share_E + stated_E) / 2
        error_E = (2 * p_E * (1 - p_E) / _NUM_DRAWS).sqrt().clamp_min(1 / _NUM_DRAWS)
        numbers += [
            Number(
                what=f"share of the draws in which token {token} gets expert {expert}",
                measured=float(share_E[expert]),
                expected=float(stated_E[expert]),
                tolerance=STANDARD_ERRORS * float(error_E[expert]),
            )
            for expert in range(len(share_E))
        ]
    return [worst(numbers)]


def _gradient_of_gates_is_the_derivative(make: Factory) -> Sequence[Number]:
    trial = in_float64(make)
    implementation = trial.train()
    x_TD, noise_TE = trial.tokens().requires_grad_(), trial.noise()
    with torch.no_grad():
        cotangent_TE = torch.randn_like(exposed(implementation.gates)(x_TD, None, noise_TE))

    def value() -> Tensor:
        return (exposed(implementation.gates)(x_TD, None, noise_TE) * cotangent_TE).sum()

    return [worst(list(finite_differences(value, {"the input": x_TD, **trial.parameters})))]


LAWS = (
    Law(
        name="exactly-k-gates-are-nonzero",
        statement="Every token has exactly k gates that are not zero, in training mode.",
        source="eq. 3 and 5",
        needs=("gates", "k"),
        check=_exactly_k_gates_are_nonzero,
    ),
    Law(
        name="gates-sum-to-1",
        statement="No gate is negative, and those of a token sum to 1.",
        source="eq. 3",
        needs=("gates",),
        check=_gates_sum_to_1,
    ),
    Law(
        name="softmax-comes-after-topk",
        statement="The gates are the softmax over the k largest logits, noise included where there is any.",
        source="eq. 3 to 5",
        needs=("gates", "logits", "k"),
        check=_softmax_comes_after_topk,
    ),
    Law(
        name="logits-are-linear",
        statement="The logits without noise are a linear function of the input, without a bias.",
        source="eq. 4; table 7: its parameter counts have no room for a bias",
        needs=("logits",),
        check=_logits_are_linear,
    ),
    Law(
        name="noise-std-is-softplus-of-linear",
        statement="The noise's standard deviation is the softplus of a linear function of the input.",
        source="eq. 4",
        needs=("noise_std",),
        check=_noise_std_is_softplus_of_linear,
    ),
    Law(
        name="gate-starts-at-zero",
        statement="A new gate has the logits 0 and noise of the deviation softplus(0) = 0.693.",
        source="section 4: both weights start at zero",
        needs=("logits", "noise_std"),
        check=_gate_starts_at_zero,
    ),
    Law(
        name="start-is-balanced",
        statement="With a new gate and its own noise all experts get equally many tokens.",
        source="section 4",
        needs=("gates", "k", "noise_std"),
        check=_start_is_balanced,
    ),
    Law(
        name="noise-chooses-as-often-as-stated",
        statement="The noise that the layer draws chooses experts as often as a redraw of eq. 4 does.",
        source="eq. 4",
        needs=("gates", "logits", "noise_std", "k"),
        check=_noise_chooses_as_often_as_stated,
    ),
    Law(
        name="gradient-of-gates-is-the-derivative",
        statement="The gradient of the gates equals finite differences in float64, in training mode.",
        source="section 2.1: plain back-propagation",
        needs=("gates",),
        check=_gradient_of_gates_is_the_derivative,
    ),
)
