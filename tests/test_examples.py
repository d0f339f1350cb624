"""The examples run, and learn what they set out to."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(name: str) -> str:
    command = [sys.executable, "-W", "error", EXAMPLES / name]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_every_example_is_tested_here():
    source = Path(__file__).read_text()
    assert [file.name for file in EXAMPLES.glob("*.py") if f'"{file.name}"' not in source] == []


def test_mixtures_in_a_transformer_learn_to_fetch_and_permute():
    accuracy = re.search(r"accuracy ([\d.]+)", output_of("transformer_block.py"))
    assert accuracy
    assert float(accuracy[1]) > 0.9


def test_experts_that_differ_share_the_work_by_kind():
    output = output_of("different_experts.py")
    error, of_identity = map(float, re.findall(r"(?:squared error|identity) ([\d.]+)", output))
    assert error < of_identity / 2
    shares = [[float(share) for share in line.split(",")] for line in re.findall(r"\[(.*)\]", output)]
    left_alone, bent = (of_point[0] for of_point in shares)
    assert left_alone > 0.3 > bent


def test_micro_batches_have_the_gradient_of_the_whole_batch():
    differences = [float(d) for d in re.findall(r"difference (\S+)", output_of("micro_batches.py"))]
    assert len(differences) == 4
    assert max(differences) < 1e-12


def test_mixtures_under_fsdp2_learn_to_sort_on_two_ranks():
    assert len((EXAMPLES / "fsdp2.py").read_text().splitlines()) < 100
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", EXAMPLES / "fsdp2.py"]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    *_, last = re.findall(r"accuracy ([\d.]+)", ran.stdout)
    assert float(last) > 0.8
