"""How much memory training a language model takes, told before any of it is allocated.

What is counted: weights, gradients, the optimizer's state, and what one micro-batch keeps for its backward
pass. What is not: the program itself (some 400 MB with torch), and the allocator's waste.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from .build import build
from .config import FeedForwardLM, LanguageModelConfig, MixtureLM
from .cross_entropy import block_words, is_plain
from .language_model import LanguageModel
from .softmax import Part, Softmax

FLOAT32, INT32, BFLOAT16, BOOL, STEP = 4, 4, 2, 1, 8


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a model is trained, as far as memory depends on it.

    tokens: of a micro-batch, padding included. experts: their optimizer. expert_bytes: of each of their
    weights, and of its gradient. copied_bytes: of each weight in a copy of all experts in the dtype of the
    products; 0: there is none. in_backward: whether each expert is updated as soon as its gradient is there,
    so that those of all experts never exist together. sparse_rows: whether the vocabulary's tables have
    gradients for the rows that a batch used alone. recompute: whether the experts' hidden layers are computed
    again in the backward pass instead of kept. devices: over which the experts are spread; the rest is on
    each of them, and bytes are of one. spread_words: whether the vocabulary's tables are spread too.
    evaluated_tokens: that evaluation reads at once. saved_copy: whether weights and state are copied beside
    themselves, to be written while training goes on.
    """

    tokens: int
    experts: Literal["adam", "factored"] = "adam"
    expert_bytes: int = FLOAT32
    copied_bytes: int = 0
    in_backward: bool = False
    sparse_rows: bool = False
    recompute: bool = False
    devices: int = 1
    spread_words: bool = False
    evaluated_tokens: int = 1024
    saved_copy: bool = False


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes.

    experts, tables, others: of the weights: the experts, embedding and softmax, everything else. gradients:
    where all exist together. optimizer: its state. activations: what one micro-batch keeps from its forward
    pass. softmax: what it takes at the moment at which the softmax goes backward, which is before there are
    gradients of other layers. peak: the most that is needed at once.
    """

    experts: int = field(metadata={"doc": "weights of the experts"})
    tables: int = field(metadata={"doc": "weights of embedding and softmax"})
    others: int = field(metadata={"doc": "weights of everything else"})
    gradients: int = field(metadata={"doc": "gradients"})
    optimizer: int = field(metadata={"doc": "optimizer state"})
    activations: int = field(metadata={"doc": "activations of a micro-batch"})
    softmax: int = field(metadata={"doc": "  the softmax's beside them"})
    peak: int = field(metadata={"doc": "most at once"})

    @property
    def weights(self) -> int:
        return self.experts + self.tables + self.others


def training_memory(config: LanguageModelConfig, method: Method) -> Memory:
    """Bytes that training takes, from the meta device."""
    model = build(config, device="meta")
    stacks = [_local_shape(parameter, method) for parameter in model.expert_parameters()]
    whole_tables = _numel(model.embedding.parameters()) + _numel(model.softmax.parameters())
    num_others = _numel(model.parameters()) - _numel(model.expert_parameters()) - whole_tables
    num_tables = _of_words(whole_tables, config, method)
    experts = sum(shape.numel() for shape in stacks) * method.expert_bytes
    expert_gradients = _one_of_each(stacks) if method.in_backward else experts
    tables = _table_gradients(config, model.softmax, method)
    other_gradients = num_others * FLOAT32 + tables
    optimizer = (
        num_others * 2 * FLOAT32 + _table_state(config, model.softmax, method) + _expert_state(stacks, method)
    )
    activations = _activations(config, model, method)
    softmax = _softmax(config, model.softmax, method)
    weights = experts + (num_tables + num_others) * FLOAT32
    # Expert gradients lie in memory that is kept from step to step; others come after the softmax has gone.
    evaluation = _evaluation(config, model.softmax, method)
    peak = weights + optimizer + expert_gradients
    peak += weights + optimizer if method.saved_copy else 0
    peak += sum(shape.numel() for shape in stacks) * method.copied_bytes
    peak += max(other_gradients + evaluation, activations + softmax + tables)
    return Memory(
        experts=experts,
        tables=num_tables * FLOAT32,
        others=num_others * FLOAT32,
        gradients=expert_gradients + other_gradients,
        optimizer=optimizer,
        activations=activations,
        softmax=softmax,
        peak=peak,
    )


def require_memory(config: LanguageModelConfig, method: Method, *, available: int) -> None:
    """Refuse a model that cannot be trained in so many bytes, before any of them is taken.

    ValueError with both figures. available: see `free_memory.py`.
    """
    needed = training_memory(config, method).peak
    if needed > available:
        raise ValueError(
            f"model: training it takes about {needed / 2**30:,.1f} GiB, and {available / 2**30:,.1f} GiB are "
            "free; use --optim.experts factored, more --training.micro-batches, or fewer experts"
        )


def _local_shape(stack: nn.Parameter, method: Method) -> torch.Size:
    """Of the experts that one device has, which stand along the first axis."""
    return torch.Size((-(-len(stack) // method.devices), *stack.shape[1:]))


def _expert_state(stacks: Sequence[torch.Size], method: Method) -> int:
    """Two moments of every weight, or every matrix's averages of rows and columns, and its last step."""
    if method.experts == "adam":
        return sum(shape.numel() for shape in stacks) * 2 * FLOAT32
    return sum(shape[0] * ((shape[-2] + shape[-1]) * FLOAT32 + STEP) for shape in stacks)


def _table_state(config: LanguageModelConfig, softmax: Softmax, method: Method) -> int:
    """Two moments of every number, or with sparse gradients the first one and eight bytes for each row."""
    words = _num_words(config, method)
    embedding, rest = words * config.width, _of_words(_numel(softmax.parameters()), config, method)
    if not method.sparse_rows:
        return (embedding + rest) * 2 * FLOAT32
    by_rows = embedding * FLOAT32 + words * 8
    if config.sampled_words:
        return 2 * by_rows + words * 2 * FLOAT32
    return by_rows + rest * 2 * FLOAT32


def _num_words(config: LanguageModelConfig, method: Method) -> int:
    """Whose rows a device has at most."""
    return -(-config.vocab_size // method.devices) if method.spread_words else config.vocab_size


def _of_words(number: int, config: LanguageModelConfig, method: Method) -> int:
    """What a device has of numbers that all words have together."""
    return number * _num_words(config, method) // config.vocab_size


def _one_of_each(stacks: Sequence[torch.Size]) -> int:
    """The gradient of one expert."""
    return sum(shape[1:].numel() for shape in stacks) * FLOAT32


def _table_gradients(config: LanguageModelConfig, softmax: Softmax, method: Method) -> int:
    """Of the embedding, [V, D], and of the softmax."""
    embedding = words = _num_words(config, method)
    rest = _of_words(_numel(softmax.parameters()), config, method)
    if method.sparse_rows:
        # On average a device is asked for as many rows as it asks for.
        embedding = min(embedding, method.tokens)
        if samples := config.sampled_words:
            rest = min(words, method.tokens + samples) * (config.width + 1)
    return (embedding * config.width + rest) * FLOAT32


def _activations(config: LanguageModelConfig, model: LanguageModel, method: Method) -> int:
    """What a forward pass keeps, and its gradient needs: seven values for each unit of an LSTM.

    Beside what a layer keeps there are its output, the sum of the residual connection and the dropout's mask.
    """
    layers = list(model.named_layers())
    around = config.width * (2 * FLOAT32 * (1 + len(layers)) + BOOL * len(layers))
    match config:
        case MixtureLM():
            num_lstms, others = 2, _mixture(config, sum(layer.noise_width for _, layer in layers), method)
        case FeedForwardLM():
            num_lstms, others = 2, 2 * (sum(config.hidden) + config.width)
        case _:
            num_lstms, others = config.num_layers, 0
    return method.tokens * (around + (7 * num_lstms * config.lstm_units + others) * FLOAT32)


def _mixture(config: MixtureLM, noise_width: int, method: Method) -> int:
    """Of each choice of a token the hidden layer, input and output; of the gate some forms of its logits."""
    hidden = 0 if method.recompute else config.hidden * (2 if config.experts == "swiglu" else 1)
    return config.k * (hidden + 2 * config.width) + 16 * noise_width + config.width


def _softmax(config: LanguageModelConfig, softmax: Softmax, method: Method) -> int:
    """Log-probabilities, and the most of their gradient and that of the logits; and the candidates' rows."""
    tokens = method.tokens
    if samples := config.sampled_words:
        logits = tokens * min(samples, block_words(tokens))
        return (logits + 2 * (tokens + samples) * config.width) * FLOAT32
    if method.spread_words:
        return _spread_softmax(config, method, tokens * method.devices)
    kept, most = 0, 0
    for part in softmax.parts():
        num_tokens = round(part.share * tokens)
        if is_plain(num_tokens, part.num_words):
            kept += num_tokens * part.num_words
            most = max(most, 2 * num_tokens * part.num_words)
        else:
            words = block_words(num_tokens)
            most = max(most, num_tokens * words + (2 * num_tokens + words) * part.width)
    return (kept + most) * FLOAT32


def _spread_softmax(config: LanguageModelConfig, method: Method, everywhere: int) -> int:
    """Of the tokens of all devices: what is received of them, what is sent, and the same of their gradients;
    and some of the logits.
    """
    words = min(block_words(everywhere), _num_words(config, method))
    return (everywhere * words + (4 * everywhere + words) * config.width) * FLOAT32


def _evaluation(config: LanguageModelConfig, softmax: Softmax, method: Method) -> int:
    """Logits and log-probabilities, or some of the logits."""
    tokens = method.evaluated_tokens
    if method.spread_words:
        return _spread_softmax(config, method, tokens)
    whole = [Part(1.0, config.vocab_size, config.width)]
    most = 0
    for part in softmax.parts() if config.softmax_cutoffs else whole:
        num_tokens = round(part.share * tokens)
        plain = is_plain(num_tokens, part.num_words)
        most = max(most, num_tokens * (2 * part.num_words if plain else block_words(num_tokens)))
    return most * FLOAT32


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
