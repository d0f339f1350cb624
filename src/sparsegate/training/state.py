"""What changes while a run goes on, and its way into a checkpoint and back."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..models import LayeredModel
from ..optim.factored import ON_CPU, FactoredAdam
from .checkpoint import Checkpoint, save_checkpoint
from .overrides import from_json


@dataclass(kw_only=True)
class Progress:
    """Counters of a run.

    step: updates made. batch_index: next batch; ahead of `step` where batches were skipped. tokens: trained
    on. skipped: batches with a non-finite loss or gradient. skipped_in_a_row: of these, since the last good
    one. best_step, best_nll: the best evaluation so far; no evaluation yet: best_step 0.
    """

    step: int = 0
    batch_index: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_step: int = 0
    best_nll: float = 0.0


@dataclass(kw_only=True)
class TrainState:
    """Model, optimizers, counters, and the recurrent state that continuous text carries on.

    optimizers: each parameter that is trained belongs to one of them. factored: the one of these that has the
    experts, where it is that of appendix D.
    """

    model: LayeredModel
    optimizers: Sequence[torch.optim.Optimizer]
    factored: FactoredAdam | None = None
    progress: Progress = field(default_factory=Progress)
    carried: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def save(self, directory: Path, *, keep: Collection[int]) -> Path:
        """Write a checkpoint of this state, whole or not at all; see `save_checkpoint` for the errors."""
        carried = {
            f"{name}.{part}": t
            for name, pair in self.carried.items()
            for part, t in zip("hc", pair, strict=True)
        }
        return save_checkpoint(
            directory,
            step=self.progress.step,
            tensors={
                "model": self.model.state_dict(),
                "optimizer": _optimizer_tensors(self.model, self.optimizers),
                "state": carried,
            },
            state=asdict(self.progress),
            keep=keep,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become the state that was saved, bit for bit."""
        device = self.model.softmax.weight.device
        load_weights(self.model, checkpoint.tensors["model"], where="checkpoint")
        _load_optimizer_tensors(self.model, self.optimizers, checkpoint.tensors["optimizer"])
        carried = checkpoint.tensors["state"]
        names = dict.fromkeys(name.rpartition(".")[0] for name in carried)
        self.carried = {n: (carried[f"{n}.h"].to(device), carried[f"{n}.c"].to(device)) for n in names}
        self.progress = from_json(Progress, checkpoint.state)


def load_weights(model: torch.nn.Module, tensors: dict[str, Tensor], *, where: str) -> None:
    """Copy named tensors into a model: every parameter, of its own shape; ValueError names the first bad one.

    where: what the tensors came from, for the message.
    """
    own = model.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors or name not in own:
            raise ValueError(
                f"{where}: {name} is {'missing' if name in own else 'unknown to this model'}; "
                "the model's configuration is not the one these weights were made with"
            )
        if own[name].shape != tensors[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {list(tensors[name].shape)}, this model's has "
                f"{list(own[name].shape)}; the vocabulary or the configuration differs"
            )
    model.load_state_dict(tensors)


def _optimizer_tensors(model: LayeredModel, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state under the names of the parameters it belongs to: `NAME/exp_avg`."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer_tensors(
    model: LayeredModel, optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        by_parameter.setdefault(name, {})[key] = value
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        stays = () if _step_on_device(optimizer) else ON_CPU
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if stored := by_parameter.get(names[parameter]):
                optimizer.state[parameter] = {
                    key: value if key in stays else value.to(parameter.device)
                    for key, value in stored.items()
                }


def _step_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Fused optimizers count their steps on the device of the parameters, others on the CPU."""
    return bool(optimizer.defaults.get("fused"))
