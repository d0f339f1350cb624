"""A small translation model learns to copy random sequences and to write them backwards, with beam search."""

import math
from dataclasses import replace

import pytest
import torch

from sparsegate.decoding import BeamSearch, TargetTokens, beam_search
from sparsegate.decoding.inference import evaluation_mode
from sparsegate.evaluation.translation import score
from sparsegate.models.gates import BalancedGate, HierarchicalGate
from sparsegate.models.translation import MixtureBlock, Translation, build_translation, token_losses
from sparsegate.moe.losses import importance_loss, load_loss, threshold_loss
from tests.helpers.translation_models import BEGIN, END, Pairs

VOCAB_SIZE, LONGEST, WIDTH = 20, 8, 48
TOKENS = TargetTokens(begin_id=BEGIN, end_id=END, never=(0,))
NOISY = MixtureBlock(num_experts=8, k=2, hidden=WIDTH)
MODEL = Translation(
    vocab_size=VOCAB_SIZE,
    width=WIDTH,
    lstm_units=WIDTH,
    lstm_bias=True,
    dropout=0.0,
    attention_width=WIDTH,
    encoder_block=NOISY,
    decoder_block=NOISY,
)


def with_gate(gate, k=2):
    block = replace(NOISY, gate=gate, k=k)
    return replace(MODEL, encoder_block=block, decoder_block=block)


def sequences(generator: torch.Generator, num_rows: int, *, backwards: bool) -> Pairs:
    """Random sequences of 1 to LONGEST tokens; the target is the source, or the source backwards."""
    length_B1 = torch.randint(1, LONGEST + 1, (num_rows, 1), generator=generator)
    step_S = torch.arange(LONGEST)
    source_mask_BS = step_S < length_B1
    source_BS = torch.randint(3, VOCAB_SIZE, (num_rows, LONGEST), generator=generator) * source_mask_BS
    from_BS = (length_B1 - 1 - step_S).clamp_min(0) if backwards else step_S.expand(num_rows, -1)
    copied_BS = source_BS.gather(1, from_BS) * source_mask_BS
    label_BS = torch.nn.functional.pad(copied_BS, (0, 1)).scatter(1, length_B1, END)
    return Pairs(
        source_BS=source_BS,
        source_mask_BS=source_mask_BS,
        target_BS=torch.nn.functional.pad(copied_BS, (1, 0), value=BEGIN),
        target_mask_BS=torch.arange(LONGEST + 1) <= length_B1,
        label_BS=label_BS,
    )


def losses_of(model, pairs):
    output = model(**pairs.inputs())
    losses = token_losses(model.softmax, output.hidden_BSD, pairs.label_BS, pairs.target_mask_BS)
    return losses, output.routings, pairs.target_mask_BS.sum()


def train(config: Translation, *, steps: int, backwards: bool):
    torch.manual_seed(0)
    model, generator = build_translation(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    # To nothing in the end: what a model is in mid-course, the last bits of a processor may decide.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps)
    )
    for _ in range(steps):
        losses, routings, num_tokens = losses_of(model, sequences(generator, 64, backwards=backwards))
        loss = losses.loss_BS.sum() / num_tokens
        for routing in routings.values():
            loss = loss + 0.01 * (importance_loss(routing) + load_loss(routing)) + threshold_loss(routing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def require_learned(config: Translation, *, steps: int, backwards: bool, right: int) -> None:
    """On 200 sequences that it has not seen: perplexity, how many come out right, and the BLEU of these."""
    model = train(config, steps=steps, backwards=backwards)
    unseen = sequences(torch.Generator().manual_seed(1), 200, backwards=backwards)
    with evaluation_mode(model), torch.no_grad():
        losses, _, num_tokens = losses_of(model, unseen)
    assert math.exp(float(losses.nll_BS.sum() / num_tokens)) < 1.05
    sources = [row[mask].tolist() for row, mask in zip(unseen.source_BS, unseen.source_mask_BS, strict=True)]
    found = beam_search(model, sources, tokens=TOKENS, search=BeamSearch(beam_size=4))
    wanted = [source[::-1] if backwards else source for source in sources]
    right_B = [best.tokens == tuple(row) for (best, *_), row in zip(found, wanted, strict=True)]
    assert sum(right_B) >= right
    texts = [
        [" ".join(f"w{token}" for token in row) for row in rows]
        for rows in ([b.tokens for b, *_ in found], wanted)
    ]
    scored, *_ = score(*texts, target_language="en")
    assert scored.name == "BLEU"
    assert scored.value >= 100.0 * right / len(sources)
    assert sum(len(source) for source in sources) > 800


def test_sequences_are_copied_with_a_bleu_of_100():
    require_learned(MODEL, steps=600, backwards=False, right=200)


def test_sequences_are_learned_backwards_to_a_perplexity_near_one():
    require_learned(MODEL, steps=300, backwards=True, right=196)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "config",
    [
        with_gate(BalancedGate()),
        with_gate(HierarchicalGate(num_groups=4), k=4),
        with_gate(HierarchicalGate(num_groups=4, primary="balanced", secondary="balanced"), k=4),
        replace(MODEL, input_feeding=True),
        replace(MODEL, attention="additive"),
        replace(MODEL, lstm_units=96, lstm_projection=48, share_embedding=False),
    ],
    ids=["balanced", "hierarchy", "balanced-hierarchy", "input-feeding", "additive", "projected"],
)
def test_so_they_are_with_every_kind_of_model(config):
    require_learned(config, steps=500, backwards=True, right=196)
