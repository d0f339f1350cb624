"""The training loop on ranks: the run of one process, whatever their number, and across a change of it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from sparsegate.models.gates import SoftmaxTopKGate
from sparsegate.training.log import read_log
from sparsegate.training.loop import train
from sparsegate.training.ranks import ranks_of_process
from sparsegate.training.run_folder import checkpoints_of, saved_steps
from tests.helpers.model_cases import GATES
from tests.helpers.rank_runs import (
    assert_alike,
    differently_on_rank,
    ended,
    exact,
    spoiled_on_rank,
    stopped_on_rank,
    train_on_rank,
)
from tests.helpers.tiny_runs import TINY_DATASETS, TINY_RUNS, with_gates

STEPS = 12
# Rounding of float32 that Adam has made larger: an update has the same size however small a gradient is.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A run of each task, without dropout, of six experts."""
    found = {}
    for task, make in TINY_RUNS.items():
        data = TINY_DATASETS[task](tmp_path_factory.mktemp(task) / "text").directory
        config = exact(make(data, steps=STEPS), evaluate_every=STEPS, checkpoint_every=6)
        found[task] = with_gates(config, "noisy_topk")
    return found


@pytest.fixture(scope="module")
def alone(configs, tmp_path_factory):
    """The same runs in one process."""
    folders = {task: tmp_path_factory.mktemp("alone") / task for task in configs}
    for task, config in configs.items():
        train(config, folder=folders[task])
    return {task: ended(folder) for task, folder in folders.items()}


@pytest.mark.parametrize(
    ("task", "num_ranks"), [("language", 2), ("language", 3), ("language", 4), ("translation", 3)]
)
def test_a_run_on_ranks_is_the_run_of_one_process(task, num_ranks, configs, alone, ranks, tmp_path):
    assert ranks.run(train_on_rank, num_ranks, configs[task], str(tmp_path)) == [""] * num_ranks
    assert_alike(ended(tmp_path), alone[task], tolerance=TOLERANCE)


def test_how_tokens_travel_changes_nothing(configs, alone, ranks, tmp_path):
    config = exact(configs["language"], exchange="by_node", exchange_pieces=2)
    assert ranks.run(train_on_rank, 4, config, str(tmp_path)) == [""] * 4
    assert_alike(ended(tmp_path), alone["language"], tolerance=TOLERANCE)
    loads = [
        line["moe/max_over_mean_rank_load"]
        for line in read_log(tmp_path / "log.jsonl")
        if line["kind"] == "step"
    ]
    assert all(1 <= load <= 4 for load in loads)


@pytest.mark.parametrize(
    ("task", "copies", "training"),
    [
        ("language", 4, {}),
        ("language", 2, {"micro_batches": 2}),
        ("translation", 2, {"exchange": "by_node", "exchange_pieces": 2}),
    ],
)
def test_copies_of_the_experts_change_nothing(task, copies, training, configs, alone, ranks, tmp_path):
    config = exact(configs[task], expert_copies=copies, **training)
    assert ranks.run(train_on_rank, 4, config, str(tmp_path)) == [""] * 4
    assert_alike(ended(tmp_path), alone[task], tolerance=TOLERANCE)
    written = {path.name for path in checkpoints_of(tmp_path).glob("*/model_part_*")}
    assert written == {f"model_part_{n}_of_{4 // copies}.safetensors" for n in range(4 // copies)}


def test_fewer_experts_than_ranks_have_copies(configs, ranks, tmp_path):
    """Of a gate that chooses over the batch, and with words that are spread; another number goes on."""
    config = configs["language"]
    config = with_gates(replace(config, model=replace(config.model, num_experts=3)), "balanced")
    few = exact(config, expert_copies=2, selection="gathered", vocabulary="sharded")
    train(config, folder=tmp_path / "alone")
    expected = ended(tmp_path / "alone")
    assert ranks.run(train_on_rank, 4, few, str(tmp_path / "ranks")) == [""] * 4
    assert_alike(ended(tmp_path / "ranks"), expected, tolerance=TOLERANCE)

    ranks.run(train_on_rank, 4, exact(few, steps=STEPS // 2), str(tmp_path / "fewer"))
    ranks.run(train_on_rank, 3, exact(few, expert_copies=1), str(tmp_path / "fewer"), True)
    assert_alike(ended(tmp_path / "fewer"), expected, tolerance=TOLERANCE)
    train(exact(config, steps=STEPS // 2), folder=tmp_path / "more")
    ranks.run(train_on_rank, 4, few, str(tmp_path / "more"), True)
    assert_alike(ended(tmp_path / "more"), expected, tolerance=TOLERANCE)


def test_tables_by_rows_are_refused_where_words_have_copies(configs, ranks, tmp_path):
    config = exact(configs["language"], expert_copies=2, vocabulary="sharded")
    config = replace(config, optim=replace(config.optim, tables="rows"))
    first, *others = ranks.run(train_on_rank, 4, config, str(tmp_path / "run"))
    assert first.startswith("optim.tables (rows): gradients of rows are not added up over training.expert-")
    assert others == ["told elsewhere"] * 3


def test_copies_that_ranks_cannot_have_are_refused_once(configs, ranks, tmp_path):
    config = exact(configs["language"], expert_copies=3)
    first, *others = ranks.run(train_on_rank, 4, config, str(tmp_path / "run"))
    assert first.startswith("training.expert-copies (3) must divide the number of processes (4)")
    assert others == ["told elsewhere"] * 3
    assert not (tmp_path / "run").exists()


def test_machines_with_different_numbers_of_ranks_are_refused_once(configs, ranks, tmp_path):
    config = exact(configs["language"], exchange="by_node")
    first, *others = ranks.run(train_on_rank, 3, config, str(tmp_path / "run"))
    assert first.startswith(
        "LOCAL_WORLD_SIZE (2) must divide the number of processes that share the experts (3)"
    )
    assert others == ["told elsewhere"] * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("task", "num_ranks", "micro_batches"), [("language", 2, 2), ("translation", 3, 3)])
def test_micro_batches_on_ranks_change_nothing(
    task, num_ranks, micro_batches, configs, alone, ranks, tmp_path
):
    """Also where there are fewer sentences than parts, and some parts are empty."""
    config = exact(configs[task], micro_batches=micro_batches)
    assert ranks.run(train_on_rank, num_ranks, config, str(tmp_path)) == [""] * num_ranks
    assert_alike(ended(tmp_path), alone[task], tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("task", "gate"),
    [
        *(("language", gate) for gate in GATES if gate != "noisy_topk"),
        *(("translation", gate) for gate in ("balanced", "hierarchical")),
    ],
)
def test_other_gates_train_on_ranks_as_alone(task, gate, configs, ranks, tmp_path):
    config = with_gates(exact(configs[task], selection="gathered"), gate)
    if gate == "softmax_topk":  # without the jitter, which it draws by itself
        config = replace(config, model=replace(config.model, gate=SoftmaxTopKGate(renormalize=False)))
    assert_trained_as_alone(config, ranks, tmp_path)


def test_gates_that_drop_train_and_are_evaluated_on_ranks_as_alone(configs, ranks, tmp_path):
    """Gathered, with a copy of the text on each rank, the first would have room for all of its tokens."""
    config = exact(configs["language"], selection="gathered")
    assert_trained_as_alone(replace(config, model=replace(config.model, capacity=1.0)), ranks, tmp_path)


def test_experts_kept_in_bfloat16_train_on_ranks_as_alone(configs, ranks, tmp_path):
    config = configs["language"]
    config = replace(
        config,
        model=replace(config.model, expert_dtype="bfloat16"),
        optim=replace(config.optim, experts="factored"),
    )
    assert_trained_as_alone(config, ranks, tmp_path)


def assert_trained_as_alone(config, ranks, tmp_path):
    train(config, folder=tmp_path / "alone")
    assert ranks.run(train_on_rank, 3, config, str(tmp_path / "ranks")) == [""] * 3
    assert_alike(ended(tmp_path / "ranks"), ended(tmp_path / "alone"), tolerance=TOLERANCE)


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 3), (2, 3)])
def test_a_run_goes_on_with_another_number_of_ranks(before, after, configs, alone, ranks, tmp_path):
    config = configs["language"]
    ranks.run(train_on_rank, before, exact(config, steps=STEPS // 2), str(tmp_path))
    if after == 1:
        train(config, folder=tmp_path, resume=True)
    else:
        ranks.run(train_on_rank, after, config, str(tmp_path), True)
    assert_alike(ended(tmp_path), alone["language"], tolerance=TOLERANCE)


def test_a_run_on_ranks_is_the_same_twice_and_goes_on_bit_for_bit(configs, ranks, tmp_path):
    config = replace(configs["language"], model=replace(configs["language"].model, dropout=0.3))
    ranks.run(train_on_rank, 3, config, str(tmp_path / "whole"))
    ranks.run(
        train_on_rank, 3, replace(config, training=replace(config.training, steps=6)), str(tmp_path / "cut")
    )
    ranks.run(train_on_rank, 3, config, str(tmp_path / "cut"), True)
    assert_alike(ended(tmp_path / "cut"), ended(tmp_path / "whole"), tolerance=0)


@pytest.mark.parametrize(
    ("samples", "tables", "num_ranks"),
    [
        (0, "adam", 2),
        pytest.param(0, "adam", 3, marks=pytest.mark.nightly),
        pytest.param(5, "adam", 2, marks=pytest.mark.nightly),
        (5, "rows", 3),
    ],
)
def test_a_run_whose_vocabulary_is_spread_is_the_run_of_one_process(
    samples, tables, num_ranks, configs, ranks, tmp_path
):
    """And it goes on with whole tables and from whole tables, and on another number of ranks."""
    config = configs["language"]
    whole = replace(
        config,
        model=replace(config.model, softmax_samples=samples),
        optim=replace(config.optim, tables=tables),
    )
    spread, half = exact(whole, vocabulary="sharded"), {"steps": STEPS // 2}
    train(whole, folder=tmp_path / "alone")
    expected = ended(tmp_path / "alone")

    assert ranks.run(train_on_rank, num_ranks, spread, str(tmp_path / "ranks")) == [""] * num_ranks
    assert_alike(ended(tmp_path / "ranks"), expected, tolerance=TOLERANCE)
    checkpoint = checkpoints_of(tmp_path / "ranks") / f"step-{STEPS:08d}"
    part = load_file(checkpoint / f"model_words_1_of_{num_ranks}.safetensors")
    whole_bias = expected.tensors["model"]["softmax.bias"]
    assert part["softmax.bias"].shape == whole_bias[1::num_ranks].shape

    ranks.run(train_on_rank, num_ranks, exact(spread, **half), str(tmp_path / "others"))
    ranks.run(train_on_rank, 5 - num_ranks, spread, str(tmp_path / "others"), True)
    assert_alike(ended(tmp_path / "others"), expected, tolerance=TOLERANCE)
    train(exact(whole, **half), folder=tmp_path / "from_alone")
    ranks.run(train_on_rank, num_ranks, spread, str(tmp_path / "from_alone"), True)
    assert_alike(ended(tmp_path / "from_alone"), expected, tolerance=TOLERANCE)
    ranks.run(train_on_rank, num_ranks, exact(spread, **half), str(tmp_path / "to_alone"))
    train(whole, folder=tmp_path / "to_alone", resume=True)
    assert_alike(ended(tmp_path / "to_alone"), expected, tolerance=TOLERANCE)


def test_tables_by_rows_are_refused_where_every_rank_has_all_words(configs, ranks, tmp_path):
    config = configs["language"]
    config = replace(config, optim=replace(config.optim, tables="rows"))
    first, second = ranks.run(train_on_rank, 2, config, str(tmp_path / "run"))
    assert first.startswith("optim.tables (rows): is for one process, or for training.vocabulary sharded")
    assert second == "told elsewhere"


def test_fine_tuning_on_ranks_is_that_of_one_process(configs, ranks, tmp_path):
    """Each rank takes its own experts out of the other run, and freezes by the names of one process."""
    config = configs["language"]
    ranks.run(train_on_rank, 2, exact(config, steps=4), str(tmp_path / "first"))
    frozen = ("layers.moe.moe.experts.w_in", "softmax.*")
    tuned = replace(
        exact(config, steps=6, init_from=str(tmp_path / "first"), freeze=frozen), seed=config.seed + 1
    )
    train(tuned, folder=tmp_path / "alone")
    assert ranks.run(train_on_rank, 3, tuned, str(tmp_path / "ranks")) == [""] * 3
    found = ended(tmp_path / "ranks")
    assert_alike(found, ended(tmp_path / "alone"), tolerance=TOLERANCE)
    before = ended(tmp_path / "first").tensors["model"]["layers.moe.moe.experts.w_in"]
    assert torch.equal(found.tensors["model"]["layers.moe.moe.experts.w_in"], before)


def test_a_signal_to_one_rank_saves_on_all_and_leaves(configs, alone, ranks, tmp_path):
    config = configs["language"]
    assert ranks.run(stopped_on_rank, 3, config, str(tmp_path), 1, 5) == ["SIGTERM"] * 3
    assert saved_steps(tmp_path)[0] == 5
    ranks.run(train_on_rank, 3, config, str(tmp_path), True)
    assert_alike(ended(tmp_path), alone["language"], tolerance=TOLERANCE)


def test_a_batch_that_is_not_finite_on_one_rank_leaves_no_trace_on_any(configs, ranks, tmp_path):
    config = configs["language"]
    train(exact(config, skip_batches=(3,)), folder=tmp_path / "alone")
    assert ranks.run(spoiled_on_rank, 3, config, str(tmp_path / "ranks"), 1, 3) == [""] * 3
    assert_alike(ended(tmp_path / "ranks"), ended(tmp_path / "alone"), tolerance=TOLERANCE)


def test_fewer_experts_than_ranks_are_refused_once(configs, ranks, tmp_path):
    config = configs["language"]
    config = replace(config, model=replace(config.model, num_experts=3))
    first, *others = ranks.run(train_on_rank, 4, config, str(tmp_path / "run"))
    assert "ranks that share the experts (4) must not exceed num_experts (3)" in first
    assert others == ["told elsewhere"] * 3
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_configurations_are_told_apart(configs, ranks, tmp_path):
    config = configs["language"]
    other = replace(config, optim=replace(config.optim, learning_rate=0.5))
    first, *others = ranks.run(differently_on_rank, 3, [config, config, other], str(tmp_path / "run"))
    assert first.startswith("optim.learning_rate (0.5 on rank 2, 0.01 on rank 0) must be the same")
    assert others == ["told elsewhere"] * 2


def test_ranks_with_different_data_are_told_apart(configs, ranks, tmp_path):
    config = configs["language"]
    data = TINY_DATASETS["language"](tmp_path / "text", lines=["other text here"] * 90).directory
    other = replace(config, data=str(data))
    first, *_ = ranks.run(differently_on_rank, 2, [config, other], str(tmp_path / "run"))
    assert first.startswith("data_fingerprint (")
    assert "on rank 1" in first


def test_what_one_rank_alone_cannot_do_is_told_with_its_number(configs, ranks, tmp_path):
    config = configs["language"]
    other = replace(config, data=str(tmp_path / "nowhere"))
    first, second = ranks.run(differently_on_rank, 2, [config, other], str(tmp_path / "run"))
    assert first.startswith("rank 1: ")
    assert "nowhere" in first
    assert second == "told elsewhere"


def test_a_log_that_the_first_rank_cannot_shorten_ends_all(configs, ranks, tmp_path):
    ranks.run(train_on_rank, 2, exact(configs["language"], steps=2), str(tmp_path))
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    first, second = ranks.run(train_on_rank, 2, configs["language"], str(tmp_path), True)
    assert "log.jsonl" in first
    assert second == "told elsewhere"


def test_a_launcher_that_could_not_restart_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    with (
        pytest.raises(ValueError, match=r"TORCH_DISABLE_SHARE_RDZV_TCP_STORE \(not set\) must be 1"),
        ranks_of_process(torch.device("cpu"), timeout_s=5),
    ):
        pass
