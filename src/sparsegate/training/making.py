"""A fresh state: the model with the weights that the seed gives or another run had, and its optimizers."""

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import nn

from ..models import LayeredModel, build
from ..optim.factored import FactoredAdam
from ..optim.rows import RowAdam
from ..parallel.distribute import spread_experts
from .checkpoint import checkpoint_name, latest_checkpoint, load_checkpoint
from .config import RunConfig
from .noise import Draw, derived_seed
from .ranks import Ranks
from .run_folder import RunDataset, checkpoints_of, read_best, read_run_config, read_vocabulary
from .state import TrainState, into_weights, load_weights


def make_state(config: RunConfig) -> TrainState:
    """A fresh model with the weights that the seed gives, and its optimizers."""
    torch.manual_seed(derived_seed(Draw.WEIGHTS, config.seed))
    model = build(config.model).to(resolve_device(config.training.device))
    model.train()
    freeze(model, config.training.freeze)
    if not config.training.init_from:
        require_trainable_thresholds(model)
    return with_optimizers(model, config)


def over_ranks(state: TrainState, config: RunConfig, ranks: Ranks) -> TrainState:
    """The fresh state with this rank's experts alone.

    ValueError: fewer experts than ranks, or options that are for one process.
    """
    if ranks.mesh is None:
        return state
    for name, value in (("in-backward", config.optim.in_backward), ("tables", config.optim.tables == "rows")):
        if value:
            raise ValueError(f"optim.{name}: is for one process; leave it out, or start without torchrun")
    if state.model.has_mixtures():
        spread_experts(
            state.model,
            ranks.mesh,
            selection=config.training.selection,
            nodes=ranks.nodes,
            num_pieces=config.training.exchange_pieces,
        )
    return replace(with_optimizers(state.model, config), ranks=ranks)


def with_optimizers(model: LayeredModel, config: RunConfig) -> TrainState:
    """Adam for all that is trained, but for experts and tables that have optimizers of their own."""
    optim = config.optim
    rate, betas, eps = optim.learning_rate, (optim.beta1, optim.beta2), optim.epsilon
    experts = _trained(model.expert_parameters() if optim.experts == "factored" else [])
    tables = _trained(model.use_sparse_gradients() if optim.tables == "rows" else [])
    others = {*experts, *tables}
    optimizers: list[torch.optim.Optimizer] = []
    if dense := [p for p in _trained(model.parameters()) if p not in others]:
        optimizers.append(torch.optim.Adam(dense, lr=rate, betas=betas, eps=eps, fused=True))
    if tables:
        optimizers.append(RowAdam(tables, lr=rate, beta1=optim.beta1, beta2=optim.beta2, eps=eps))
    factored = None
    if experts:
        seed = derived_seed(Draw.ROUNDING, config.seed) if optim.rounding == "stochastic" else None
        factored = FactoredAdam(experts, lr=rate, beta2=optim.beta2, eps=eps, rounding_seed=seed)
        optimizers.append(factored)
        if optim.in_backward:
            model.give_expert_gradients_to(factored)
    return TrainState(model=model, optimizers=optimizers, factored=factored)


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


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
    dataset.require_vocabulary(read_vocabulary(run, read_run_config(run)))
    checkpoints = checkpoints_of(run)
    best = read_best(run)
    path = checkpoints / checkpoint_name(best) if best is not None else latest_checkpoint(checkpoints)
    if path is None:
        raise ValueError(f"training.init-from ({run}): has no checkpoint; train it first")
    stored = load_checkpoint(path, only=["model"], targets={"model": into_weights(model)})
    load_weights(model, stored.tensors["model"], where=str(path))
