"""What a run takes of memory, asked before any of it is taken."""

from ..models import MixtureLM
from ..models.memory import BFLOAT16, FLOAT32, Method, available_memory, require_memory
from ..models.translation import Translation
from .config import ContinuousConfig, RunConfig, SentencesConfig
from .making import resolve_device


def require_memory_for(config: RunConfig) -> None:
    """ValueError, with both figures, for a language model that cannot be trained in what is free."""
    available = available_memory(resolve_device(config.training.device))
    if available is not None and not isinstance(config.model, Translation):
        require_memory(config.model, method_of(config), available=available)


def method_of(config: RunConfig) -> Method:
    """How the model is trained."""
    model, optim = config.model, config.optim
    return Method(
        tokens=-(-batch_tokens(config) // config.training.micro_batches),
        experts=optim.experts,
        expert_bytes=BFLOAT16 if "bfloat16" in model.expert_dtypes() else FLOAT32,
        in_backward=optim.in_backward,
        sparse_rows=optim.tables == "rows",
        recompute=isinstance(model, MixtureLM) and model.recompute,
    )


def batch_tokens(config: RunConfig) -> int:
    """Tokens of a language model's batch, about."""
    batches = config.batches
    if isinstance(batches, ContinuousConfig):
        return batches.batch_size * batches.num_steps
    assert isinstance(batches, SentencesConfig)
    return batches.batch_words
