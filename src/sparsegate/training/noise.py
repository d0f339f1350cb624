"""The gates' noise and every other draw of training, as pure functions of the seed and the batch's index."""

from collections.abc import Mapping
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Draw(IntEnum):
    """What random numbers are drawn for; no two of these share a stream, whatever the other keys are."""

    WEIGHTS = 1
    GATE_NOISE = 2
    DROPOUT = 3
    ROUNDING = 4


def derived_seed(draw: Draw, *keys: int) -> int:
    """A seed for torch: equal arguments give equal seeds, near ones unrelated seeds.

    A draw always brings the same number of keys: to NumPy a shorter tuple is one that ends in zeros.
    """
    return int(np.random.SeedSequence((draw, *keys)).generate_state(1, np.uint64)[0] >> 1)


def gate_noise(
    noise_widths: Mapping[str, int], *, seed: int, batch_index: int, first_row: int, shape_BS: tuple[int, int]
) -> dict[str, Tensor]:
    """Standard normal draws for each gate, by layer name: [B, S, noise_width], float32, on the CPU.

    Each row has a generator of its own, so that a token gets the same draw however the rows of a batch are
    split over micro-batches or ranks, and whenever the pass is repeated. first_row: index in the batch of the
    first row.
    """
    num_rows, num_steps = shape_BS
    shapes = {name: (num_steps, width) for name, width in noise_widths.items()}
    return row_noise(shapes, seed=seed, batch_index=batch_index, first_row=first_row, num_rows=num_rows)


def row_noise(
    shapes: Mapping[str, tuple[int, int]], *, seed: int, batch_index: int, first_row: int, num_rows: int
) -> dict[str, Tensor]:
    """The same for layers that see different numbers of steps. shapes: (S, noise_width) by layer name."""
    noise = {name: torch.empty(num_rows, *shape) for name, shape in shapes.items()}
    generator = torch.Generator()
    for row in range(num_rows if noise else 0):
        generator.manual_seed(derived_seed(Draw.GATE_NOISE, seed, batch_index, first_row + row))
        for draws in noise.values():
            torch.randn(draws.shape[1:], generator=generator, out=draws[row])
    return noise
