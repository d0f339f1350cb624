"""Laws that need nothing but a module that maps tokens to tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .law import Factory, Law, NotApplicable, Number
from .trial import (
    NUM_TOKENS,
    Trial,
    difference,
    exact,
    finite_differences,
    gradients,
    in_float64,
    trained,
    worst,
)

MODES = ("training", "evaluation")


@torch.no_grad()
def _output(trial: Trial, x_TD: Tensor) -> Tensor:
    return trial.output(x_TD)


def _finite(what: str, value: Tensor) -> Number:
    not_finite = int((~torch.isfinite(value)).sum())
    return Number(what=f"{what}, entries that are not finite", measured=not_finite, expected=0)


def _output_is_finite(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    x_TD = trial.crowd()
    numbers = []
    for mode in MODES:
        trial.implementation.module.train(mode == "training")
        numbers.append(_finite(f"output in {mode}", _output(trial, x_TD)))
    return numbers


def _evaluation_repeats_itself(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    implementation, x_TD = trial.evaluate(), trial.tokens(4 * NUM_TOKENS)
    with torch.no_grad():
        first_TD, second_TD = (implementation.output(x_TD.clone()) for _ in range(2))
    return [difference("output, called again", second_TD, first_TD, 0.0)]


def _input_is_not_written_to(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    x_TD = trial.tokens()
    numbers = []
    for mode in MODES:
        trial.implementation.module.train(mode == "training")
        given_TD = x_TD.clone()
        with torch.no_grad():
            trial.implementation.output(given_TD)
        numbers.append(difference(f"input after a call in {mode}", given_TD, x_TD, 0.0))
    return numbers


def _training_leaves_evaluation_alone(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    x_TD = trial.crowd()
    trial.evaluate()
    before_TD = _output(trial, x_TD)
    trial.train()
    for _ in range(3):
        _output(trial, x_TD)
    trial.evaluate()
    return [difference("output, training mode in between", _output(trial, x_TD), before_TD, 0.0)]


def _token_does_not_see_its_company(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    trial.evaluate()
    x_TD = trial.crowd()
    some_T = range(0, len(x_TD), 4)
    alone_TD = torch.cat([_output(trial, x_TD[t : t + 1]) for t in some_T])
    in_company_TD = _output(trial, x_TD)[list(some_T)]
    return [difference("output in company, against alone", in_company_TD, alone_TD, trial.tolerance)]


def _order_of_tokens_does_not_matter(make: Factory) -> Sequence[Number]:
    trial = exact(make)
    trial.evaluate()
    x_TD = trial.crowd()
    order_T = torch.randperm(len(x_TD)).to(x_TD.device)
    expected_TD = _output(trial, x_TD)[order_T]
    return [
        difference("output, tokens permuted", _output(trial, x_TD[order_T]), expected_TD, trial.tolerance)
    ]


def _empty_batch_is_a_batch(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    numbers = []
    for mode in MODES:
        trial.implementation.module.train(mode == "training")
        rows = len(_output(trial, trial.tokens(0)))
        numbers.append(Number(what=f"tokens of the output in {mode}", measured=rows, expected=0))
    return numbers


def _single_token_trains(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    trial.train()
    y_TD = trial.output(trial.tokens(1))
    slopes = gradients(y_TD.square().sum(), list(trial.parameters.values()))
    slope_N = torch.cat([slope.flatten() for slope in slopes]) if slopes else y_TD.new_empty(0)
    return [_finite("output", y_TD), _finite("gradients of the parameters", slope_N)]


def _bfloat16_is_close_to_float32(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    implementation = trial.evaluate()
    x_TD = trial.tokens(4 * NUM_TOKENS)
    expected_TD = _output(trial, x_TD)
    implementation.module.bfloat16()
    y_TD = _output(trial, x_TD.bfloat16())
    error_T = (y_TD.float() - expected_TD).norm(dim=1) / expected_TD.norm(dim=1).clamp_min(1e-30)
    # The median: a token whose logits nearly tie may go to another expert.
    median = float(error_T.nan_to_num(torch.inf).median())
    return [
        _finite("output", y_TD),
        Number(what="median relative error", measured=median, expected=0, tolerance=0.05),
    ]


def _state_dict_holds_everything(make: Factory) -> Sequence[Number]:
    original = trained(make)
    copy = trained(make)
    copy.implementation.module.load_state_dict(original.implementation.module.state_dict())
    x_TD = original.tokens()
    original.evaluate()
    copy.evaluate()
    return [difference("output of the copy", _output(copy, x_TD), _output(original, x_TD), 0.0)]


def _gradient_of_input_is_the_derivative(make: Factory) -> Sequence[Number]:
    trial = in_float64(make)
    trial.train()
    x_TD, noise_TE = trial.crowd().requires_grad_(), trial.noise()
    cotangent_TD = torch.randn_like(x_TD)

    def value() -> Tensor:
        return (trial.output(x_TD, None, noise_TE) * cotangent_TD).sum()

    return list(finite_differences(value, {"the input": x_TD}))


def _gradient_of_weights_is_the_derivative(make: Factory) -> Sequence[Number]:
    trial = in_float64(make)
    trial.train()
    x_TD, noise_TE = trial.crowd(), trial.noise()
    cotangent_TD = torch.randn_like(x_TD)

    def value() -> Tensor:
        return (trial.output(x_TD, None, noise_TE) * cotangent_TD).sum()

    return [worst(list(finite_differences(value, trial.parameters)))]


def _every_weight_learns_from_the_task(make: Factory) -> Sequence[Number]:
    trial = trained(make)
    if trial.implementation.k == 1:
        raise NotApplicable(
            "with k = 1 the weight of eq. 3 is always 1, and the task gives the gate no gradient"
        )
    trial.train()
    y_TD = trial.output(trial.tokens(16 * NUM_TOKENS))
    slopes = gradients(y_TD.square().sum(), list(trial.parameters.values()))
    without = [name for name, slope in zip(trial.parameters, slopes, strict=True) if not slope.any()]
    names = f" ({', '.join(without[:4])}{', ...' if without[4:] else ''})" if without else ""
    return [Number(what=f"parameters without a gradient{names}", measured=len(without), expected=0)]


LAWS = (
    Law(
        name="output-is-finite",
        statement="The output has the shape of the input and is finite, in training and in evaluation.",
        source="eq. 1",
        check=_output_is_finite,
    ),
    Law(
        name="evaluation-repeats-itself",
        statement="In evaluation mode the same input gives the same output, bit for bit.",
        source="section 2.1: the noise is there to balance training",
        check=_evaluation_repeats_itself,
    ),
    Law(
        name="input-is-not-written-to",
        statement="The layer does not change the tensor that it is given.",
        source="use: a residual connection adds the input to the output",
        check=_input_is_not_written_to,
    ),
    Law(
        name="training-leaves-evaluation-alone",
        statement="After forward passes in training mode, evaluation gives the output of before.",
        source="eq. 1 to 5: functions of the input, the weights and the noise",
        check=_training_leaves_evaluation_alone,
    ),
    Law(
        name="token-does-not-see-its-company",
        statement="In evaluation mode a token alone has the output that it has in a batch: none is dropped.",
        source="eq. 1; section 3.1: no capacity",
        check=_token_does_not_see_its_company,
    ),
    Law(
        name="order-of-tokens-does-not-matter",
        statement="In evaluation mode permuting the tokens permutes the outputs.",
        source="eq. 1",
        check=_order_of_tokens_does_not_matter,
    ),
    Law(
        name="empty-batch-is-a-batch",
        statement="No tokens give no outputs, and no error.",
        source="use: a rank or a micro-batch without tokens",
        check=_empty_batch_is_a_batch,
    ),
    Law(
        name="single-token-trains",
        statement="One token alone has a finite output and finite gradients in training mode.",
        source="use: most experts get no token then",
        check=_single_token_trains,
    ),
    Law(
        name="bfloat16-is-close-to-float32",
        statement="In bfloat16 the output is finite, and for most tokens close to that of float32.",
        source="use: mixed precision",
        check=_bfloat16_is_close_to_float32,
    ),
    Law(
        name="state-dict-holds-everything",
        statement="A new layer that loads the state_dict gives the same output, bit for bit.",
        source="use: checkpoints",
        check=_state_dict_holds_everything,
    ),
    Law(
        name="gradient-of-input-is-the-derivative",
        statement="The gradient of the input equals finite differences in float64, in training mode.",
        source="section 2.1: gradients flow through the gate to its input",
        check=_gradient_of_input_is_the_derivative,
    ),
    Law(
        name="gradient-of-weights-is-the-derivative",
        statement="The gradient of every parameter equals finite differences in float64, in training mode.",
        source="section 2.1: the gate is trained by plain back-propagation, with the rest",
        check=_gradient_of_weights_is_the_derivative,
    ),
    Law(
        name="every-weight-learns-from-the-task",
        statement="With k > 1 every parameter, of the gate as well, gets a gradient from the output.",
        source="section 2.1: the values of the top k have nonzero derivatives by the gate's weights",
        needs=("k",),
        check=_every_weight_learns_from_the_task,
    ),
)
