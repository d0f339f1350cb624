"""Faults to plant in the plain layer, each a mistake that can be made, and the laws that must fail for it."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.helpers import conformance_plain as plain
from tests.helpers.conformance_plain import NUM_EXPERTS, K, Plain


class Fault(NamedTuple):
    """parts: what replaces the parts of the plain layer. fails: the laws, all of them."""

    parts: dict[str, Any]
    fails: set[str]


def softmax_before_topk(noisy_TE: Tensor, k: int) -> Tensor:
    return noisy_TE.softmax(dim=1) * plain.kept(noisy_TE, k)


def kth_of_all(clean_TE: Tensor, std_TE: Tensor, noisy_TE: Tensor, k: int) -> Tensor:
    return plain.normal_cdf((clean_TE - noisy_TE.topk(k, dim=1).values[:, -1:]) / std_TE)


def noisy_numerator(clean_TE: Tensor, std_TE: Tensor, noisy_TE: Tensor, k: int) -> Tensor:
    return plain.probability(noisy_TE, std_TE, noisy_TE, k)


def of_probabilities(clean_TE: Tensor, std_TE: Tensor, noisy_TE: Tensor, k: int) -> Tensor:
    """Logits overwritten by their softmax: the thresholds are probabilities, what they cut are logits."""
    top_TK1 = noisy_TE.softmax(dim=1).topk(k + 1, dim=1).values
    kth_T1, next_T1 = top_TK1[:, -2:-1], top_TK1[:, -1:]
    return plain.normal_cdf((clean_TE - torch.where(noisy_TE > next_T1, next_T1, kth_T1)) / std_TE)


def detached_thresholds(clean_TE: Tensor, std_TE: Tensor, noisy_TE: Tensor, k: int) -> Tensor:
    return plain.probability(clean_TE, std_TE, noisy_TE.detach(), k)


def hard_counts(clean_TE: Tensor, std_TE: Tensor, noisy_TE: Tensor, k: int) -> Tensor:
    return plain.kept(noisy_TE, k)


def another_draw(clean_TE: Tensor, std_TE: Tensor, noisy_TE: Tensor, k: int) -> Tensor:
    return plain.probability(clean_TE, std_TE, clean_TE + torch.randn_like(std_TE) * std_TE, k)


def unbiased_variance(value_E: Tensor) -> Tensor:
    return value_E.var() / value_E.mean() ** 2


def over_mean(value_E: Tensor) -> Tensor:
    return value_E.var(correction=0) / value_E.mean()


def with_capacity(gate_TE: Tensor) -> Tensor:
    """An expert takes its first tokens, and drops those that come later."""
    capacity = max(4, math.ceil(1.25 * K * len(gate_TE) / NUM_EXPERTS))
    return gate_TE * ((gate_TE != 0).cumsum(dim=0) <= capacity)


def log_sum_exp(gate_TE: Tensor, outputs: list[Tensor]) -> Tensor:
    return plain.weighted_sum(gate_TE, [output_TD.exp() for output_TD in outputs]).log()


def divided_by_gate(gate_TE: Tensor, outputs: list[Tensor]) -> Tensor:
    return sum(gate_TE[:, i : i + 1] ** 2 * o / gate_TE[:, i : i + 1] for i, o in enumerate(outputs))


def one_draw_for_all(clean_TE: Tensor) -> Tensor:
    return torch.randn_like(clean_TE[:1]).expand_as(clean_TE)


def uniform_draw(clean_TE: Tensor) -> Tensor:
    return torch.rand_like(clean_TE)


def start_large(layer: Plain) -> None:
    torch.nn.init.normal_(layer.w_gate)


def start_outside_of_the_state(layer: Plain) -> None:
    layer.shift_D = torch.randn(plain.WIDTH)


def add_what_is_outside_of_the_state(layer: Plain, y_TD: Tensor, mask_T: Tensor | None) -> Tensor:
    return y_TD * (1 + layer.shift_D.to(y_TD).square().mean())


def start_counting(layer: Plain) -> None:
    layer.register_buffer("calls", torch.zeros(()))


def scale_by_calls(layer: Plain, y_TD: Tensor, mask_T: Tensor | None) -> Tensor:
    layer.calls += layer.training
    return y_TD * (1 + layer.calls)


def mean_over_all_positions(layer: Plain, y_TD: Tensor, mask_T: Tensor | None) -> Tensor:
    return y_TD if mask_T is None else y_TD * mask_T.to(y_TD).mean()


def squeezed(layer: Plain, y_TD: Tensor, mask_T: Tensor | None) -> Tensor:
    return y_TD.squeeze()[:, None].flatten(1) if y_TD.shape[0] else y_TD


def minus_greatest(noisy_TE: Tensor, k: int) -> Tensor:
    return plain.softmax_of_kept(noisy_TE - noisy_TE.max().detach(), k)


def place_in_the_dtype_of_the_input(noisy_TE: Tensor, k: int) -> Tensor:
    """Dispatch by a flat index that is computed in bfloat16, where 257 is 256."""
    gate_TE = plain.softmax_of_kept(noisy_TE, k)
    place_N = torch.arange(gate_TE.numel()).to(noisy_TE.dtype).long().clamp_max(gate_TE.numel() - 1)
    return gate_TE.flatten()[place_N].reshape(gate_TE.shape)


def expert_knows_its_place(layer: Plain, i: int, x_TD: Tensor) -> Tensor:
    return (1 + i) * plain.Parts().expert(layer, i, x_TD)


def jitter_in_place(layer: Plain, x_TD: Tensor) -> Tensor:
    if layer.training:
        x_TD = x_TD.mul_(1.01)
    return x_TD @ layer.w_gate


def equal_weights(gate_TE: Tensor) -> Tensor:
    return (gate_TE != 0).to(gate_TE.dtype) / K


def position_added(layer: Plain, x_TD: Tensor) -> Tensor:
    return x_TD @ layer.w_gate + torch.arange(len(x_TD)).to(x_TD)[:, None] * layer.w_gate[0]


FAULTS: dict[str, Fault] = {
    "softmax before top-k": Fault(
        {"gates": softmax_before_topk}, {"gates-sum-to-1", "softmax-comes-after-topk"}
    ),
    "softmax over all experts": Fault(
        {"gates": lambda h, k: h.softmax(dim=1)},
        {
            "exactly-k-gates-are-nonzero",
            "softmax-comes-after-topk",
            "start-is-balanced",
            "noise-chooses-as-often-as-stated",
            "probability-is-the-share-of-redraws",
            "load-is-unbiased",
        },
    ),
    "one expert too many": Fault(
        {"gates": lambda h, k: plain.softmax_of_kept(h, k + 1)},
        {
            "exactly-k-gates-are-nonzero",
            "softmax-comes-after-topk",
            "start-is-balanced",
            "noise-chooses-as-often-as-stated",
            "probability-is-the-share-of-redraws",
            "load-is-unbiased",
        },
    ),
    "noise left out": Fault(
        {"noisy": lambda clean, std, noise: clean},
        {
            "every-weight-learns-from-the-task",
            "softmax-comes-after-topk",
            "start-is-balanced",
            "noise-chooses-as-often-as-stated",
            "load-is-the-sum-of-probabilities",
            "probability-is-the-share-of-redraws",
            "probabilities-sum-to-k",
            "load-is-unbiased",
            "importance-loss-trains-the-gate",
            "load-loss-trains-the-gate",
        },
    ),
    "noise in evaluation": Fault(
        {"noise_in_evaluation": True},
        {"evaluation-repeats-itself", "token-does-not-see-its-company", "order-of-tokens-does-not-matter"},
    ),
    "one draw for all tokens": Fault(
        {"draw": one_draw_for_all}, {"start-is-balanced", "noise-chooses-as-often-as-stated"}
    ),
    "uniform noise": Fault(
        {"draw": uniform_draw},
        {"noise-chooses-as-often-as-stated", "probabilities-sum-to-k", "load-is-unbiased"},
    ),
    "exponential for softplus": Fault(
        {"std": lambda m, x: (x @ m.w_noise).exp()},
        {"noise-std-is-softplus-of-linear", "gate-starts-at-zero", "padding-gets-no-output"},
    ),
    "bias in the logits": Fault(
        {"logits": lambda m, x: x @ m.w_gate + m.w_gate.sum(dim=0)}, {"logits-are-linear"}
    ),
    "logits know the position": Fault(
        {"logits": position_added},
        {
            "token-does-not-see-its-company",
            "order-of-tokens-does-not-matter",
            "logits-are-linear",
            "probability-is-the-share-of-redraws",
            "padding-leaves-no-trace-in-outputs",
            "padding-leaves-no-trace-in-losses",
        },
    ),
    "jitter in place": Fault(
        {"logits": jitter_in_place},
        {
            "input-is-not-written-to",
            "single-token-trains",
            "gradient-of-input-is-the-derivative",
            "gradient-of-weights-is-the-derivative",
            "every-weight-learns-from-the-task",
            "softmax-comes-after-topk",
            "gradient-of-gates-is-the-derivative",
            "load-is-the-sum-of-probabilities",
            "importance-loss-is-squared-variation",
            "load-loss-is-squared-variation",
            "load-loss-trains-the-gate",
            "gradient-of-importance-loss-is-the-derivative",
            "gradient-of-load-loss-is-the-derivative",
            "gradient-is-that-of-the-dense-sum",
            "padding-leaves-no-trace-in-outputs",
            "padding-leaves-no-trace-in-losses",
        },
    ),
    "a start that is not zero": Fault({"start": start_large}, {"gate-starts-at-zero", "start-is-balanced"}),
    "input detached in the logits": Fault(
        {"logits": lambda m, x: x.detach() @ m.w_gate},
        {
            "gradient-of-input-is-the-derivative",
            "gradient-of-gates-is-the-derivative",
            "gradient-of-importance-loss-is-the-derivative",
            "gradient-of-load-loss-is-the-derivative",
        },
    ),
    "gate detached": Fault(
        {"for_output": lambda gate: gate.detach()},
        {
            "gradient-of-input-is-the-derivative",
            "gradient-of-weights-is-the-derivative",
            "every-weight-learns-from-the-task",
            "gradient-is-that-of-the-dense-sum",
        },
    ),
    "equal weights": Fault(
        {"for_output": equal_weights},
        {"every-weight-learns-from-the-task", "output-is-the-dense-sum", "gradient-is-that-of-the-dense-sum"},
    ),
    "gates detached everywhere": Fault(
        {"gates": lambda h, k: plain.softmax_of_kept(h, k).detach()},
        {
            "gradient-of-input-is-the-derivative",
            "gradient-of-weights-is-the-derivative",
            "every-weight-learns-from-the-task",
            "gradient-of-gates-is-the-derivative",
            "importance-loss-trains-the-gate",
            "gradient-of-importance-loss-is-the-derivative",
        },
    ),
    "one threshold for all": Fault(
        {"probability": kth_of_all},
        {
            "load-is-the-sum-of-probabilities",
            "probability-is-the-share-of-redraws",
            "probabilities-sum-to-k",
            "load-is-unbiased",
            "load-loss-trains-the-gate",
        },
    ),
    "noisy logit in eq. 9": Fault(
        {"probability": noisy_numerator},
        {"load-is-the-sum-of-probabilities", "probability-is-the-share-of-redraws", "probabilities-sum-to-k"},
    ),
    "logits overwritten by probabilities": Fault(
        {"probability": of_probabilities},
        {
            "load-is-the-sum-of-probabilities",
            "probability-is-the-share-of-redraws",
            "probabilities-sum-to-k",
            "load-is-unbiased",
        },
    ),
    "thresholds detached": Fault(
        {"probability": detached_thresholds}, {"gradient-of-load-loss-is-the-derivative"}
    ),
    "hard counts for the load": Fault(
        {"probability": hard_counts},
        {
            "load-is-the-sum-of-probabilities",
            "probability-is-the-share-of-redraws",
            "load-loss-trains-the-gate",
        },
    ),
    "another draw for the load": Fault(
        {"probability": another_draw},
        {
            "load-is-the-sum-of-probabilities",
            "probability-is-the-share-of-redraws",
            "padding-leaves-no-trace-in-losses",
        },
    ),
    "unbiased variance": Fault(
        {"squared_cv": unbiased_variance},
        {"importance-loss-is-squared-variation", "load-loss-is-squared-variation"},
    ),
    "variance over the mean": Fault(
        {"squared_cv": over_mean}, {"importance-loss-is-squared-variation", "load-loss-is-squared-variation"}
    ),
    "importance of the full softmax": Fault(
        {"for_importance": lambda gate, h: h.softmax(dim=1)}, {"importance-loss-is-squared-variation"}
    ),
    "importance detached": Fault(
        {"for_importance": lambda gate, h: gate.detach()},
        {"importance-loss-trains-the-gate", "gradient-of-importance-loss-is-the-derivative"},
    ),
    "padding counted in the losses": Fault(
        {"mask_for_losses": lambda mask: None}, {"padding-leaves-no-trace-in-losses"}
    ),
    "padding goes to experts": Fault({"mask_for_output": lambda mask: None}, {"padding-gets-no-output"}),
    "mean over all positions": Fault(
        {"finish": mean_over_all_positions}, {"padding-leaves-no-trace-in-outputs"}
    ),
    "capacity": Fault(
        {"for_output": with_capacity},
        {
            "token-does-not-see-its-company",
            "order-of-tokens-does-not-matter",
            "output-is-the-dense-sum",
            "gradient-is-that-of-the-dense-sum",
            "padding-leaves-no-trace-in-outputs",
        },
    ),
    "log-sum-exp of the experts": Fault(
        {"combine": log_sum_exp},
        {
            "output-is-the-dense-sum",
            "gradient-is-that-of-the-dense-sum",
            "padding-leaves-no-trace-in-outputs",
            "padding-gets-no-output",
        },
    ),
    "zero over zero": Fault(
        {"combine": divided_by_gate},
        {
            "output-is-finite",
            "evaluation-repeats-itself",
            "training-leaves-evaluation-alone",
            "token-does-not-see-its-company",
            "order-of-tokens-does-not-matter",
            "single-token-trains",
            "bfloat16-is-close-to-float32",
            "state-dict-holds-everything",
            "gradient-of-input-is-the-derivative",
            "gradient-of-weights-is-the-derivative",
            "output-is-the-dense-sum",
            "gradient-is-that-of-the-dense-sum",
            "swapped-experts-change-nothing",
            "padding-leaves-no-trace-in-outputs",
            "padding-gets-no-output",
        },
    ),
    "swap of the gate alone": Fault({"swapped": ("w_gate", "w_noise")}, {"swapped-experts-change-nothing"}),
    "expert that knows its place": Fault(
        {"expert": expert_knows_its_place}, {"swapped-experts-change-nothing"}
    ),
    "output that counts calls": Fault(
        {"start": start_counting, "finish": scale_by_calls},
        {
            "training-leaves-evaluation-alone",
            "gradient-of-input-is-the-derivative",
            "gradient-of-weights-is-the-derivative",
            "output-is-the-dense-sum",
            "gradient-is-that-of-the-dense-sum",
            "swapped-experts-change-nothing",
            "padding-leaves-no-trace-in-outputs",
        },
    ),
    "weights outside of the state": Fault(
        {"start": start_outside_of_the_state, "finish": add_what_is_outside_of_the_state},
        {"state-dict-holds-everything", "output-is-the-dense-sum", "gradient-is-that-of-the-dense-sum"},
    ),
    "maximum of an empty batch": Fault({"gates": minus_greatest}, {"empty-batch-is-a-batch"}),
    "squeezed axes": Fault({"finish": squeezed}, {"token-does-not-see-its-company", "single-token-trains"}),
    "index in bfloat16": Fault({"gates": place_in_the_dtype_of_the_input}, {"bfloat16-is-close-to-float32"}),
}
