"""GNMT's beam search: the translations of the best scores, normalised by length, many sources at once.

The score is s(Y, X) = log P(Y | X) / lp(Y) + cp(X; Y), with lp(Y) = (5 + |Y|)^alpha / 6^alpha and
cp(X; Y) = beta * sum over the source tokens of log(min(the attention it had over all steps, 1)) (Wu et al.
2016, section 7). |Y| counts the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..models.translation import TranslationModel
from .choice import require_finite
from .inference import evaluation_mode
from .target import Hypothesis, MaxLength, Targets, TargetTokens, groups

_Reals = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

# A source token that had less attention than this counts as if it had had as much: log 0 is no score.
LEAST_COVERAGE = 1e-10


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """What is searched for, and how widely.

    beam_size: hypotheses that go on at each step (GNMT: 8 to 12). length_penalty, coverage_penalty: alpha and
    beta of the score; 0 is without. prune: of the continuations of a hypothesis those are left out whose
    log-probability is further than this below its best, and of finished translations those whose score is
    further than this below the best; None: neither. num_best: translations of each source, at most.
    """

    beam_size: int = 8
    length_penalty: float = 0.2
    coverage_penalty: float = 0.2
    prune: float | None = 3.0
    max_length: MaxLength = field(default=MaxLength())
    num_best: int = 1

    def __post_init__(self) -> None:
        for name in ("beam_size", "num_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        # With more, lp of a long translation is no finite number.
        for name, most in (("length_penalty", 10), ("coverage_penalty", 100)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} ({getattr(self, name)}) must be from 0 to {most}")
        if self.prune is not None and not self.prune > 0:
            raise ValueError(f"prune ({self.prune}) must be above 0, or None")

    def normalization(self, length: Any) -> Any:
        """lp(Y) of a length, or of an array of lengths."""
        return ((5 + length) / 6) ** self.length_penalty

    def translations(
        self,
        model: TranslationModel,
        sources: Sequence[Sequence[int]],
        *,
        tokens: TargetTokens,
        numbers: Sequence[int],
        max_positions: int,
        keep_attention: bool = False,
    ) -> list[list[Hypothesis]]:
        """See `beam_search`. numbers: are of no use to it."""
        return beam_search(
            model,
            sources,
            tokens=tokens,
            search=self,
            max_tokens=max_positions * self.beam_size,
            keep_attention=keep_attention,
        )


def beam_search(
    model: TranslationModel,
    sources: Sequence[Sequence[int]],
    *,
    tokens: TargetTokens,
    search: BeamSearch,
    max_tokens: int = 4096,
    keep_attention: bool = False,
) -> list[list[Hypothesis]]:
    """The best translations of each source that the search finds, best first; at least one.

    At each step the `beam_size` most probable of all continuations count: those that end are finished, and
    as many others go on as the beam is wide. The search of a sentence ends when no hypothesis can become
    better than what it has found, so that ending it changes no result.

    sources: token ids; one may be empty. max_tokens: hypotheses times source positions that are translated at
    once, with padding. A translation does not depend on the other sources.

    Raises:
        ValueError: the model's output is not finite, a token is not in its vocabulary, or a gate of it
            chooses over the batch.
    """
    found: list[list[Hypothesis]] = [[] for _ in sources]
    for group in groups(sources, rows_per_source=search.beam_size, max_tokens=max_tokens):
        sentences = [_Sentence(len(sources[number]), search) for number in group]
        with evaluation_mode(model), torch.inference_mode():
            targets = Targets.begin(
                model, [sources[number] for number in group], tokens=tokens, keep_attention=keep_attention
            )
            _search(targets, sentences, search)
        for number, sentence in zip(group, sentences, strict=True):
            found[number] = sentence.best()
    return found


class _Sentence:
    """What is known of one source's translations.

    finished: the best so far, best first, of equal scores the one that was found first.
    """

    def __init__(self, num_source_tokens: int, search: BeamSearch) -> None:
        self.search = search
        self.num_source_tokens = num_source_tokens
        self.max_length = search.max_length.of(num_source_tokens)
        self.finished: list[Hypothesis] = []

    def add(self, hypothesis: Hypothesis) -> None:
        self.finished.append(hypothesis)
        self.finished.sort(key=lambda each: -each.score)
        del self.finished[self.search.num_best :]

    def is_done(self, best_logprob: float) -> bool:
        """Whether nothing that goes on can be among the best. best_logprob: of what goes on, or -inf.

        A logarithm of probability only falls, no length has a greater lp than the greatest, and cp is 0 at
        best.
        """
        if best_logprob == -np.inf:
            return True
        bound = best_logprob / self.search.normalization(self.max_length)
        if len(self.finished) == self.search.num_best and bound <= self.finished[-1].score:
            return True
        return bool(self.finished) and bound < self._least_score()

    def best(self) -> list[Hypothesis]:
        return [hypothesis for hypothesis in self.finished if hypothesis.score >= self._least_score()]

    def _least_score(self) -> float:
        prune = np.inf if self.search.prune is None else self.search.prune
        return self.finished[0].score - prune


@dataclass(frozen=True, kw_only=True)
class _Beam:
    """The hypotheses that go on, K for each of B sentences, the most probable first.

    logprob_BK: minus infinity where a sentence has fewer. written_BKS: their tokens.
    """

    logprob_BK: _Reals
    written_BKS: _Ints

    def last_tokens(self, begin_id: int) -> _Ints:
        """The last token of each hypothesis, [B * K]."""
        num_steps = self.written_BKS.shape[2]
        if num_steps == 0:
            return np.full(self.logprob_BK.size, begin_id)
        return self.written_BKS[:, :, -1].reshape(-1)


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    """Continuations of each sentence's hypotheses, the most probable first, [B, C].

    logprob_BC: minus infinity for what is none. parent_BC: which hypothesis goes on. token_BC: with what.
    """

    logprob_BC: _Reals
    parent_BC: _Ints
    token_BC: _Ints

    def take(self, index_BC: _Ints) -> "_Candidates":
        return _Candidates(
            logprob_BC=np.take_along_axis(self.logprob_BC, index_BC, axis=1),
            parent_BC=np.take_along_axis(self.parent_BC, index_BC, axis=1),
            token_BC=np.take_along_axis(self.token_BC, index_BC, axis=1),
        )


def _search(targets: Targets, sentences: list[_Sentence], search: BeamSearch) -> None:
    """Fill the sentences' lists of finished translations."""
    num_sentences = len(sentences)
    beam = _Beam(
        logprob_BK=np.zeros((num_sentences, 1)), written_BKS=np.zeros((num_sentences, 1, 0), dtype=np.int64)
    )
    active = sentences
    while active:
        width, length = beam.logprob_BK.shape[1], beam.written_BKS.shape[2] + 1
        is_last_R = np.repeat([sentence.max_length == length for sentence in active], width)
        logprob_RV = targets.read(beam.last_tokens(targets.tokens.begin_id), is_last_R)
        candidates = _candidates(logprob_RV, beam.logprob_BK, search)
        is_end_BC = candidates.token_BC == targets.tokens.end_id
        _finish(targets, active, beam, candidates, is_end_BC, search)

        # What goes on: the first that do not end, in their order.
        goes_on = np.argsort(is_end_BC, axis=1, kind="stable")[:, : search.beam_size]
        is_end_BK = np.take_along_axis(is_end_BC, goes_on, axis=1)
        kept = candidates.take(goes_on)
        logprob_BK = np.where(is_end_BK, -np.inf, kept.logprob_BC)
        stay_B = np.flatnonzero(
            [not s.is_done(best) for s, best in zip(active, logprob_BK.max(axis=1), strict=True)]
        )
        active = [active[index] for index in stay_B]
        parent_BK = kept.parent_BC[stay_B]
        beam = _Beam(
            logprob_BK=logprob_BK[stay_B],
            written_BKS=np.concatenate(
                [beam.written_BKS[stay_B[:, None], parent_BK], kept.token_BC[stay_B][:, :, None]], axis=2
            ),
        )
        targets.select((stay_B[:, None] * width + parent_BK).reshape(-1), stay_B)


def _candidates(logprob_RV: Tensor, logprob_BK: _Reals, search: BeamSearch) -> _Candidates:
    """The most probable continuations: enough that the beam can be filled with those that do not end."""
    num_candidates = 2 * search.beam_size
    top_RC, token_RC = logprob_RV.topk(min(num_candidates, logprob_RV.shape[1]), dim=1)
    top_RC, token_RC = top_RC.double().cpu().numpy(), token_RC.cpu().numpy()
    require_finite(top_RC[:, 0])
    if search.prune is not None:
        top_RC = np.where(top_RC < top_RC[:, :1] - search.prune, -np.inf, top_RC)
    num_sentences, per_row = len(logprob_BK), top_RC.shape[1]
    total_BC = (logprob_BK[:, :, None] + top_RC.reshape(*logprob_BK.shape, per_row)).reshape(
        num_sentences, -1
    )
    index_BC = np.argsort(-total_BC, axis=1, kind="stable")[:, :num_candidates]
    all_of_them = _Candidates(
        logprob_BC=total_BC,
        parent_BC=np.broadcast_to(np.arange(total_BC.shape[1]) // per_row, total_BC.shape),
        token_BC=token_RC.reshape(num_sentences, -1),
    )
    return all_of_them.take(index_BC)


def _finish(
    targets: Targets,
    sentences: list[_Sentence],
    beam: _Beam,
    candidates: _Candidates,
    is_end_BC: npt.NDArray[np.bool_],
    search: BeamSearch,
) -> None:
    """Give each sentence the translations that end at this step, of those that the beam has room for."""
    is_finished_BC = is_end_BC & (candidates.logprob_BC > -np.inf)
    is_finished_BC[:, search.beam_size :] = False
    places = np.argwhere(is_finished_BC)
    if not len(places):
        return
    coverage_R = _coverage_penalty(targets, search)
    length, width = beam.written_BKS.shape[2] + 1, beam.logprob_BK.shape[1]
    for sentence_index, place in places:
        sentence, parent = sentences[sentence_index], candidates.parent_BC[sentence_index, place]
        logprob, row = candidates.logprob_BC[sentence_index, place], sentence_index * width + parent
        sentence.add(
            Hypothesis(
                tokens=tuple(beam.written_BKS[sentence_index, parent].tolist()),
                logprob=float(logprob),
                score=float(logprob / search.normalization(length) + coverage_R[row]),
                end="length" if length == sentence.max_length else "stop",
                attention=targets.attention_of(row, sentence.num_source_tokens),
            )
        )


def _coverage_penalty(targets: Targets, search: BeamSearch) -> _Reals:
    """cp of each row, [R]."""
    coverage_RU = targets.coverage_RU.double()
    rows_per_sentence = len(coverage_RU) // targets.memory.num_sentences
    is_real_RU = targets.memory.mask_BU.repeat_interleave(rows_per_sentence, dim=0)
    log_RU = coverage_RU.clamp(LEAST_COVERAGE, 1.0).log().where(is_real_RU, 0.0)
    return search.coverage_penalty * log_RU.sum(dim=1).cpu().numpy()
