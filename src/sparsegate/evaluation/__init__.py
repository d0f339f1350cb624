"""How good a model is, on text that it has not seen."""

from .perplexity import Evaluation as Evaluation
from .perplexity import evaluate as evaluate
from .text import PARTS as PARTS
from .text import Part as Part
from .text import part_of as part_of
from .text import pieces_of as pieces_of
