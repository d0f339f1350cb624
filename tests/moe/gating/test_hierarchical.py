"""Equations 12 to 14 as they read, loops over tokens and groups, against the grouped computation."""

import pytest
import torch
from torch import Tensor

from sparsegate import (
    Balanced,
    BalancedGroups,
    Capacity,
    FeedForward,
    Hierarchical,
    MoE,
    NoisyTopKGroups,
    SigmoidTopK,
    importance_loss,
    load_loss,
    threshold_loss,
)
from sparsegate.moe.gating.noisy_topk import NoisyTopK
from tests.helpers import moe_oracle as oracle
from tests.helpers.moe_cases import dense, gradients
from tests.helpers.tolerances import assert_close

WIDTH, NUM_GROUPS, GROUP_SIZE, NUM_TOKENS = 5, 4, 3, 11


def a_hierarchy(*, k_primary: int = 2, k_secondary: int = 2) -> Hierarchical:
    gate = Hierarchical.noisy_topk(
        width=WIDTH,
        num_experts=NUM_GROUPS * GROUP_SIZE,
        num_groups=NUM_GROUPS,
        k_primary=k_primary,
        k_secondary=k_secondary,
        dtype=torch.float64,
    )
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return gate


def tokens_and_noise(gate: Hierarchical) -> tuple[Tensor, Tensor]:
    x_TD = torch.randn(NUM_TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    return x_TD, torch.randn(NUM_TOKENS, gate.noise_width, dtype=torch.float64)


def as_they_read(gate: Hierarchical, x_TD: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G(x)_ij [T, E], Importance_H [E] and Load_H [E], in training."""
    primary, secondary = gate.primary, gate.secondary
    k_primary, k_secondary = primary.pairs_per_token, secondary.pairs_per_row
    clean_TA, std_TA, noisy_TA = oracle.noisy_logits(
        x_TD, primary.w_gate, primary.w_noise, noise[:, :NUM_GROUPS]
    )
    groups_TA = oracle.gates(noisy_TA, k_primary)
    if k_primary < NUM_GROUPS:
        load_A = oracle.probability_in_topk(clean_TA, std_TA, noisy_TA, k_primary).sum(dim=0)
    else:
        load_A = torch.full((NUM_GROUPS,), float(NUM_TOKENS), dtype=torch.float64)
    gates_TE = x_TD.new_zeros(NUM_TOKENS, NUM_GROUPS * GROUP_SIZE)
    loads = []
    for group in range(NUM_GROUPS):
        load_B, reached = x_TD.new_zeros(GROUP_SIZE), 0
        for token in range(NUM_TOKENS):
            chosen = oracle.keep_topk(noisy_TA[token], k_primary)
            if group not in chosen:
                continue
            reached += 1
            first = NUM_GROUPS + chosen.index(group) * GROUP_SIZE
            clean_1B, std_1B, noisy_1B = oracle.noisy_logits(
                x_TD[token : token + 1],
                secondary.w_gate[group],
                secondary.w_noise[group],
                noise[token : token + 1, first : first + GROUP_SIZE],
            )
            within_1B = oracle.gates(noisy_1B, k_secondary)
            place_TE = torch.zeros_like(gates_TE)
            place_TE[token, group * GROUP_SIZE : (group + 1) * GROUP_SIZE] = 1
            gates_TE = gates_TE + place_TE * (groups_TA[token, group] * within_1B).repeat(1, NUM_GROUPS)
            if k_secondary < GROUP_SIZE:
                load_B = load_B + oracle.probability_in_topk(clean_1B, std_1B, noisy_1B, k_secondary)[0]
            else:
                load_B = load_B + 1
        loads.append(load_A[group] * load_B / max(reached, 1))
    return gates_TE, gates_TE.sum(dim=0), torch.cat(loads)


@pytest.mark.parametrize(("k_primary", "k_secondary"), [(1, 1), (2, 2), (1, 3), (4, 2), (4, 3)])
def test_gates_importance_and_load_are_eq_12_13_and_14_in_value_and_gradient(k_primary, k_secondary):
    gate = a_hierarchy(k_primary=k_primary, k_secondary=k_secondary)
    x_TD, noise = tokens_and_noise(gate)
    gates_TE, importance_E, load_E = as_they_read(gate, x_TD, noise)
    routing = gate(x_TD, None, noise)
    ours_TE = torch.zeros_like(gates_TE).index_put((routing.token_N, routing.expert_N), routing.weight_N)
    assert_close(ours_TE, gates_TE)
    assert_close(routing.sums.importance_E, importance_E)
    assert_close(routing.sums.load_E, load_E)
    of = (x_TD, *gate.parameters())
    cotangents = torch.randn(2, gate.num_experts, dtype=torch.float64)
    ours = (ours_TE**2).sum() + (
        torch.stack([routing.sums.importance_E, routing.sums.load_E]) * cotangents
    ).sum()
    theirs = (gates_TE**2).sum() + (torch.stack([importance_E, load_E]) * cotangents).sum()
    for our_gradient, their_gradient in zip(gradients(ours, *of), gradients(theirs, *of), strict=True):
        assert_close(our_gradient, their_gradient)


def test_a_group_that_no_token_reaches_has_no_load_and_a_finite_gradient():
    gate = a_hierarchy()
    x_TD, noise = tokens_and_noise(gate)
    noise[:, 1] = -1e3
    _, importance_E, load_E = as_they_read(gate, x_TD, noise)
    routing = gate(x_TD, None, noise)
    empty = slice(GROUP_SIZE, 2 * GROUP_SIZE)
    assert not routing.sums.count_E[empty].any()
    assert not routing.sums.load_E[empty].any()
    assert_close(routing.sums.load_E, load_E)
    assert_close(routing.sums.importance_E, importance_E)
    loss = load_loss(routing) + importance_loss(routing)
    theirs = oracle.squared_cv(load_E) + oracle.squared_cv(importance_E)
    of = (x_TD, *gate.parameters())
    for our_gradient, their_gradient in zip(gradients(loss, *of), gradients(theirs, *of), strict=True):
        assert our_gradient.isfinite().all()
        assert_close(our_gradient, their_gradient)


def test_the_output_is_eq_12_the_dense_double_sum():
    gate = a_hierarchy()
    x_TD, noise = tokens_and_noise(gate)
    experts = FeedForward(width=WIDTH, hidden=4, num_experts=gate.num_experts, dtype=torch.float64)
    y_TD, _ = MoE(gate=gate, experts=experts)(x_TD, None, noise)
    gates_TE, _, _ = as_they_read(gate, x_TD, noise)
    assert_close(y_TD, oracle.mixture(x_TD, gates_TE, oracle.feed_forward(experts.w_in, experts.w_out)))


def test_one_group_is_the_flat_gate():
    gate = Hierarchical.noisy_topk(
        width=WIDTH, num_experts=6, num_groups=1, k_primary=1, k_secondary=2
    ).double()
    flat = NoisyTopK(width=WIDTH, num_experts=6, k=2, dtype=torch.float64)
    for name in ("w_gate", "w_noise"):
        weight = torch.randn(WIDTH, 6, dtype=torch.float64)
        getattr(flat, name).data.copy_(weight)
        getattr(gate.secondary, name).data[0].copy_(weight)
    x_TD, noise = tokens_and_noise(gate)
    ours, theirs = gate(x_TD, None, noise), flat(x_TD, None, noise[:, 1:])
    assert torch.equal(ours.expert_N, theirs.expert_N)
    assert_close(ours.weight_N, theirs.weight_N)
    assert_close(ours.sums.load_E, theirs.sums.load_E)
    assert_close(ours.sums.probability_E, theirs.sums.probability_E)


def test_the_load_in_expectation_is_close_to_the_count_and_in_evaluation_it_is_the_count():
    gate = a_hierarchy()
    x_TD, _ = tokens_and_noise(gate)
    with torch.no_grad():
        sums = [gate(x_TD).sums for _ in range(3000)]
        mean_load_E = torch.stack([s.load_E for s in sums]).mean(dim=0)
        mean_count_E = torch.stack([s.count_E.double() for s in sums]).mean(dim=0)
        assert (mean_load_E - mean_count_E).abs().max() < 0.15
        routing = gate.eval()(x_TD)
    assert_close(routing.sums.load_E, routing.sums.count_E)
    assert routing.sums.count_E.sum() == 4 * NUM_TOKENS


def test_micro_batches_add_to_the_whole_in_losses_and_gradients_and_quotients_would_not():
    gate = a_hierarchy()
    x_TD, noise = tokens_and_noise(gate)
    whole = gate(x_TD, None, noise).sums
    first, second = (gate(x_TD[part], None, noise[part]).sums for part in (slice(0, 4), slice(4, None)))
    total = first + second
    for loss in (importance_loss, load_loss):
        assert_close(loss(total), loss(whole))
        for ours, theirs in zip(
            gradients(loss(total), x_TD, *gate.parameters()),
            gradients(loss(whole), x_TD, *gate.parameters()),
            strict=True,
        ):
            assert_close(ours, theirs)
    assert (first.load_E + second.load_E - whole.load_E).abs().max() > 1e-3


def test_the_load_reaches_the_primary_gate():
    """What the product of eq. 14 is for: Load_i(X^(i)) alone has no gradient there."""
    gate = a_hierarchy()
    x_TD, noise = tokens_and_noise(gate)
    assert gradients(load_loss(gate(x_TD, None, noise)), gate.primary.w_gate)[0].any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_groups": 5}, r"num_groups \(5\) must divide num_experts \(12\)"),
        ({"num_groups": 0}, r"num_groups \(0\) must divide num_experts \(12\)"),
        ({"k_primary": 5}, r"k_primary \(5\) must be between 1 and num_groups \(4\)"),
        ({"k_secondary": 4}, r"k_secondary \(4\) must be between 1 and the experts of a group \(3\)"),
        ({"k_secondary": 0}, r"k_secondary \(0\) must be between 1 and the experts of a group \(3\)"),
    ],
)
def test_a_hierarchy_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Hierarchical.noisy_topk(
            **{"width": 5, "num_experts": 12, "num_groups": 4, "k_primary": 2, "k_secondary": 2, **wrong}
        )


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "millions"),
    [(256, 16, 8.438), (1024, 16, 8.536), (4096, 16, 8.929)],
)
def test_multiply_adds_are_those_of_table_7(num_experts, num_groups, millions):
    """Beside the gate: two LSTMs of 2.097 million and four experts of 1.049 million each."""
    gate = Hierarchical.noisy_topk(
        width=512, num_experts=num_experts, num_groups=num_groups, k_primary=2, k_secondary=2, device="meta"
    )
    others = 2 * 4 * (512 + 512) * 512 + 4 * 2 * 512 * 1024
    assert round((gate.ops_per_token() + others) / 1e6, 3) == millions


def balanced(*, scope=None, most_groups=None, most_per_group=None) -> Hierarchical:
    """Strictly balanced at both levels; on average two groups for each token, and two experts in each."""
    gate = Hierarchical(
        primary=Balanced(
            width=WIDTH,
            num_experts=NUM_GROUPS,
            k=2,
            scope=scope,
            most_per_token=most_groups,
            dtype=torch.float64,
        ),
        secondary=BalancedGroups(
            width=WIDTH,
            num_groups=NUM_GROUPS,
            group_size=GROUP_SIZE,
            k=2,
            scope=scope,
            most_per_token=most_per_group,
            dtype=torch.float64,
        ),
    )
    for name, parameter in gate.named_parameters():
        torch.nn.init.normal_(parameter, mean=-1.2 if name.endswith("log_threshold") else 0.0, std=0.5)
    return gate


def balanced_as_they_read(gate: Hierarchical, x_TD: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
    """G(x)_ij [T, E] and the sum of the threshold losses of both levels, one level and group at a time."""

    def level(x_TD, w_gate, log_threshold, k, most):
        """Eq. 16 and 20 of one softmax gate over these tokens; in evaluation the best, if many pass."""
        probability_TE = (x_TD @ w_gate).softmax(dim=1)
        num_tokens, num_experts = probability_TE.shape
        m = min(num_tokens, max(1, int(k * num_tokens / num_experts + 0.5)))
        above_TE = (probability_TE > log_threshold.exp()).double()
        chosen_TE = torch.zeros_like(probability_TE)
        for expert in range(num_experts):
            values = probability_TE[:, expert].tolist()
            chosen_TE[sorted(range(num_tokens), key=lambda t: -values[t])[:m], expert] = 1
        passed_TE = probability_TE * above_TE
        best_TE = passed_TE >= passed_TE.sort(dim=1, descending=True).values[:, most - 1 : most]
        mask_TE = chosen_TE if training else above_TE * best_TE
        kept_TE = probability_TE * mask_TE
        weight_TE = kept_TE / kept_TE.sum(dim=1, keepdim=True).where(mask_TE.any(1, keepdim=True), 1.0)
        return weight_TE, ((above_TE - chosen_TE) * (probability_TE.detach() - log_threshold.exp())).sum()

    primary, secondary = gate.primary, gate.secondary
    groups_TA, threshold = level(x_TD, primary.w_gate, primary.log_threshold, 2, primary.most_per_token)
    columns = []
    for group in range(NUM_GROUPS):
        reached_T = groups_TA[:, group] > 0
        within_TB = torch.zeros(len(x_TD), GROUP_SIZE, dtype=torch.float64)
        if reached_T.any():
            weight_RB, loss = level(
                x_TD[reached_T],
                secondary.w_gate[group],
                secondary.log_threshold[group],
                2,
                secondary.most_per_token,
            )
            threshold = threshold + loss
            within_TB = within_TB.index_put((reached_T.nonzero()[:, 0],), weight_RB)
        columns.append(groups_TA[:, group : group + 1] * within_TB)
    return torch.cat(columns, dim=1), threshold


@pytest.mark.parametrize("most", [(None, None), (2, None), (None, 1), (2, 2)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_strictly_balanced_levels_are_eq_12_of_two_gates_of_eq_16_in_value_and_gradient(training, most):
    """In evaluation a token keeps its best groups, and its best experts in each, if there is a bound."""
    gate = balanced(most_groups=most[0], most_per_group=most[1]).train(training)
    x_TD, _ = tokens_and_noise(gate)
    expected_TE, threshold = balanced_as_they_read(gate, x_TD, training=training)
    routing = gate(x_TD)
    if not training:
        assert routing.pairs_per_token == (most[0] or NUM_GROUPS) * (most[1] or GROUP_SIZE)
    assert_close(dense(routing), expected_TE)
    assert_close(routing.sums.importance_E, expected_TE.sum(dim=0))
    assert routing.sums.num_unrouted == (expected_TE.sum(dim=1) == 0).sum()
    cotangent_TE = torch.randn_like(expected_TE)
    ours, theirs = (dense(routing) * cotangent_TE).sum(), (expected_TE * cotangent_TE).sum()
    if training:
        assert_close(routing.sums.threshold, threshold)
        ours, theirs = ours + threshold_loss(routing), theirs + threshold / NUM_TOKENS
    of = (x_TD, *gate.parameters())
    for our_gradient, their_gradient in zip(gradients(ours, *of), gradients(theirs, *of), strict=True):
        assert_close(our_gradient, their_gradient)


def test_strictly_balanced_levels_give_all_experts_equally_many_tokens():
    gate = balanced()
    x_TD = torch.randn(6 * NUM_GROUPS * GROUP_SIZE, WIDTH, dtype=torch.float64)
    assert set(gate(x_TD).sums.count_E.tolist()) == {2 * 2 * 6}


def test_with_scope_the_blocks_of_a_balanced_hierarchy_are_routed_apart():
    gate = balanced(scope=4)
    x_TD = torch.randn(10, WIDTH, dtype=torch.float64)
    parts_TE = torch.cat([dense(gate(x_TD[start : start + 4])) for start in (0, 4, 8)])
    assert_close(dense(gate(x_TD)), parts_TE)


@pytest.mark.parametrize("level", ["primary", "secondary"])
def test_untrained_thresholds_are_refused_at_either_level(level):
    gate = balanced().eval()
    getattr(gate, level).reset_parameters()
    with pytest.raises(ValueError, match=r"log_threshold \(.*\) was never trained"):
        gate(torch.randn(3, WIDTH, dtype=torch.float64))


def test_levels_that_do_not_fit_and_noise_that_cannot_be_given_are_refused():
    secondary = NoisyTopKGroups(width=WIDTH, num_groups=3, group_size=2, k=1)
    with pytest.raises(ValueError, match=r"primary.num_experts \(4\) must equal secondary.num_groups \(3\)"):
        Hierarchical(primary=NoisyTopK(width=WIDTH, num_experts=4, k=2), secondary=secondary)
    gate = Hierarchical(primary=Balanced(width=WIDTH, num_experts=3, k=2), secondary=secondary)
    with pytest.raises(ValueError, match="noise: this hierarchy takes none; pass None"):
        gate(torch.randn(3, WIDTH), None, torch.randn(3, 1))
    for wrong in ({"k": 3}, {"k": 0}, {"num_groups": 0}, {"noise_epsilon": -1}):
        with pytest.raises(ValueError, match=r"^(k|num_groups|noise_epsilon) \(-?\d\)"):
            NoisyTopKGroups(**{"width": WIDTH, "num_groups": 3, "group_size": 2, "k": 1, **wrong})


def test_a_step_balances_the_groups_of_a_primary_gate_with_a_bias():
    gate = Hierarchical(
        primary=SigmoidTopK(width=WIDTH, num_experts=4, k=2, bias_rate=0.5),
        secondary=NoisyTopKGroups(width=WIDTH, num_groups=4, group_size=2, k=1),
    )
    sums = gate(torch.randn(9, WIDTH)).sums
    gate.after_step(sums)
    expected = [0.5 * ((count < 4.5) - (count > 4.5)) for count in sums.group_count_A.tolist()]
    assert gate.primary.bias.tolist() == expected


def test_under_a_capacity_for_groups_the_counts_are_of_tokens_that_reached_them():
    gate = Hierarchical(
        primary=Capacity(NoisyTopK(width=WIDTH, num_experts=4, k=2), factor=1.0),
        secondary=NoisyTopKGroups(width=WIDTH, num_groups=4, group_size=2, k=1),
    )
    sums = gate(torch.randn(40, WIDTH)).sums
    assert sums.num_dropped > 0
    assert sums.group_count_A.sum() == sums.count_E.sum() == 80 - sums.num_dropped
