"""Runs of the command line under torchrun, from outside: started, killed, stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from sparsegate.training.config import RunConfig
from sparsegate.training.overrides import to_json

PROGRAM = """
import sys
import time
from pathlib import Path
from sparsegate.cli import main
from sparsegate.training import loop, overrides
from sparsegate.training.config import RunConfig

folder, pause = Path(sys.argv[1]), float(sys.argv[3])
config = overrides.read_config(RunConfig, Path(sys.argv[2]))
step = loop.Run.step

def slowly(run):
    time.sleep(pause)
    step(run)

loop.Run.step = slowly
try:
    loop.train(config, folder=folder, resume=True)
except Exception as error:
    code = main.exit_code(error)
    if code is None:
        raise
    print(main.one_line(error), file=sys.stderr)
    sys.exit(code)
"""


class Launched:
    """A run of a configuration by torchrun, each step of which takes `pause_s` longer."""

    def __init__(
        self, folder: Path, config: RunConfig, *, num_ranks: int, restarts: int = 0, pause_s: float = 0.02
    ) -> None:
        self.folder = folder
        work = folder.parent / f"{folder.name}-program"
        work.mkdir(exist_ok=True)
        (work / "program.py").write_text(PROGRAM)
        (work / "config.json").write_text(json.dumps(to_json(config)))
        self.output = work / "output.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)),
                    *("--max-restarts", str(restarts), "--monitor-interval", "0.1"),
                    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(work / "program.py")),
                    *(str(folder), str(work / "config.json"), str(pause_s)),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                start_new_session=True,
            )

    def ranks(self) -> list[int]:
        """Process ids of the ranks that live now."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children]

    def wait_for_step(self, step: int, *, within_s: float = 60) -> None:
        """Until the log tells of the step."""
        until = time.monotonic() + within_s
        while self.last_step() < step:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < until, f"no step {step} in {within_s} s: {self.said()}"
            time.sleep(0.02)

    def last_step(self) -> int:
        log = self.folder / "log.jsonl"
        steps = re.findall(r'"kind": "step", "step": (\d+)', log.read_text()) if log.exists() else []
        return int(steps[-1]) if steps else 0

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.ranks()[rank], number)

    def lose(self) -> None:
        """Kill all ranks and torchrun with them, as a machine that fails does."""
        for process in (*self.ranks(), self.process.pid):
            os.kill(process, signal.SIGKILL)
        self.process.wait()

    def end(self, *, within_s: float = 120) -> int:
        """Its exit code. A run that does not end is killed, and an error."""
        try:
            return self.process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended in {within_s} s: {self.said()}") from None
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def said(self) -> str:
        return self.output.read_text()
