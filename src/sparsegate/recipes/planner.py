"""What a model costs, told before it is built: parameters and multiply-adds, from the meta device."""

from dataclasses import dataclass

from ..models import LanguageModelConfig, build


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a language model; the first rows of what a planner needs.

    parameters: all of them. parameters_without_embedding_and_softmax: the column of tables 7 and 8.
    ops_per_timestep: multiply-adds per token in the forward pass without the softmax: the paper's metric.
    ops_per_timestep_with_softmax: with it.
    """

    parameters: int
    parameters_without_embedding_and_softmax: int
    ops_per_timestep: int
    ops_per_timestep_with_softmax: int


def plan(config: LanguageModelConfig) -> Plan:
    """Count a model's parameters and operations without allocating its weights."""
    model = build(config, device="meta")
    ops = model.ops_per_token()
    return Plan(
        parameters=sum(p.numel() for p in model.parameters()),
        parameters_without_embedding_and_softmax=sum(p.numel() for p in model.layers.parameters()),
        ops_per_timestep=ops,
        ops_per_timestep_with_softmax=ops + model.softmax.ops_per_token(),
    )
