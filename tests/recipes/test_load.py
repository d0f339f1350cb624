import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import sparsegate
from sparsegate.data import Dataset, save_vocabulary
from sparsegate.decoding import Sampling, score
from sparsegate.evaluation import evaluate
from sparsegate.recipes.load import load
from sparsegate.training.checkpoint import Checkpoint, load_checkpoint
from sparsegate.training.making import make_state
from sparsegate.training.overrides import to_json
from sparsegate.training.run_folder import checkpoints_of, for_dataset, write_best
from tests.helpers.runs import LINES, make_dataset, make_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture
def run(tmp_path: Path, dataset: Dataset) -> Path:
    make_run(tmp_path / "run", dataset)
    return tmp_path / "run"


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoints_of(run) / f"step-{step:08d}").tensors["model"]


@pytest.mark.parametrize(("which", "step"), [("best", 10), ("last", 20), (10, 10), (20, 20)])
def test_the_model_has_the_weights_of_the_checkpoint_that_is_asked_for(
    run: Path, which: str | int, step: int
):
    loaded = load(run, checkpoint=which)
    assert loaded.step == step
    stored = weights(run, step)
    assert loaded.model.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.model.state_dict().items())


def test_the_best_is_the_default_and_the_last_where_none_was_evaluated(tmp_path: Path, dataset: Dataset):
    make_run(tmp_path / "a", dataset, best=10)
    make_run(tmp_path / "b", dataset, best=None)
    assert (load(tmp_path / "a").step, load(str(tmp_path / "b")).step) == (10, 20)


def test_a_loaded_run_is_ready_to_use_and_public(run: Path, dataset: Dataset):
    loaded = sparsegate.load(run)
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.vocabulary.fingerprint == dataset.vocabulary.fingerprint
    assert loaded.config.data == str(dataset.directory)
    assert [s.total for s in loaded.score(LINES[:3])] == [
        s.total for s in score(loaded.model, dataset.vocabulary, LINES[:3])
    ]
    texts = list(loaded.generate(["The", ""], sampling=Sampling(max_tokens=4), batch_size=1))
    assert [text.prompt for text in texts] == ["The", ""]
    assert len(list(loaded.generate(["The"]))) == 1


def test_a_vocabulary_of_another_run_is_refused_though_it_is_of_equal_size(run: Path, dataset: Dataset):
    config = for_dataset(load(run).config, dataset)
    (run / "config.json").write_text(json.dumps(to_json(config)))
    assert load(run).vocabulary.fingerprint == dataset.vocabulary.fingerprint
    other = make_dataset(run.parent / "other", lines=[line.swapcase() for line in LINES])
    assert other.vocabulary.size == dataset.vocabulary.size
    save_vocabulary(other.vocabulary, run / "vocabulary.json")
    with pytest.raises(ValueError, match=r"vocabulary.json: not the vocabulary that the run was trained "):
        load(run)


def test_loading_leaves_the_random_numbers_alone(run: Path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load(run)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("sentences", [False, True])
def test_a_run_is_measured_with_the_context_it_was_trained_with(
    tmp_path: Path, dataset: Dataset, sentences: bool
):
    make_run(tmp_path / "run", dataset, sentences=sentences)
    loaded = load(tmp_path / "run")
    context = "sentence" if sentences else "stream"
    expected = evaluate(loaded.model, dataset.split("test"), batch_size=16, num_steps=64, context=context)
    done = []
    result = loaded.evaluate(progress=lambda *numbers: done.append(numbers))
    assert result.nll_nats == expected.nll_nats
    assert done[-1] == (result.num_tokens, result.num_tokens)
    assert result.num_words == dataset.split("test").num_words


def test_halves_of_a_split_add_up_to_it(run: Path):
    loaded = load(run)
    whole, first, second = (
        loaded.evaluate("valid", part=part, batch_size=1) for part in ("all", "first-half", "second-half")
    )
    assert first.num_tokens + second.num_tokens == whole.num_tokens
    # But for the state that the second half does not begin with.
    assert first.nll_nats + second.nll_nats == pytest.approx(whole.nll_nats, rel=1e-3)


def test_another_dataset_of_the_same_vocabulary_can_be_measured(run: Path, dataset: Dataset, tmp_path: Path):
    shutil.copytree(dataset.directory, tmp_path / "moved")
    assert load(run).evaluate(data=tmp_path / "moved").nll_nats == load(run).evaluate().nll_nats


def test_one_text_in_place_of_several_is_refused(run: Path):
    for ask in (load(run).score, load(run).generate):
        with pytest.raises(ValueError, match="is one text; give a list"):
            ask("The cat")


def damage(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def other_config(run: Path, **changes: object) -> None:
    config = load(run).config
    changed = replace(config, model=replace(config.model, **changes))
    (run / "config.json").write_text(json.dumps(to_json(changed)))


def not_finite(run: Path) -> None:
    config = load(run).config
    state = make_state(config)
    state.progress.step = 10
    with torch.no_grad():
        state.model.softmax.bias[3] = float("nan")
    state.save(checkpoints_of(run), keep=[20])


def other_vocabulary(run: Path) -> None:
    other = make_dataset(run.parent / "other", kind="bytes")
    save_vocabulary(other.vocabulary, run / "vocabulary.json")


MODEL = "checkpoints/step-00000010/model.safetensors"
BROKEN = {
    "no folder": (shutil.rmtree, "not a run"),
    "no config": (lambda run: (run / "config.json").unlink(), "not a run"),
    "empty config": (lambda run: (run / "config.json").write_text(""), "config.json: "),
    "no vocabulary": (lambda run: (run / "vocabulary.json").unlink(), "vocabulary.json"),
    "damaged vocabulary": (lambda run: damage(run / "vocabulary.json", 60), "vocabulary.json: "),
    "other vocabulary": (other_vocabulary, "vocabulary.json: has 256 entries, but model.vocab_size is"),
    "no checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet"),
    "best checkpoint gone": (lambda run: shutil.rmtree((run / MODEL).parent), "no such checkpoint"),
    "truncated checkpoint": (lambda run: (run / MODEL).write_bytes(b"x" * 99), "model.safetensors: damaged"),
    "damaged checkpoint": (lambda run: damage(run / MODEL, -5), "model.safetensors: damaged"),
    "best of nothing": (lambda run: (run / "checkpoints/best.json").write_text("[1]"), "best.json: "),
    "other width": (lambda run: other_config(run, width=16, lstm_units=16), "describes a model of"),
    "enormous model": (lambda run: other_config(run, hidden=10**12), "describes a model of"),
    "other shapes": (lambda run: other_config(run, num_experts=2, hidden=17), "this model's has"),
    "not finite": (not_finite, "softmax.bias is not finite"),
}


@pytest.mark.parametrize(("destroy", "complaint"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named_in_one_line(run: Path, destroy, complaint: str):
    destroy(run)
    with pytest.raises((ValueError, OSError)) as caught:
        load(run)
    assert complaint in str(caught.value)
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)


def mutated(content: bytes, random: Random) -> bytes:
    """With one byte or stretch changed, left out, put in or doubled."""
    start = random.randrange(len(content))
    end = min(len(content), start + random.choice([1, 1, 1, 10, 100]))
    middle = random.choice([b"", random.randbytes(1), b"9", b"-", content[start:end] * 2])
    return content[:start] + middle + content[end:]


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.nightly)])
def test_a_mutated_config_is_refused_in_one_line_or_means_something(run: Path, count: int):
    content = (run / "config.json").read_bytes()
    random = Random(0)
    refused = 0
    for _ in range(count):
        (run / "config.json").write_bytes(mutated(content, random))
        try:
            load(run)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > count / 2


def test_a_checkpoint_that_cannot_be_meant_is_refused(run: Path):
    with pytest.raises(ValueError, match=r"checkpoint \(bets\) must be best, last or"):
        load(run, checkpoint="bets")
    with pytest.raises(ValueError, match="has no checkpoint of step 15; there are: 20, 10"):
        load(run, checkpoint=15)


def test_the_last_checkpoint_is_the_newest_whole_one(run: Path):
    damage(run / "checkpoints/step-00000020/model.safetensors", -5)
    warnings = []
    assert load(run, checkpoint="last", warn=warnings.append).step == 10
    assert len(warnings) == 1


def test_a_checkpoint_that_goes_while_it_is_read_is_not_the_best_any_more(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run that is read goes on: it has pointed at another one, and deletes this one."""
    plain = load_checkpoint

    def superseded(path: Path, **options: Any) -> Checkpoint:
        if path.name == "step-00000010":
            write_best(run, step=20, nll=0.5)
            shutil.rmtree(path)
        return plain(path, **options)

    monkeypatch.setattr("sparsegate.recipes.load.load_checkpoint", superseded)
    assert load(run).step == 20


def test_a_dataset_that_does_not_fit_is_refused(run: Path, tmp_path: Path, dataset: Dataset):
    loaded = load(run)
    other = make_dataset(tmp_path / "other", kind="bytes")
    with pytest.raises(ValueError, match="made with another vocabulary"):
        loaded.evaluate(data=other.directory)
    with pytest.raises(ValueError, match="has no split 'dev'"):
        loaded.evaluate("dev")
    moved = replace(loaded, config=replace(loaded.config, data="nowhere"))
    with pytest.raises(ValueError, match="^nowhere: the dataset that .* give --data"):
        moved.evaluate()
    shutil.copytree(dataset.directory, tmp_path / "damaged")
    damage(tmp_path / "damaged/test.tokens", 8)
    with pytest.raises(ValueError, match="test.tokens: damaged"):
        loaded.evaluate(data=tmp_path / "damaged")
