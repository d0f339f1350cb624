"""The weights of a run as one file, whatever number of processes wrote them; and such a file's way in."""

import json
from pathlib import Path

from .checkpoint import load_checkpoint
from .overrides import to_json
from .run_folder import RunDataset, read_run_config, read_vocabulary
from .state import TrainState
from .weights import export_weights
from .weights import load_weights as read_exported

_VOCABULARY = "vocabulary"


def export(run: Path, checkpoint: Path, output: Path) -> None:
    """Write all weights of a run's checkpoint under their names in one process, as safetensors.

    Its metadata tells the configuration, the step, and the fingerprint of the vocabulary.

    ValueError, OSError: a checkpoint that is damaged, or a file that is there already or cannot be written.
    """
    if output.exists():
        raise ValueError(f"{output}: exists; give another name, or remove it")
    config = read_run_config(run)
    vocabulary = read_vocabulary(run, config)
    loaded = load_checkpoint(checkpoint, only=["model"])
    metadata = {
        "format": "pt",  # what others ask safetensors files for
        "config": json.dumps(to_json(config)),
        "step": str(loaded.step),
        _VOCABULARY: vocabulary.fingerprint,
    }
    export_weights(output, loaded.tensors["model"], metadata)


def import_into(state: TrainState, file: Path, dataset: RunDataset) -> None:
    """Take over the weights of an exported file; of experts and words the rank's own.

    ValueError: it is damaged, or of another model or another vocabulary than the dataset's.
    """
    tensors, metadata = read_exported(file)
    if metadata.get(_VOCABULARY) != dataset.vocabulary.fingerprint:
        raise ValueError(
            f"{file}: is of another vocabulary than the dataset; prepare the dataset with that of the run"
        )
    state.take_weights(tensors, where=str(file))
