"""The laws hold for two layers that share no code, and each of them fails for a fault that breaks it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from sparsegate import FeedForward, Implementation, MoE
from sparsegate.evaluation.conformance.own import noisy_topk
from sparsegate.evaluation.conformance.suite import LAWS, conform, try_law
from tests.helpers.conformance_faults import FAULTS
from tests.helpers.conformance_plain import plain
from tests.helpers.moe_cases import GATES

BY_NAME = {law.name: law for law in LAWS}
BLACK_BOX = [law for law in LAWS if not law.needs]
AT_RANDOM = ["start-is-balanced", "noise-chooses-as-often-as-stated", "probability-is-the-share-of-redraws"]
AT_RANDOM += ["probabilities-sum-to-k", "load-is-unbiased"]


@pytest.mark.parametrize("factory", [noisy_topk, plain])
def test_a_layer_of_the_paper_passes_every_law_and_skips_none(factory):
    assert [(o.law.name, o.told) for o in conform(factory) if o.result != "passed"] == []


@pytest.mark.parametrize(
    ("sizes", "skipped"),
    [
        ({"num_experts": 2, "k": 1}, {"with k = 1 the"}),
        ({"num_experts": 4, "k": 4}, {"with k = num_experts every expert"}),
        ({"num_experts": 1, "k": 1}, {"with k = 1 the", "with k = num_experts every expert"}),
        ({"num_experts": 32, "k": 4, "width": 64, "noise_epsilon": 0.01}, set()),
        ({"width": 1, "num_experts": 3}, set()),
    ],
)
def test_a_layer_of_another_size_breaks_no_law(sizes, skipped):
    outcomes = list(conform(lambda: noisy_topk(**sizes)))
    assert [(o.law.name, o.told) for o in outcomes if o.result == "failed"] == []
    reasons = {o.told for o in outcomes if o.result == "skipped"}
    assert {start for start in skipped if any(r.startswith(start) for r in reasons)} == skipped
    assert all(reason.startswith(tuple(skipped)) for reason in reasons)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_its_laws_and_no_others(name):
    outcomes = list(conform(lambda: plain(**FAULTS[name].parts)))
    assert {o.law.name for o in outcomes if o.result == "failed"} == FAULTS[name].fails
    assert all(o.told for o in outcomes if o.result == "failed")


COMPANY, ORDER = "token-does-not-see-its-company", "order-of-tokens-does-not-matter"
# What these gates give up on purpose.
GIVEN_UP = {
    "expert_choice": {COMPANY},
    "lightest_dropped": {COMPANY},
    "last_dropped": {COMPANY, ORDER},
}


@pytest.mark.parametrize("name", GATES)
def test_every_gate_passes_the_laws_of_black_boxes_but_for_those_that_it_gives_up(name):
    def make():
        gate = GATES[name](width=8, num_experts=6)
        moe = MoE(gate=gate, experts=FeedForward(width=8, hidden=12, num_experts=6))
        return Implementation(module=moe, width=8)

    outcomes = list(conform(make, BLACK_BOX))
    broken = {o.law.name: o.told for o in outcomes if o.result != "passed"}
    assert broken.keys() == GIVEN_UP.get(name, set()), broken


def test_every_law_fails_for_some_fault():
    assert set().union(*(fault.fails for fault in FAULTS.values())) == set(BY_NAME)


@pytest.mark.parametrize("name", AT_RANDOM)
def test_laws_that_draw_hold_for_any_seed(name):
    for factory in (noisy_topk, plain):
        outcomes = [try_law(BY_NAME[name], factory, seed=seed) for seed in range(1, 9)]
        assert [o.told for o in outcomes if o.result != "passed"] == []


def test_a_law_is_named_once_and_needs_fields_that_exist():
    assert len(BY_NAME) == len(LAWS)
    fields = {field.name for field in dataclasses.fields(Implementation)}
    assert all(set(law.needs) <= fields for law in LAWS)


def test_trying_a_law_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(conform(plain, LAWS[:3]))
    assert torch.equal(torch.get_rng_state(), before)


class Narrow(torch.nn.Module):
    """A layer that computes in float32, or answers in it, or refuses anything else."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        if self.kind == "refuses" and x.dtype == torch.float64:
            raise TypeError("no float64")
        y = torch.nn.functional.linear(x.float(), self.linear.weight.float())
        return y if self.kind == "answers" else y.to(x.dtype)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("refuses", "it refuses float64: TypeError: no float64"),
        ("answers", "it answers float64 with float32"),
        ("rounds", "part of it computes in less than float64: its output jumps by "),
    ],
)
def test_without_float64_derivatives_are_skipped_and_other_laws_tried_in_float32(kind, reason):
    outcomes = conform(lambda: Implementation(module=Narrow(kind), width=4), BLACK_BOX)
    found = {outcome.law.name: outcome for outcome in outcomes}
    for name in ("gradient-of-input-is-the-derivative", "gradient-of-weights-is-the-derivative"):
        assert found[name].result == "skipped"
        assert found[name].reason.startswith(reason)
    assert found["token-does-not-see-its-company"].result == "passed"
    assert found["order-of-tokens-does-not-matter"].result == "passed"


def test_where_every_expert_is_chosen_there_is_no_smooth_load_to_try():
    everything = dataclasses.replace(noisy_topk(), k=6)
    outcome = try_law(BY_NAME["load-is-the-sum-of-probabilities"], lambda: everything)
    assert (outcome.result, outcome.numbers) == ("skipped", ())
    assert outcome.reason.startswith("with k = num_experts")


def test_the_table_of_the_document_is_the_laws():
    document = (Path(__file__).parents[3] / "docs/conformance.md").read_text()
    for law in LAWS:
        needs = ", ".join(f"`{name}`" for name in law.needs)
        assert f"| `{law.name}` | {law.statement} | {law.source} | {needs} |\n" in document
    assert f"tries {len(LAWS)} laws" in document
    assert f"{len(BLACK_BOX)} laws need no more" in document
    assert f"with one of {len(FAULTS)} faults planted" in document
