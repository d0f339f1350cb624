"""Text, vocabularies, datasets and batches.

Each name is imported when it is first used, so that the processes that prepare text need not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .batches import Batch as Batch
    from .batches import ContinuousBatches as ContinuousBatches
    from .batches import SentenceBatches as SentenceBatches
    from .dataset import Dataset as Dataset
    from .dataset import TokenFile as TokenFile
    from .normalization import Normalization as Normalization
    from .preparing import prepare as prepare
    from .standard_library import standard_library_files as standard_library_files
    from .storage import load_vocabulary as load_vocabulary
    from .storage import save_vocabulary as save_vocabulary
    from .subwords import ByteVocabulary as ByteVocabulary
    from .subwords import SubwordVocabulary as SubwordVocabulary
    from .text_options import TextOptions as TextOptions
    from .vocabulary import Vocabulary as Vocabulary
    from .words import CharacterVocabulary as CharacterVocabulary
    from .words import WordVocabulary as WordVocabulary

_HOMES = {
    "Batch": "batches",
    "ByteVocabulary": "subwords",
    "CharacterVocabulary": "words",
    "ContinuousBatches": "batches",
    "Dataset": "dataset",
    "Normalization": "normalization",
    "SentenceBatches": "batches",
    "SubwordVocabulary": "subwords",
    "TextOptions": "text_options",
    "TokenFile": "dataset",
    "Vocabulary": "vocabulary",
    "WordVocabulary": "words",
    "load_vocabulary": "storage",
    "prepare": "preparing",
    "save_vocabulary": "storage",
    "standard_library_files": "standard_library",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
