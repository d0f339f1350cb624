"""Text, vocabularies, datasets and batches."""

from .batches import Batch as Batch
from .batches import ContinuousBatches as ContinuousBatches
from .batches import SentenceBatches as SentenceBatches
from .dataset import Dataset as Dataset
from .dataset import TokenFile as TokenFile
from .normalization import Normalization as Normalization
from .prepare import prepare as prepare
from .standard_library import standard_library_files as standard_library_files
from .storage import load_vocabulary as load_vocabulary
from .storage import save_vocabulary as save_vocabulary
from .subwords import ByteVocabulary as ByteVocabulary
from .subwords import SubwordVocabulary as SubwordVocabulary
from .text import TextOptions as TextOptions
from .vocabulary import Vocabulary as Vocabulary
from .words import CharacterVocabulary as CharacterVocabulary
from .words import WordVocabulary as WordVocabulary
