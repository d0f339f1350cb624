"""Letting a model write: many prompts at once, each going on from its own recurrent state."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..data.vocabulary import Vocabulary
from ..models.language_model import LanguageModel, State
from .choice import Sampling, choose
from .inference import evaluation_mode
from .text import TextGrowth

# Positions that the model reads at once, which bounds the memory that a long prompt takes.
_MAX_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Generated:
    """How a prompt went on.

    text: what follows the prompt, without the stop. tokens: ids of what was written, with those of the stop.
    end: whether a stop ended it, or `max_tokens`.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    end: Literal["stop", "length"]


@dataclass(kw_only=True)
class _Row:
    """One prompt on its way through the model.

    pending: tokens that the model has yet to read, the last of them perhaps one that it just wrote. pieces:
    of the text that follows the prompt, one for each token.
    """

    number: int
    prompt: str
    pending: list[int]
    draws: np.random.PCG64
    growth: TextGrowth
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    end: Literal["stop", "length"] | None = None

    def read(self, num_tokens: int) -> list[int]:
        """The next tokens to read, which are then no longer pending."""
        tokens, self.pending = self.pending[:num_tokens], self.pending[num_tokens:]
        return tokens

    def append(self, token: int, *, max_tokens: int) -> None:
        """Go on with `token`, and end where a stop is complete or there are enough tokens."""
        self.tokens.append(token)
        self.pending = [token]
        piece = self.growth.add(token)
        if self.growth.stopped:
            self.end = "stop"
        elif len(self.tokens) == max_tokens:
            self.end = "length"
            piece += self.growth.rest()
        self.pieces.append(piece)


def generate(
    model: LanguageModel,
    vocabulary: Vocabulary,
    prompts: Iterable[str],
    *,
    sampling: Sampling,
    batch_size: int = 32,
) -> Iterator[Generated]:
    """How each prompt goes on, in the order of the prompts.

    prompts: text of any length, with line feeds between its sentences; may be empty. The next ones are
    taken as soon as there is room among the `batch_size` that are written at once. A prompt's text depends
    on itself, its number among the prompts, and `sampling`, but not on the other prompts.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be at least 1")
    finished: dict[int, Generated] = {}
    next_number = 0
    for row in _write(model, vocabulary, prompts, sampling, batch_size):
        if row.end is not None:
            finished[row.number] = Generated(
                prompt=row.prompt, text="".join(row.pieces), tokens=tuple(row.tokens), end=row.end
            )
        while next_number in finished:
            yield finished.pop(next_number)
            next_number += 1


def stream(model: LanguageModel, vocabulary: Vocabulary, prompt: str, *, sampling: Sampling) -> Iterator[str]:
    """What `generate` writes after a single prompt, piece by piece while it is written."""
    for row in _write(model, vocabulary, [prompt], sampling, 1):
        yield row.pieces[-1]


def _write(
    model: LanguageModel, vocabulary: Vocabulary, prompts: Iterable[str], sampling: Sampling, batch_size: int
) -> Iterator[_Row]:
    """Each row after each of its new tokens; with its last token, it has an `end`."""
    never = None if sampling.allow_unknown else vocabulary.unknown_id
    waiting = enumerate(prompts)
    rows: list[_Row] = []
    state: State = {}
    while True:
        going_on = [index for index, row in enumerate(rows) if row.end is None]
        new = [_row(vocabulary, *prompt, sampling) for prompt in islice(waiting, batch_size - len(going_on))]
        if new or len(going_on) < len(rows):
            state = _select_rows(state, going_on, num_new=len(new))
            rows = [rows[index] for index in going_on] + new
        if not rows:
            return
        # All rows read equally many tokens, so that none needs padding.
        num_steps = min(*(len(row.pending) for row in rows), max(1, _MAX_TOKENS // len(rows)))
        logits_BV, state = _read(model, [row.read(num_steps) for row in rows], state)
        ready = [index for index, row in enumerate(rows) if not row.pending]
        if ready:
            draws = [rows[index].draws for index in ready]
            chosen = choose(logits_BV[ready], sampling=sampling, draws=draws, never=never)
            for index, token in zip(ready, chosen, strict=True):
                rows[index].append(token, max_tokens=sampling.max_tokens)
                yield rows[index]


def _row(vocabulary: Vocabulary, number: int, prompt: str, sampling: Sampling) -> _Row:
    tokens = vocabulary.encode_text(prompt)
    return _Row(
        number=number,
        prompt=prompt,
        pending=[vocabulary.end_id, *tokens],
        draws=np.random.PCG64([sampling.seed, number]),
        growth=TextGrowth(vocabulary=vocabulary, before=tokens, stop=sampling.stop),
    )


# The functions below are each whole: inference mode around a `yield` would leak into the caller.
@torch.inference_mode()
def _read(model: LanguageModel, tokens_BS: Sequence[Sequence[int]], state: State) -> tuple[Tensor, State]:
    """Logits [B, V] after the last of the tokens, and the state to go on from."""
    with evaluation_mode(model):
        input_BS = torch.tensor(tokens_BS, device=model.softmax.device)
        output = model(input_BS, state=state)
        return model.softmax(output.hidden_BSD[:, -1]), output.state


@torch.inference_mode()
def _select_rows(state: State, rows: Sequence[int], *, num_new: int) -> State:
    """The state of some rows, and after them zeros, which are a start, for new ones."""

    def select(part_LBX: Tensor) -> Tensor:
        zeros_LNX = part_LBX.new_zeros(part_LBX.shape[0], num_new, part_LBX.shape[2])
        return torch.cat([part_LBX[:, list(rows)], zeros_LNX], dim=1)

    return {name: (select(h), select(c)) for name, (h, c) in state.items()}
