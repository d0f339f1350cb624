"""What a config says is what is built: parameters, multiply-adds, names, devices."""

from dataclasses import replace

import pytest
import torch

from sparsegate import Balanced, Hierarchical, NoisyTopK
from sparsegate.models.translation import DenseBlock, build_translation
from sparsegate.models.translation.attention import AdditiveAttention, ProductAttention
from tests.helpers.translation_models import BALANCED, CONFIGS, HIDDEN, MIXTURES, VOCAB_SIZE, WIDTH

of_every_kind = pytest.mark.parametrize("kind", CONFIGS)

LSTM = 4 * (WIDTH + WIDTH) * WIDTH
CONTEXT = 4 * WIDTH * WIDTH
EXPERTS = 2 * 2 * WIDTH * 4
GATE = 2 * WIDTH * 5
TABLE = VOCAB_SIZE * WIDTH


def num_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_operations_are_those_of_five_lstms_one_context_two_blocks_and_the_softmax():
    for kind in ("mixtures", "one_way", "feeding", "additive"):
        model = build_translation(CONFIGS[kind], device="meta")
        assert model.ops_per_token() == 5 * LSTM + CONTEXT + 2 * EXPERTS + TABLE
        assert model.gate_and_attention_ops_per_token() == 2 * GATE + 2 * WIDTH * HIDDEN


def test_a_dense_block_of_k_times_the_hidden_width_costs_what_a_mixture_costs():
    dense = replace(MIXTURES, encoder_block=DenseBlock(hidden=8), decoder_block=DenseBlock(hidden=8))
    ours, theirs = (build_translation(config, device="meta") for config in (dense, MIXTURES))
    assert ours.ops_per_token() == theirs.ops_per_token()


def test_parameters_are_those_of_the_layers_the_attention_and_the_tables():
    model = build_translation(MIXTURES, device="meta")
    layers = 5 * LSTM + CONTEXT + 2 * (5 * EXPERTS // 2 + GATE)
    assert num_parameters(model) == layers + 2 * WIDTH * HIDDEN + HIDDEN + 2 * TABLE + VOCAB_SIZE
    two_tables = build_translation(replace(MIXTURES, share_embedding=False), device="meta")
    assert num_parameters(two_tables) == num_parameters(model) + TABLE


@of_every_kind
def test_nothing_is_allocated_on_the_meta_device_and_dtypes_are_as_asked(kind):
    assert {p.device.type for p in build_translation(CONFIGS[kind], device="meta").parameters()} == {"meta"}
    half = build_translation(CONFIGS[kind], dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@of_every_kind
def test_the_same_seed_builds_the_same_model(kind):
    torch.manual_seed(1)
    first = build_translation(CONFIGS[kind]).state_dict()
    torch.manual_seed(1)
    second = build_translation(CONFIGS[kind]).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_names_in_a_checkpoint_are_those_of_the_layers():
    assert list(build_translation(MIXTURES).state_dict()) == [
        "embedding.shared.weight",
        "encoder.layers.lstm1.forwards.lstm.weight_ih_l0",
        "encoder.layers.lstm1.forwards.lstm.weight_hh_l0",
        "encoder.layers.lstm1.backwards.lstm.weight_ih_l0",
        "encoder.layers.lstm1.backwards.lstm.weight_hh_l0",
        "encoder.layers.moe.moe.gate.w_gate",
        "encoder.layers.moe.moe.gate.w_noise",
        "encoder.layers.moe.moe.experts.w_in",
        "encoder.layers.moe.moe.experts.w_out",
        "encoder.layers.lstm2.lstm.weight_ih_l0",
        "encoder.layers.lstm2.lstm.weight_hh_l0",
        "decoder.layers.lstm1.lstm.weight_ih_l0",
        "decoder.layers.lstm1.lstm.weight_hh_l0",
        "decoder.layers.moe.moe.gate.w_gate",
        "decoder.layers.moe.moe.gate.w_noise",
        "decoder.layers.moe.moe.experts.w_in",
        "decoder.layers.moe.moe.experts.w_out",
        "decoder.layers.lstm2.lstm.weight_ih_l0",
        "decoder.layers.lstm2.lstm.weight_hh_l0",
        "decoder.attention.w_source",
        "decoder.attention.w_query",
        "decoder.attention.w_score",
        "softmax.weight",
        "softmax.bias",
    ]


def test_the_block_stands_before_the_last_lstm_of_each_side():
    def layers(kind):
        model = build_translation(CONFIGS[kind], device="meta")
        return list(model.encoder.layers), list(model.decoder.layers)

    assert layers("mixtures") == (["lstm1", "moe", "lstm2"], ["lstm1", "moe", "lstm2"])
    assert layers("one_way") == (["lstm1", "lstm2", "moe", "lstm3"], ["lstm1", "moe", "lstm2"])
    assert layers("dense") == (["lstm1", "dense", "lstm2"], ["lstm1", "dense", "lstm2"])
    assert layers("recurrent") == (["lstm1", "lstm2"], ["lstm1", "lstm2"])
    assert layers("projected") == (
        ["lstm1", "lstm2", "lstm3", "lstm4"],
        ["lstm1", "lstm2", "lstm3", "moe", "lstm4"],
    )


def test_lstms_above_the_first_read_the_context_or_with_input_feeding_the_first_alone():
    def inputs(kind):
        decoder = build_translation(CONFIGS[kind], device="meta").decoder.layers
        return [layer.lstm.input_size // WIDTH for name, layer in decoder.items() if name.startswith("lstm")]

    assert inputs("projected") == [1, 2, 2, 2]
    assert inputs("feeding") == [2, 1]


def test_what_the_config_says_reaches_the_parts():
    config = replace(MIXTURES, dropout=0.3, encoder_block=BALANCED, softmax_samples=4)
    model = build_translation(config)
    assert (model.dropout.p, model.encoder.dropout.p, model.decoder.dropout.p) == (0.3, 0.3, 0.3)
    assert type(model.encoder.layers["moe"].moe.gate) is Balanced
    assert type(model.decoder.layers["moe"].moe.gate) is NoisyTopK
    assert type(model.decoder.attention) is ProductAttention
    assert type(build_translation(CONFIGS["additive"]).decoder.attention) is AdditiveAttention
    assert type(build_translation(CONFIGS["hierarchies"]).encoder.layers["moe"].moe.gate) is Hierarchical
    assert model.softmax.num_samples == 4
    assert list(build_translation(CONFIGS["additive"]).embedding) == ["source", "target"]
    assert build_translation(CONFIGS["projected"]).decoder.layers["lstm2"].lstm.proj_size == WIDTH


def test_experts_are_known_for_an_optimizer_of_their_own():
    model = build_translation(MIXTURES)
    assert sum(p.numel() for p in model.expert_parameters()) == 5 * EXPERTS
    assert model.has_mixtures()
    assert not build_translation(CONFIGS["dense"]).has_mixtures()
