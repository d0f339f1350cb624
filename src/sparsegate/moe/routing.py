"""Routing: who goes where, with what weight. BalanceSums: what the balance losses need to know about it."""

from dataclasses import dataclass, fields
from typing import Any

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
    num_tokens: number of real tokens, int64 scalar.
    """

    importance_E: Tensor
    count_E: Tensor
    within_load_E: Tensor
    group_load_A: Tensor
    group_count_A: Tensor
    within_probability_E: Tensor
    group_probability_A: Tensor
    z: Tensor
    num_tokens: Tensor

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


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The sparse T x E matrix G(x) of eq. 1, kept as its N = T * pairs_per_token entries, token by token.

    A pair that is not used (padding) has `expert_N == num_experts` and weight 0. All shapes follow from the
    shape of the input, never from its values.

    token_N: int64, the token of each pair. expert_N: int64, its expert. weight_N: float32 or float64, G(x)_i,
    differentiable. sums: what the balance losses need.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    sums: BalanceSums
    num_experts: int
    pairs_per_token: int

    @staticmethod
    def of_token_choice(
        *,
        logit_TE: Tensor,
        expert_TK: Tensor,
        weight_TK: Tensor,
        mask_T: Tensor | None,
        load_E: Tensor | None,
    ) -> "Routing":
        """The routing in which every real token goes to the K experts of its row.

        logit_TE: scores of all experts, without the noise of eq. 4. expert_TK: int64, no expert twice in a
        row. weight_TK: their weights. mask_T: bool, true for real tokens. load_E: the smooth load where the
        gate has one, else the hard counts stand in for it.
        """
        num_experts = logit_TE.shape[1]
        z_T1 = logit_TE.logsumexp(dim=-1, keepdim=True)
        probability_TE = (logit_TE - z_T1).exp()
        num_tokens = expert_TK.new_full((), expert_TK.shape[0]) if mask_T is None else mask_T.sum()
        if mask_T is not None:
            expert_TK = expert_TK.masked_fill(~mask_T[:, None], num_experts)
            weight_TK = weight_TK.masked_fill(~mask_T[:, None], 0.0)
            probability_TE = probability_TE.masked_fill(~mask_T[:, None], 0.0)
            z_T1 = z_T1.masked_fill(~mask_T[:, None], 0.0)
        count_E = count_by_expert(expert_TK, num_experts)
        sums = BalanceSums(
            importance_E=sum_by_expert(weight_TK, expert_TK, num_experts),
            count_E=count_E,
            within_load_E=count_E.to(weight_TK.dtype) if load_E is None else load_E,
            group_load_A=num_tokens.to(weight_TK.dtype)[None],
            group_count_A=num_tokens[None],
            within_probability_E=probability_TE.sum(dim=0),
            group_probability_A=num_tokens.to(weight_TK.dtype)[None],
            z=z_T1.square().sum(),
            num_tokens=num_tokens,
        )
        return Routing.of_pairs(expert_TK=expert_TK, weight_TK=weight_TK, num_experts=num_experts, sums=sums)

    @staticmethod
    def of_pairs(*, expert_TK: Tensor, weight_TK: Tensor, num_experts: int, sums: BalanceSums) -> "Routing":
        """The routing whose pairs stand in the rows of two tensors, one row for each token."""
        num_tokens, pairs_per_token = expert_TK.shape
        token_T = torch.arange(num_tokens, device=expert_TK.device)
        return Routing(
            token_N=token_T[:, None].expand(-1, pairs_per_token).flatten(),
            expert_N=expert_TK.flatten(),
            weight_N=weight_TK.flatten(),
            sums=sums,
            num_experts=num_experts,
            pairs_per_token=pairs_per_token,
        )


def sum_by_expert(value_TK: Tensor, expert_TK: Tensor, num_experts: int) -> Tensor:
    """Sum the values of each expert's pairs; unused pairs fall into a bin of their own, which is cut off."""
    bins = value_TK.new_zeros(num_experts + 1)
    return bins.scatter_add(0, expert_TK.flatten(), value_TK.flatten())[:num_experts]


def count_by_expert(expert_TK: Tensor, num_experts: int) -> Tensor:
    """Number of each expert's pairs, int64."""
    return sum_by_expert(torch.ones_like(expert_TK), expert_TK, num_experts)


def _register(cls: type, tensor_fields: tuple[str, ...], static_fields: tuple[str, ...]) -> None:
    """Make a named value a pytree, so that export, compile and FSDP hooks see the tensors inside it."""

    def flatten(value: Any) -> tuple[list[Any], tuple[int, ...]]:
        return [getattr(value, f) for f in tensor_fields], tuple(getattr(value, f) for f in static_fields)

    def unflatten(tensors: Any, static: tuple[int, ...]) -> Any:
        return cls(
            **dict(zip(tensor_fields, tensors, strict=True)), **dict(zip(static_fields, static, strict=True))
        )

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], tuple[int, ...]]:
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
_register(Routing, ("token_N", "expert_N", "weight_N", "sums"), ("num_experts", "pairs_per_token"))
