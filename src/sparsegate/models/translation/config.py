"""What a translation model is made of."""

from dataclasses import dataclass, field
from typing import Literal

from ..config import Common
from ..gates import GateConfig, NoisyTopKGate
from ..mixture import require_mixture


@dataclass(frozen=True, kw_only=True)
class MixtureBlock:
    """A mixture of experts before the last LSTM."""

    kind: Literal["moe"] = "moe"
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

    def require(self, *, where: str) -> None:
        """Refuse what cannot be built. where: what stands before its fields' names."""
        require_mixture(self, where=where)

    def gates(self) -> tuple[GateConfig, ...]:
        return (self.gate,)

    def expert_dtypes(self) -> tuple[str, ...]:
        return (self.expert_dtype,)


@dataclass(frozen=True, kw_only=True)
class DenseBlock:
    """A feed-forward network before the last LSTM: with k times an expert's hidden width it costs as much."""

    kind: Literal["dense"] = "dense"
    hidden: int = field(metadata={"doc": "width of the hidden ReLU layer"})

    def require(self, *, where: str) -> None:
        """As of a mixture."""
        if self.hidden < 1:
            raise ValueError(f"{where}hidden ({self.hidden}) must be at least 1")

    def gates(self) -> tuple[GateConfig, ...]:
        return ()

    def expert_dtypes(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class NoBlock:
    """Nothing before the last LSTM."""

    kind: Literal["none"] = "none"

    def require(self, *, where: str) -> None:
        """Nothing can be wrong with it."""

    def gates(self) -> tuple[GateConfig, ...]:
        return ()

    def expert_dtypes(self) -> tuple[str, ...]:
        return ()


BlockConfig = MixtureBlock | DenseBlock | NoBlock


@dataclass(frozen=True, kw_only=True)
class Translation(Common):
    """Encoder, attention, decoder: the paper's modified GNMT (appendix E)."""

    kind: Literal["translation"] = "translation"
    encoder_layers: int = field(
        default=3, metadata={"doc": "LSTMs of the encoder, the two directions of its first layer being two"}
    )
    decoder_layers: int = field(default=2, metadata={"doc": "LSTMs of the decoder"})
    bidirectional: bool = field(
        default=True,
        metadata={"doc": "whether the encoder's first layer reads in both directions, with an LSTM for each"},
    )
    encoder_block: BlockConfig = field(metadata={"doc": "what stands before the encoder's last LSTM"})
    decoder_block: BlockConfig = field(metadata={"doc": "what stands before the decoder's last LSTM"})
    attention: Literal["product", "additive"] = field(
        default="product", metadata={"doc": "the attention function of eq. 22, or GNMT's, eq. 21"}
    )
    attention_width: int = field(metadata={"doc": "n of eq. 21 and 22"})
    input_feeding: bool = field(
        default=False,
        metadata={
            "doc": "whether the decoder's first LSTM reads the context of the step before, step by step, "
            "and the others none"
        },
    )
    share_embedding: bool = field(
        default=True, metadata={"doc": "one embedding table for source and target; the paper has two"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.softmax_cutoffs:
            raise ValueError(
                f"model.softmax-cutoffs ({', '.join(map(str, self.softmax_cutoffs))}) must be none with a "
                "translation model, whose vocabulary of subwords is small"
            )
        least = 3 if self.bidirectional else 2
        if self.encoder_layers < least:
            raise ValueError(
                f"model.encoder-layers ({self.encoder_layers}) must be at least {least} with "
                f"model.bidirectional {str(self.bidirectional).lower()}: a layer on each side of the block"
            )
        if self.decoder_layers < 2:
            raise ValueError(
                f"model.decoder-layers ({self.decoder_layers}) must be at least 2: attention and the block "
                "stand between LSTMs"
            )
        if self.attention_width < 1:
            raise ValueError(f"model.attention-width ({self.attention_width}) must be at least 1")
        self.encoder_block.require(where="model.encoder-block.")
        self.decoder_block.require(where="model.decoder-block.")

    def gates(self) -> tuple[GateConfig, ...]:
        return (*self.encoder_block.gates(), *self.decoder_block.gates())

    def expert_dtypes(self) -> tuple[str, ...]:
        return (*self.encoder_block.expert_dtypes(), *self.decoder_block.expert_dtypes())
