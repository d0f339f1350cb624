"""Translations token by token: the most probable next one, or drawn from the probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..models.translation import TranslationModel
from .choice import choose, require_drawing
from .inference import evaluation_mode
from .peers import ALONE, Peers
from .target import Hypothesis, MaxLength, Targets, TargetTokens, as_ints, groups


@dataclass(frozen=True, kw_only=True)
class TranslationSampling:
    """How a translation is drawn; temperature 0, the default, takes the most probable token of every step.

    temperature, top_k, top_p: as in `Sampling`. seed: of the draws. Each source has its own, which depend on
    the seed and the source's number alone.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    max_length: MaxLength = field(default=MaxLength())

    def __post_init__(self) -> None:
        require_drawing(self)

    def translations(
        self,
        model: TranslationModel,
        sources: Sequence[Sequence[int]],
        *,
        tokens: TargetTokens,
        numbers: Sequence[int],
        max_positions: int,
        keep_attention: bool = False,
        peers: Peers = ALONE,
    ) -> list[list[Hypothesis]]:
        """See `sample_translations`; one of each source."""
        found = sample_translations(
            model,
            sources,
            tokens=tokens,
            sampling=self,
            numbers=numbers,
            max_tokens=max_positions,
            keep_attention=keep_attention,
            peers=peers,
        )
        return [[hypothesis] for hypothesis in found]


@dataclass(frozen=True, kw_only=True)
class SharedSampling:
    """Translates as `sampling` says, each of the peers its share of the sources; all get all translations."""

    sampling: TranslationSampling
    peers: Peers

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
        """See `sample_translations`; one of each source. ValueError for attention, which is not sent."""
        if keep_attention:
            raise ValueError("keep_attention: is for one process; several have it of their own shares alone")
        return self.sampling.translations(
            model, sources, tokens=tokens, numbers=numbers, max_positions=max_positions, peers=self.peers
        )


@dataclass(kw_only=True)
class _Row:
    """A translation on its way. written: its tokens. logprobs: their natural logarithms of probability."""

    number: int
    num_source_tokens: int
    max_length: int
    draws: np.random.PCG64
    written: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def is_last(self) -> bool:
        """Whether its next token is the last it may have."""
        return len(self.written) + 1 == self.max_length


def sample_translations(
    model: TranslationModel,
    sources: Sequence[Sequence[int]],
    *,
    tokens: TargetTokens,
    sampling: TranslationSampling,
    numbers: Sequence[int] | None = None,
    max_tokens: int = 4096,
    keep_attention: bool = False,
    peers: Peers = ALONE,
) -> list[Hypothesis]:
    """One translation of each source, by greedy choice or drawn; its score is its log-probability.

    sources: token ids; one may be empty. numbers: of the sources; None counts them from 0. max_tokens: source
    positions that are translated at once, with padding. A translation depends on its source, its number and
    `sampling`, not on the others. peers: who translate a share of the sources each. All of them get all
    translations, attention only of their own.

    Raises:
        ValueError: the model's output is not finite, a token is not in its vocabulary, or a gate of it
            chooses over the batch.
    """
    found: list[Hypothesis | None] = [None] * len(sources)
    for group in groups(sources, rows_per_source=1, max_tokens=max_tokens):
        own = [group[index] for index in peers.rows(len(group))]
        rows = [
            _Row(
                number=number,
                num_source_tokens=len(sources[number]),
                max_length=sampling.max_length.of(len(sources[number])),
                draws=np.random.PCG64([sampling.seed, number if numbers is None else numbers[number]]),
            )
            for number in own
        ]
        with evaluation_mode(model), torch.inference_mode():
            targets = Targets.begin(
                model, [sources[number] for number in own], tokens=tokens, keep_attention=keep_attention
            )
            _write(targets, rows, sampling, found, peers)
    _tell(found, peers)
    return [hypothesis for hypothesis in found if hypothesis is not None]


def _write(
    targets: Targets,
    rows: list[_Row],
    sampling: TranslationSampling,
    found: list[Hypothesis | None],
    peers: Peers,
) -> None:
    tokens = targets.tokens
    token_R = as_ints([tokens.begin_id] * len(rows))
    while any(peers.sum(len(rows))):
        logprob_RV = targets.read(token_R, np.array([row.is_last for row in rows], dtype=np.bool_))
        if not rows:
            continue  # until all are done: this process's experts were asked
        chosen = choose(logprob_RV, sampling=sampling, draws=[row.draws for row in rows], never=None)
        chosen_R1 = torch.tensor(chosen, device=logprob_RV.device)[:, None]
        logprobs = logprob_RV.gather(1, chosen_R1)[:, 0].tolist()
        going_on: list[int] = []
        for index, (row, token, logprob) in enumerate(zip(rows, chosen, logprobs, strict=True)):
            at_last = row.is_last
            row.logprobs.append(logprob)
            if token != tokens.end_id:
                row.written.append(token)
                going_on.append(index)
                continue
            found[row.number] = Hypothesis(
                tokens=tuple(row.written),
                logprob=sum(row.logprobs),
                score=sum(row.logprobs),
                end="length" if at_last else "stop",
                attention=targets.attention_of(index, row.num_source_tokens),
            )
        token_R = as_ints([chosen[index] for index in going_on])
        if len(going_on) < len(rows):
            rows = [rows[index] for index in going_on]
            targets.select(as_ints(going_on), as_ints(going_on))


def _tell(found: list[Hypothesis | None], peers: Peers) -> None:
    """Take over what the peers found."""
    own = [
        [number, [*each.tokens], each.logprob, each.score, each.end]
        for number, each in enumerate(found)
        if each is not None
    ]
    for told in peers.tell_all(own):
        for number, written, logprob, score, end in told:
            if found[number] is None:
                found[number] = Hypothesis(tokens=tuple(written), logprob=logprob, score=score, end=end)
