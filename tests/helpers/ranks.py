"""Processes that are the ranks of a group, started once and given one law after the other."""

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

MOST_RANKS = 4
PATIENCE_S = 30
START_S = 240  # on a machine that is busy with other things


_GRADIENT_GROUPS: dict[int, Any] = {}


def gradient_group(num_ranks: int) -> dist.ProcessGroup:
    """Of the first ranks, in each of them, for sums of gradients: made once, as its making waits for all."""
    return _GRADIENT_GROUPS[num_ranks]


class Ranks:
    """Four processes; the first `num_ranks` of them run a function together, each with a mesh over these."""

    def __init__(self) -> None:
        self.processes: list[mp.process.BaseProcess] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
        """What `function(mesh, *arguments)` returns on each rank, in the order of the ranks.

        An error or a silence of PATIENCE_S of one rank is an error here, and the next law has new processes.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes[:num_ranks]:
            pipe.send_bytes(pickle.dumps((function, num_ranks, arguments)))
        answers = [self._answer(pipe) for pipe in self.pipes[:num_ranks]]
        failures = [f"rank {rank}: {text}" for rank, (is_good, text) in enumerate(answers) if not is_good]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        rendezvous = Path(tempfile.mkdtemp(), "rendezvous")
        for rank in range(MOST_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        for pipe in self.pipes:
            assert pipe.poll(START_S), f"a rank did not start in {START_S} s"
            pipe.recv_bytes()

    @staticmethod
    def _answer(pipe: Connection) -> tuple[bool, Any]:
        try:
            return (
                pickle.loads(pipe.recv_bytes())
                if pipe.poll(PATIENCE_S)
                else (False, f"silent for {PATIENCE_S} s")
            )
        except EOFError:
            return False, "died"


def _serve(rank: int, rendezvous: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=PATIENCE_S - 5)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=MOST_RANKS,
        timeout=timedelta(seconds=START_S),
    )
    meshes = {}
    for num_ranks in range(1, MOST_RANKS + 1):
        group, gradient_group = (dist.new_group(list(range(num_ranks)), timeout=timeout) for _ in range(2))
        if rank < num_ranks:
            meshes[num_ranks] = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("expert",))
            _GRADIENT_GROUPS[num_ranks] = gradient_group
        # Torch names a group that only its members make by the number of groups that a process has: so laws
        # that make one (`Ranks.beside`) must all run on as many ranks.
        for other in [*range(num_ranks, MOST_RANKS)] * 2:
            dist.new_group([other])
    import_module("sparsegate.training.loop")  # the law to come needs it, and is to be quick
    pipe.send_bytes(b"ready")
    while True:
        try:
            function, num_ranks, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            torch.manual_seed(0)
            answer = (True, function(meshes[num_ranks], *arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
