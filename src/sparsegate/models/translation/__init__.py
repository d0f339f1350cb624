"""The paper's translation models, and the dense models of equal computation."""

from .attention import Memory as Memory
from .build import build_translation as build_translation
from .config import BlockConfig as BlockConfig
from .config import DenseBlock as DenseBlock
from .config import MixtureBlock as MixtureBlock
from .config import NoBlock as NoBlock
from .config import Translation as Translation
from .decoder import DecoderState as DecoderState
from .loss import TokenLosses as TokenLosses
from .loss import token_losses as token_losses
from .model import TranslationModel as TranslationModel
from .model import TranslationOutput as TranslationOutput
