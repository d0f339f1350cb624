"""Rounding to bfloat16 at random, so that steps below its spacing are not lost but taken now and then.

Between neighbours a < x < b the result is b with probability (x - a) / (b - a): its mean is x. bfloat16 is
the upper half of a float32, so that a number from 0 to 65535, evenly drawn and added to the lower half,
carries into the upper half with that probability.
"""

import numpy as np
import torch
from torch import Tensor

_LOWER_HALF = 1 << 16
# Odd, so that the first 65,536 matrices have places of their own in the noise.
_STRIDE = 40_503


def round_at_random_(value: Tensor, noise: Tensor) -> Tensor:
    """Round in place to numbers that bfloat16 has too. value: float32, finite. noise: int32, 0 to 65535."""
    value.view(torch.int32).add_(noise).bitwise_and_(-_LOWER_HALF)
    return value


class RoundingNoise:
    """The draws of one optimizer, a function of the seed, the parameter, the step, the matrix and the place.

    So a step can be repeated, whatever was drawn before and whichever thread is first. The draws of a step
    are made once for all matrices of a parameter, and each reads them from a place of its own. Draws are
    independent from step to step and within a matrix; two matrices share some, at different places.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._latest: dict[int, tuple[int, Tensor]] = {}

    def draw(
        self, shape_EDH: torch.Size, *, parameter: int, step: int, first_matrix: int, device: torch.device
    ) -> Tensor:
        """int32 [E, D, H] from 0 to 65535, equal on all devices. parameter: its number in the optimizer."""
        num_matrices, size = shape_EDH[0], shape_EDH[1] * shape_EDH[2]
        table = self._table(size + _LOWER_HALF, parameter, step, device)
        starts = [(first_matrix + i) * _STRIDE % _LOWER_HALF for i in range(num_matrices)]
        if num_matrices == 1:
            return table[starts[0] : starts[0] + size].view(shape_EDH)
        return torch.stack([table[start : start + size] for start in starts]).view(shape_EDH)

    def _table(self, size: int, parameter: int, step: int, device: torch.device) -> Tensor:
        """Threads that come at once make equal tables, so that it does not matter whose is kept."""
        made_at, table = self._latest.get(parameter, (-1, torch.empty(0)))
        if made_at != step or len(table) != size or table.device != device:
            words = np.random.SeedSequence((self.seed, parameter, step)).generate_state(1, np.uint32)
            generator = torch.Generator("cpu").manual_seed(int(words[0]))
            table = torch.randint(_LOWER_HALF, (size,), dtype=torch.int32, device="cpu", generator=generator)
            table = table.to(device)
            self._latest[parameter] = (step, table)
        return table
