"""What a run takes of memory, asked before any of it is taken."""

import os
from dataclasses import replace

from ..models import MixtureLM, build
from ..models.free_memory import available_memory
from ..models.memory import BFLOAT16, FLOAT32, Method, require_memory
from ..models.translation import Translation
from .config import ContinuousConfig, RunConfig, SentencesConfig
from .making import resolve_device
from .ranks import ALONE, Ranks


def require_memory_for(config: RunConfig, ranks: Ranks = ALONE) -> None:
    """ValueError, with both figures, for a model that cannot be trained in what is free."""
    device = resolve_device(config.training.device)
    available = available_memory(device)
    if available is None:
        return
    if device.type == "cpu":
        available //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the ranks of a machine share its memory
    sharing = ranks.share.num_ranks
    if isinstance(config.model, Translation):
        _require_state(config, config.model, sharing, available)
    else:
        method = method_of(config)
        method = replace(method, tokens=-(-method.tokens // ranks.num_ranks), devices=sharing)
        require_memory(config.model, method, available=available)


def _require_state(config: RunConfig, translation: Translation, sharing: int, available: int) -> None:
    """Of translation models, whose activations nobody predicts, what weights, gradients and Adam take.

    sharing: ranks that share the experts.
    """
    model, optim = build(translation, device="meta"), config.optim
    experts = sum(p.numel() for p in model.expert_parameters())
    others = sum(p.numel() for p in model.parameters()) - experts
    of_expert = BFLOAT16 if "bfloat16" in translation.expert_dtypes() else FLOAT32
    of_expert *= 1 if optim.in_backward and _has_fused_experts(config) else 2
    of_expert += 2 * FLOAT32 if optim.experts == "adam" else 0
    needed = others * 4 * FLOAT32 + experts // sharing * of_expert
    if needed > available:
        raise ValueError(
            f"model: weights, gradients and optimizer alone take {needed / 2**30:,.1f} GiB, and "
            f"{available / 2**30:,.1f} GiB are free; use --optim.experts factored, or fewer experts"
        )


def method_of(config: RunConfig) -> Method:
    """How the model is trained."""
    model, optim = config.model, config.optim
    return Method(
        tokens=-(-batch_tokens(config) // config.training.micro_batches),
        experts=optim.experts,
        expert_bytes=BFLOAT16 if "bfloat16" in model.expert_dtypes() else FLOAT32,
        copied_bytes=_copied_bytes(config),
        in_backward=optim.in_backward and _has_fused_experts(config),
        sparse_rows=optim.tables == "rows",
        spread_words=config.training.vocabulary == "sharded",
        recompute=isinstance(model, MixtureLM) and model.recompute,
        # Of a GPU's memory, the copy is in the host's.
        saved_copy=config.training.background_saves and _is_for_cpu(config),
    )


def _is_for_cpu(config: RunConfig) -> bool:
    """Where a run on a GPU is planned, there need be none."""
    return config.training.device != "cuda" and resolve_device(config.training.device).type == "cpu"


def _has_fused_experts(config: RunConfig) -> bool:
    """Whether gradients are given away some experts at a time, and weights of 16 bits cast piece by piece.

    The kernels that a GPU has by itself, `loop` and `grouped_mm`, do neither.
    """
    return _is_for_cpu(config) or config.training.kernels == "triton"


def _copied_bytes(config: RunConfig) -> int:
    """As of `Method`: evaluation has products in float32, training in those of its precision."""
    if "bfloat16" in config.model.expert_dtypes():
        return 0 if _has_fused_experts(config) else FLOAT32
    return BFLOAT16 if config.training.precision == "bfloat16" and not _is_for_cpu(config) else 0


def batch_tokens(config: RunConfig) -> int:
    """Tokens of a language model's batch, about."""
    batches = config.batches
    if isinstance(batches, ContinuousConfig):
        return batches.batch_size * batches.num_steps
    assert isinstance(batches, SentencesConfig)
    return batches.batch_words
