"""`sparsegate train`."""

import json
from pathlib import Path

import pytest

from sparsegate.cli.main import main
from sparsegate.training.log import read_log
from sparsegate.training.run_folder import read_run_config, saved_steps
from tests.helpers.runs import make_dataset

Capture = pytest.CaptureFixture[str]
TINY = (
    "--model.width 8 --model.lstm-units 8 --model.hidden 8 --model.num-experts 4 --model.k 2 "
    "--training.steps 4 --batches.batch-size 2 --batches.num-steps 8"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("text") / "text").directory


def words(data: Path, out: Path, *more: str, recipe: str = "small-moe-4") -> list[str]:
    return ["train", recipe, "--data", str(data), "--out", str(out), *TINY.split(), *more]


def test_a_recipe_is_trained_and_the_next_commands_are_named(data: Path, tmp_path: Path, capsys: Capture):
    out = tmp_path / "run"
    assert main(words(data, out, "--training.log-every", "1")) == 0
    told = capsys.readouterr().err
    assert "4 steps, 64 tokens; best at step 4" in told
    assert f"sparsegate evaluate {out}" in told.replace("\n", "")
    assert f"sparsegate generate {out}" in told.replace("\n", "")
    assert saved_steps(out) == [4]
    steps = [line for line in read_log(out / "log.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[0].keys() >= {"train/loss", "train/perplexity", "train/tokens_per_second", "moe/cv_load"}
    assert list((out / "tensorboard").iterdir())
    assert read_run_config(out).model.num_experts == 4


def test_a_resumed_run_keeps_what_it_was_and_takes_new_lengths(data: Path, tmp_path: Path, capsys: Capture):
    assert main(words(data, tmp_path / "run", "--seed", "7")) == 0
    resume = ["train", "small-moe-4", "--out", str(tmp_path / "run"), "--resume", "--training.steps", "6"]
    assert main(resume) == 0
    assert saved_steps(tmp_path / "run")[0] == 6
    assert read_run_config(tmp_path / "run").seed == 7


def test_the_folder_is_named_by_the_recipe_where_none_is_given(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "small-moe-4", "--data", str(data), *TINY.split()]) == 0
    assert saved_steps(tmp_path / "runs" / "small-moe-4") == [4]


def test_a_run_starts_from_another_and_leaves_what_is_frozen(data: Path, tmp_path: Path):
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    assert main(words(data, first)) == 0
    assert main(words(data, tuned, "--training.init-from", str(first), "--training.freeze", "layers.*")) == 0
    config = json.loads((tuned / "config.json").read_text())
    assert config["training"]["freeze"] == ["layers.*"]


REFUSED = {
    "smal-moe-4": ("did you mean small-moe-4?", []),
    "misspelled": (
        "--model.num-expert: no such option; did you mean --model.num-experts?",
        ["--model.num-expert", "4"],
    ),
    "no section": (
        "--num-experts: no such option; did you mean --model.num-experts?",
        ["--num-experts", "4"],
    ),
    "too many": ("model.k (5) must be between 1 and model.num-experts (4)", ["--model.k", "5"]),
    "no number": ("model.k (two)", ["--model.k", "two"]),
    "not finite": ("optim.learning-rate (nan)", ["--optim.learning-rate", "nan"]),
    "negative": ("training.steps (-1) must be at least 1", ["--training.steps", "-1"]),
    "no value": ("--training.steps: needs a value", ["--training.steps"]),
    "batches": ("batch_size (99999)", ["--batches.batch-size", "99999"]),
    "micro-batches": ("training.micro-batches (3) must be at most", ["--training.micro-batches", "3"]),
    "freeze": ("training.freeze (nothing.*): no parameter", ["--training.freeze", "nothing.*"]),
    "init-from": ("nowhere: not a run", ["--training.init-from", "nowhere"]),
    "kind": ("batches.kind", ["--batches.kind", "endless"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line_and_nothing_is_made(
    what: str, data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    message, more = REFUSED[what]
    recipe = what if what.startswith("smal-") else "small-moe-4"
    assert main(words(data, tmp_path / "run", *more, recipe=recipe)) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1, told.err
    assert message.replace("_", "-") in told.err.replace("_", "-")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [[], ["--data", "nowhere"]])
def test_a_missing_dataset_is_said(given: list[str], tmp_path: Path, capsys: Capture):
    assert main(["train", "small-moe-4", "--out", str(tmp_path / "run"), *given]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "sparsegate prepare" in told
    assert not (tmp_path / "run").exists()


def test_a_config_with_an_unknown_field_is_not_gone_on_with(data: Path, tmp_path: Path, capsys: Capture):
    assert main(words(data, tmp_path / "run")) == 0
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"clip_norm"', '"clip_nrm"'))
    capsys.readouterr()
    assert main(["train", "small-moe-4", "--out", str(tmp_path / "run"), "--resume"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{path}: optim.clip_nrm: no such field; did you mean optim.clip_norm?" in told


def test_an_absurd_learning_rate_ends_with_exit_code_4_and_an_intact_checkpoint(
    data: Path, tmp_path: Path, capsys: Capture
):
    absurd = (
        "--optim.learning-rate 1e30 --optim.warmup-steps 1 --training.steps 50 --training.checkpoint-every 1"
    )
    code = main(words(data, tmp_path / "run", *absurd.split(), "--training.max-nonfinite", "3"))
    told = capsys.readouterr().err
    assert code == 4, told
    assert "not finite in 3 batches in a row" in told
    assert "Traceback" not in told
    again = main(words(data, tmp_path / "run", "--resume", *absurd.split(), "--training.max-nonfinite", "3"))
    assert again == 4
    assert saved_steps(tmp_path / "run")


def test_the_translation_quickstart_makes_its_text_and_translates(tmp_path: Path, capsys: Capture):
    """The short form, cut down until it is tiny."""
    out = tmp_path / "run"
    tiny = (
        "--model.width 8 --model.lstm-units 8 --model.lstm-projection 0 --model.encoder-block.hidden 8 "
        "--model.decoder-block.hidden 8 --training.steps 4 --training.evaluate-every 2"
    )
    assert main(["train", "quickstart-translation", "--short", "--out", str(out), *tiny.split()]) == 0
    told = capsys.readouterr()
    assert told.err.count("BLEU") == 2
    assert "lines that it has not seen" in told.out
    bleu = [line["valid/bleu"] for line in read_log(out / "log.jsonl") if line["kind"] == "evaluation"]
    assert len(bleu) == 2
    assert (tmp_path / "run-data" / "translation.json").is_file()
    again = ["train", "quickstart-translation", "--short", "--out", str(out), "--resume"]
    assert main([*again, "--training.steps", "5"]) == 0
    assert saved_steps(out)[0] == 5


@pytest.mark.nightly
def test_the_short_form_learns(tmp_path: Path):
    assert main(["train", "quickstart-translation", "--short", "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["kind"] == "evaluation"]
    assert lines[-1]["valid/perplexity"] < 10
    assert lines[-1]["valid/bleu"] > 1 > lines[0]["valid/bleu"]


WRONG_KINDS = {
    "small-translation-moe-32 --batches.kind sentences": "batches.kind (sentences) must be parallel with a",
    "small-moe-4 --batches.kind parallel": "batches.kind (parallel) must be continuous or sentences",
    "small-moe-4 --model.kind translation": "model.encoder_block: is missing; it has no default",
    "small-moe-4 --losses.label-smoothing 0.1": "losses.label-smoothing (0.1) must be 0 with a language",
    "small-moe-4 --training.bleu-sentences 5": "training.bleu-sentences (5) must be 0 with a language model",
    "small-translation-lstm --losses.label-smoothing 0.1 --model.softmax-samples 9": "must be 0 with model",
    "small-translation-lstm --losses.label-smoothing 1": "must be at least 0 and below 1",
    "small-translation-lstm --batches.temperature 0.5": "batches.temperature (0.5) must be from 1 to 1000",
    "small-translation-lstm --optim.constant-steps -1": "optim.constant-steps (-1) must be at least 0",
    "small-translation-moe-32 --losses.threshold 0": "losses.threshold (0.0) must be above 0 with a balanced",
    "small-translation-lstm": "not a translation dataset",
    "small-moe-4 --short": "--short: is for quickstart-translation",
}


@pytest.mark.parametrize("line", WRONG_KINDS)
def test_what_does_not_fit_the_kind_of_model_is_refused(
    line: str, data: Path, tmp_path: Path, capsys: Capture
):
    assert main(["train", *line.split(), "--data", str(data), "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert WRONG_KINDS[line] in told
    assert list(tmp_path.iterdir()) == []
