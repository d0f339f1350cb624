"""Small translation models of every kind, sentences for them, and the paper's formulas for the whole."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsegate.models.gates import BalancedGate, HierarchicalGate, NoisyTopKGate
from sparsegate.models.translation import (
    DenseBlock,
    MixtureBlock,
    NoBlock,
    Translation,
    TranslationModel,
    build_translation,
)

VOCAB_SIZE, WIDTH, HIDDEN = 11, 6, 5
BEGIN, END = 1, 2

MIXTURE = MixtureBlock(num_experts=5, k=2, hidden=4, gate=NoisyTopKGate())
BALANCED = replace(MIXTURE, gate=BalancedGate())
MIXTURES = Translation(
    vocab_size=VOCAB_SIZE,
    width=WIDTH,
    lstm_units=WIDTH,
    dropout=0.0,
    attention_width=HIDDEN,
    encoder_block=MIXTURE,
    decoder_block=MIXTURE,
)
HIERARCHY = MixtureBlock(num_experts=6, k=4, hidden=4, gate=HierarchicalGate(num_groups=3))
CONFIGS: dict[str, Translation] = {
    "mixtures": MIXTURES,
    "hierarchies": replace(MIXTURES, encoder_block=HIERARCHY, decoder_block=HIERARCHY),
    "one_way": replace(MIXTURES, bidirectional=False),
    "feeding": replace(MIXTURES, input_feeding=True),
    "additive": replace(MIXTURES, attention="additive", share_embedding=False),
    "dense": replace(MIXTURES, encoder_block=DenseBlock(hidden=7), decoder_block=DenseBlock(hidden=7)),
    "recurrent": replace(MIXTURES, encoder_block=NoBlock(), decoder_block=NoBlock(), lstm_bias=True),
    "projected": replace(
        MIXTURES,
        lstm_units=9,
        lstm_projection=WIDTH,
        encoder_layers=5,
        decoder_layers=4,
        encoder_block=NoBlock(),
    ),
}


def a_translator(config: Translation, *, dtype: torch.dtype = torch.float64) -> TranslationModel:
    """Gates' weights not zero and thresholds not where they start, as after some training."""
    model = build_translation(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            # Thresholds stay where probabilities are.
            torch.nn.init.normal_(parameter, mean=-2.0 if "threshold" in name else 0.0, std=0.5)
    return model


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Sentence pairs of random tokens: a batch as the model takes it."""

    source_BS: Tensor
    source_mask_BS: Tensor
    target_BS: Tensor
    target_mask_BS: Tensor
    label_BS: Tensor

    def inputs(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if name != "label_BS"}

    def alone(self, row: int) -> "Pairs":
        """One pair without padding; an empty source keeps one masked token."""
        length = {
            side: max(1, int(getattr(self, f"{side}_mask_BS")[row].sum())) for side in ("source", "target")
        }
        return Pairs(
            **{
                name: value[row : row + 1, : length["source" if "source" in name else "target"]]
                for name, value in vars(self).items()
            }
        )


def some_pairs(source_lengths=(4, 2, 0, 3), target_lengths=(3, 5, 2, 1)) -> Pairs:
    """Labels are the tokens after the target's; the last is the end. Padding is filled with random tokens."""
    num_rows = len(source_lengths)

    def mask(lengths):
        return torch.arange(max(1, *lengths)) < torch.tensor(lengths)[:, None]

    target_mask_BS = mask(target_lengths)
    text_BS = torch.randint(3, VOCAB_SIZE, (num_rows, target_mask_BS.shape[1] + 1))
    text_BS[:, 0] = BEGIN
    label_BS = text_BS[:, 1:].clone()
    label_BS[torch.arange(num_rows), torch.tensor(target_lengths) - 1] = END
    source_mask_BS = mask(source_lengths)
    return Pairs(
        source_BS=torch.randint(3, VOCAB_SIZE, source_mask_BS.shape),
        source_mask_BS=source_mask_BS,
        target_BS=text_BS[:, :-1],
        target_mask_BS=target_mask_BS,
        label_BS=label_BS,
    )


def noise_for(model: TranslationModel, pairs: Pairs) -> dict[str, Tensor]:
    return {
        name: torch.randn(
            *(pairs.source_BS if name.startswith("encoder") else pairs.target_BS).shape,
            width,
            dtype=torch.float64,
        )
        for name, width in model.noise_widths().items()
    }


def a_talker(kind: str, *, vocab_size: int = 6, seed: int = 0, end_bias: float = 0.0) -> TranslationModel:
    """A translator of few words in training mode whose distributions are neither flat nor certain."""
    config = CONFIGS.get(kind) or replace(MIXTURES, encoder_block=BALANCED, decoder_block=BALANCED)
    torch.manual_seed(seed)
    model = a_translator(replace(config, vocab_size=vocab_size, dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lstm" in name or "attention" in name or "embedding" in name:
                parameter.copy_(torch.randn_like(parameter) * 2 * parameter.shape[-1] ** -0.5)
        model.softmax.weight.mul_(2.0)
        model.softmax.bias[END] += end_bias
    return model
