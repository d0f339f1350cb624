"""One step: its gradient is that of the whole batch, however it is cut, and of the formula."""

from dataclasses import replace

import pytest
import torch

from sparsegate.data import Batch
from sparsegate.models import LanguageModel, MixtureLM, build
from sparsegate.moe.losses import importance_loss, load_loss, switch_loss, threshold_loss, z_loss
from sparsegate.training.config import ContinuousConfig, LossConfig, RunConfig, TrainingConfig
from sparsegate.training.noise import gate_noise
from sparsegate.training.step import Gradient, apply_gradient, balance_loss, compute_gradient
from sparsegate.training.tasks.language import language_parts
from sparsegate.training.tasks.task import State
from tests.helpers.model_cases import GATES, with_gate

VOCABULARY, ROWS, STEPS = 11, 8, 5


def config(*, micro_batches: int = 1, balance: str = "batch", precision: str = "float32") -> RunConfig:
    return RunConfig(
        name="tiny",
        model=MixtureLM(
            vocab_size=VOCABULARY, width=6, lstm_units=6, dropout=0.0, num_experts=5, k=2, hidden=7
        ),
        batches=ContinuousConfig(batch_size=ROWS, num_steps=STEPS),
        losses=LossConfig(importance=0.3, load=0.7),
        training=TrainingConfig(micro_batches=micro_batches, balance=balance, precision=precision),
    )


def model(dtype: torch.dtype = torch.float64) -> LanguageModel:
    """Random gates, so that the balance losses have something to say."""
    torch.manual_seed(0)
    built = build(config().model, dtype=dtype)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "gate" in name:
                parameter.normal_()
    return built


def batch(*, padded: bool = False) -> Batch:
    torch.manual_seed(1)
    text_BS = torch.randint(VOCABULARY, (ROWS, STEPS + 1))
    length_B = torch.randint(1, STEPS + 1, (ROWS, 1)) if padded else torch.full((ROWS, 1), STEPS)
    return Batch(
        input_BS=text_BS[:, :-1],
        target_BS=text_BS[:, 1:],
        mask_BS=torch.arange(STEPS) < length_B,
        carries_state=False,
        index=3,
    )


def gradient_of(built: LanguageModel, of: Batch, state: State, run: RunConfig) -> Gradient:
    return compute_gradient(built, list(language_parts(built, of, state, run)), run)


def gradients(built: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}


def plain_loss(built: LanguageModel, of: Batch, run: RunConfig) -> torch.Tensor:
    """The formula: mean nll of the real tokens plus the weighted losses of the whole batch."""
    noise = gate_noise(
        built.noise_widths(), seed=run.seed, batch_index=of.index, first_row=0, shape_BS=(ROWS, STEPS)
    )
    output = built(of.input_BS, mask_BS=of.mask_BS, noise=noise)
    nll = built.softmax.nll(output.hidden_BSD, of.target_BS)[of.mask_BS].mean()
    sums = output.routings["moe"].sums
    return nll + run.losses.importance * importance_loss(sums) + run.losses.load * load_loss(sums)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
def test_micro_batches_give_the_gradient_of_the_joined_batch(micro_batches: int, padded: bool):
    built, of = model(), batch(padded=padded)
    run = config(micro_batches=micro_batches)
    expected = torch.autograd.grad(plain_loss(built, of, run), list(built.parameters()))
    result = gradient_of(built, of, {}, run)
    for (name, parameter), wanted in zip(built.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12, msg=name)
    loss = plain_loss(built, of, run).item()
    assert result.nll + result.balance == pytest.approx(loss, rel=1e-12)
    assert result.num_tokens == int(of.mask_BS.sum())


ALL_LOSSES = LossConfig(importance=0.3, load=0.7, switch=0.2, z=0.1, threshold=0.5)


@pytest.mark.parametrize("name", GATES)
def test_so_they_do_with_every_gate_that_chooses_within_a_token_or_a_sequence(name: str):
    whole_run = config()
    whole_run = replace(whole_run, model=with_gate(whole_run.model, name), losses=ALL_LOSSES)
    parts_run = replace(whole_run, training=TrainingConfig(micro_batches=4))
    torch.manual_seed(0)
    built, of = build(whole_run.model, dtype=torch.float64), batch()
    with torch.no_grad():
        for parameter_name, parameter in built.named_parameters():
            if "gate.w" in parameter_name or ".w_gate" in parameter_name:
                parameter.normal_()
    whole = gradient_of(built, of, {}, whole_run)
    expected = gradients(built)
    parts = gradient_of(built, of, {}, parts_run)
    assert parts.balance == pytest.approx(whole.balance, rel=1e-12)
    assert gradients(built).keys() == expected.keys()
    for parameter_name, gradient in gradients(built).items():
        torch.testing.assert_close(
            gradient, expected[parameter_name], rtol=1e-9, atol=1e-12, msg=parameter_name
        )


def test_the_weights_of_the_losses_are_theirs():
    run, built, of = config(), model(), batch()
    routing = built(of.input_BS).routings["moe"]
    for name, loss in {
        "importance": importance_loss,
        "load": load_loss,
        "switch": switch_loss,
        "z": z_loss,
        "threshold": threshold_loss,
    }.items():
        others = dict.fromkeys(("importance", "load", "switch", "z", "threshold"), 0.0)
        weights = LossConfig(**{**others, name: 0.25})
        ours = balance_loss({"moe": routing.sums}, replace(run, losses=weights).losses)
        torch.testing.assert_close(ours, 0.25 * loss(routing))


def test_the_loss_of_each_micro_batch_by_itself_is_another_loss():
    built, of = model(), batch()
    gradient_of(built, of, {}, config(micro_batches=4))
    joined = gradients(built)
    gradient_of(built, of, {}, config(micro_batches=4, balance="micro_batch"))
    assert not torch.allclose(
        gradients(built)["layers.moe.moe.gate.w_gate"], joined["layers.moe.moe.gate.w_gate"]
    )


def test_carried_state_goes_with_its_rows_however_they_are_split():
    built, of = model(), replace(batch(), carries_state=True)
    torch.manual_seed(2)
    state = {
        name: (torch.randn(1, ROWS, 6, dtype=torch.float64), torch.randn(1, ROWS, 6, dtype=torch.float64))
        for name in ("lstm1", "lstm2")
    }
    whole = gradient_of(built, of, state, config())
    expected = gradients(built)
    parts = gradient_of(built, of, state, config(micro_batches=3))
    for name, gradient in gradients(built).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    assert gradient_of(built, of, {}, config()).nll != pytest.approx(whole.nll, rel=1e-6)
    for name, pair in whole.state.items():
        for one, other in zip(pair, parts.state[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
            assert not other.requires_grad


def test_with_dropout_the_second_pass_repeats_the_first_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    built = model()
    built.dropout.p = 0.5
    seen = []
    plain = LanguageModel.forward

    def forward(*args: object, **keywords: object) -> object:
        output = plain(*args, **keywords)  # type: ignore[arg-type]
        seen.append((torch.is_grad_enabled(), output.hidden_BSD.detach()))
        return output

    monkeypatch.setattr(LanguageModel, "forward", forward)
    result = gradient_of(built, batch(), {}, config(micro_batches=2))
    assert [with_graph for with_graph, _ in seen] == [False, False, True, True]
    assert torch.equal(seen[0][1], seen[2][1])
    assert torch.equal(seen[1][1], seen[3][1])
    again = gradient_of(built, batch(), {}, config(micro_batches=2))
    assert (again.nll, again.balance, again.norm) == (result.nll, result.balance, result.norm)


def test_the_gradient_is_the_slope_of_the_loss():
    built, of, run = model(), batch(padded=True), config(micro_batches=2)
    gradient_of(built, of, {}, run)
    for parameter in (built.layers["moe"].moe.gate.w_noise, built.layers["lstm1"].lstm.weight_hh_l0):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter.add_(1e-6 * direction)
            above = plain_loss(built, of, run)
            parameter.sub_(2e-6 * direction)
            below = plain_loss(built, of, run)
            parameter.add_(1e-6 * direction)
        slope = ((above - below) / 2e-6).item()
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_nothing_but_the_gradient_changes():
    built = model()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    gradient_of(built, batch(), {}, config(micro_batches=2))
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_what_stands_in_padding_has_no_influence():
    built, of = model(), batch(padded=True)
    gradient_of(built, of, {}, config())
    expected = gradients(built)
    other = torch.randint(VOCABULARY, of.input_BS.shape)
    changed = replace(
        of,
        input_BS=torch.where(of.mask_BS, of.input_BS, other),
        target_BS=torch.where(of.mask_BS, of.target_BS, 0),
    )
    gradient_of(built, changed, {}, config())
    for name, gradient in gradients(built).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-15, msg=name)


def test_the_gates_noise_does_not_depend_on_the_split():
    whole = gate_noise({"a": 3, "b": 2}, seed=1, batch_index=7, first_row=0, shape_BS=(6, 4))
    part = gate_noise({"a": 3, "b": 2}, seed=1, batch_index=7, first_row=2, shape_BS=(3, 4))
    for name, draws in part.items():
        assert torch.equal(draws, whole[name][2:5])
    other = gate_noise({"a": 3, "b": 2}, seed=1, batch_index=8, first_row=0, shape_BS=(6, 4))
    assert not torch.equal(other["a"], whole["a"])


def test_half_precision_stays_close():
    built, of = model(torch.float32), batch()
    exact = gradient_of(built, of, {}, config()).nll
    assert gradient_of(built, of, {}, config(precision="bfloat16")).nll == pytest.approx(exact, rel=0.02)


def test_a_gradient_is_applied_clipped_at_its_norm():
    built = model()
    gradient = gradient_of(built, batch(), {}, config())
    expected = {
        name: p.detach() - 0.5 * p.grad * min(1.0, 0.01 / gradient.norm)
        for name, p in built.named_parameters()
    }
    optimizer = torch.optim.SGD(built.parameters(), lr=1.0)
    apply_gradient(built, [optimizer], gradient, learning_rate=0.5, clip_norm=0.01)
    for name, parameter in built.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=1e-9, msg=name)
