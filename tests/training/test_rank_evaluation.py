"""Ranks that measure a model together find what one process does, and none waits for one that has left."""

from dataclasses import replace

import pytest
import torch

from sparsegate.training.config import SentencesConfig
from sparsegate.training.tasks import open_task
from tests.helpers.rank_runs import evaluated, evaluation_of_a_rank, exact, sizes_read_by_a_rank
from tests.helpers.runs import LINES
from tests.helpers.tiny_runs import TINY_DATASETS, TINY_RUNS, with_gates

# Few: some ranks have no sentence, and translate until the others are done.
FEW = LINES[:3]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    found = {}
    for task, make in TINY_RUNS.items():
        for lines in (LINES, FEW):
            data = TINY_DATASETS[task](tmp_path_factory.mktemp(task) / "text", lines=lines).directory
            bleu = {"bleu_sentences": 20} if task == "translation" else {}
            found[task, len(lines)] = exact(make(data), **bleu)
    return found


def assert_same(found, expected):
    """Every figure, every balance sum, every translation."""
    assert found.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-5), name
    assert found.hypotheses == expected.hypotheses
    for name, value in expected.sums.items():
        torch.testing.assert_close(found.sums[name], value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("num_lines", [len(LINES), len(FEW)])
@pytest.mark.parametrize("task", TINY_RUNS)
def test_ranks_measure_what_one_process_does(task, num_lines, num_ranks, configs, ranks):
    config = with_gates(configs[task, num_lines], "noisy_topk")
    expected = evaluated(config)
    found = ranks.run(evaluation_of_a_rank, num_ranks, config)
    for each in found:
        assert_same(each, expected)
    assert all(each.metrics == found[0].metrics for each in found)


def test_sentences_are_shared_out_as_well(configs, ranks):
    config = configs["language", len(LINES)]
    config = with_gates(replace(config, batches=SentencesConfig(batch_words=256)), "noisy_topk")
    expected = evaluated(config)
    for each in ranks.run(evaluation_of_a_rank, 3, config):
        assert_same(each, expected)


def test_each_token_is_read_by_one_rank(configs, ranks):
    config = with_gates(configs["language", len(LINES)], "noisy_topk")
    read = ranks.run(sizes_read_by_a_rank, 4, config)
    total = len(open_task(config).dataset.split("valid").token_N)
    assert sum(read) == total
    assert max(read) < 0.3 * total


@pytest.mark.parametrize("selection", ["rank", "gathered"])
def test_gates_that_choose_over_the_batch_measure_as_one_process(selection, configs, ranks):
    config = with_gates(exact(configs["language", len(LINES)], selection=selection), "expert_choice")
    expected = evaluated(config)
    for each in ranks.run(evaluation_of_a_rank, 3, config):
        assert_same(each, expected)
