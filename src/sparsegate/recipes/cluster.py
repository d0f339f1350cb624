"""A language model laid over devices: what goes where, what travels, and how long a step must take.

As in section 3.1 of the paper: every device has a copy of all that is not an expert, reads its own part of
the batch, and holds its own part of the experts. Times are those of a roofline: products at a share of the
peak rate, weights at the rate of the memory, and traffic at that of the network.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import torch

from ..models import LanguageModelConfig, MixtureLM, build
from ..models.gates import HierarchicalGate
from ..models.memory import FLOAT32, INT32, Method, training_memory
from ..models.softmax import log_chance
from ..parallel.placement import split

# Forward, backward to the inputs, backward to the weights; a multiply-add is two operations.
_OPERATIONS_PER_MULTIPLY_ADD = 6
_INT64 = 8


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices of one kind; the defaults are an H100 SXM's by its data sheet, dense bfloat16 and NVLink.

    memory: bytes of each. flops: operations per second, at peak. efficiency: the share of the peak that
    products of the model's sizes reach; a guess, to be measured. memory_bandwidth, bandwidth: bytes per
    second, of its memory and from a device to the others.
    """

    devices: int = field(default=1, metadata={"doc": "devices"})
    memory: int = field(default=80 * 2**30, metadata={"doc": "memory of each, bytes"})
    flops: float = field(default=989e12, metadata={"doc": "peak operations per second of each"})
    efficiency: float = field(default=0.5, metadata={"doc": "share of it that products reach (a guess)"})
    memory_bandwidth: float = field(default=3.35e12, metadata={"doc": "bytes per second of its memory"})
    bandwidth: float = field(default=450e9, metadata={"doc": "bytes per second from it to the others"})

    def __post_init__(self) -> None:
        for name in ("devices", "memory", "flops", "memory_bandwidth", "bandwidth"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"efficiency ({self.efficiency}) must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A training step on each device. Bytes and seconds are of one device and step.

    all_to_all_bytes: what a device sends of tokens to experts and back, forward and backward: each token goes
    once to every other device that has an expert for it, and as much comes back. word_bytes: the same for
    words that are spread: numbers, rows and hidden values. all_reduce_bytes: gradients of what every device
    has, as a ring sends them. copies_bytes: the same of the experts, between their copies. in_turn_seconds,
    overlapped_seconds: arithmetic, memory and network one after the other, or all at once. tflops: the
    paper's measure, in the better case.
    """

    experts_per_device: float = field(metadata={"doc": "experts on a device"})
    copied_parameters: int = field(metadata={"doc": "parameters that every device has a copy of"})
    tokens_per_device: int = field(metadata={"doc": "tokens of a step that a device reads"})
    rows_per_expert: float = field(metadata={"doc": "tokens of a step for each expert, k b / n"})
    memory: int = field(metadata={"doc": "bytes at most at once"})
    all_to_all_bytes: int = field(metadata={"doc": "bytes sent to experts and back"})
    word_bytes: int = field(metadata={"doc": "bytes sent for words that are spread"})
    all_reduce_bytes: int = field(metadata={"doc": "bytes sent to add up gradients of what all have"})
    copies_bytes: int = field(metadata={"doc": "bytes sent to add up gradients of the experts' copies"})
    arithmetic_seconds: float = field(metadata={"doc": "seconds of arithmetic"})
    memory_seconds: float = field(metadata={"doc": "seconds of weights, gradients and optimizer in memory"})
    network_seconds: float = field(metadata={"doc": "seconds of the network"})
    overlapped_seconds: float = field(metadata={"doc": "seconds of a step, all at once"})
    in_turn_seconds: float = field(metadata={"doc": "seconds of a step, one after the other"})
    tflops: float = field(metadata={"doc": "TFLOPS of a device, all at once"})

    def require_memory(self, machine: Machine) -> None:
        """ValueError with the figures where a device has too little."""
        if self.memory > machine.memory:
            raise ValueError(
                f"memory ({gibibytes(machine.memory)}) is less than the {gibibytes(self.memory)} that "
                f"training takes on each of {machine.devices:,} device(s); use more devices (--devices), "
                "fewer tokens at once (--training.micro-batches, --batches.batch-words), or optimizers that "
                "take less (--optim.experts factored, --optim.in-backward true)"
            )


def lay_out(
    config: LanguageModelConfig,
    machine: Machine,
    method: Method,
    *,
    batch_tokens: int,
    micro_batches: int,
    expert_copies: int = 1,
) -> Layout:
    """A step of `batch_tokens` tokens in all.

    method: its `tokens` are replaced by what a device reads, its `devices` by those that share the experts.
    expert_copies: of all experts, each on as many devices as there are for it.

    ValueError: there are more devices than tokens, or the copies do not divide them.
    """
    devices = machine.devices
    if devices % expert_copies:
        raise ValueError(f"training.expert-copies ({expert_copies:,}) must divide devices ({devices:,})")
    sharing = devices // expert_copies
    if devices > batch_tokens:
        raise ValueError(f"devices ({devices:,}) must not exceed the {batch_tokens:,} tokens of a batch")
    tokens = -(-batch_tokens // devices)
    method = replace(method, tokens=-(-tokens // micro_batches), devices=sharing)
    memory = training_memory(config, method)
    copied = (memory.others + (0 if method.spread_words else memory.tables)) // FLOAT32
    sent = _all_to_all_bytes(config, sharing, tokens)
    of_words = micro_batches * _word_bytes(config, method) if method.spread_words else 0
    reduced = round(2 * (devices - 1) / devices * copied * FLOAT32)
    of_a_copy = memory.experts + (memory.tables if method.spread_words else 0)
    between = round(2 * (expert_copies - 1) / expert_copies * of_a_copy)
    seconds = (
        _busiest_flops(config, sharing) * tokens / (machine.flops * machine.efficiency),
        # Weights are read forward and backward, and with gradients and state read and written by the update.
        (4 * memory.weights + 2 * memory.gradients + 2 * memory.optimizer) / machine.memory_bandwidth,
        (sent + of_words + reduced + between) / machine.bandwidth,
    )
    num_experts = config.num_experts if isinstance(config, MixtureLM) else 0
    return Layout(
        experts_per_device=num_experts / sharing,
        copied_parameters=copied,
        tokens_per_device=tokens,
        rows_per_expert=rows_per_expert(config, batch_tokens),
        memory=memory.peak,
        all_to_all_bytes=sent,
        word_bytes=of_words,
        all_reduce_bytes=reduced,
        copies_bytes=between,
        arithmetic_seconds=seconds[0],
        memory_seconds=seconds[1],
        network_seconds=seconds[2],
        overlapped_seconds=max(seconds),
        in_turn_seconds=sum(seconds),
        tflops=arithmetic_flops(config) * tokens / max(seconds) / 1e12,
    )


def arithmetic_flops(config: LanguageModelConfig) -> int:
    """Operations that training one token takes, by the paper's metric (under table 7): the softmax counts."""
    model = build(config, device="meta")
    return _OPERATIONS_PER_MULTIPLY_ADD * (model.ops_per_token() + model.softmax.trained_ops_per_token())


def _busiest_flops(config: LanguageModelConfig, devices: int) -> float:
    """Operations for each token of its own that the device with most experts does, if loads are even.

    Four experts on 16 devices keep four of them busy, as the paper says of MoE-4.
    """
    flops = arithmetic_flops(config)
    if not isinstance(config, MixtureLM):
        return flops
    weights = sum(p.numel() for p in build(config, device="meta").expert_parameters())
    of_experts = _OPERATIONS_PER_MULTIPLY_ADD * config.k * (weights // config.num_experts)
    most = -(-config.num_experts // devices)
    return flops + of_experts * (most * devices / config.num_experts - 1)


def rows_per_expert(config: LanguageModelConfig, batch_tokens: int) -> float:
    """k b / n (section 3.1); 0 without experts."""
    return config.k * batch_tokens / config.num_experts if isinstance(config, MixtureLM) else 0.0


def gibibytes(number: float) -> str:
    """Bytes as people read them."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def _all_to_all_bytes(config: LanguageModelConfig, devices: int, tokens: int) -> int:
    """There and back, forward and backward, and each pair's number and weight there and its gradient back.

    Rows are float32 in any precision, as they are between the layers.
    """
    if not isinstance(config, MixtureLM):
        return 0
    elsewhere = (devices - 1) / devices
    rows = tokens * _devices_reached(config, devices) * elsewhere
    pairs = tokens * config.k * elsewhere
    return round(4 * rows * config.width * FLOAT32 + pairs * (INT32 + 2 * FLOAT32))


def _word_bytes(config: LanguageModelConfig, method: Method) -> int:
    """Of a micro-batch. Each different word's number there, its row back, and the row's gradient there.

    In the softmax over all words the hidden values and numbers of all targets go to all devices instead, a
    logit and a logsumexp of each come back, and the gradients of both.
    """
    elsewhere = (method.devices - 1) / method.devices
    asked = _different_words(config, method.tokens)
    if config.softmax_samples:
        among = _different_words(config, method.tokens + config.softmax_samples)
        of_softmax = among * (INT32 + 2 * (config.width + 1) * FLOAT32)
    else:
        to_all = method.devices * method.tokens
        of_softmax = to_all * (_INT64 + 2 * (config.width + 2) * FLOAT32)
    return round(elsewhere * (asked * (INT32 + 2 * config.width * FLOAT32) + of_softmax))


def _different_words(config: LanguageModelConfig, number: int) -> float:
    """Among so many words, if they are as frequent as a sampled softmax's candidates."""
    word_V = torch.arange(config.vocab_size)
    return float(log_chance(word_V, num_samples=number, vocab_size=config.vocab_size).exp().sum())


def _devices_reached(config: MixtureLM, devices: int) -> float:
    """How many devices have an expert of a token, if all sets of experts that a gate may choose are alike.

    From the chance that a device has none of them: in each chosen group of experts (a flat gate has one) all
    of a token's are among those that stand elsewhere.
    """
    gate = config.gate
    num_groups, chosen = (gate.num_groups, gate.k_primary) if isinstance(gate, HierarchicalGate) else (1, 1)
    in_group, k = config.num_experts // num_groups, config.k // chosen
    reached = 0.0
    for own in split(config.num_experts, devices):
        here = Counter(expert // in_group for expert in own)
        # By the number of groups chosen so far, sums over all ways to choose them; then over groups here.
        missed = [float(math.comb(num_groups - len(here), number)) for number in range(chosen + 1)]
        for overlap in here.values():
            none = math.comb(in_group - overlap, k) / math.comb(in_group, k)
            missed = [after + none * before for after, before in zip(missed, [0.0, *missed], strict=False)]
        reached += 1 - missed[chosen] / math.comb(num_groups, chosen)
    return reached
