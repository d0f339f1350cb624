"""The balance metrics against numpy, and against what the paper's quantities are in closed form."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.inspection.balance import BALANCE_METRICS, balance_metrics
from sparsegate.moe.losses import importance_loss, load_loss
from sparsegate.moe.routing import BalanceSums

# What these metrics do not read.
UNUSED = {
    "threshold": torch.tensor(0.0),
    "num_unrouted": torch.tensor(0),
    "num_dropped": torch.tensor(0),
}
COUNTS = st.lists(st.integers(0, 10_000), min_size=1, max_size=64)


def sums_of(importance, load, count) -> BalanceSums:
    return BalanceSums(
        importance_E=torch.as_tensor(importance, dtype=torch.float32),
        within_load_E=torch.as_tensor(load, dtype=torch.float32),
        group_load_A=torch.ones(1),
        group_count_A=torch.ones(1, dtype=torch.int64),
        within_probability_E=torch.as_tensor(importance, dtype=torch.float32),
        group_probability_A=torch.ones(1),
        z=torch.tensor(0.0),
        count_E=torch.as_tensor(count, dtype=torch.int64),
        num_tokens=torch.tensor(int(np.sum(count))),
        **UNUSED,
    )


def random_sums(seed: int, num_experts: int) -> BalanceSums:
    draw = np.random.default_rng(seed)
    count = draw.integers(0, 50, num_experts)
    return sums_of(draw.gamma(1.0, size=num_experts), count + draw.random(num_experts), count)


@given(seed=st.integers(0, 2**32 - 1), num_experts=st.integers(1, 300))
def test_metrics_are_those_of_numpy(seed, num_experts):
    sums = random_sums(seed, num_experts)
    metrics = balance_metrics(sums)
    importance, load, count = (x.double().numpy() for x in (sums.importance_E, sums.load_E, sums.count_E))
    assert tuple(metrics) == BALANCE_METRICS
    assert all(type(value) is float for value in metrics.values())
    assert metrics["cv_importance"] == pytest.approx(np.std(importance) / np.mean(importance), rel=1e-12)
    assert metrics["cv_load"] == pytest.approx(np.std(load) / np.mean(load), rel=1e-12)
    assert metrics["dead_experts"] == np.count_nonzero(count == 0)
    if count.any():
        assert metrics["max_over_mean_load"] == pytest.approx(np.max(count) / np.mean(count), rel=1e-12)


@given(seed=st.integers(0, 2**32 - 1), bounds=st.lists(st.integers(0, 30), max_size=6).map(sorted))
def test_the_load_of_ranks_is_that_of_their_experts_together(seed, bounds):
    sums = random_sums(seed, 30)
    ranks = [range(a, b) for a, b in pairwise([0, *bounds, 30])]
    metrics = balance_metrics(sums, ranks=ranks)
    of_rank = [int(sums.count_E.numpy()[own.start : own.stop].sum()) for own in ranks]
    assert metrics.pop("max_over_mean_rank_load") == pytest.approx(max(of_rank) / np.mean(of_rank))
    assert metrics == balance_metrics(sums)


@given(seed=st.integers(0, 2**32 - 1))
def test_metrics_are_the_roots_of_the_unweighted_losses(seed):
    sums = random_sums(seed, 32)
    metrics = balance_metrics(sums)
    assert metrics["cv_importance"] ** 2 == pytest.approx(importance_loss(sums).item(), rel=1e-4, abs=1e-9)
    assert metrics["cv_load"] ** 2 == pytest.approx(load_loss(sums).item(), rel=1e-4, abs=1e-9)


@given(num_experts=st.integers(1, 512), data=st.data())
def test_collapse_on_the_same_k_experts_has_its_closed_form(num_experts, data):
    k = data.draw(st.integers(1, num_experts))
    count = [100] * k + [0] * (num_experts - k)
    metrics = balance_metrics(sums_of([c / k for c in count], count, count))
    assert metrics["cv_load"] == pytest.approx(math.sqrt(num_experts / k - 1), abs=1e-6)
    assert metrics["cv_importance"] == pytest.approx(math.sqrt(num_experts / k - 1), abs=1e-6)
    assert metrics["max_over_mean_load"] == pytest.approx(num_experts / k)
    assert metrics["dead_experts"] == num_experts - k


@given(parts=st.lists(COUNTS.filter(any), min_size=2, max_size=5))
def test_metrics_of_added_batches_are_those_of_the_joined_batch(parts):
    num_experts = max(map(len, parts))
    parts = [part + [0] * (num_experts - len(part)) for part in parts]
    added = sums_of(parts[0], parts[0], parts[0])
    for part in parts[1:]:
        added = added + sums_of(part, part, part)
    joined = np.sum(parts, axis=0)
    assert balance_metrics(added) == pytest.approx(balance_metrics(sums_of(joined, joined, joined)), rel=1e-6)


def test_metrics_do_not_depend_on_the_number_of_equal_batches():
    one = random_sums(3, 16)
    assert balance_metrics(one + one + one + one) == pytest.approx(balance_metrics(one))


def test_without_tokens_nothing_is_unbalanced_and_every_expert_is_dead():
    metrics = balance_metrics(sums_of([0.0] * 5, [0.0] * 5, [0] * 5))
    assert metrics == {**dict.fromkeys(BALANCE_METRICS, 0), "dead_experts": 5}


def test_one_expert_is_in_balance():
    metrics = balance_metrics(sums_of([3.0], [7.0], [7]))
    assert metrics == {**dict.fromkeys(BALANCE_METRICS, 0), "max_over_mean_load": 1}


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_sums_that_are_not_finite_are_seen(poison):
    metrics = balance_metrics(sums_of([1.0, poison], [1.0, 1.0], [1, 1]))
    assert math.isnan(metrics["cv_importance"])
    assert metrics["cv_load"] == 0


def test_metrics_take_sums_that_carry_a_graph():
    sums = random_sums(0, 4)
    graph = BalanceSums(
        importance_E=sums.importance_E.requires_grad_() * 1,
        within_load_E=sums.load_E.requires_grad_() * 1,
        group_load_A=torch.ones(1),
        group_count_A=torch.ones(1, dtype=torch.int64),
        within_probability_E=sums.probability_E,
        group_probability_A=torch.ones(1),
        z=sums.z,
        count_E=sums.count_E,
        num_tokens=sums.num_tokens,
        **UNUSED,
    )
    assert balance_metrics(graph) == balance_metrics(sums)


def test_shares_are_of_the_tokens_and_of_the_pairs():
    sums = sums_of([1.0, 1.0], [4.0, 4.0], [4, 4])
    changed = BalanceSums(**{**vars(sums), "num_unrouted": torch.tensor(2), "num_dropped": torch.tensor(3)})
    metrics = balance_metrics(changed)
    assert metrics["unrouted_share"] == 2 / 8
    assert metrics["dropped_share"] == 3 / 8
