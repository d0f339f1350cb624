"""The paper's language models and the dense models of equal computation."""

from .build import build as build
from .config import FeedForwardLM as FeedForwardLM
from .config import LanguageModelConfig as LanguageModelConfig
from .config import MixtureLM as MixtureLM
from .config import RecurrentLM as RecurrentLM
from .language_model import LanguageModel as LanguageModel
from .language_model import LanguageModelOutput as LanguageModelOutput
