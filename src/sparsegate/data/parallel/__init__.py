"""Parallel text: pairs of lines in two languages, datasets of them, and batches for a translation model."""

from .batches import EvaluationBatches as EvaluationBatches
from .batches import TranslationBatch as TranslationBatch
from .batches import TranslationBatches as TranslationBatches
from .cleaning import clean_line as clean_line
from .dataset import Pair as Pair
from .dataset import TranslationDataset as TranslationDataset
from .filters import LengthFilter as LengthFilter
from .prepare import prepare_translation as prepare_translation
from .source import ParallelText as ParallelText
from .source import parse_parallel_text as parse_parallel_text
