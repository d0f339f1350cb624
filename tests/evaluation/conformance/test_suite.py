"""What comes of a law: passed, failed with numbers, skipped with what is missing."""

import pytest
import torch

from sparsegate import Implementation
from sparsegate.evaluation.conformance.law import Law, NotApplicable, Number
from sparsegate.evaluation.conformance.suite import LAWS, conform, try_law


def a_law(check, needs=()):
    return Law(name="a-law", statement="A law.", source="eq. 0", needs=needs, check=check)


def bare(**fields):
    return Implementation(module=torch.nn.Linear(3, 3), width=3, **fields)


def test_numbers_that_hold_pass_and_one_that_does_not_fails():
    near = Number(what="near", measured=1.01, expected=1, tolerance=0.1)
    far = Number(what="far", measured=2, expected=1, tolerance=0.1)
    assert try_law(a_law(lambda make: [near]), bare).result == "passed"
    outcome = try_law(a_law(lambda make: [near, far]), bare)
    assert outcome.result == "failed"
    assert outcome.told == "far: 2, expected 1 within 0.1"


@pytest.mark.parametrize("measured", [float("nan"), float("inf")])
def test_what_is_not_finite_never_holds(measured):
    assert not Number(what="x", measured=measured, expected=measured, tolerance=1).holds


def test_what_an_implementation_raises_fails_the_law_in_one_line():
    def check(make):
        raise RuntimeError("two\nlines")

    outcome = try_law(a_law(check), bare)
    assert (outcome.result, outcome.told) == ("failed", "RuntimeError: two lines")


def test_a_factory_that_raises_later_fails_the_law():
    def factory():
        raise OSError("gone")

    assert try_law(LAWS[0], factory).told == "OSError: gone"


def test_a_law_that_does_not_apply_is_skipped_with_its_reason():
    def check(make):
        raise NotApplicable("not this one")

    outcome = try_law(a_law(check), bare)
    assert (outcome.result, outcome.told) == ("skipped", "not this one")


def test_a_law_that_needs_more_than_is_exposed_is_skipped_and_says_what_is_missing():
    law = a_law(lambda make: [], needs=("gates", "takes_mask", "k"))
    assert try_law(law, lambda: bare(k=1)).told == "not exposed: gates, takes_mask"


def test_a_black_box_is_tried_by_the_laws_that_need_nothing():
    outcomes = list(conform(bare))
    assert {o.law.name for o in outcomes if o.result == "passed"} == {
        law.name for law in LAWS if not law.needs
    }
    assert all(o.told.startswith("not exposed: ") for o in outcomes if o.result != "passed")


class Returns(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize("make", [lambda x: 2 * x, lambda x: (2 * x, "more")])
def test_a_module_may_return_a_tensor_or_a_tuple_that_begins_with_one(make):
    x_TD = torch.randn(5, 3)
    assert torch.equal(Implementation(module=Returns(make), width=3).output(x_TD), 2 * x_TD)


def test_an_output_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"shape \[1, 15\] must be that of the input, \[1, 5, 3\]"):
        Implementation(module=Returns(lambda x: x.flatten(1)), width=3).output(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width (0) must be at least 1"),
        ({"width": 3, "k": 0}, "k (0) must be at least 1"),
        ({"width": 3, "num_experts": 2, "k": 3}, "k (3) must not exceed num_experts (2)"),
        ({"width": 3, "takes_noise": True}, "takes_noise: the noise is [T, num_experts]; give num_experts"),
        ({"width": 3, "takes_mask": True}, "only `forward` can be given them; give forward"),
        ({"width": 3, "swap": print}, "they name experts by index; give num_experts"),
    ],
)
def test_an_implementation_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Implementation(module=torch.nn.Identity(), **fields)
    assert message in str(refused.value)
