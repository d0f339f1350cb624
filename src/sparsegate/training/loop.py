"""The training loop: a run from its configuration to its last checkpoint."""

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..moe.precision import flushed_denormals
from ..optim.schedule import warmup_then_inverse_sqrt
from .background import Background
from .checkpoint import delete_others
from .config import RunConfig
from .exporting import import_into
from .lock import run_lock
from .making import make_state, resolve_device, start_from
from .memory import require_memory_for
from .missing import naming_the_missing
from .rank_checkpoint import latest_on_ranks
from .ranks import ALONE, Ranks, ranks_of_process
from .reporter import Reporter, Silence
from .run_folder import (
    check_run_folder,
    checkpoints_of,
    saved_steps,
    what_is_learned,
    write_best,
    write_run_folder,
)
from .signals import stop_requests
from .state import Snapshot, TrainState
from .step import Gradient, NonFinite, apply_gradient, compute_gradient, set_learning_rate
from .tasks import open_task
from .tasks.task import Measured, Task

# Times 1, or what clipping leaves of it. Runs that learned had norms below 2 after their first steps; batches
# of long sentences had 3e4 to 5e18 in projected LSTMs that did not (docs/results.md).
_EXPLODED = 1e4


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended. stopped_by: the signal that ended it before its last step, or ""."""

    folder: Path
    config: RunConfig
    state: TrainState
    evaluation: Measured | None
    stopped_by: str


def train(
    config: RunConfig, *, folder: Path, resume: bool = False, console: Console | None = None
) -> TrainResult:
    """Train the model of a configuration on its dataset, into a folder.

    resume: go on from the newest complete checkpoint of the folder, or start if it has none. On a CPU the run
    then ends bit for bit as if it had never stopped. console: where progress is shown; None: nowhere.

    Raises ValueError and OSError for what the user can mend, CannotSave when a checkpoint cannot be written,
    NonFinite after `training.max_nonfinite` non-finite batches in a row, and RankMissing where another
    process was waited for in vain.
    """
    device = resolve_device(config.training.device)
    with ExitStack() as stack:
        stack.enter_context(flushed_denormals())
        ranks = stack.enter_context(ranks_of_process(device, timeout_s=config.training.timeout))
        run: Run | None = None
        stack.enter_context(
            naming_the_missing(
                ranks.group, lambda: run.state.progress.step if run else 0, near=lambda: ranks.of_own_copy
            )
        )
        with ranks.together():
            task = open_task(config)
            config = task.config
            check_run_folder(folder, config, resume=resume)
        ranks.require_same(what_is_learned(config))
        with ranks.together():
            ranks = ranks.with_copies(config.training.expert_copies)  # all of them can, or none
        with ranks.together():
            require_memory_for(config, ranks)
        if config.training.exchange == "by_node":
            ranks = ranks.over_nodes(os.environ)
        with ranks.together():
            reporter = make_reporter(config, folder, console, ranks)
            run = Run(task, folder, reporter, ranks)
        # Whatever can be wrong with what was asked for has been found: only now is something made.
        with ranks.together():
            if ranks.is_first:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(run_lock(folder))
                check_run_folder(folder, config, resume=resume)
                write_run_folder(folder, config, task.dataset)
        stack.enter_context(reporter)
        if config.training.background_saves:
            # The writer's thread calls its like on the other ranks while this thread does the same.
            run.writing = ranks.beside()
        stack.enter_context(run.writer)
        stop = stack.enter_context(stop_requests())
        run.resume_or_start()
        asked = ranks.agree(stop())
        while not run.finished and not asked:
            run.step()
            if run.evaluation_is_due():
                run.evaluate()
            asked = ranks.agree(stop())
            if run.save_is_due() or asked:
                run.save()
        run.finish_saving()
        return TrainResult(
            folder=folder,
            config=config,
            state=run.state,
            evaluation=run.last_evaluation,
            stopped_by="" if run.finished else asked,
        )


def make_reporter(
    config: RunConfig, folder: Path, console: Console | None, ranks: Ranks
) -> Reporter | Silence:
    """The first rank reports."""
    if not ranks.is_first:
        return Silence()
    return Reporter(
        folder=folder,
        total_steps=config.training.steps,
        name=config.name,
        log_every=config.training.log_every,
        console=console,
        expert_ranks=ranks.share.num_ranks,
    )


class Run:
    """A run in progress: the verbs of the loop, which all ranks do together."""

    def __init__(
        self, task: Task[Any], folder: Path, reporter: Reporter | Silence, ranks: Ranks = ALONE
    ) -> None:
        self.task = task
        self.config = task.config
        self.folder = folder
        self.reporter = reporter
        self.ranks = ranks
        self.state = make_state(self.config, ranks)
        task.require_measurable(self.state.model)
        if self.config.training.init_from and not saved_steps(folder):
            source = Path(self.config.training.init_from)
            start = import_into if source.is_file() else start_from
            start(self.state, source, task.dataset)
        self.saved: list[int] = []
        self.pointed_at = 0  # by the folder, as the best step; 0: no step
        self.writer = Background()
        self.writing = ranks
        self.last_evaluation: Measured | None = None
        self.has_told_of_explosion = False

    @property
    def finished(self) -> bool:
        return self.state.progress.step >= self.config.training.steps

    def resume_or_start(self) -> None:
        """Take over the newest complete checkpoint, where there is one."""
        warnings: list[str] = []
        with self.ranks.together():
            newest = latest_on_ranks(checkpoints_of(self.folder), warn=warnings.append, ranks=self.ranks)
            if newest is not None:
                self.state.load(newest)
        progress = self.state.progress
        # Later ones are damaged, or it would have gone on from them: they take no good one's place.
        self.saved = [step for step in saved_steps(self.folder) if step <= progress.step]
        if progress.best_step not in self.saved:
            progress.best_step = 0  # it went for the sake of a later one
        self._point_at_best((progress.best_step, progress.best_nll), self.ranks)
        # Also at step 0: the run may have died before its first checkpoint.
        with self.ranks.together():
            self.reporter.resume_at(progress.step, next_batch=progress.batch_index)
        if self.state.model.sees_later_tokens() and progress.step == 0:
            warnings.append(
                "in training the gate chooses among tokens: which experts a token gets depends on the tokens "
                "after it, and the model may learn to read the future from that"
            )
        for message in warnings:
            self.reporter.event("warning", message=message)

    def step(self) -> None:
        """One batch: an update of the weights, or nothing where its loss or gradient is not finite."""
        progress = self.state.progress
        while progress.batch_index in self.config.training.skip_batches:
            progress.batch_index += 1
        rate = self._learning_rate()
        gradient = self._gradient(progress.batch_index, rate)
        progress.batch_index += 1
        if gradient.finite:
            self._update(gradient, rate)
        else:
            self._skip(gradient, progress.batch_index - 1)

    def _learning_rate(self) -> float:
        """Of the next step."""
        optim = self.config.optim
        return warmup_then_inverse_sqrt(
            step=self.state.progress.step + 1,
            peak=optim.learning_rate,
            warmup_steps=optim.warmup_steps,
            constant_steps=optim.constant_steps,
        )

    def _gradient(self, batch_index: int, rate: float) -> Gradient:
        """Of one batch. NonFinite: it is not finite, and some experts have been updated already."""
        model, factored = self.state.model, self.state.factored
        set_learning_rate(self.state.optimizers, rate)  # the backward pass may update
        parts = self.task.parts(model, batch_index, self.state.carried, self.ranks)
        try:
            gradient = compute_gradient(model, parts, self.config, self.ranks)
            if not gradient.finite and factored is not None and factored.has_begun:
                raise FloatingPointError
        except FloatingPointError:
            raise NonFinite(
                f"the gradient of batch {batch_index} (step {self.state.progress.step}) was not finite, "
                "which showed after experts had been updated by it; the last checkpoint is intact: go on "
                f"from it with training.skip-batches {batch_index}, or with optim.in-backward false"
            ) from None
        return gradient

    def _update(self, gradient: Gradient, rate: float) -> None:
        progress, model = self.state.progress, self.state.model
        self._tell_of_explosion(gradient.norm)
        # A rank's experts without tokens have gradients of zero, which comes to the same.
        if self.state.factored is not None and self.ranks.mesh is None:
            self.state.factored.only(model.used_experts(gradient.sums))
        clip_norm = self.config.optim.clip_norm
        apply_gradient(model, self.state.optimizers, gradient, learning_rate=rate, clip_norm=clip_norm)
        model.after_step(gradient.sums)
        self.state.carried = gradient.state
        progress.step += 1
        progress.tokens += gradient.num_tokens
        progress.skipped_in_a_row = 0
        self.reporter.step(
            progress.step,
            {
                "loss": gradient.nll,
                "balance": gradient.balance,
                "grad_norm": gradient.norm,
                "learning_rate": rate,
                "tokens": gradient.num_tokens,
            },
            gradient.sums,
        )

    def _tell_of_explosion(self, norm: float) -> None:
        """Once: clipping hides it, and a loss that stops falling is all that is seen."""
        clip_norm = self.config.optim.clip_norm
        if norm > _EXPLODED * max(1.0, clip_norm) and not self.has_told_of_explosion:
            self.has_told_of_explosion = True
            message = (
                f"step {self.state.progress.step + 1} has a gradient of norm {norm:.1e}, which "
                f"optim.clip-norm cuts to {clip_norm:g}: it explodes; look at grad_norm in the log, and "
                "try a lower optim.learning-rate; projected LSTMs do so on long sentences"
            )
            self.reporter.event("warning", message=message)

    def _skip(self, gradient: Gradient, batch_index: int) -> None:
        progress = self.state.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self.reporter.event(
            "skipped", batch=batch_index, loss=gradient.nll, balance=gradient.balance, grad_norm=gradient.norm
        )
        if progress.skipped_in_a_row >= self.config.training.max_nonfinite:
            raise NonFinite(
                f"loss or gradient was not finite in {progress.skipped_in_a_row} batches in a row, the last "
                f"of them batch {batch_index} (step {progress.step}, loss {gradient.nll}, gradient norm "
                f"{gradient.norm}); lower optim.learning-rate ({self.config.optim.learning_rate}); the last "
                "checkpoint is intact"
            )

    def _due(self, every: int) -> bool:
        progress = self.state.progress
        return progress.skipped_in_a_row == 0 and (progress.step % every == 0 or self.finished)

    def evaluation_is_due(self) -> bool:
        return self._due(self.config.training.evaluate_every)

    def save_is_due(self) -> bool:
        """An evaluation is saved as well, so that the best one has its checkpoint."""
        return self._due(self.config.training.checkpoint_every) or self.evaluation_is_due()

    def evaluate(self) -> None:
        """Measure on the validation split, and remember the best."""
        with self.reporter.doing("evaluating"):
            result = self.task.evaluate(self.state.model, self.ranks)
        metrics, progress = result.metrics(), self.state.progress
        # Where every rank has measured the whole split, rounding may differ.
        loss = self.ranks.of_first(metrics["loss"])
        better = not progress.best_step or loss < progress.best_nll
        if better and math.isfinite(loss):
            progress.best_step, progress.best_nll = progress.step, loss
        self.last_evaluation = result
        self.reporter.evaluation(progress.step, metrics)

    def save(self) -> None:
        """Write a checkpoint, or begin to; keep the newest ones and the best."""
        progress = self.state.progress
        newest = [step for step in self.saved if step != progress.step]
        newest = newest[: self.config.training.keep_checkpoints - 1]
        keep, best = {*newest, progress.best_step}, (progress.best_step, progress.best_nll)
        with self.reporter.doing("saving"):
            self.finish_saving()
            snapshot = self.state.snapshot()
            if self.config.training.background_saves:
                copy = snapshot.copy()
                self.writer.start(lambda: self._write(copy, keep, best))
            else:
                self._write(snapshot, keep, best)
        self.saved = [progress.step, *newest]

    def _write(self, snapshot: Snapshot, keep: set[int], best: tuple[int, float]) -> None:
        checkpoints = checkpoints_of(self.folder)
        with self.writing.together():
            # Whenever it is read, the pointer names a checkpoint that is there.
            snapshot.write(checkpoints, keep={*keep, self.pointed_at}, ranks=self.writing)
        self._point_at_best(best, self.writing)
        if self.ranks.is_first:
            delete_others(checkpoints, {snapshot.step, *keep})

    def finish_saving(self) -> None:
        """Wait until the checkpoint that was begun is written. CannotSave where it could not be."""
        self.writer.finish()

    def _point_at_best(self, best: tuple[int, float], ranks: Ranks) -> None:
        """best: step and loss."""
        step, nll = best
        with ranks.together():
            if ranks.is_first:
                write_best(self.folder, step=step, nll=nll)
        self.pointed_at = step
