"""`sparsegate VERB ...`: finds the verb, and turns what goes wrong into one line and an exit code."""

import difflib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from ..training.overrides import did_you_mean
from .verb import Verb, parse, with_flags

# Each is a module of this folder with a constant VERB, imported only when it is asked for.
VERBS = {
    "prepare": "Turn text into a dataset to train on.",
    "train": "Train a model, or go on with a run.",
    "evaluate": "Measure perplexity of a run, bits per byte, or BLEU.",
    "generate": "Let a trained model write.",
    "translate": "Let a trained translation model translate.",
    "score": "Print the log-probability of each sentence and token.",
    "export": "Write the weights of a run to one safetensors file.",
    "average": "Average the weights of several checkpoints.",
    "plan": "Count the parameters and operations of a model without building it.",
    "conform": "Try the paper's laws on a mixture-of-experts layer of any origin.",
    "bench": "Time the layer against a dense one, its peers and the machine.",
    "doctor": "Tell what is here, and which kernel would compute the experts.",
    "study": "Train a ladder of models at equal multiply-adds, and draw their perplexities.",
    "search": "Try learning rates and dropouts, and keep the best.",
    "quickstart": "Train a small mixture and the dense model of equal cost, and compare them.",
}

INPUT, CANNOT_SAVE, NON_FINITE, RANK_MISSING, INTERRUPTED, BROKEN_PIPE = 2, 3, 4, 5, 130, 141

# By name, so that telling one error from another does not import torch.
_CODES = {
    "sparsegate.training.storage.CannotSave": CANNOT_SAVE,
    "sparsegate.training.step.NonFinite": NON_FINITE,
    "sparsegate.training.missing.RankMissing": RANK_MISSING,
}
_TOLD_ELSEWHERE = "sparsegate.training.ranks.ToldElsewhere"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done, or saved on a signal; 1 done, and a law failed (`conform`); 2 the user's input; 3 cannot save;
        4 repeated non-finite steps; 5 another process of the run is missing; 130 interrupted; 141 whoever
        read the output went away.
    """
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    where = f"sparsegate {words[0]}" if words[0] in VERBS else "sparsegate"
    try:
        code = _run(words[0], words[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes once more as it leaves, and must find an open file there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"{where}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        if "--debug" in words:
            traceback.print_exc()
        if _name(type(error)) != _TOLD_ELSEWHERE:
            print(f"{where}: {one_line(error)}", file=sys.stderr)
        return code


def exit_code(error: Exception) -> int | None:
    """The exit code for an error that a user can meet; None for a fault of ours."""
    for cls in type(error).__mro__:
        code = _CODES.get(_name(cls))
        if code is not None:
            return code
    if isinstance(error, OSError) and error.errno in _DISK:
        return CANNOT_SAVE
    return INPUT if isinstance(error, ValueError | OSError) or out_of_memory(error) else None


def out_of_memory(error: Exception) -> bool:
    """Python's error, torch's of a GPU, or what torch raises on the CPU, which has no class of its own."""
    return (
        isinstance(error, MemoryError)
        or _name(type(error)) == "torch.OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "not enough memory" in str(error))
    )


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def one_line(error: Exception) -> str:
    """What went wrong in one line; of a file that is not there, also which one is near."""
    if isinstance(error, OSError) and isinstance(error.filename, str | Path):
        near = _near(Path(error.filename)) if isinstance(error, FileNotFoundError) else ""
        return f"{error.filename}: {error.strerror}{near}"
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"cannot write: {error.strerror}"
    if out_of_memory(error):
        return f"out of memory: {' '.join(str(error).split())}; ask for less at a time"
    return " ".join(str(error).split())


def _run(name: str, words: Sequence[str]) -> int:
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(version("sparsegate"))
        return 0
    if name not in VERBS:
        near = did_you_mean(name, VERBS) or "; see sparsegate --help"
        raise ValueError(f"{name}: no such verb{near}")
    verb: Verb = import_module(f"sparsegate.cli.{name}").VERB
    args = parse(verb, words, name=name, summary=VERBS[name])
    try:
        return verb.run(args)
    except ValueError as error:
        if type(error) is ValueError:
            error.args = (with_flags(str(error), verb, words),)
        raise


def _overview() -> str:
    verbs = "\n".join(f"  {name:<12}{summary}" for name, summary in VERBS.items())
    return f"""usage: sparsegate VERB ...

{verbs}

`sparsegate VERB --help` tells what a verb takes, and shows an example.
`sparsegate quickstart` needs nothing else, and takes some minutes."""


def _near(path: Path) -> str:
    """The name nearest to one that is missing, in the deepest folder that exists."""
    try:
        while not path.parent.is_dir():
            path = path.parent
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except OSError:
        return ""
    return f"; did you mean {path.parent / near[0]}?" if near else ""
