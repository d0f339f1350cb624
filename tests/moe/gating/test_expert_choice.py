"""Expert choice against a loop over experts."""

import pytest
import torch

from sparsegate import ExpertChoice
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, dense, gradients
from tests.helpers.tolerances import assert_close


def a_gate(**options) -> ExpertChoice:
    gate = ExpertChoice(width=WIDTH, num_experts=NUM_EXPERTS, k=2, dtype=torch.float64, **options)
    torch.nn.init.normal_(gate.w_gate)
    return gate


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_each_expert_takes_its_best_tokens_with_their_probabilities_as_weights(training):
    gate = a_gate().train(training)
    x_TD = torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True)
    probability_TE = (x_TD @ gate.w_gate).softmax(dim=1)
    columns = []
    for probability_T in probability_TE.T:
        best = sorted(range(9), key=lambda t: -probability_T[t].item())[:3]
        is_best_T = torch.tensor([t in best for t in range(9)])
        columns.append(torch.where(is_best_T, probability_T, 0.0))
    expected_TE = torch.stack(columns, dim=1)
    routing = gate(x_TD)
    assert routing.sums.count_E.tolist() == [3] * NUM_EXPERTS
    assert routing.sums.num_unrouted == (expected_TE.sum(dim=1) == 0).sum()
    assert_close(dense(routing), expected_TE)
    cotangent_TE = torch.randn_like(expected_TE)
    for ours, theirs in zip(
        gradients((dense(routing) * cotangent_TE).sum(), x_TD, gate.w_gate),
        gradients((expected_TE * cotangent_TE).sum(), x_TD, gate.w_gate),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_with_scope_sequences_are_routed_apart():
    gate, x_BSD = a_gate(scope=5), torch.randn(3, 5, WIDTH, dtype=torch.float64)
    together = dense(gate(x_BSD.flatten(0, 1)))
    assert_close(together, torch.cat([dense(gate(x_SD)) for x_SD in x_BSD]))


def test_a_later_token_can_take_an_earlier_ones_expert():
    """The leak that the docstring warns of."""
    gate, x_TD = a_gate(), torch.randn(6, WIDTH, dtype=torch.float64)
    before_TE = dense(gate(x_TD))
    x_TD[5] = 10 * x_TD[0]
    assert ((dense(gate(x_TD))[:5] > 0) != (before_TE[:5] > 0)).any()
    assert gate.eval().selects_over_batch


def test_noise_is_refused():
    with pytest.raises(ValueError, match="noise: expert choice uses none; pass None"):
        a_gate()(torch.randn(3, WIDTH).double(), None, torch.randn(3, NUM_EXPERTS))
