"""Decoding as it reads: nothing cached, one sentence at a time, scores in plain Python."""

import itertools
import math
from dataclasses import dataclass

import torch

from sparsegate.decoding import BeamSearch, TargetTokens
from sparsegate.models.translation import TranslationModel

TOKENS = TargetTokens(begin_id=1, end_id=2, never=(0,))


@dataclass(frozen=True)
class Read:
    """After begin and some tokens, read from the start: log-probabilities of each next token, attention."""

    logprobs: list[list[float]]
    attention: torch.Tensor


def read(model: TranslationModel, source, tokens) -> Read:
    with torch.no_grad():
        source_BS = torch.tensor([list(source) or [0]])
        out = model.eval()(
            source_BS=source_BS,
            source_mask_BS=torch.full(source_BS.shape, bool(source)),
            target_BS=torch.tensor([[TOKENS.begin_id, *tokens]]),
            target_mask_BS=torch.ones(1, 1 + len(tokens), dtype=torch.bool),
        )
        logprob_SV = torch.log_softmax(model.softmax(out.hidden_BSD)[0].double(), dim=-1)
    model.train()
    return Read(logprob_SV.tolist(), out.attention_BSU[0, :, : len(source)])


def gnmt_score(logprob: float, attention: torch.Tensor, search: BeamSearch) -> float:
    """s(Y, X) of GNMT's section 7; the end counts as a token, and no attention at all as 1e-10."""
    length = len(attention)
    penalty = (5 + length) ** search.length_penalty / (5 + 1) ** search.length_penalty
    columns = attention.T.tolist()
    coverage = sum(math.log(min(max(sum(column), 1e-10), 1.0)) for column in columns)
    return logprob / penalty + search.coverage_penalty * coverage


def allowed(logprob_V: list[float], *, is_last: bool) -> dict[int, float]:
    """What may be written next, and how probable it is."""
    left_out = {TOKENS.begin_id, *TOKENS.never}
    choices = {token: value for token, value in enumerate(logprob_V) if token not in left_out}
    return {TOKENS.end_id: choices[TOKENS.end_id]} if is_last else choices


def near_the_best(choices: dict[int, float], search: BeamSearch) -> dict[int, float]:
    best = max(choices.values())
    return {t: v for t, v in choices.items() if search.prune is None or v >= best - search.prune}


def ranked(scored: list[tuple[float, float, tuple[int, ...]]], search: BeamSearch):
    """(score, logprob, tokens), best first, those far below the best left out."""
    best_first = sorted(scored, key=lambda each: -each[0])
    least = -math.inf if search.prune is None else best_first[0][0] - search.prune
    return [each for each in best_first if each[0] >= least]


def all_translations(model: TranslationModel, source, search: BeamSearch):
    """Every sequence up to the greatest length, with its score."""
    most, scored = search.max_length.of(len(source)), []
    words = [t for t in range(len(model.softmax.bias)) if t not in (0, TOKENS.begin_id, TOKENS.end_id)]
    for length in range(most):
        for tokens in itertools.product(words, repeat=length):
            after = read(model, source, tokens)
            logprob, is_left = 0.0, True
            for step, token in enumerate((*tokens, TOKENS.end_id)):
                choices = near_the_best(allowed(after.logprobs[step], is_last=step + 1 == most), search)
                is_left = is_left and token in choices
                logprob += after.logprobs[step][token]
            if is_left:
                scored.append((gnmt_score(logprob, after.attention, search), logprob, tokens))
    return ranked(scored, search)


def plain_beam_search(model: TranslationModel, source, search: BeamSearch):
    """The search step by step up to the greatest length, never ended early."""
    most, scored = search.max_length.of(len(source)), []
    beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for step in range(most):
        candidates = []
        for logprob, tokens in beam:
            after = read(model, source, tokens)
            choices = near_the_best(allowed(after.logprobs[-1], is_last=step + 1 == most), search)
            candidates += [(logprob + value, tokens, token, after) for token, value in choices.items()]
        candidates.sort(key=lambda each: -each[0])
        for logprob, tokens, token, after in candidates[: search.beam_size]:
            if token == TOKENS.end_id:
                scored.append((gnmt_score(logprob, after.attention, search), logprob, tokens))
        going_on = [each for each in candidates if each[2] != TOKENS.end_id]
        beam = [(logprob, (*tokens, token)) for logprob, tokens, token, _ in going_on[: search.beam_size]]
    return ranked(scored, search)


def plain_greedy(model: TranslationModel, source, most: int) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    while True:
        choices = allowed(read(model, source, tokens).logprobs[-1], is_last=len(tokens) + 1 == most)
        token = max(choices, key=lambda each: choices[each])
        if token == TOKENS.end_id:
            return tokens
        tokens = (*tokens, token)
