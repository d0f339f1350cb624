"""Laws of the whole: the dense sum of eq. 1, experts that change places, padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .law import Factory, Law, Number, exposed
from .trial import Trial, difference, draws_of, exact, gradients, trained, worst


def _sparse_and_dense(trial: Trial, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The output as dispatched, and the sum over all experts of G(x)_i E_i(x)."""
    implementation, noise_TE = trial.train_if_noise_is_taken(), trial.noise()
    with draws_of(1):
        gate_TE = exposed(implementation.gates)(x_TD.clone(), None, noise_TE)
    expert = exposed(implementation.expert)
    parts = [gate_TE[:, i, None] * expert(i, x_TD) for i in range(gate_TE.shape[1])]
    return trial.output(x_TD, None, noise_TE), torch.stack(parts).sum(dim=0)


@torch.no_grad()
def _output_is_the_dense_sum(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    sparse_TD, dense_TD = _sparse_and_dense(trial, trial.crowd())
    return [difference("output", sparse_TD, dense_TD, 10 * trial.tolerance)]


def _gradient_is_that_of_the_dense_sum(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    x_TD = trial.crowd().requires_grad_()
    cotangent_TD = torch.randn_like(x_TD)
    of = {"the input": x_TD, **trial.parameters}
    sparse, dense = (
        gradients((y_TD * cotangent_TD).sum(), list(of.values())) for y_TD in _sparse_and_dense(trial, x_TD)
    )
    return [
        worst(
            [
                difference(f"gradient of {name}", ours, theirs, 10 * trial.tolerance)
                for name, ours, theirs in zip(of, sparse, dense, strict=True)
            ]
        )
    ]


@torch.no_grad()
def _swapped_experts_change_nothing(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    implementation, x_TD = trial.train_if_noise_is_taken(), trial.crowd()
    noise_TE = trial.noise()
    before_TD = trial.output(x_TD, None, noise_TE)
    num_experts = exposed(implementation.num_experts)
    permutation = [*range(1, num_experts), 0]
    exposed(implementation.swap)(permutation)
    permuted_TE = None if noise_TE is None else noise_TE[:, permutation]
    after_TD = trial.output(x_TD, None, permuted_TE)
    return [difference("output after the swap", after_TD, before_TD, 10 * trial.tolerance)]


def _with_padding(trial: Trial, mask_T: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens and noise; what stands in the padding is large."""
    x_TD, noise_TE = trial.crowd(len(mask_T)), trial.noise(len(mask_T))
    x_TD[~mask_T] = 100 * torch.randn_like(x_TD[~mask_T])
    return x_TD, noise_TE


def _mask(trial: Trial) -> Tensor:
    """A third of the tokens is padding, in between and at the end."""
    mask_T = torch.rand(96) < 0.75
    mask_T[-8:] = False
    return mask_T.to(trial.like.device)


def _padding_leaves_no_trace_in_outputs(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    trial.train_if_noise_is_taken()
    mask_T = _mask(trial)
    x_TD, noise_TE = _with_padding(trial, mask_T)
    real_TE = None if noise_TE is None else noise_TE[mask_T]
    padded_TD = trial.output(x_TD, mask_T, noise_TE)[mask_T]
    real_TD = trial.output(x_TD[mask_T], None, real_TE)
    of, tolerance = trial.parameters, 10 * trial.tolerance
    padded, real = (gradients(y_TD.square().sum(), list(of.values())) for y_TD in (padded_TD, real_TD))
    numbers = [
        difference(f"gradient of {name}", with_padding, without, tolerance)
        for name, with_padding, without in zip(of, padded, real, strict=True)
    ]
    return [difference("output of a real token", padded_TD, real_TD, tolerance), worst(numbers)]


@torch.no_grad()
def _padding_gets_no_output(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    trial.train_if_noise_is_taken()
    mask_T = _mask(trial)
    x_TD, noise_TE = _with_padding(trial, mask_T)
    padding_TD = trial.output(x_TD, mask_T, noise_TE)[~mask_T]
    return [difference("output of padding", padding_TD, torch.zeros_like(padding_TD), 0.0)]


@torch.no_grad()
def _padding_leaves_no_trace_in_losses(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    implementation, mask_T = trial.train(), _mask(trial)
    x_TD, noise_TE = _with_padding(trial, mask_T)
    real_TE = exposed(noise_TE)[mask_T]
    return [
        difference(
            f"{name} loss",
            exposed(loss)(x_TD, mask_T, noise_TE),
            exposed(loss)(x_TD[mask_T], None, real_TE),
            trial.tolerance,
        )
        for name, loss in [
            ("importance", implementation.importance_loss),
            ("load", implementation.load_loss),
        ]
    ]


LAWS = (
    Law(
        name="output-is-the-dense-sum",
        statement="The output is the sum over all experts of the gate times the expert's output.",
        source="eq. 1",
        needs=("gates", "expert"),
        check=_output_is_the_dense_sum,
    ),
    Law(
        name="gradient-is-that-of-the-dense-sum",
        statement="The gradients of the input and of all parameters are those of the dense sum.",
        source="eq. 1",
        needs=("gates", "expert"),
        check=_gradient_is_that_of_the_dense_sum,
    ),
    Law(
        name="swapped-experts-change-nothing",
        statement="Experts that change places together with their gate columns leave the output as it is.",
        source="follows from eq. 1: a sum has no order",
        needs=("swap",),
        check=_swapped_experts_change_nothing,
    ),
    Law(
        name="padding-leaves-no-trace-in-outputs",
        statement="Outputs of real tokens and gradients of weights are those without the padding.",
        source="eq. 1",
        needs=("takes_mask",),
        check=_padding_leaves_no_trace_in_outputs,
    ),
    Law(
        name="padding-gets-no-output",
        statement="The output of padding is 0: no expert is chosen for it.",
        source="eq. 1: an empty sum",
        needs=("takes_mask",),
        check=_padding_gets_no_output,
    ),
    Law(
        name="padding-leaves-no-trace-in-losses",
        statement="The importance and load losses are those of a batch without the padding.",
        source="eq. 6 and 10: sums over the tokens",
        needs=("takes_mask", "takes_noise", "importance_loss", "load_loss"),
        check=_padding_leaves_no_trace_in_losses,
    ),
)
