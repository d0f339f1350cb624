"""What a language model is made of: one frozen dataclass per kind."""

from dataclasses import dataclass, field
from typing import Literal

from .gates import GateConfig, NoisyTopKGate
from .mixture import require_mixture


@dataclass(frozen=True, kw_only=True)
class Common:
    """What the paper's models have in common, and the relations that must hold between these."""

    vocab_size: int = field(metadata={"doc": "number of entries in the vocabulary; set by the dataset"})
    width: int = field(metadata={"doc": "of the embedding and of every layer's input and output"})
    lstm_units: int = field(metadata={"doc": "of each LSTM"})
    lstm_projection: int = field(
        default=0, metadata={"doc": "output width of each LSTM if it projects its units, else 0"}
    )
    lstm_bias: bool = field(
        default=False,
        metadata={"doc": "biases in the LSTMs; the paper's parameter counts leave no room for them"},
    )
    dropout: float = field(metadata={"doc": "share of each layer's outputs that is dropped in training"})
    softmax_samples: int = field(
        default=0,
        metadata={
            "doc": "words that a step of training tells targets from (sampled softmax, for large "
            "vocabularies, frequent words first; the training loss is then no likelihood); 0: all words, "
            "as of a vocabulary that has no more than these"
        },
    )
    softmax_cutoffs: tuple[int, ...] = field(
        default=(),
        metadata={
            "doc": "words at which clusters of rarer ones begin, each at a fourth of the width of the one "
            "before (adaptive softmax, for large vocabularies, frequent words first); none: a full softmax"
        },
    )

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "lstm_units"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name.replace('_', '-')} ({getattr(self, name)}) must be at least 1")
        if self.softmax_samples < 0:
            raise ValueError(
                f"model.softmax-samples ({self.softmax_samples}) must be at least 1, or 0 for all words"
            )
        if self.softmax_cutoffs and self.softmax_samples:
            raise ValueError(
                f"model.softmax-samples ({self.softmax_samples}) must be 0 with model.softmax-cutoffs, whose "
                "loss is over all words; add --model.softmax-samples 0"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout ({self.dropout}) must be at least 0 and below 1")
        if not 0 <= self.lstm_projection <= self.lstm_units:
            raise ValueError(
                f"model.lstm-projection ({self.lstm_projection}) must be at least 0 "
                f"and at most model.lstm-units ({self.lstm_units}); 0 is without a projection"
            )
        output = self.lstm_projection or self.lstm_units
        if output != self.width:
            raise ValueError(
                f"model.width ({self.width}) must equal the LSTMs' output ({output}), for the residual "
                f"connections; set model.lstm-projection {self.width} or model.lstm-units {self.width}"
            )

    @property
    def sampled_words(self) -> int:
        """`softmax_samples`, or 0 where the vocabulary has no more words: all are exact, and cost less."""
        return self.softmax_samples if self.softmax_samples < self.vocab_size else 0

    def gates(self) -> tuple[GateConfig, ...]:
        """Of all mixtures in the model."""
        return ()

    def expert_dtypes(self) -> tuple[str, ...]:
        """In which the experts of each mixture in the model are kept."""
        return ()


@dataclass(frozen=True, kw_only=True)
class MixtureLM(Common):
    """LSTM, mixture of experts, LSTM: the paper's language model."""

    kind: Literal["mixture"] = "mixture"
    num_experts: int = field(metadata={"doc": "E"})
    k: int = field(metadata={"doc": "experts per token"})
    hidden: int = field(metadata={"doc": "hidden width of each expert"})
    experts: Literal["feed_forward", "swiglu"] = field(
        default="feed_forward",
        metadata={"doc": "the paper's ReLU network of two products, or SwiGLU of three"},
    )
    gate: GateConfig = field(default=NoisyTopKGate(), metadata={"doc": "the gate"})
    capacity: float | None = field(
        default=None,
        metadata={
            "doc": "pairs that each expert takes, over its share in balance; none: no token is dropped"
        },
    )
    drop: Literal["last", "lightest"] = field(
        default="last", metadata={"doc": "which pairs a capacity drops: of the last tokens, or light ones"}
    )
    expert_dtype: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={"doc": "of the experts' weights as they are kept; products are in training.precision"},
    )
    recompute: bool = field(
        default=False,
        metadata={"doc": "the experts' hidden layers are computed again in backward instead of kept"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_mixture(self, where="model.")

    def gates(self) -> tuple[GateConfig, ...]:
        return (self.gate,)

    def expert_dtypes(self) -> tuple[str, ...]:
        return (self.expert_dtype,)


@dataclass(frozen=True, kw_only=True)
class FeedForwardLM(Common):
    """LSTM, one dense feed-forward network, LSTM: MoE-1-Wide and MoE-1-Deep."""

    kind: Literal["feed_forward"] = "feed_forward"
    hidden: tuple[int, ...] = field(metadata={"doc": "widths of the hidden ReLU layers"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(
                f"model.hidden ({self.hidden}) must name at least one layer of at least one unit"
            )


@dataclass(frozen=True, kw_only=True)
class RecurrentLM(Common):
    """LSTMs alone: 4xLSTM-512, LSTM-2048-512."""

    kind: Literal["recurrent"] = "recurrent"
    num_layers: int = field(metadata={"doc": "number of LSTMs"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers < 1:
            raise ValueError(f"model.num-layers ({self.num_layers}) must be at least 1")


LanguageModelConfig = MixtureLM | FeedForwardLM | RecurrentLM
