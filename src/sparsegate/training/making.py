"""A fresh state: the model with the weights that the seed gives or another run had, and its optimizers."""

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import nn

from ..models import LayeredModel, build
from ..models.holding import Everything
from ..moe.kernels.choice import without_triton
from ..optim.factored import FactoredAdam
from ..optim.rows import RowAdam
from ..parallel.distribute import gather_selection, names_in_one_process
from ..parallel.holding import HoldingOfRank
from ..parallel.meshes import EXPERT
from .checkpoint import checkpoint_name, latest_checkpoint
from .config import RunConfig
from .noise import Draw, derived_seed
from .ranks import ALONE, Ranks
from .run_folder import RunDataset, checkpoints_of, read_best, read_run_config, read_vocabulary
from .state import TrainState
from .step import RATE


def make_state(config: RunConfig, ranks: Ranks = ALONE) -> TrainState:
    """A fresh model with the weights that the seed gives, and its optimizers; of experts the rank's own.

    ValueError: fewer experts than ranks, or options that are for one process.
    """
    model = make_model(config, ranks, device=resolve_device(config.training.device))
    freeze(model, config.training.freeze)
    if not config.training.init_from:
        require_trainable_thresholds(model)
    return replace(with_optimizers(model, config), ranks=ranks)


def make_model(config: RunConfig, ranks: Ranks, *, device: torch.device) -> LayeredModel:
    """What the rank holds of a fresh model: nothing else is ever allocated.

    Its weights are the same on every device. Experts are made where they stay; the rest, which is small, is
    made on the CPU and moved.
    """
    torch.manual_seed(derived_seed(Draw.WEIGHTS, config.seed))
    given_on = torch.device("meta" if device.type == "meta" else "cpu")
    kernel = _kernel(config, device)
    if ranks.mesh is None or ranks.expert_mesh is None:
        holding = Everything(experts_on=device, kernel=kernel)
        return build(config.model, device=given_on, holding=holding).to(device).train()
    shares_words = config.training.vocabulary == "sharded"
    if config.optim.in_backward:
        raise ValueError("optim.in-backward: is for one process; leave it out, or start without torchrun")
    if config.optim.tables == "rows" and not shares_words:
        raise ValueError(
            "optim.tables (rows): is for one process, or for training.vocabulary sharded; set the latter"
        )
    if config.optim.tables == "rows" and ranks.copies is not None:
        raise ValueError(
            "optim.tables (rows): gradients of rows are not added up over training.expert-copies; use adam"
        )
    holding = HoldingOfRank(
        ranks.expert_mesh[EXPERT],
        nodes=ranks.nodes,
        num_pieces=config.training.exchange_pieces,
        shares_words=shares_words,
        experts_on=device,
        kernel=kernel,
    )
    model = build(config.model, device=given_on, holding=holding).to(device)
    if config.training.selection == "gathered":
        gather_selection(model, ranks.mesh)
    return model.train()


def _kernel(config: RunConfig, device: torch.device) -> str | None:
    """What experts and gates are asked to compute with. ValueError: it is not for this device."""
    if config.training.kernels == "auto" or device.type == "meta":
        return None
    if (reason := without_triton(device.type)) is not None:
        raise ValueError(f"training.kernels ({config.training.kernels}): {reason}; use auto")
    return config.training.kernels


def with_optimizers(model: LayeredModel, config: RunConfig) -> TrainState:
    """Adam for all that is trained, but for experts and tables that have optimizers of their own."""
    optim = config.optim
    rate, betas, eps = optim.learning_rate, (optim.beta1, optim.beta2), optim.epsilon
    experts = _trained(model.expert_parameters() if optim.experts == "factored" else [])
    tables = _trained(model.use_sparse_gradients() if optim.tables == "rows" else [])
    others = {*experts, *tables}
    optimizers: list[torch.optim.Optimizer] = []
    if dense := [p for p in _trained(model.parameters()) if p not in others]:
        fused = not dense[0].is_meta  # there is no such form of it
        of_experts = {*model.expert_parameters()}
        groups = [
            {"params": [p for p in dense if p not in of_experts]},
            {"params": [p for p in dense if p in of_experts], RATE: optim.expert_rate},
        ]
        groups = [group for group in groups if group["params"]]
        optimizers.append(torch.optim.Adam(groups, lr=rate, betas=betas, eps=eps, fused=fused))
    if tables:
        optimizers.append(RowAdam(tables, lr=rate, beta1=optim.beta1, beta2=optim.beta2, eps=eps))
    factored = None
    if experts:
        seed = derived_seed(Draw.ROUNDING, config.seed) if optim.rounding == "stochastic" else None
        group = {"params": experts, RATE: optim.expert_rate}
        factored = FactoredAdam([group], lr=rate, beta2=optim.beta2, eps=eps, rounding_seed=seed)
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
    in_one_process = names_in_one_process(model)
    names = [in_one_process[name] for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(
                f"training.freeze ({pattern}): no parameter has this name; there are {', '.join(names)}"
            )
    for name, parameter in zip(names, model.parameters(), strict=True):
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


def start_from(state: TrainState, run: Path, dataset: RunDataset) -> None:
    """Take over the weights of another run: its best checkpoint, or the newest where none has been evaluated.

    ValueError: it is no run, has no checkpoint, another model, or another vocabulary than the dataset.
    """
    dataset.require_vocabulary(read_vocabulary(run, read_run_config(run)))
    checkpoints = checkpoints_of(run)
    best = read_best(run)
    path = checkpoints / checkpoint_name(best) if best is not None else latest_checkpoint(checkpoints)
    if path is None:
        raise ValueError(f"training.init-from ({run}): has no checkpoint; train it first")
    state.load_weights(path)
