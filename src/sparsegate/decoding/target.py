"""Target sentences that grow by one token at a time, many at once, each beside its encoded source."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..models.translation import DecoderState, Memory, TranslationModel
from .likelihood import groups_by_length

_Ints = npt.NDArray[np.int64]

# What the target of a short source takes as well, when sentences are put together.
_LEAST_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class TargetTokens:
    """The ids that decoding has to know: what a target begins and ends with, and what is never written.

    The beginning is never written in any case, but for the end, where both are the same id.
    """

    begin_id: int
    end_id: int
    never: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (least := min(self.begin_id, self.end_id, *self.never)) < 0:
            raise ValueError(f"tokens ({least}) must have ids of at least 0")
        if self.end_id in self.never:
            raise ValueError(
                f"tokens.never ({self.end_id}) must not have tokens.end_id in it: no translation could end"
            )

    @property
    def unwritten(self) -> list[int]:
        """All that is never written."""
        return sorted({self.begin_id, *self.never} - {self.end_id})


@dataclass(frozen=True, kw_only=True)
class MaxLength:
    """The most tokens that a translation may have, its end included, by the number of source tokens.

    GNMT allows twice the source; `extra` leaves room where the source is very short.
    """

    ratio: float = 2.0
    extra: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1000:
            raise ValueError(f"max_length.ratio ({self.ratio}) must be from 0 to 1000")
        # A length that is no whole number would never be reached. Of infinity and NaN the remainder is NaN.
        if not self.extra >= 1 or self.extra % 1:
            raise ValueError(f"max_length.extra ({self.extra}) must be a whole number, at least 1")

    def of(self, num_source_tokens: int) -> int:
        return int(self.ratio * num_source_tokens) + self.extra


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One translation of a source.

    tokens: ids, without the end. logprob: natural logarithm of the probability of the tokens and the end.
    score: what it was chosen by; higher is better. end: whether the model ended it, or the greatest length
    was reached, at which the end is the only token left. attention: float32 [tokens and end, source tokens],
    where it was asked for.
    """

    tokens: tuple[int, ...]
    logprob: float
    score: float
    end: Literal["stop", "length"]
    attention: npt.NDArray[np.float32] | None = field(default=None, compare=False)


def groups(sources: Sequence[Sequence[int]], *, rows_per_source: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices of sources of about equal length that are translated together, with so many rows for each.

    max_tokens: rows times source positions of a group, with padding; a group has one source at least.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens ({max_tokens}) must be at least 1")
    lengths = [rows_per_source * max(_LEAST_LENGTH, len(source)) for source in sources]
    return groups_by_length(lengths, max_tokens=max_tokens)


@dataclass(kw_only=True)
class Targets:
    """Rows of target tokens on their way through the decoder: equally many for each sentence, side by side.

    memory: of the sentences. state: of the rows. coverage_RU: the attention that each source token had so
    far, by row. attention_RSU: of every step, if it is kept.
    """

    model: TranslationModel
    tokens: TargetTokens
    memory: Memory
    coverage_RU: Tensor
    state: DecoderState | None = None
    attention_RSU: Tensor | None = None

    @staticmethod
    def begin(
        model: TranslationModel,
        sources: Sequence[Sequence[int]],
        *,
        tokens: TargetTokens,
        keep_attention: bool,
    ) -> "Targets":
        """Encode the sources; one row for each. The model should be in `evaluation_mode`.

        Raises:
            ValueError: a token is not in the model's vocabulary, or a gate chooses over the batch.
        """
        require_independence(model)
        source_BS, mask_BS = _padded(sources)
        vocab_size, device = model.softmax.vocab_size, model.softmax.device
        _require_in_vocabulary("tokens", [tokens.begin_id, tokens.end_id, *tokens.never], vocab_size)
        _require_in_vocabulary("sources", source_BS, vocab_size)
        memory, _ = model.encode(source_BS.to(device), mask_BS.to(device))
        dtype = torch.promote_types(memory.value_BUD.dtype, torch.float32)
        coverage_RU = torch.zeros(mask_BS.shape, dtype=dtype, device=device)
        return Targets(
            model=model,
            tokens=tokens,
            memory=memory,
            coverage_RU=coverage_RU,
            attention_RSU=coverage_RU[:, None, :][:, :0] if keep_attention else None,
        )

    def read(self, token_R: _Ints, is_last_R: npt.NDArray[np.bool_]) -> Tensor:
        """Log-probabilities of each row's next token, [R, V], float32 at least.

        token_R: the last token of each row. Minus infinity for what is never written, and where `is_last_R`
        for all but the end; the others stay as probable as the model says.
        """
        device = self.coverage_RU.device
        input_R1 = torch.from_numpy(token_R).to(device)[:, None]
        out = self.model.decode(input_R1, self.memory, state=self.state)
        self.state = out.state
        self.coverage_RU = self.coverage_RU + out.attention_BSU[:, 0]
        if self.attention_RSU is not None:
            self.attention_RSU = torch.cat([self.attention_RSU, out.attention_BSU], dim=1)
        logits_RV = self.model.softmax(out.hidden_BSD[:, 0])
        logprob_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)).log_softmax(dim=-1)
        # In place: a matrix of rows and vocabulary is the largest there is, and few of its entries change.
        for token in self.tokens.unwritten:
            logprob_RV[:, token] = -torch.inf
        for row in np.flatnonzero(is_last_R).tolist():
            end = logprob_RV[row, self.tokens.end_id].clone()
            logprob_RV[row] = -torch.inf
            logprob_RV[row, self.tokens.end_id] = end
        return logprob_RV

    def select(self, row_R: _Ints, sentence_B: _Ints) -> None:
        """Go on with some rows, in any order and any number of times, and with the sentences they are of."""
        assert self.state is not None
        if np.array_equal(row_R, np.arange(len(self.coverage_RU))):
            return
        rows = torch.from_numpy(row_R).to(self.coverage_RU.device)
        if len(sentence_B) != self.memory.num_sentences:
            self.memory = self.memory.select(torch.from_numpy(sentence_B).to(rows.device))
        self.state = self.state.select(rows)
        self.coverage_RU = self.coverage_RU[rows]
        if self.attention_RSU is not None:
            self.attention_RSU = self.attention_RSU[rows]

    def attention_of(self, row: int, num_source_tokens: int) -> npt.NDArray[np.float32] | None:
        """Attention of all steps of a row, without padding."""
        if self.attention_RSU is None:
            return None
        return self.attention_RSU[row, :, :num_source_tokens].float().cpu().numpy().copy()


def require_independence(model: TranslationModel) -> None:
    """Refuse a model in which a translation would depend on those that it is made together with."""
    if names := model.selects_over_batch():
        raise ValueError(
            f"{names[0]}: in evaluation, too, its gate chooses over all sentences at once, so that a "
            "translation would depend on its neighbours; train with another gate and without a capacity"
        )


def _require_in_vocabulary(what: str, ids: npt.ArrayLike, vocab_size: int) -> None:
    ids = np.asarray(ids)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"{what} ({outside.flat[0]}) must have ids from 0 to {vocab_size - 1}, those of the model's "
            "vocabulary; is it of another dataset?"
        )


def _padded(sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask, [B, S], of at least one column."""
    shape = (len(sources), max([1, *map(len, sources)]))
    source_BS, mask_BS = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    for row, source in enumerate(sources):
        source_BS[row, : len(source)] = source
        mask_BS[row, : len(source)] = True
    return torch.from_numpy(source_BS), torch.from_numpy(mask_BS)


def as_ints(values: Any) -> _Ints:
    return np.asarray(values, dtype=np.int64)
