"""Small language models with weights that make a difference, and a plain way of running them."""

import torch

from sparsegate.models import LanguageModel, MixtureLM, RecurrentLM, build


def tiny_mixture(vocab_size, *, seed=0, dtype=torch.float32, scale=3.0):
    """A mixture of four experts in training mode; `scale` sharpens its distributions."""
    config = MixtureLM(
        vocab_size=vocab_size, width=8, lstm_units=8, dropout=0.5, num_experts=4, k=2, hidden=8
    )
    return _spread(build(config, dtype=dtype), seed, scale)


def tiny_recurrent(vocab_size, *, seed=0, dtype=torch.float32, scale=3.0):
    """Two LSTMs in training mode."""
    config = RecurrentLM(vocab_size=vocab_size, width=8, lstm_units=8, dropout=0.5, num_layers=2)
    return _spread(build(config, dtype=dtype), seed, scale)


def tiny_adaptive(vocab_size, *, seed=0, dtype=torch.float32, scale=3.0):
    """Two LSTMs and an adaptive softmax with one cluster."""
    config = RecurrentLM(
        vocab_size=vocab_size, width=8, lstm_units=8, dropout=0.5, num_layers=2, softmax_cutoffs=(3,)
    )
    return _spread(build(config, dtype=dtype), seed, scale)


def _spread(model, seed, scale):
    """Every weight random: gates start at zero, where all experts tie."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            deviation = (scale if name.startswith("softmax") else 1) * parameter.shape[-1] ** -0.5
            parameter.copy_(values * deviation)
    return model.train()


def token_by_token(model: LanguageModel, inputs):
    """The oracle: log-probabilities [S, V] after each of the inputs, read one at a time from the start."""
    model.eval()
    state, logprobs = None, []
    with torch.no_grad():
        for token in inputs:
            output = model(torch.tensor([[token]]), state=state)
            state = output.state
            logprobs.append(torch.log_softmax(model.softmax(output.hidden_BSD)[0, 0].double(), dim=-1))
    model.train()
    return torch.stack(logprobs)
