"""Likelihood of rows of tokens of any length, in constant memory: in pieces, recurrent state carried on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.batches import Batch
from ..models.language_model import LanguageModel, State
from ..moe.routing import BalanceSums


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """What a model says about one batch.

    nll_BS: negative log-likelihood of each target in nats, float32 at least, 0 where masked. num_tokens:
    real ones. state: to carry on. sums: of the real tokens, by mixture layer.
    """

    nll_BS: Tensor
    num_tokens: int
    state: State
    sums: dict[str, BalanceSums]


def likelihoods(model: LanguageModel, batches: Iterable[Batch]) -> Iterator[Likelihood]:
    """The likelihood of each batch. The model should be in `evaluation_mode`."""
    state: State | None = None
    for batch in batches:
        result = _likelihood(model, batch, state if batch.carries_state else None)
        state = result.state
        yield result


# Not around `likelihoods`: the mode of a generator would leak into the code that it yields to.
@torch.inference_mode()
def _likelihood(model: LanguageModel, batch: Batch, state: State | None) -> Likelihood:
    device = model.softmax.device
    num_tokens = batch.num_tokens
    mask_BS = batch.mask_BS.to(device)
    padding = mask_BS if num_tokens < mask_BS.numel() else None
    output = model(batch.input_BS.to(device), state=state, mask_BS=padding)
    hidden_TD, target_T = output.hidden_BSD[mask_BS], batch.target_BS.to(device)[mask_BS]
    nll_T = model.softmax.nll(hidden_TD, target_T)
    return Likelihood(
        nll_BS=nll_T.new_zeros(mask_BS.shape).masked_scatter(mask_BS, nll_T),
        num_tokens=num_tokens,
        state=output.state,
        sums={name: routing.sums for name, routing in output.routings.items()},
    )


def row_batches(
    rows: Sequence[npt.NDArray[np.integer[Any]]], *, first_inputs: Sequence[int], num_steps: int
) -> Iterator[Batch]:
    """All tokens of all rows as targets, each once: a row of the batches for each, `num_steps` at a time.

    first_inputs: the token before the first of each row. Rows that have ended are masked; state is carried
    from batch to batch. Rows may be memory-mapped: only the pieces are read.
    """
    longest = max(map(len, rows))
    for index, start in enumerate(range(0, longest, num_steps)):
        shape_BS = (len(rows), min(num_steps, longest - start))
        input_BS, target_BS = np.zeros(shape_BS, dtype=np.int64), np.zeros(shape_BS, dtype=np.int64)
        mask_BS = np.zeros(shape_BS, dtype=bool)
        for row, (token_N, first_input) in enumerate(zip(rows, first_inputs, strict=True)):
            piece_S = token_N[start : start + num_steps]
            if length := len(piece_S):
                target_BS[row, :length] = piece_S
                input_BS[row, 0] = token_N[start - 1] if start else first_input
                input_BS[row, 1:length] = piece_S[:-1]
                mask_BS[row, :length] = True
        yield Batch(
            input_BS=torch.from_numpy(input_BS),
            target_BS=torch.from_numpy(target_BS),
            mask_BS=torch.from_numpy(mask_BS),
            carries_state=index > 0,
            index=index,
        )


def groups_by_length(lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of about equal length, the longest first.

    A group, padded to its longest row, holds at most `max_tokens` positions, or is a single row that is
    longer.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if group and (len(group) + 1) * lengths[group[0]] > max_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
