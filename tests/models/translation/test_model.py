"""The translation model as a whole: order of the parts, padding, the state of the decoder, noise."""

from dataclasses import replace

import pytest
import torch

from sparsegate.models.translation import build_translation, token_losses
from sparsegate.moe.losses import importance_loss, load_loss, threshold_loss
from tests.helpers import moe_oracle as oracle
from tests.helpers.model_cases import lstm
from tests.helpers.moe_cases import gradients
from tests.helpers.tolerances import assert_close
from tests.helpers.translation_models import (
    BALANCED,
    CONFIGS,
    VOCAB_SIZE,
    WIDTH,
    a_translator,
    noise_for,
    some_pairs,
)

of_every_kind = pytest.mark.parametrize("kind", CONFIGS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def mixture(layer, x, noise, training):
    gate, experts = layer.moe.gate, layer.moe.experts
    x_TD = x.reshape(-1, WIDTH)
    clean_TE, _, noisy_TE = oracle.noisy_logits(x_TD, gate.w_gate, gate.w_noise, noise.reshape(len(x_TD), -1))
    gates_TE = oracle.gates(noisy_TE if training else clean_TE, gate.pairs_per_token)
    y_TD = oracle.mixture(x_TD, gates_TE, oracle.feed_forward(experts.w_in, experts.w_out))
    return torch.sigmoid(y_TD.reshape(x.shape))


def straight_line(model, source_BS, target_BS, noise, drop):
    """Appendix E: three LSTMs, two LSTMs, attention between, a mixture before the last of each; eq. 22."""
    encoder, decoder, drop = model.encoder.layers, model.decoder.layers, iter(drop)
    table = model.embedding["shared"].weight
    x = next(drop) * table[source_BS]
    backwards = lstm(encoder["lstm1"].backwards.lstm, x.flip(1)).flip(1)
    x = x + next(drop) * (lstm(encoder["lstm1"].forwards.lstm, x) + backwards)
    x = x + next(drop) * mixture(encoder["moe"], x, noise["encoder.moe"], model.training)
    memory = x + next(drop) * lstm(encoder["lstm2"].lstm, x)

    y = next(drop) * table[target_BS]
    y = y + next(drop) * lstm(decoder["lstm1"].lstm, y)
    attention = model.decoder.attention
    score_BSU = torch.einsum(
        "bsa,a,bua->bsu",
        torch.tanh(y @ attention.w_query),
        attention.w_score,
        torch.tanh(memory @ attention.w_source),
    )
    weight_BSU = score_BSU.softmax(-1)
    context = weight_BSU @ memory
    y = y + context
    y = y + next(drop) * mixture(decoder["moe"], y, noise["decoder.moe"], model.training)
    return y + next(drop) * lstm(decoder["lstm2"].lstm, torch.cat([y, context], -1)), weight_BSU


@in_both_modes
def test_the_model_is_its_straight_line_formula(training):
    model = a_translator(replace(CONFIGS["mixtures"], dropout=0.4)).train(training)
    pairs, drop = some_pairs(source_lengths=(4, 4, 4), target_lengths=(3, 3, 3)), []
    noise = noise_for(model, pairs)
    for dropout in (model.dropout, model.encoder.dropout, model.decoder.dropout):
        dropout.register_forward_hook(lambda _, before, after: drop.append((after / before[0]).detach()))
    output = model(**pairs.inputs(), noise=noise)
    assert len(drop) == 8
    for factor in drop:
        assert_close(factor, (factor > 0).double() / 0.6 if training else torch.ones_like(factor))
        assert bool((factor == 0).any()) == training
    theirs, their_attention = straight_line(model, pairs.source_BS, pairs.target_BS, noise, drop)
    assert_close(output.hidden_BSD, theirs)
    assert_close(output.attention_BSU, their_attention)
    cotangent = torch.randn_like(theirs)
    of = tuple(p for name, p in model.named_parameters() if not name.startswith("softmax"))
    for our_gradient, their_gradient in zip(
        gradients((output.hidden_BSD * cotangent).sum(), *of),
        gradients((theirs * cotangent).sum(), *of),
        strict=True,
    ):
        assert_close(our_gradient, their_gradient)


def test_input_feeding_reads_the_context_of_the_step_before():
    model = a_translator(CONFIGS["feeding"]).eval()
    pairs = some_pairs(source_lengths=(4, 4), target_lengths=(5, 5))
    decoder = model.decoder.layers
    memory, _ = model.encode(pairs.source_BS, pairs.source_mask_BS)
    embedded = model.embedding["shared"].weight[pairs.target_BS]
    outputs, read, context = [], [], torch.zeros(2, 1, WIDTH, dtype=torch.float64)
    for step in embedded.split(1, dim=1):
        read.append(torch.cat([step, context], dim=-1))
        y = step + lstm(decoder["lstm1"].lstm, torch.cat(read, dim=1))[:, -1:]
        context, _ = model.decoder.attention(y, memory)
        outputs.append(y + context)
    y = torch.cat(outputs, dim=1)
    y = y + decoder["moe"](y, None, None, None).y_BSD
    y = y + lstm(decoder["lstm2"].lstm, y)
    assert_close(model(**pairs.inputs()).hidden_BSD, y)


@of_every_kind
@in_both_modes
def test_padding_changes_nothing_at_real_positions(kind, training):
    """Each pair alone, without padding, gives the same; and so do the sums and all gradients."""
    model, pairs = a_translator(CONFIGS[kind]).train(training), some_pairs()
    noise = noise_for(model, pairs)
    padded = model(**pairs.inputs(), noise=noise)
    losses = token_losses(model.softmax, padded.hidden_BSD, pairs.label_BS, pairs.target_mask_BS)
    loss, alone_loss, alone_sums = losses.loss_BS.sum(), 0.0, {}
    for row in range(len(pairs.source_BS)):
        alone = pairs.alone(row)
        steps = {"encoder": alone.source_BS.shape[1], "decoder": alone.target_BS.shape[1]}
        own = {n: v[row : row + 1, : steps[n.partition(".")[0]]] for n, v in noise.items()}
        out = model(**alone.inputs(), noise=own)
        assert_close(padded.hidden_BSD[row, : steps["decoder"]], out.hidden_BSD[0])
        assert_close(padded.attention_BSU[row, : steps["decoder"], : steps["encoder"]], out.attention_BSU[0])
        assert not padded.attention_BSU[row, :, steps["encoder"] :].any()
        nll = token_losses(model.softmax, out.hidden_BSD, alone.label_BS, alone.target_mask_BS).nll_BS
        assert_close(losses.nll_BS[row, : steps["decoder"]], nll[0])
        alone_loss = alone_loss + nll.sum()
        for name, routing in out.routings.items():
            alone_sums[name] = alone_sums[name] + routing.sums if name in alone_sums else routing.sums
    assert padded.routings.keys() == alone_sums.keys()
    for name, routing in padded.routings.items():
        assert torch.equal(routing.sums.count_E, alone_sums[name].count_E)
        assert routing.sums.num_tokens == alone_sums[name].num_tokens
        loss = loss + importance_loss(routing) + load_loss(routing)
        alone_loss = alone_loss + importance_loss(alone_sums[name]) + load_loss(alone_sums[name])
    for ours, theirs in zip(
        gradients(loss, *model.parameters()), gradients(alone_loss, *model.parameters()), strict=True
    ):
        assert_close(ours, theirs)


@of_every_kind
def test_what_stands_in_the_padding_has_no_influence(kind):
    model, pairs = a_translator(CONFIGS[kind]).eval(), some_pairs()
    other = replace(
        pairs,
        source_BS=pairs.source_BS.where(pairs.source_mask_BS, 0),
        target_BS=pairs.target_BS.where(pairs.target_mask_BS, 0),
    )
    ours, theirs = model(**other.inputs()), model(**pairs.inputs())
    assert torch.equal(ours.hidden_BSD[pairs.target_mask_BS], theirs.hidden_BSD[pairs.target_mask_BS])


@of_every_kind
def test_mixtures_see_real_tokens_of_their_side_and_no_others(kind):
    model, pairs = a_translator(CONFIGS[kind]), some_pairs()
    tokens = {
        name: int(routing.sums.num_tokens) for name, routing in model(**pairs.inputs()).routings.items()
    }
    both = {"encoder.moe": int(pairs.source_mask_BS.sum()), "decoder.moe": int(pairs.target_mask_BS.sum())}
    with_mixture = {name for name, layer in model.named_layers() if layer.routes}
    assert tokens == {name: number for name, number in both.items() if name in with_mixture}
    if kind == "mixtures":
        assert tokens == both


@of_every_kind
@in_both_modes
def test_a_target_in_pieces_equals_the_whole(kind, training):
    model, pairs = a_translator(CONFIGS[kind]).train(training), some_pairs((4, 2, 0), (5, 5, 5))
    noise = noise_for(model, pairs)
    memory, _ = model.encode(pairs.source_BS, pairs.source_mask_BS, noise=noise)
    whole, state, parts = model.decode(pairs.target_BS, memory, noise=noise), None, []
    for steps in (slice(0, 2), slice(2, 3), slice(3, 5)):
        own = {name: value[:, steps] for name, value in noise.items() if name.startswith("decoder")}
        parts.append(model.decode(pairs.target_BS[:, steps], memory, state=state, noise=own))
        state = parts[-1].state
    assert_close(torch.cat([part.hidden_BSD for part in parts], dim=1), whole.hidden_BSD)
    assert_close(torch.cat([part.attention_BSU for part in parts], dim=1), whole.attention_BSU)


def test_a_state_is_selected_by_row():
    for kind in ("mixtures", "feeding"):
        model, pairs = a_translator(CONFIGS[kind]).eval(), some_pairs((4, 4), (3, 3))
        memory, _ = model.encode(pairs.source_BS, pairs.source_mask_BS)
        state = model.decode(pairs.target_BS, memory).state
        row_R = torch.tensor([1, 1, 0])
        ours = model.decode(pairs.label_BS[row_R], memory.select(row_R), state=state.select(row_R))
        theirs = model.decode(pairs.label_BS, memory, state=state)
        assert_close(ours.hidden_BSD, theirs.hidden_BSD[row_R])


@of_every_kind
def test_of_the_target_the_future_has_no_influence_and_of_the_source_it_has(kind):
    model, pairs = a_translator(CONFIGS[kind]).eval(), some_pairs((4, 4, 4), (5, 5, 5))
    before = model(**pairs.inputs()).hidden_BSD
    later_BS = pairs.target_BS.clone()
    later_BS[:, 3:] = (later_BS[:, 3:] + 1) % VOCAB_SIZE
    after = model(**replace(pairs, target_BS=later_BS).inputs()).hidden_BSD
    assert_close(after[:, :3], before[:, :3])
    assert not torch.equal(after[:, 3:], before[:, 3:])
    source_BS = pairs.source_BS.clone()
    source_BS[:, 3] = (source_BS[:, 3] + 1) % VOCAB_SIZE
    after = model(**replace(pairs, source_BS=source_BS).inputs()).hidden_BSD
    assert (after != before).any(dim=-1).all()


def test_a_bidirectional_encoder_tells_early_tokens_of_late_ones():
    for kind in ("mixtures", "one_way"):
        model, pairs = a_translator(CONFIGS[kind]).eval(), some_pairs((4, 4), (3, 3))
        other_BS = pairs.source_BS.clone()
        other_BS[:, 3] = (other_BS[:, 3] + 1) % VOCAB_SIZE
        ours, theirs = (
            model.encode(s, pairs.source_mask_BS)[0].value_BUD for s in (other_BS, pairs.source_BS)
        )
        assert torch.equal(ours[:, 0], theirs[:, 0]) == (kind == "one_way")


@of_every_kind
def test_every_parameter_learns_from_the_task_and_the_balance_losses(kind):
    model, pairs = a_translator(CONFIGS[kind]), some_pairs()
    out = model(**pairs.inputs())
    loss = token_losses(model.softmax, out.hidden_BSD, pairs.label_BS, pairs.target_mask_BS).loss_BS.sum()
    for routing in out.routings.values():
        loss = loss + importance_loss(routing) + load_loss(routing)
    for (name, _), gradient in zip(
        model.named_parameters(), gradients(loss, *model.parameters()), strict=True
    ):
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


def test_a_balanced_gate_in_evaluation_lets_no_sentence_see_its_neighbours():
    model = a_translator(replace(CONFIGS["mixtures"], encoder_block=BALANCED, decoder_block=BALANCED))
    pairs = some_pairs()
    loss = sum(threshold_loss(routing) for routing in model(**pairs.inputs()).routings.values())
    assert all(
        g.any() for g in gradients(loss, *(p for n, p in model.named_parameters() if "threshold" in n))
    )
    assert model.selects_over_batch() == ["encoder.moe", "decoder.moe"]
    assert model.sees_later_tokens()
    model.eval()
    assert model.selects_over_batch() == []
    assert not model.sees_later_tokens()
    together = model(**pairs.inputs()).hidden_BSD
    for row in range(len(together)):
        alone = pairs.alone(row)
        assert_close(together[row, : alone.target_BS.shape[1]], model(**alone.inputs()).hidden_BSD[0])


def test_noise_is_the_gates_by_the_names_of_their_layers():
    model, pairs = a_translator(CONFIGS["mixtures"]), some_pairs()
    noise = noise_for(model, pairs)
    assert model.noise_widths() == {"encoder.moe": 5, "decoder.moe": 5}
    given = model(**pairs.inputs(), noise=noise).hidden_BSD
    assert torch.equal(given, model(**pairs.inputs(), noise=noise).hidden_BSD)
    for name in noise:
        other = noise | {name: torch.randn_like(noise[name])}
        assert not torch.equal(given, model(**pairs.inputs(), noise=other).hidden_BSD)


def test_noise_under_a_name_that_no_layer_has_is_refused():
    model, pairs = a_translator(CONFIGS["mixtures"]), some_pairs()
    noise = noise_for(model, pairs)
    message = r"^noise: no layer (moe|encoder.lstm1) takes any; those that do are encoder.moe, decoder.moe$"
    for name in ("moe", "encoder.lstm1"):
        with pytest.raises(ValueError, match=message):
            model(**pairs.inputs(), noise={**noise, name: noise["encoder.moe"]})
        with pytest.raises(ValueError, match=message):
            model.encode(pairs.source_BS, pairs.source_mask_BS, noise={name: noise["encoder.moe"]})
        memory, _ = model.encode(pairs.source_BS, pairs.source_mask_BS)
        with pytest.raises(ValueError, match=message):
            model.decode(pairs.target_BS, memory, noise={name: noise["decoder.moe"]})


def test_a_step_reaches_the_gates():
    model, pairs = a_translator(CONFIGS["mixtures"]), some_pairs()
    told = []
    for name in ("encoder.moe", "decoder.moe"):
        gate = model.get_submodule(name.replace("moe", "layers.moe.moe.gate"))
        gate.after_step = lambda sums, name=name: told.append((name, sums))
    sums = {name: routing.sums for name, routing in model(**pairs.inputs()).routings.items()}
    model.after_step(sums)
    assert told == [("encoder.moe", sums["encoder.moe"]), ("decoder.moe", sums["decoder.moe"])]


def test_a_source_without_a_column_is_refused():
    model = a_translator(CONFIGS["mixtures"])
    with pytest.raises(ValueError, match="source_BS has no columns; pad empty sources to one masked token"):
        model.encode(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.bool))


@pytest.mark.parametrize("num_targets", [1, 3, 4])
def test_sources_and_targets_that_do_not_pair_up_are_refused(num_targets):
    """Twice as many targets, too, which are what a beam of two would have."""
    model, sources = a_translator(CONFIGS["mixtures"]), some_pairs((4, 4), (4, 4))
    targets = some_pairs((4,) * num_targets, (4,) * num_targets)
    mixed = replace(sources, target_BS=targets.target_BS, target_mask_BS=targets.target_mask_BS)
    message = rf"^source_BS \(2 rows\) and target_BS \({num_targets}\) must pair up$"
    with pytest.raises(ValueError, match=message):
        model(**mixed.inputs())


@of_every_kind
def test_bfloat16_and_autocast_come_close_to_float32(kind):
    model, pairs = build_translation(CONFIGS[kind]).eval(), some_pairs()
    expected = model(**pairs.inputs()).hidden_BSD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model(**pairs.inputs()).hidden_BSD, expected, dtype=torch.bfloat16, scale=2)
    half = build_translation(CONFIGS[kind], dtype=torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    assert half(**pairs.inputs()).hidden_BSD.dtype == torch.bfloat16
