"""The language model as a whole: order of the parts, state, padding, noise."""

from dataclasses import replace

import pytest
import torch

from sparsegate.models import build
from sparsegate.moe.losses import importance_loss, load_loss
from tests.helpers import moe_oracle as oracle
from tests.helpers.model_cases import CONFIGS, VOCAB_SIZE, WIDTH, a_model, lstm
from tests.helpers.moe_cases import gradients
from tests.helpers.tolerances import assert_close

B, S = 3, 5

of_every_kind = pytest.mark.parametrize("kind", CONFIGS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def tokens(num_steps: int = S):
    return torch.randint(VOCAB_SIZE, (B, num_steps))


def noise_for(model, num_steps: int = S):
    widths = model.noise_widths()
    return {name: torch.randn(B, num_steps, width, dtype=torch.float64) for name, width in widths.items()}


def straight_line(model, input_BS, noise_BSE, drop):
    """Embedding, LSTM, mixture, LSTM: sigmoid before dropout, dropout before the residual (appendix C.1)."""
    layers, training = model.layers, model.training
    x = drop[0] * model.embedding.weight[input_BS]
    x = x + drop[1] * lstm(layers["lstm1"].lstm, x)

    gate, experts = layers["moe"].moe.gate, layers["moe"].moe.experts
    x_TD, noise_TE = x.reshape(-1, WIDTH), noise_BSE.reshape(B * S, -1)
    clean_TE, _, noisy_TE = oracle.noisy_logits(x_TD, gate.w_gate, gate.w_noise, noise_TE)
    gates_TE = oracle.gates(noisy_TE if training else clean_TE, gate.pairs_per_token)
    y_TD = oracle.mixture(x_TD, gates_TE, oracle.feed_forward(experts.w_in, experts.w_out))
    x = x + drop[2] * torch.sigmoid(y_TD.reshape(x.shape))
    return x + drop[3] * lstm(layers["lstm2"].lstm, x)


@in_both_modes
def test_the_mixture_model_is_its_straight_line_formula(training):
    model = a_model(replace(CONFIGS["mixture"], dropout=0.4)).train(training)
    input_BS, noise, drop = tokens(), noise_for(model), []
    model.dropout.register_forward_hook(lambda _, before, after: drop.append((after / before[0]).detach()))
    ours = model(input_BS, noise=noise).hidden_BSD
    assert len(drop) == 4
    for factor in drop:
        assert_close(factor, (factor > 0).double() / 0.6 if training else torch.ones_like(factor))
        assert bool((factor == 0).any()) == training
    theirs = straight_line(model, input_BS, noise["moe"], drop)
    assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    of = tuple(p for name, p in model.named_parameters() if not name.startswith("softmax"))
    for our_gradient, their_gradient in zip(
        gradients((ours * cotangent).sum(), *of), gradients((theirs * cotangent).sum(), *of), strict=True
    ):
        assert_close(our_gradient, their_gradient)


@of_every_kind
def test_every_layers_output_is_added_to_its_input(kind):
    model, input_BS = a_model(CONFIGS[kind]).eval(), tokens()
    x_BSD = model.embedding(input_BS)
    for layer in model.layers.values():
        x_BSD = x_BSD + layer(x_BSD, None, None, None).y_BSD
    assert torch.equal(model(input_BS).hidden_BSD, x_BSD)


@of_every_kind
def test_dropout_works_in_training_alone(kind):
    model = a_model(replace(CONFIGS[kind], dropout=0.5))
    input_BS = tokens()
    noise = noise_for(model)
    assert not torch.equal(model(input_BS, noise=noise).hidden_BSD, model(input_BS, noise=noise).hidden_BSD)
    model.eval()
    assert torch.equal(model(input_BS).hidden_BSD, model(input_BS).hidden_BSD)
    without = a_model(CONFIGS[kind]).eval()
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(input_BS).hidden_BSD, without(input_BS).hidden_BSD)


@of_every_kind
@in_both_modes
def test_a_state_that_is_carried_on_equals_one_long_sequence(kind, training):
    model, input_BS = a_model(CONFIGS[kind]).train(training), tokens(7)
    noise = noise_for(model, 7)
    whole = model(input_BS, noise=noise)
    state, parts = None, []
    for steps in (slice(0, 3), slice(3, 4), slice(4, 7)):
        out = model(input_BS[:, steps], state=state, noise={n: v[:, steps] for n, v in noise.items()})
        state = out.state
        parts.append(out)
    assert_close(torch.cat([out.hidden_BSD for out in parts], dim=1), whole.hidden_BSD)
    assert state.keys() == whole.state.keys() == {name for name in model.layers if name.startswith("lstm")}
    for name, values in whole.state.items():
        for ours, theirs in zip(state[name], values, strict=True):
            assert_close(ours, theirs)
    for name, routing in whole.routings.items():
        total = sum((out.routings[name].sums for out in parts[1:]), start=parts[0].routings[name].sums)
        assert_close(total.importance_E, routing.sums.importance_E)
        assert_close(total.load_E, routing.sums.load_E)


@of_every_kind
def test_no_state_is_a_state_of_zeros_and_another_state_matters(kind):
    model, input_BS = a_model(CONFIGS[kind]).eval(), tokens()
    fresh = model(input_BS)
    zeros = {name: tuple(torch.zeros_like(v) for v in values) for name, values in fresh.state.items()}
    assert torch.equal(model(input_BS, state=zeros).hidden_BSD, fresh.hidden_BSD)
    assert not torch.equal(model(input_BS, state=fresh.state).hidden_BSD, fresh.hidden_BSD)


@of_every_kind
def test_the_future_has_no_influence(kind):
    model, input_BS = a_model(CONFIGS[kind]).eval(), tokens()
    changed_BS = input_BS.clone()
    changed_BS[:, 3:] = (changed_BS[:, 3:] + 1) % VOCAB_SIZE
    ours, theirs = model(changed_BS).hidden_BSD, model(input_BS).hidden_BSD
    assert_close(ours[:, :3], theirs[:, :3])
    assert not torch.equal(ours[:, 3:], theirs[:, 3:])


MASK_BS = torch.arange(S) < torch.tensor([[5], [2], [3]])


@of_every_kind
@in_both_modes
def test_padding_changes_nothing_at_real_positions(kind, training):
    """Each sentence alone, without padding, gives the same; and so do the sums and all gradients."""
    model, input_BS = a_model(CONFIGS[kind]).train(training), tokens()
    noise, cotangent = noise_for(model), torch.randn(B, S, WIDTH, dtype=torch.float64)
    padded = model(input_BS, mask_BS=MASK_BS, noise=noise)
    loss = (padded.hidden_BSD * cotangent)[MASK_BS].sum()
    alone_loss, alone_sums = 0.0, {}
    for row, length in enumerate(MASK_BS.sum(dim=1).tolist()):
        own = {name: value[row : row + 1, :length] for name, value in noise.items()}
        alone = model(input_BS[row : row + 1, :length], noise=own)
        assert_close(padded.hidden_BSD[row, :length], alone.hidden_BSD[0])
        alone_loss = alone_loss + (alone.hidden_BSD[0] * cotangent[row, :length]).sum()
        for name, routing in alone.routings.items():
            alone_sums[name] = alone_sums[name] + routing.sums if name in alone_sums else routing.sums
    for name, routing in padded.routings.items():
        assert torch.equal(routing.sums.count_E, alone_sums[name].count_E)
        loss = loss + importance_loss(routing) + load_loss(routing)
        alone_loss = alone_loss + importance_loss(alone_sums[name]) + load_loss(alone_sums[name])
    for ours, theirs in zip(
        gradients(loss, *model.parameters()), gradients(alone_loss, *model.parameters()), strict=True
    ):
        assert_close(ours, theirs)


def test_what_stands_in_the_padding_has_no_influence():
    model, input_BS = a_model(CONFIGS["mixture"]).eval(), tokens()
    other_BS = input_BS.where(MASK_BS, (input_BS + 1) % VOCAB_SIZE)
    ours, theirs = (model(i, mask_BS=MASK_BS) for i in (other_BS, input_BS))
    assert_close(ours.hidden_BSD[MASK_BS], theirs.hidden_BSD[MASK_BS])
    assert torch.equal(ours.routings["moe"].sums.count_E, theirs.routings["moe"].sums.count_E)
    assert ours.routings["moe"].sums.num_tokens == MASK_BS.sum()


def test_the_mixture_over_all_time_steps_equals_step_by_step():
    model = a_model(CONFIGS["mixture"])
    layer, x_BSD = model.layers["moe"], torch.randn(B, S, WIDTH, dtype=torch.float64)
    noise = noise_for(model)["moe"]
    whole = layer(x_BSD, None, MASK_BS, noise)
    steps = [
        layer(*(v[:, s : s + 1] if v is not None else v for v in (x_BSD, None, MASK_BS, noise)))
        for s in range(S)
    ]
    assert_close(torch.cat([out.y_BSD for out in steps], dim=1), whole.y_BSD)
    total = sum((out.routing.sums for out in steps[1:]), start=steps[0].routing.sums)
    assert_close(total.load_E, whole.routing.sums.load_E)
    assert_close(load_loss(total), load_loss(whole.routing))


def test_noise_is_the_gates_by_the_name_of_their_layer():
    model, input_BS = a_model(CONFIGS["mixture"]), tokens()
    noise = noise_for(model)
    assert {name: value.shape for name, value in noise.items()} == {"moe": (B, S, 5)}
    given = model(input_BS, noise=noise)
    assert torch.equal(given.hidden_BSD, model(input_BS, noise=noise).hidden_BSD)
    assert not torch.equal(given.hidden_BSD, model(input_BS).hidden_BSD)
    model.eval()
    assert torch.equal(model(input_BS, noise=noise).hidden_BSD, model(input_BS).hidden_BSD)


def test_noise_under_a_name_that_no_layer_has_is_refused():
    for kind, name, names in (("mixture", "mo", "moe"), ("recurrent", "lstm1", "none, in this model")):
        model = a_model(CONFIGS[kind])
        with pytest.raises(
            ValueError, match=rf"^noise: no layer {name} takes any; those that do are {names}$"
        ):
            model(tokens(), noise={**noise_for(model), name: torch.randn(B, S, 5, dtype=torch.float64)})


@of_every_kind
def test_only_sparse_layers_have_a_routing(kind):
    out = a_model(CONFIGS[kind])(tokens())
    assert set(out.routings) == ({"moe"} if kind == "mixture" else set())


@of_every_kind
def test_every_parameter_learns_from_the_task_and_the_balance_losses(kind):
    model, input_BS = a_model(CONFIGS[kind]), tokens()
    out = model(input_BS)
    loss = model.softmax.nll(out.hidden_BSD, tokens()).sum()
    for routing in out.routings.values():
        loss = loss + importance_loss(routing) + load_loss(routing)
    for (name, _), gradient in zip(
        model.named_parameters(), gradients(loss, *model.parameters()), strict=True
    ):
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@of_every_kind
def test_bfloat16_and_autocast_come_close_to_float32(kind):
    model, input_BS = build(CONFIGS[kind]).eval(), tokens()
    expected = model(input_BS).hidden_BSD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model(input_BS).hidden_BSD, expected, dtype=torch.bfloat16, scale=2)
    half = build(CONFIGS[kind], dtype=torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    out = half(input_BS)
    assert out.hidden_BSD.dtype == torch.bfloat16
    assert half.softmax.nll(out.hidden_BSD, tokens()).dtype == torch.float32
