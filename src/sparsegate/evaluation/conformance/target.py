"""PACKAGE:FACTORY, as it is written on a command line, and the factory that it names."""

import difflib
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from .implementation import Implementation
from .law import Factory
from .trial import one_line

EXAMPLE = "sparsegate.evaluation.conformance.own:noisy_topk"


def load_factory(
    target: str, *, width: int | None = None, arguments: Mapping[str, object] | None = None
) -> Factory:
    """Import what `target` names, and try that it makes an implementation.

    target: a module and, after a colon, a function or class in it that returns an Implementation or an
    nn.Module. width: of an nn.Module's input; an Implementation says it itself. arguments: for each call.

    Raises:
        ValueError: it cannot be imported, is missing, cannot be called, makes something else, or makes one
            module for all calls.
    """
    function = _imported(target)

    def factory() -> Implementation:
        made = function(**(arguments or {}))
        if isinstance(made, nn.Module):
            return Implementation(module=made, width=width or 0)
        return made

    try:
        made, again = (function(**(arguments or {})) for _ in range(2))
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"target ({target}): its call raised {one_line(error)}; "
            "it must make a layer from no more than the given KEY=VALUE arguments"
        ) from error
    _check(target, made, width)
    if _module(made) is _module(again):
        raise ValueError(
            f"target ({target}): two calls returned the same module; "
            "it must make a new one each time, for laws change its weights"
        )
    return factory


def _module(made: object) -> object:
    return made.module if isinstance(made, Implementation) else made


def _imported(target: str) -> Callable[..., Any]:
    package, colon, path = target.partition(":")
    if not (package and colon and path):
        raise ValueError(f"target ({target}) must be PACKAGE:FACTORY, such as {EXAMPLE}")
    try:
        found: Any = import_module(package)
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError)
        cure = "install it, or go to the folder that holds it" if absent else "it must be importable"
        raise ValueError(
            f"target ({target}): importing {package} raised {one_line(error)}; {cure}"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, dir(found), n=1)
            hint = f"did you mean {near[0]}?" if near else "name a function or class that is there"
            raise ValueError(f"target ({target}): {package} has no {name}; {hint}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(
            f"target ({target}): {path} is of type {type(found).__name__} and cannot be called; "
            "name a function that makes the layer"
        )
    return found


def _check(target: str, made: object, width: int | None) -> None:
    if isinstance(made, nn.Module):
        if width is None:
            raise ValueError(
                f"width: {target} makes a {type(made).__name__}, which does not say the width of its input; "
                "give --width, or return a sparsegate.Implementation"
            )
        if width < 1:
            raise ValueError(f"width ({width}) must be at least 1")
    elif not isinstance(made, Implementation):
        raise ValueError(
            f"target ({target}): its call returned a {type(made).__name__}; "
            "it must return a torch.nn.Module or a sparsegate.Implementation"
        )
    elif width is not None and width != made.width:
        raise ValueError(f"width ({width}): {target} says {made.width} itself; leave --width out")
