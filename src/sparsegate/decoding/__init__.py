"""What a trained model is asked: how likely is this text, how does it go on, what is its translation."""

from .beam_search import BeamSearch as BeamSearch
from .beam_search import beam_search as beam_search
from .choice import Sampling as Sampling
from .lines import Alignment as Alignment
from .lines import Decoding as Decoding
from .lines import LineTranslator as LineTranslator
from .lines import Translation as Translation
from .sampling import Generated as Generated
from .sampling import generate as generate
from .sampling import stream as stream
from .scoring import Scored as Scored
from .scoring import score as score
from .scoring import score_lines as score_lines
from .target import Hypothesis as Hypothesis
from .target import MaxLength as MaxLength
from .target import TargetTokens as TargetTokens
from .translation import TranslationSampling as TranslationSampling
from .translation import sample_translations as sample_translations
