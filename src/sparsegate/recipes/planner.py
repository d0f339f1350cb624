"""What a model costs, told before it is built: parameters and multiply-adds, from the meta device."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import overload

from torch import nn

from ..models import LanguageModelConfig, MixtureLM, build
from ..models.translation import Translation, build_translation


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a language model.

    parameters: all of them. parameters_without_embedding_and_softmax: the column of tables 7 and 8.
    active_parameters: all but those of the experts that a token does not choose.
    ops_per_timestep: multiply-adds per token in the forward pass without the softmax: the paper's metric.
    ops_per_timestep_with_softmax: with it, over all words, as it is evaluated.
    """

    parameters: int = field(metadata={"doc": "parameters"})
    parameters_without_embedding_and_softmax: int = field(metadata={"doc": "  without embedding and softmax"})
    active_parameters: int = field(metadata={"doc": "  active for a token"})
    ops_per_timestep: int = field(metadata={"doc": "multiply-adds per timestep, softmax excluded"})
    ops_per_timestep_with_softmax: int = field(metadata={"doc": "  with softmax, of all words"})


@dataclass(frozen=True, kw_only=True)
class TranslationPlan:
    """Sizes of a translation model.

    ops_per_timestep: multiply-adds for a source and a target token in the forward pass: LSTMs, experts and
    softmax. This count gives the 85 and 102 million of tables 2 to 5, whose language models count gates, but
    no softmax. ops_per_timestep_with_gates_and_attention: with these, but for attention's products for each
    pair of tokens, which depend on the lengths.
    """

    parameters: int = field(metadata={"doc": "parameters"})
    parameters_without_embedding_and_softmax: int = field(metadata={"doc": "  without embedding and softmax"})
    ops_per_timestep: int = field(
        metadata={"doc": "multiply-adds per timestep, softmax included, gates and attention excluded"}
    )
    ops_per_timestep_with_gates_and_attention: int = field(metadata={"doc": "  with gates and attention"})


@overload
def plan(config: LanguageModelConfig) -> Plan: ...
@overload
def plan(config: Translation) -> TranslationPlan: ...
def plan(config: LanguageModelConfig | Translation) -> Plan | TranslationPlan:
    """Count a model's parameters and operations without allocating its weights."""
    match config:
        case Translation():
            return _translation(config)
        case _:
            return _language_model(config)


def multiply_adds_per_number(config: LanguageModelConfig) -> float:
    """Multiply-adds of an expert for each number that goes in or comes out (section 3.2); 0 without experts.

    "The ratio of computation to input and output is equal to the size of the hidden layer"; of SwiGLU's three
    products it is one and a half times that.
    """
    if not isinstance(config, MixtureLM):
        return 0.0
    weights = _count(build(config, device="meta").expert_parameters()) // config.num_experts
    return weights / (2 * config.width)


def _language_model(config: LanguageModelConfig) -> Plan:
    model = build(config, device="meta")
    ops, parameters = model.ops_per_token(), _count(model.parameters())
    expert_parameters = _count(model.expert_parameters())
    unchosen = 0
    if isinstance(config, MixtureLM):
        unchosen = expert_parameters // config.num_experts * (config.num_experts - config.k)
    return Plan(
        parameters=parameters,
        parameters_without_embedding_and_softmax=_count(model.layers.parameters()),
        active_parameters=parameters - unchosen,
        ops_per_timestep=ops,
        ops_per_timestep_with_softmax=ops + model.softmax.ops_per_token(),
    )


def _translation(config: Translation) -> TranslationPlan:
    model = build_translation(config, device="meta")
    ops = model.ops_per_token()
    return TranslationPlan(
        parameters=_count(model.parameters()),
        parameters_without_embedding_and_softmax=_count(model.encoder.parameters())
        + _count(model.decoder.parameters()),
        ops_per_timestep=ops,
        ops_per_timestep_with_gates_and_attention=ops + model.gate_and_attention_ops_per_token(),
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
