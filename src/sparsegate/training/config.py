"""What a run is: one frozen configuration, saved beside what it made."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..models import ModelConfig
from ..models.gates import trains_thresholds
from ..models.translation import Translation


def option(doc: str, default: Any) -> Any:
    """A field of a configuration that has a default, with the line that explains it."""
    return field(default=default, metadata={"doc": doc})


def require(condition: bool, name: str, value: object, what: str) -> None:
    """Refuse a field's value in one line."""
    if not condition:
        raise ValueError(f"{name} ({value}) must be {what}")


@dataclass(frozen=True, kw_only=True)
class ContinuousConfig:
    """Text as a few endless streams, with the LSTMs' state carried on."""

    context: ClassVar[Literal["stream", "sentence"]] = "stream"

    kind: Literal["continuous"] = "continuous"
    batch_size: int = option("streams that run side by side", 32)
    num_steps: int = option("tokens of each stream in a batch", 32)

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batches.batch-size", self.batch_size, "at least 1")
        require(self.num_steps >= 1, "batches.num-steps", self.num_steps, "at least 1")


@dataclass(frozen=True, kw_only=True)
class SentencesConfig:
    """Shuffled sentences, each from a fresh state: the paper's batches."""

    context: ClassVar[Literal["stream", "sentence"]] = "sentence"

    kind: Literal["sentences"] = "sentences"
    batch_words: int = option("tokens in a batch, about", 4096)
    max_length: int = option("longer sentences are cut into pieces of this many tokens", 128)

    def __post_init__(self) -> None:
        require(self.max_length >= 1, "batches.max-length", self.max_length, "at least 1")
        require(
            self.batch_words >= self.max_length,
            "batches.batch-words",
            self.batch_words,
            f"at least batches.max-length ({self.max_length})",
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Shuffled pairs of sentences, those of about equal length together: for translation models."""

    context: ClassVar[Literal["stream", "sentence"]] = "sentence"

    kind: Literal["parallel"] = "parallel"
    batch_subwords: int = option(
        "positions that the padded sources of a batch have at most, and its padded targets", 4096
    )
    pairs: tuple[str, ...] = option("pairs of languages, such as en-fr; all of the dataset's if empty", ())
    temperature: float = option(
        "how pairs of languages are mixed: in proportion to their sizes to the power of 1/temperature", 1.0
    )

    def __post_init__(self) -> None:
        require(self.batch_subwords >= 1, "batches.batch-subwords", self.batch_subwords, "at least 1")
        require(1 <= self.temperature <= 1000, "batches.temperature", self.temperature, "from 1 to 1000")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the balance losses, which are added for each mixture layer, and label smoothing."""

    importance: float = option("weight of the importance loss (eq. 7)", 0.1)
    load: float = option("weight of the load loss (eq. 11)", 0.1)
    switch: float = option("weight of Switch's balance loss, for gates without noise", 0.0)
    z: float = option("weight of the z-loss, which keeps the gate's logits small", 0.0)
    threshold: float = option("weight of the loss that trains the thresholds of balanced gates (eq. 20)", 1.0)
    label_smoothing: float = option(
        "share of each target that is spread evenly over the vocabulary, in training translation models", 0.0
    )

    def __post_init__(self) -> None:
        for name in ("importance", "load", "switch", "z", "threshold"):
            require(getattr(self, name) >= 0, f"losses.{name}", getattr(self, name), "at least 0")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "losses.label-smoothing", smoothing, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam, a linear warm-up, a constant rate, then 1/sqrt(step). The paper states the schedule and leaves
    the rest open."""

    experts: Literal["adam", "factored"] = option(
        "optimizer of the experts' weights: Adam, or the paper's with factored second moments and no first "
        "ones, which needs hardly any memory (appendix D)",
        "adam",
    )
    in_backward: bool = option(
        "update experts within the backward pass, each when its gradient is made, so that these gradients, "
        "as large as all experts, never exist together; clip_norm is then that of all other gradients",
        False,
    )
    rounding: Literal["nearest", "stochastic"] = option(
        "of updated experts that are kept in bfloat16: to the nearest number, in which small steps are lost, "
        "or up or down at random, with the exact value as the mean",
        "nearest",
    )
    tables: Literal["adam", "rows"] = option(
        "optimizer of the embedding and of a sampled softmax's weights: Adam, which rewrites all of them at "
        "every step, or one for the rows of the words in the batch, with one second moment for each row",
        "adam",
    )
    learning_rate: float = option("at the end of the warm-up, its greatest value", 1e-3)
    expert_rate: float = option(
        "the experts' learning rate over that of everything else: each of many sees few tokens in a batch",
        1.0,
    )
    warmup_steps: int = option("steps of linear warm-up", 1000)
    constant_steps: int = option("steps after the warm-up before the rate falls", 0)
    beta1: float = option("Adam's decay of the mean gradient", 0.9)
    beta2: float = option("Adam's decay of the mean squared gradient", 0.999)
    epsilon: float = option("Adam's term against division by zero", 1e-8)
    clip_norm: float = option("gradients are scaled down to this global norm", 1.0)

    def __post_init__(self) -> None:
        if self.experts != "factored":
            require(not self.in_backward, "optim.in-backward", "true", "false, or optim.experts factored")
            require(
                self.rounding == "nearest",
                "optim.rounding",
                self.rounding,
                "nearest, or optim.experts factored",
            )
        require(self.learning_rate > 0, "optim.learning-rate", self.learning_rate, "above 0")
        require(self.expert_rate > 0, "optim.expert-rate", self.expert_rate, "above 0")
        require(self.warmup_steps >= 0, "optim.warmup-steps", self.warmup_steps, "at least 0")
        require(self.constant_steps >= 0, "optim.constant-steps", self.constant_steps, "at least 0")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            require(0 <= beta < 1, f"optim.{name}", beta, "at least 0 and below 1")
        require(self.epsilon > 0, "optim.epsilon", self.epsilon, "above 0")
        require(self.clip_norm > 0, "optim.clip-norm", self.clip_norm, "above 0")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, in what precision, and what is kept."""

    steps: int = option("updates of the weights in all", 10_000)
    micro_batches: int = option(
        "parts of a batch that go through the model one after the other, to save memory", 1
    )
    balance: Literal["batch", "micro_batch"] = option(
        "what the balance losses are computed over: the whole batch, exactly, at the cost of a second "
        "forward pass when there are several micro-batches; or each micro-batch by itself, a stricter loss",
        "batch",
    )
    selection: Literal["rank", "gathered"] = option(
        "on several processes, what a gate that chooses over the batch chooses among: the tokens of each "
        "process, or of all, as one process would",
        "rank",
    )
    expert_copies: int = option(
        "on several processes, copies of all experts, each shared by as many processes as there are for it: "
        "tokens travel among these alone, and the copies' gradients are added up",
        1,
    )
    exchange: Literal["direct", "by_node"] = option(
        "on several machines, how tokens travel to their experts: to each process straight, or once to each "
        "machine and on from there, which sends less between machines and more within",
        "direct",
    )
    exchange_pieces: int = option(
        "pieces that each process's tokens are cut into, so that one travels to its experts while another is "
        "computed; batches of experts are smaller by as much",
        1,
    )
    vocabulary: Literal["replicated", "sharded"] = option(
        "on several processes, whether each has the whole embedding and softmax of a language model, or a "
        "share of their words",
        "replicated",
    )
    timeout: float = option(
        "seconds that a process waits for the others, before all end and can be started again", 100.0
    )
    precision: Literal["float32", "bfloat16"] = option(
        "of the products; weights and sums stay float32", "float32"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto: cuda where there is one", "auto")
    kernels: Literal["auto", "triton"] = option(
        "of experts and gates: those that suit the device, or on a GPU the ones written in Triton where "
        "there are such; these are not yet chosen by themselves, as no GPU has run them",
        "auto",
    )
    evaluate_every: int = option("steps between evaluations on the validation split", 1000)
    bleu_sentences: int = option(
        "validation sentences of each pair of languages that an evaluation translates, greedily, to measure "
        "BLEU (needs sacrebleu); 0: none",
        0,
    )
    checkpoint_every: int = option("steps between checkpoints", 500)
    background_saves: bool = option(
        "write checkpoints while training goes on, from a copy of weights and optimizer in the host's memory",
        False,
    )
    keep_checkpoints: int = option("newest checkpoints that are kept, beside the best", 2)
    log_every: int = option("steps between lines of the log", 20)
    max_nonfinite: int = option(
        "steps with a non-finite loss or gradient in a row after which the run stops", 10
    )
    skip_batches: tuple[int, ...] = option("batches (by index) that are left out", ())
    init_from: str = option(
        "run folder, or file of `sparsegate export`, whose weights training starts from (fine-tuning)", ""
    )
    freeze: tuple[str, ...] = option("parameters that stay as they are, by name (* stands for anything)", ())

    def __post_init__(self) -> None:
        require(self.timeout > 0, "training.timeout", self.timeout, "above 0")
        positive = (
            "steps micro_batches expert_copies exchange_pieces evaluate_every checkpoint_every "
            "keep_checkpoints log_every max_nonfinite"
        )
        for name in positive.split():
            require(
                getattr(self, name) >= 1,
                f"training.{name.replace('_', '-')}",
                getattr(self, name),
                "at least 1",
            )
        require(self.bleu_sentences >= 0, "training.bleu-sentences", self.bleu_sentences, "at least 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on, beside the text itself."""

    name: str = field(metadata={"doc": "of the recipe"})
    data: str = option("folder of the dataset, made by `sparsegate prepare`", "")
    data_fingerprint: str = option("of the dataset; filled in when training starts", "")
    vocabulary_fingerprint: str = option("of its vocabulary; filled in when training starts", "")
    seed: int = option("of the weights, the batches, the dropout and the gates' noise", 1)
    model: ModelConfig = field(metadata={"doc": "the model"})
    batches: ContinuousConfig | SentencesConfig | ParallelConfig = option("the batches", ContinuousConfig())
    losses: LossConfig = option("the balance losses", LossConfig())
    optim: OptimConfig = option("the optimizer", OptimConfig())
    training: TrainingConfig = option("the course of the run", TrainingConfig())

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        if any(map(trains_thresholds, self.model.gates())):
            require(
                self.losses.threshold > 0,
                "losses.threshold",
                self.losses.threshold,
                "above 0 with a balanced gate, whose thresholds it trains for evaluation",
            )
        if isinstance(self.batches, ContinuousConfig):
            require(
                self.training.micro_batches <= self.batches.batch_size,
                "training.micro-batches",
                self.training.micro_batches,
                f"at most batches.batch-size ({self.batches.batch_size})",
            )
        self._require_large()
        if isinstance(self.model, Translation):
            self._require_translation()
        else:
            self._require_language_model()

    def _require_large(self) -> None:
        """What the options for large models need of each other."""
        if self.optim.in_backward:
            parts = self.training.micro_batches
            require(
                parts == 1, "training.micro-batches", parts, "1 with optim.in-backward, which updates in each"
            )
        if "bfloat16" in self.model.expert_dtypes():
            require(
                self.optim.experts == "factored",
                "optim.experts",
                self.optim.experts,
                "factored with model.expert-dtype bfloat16",
            )

    def _require_translation(self) -> None:
        tables = self.optim.tables
        require(tables == "adam", "optim.tables", tables, "adam with a translation model")
        words = self.training.vocabulary
        require(words == "replicated", "training.vocabulary", words, "replicated with a translation model")
        kind, smoothing = self.batches.kind, self.losses.label_smoothing
        require(kind == "parallel", "batches.kind", kind, "parallel with a translation model")
        require(
            not (smoothing and self.model.sampled_words),
            "losses.label-smoothing",
            smoothing,
            "0 with model.softmax-samples, as it needs the probabilities of all words",
        )

    def _require_language_model(self) -> None:
        kind = self.batches.kind
        require(kind != "parallel", "batches.kind", kind, "continuous or sentences with a language model")
        for name, value in (
            ("losses.label-smoothing", self.losses.label_smoothing),
            ("training.bleu-sentences", self.training.bleu_sentences),
        ):
            require(value == 0, name, value, "0 with a language model; it is for translation")
