"""The paper's models and the dense models of equal computation; translation has a part of its own."""

from .build import ModelConfig as ModelConfig
from .build import build as build
from .config import FeedForwardLM as FeedForwardLM
from .config import LanguageModelConfig as LanguageModelConfig
from .config import MixtureLM as MixtureLM
from .config import RecurrentLM as RecurrentLM
from .language_model import LanguageModel as LanguageModel
from .language_model import LanguageModelOutput as LanguageModelOutput
from .layered import LayeredModel as LayeredModel
