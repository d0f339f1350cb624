"""Optimizers whose state has dtypes of its own, out of state dicts."""

from collections.abc import Collection
from typing import Any

import torch


def load_as_stored(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], *, on_cpu: Collection[str]
) -> None:
    """Load the state once more as it is: torch casts what it loads to the dtype of the weights.

    on_cpu: names of what stays there wherever the parameters are.
    """
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        optimizer.state[parameter] = {
            key: value.clone() if key in on_cpu else value.clone().to(parameter.device)
            for key, value in state_dict["state"].get(number, {}).items()
        }
