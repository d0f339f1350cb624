"""Routing: who goes where, with what weight. BalanceSums: what the balance losses need to know about it."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, kw_only=True)
class BalanceSums:
    """Sums over tokens that the balance losses are functions of; `a + b` are the sums of the joined batch.

    The paper balances over the whole synchronous batch, and the mean of CV² over parts is not the CV² of the
    whole: micro-batches and ranks add their sums first, and the losses square afterwards.

    importance_E: sum of the gate's weights per expert (eq. 6), float, differentiable.
    count_E: number of tokens sent to each expert, int64.
    within_load_E: smooth estimate of `count_E` (eq. 10) over the tokens that reached the expert's group,
        float, differentiable; the counts themselves where no smooth estimate exists (no noise, or every
        expert chosen).
    group_load_A: the same of the groups of a hierarchy; a flat gate is one group that every token reaches.
    group_count_A: number of tokens that reached each group, int64.
    within_probability_E: sum of the softmax over all experts of a group, before any is chosen and without
        the noise of eq. 4, over the same tokens, float, differentiable.
    group_probability_A: the same of the groups, over all tokens.
    z: sum of the squared log-sum-exp of the same logits, float scalar, differentiable. In a hierarchy both
        levels are in it.
    threshold: sum of the threshold loss over tokens and experts (eq. 20), float scalar, differentiable; 0 in
        gates without thresholds, and in evaluation.
    num_tokens: number of real tokens, int64 scalar.
    num_unrouted: number of real tokens that no expert took, int64 scalar.
    num_dropped: number of token-expert pairs that a capacity dropped, int64 scalar. They are in `count_E`,
        importance and load all the same: these tell what was asked for.
    """

    importance_E: Tensor
    count_E: Tensor
    within_load_E: Tensor
    group_load_A: Tensor
    group_count_A: Tensor
    within_probability_E: Tensor
    group_probability_A: Tensor
    z: Tensor
    threshold: Tensor
    num_tokens: Tensor
    num_unrouted: Tensor
    num_dropped: Tensor

    def __add__(self, other: "BalanceSums") -> "BalanceSums":
        return BalanceSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def load_E(self) -> Tensor:
        """Smooth estimate of `count_E`: eq. 10, in a hierarchy eq. 14; its factors add up, not it."""
        return self._over_groups(self.within_load_E, self.group_load_A)

    @property
    def probability_E(self) -> Tensor:
        """Sum over the tokens of the experts' probabilities; in a hierarchy put together as eq. 14 does."""
        return self._over_groups(self.within_probability_E, self.group_probability_A)

    def _over_groups(self, within_E: Tensor, group_A: Tensor) -> Tensor:
        share_A1 = (group_A / self.group_count_A.clamp_min(1))[:, None]
        return (within_E.unflatten(0, (share_A1.shape[0], -1)) * share_A1).flatten()

    @property
    def sums(self) -> "BalanceSums":
        """Itself, so that a loss reads `.sums` of a Routing and of BalanceSums alike."""
        return self


class LogitSums(NamedTuple):
    """What losses ask about the logits of all experts, without the noise of eq. 4; with A groups of experts,
    one row of sums for each. Terms of `BalanceSums`.

    probability_AE: sum over the rows of each group of the softmax. z: float scalar, sum of the squared
    log-sum-exp.
    """

    probability_AE: Tensor
    z: Tensor


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The sparse T x E matrix G(x) of eq. 1, kept as its N entries, token by token.

    A pair that is not used (padding, a threshold not reached, a dropped pair) has `expert_N == num_experts`
    and weight 0. All shapes follow from the shape of the input, never from its values.

    token_N: int64, the token of each pair, ascending. expert_N: int64, its expert. weight_N: float32 or
    float64, G(x)_i, differentiable. pairs_T: int64, number of pairs of each token, unused ones included.
    sums: what the balance losses need. pairs_per_token: K where every token has K pairs, so that
    N = T * K; else None.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    pairs_T: Tensor
    sums: BalanceSums
    num_experts: int
    pairs_per_token: int | None

    @staticmethod
    def of_token_choice(
        *,
        expert_TK: Tensor,
        weight_TK: Tensor,
        mask_T: Tensor | None,
        logit_sums: LogitSums,
        load_E: Tensor | None,
    ) -> "Routing":
        """The routing in which every real token goes to the experts of its row.

        expert_TK: int64, no expert twice in a row; `num_experts` for none. weight_TK: their weights, 0 for
        none. mask_T: bool, true for real tokens. logit_sums: over these. load_E: the smooth load where the
        gate has one, else the hard counts stand in for it.
        """
        num_tokens, pairs_per_token = expert_TK.shape
        num_experts = logit_sums.probability_AE.shape[1]
        if mask_T is not None:
            expert_TK = expert_TK.masked_fill(~mask_T[:, None], num_experts)
            weight_TK = weight_TK.masked_fill(~mask_T[:, None], 0.0)
        token_N, expert_N, weight_N = tokens_of_rows(expert_TK), expert_TK.flatten(), weight_TK.flatten()
        return Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=weight_N,
            pairs_T=expert_TK.new_full((num_tokens,), pairs_per_token),
            sums=flat_sums(
                logit_sums=logit_sums,
                token_N=token_N,
                expert_N=expert_N,
                weight_N=weight_N,
                num_tokens=num_tokens,
                mask_T=mask_T,
                load_E=load_E,
                threshold=weight_N.new_zeros(()),
            ),
            num_experts=num_experts,
            pairs_per_token=pairs_per_token,
        )

    @staticmethod
    def of_batch_choice(
        *,
        chosen_TE: Tensor,
        weight_TE: Tensor,
        num_pairs: int,
        mask_T: Tensor | None,
        logit_sums: LogitSums,
        threshold: Tensor,
    ) -> "Routing":
        """The routing in which a token goes to as many experts as have chosen it.

        chosen_TE: bool, false for padding, true for `num_pairs` entries at most. weight_TE: weights of the
        chosen entries. threshold: the term of `BalanceSums`.
        """
        num_tokens, num_experts = chosen_TE.shape
        token_N, expert_N = entries(chosen_TE, num_pairs=num_pairs)
        weight_N = pick(weight_TE, token_N, expert_N)
        return Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=weight_N,
            pairs_T=count(token_N, num_tokens),
            sums=flat_sums(
                logit_sums=logit_sums,
                token_N=token_N,
                expert_N=expert_N,
                weight_N=weight_N,
                num_tokens=num_tokens,
                mask_T=mask_T,
                load_E=None,
                threshold=threshold,
            ),
            num_experts=num_experts,
            pairs_per_token=None,
        )


def flat_sums(
    *,
    logit_sums: LogitSums,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    num_tokens: int,
    mask_T: Tensor | None,
    load_E: Tensor | None,
    threshold: Tensor,
) -> BalanceSums:
    """The sums of a gate without groups; the arguments are those of the routings above."""
    num_experts = logit_sums.probability_AE.shape[1]
    num_real = token_N.new_full((), num_tokens) if mask_T is None else mask_T.sum()
    count_E = count(expert_N, num_experts)
    real_A = num_real.to(weight_N.dtype)[None]
    return BalanceSums(
        importance_E=sum_by(weight_N, expert_N, num_experts),
        count_E=count_E,
        within_load_E=count_E.to(weight_N.dtype) if load_E is None else load_E,
        group_load_A=real_A,
        group_count_A=num_real[None],
        within_probability_E=logit_sums.probability_AE.squeeze(0),
        group_probability_A=real_A,
        z=logit_sums.z,
        threshold=threshold,
        num_tokens=num_real,
        num_unrouted=num_real - count_routed(token_N, expert_N < num_experts, num_tokens),
        num_dropped=num_real.new_zeros(()),
    )


def sums_of_logits(logit_NE: Tensor, group_N: Tensor | None, *, num_groups: int = 1) -> LogitSums:
    """The sums of rows of logits. group_N: as of `sum_by_group`."""
    z_N1 = logit_NE.logsumexp(dim=-1, keepdim=True)
    probability_AE = sum_by_group((logit_NE - z_N1).exp(), group_N, num_groups=num_groups)
    if group_N is not None:
        z_N1 = z_N1.masked_fill(group_N[:, None] == num_groups, 0.0)
    return LogitSums(probability_AE, z_N1.square().sum())


def sum_by_group(value_NE: Tensor, group_N: Tensor | None, *, num_groups: int) -> Tensor:
    """Sum the rows of each group: [A, E].

    group_N: int64, the group of each row; `num_groups` for rows that are in no sum. None: all rows are in
    the only group.
    """
    if group_N is None:
        return value_NE.sum(dim=0, keepdim=True)
    if num_groups == 1:
        return value_NE.masked_fill(group_N[:, None] == 1, 0.0).sum(dim=0, keepdim=True)
    bins = value_NE.new_zeros(num_groups + 1, value_NE.shape[1])
    return bins.index_add(0, group_N, value_NE)[:-1]


def only_group(mask_T: Tensor | None) -> Tensor | None:
    """The group of each token where there is one group: of all, or of the real ones."""
    return None if mask_T is None else (~mask_T).to(torch.int64)


def tokens_of_rows(expert_TK: Tensor) -> Tensor:
    """The token of each pair, where pairs stand in the rows of a tensor."""
    token_T = torch.arange(expert_TK.shape[0], device=expert_TK.device)
    return token_T[:, None].expand(expert_TK.shape).flatten()


def entries(chosen_TE: Tensor, *, num_pairs: int) -> tuple[Tensor, Tensor]:
    """Row and column of each true entry, row by row, then unused pairs: last row, a column past the end."""
    num_tokens, num_experts = chosen_TE.shape
    # A fill of -1, and not one past the end: a number of the input's shape would fix it in compiled graphs.
    entry_N = torch.nonzero_static(chosen_TE.flatten(), size=num_pairs, fill_value=-1).squeeze(1)
    is_used_N = entry_N >= 0
    token_N = entry_N.div(num_experts, rounding_mode="floor").where(is_used_N, num_tokens - 1)
    return token_N, (entry_N % num_experts).where(is_used_N, num_experts)


def pick(value_TE: Tensor, token_N: Tensor, expert_N: Tensor) -> Tensor:
    """The values at the given rows and columns; 0 for unused pairs."""
    num_experts = value_TE.shape[1]
    entry_N = token_N * num_experts + expert_N.clamp_max(num_experts - 1)
    return value_TE.flatten()[entry_N].where(expert_N < num_experts, 0.0)


def sum_by(value_N: Tensor, index_N: Tensor, size: int) -> Tensor:
    """Sum the values of each index, such as an expert's pairs.

    Unused pairs have the index `size`, and fall into a bin of their own, which is cut off.
    """
    return value_N.new_zeros(size + 1).scatter_add(0, index_N, value_N)[:size]


def count(index_N: Tensor, size: int) -> Tensor:
    """Number of times each index below `size` occurs, int64."""
    return sum_by(torch.ones_like(index_N), index_N, size)


def count_routed(token_N: Tensor, is_used_N: Tensor, num_tokens: int) -> Tensor:
    """Number of tokens that have a used pair, int64 scalar."""
    return (sum_by(is_used_N.to(torch.int64), token_N, num_tokens) > 0).sum()


def _register(cls: type, tensor_fields: tuple[str, ...], static_fields: tuple[str, ...]) -> None:
    """Make a named value a pytree, so that export, compile and FSDP hooks see the tensors inside it."""

    def flatten(value: Any) -> tuple[list[Any], tuple[int | None, ...]]:
        return [getattr(value, f) for f in tensor_fields], tuple(getattr(value, f) for f in static_fields)

    def unflatten(tensors: Any, static: tuple[int | None, ...]) -> Any:
        return cls(
            **dict(zip(tensor_fields, tensors, strict=True)), **dict(zip(static_fields, static, strict=True))
        )

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], tuple[int | None, ...]]:
        values, static = flatten(value)
        return [(pytree.GetAttrKey(f), v) for f, v in zip(tensor_fields, values, strict=True)], static

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"sparsegate.{cls.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=flatten_with_keys,
    )


_register(BalanceSums, tuple(f.name for f in fields(BalanceSums)), ())
_register(Routing, ("token_N", "expert_N", "weight_N", "pairs_T", "sums"), ("num_experts", "pairs_per_token"))
