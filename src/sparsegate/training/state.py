"""What changes while a run goes on, and its way into a checkpoint and back."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..models import LayeredModel
from ..optim.factored import ON_CPU, FactoredAdam
from ..parallel.distribute import names_in_one_process, word_parameters
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .overrides import from_json
from .rank_checkpoint import save_on_ranks
from .ranks import ALONE, Ranks
from .strict_json import Json
from .tensor_file import Targets


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
    experts, where it is that of appendix D. carried: of this rank's rows. ranks: that have the same state,
    but for each its experts and its rows.
    """

    model: LayeredModel
    optimizers: Sequence[torch.optim.Optimizer]
    factored: FactoredAdam | None = None
    progress: Progress = field(default_factory=Progress)
    carried: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    ranks: Ranks = ALONE

    def save(self, directory: Path, *, keep: Collection[int]) -> Path:
        """Write a checkpoint of this state, whole or not at all; see `save_checkpoint` for the errors."""
        return self.snapshot().write(directory, keep=keep, ranks=self.ranks)

    def snapshot(self) -> "Snapshot":
        """What a checkpoint is written of: the tensors themselves, not copies."""
        carried = {
            f"{name}.{part}": torch.cat(self.ranks.gather(t.transpose(0, 1))).transpose(0, 1)
            for name, pair in self.carried.items()
            for part, t in zip("hc", pair, strict=True)
        }
        weights = weights_of(self.model)
        optimizer = _optimizer_tensors(self.model, self.optimizers)
        groups = {
            "model": self._divide(weights, of=lambda name: name),
            "optimizer": self._divide(optimizer, of=lambda path: path.rpartition("/")[0]),
        }
        common = {group: common for group, (_, _, common) in groups.items()} | {"state": carried}
        rows = _all_rows if self.ranks.has_first_copy else _no_rows
        return Snapshot(
            step=self.progress.step,
            common=common if self.ranks.is_first else {},
            stacked={group: rows(experts) for group, (experts, _, _) in groups.items()},
            words={group: rows(words) for group, (_, words, _) in groups.items()},
            state=asdict(self.progress),
        )

    def load(self, path: Path) -> None:
        """Become the state of a checkpoint, bit for bit, whatever number of ranks wrote it.

        Weights are read into the model's own memory. ValueError: the state is then not to be used.
        """
        self.restore(self.ranks.however_long(lambda: self._read(path)))

    def load_weights(self, path: Path) -> None:
        """Take over the weights of a checkpoint, and nothing else."""
        self.take_weights(self._read(path, only=["model"]).tensors["model"], where=str(path))

    def take_weights(self, tensors: dict[str, Tensor], *, where: str) -> None:
        """Take over weights of all experts and words, or of this rank's; see `load_weights`."""
        load_weights(self.model, self._own_rows(tensors, of=lambda name: name), where=where)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become the state that was saved, bit for bit."""
        device = self.model.softmax.device
        self.take_weights(checkpoint.tensors["model"], where="checkpoint")
        optimizer = self._own_rows(checkpoint.tensors["optimizer"], of=lambda path: path.rpartition("/")[0])
        _load_optimizer_tensors(self.model, self.optimizers, optimizer)
        self.carried = {}
        carried = checkpoint.tensors["state"]
        for name in dict.fromkeys(name.rpartition(".")[0] for name in carried):
            rows = self.ranks.rows(carried[f"{name}.h"].shape[1])
            h, c = (carried[f"{name}.{part}"][:, rows.start : rows.stop].to(device) for part in "hc")
            self.carried[name] = (h, c)
        self.progress = from_json(Progress, checkpoint.state)

    def _read(self, path: Path, *, only: Collection[str] | None = None) -> Checkpoint:
        """Of experts, and of words where they are spread, this rank's. only: see `load_checkpoint`."""
        share = None if self.ranks.mesh is None else self.ranks.share
        return load_checkpoint(
            path,
            share=share,
            word_share=share if word_parameters(self.model) else None,
            only=only,
            targets={"model": into_weights(self.model)},
        )

    def _divide(
        self, tensors: dict[str, Tensor], *, of: Callable[[str], str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Those of experts, those of words that are spread, and what every rank has.

        of: the name of the parameter that a tensor belongs to.
        """
        if self.ranks.mesh is None:
            return {}, {}, tensors  # one process writes its experts among the rest
        experts = _names_of(self.model, self.model.expert_parameters())
        words = _names_of(self.model, word_parameters(self.model))

        def kind(name: str, tensor: Tensor) -> int:
            return 2 if not tensor.dim() else 0 if of(name) in experts else 1 if of(name) in words else 2

        first, second, third = ({n: t for n, t in tensors.items() if kind(n, t) == k} for k in range(3))
        return first, second, third

    def _own_rows(self, tensors: dict[str, Tensor], *, of: Callable[[str], str]) -> dict[str, Tensor]:
        """What one process wrote, or another layout, cut to this rank's experts and words."""
        experts = _names_of(self.model, self.model.expert_parameters())
        words = _names_of(self.model, word_parameters(self.model))
        share = self.ranks.share

        def cut(name: str, tensor: Tensor) -> Tensor:
            own = (experts | words).get(of(name))
            if own is None or not tensor.dim() or len(tensor) == own:
                return tensor
            if of(name) in words:
                return tensor[share.rank :: share.num_ranks].clone()
            rows = share.of(len(tensor))
            return tensor[rows.start : rows.stop].clone()

        return {name: cut(name, tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint is written of.

    common: what the first rank writes. stacked: this rank's experts. words: its words, where they are spread.
    A rank that has another copy than the first of these has no rows of them here.
    """

    step: int
    common: dict[str, dict[str, Tensor]]
    stacked: dict[str, dict[str, Tensor]]
    words: dict[str, dict[str, Tensor]]
    state: Mapping[str, Json]

    def copy(self) -> "Snapshot":
        """One that stays as it is while training goes on, in the host's memory."""
        return replace(
            self, common=_copies(self.common), stacked=_copies(self.stacked), words=_copies(self.words)
        )

    def write(self, directory: Path, *, keep: Collection[int], ranks: Ranks) -> Path:
        """The checkpoint, by all ranks together; see `save_checkpoint` and `save_on_ranks`."""
        if ranks.mesh is None:
            return save_checkpoint(
                directory, step=self.step, tensors=self.common, state=self.state, keep=keep
            )
        return save_on_ranks(
            directory,
            step=self.step,
            tensors=self.common,
            stacked=self.stacked,
            words=self.words,
            state=self.state,
            keep=keep,
            ranks=ranks,
        )


def _all_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def _no_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what another rank writes: the names alone."""
    return {name: tensor[:0] for name, tensor in tensors.items()}


def _copies(groups: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {
        group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A model's own weights and buffers, by their names in one process."""
    names = names_in_one_process(model)
    return {names[name]: value for name, value in model.state_dict().items()}


def into_weights(model: torch.nn.Module) -> Targets:
    """To read weights into a model's own memory, of those that are what it has by name and shape.

    `load_weights` of what was read tells of the others.
    """
    own = weights_of(model)

    def targets(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: own[name] for name in found if name in own and own[name].shape == found[name].shape}

    return targets


def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy named tensors into a model: every parameter, of its own shape; ValueError names the first bad one.

    What is in the model's own memory already stays there. where: what the tensors came from, for the message.
    """
    own = weights_of(model)
    require_weights(model, tensors, where=where)
    for name, value in own.items():
        if value.data_ptr() != tensors[name].data_ptr():
            value.copy_(tensors[name])


def require_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse tensors, of any device, that are not those of a model by name and shape."""
    own = weights_of(model)
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


def _optimizer_tensors(model: LayeredModel, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state under the names of the parameters it belongs to: `NAME/exp_avg`."""
    names = names_in_one_process(model)
    return {
        f"{names[name]}/{key}": value
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
    in_one_process = names_in_one_process(model)
    names = {parameter: in_one_process[name] for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        stays = () if _step_on_device(optimizer) else ON_CPU
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if stored := by_parameter.get(names[parameter]):
                optimizer.state[parameter] = {
                    key: value if key in stays else value.to(parameter.device)
                    for key, value in stored.items()
                }


def _names_of(model: LayeredModel, parameters: Iterable[torch.nn.Parameter]) -> dict[str, int]:
    """Names in one process of some parameters, and how many experts or words of them are here."""
    names, wanted = names_in_one_process(model), set(parameters)
    return {names[name]: len(p) for name, p in model.named_parameters() if p in wanted}


def _step_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Fused optimizers count their steps on the device of the parameters, others on the CPU."""
    return bool(optimizer.defaults.get("fused"))
