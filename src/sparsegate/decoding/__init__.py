"""What a trained language model is asked: how likely is this text, and how does it go on."""

from .choice import Sampling as Sampling
from .sampling import Generated as Generated
from .sampling import generate as generate
from .sampling import stream as stream
from .scoring import Scored as Scored
from .scoring import score as score
from .scoring import score_lines as score_lines
