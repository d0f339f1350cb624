"""The training loop: a run from its configuration to its last checkpoint."""

import math
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console

from ..data import ContinuousBatches, Dataset, SentenceBatches, load_vocabulary
from ..evaluation.perplexity import Evaluation, evaluate
from ..models import LanguageModel, build
from ..optim.factored import FactoredAdam
from ..optim.schedule import warmup_then_inverse_sqrt
from .checkpoint import checkpoint_name, latest_checkpoint, load_checkpoint
from .config import ContinuousConfig, OptimConfig, RunConfig
from .lock import run_lock
from .noise import Draw, derived_seed
from .reporter import Reporter
from .run_folder import (
    VOCABULARY,
    check_run_folder,
    checkpoints_of,
    for_dataset,
    read_best,
    read_run_config,
    saved_steps,
    write_best,
    write_run_folder,
)
from .signals import stop_requests
from .state import TrainState, load_weights
from .step import Gradient, NonFinite, apply_gradient, compute_gradient


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended. stopped_by: the signal that ended it before its last step, or ""."""

    folder: Path
    state: TrainState
    evaluation: Evaluation | None
    stopped_by: str


def train(
    config: RunConfig, *, folder: Path, resume: bool = False, console: Console | None = None
) -> TrainResult:
    """Train the model of a configuration on its dataset, into a folder.

    resume: go on from the newest complete checkpoint of the folder, or start if it has none. On a CPU the run
    then ends bit for bit as if it had never stopped. console: where progress is shown; None: nowhere.

    Raises ValueError and OSError for what the user can mend, CannotSave when a checkpoint cannot be written,
    and NonFinite after `training.max_nonfinite` non-finite batches in a row.
    """
    dataset = Dataset.open(Path(config.data))
    config = for_dataset(config, dataset)
    check_run_folder(folder, config, resume=resume)
    reporter = Reporter(
        folder=folder,
        total_steps=config.training.steps,
        name=config.name,
        log_every=config.training.log_every,
        console=console,
    )
    run = Run(config, dataset, folder, reporter)
    # Whatever can be wrong with what was asked for has been found: only now is something made.
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        check_run_folder(folder, config, resume=resume)
        write_run_folder(folder, config, dataset)
        with reporter, stop_requests() as stop:
            run.resume_or_start()
            while not run.finished and not stop():
                run.step()
                if run.evaluation_is_due():
                    run.evaluate()
                if run.save_is_due() or stop():
                    run.save()
            return TrainResult(
                folder=folder,
                state=run.state,
                evaluation=run.last_evaluation,
                stopped_by="" if run.finished else stop(),
            )


class Run:
    """A run in progress: the verbs of the loop. Single-process; ranks come in from outside."""

    def __init__(self, config: RunConfig, dataset: Dataset, folder: Path, reporter: Reporter) -> None:
        self.config = config
        self.folder = folder
        self.reporter = reporter
        self.dataset = dataset
        self.batches = make_batches(config, dataset)
        self.state = make_state(config)
        if config.training.init_from and not saved_steps(folder):
            start_from(self.state.model, Path(config.training.init_from), dataset)
        self.saved: list[int] = []
        self.last_evaluation: Evaluation | None = None

    @property
    def finished(self) -> bool:
        return self.state.progress.step >= self.config.training.steps

    def resume_or_start(self) -> None:
        """Take over the newest complete checkpoint, where there is one."""
        warnings: list[str] = []
        newest = latest_checkpoint(checkpoints_of(self.folder), warn=warnings.append)
        if newest is not None:
            self.state.restore(load_checkpoint(newest))
        progress = self.state.progress
        if progress.best_step:
            write_best(self.folder, step=progress.best_step, nll=progress.best_nll)
        # Later ones are damaged, or it would have gone on from them: they take no good one's place.
        self.saved = [step for step in saved_steps(self.folder) if step <= progress.step]
        # Also at step 0: the run may have died before its first checkpoint.
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
        batch = self.batches.batch(progress.batch_index)
        carried = self.state.carried if batch.carries_state else {}
        gradient = compute_gradient(self.state.model, batch, carried, self.config)
        progress.batch_index += 1
        if gradient.finite:
            self._update(gradient)
        else:
            self._skip(gradient, batch.index)

    def _update(self, gradient: Gradient) -> None:
        progress, optim = self.state.progress, self.config.optim
        rate = warmup_then_inverse_sqrt(
            step=progress.step + 1, peak=optim.learning_rate, warmup_steps=optim.warmup_steps
        )
        apply_gradient(
            self.state.model, self.state.optimizers, gradient, learning_rate=rate, clip_norm=optim.clip_norm
        )
        self.state.model.after_step(gradient.sums)
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
            result = evaluate(
                self.state.model,
                self.dataset.split("valid"),
                batch_size=16,
                num_steps=64,
                unknown_id=self.dataset.vocabulary.unknown_id,
                context=self.config.batches.context,
            )
        metrics, progress = result.metrics(), self.state.progress
        better = not progress.best_step or metrics["loss"] < progress.best_nll
        if better and math.isfinite(metrics["loss"]):
            progress.best_step, progress.best_nll = progress.step, metrics["loss"]
        self.last_evaluation = result
        self.reporter.evaluation(progress.step, metrics)

    def save(self) -> None:
        """Write a checkpoint; keep the newest ones and the best."""
        progress = self.state.progress
        newest = [step for step in self.saved if step != progress.step]
        newest = newest[: self.config.training.keep_checkpoints - 1]
        with self.reporter.doing("saving"):
            self.state.save(checkpoints_of(self.folder), keep={*newest, progress.best_step})
            if progress.best_step:
                write_best(self.folder, step=progress.best_step, nll=progress.best_nll)
        self.saved = [progress.step, *newest]


def make_batches(config: RunConfig, dataset: Dataset) -> ContinuousBatches | SentenceBatches:
    """The training split's batches, in the order that the configuration's seed gives."""
    token_file, batches = dataset.split("train"), config.batches
    if isinstance(batches, ContinuousConfig):
        return ContinuousBatches(
            token_file=token_file,
            batch_size=batches.batch_size,
            num_steps=batches.num_steps,
            seed=config.seed,
        )
    return SentenceBatches(
        token_file=token_file,
        batch_words=batches.batch_words,
        max_length=batches.max_length,
        seed=config.seed,
    )


def make_state(config: RunConfig) -> TrainState:
    """A fresh model with the weights that the seed gives, and its optimizers."""
    torch.manual_seed(derived_seed(Draw.WEIGHTS, config.seed))
    model = build(config.model).to(resolve_device(config.training.device))
    model.train()
    freeze(model, config.training.freeze)
    if not config.training.init_from:
        require_trainable_thresholds(model)
    return TrainState(model=model, optimizers=make_optimizers(model, config.optim))


def make_optimizers(model: LanguageModel, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Adam for all that is trained, or for all but the experts, which then have the factored one."""
    factored = set(model.expert_parameters()) if config.experts == "factored" else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers: list[torch.optim.Optimizer] = []
    if dense := [p for p in trained if p not in factored]:
        betas = (config.beta1, config.beta2)
        adam = torch.optim.Adam(dense, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)
        optimizers.append(adam)
    if experts := [p for p in trained if p in factored]:
        optimizers.append(
            FactoredAdam(experts, lr=config.learning_rate, beta2=config.beta2, eps=config.epsilon)
        )
    return optimizers


def resolve_device(device: str) -> torch.device:
    """auto: CUDA where there is one. ValueError where CUDA is asked for and there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device (cuda): this torch sees no GPU; use cpu or auto")
    return torch.device(device)


def freeze(model: LanguageModel, patterns: tuple[str, ...]) -> None:
    """Leave parameters whose names match as they are. ValueError where one matches none, or all match."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(
                f"training.freeze ({pattern}): no parameter has this name; there are {', '.join(names)}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatch(name, pattern) for pattern in patterns))
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"training.freeze ({', '.join(patterns)}): nothing is left to train; freeze less")


def require_trainable_thresholds(model: LanguageModel) -> None:
    """Refuse a fresh model whose thresholds are frozen: evaluation selects by them."""
    for name, parameter in model.named_parameters():
        if name.endswith("log_threshold") and not parameter.requires_grad:
            raise ValueError(
                f"training.freeze: would leave {name} untrained, by which evaluation selects; freeze less, "
                "or start from trained weights with training.init-from"
            )


def start_from(model: LanguageModel, run: Path, dataset: Dataset) -> None:
    """Copy the weights of another run: its best checkpoint, or the newest where none has been evaluated.

    ValueError: it is no run, has no checkpoint, another model, or another vocabulary than the dataset.
    """
    read_run_config(run)
    dataset.require_vocabulary(load_vocabulary(run / VOCABULARY))
    checkpoints = checkpoints_of(run)
    best = read_best(run)
    path = checkpoints / checkpoint_name(best) if best is not None else latest_checkpoint(checkpoints)
    if path is None:
        raise ValueError(f"training.init-from ({run}): has no checkpoint; train it first")
    load_weights(model, load_checkpoint(path).tensors["model"], where=str(path))
