"""The examples for clusters can be read by what reads them, and what they start is a command of ours."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from sparsegate.cli.train import VERB
from sparsegate.cli.verb import parse

ROOT = Path(__file__).parent.parent
SLURM, KUBERNETES = ROOT / "examples/slurm.sh", ROOT / "examples/pytorchjob.yaml"
VARIABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def container() -> dict:
    """The only one of the job."""
    job = yaml.safe_load(KUBERNETES.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["minReplicas"]
    (only,) = worker["template"]["spec"]["containers"]
    return only


def commands() -> dict[str, list[str]]:
    (after_srun,) = re.findall(r"^srun (.*)$", SLURM.read_text().replace("\\\n", ""), flags=re.MULTILINE)
    return {"slurm": shlex.split(after_srun), "kubernetes": container()["command"]}


@pytest.mark.parametrize("where", ["slurm", "kubernetes"])
def test_torchrun_and_sparsegate_know_every_option(where):
    program, *words = commands()[where]
    assert program == "torchrun"
    # As the operator tells torchrun by its variables.
    known = get_args_parser().parse_args([word.replace("$SLURM_NNODES", "4") for word in words])
    assert (known.module, known.training_script) == (True, "sparsegate")
    verb, *given = known.training_script_args
    assert verb == "train"
    args = parse(VERB, given, name="train", summary="")
    assert args.name == "moe-4096-h"
    assert args.resume
    assert args.config.training.device == "cuda"


def test_restarts_have_the_variable_that_they_need():
    assert "--max-restarts" in commands()["slurm"]
    assert f"\nexport {VARIABLE}=1\n" in SLURM.read_text()
    assert {"name": VARIABLE, "value": "1"} in container()["env"]
    assert f"{VARIABLE}=1" in (ROOT / "docs/parallel.md").read_text()


def test_bash_reads_the_script():
    subprocess.run(["bash", "-n", SLURM], check=True)


def test_volumes_that_are_mounted_are_there():
    template = yaml.safe_load(KUBERNETES.read_text())["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    names = {volume["name"] for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == names
