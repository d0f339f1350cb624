"""A fresh state: the model with the weights that the seed gives or another run had, and its optimizers."""

from fnmatch import fnmatch
from pathlib import Path

import torch

from ..data import load_vocabulary
from ..models import LayeredModel, build
from ..optim.factored import FactoredAdam
from ..parallel.distribute import spread_experts
from .checkpoint import checkpoint_name, latest_checkpoint, load_checkpoint
from .config import OptimConfig, RunConfig
from .noise import Draw, derived_seed
from .ranks import Ranks
from .run_folder import VOCABULARY, RunDataset, checkpoints_of, read_best, read_run_config
from .state import TrainState, load_weights


def make_state(config: RunConfig) -> TrainState:
    """A fresh model with the weights that the seed gives, and its optimizers."""
    torch.manual_seed(derived_seed(Draw.WEIGHTS, config.seed))
    model = build(config.model).to(resolve_device(config.training.device))
    model.train()
    freeze(model, config.training.freeze)
    if not config.training.init_from:
        require_trainable_thresholds(model)
    return TrainState(model=model, optimizers=make_optimizers(model, config.optim))


def over_ranks(state: TrainState, config: RunConfig, ranks: Ranks) -> TrainState:
    """The fresh state with this rank's experts alone. ValueError: fewer experts than ranks."""
    if ranks.mesh is None:
        return state
    if state.model.has_mixtures():
        spread_experts(state.model, ranks.mesh, selection=config.training.selection)
    return TrainState(model=state.model, optimizers=make_optimizers(state.model, config.optim), ranks=ranks)


def make_optimizers(model: LayeredModel, config: OptimConfig) -> list[torch.optim.Optimizer]:
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


def freeze(model: LayeredModel, patterns: tuple[str, ...]) -> None:
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


def require_trainable_thresholds(model: LayeredModel) -> None:
    """Refuse a fresh model whose thresholds are frozen: evaluation selects by them."""
    for name, parameter in model.named_parameters():
        if name.endswith("log_threshold") and not parameter.requires_grad:
            raise ValueError(
                f"training.freeze: would leave {name} untrained, by which evaluation selects; freeze less, "
                "or start from trained weights with training.init-from"
            )


def start_from(model: LayeredModel, run: Path, dataset: RunDataset) -> None:
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
