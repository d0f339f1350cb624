"""Laws of the load and of the balance losses: eq. 6 to 11."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import equations
from .implementation import OfBatch
from .law import Factory, Law, NotApplicable, Number, exposed
from .trial import (
    STANDARD_ERRORS,
    Trial,
    as_built,
    difference,
    draws_of,
    exact,
    finite_differences,
    gradients,
    in_float64,
    trained,
    worst,
)

_NUM_BATCHES = 32
_NUM_REDRAWS = 4096


def _require_smooth_load(trial: Trial) -> None:
    if trial.implementation.k == trial.implementation.num_experts:
        raise NotApplicable("with k = num_experts every expert is always chosen, and eq. 9 is not defined")


def _load_is_the_sum_of_probabilities(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    _require_smooth_load(trial)
    implementation, x_TD, noise_TE = trial.train(), trial.crowd(), exposed(trial.noise())
    with torch.no_grad():
        load_E = exposed(implementation.load)(x_TD, None, noise_TE)
        clean_TE = exposed(implementation.logits)(x_TD)
        std_TE = exposed(implementation.noise_std)(x_TD)
    p_TE = equations.probability_in_topk(clean_TE, std_TE, noise_TE, exposed(implementation.k))
    return [difference("load of an expert", load_E, p_TE.sum(dim=0), trial.tolerance)]


def _probability_is_the_share_of_redraws(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    _require_smooth_load(trial)
    implementation = trial.train()
    x_1D, noise_1E = trial.tokens(1), exposed(trial.noise(1))
    numbers = []
    with torch.no_grad():
        # The load of one token alone is its P(x, i).
        p_E = exposed(implementation.load)(x_1D, None, noise_1E)
        for expert in range(len(p_E)):
            noise_TE = noise_1E.repeat(_NUM_REDRAWS, 1)
            noise_TE[:, expert] = torch.randn(_NUM_REDRAWS).to(noise_TE)
            gate_TE = exposed(implementation.gates)(x_1D.repeat(_NUM_REDRAWS, 1), None, noise_TE)
            share = float((gate_TE[:, expert] != 0).double().mean())
            error = max((share * (1 - share) / _NUM_REDRAWS) ** 0.5, 1 / _NUM_REDRAWS)
            numbers.append(
                Number(
                    what=f"P(x, {expert}), against redraws of noise {expert}",
                    measured=float(p_E[expert]),
                    expected=share,
                    tolerance=STANDARD_ERRORS * error,
                )
            )
    return [worst(numbers)]


def _batches(trial: Trial, function: OfBatch) -> Tensor:
    """Values over batches of tokens, with noise that the implementation draws: [_NUM_BATCHES, E]."""
    with torch.no_grad():
        values = [function(trial.tokens(128), None, None) for _ in range(_NUM_BATCHES)]
    return torch.stack(values).double() / 128


def _probabilities_sum_to_k(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    _require_smooth_load(trial)
    implementation = trial.train()
    sum_B = _batches(trial, exposed(implementation.load)).sum(dim=1)
    return [
        Number(
            what="mean over the tokens of the sum of P(x, i)",
            measured=float(sum_B.mean()),
            expected=exposed(implementation.k),
            tolerance=STANDARD_ERRORS * float(sum_B.std()) / _NUM_BATCHES**0.5 + 1e-5,
        )
    ]


def _load_is_unbiased(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    _require_smooth_load(trial)
    implementation = trial.train()
    gates = exposed(implementation.gates)
    load_BE = _batches(trial, exposed(implementation.load))
    count_BE = _batches(trial, lambda x_TD, mask_T, noise_TE: (gates(x_TD, mask_T, noise_TE) != 0).sum(dim=0))
    error_E = ((load_BE.var(dim=0) + count_BE.var(dim=0)) / _NUM_BATCHES).sqrt() + 1e-5
    return [
        worst(
            [
                Number(
                    what=f"load of expert {expert} per token, against its share of the tokens",
                    measured=float(load_BE[:, expert].mean()),
                    expected=float(count_BE[:, expert].mean()),
                    tolerance=STANDARD_ERRORS * float(error_E[expert]),
                )
                for expert in range(len(error_E))
            ]
        )
    ]


def _importance_loss_is_squared_variation(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    implementation, x_TD, noise_TE = trial.train(), trial.crowd(), trial.noise()
    with torch.no_grad():
        with draws_of(1):
            loss = exposed(implementation.importance_loss)(x_TD, None, noise_TE)
        with draws_of(1):
            importance_E = exposed(implementation.gates)(x_TD, None, noise_TE).sum(dim=0)
    return [difference("importance loss", loss, equations.squared_cv(importance_E), trial.tolerance)]


def _load_loss_is_squared_variation(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    implementation, x_TD, noise_TE = trial.train(), trial.crowd(), trial.noise()
    with torch.no_grad():
        with draws_of(1):
            loss = exposed(implementation.load_loss)(x_TD, None, noise_TE)
        with draws_of(1):
            load_E = exposed(implementation.load)(x_TD, None, noise_TE)
    return [difference("load loss", loss, equations.squared_cv(load_E), trial.tolerance)]


def _derivative(trial: Trial, loss: OfBatch) -> Sequence[Number]:
    trial.train()
    x_TD, noise_TE = trial.crowd().requires_grad_(), trial.noise()
    of = {"the input": x_TD, **trial.parameters}
    return [worst(list(finite_differences(lambda: loss(x_TD, None, noise_TE), of)))]


def _gradient_of_importance_loss_is_the_derivative(make: Factory) -> Sequence[Number]:
    trial = in_float64(make)
    return _derivative(trial, exposed(trial.implementation.importance_loss))


def _gradient_of_load_loss_is_the_derivative(make: Factory) -> Sequence[Number]:
    trial = in_float64(make)
    _require_smooth_load(trial)
    return _derivative(trial, exposed(trial.implementation.load_loss))


def _trains(trial: Trial, loss: OfBatch) -> Sequence[Number]:
    trial.train()
    slopes = gradients(loss(trial.crowd(), None, trial.noise()), list(trial.parameters.values()))
    idle = not any(bool(slope.any()) for slope in slopes)
    return [Number(what="losses that give no parameter a gradient", measured=int(idle), expected=0)]


def _importance_loss_trains_the_gate(make: Factory) -> Sequence[Number]:
    trial = as_built(make)
    if trial.implementation.k == 1:
        raise NotApplicable("with k = 1 the importance is the number of tokens, which has no gradient")
    return _trains(trial, exposed(trial.implementation.importance_loss))


def _load_loss_trains_the_gate(make: Factory) -> Sequence[Number]:
    trial = as_built(make)
    _require_smooth_load(trial)
    return _trains(trial, exposed(trial.implementation.load_loss))


LAWS = (
    Law(
        name="load-is-the-sum-of-probabilities",
        statement="The load is the sum of P(x, i), the clean logit against each expert's own threshold.",
        source="eq. 8 to 10",
        needs=("load", "logits", "noise_std", "takes_noise", "k"),
        check=_load_is_the_sum_of_probabilities,
    ),
    Law(
        name="probability-is-the-share-of-redraws",
        statement="P(x, i) is the share of redraws of the noise of i alone in which i gets the token.",
        source="eq. 8",
        needs=("load", "gates", "takes_noise"),
        check=_probability_is_the_share_of_redraws,
    ),
    Law(
        name="probabilities-sum-to-k",
        statement="P(x, i) sums to k over the experts, in expectation over the noise.",
        source="follows from eq. 8",
        needs=("load", "k"),
        check=_probabilities_sum_to_k,
    ),
    Law(
        name="load-is-unbiased",
        statement="The load of each expert is, in expectation, the number of tokens that it gets.",
        source="appendix A",
        needs=("load", "gates"),
        check=_load_is_unbiased,
    ),
    Law(
        name="importance-loss-is-squared-variation",
        statement="The importance loss is the variance of the summed gates over their squared mean.",
        source="eq. 6 and 7",
        needs=("importance_loss", "gates"),
        check=_importance_loss_is_squared_variation,
    ),
    Law(
        name="load-loss-is-squared-variation",
        statement="The load loss is the variance of the load over its squared mean.",
        source="eq. 11",
        needs=("load_loss", "load"),
        check=_load_loss_is_squared_variation,
    ),
    Law(
        name="importance-loss-trains-the-gate",
        statement="From the start, the importance loss gives a gradient to some parameters.",
        source="section 4",
        needs=("importance_loss", "k"),
        check=_importance_loss_trains_the_gate,
    ),
    Law(
        name="load-loss-trains-the-gate",
        statement="From the start, the load loss gives a gradient to some parameters.",
        source="appendix A: the load is smooth, so that it can be learned from",
        needs=("load_loss",),
        check=_load_loss_trains_the_gate,
    ),
    Law(
        name="gradient-of-importance-loss-is-the-derivative",
        statement="The gradient of the importance loss equals finite differences in float64.",
        source="eq. 7: a loss that trains the gate",
        needs=("importance_loss",),
        check=_gradient_of_importance_loss_is_the_derivative,
    ),
    Law(
        name="gradient-of-load-loss-is-the-derivative",
        statement="The gradient of the load loss equals finite differences in float64, thresholds included.",
        source="eq. 9 to 11",
        needs=("load_loss",),
        check=_gradient_of_load_loss_is_the_derivative,
    ),
)
