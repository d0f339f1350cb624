"""The whole road: text, dataset, training, evaluation, writing."""

import json
from pathlib import Path

import pytest

import sparsegate
from sparsegate.cli.main import main
from sparsegate.decoding import Sampling
from sparsegate.training.run_folder import read_best

CYCLE = "red orange yellow green blue indigo violet"


def test_a_language_of_one_sentence_is_learned_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(f"{CYCLE}\n" * 300)
    Path("held-out.txt").write_text(f"{CYCLE}\n" * 30)
    assert main(["prepare", "text.txt", "--valid", "held-out.txt", "--output", "cycle"]) == 0
    settings = (
        "--model.width 8 --model.lstm-units 8 --model.hidden 8 --model.num-experts 4 --model.k 2 "
        "--model.dropout 0 --batches.batch-size 8 --batches.num-steps 8 --optim.learning-rate 3e-2 "
        "--optim.warmup-steps 20 --training.steps 200 --training.evaluate-every 100"
    )
    assert main(["train", "small-moe-4", "--data", "cycle", "--out", "run", *settings.split()]) == 0
    capsys.readouterr()
    assert main(["evaluate", "run", "--split", "valid", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] < 1.1
    run = sparsegate.load("run")
    assert run.step == read_best(Path("run"))
    written = next(iter(run.generate(["red orange"], sampling=Sampling(temperature=0, max_tokens=20))))
    assert f"red orange{written.text}" == CYCLE
    right, wrong = run.score([CYCLE, "red violet orange yellow blue indigo green"])
    assert right.total > wrong.total + 5
