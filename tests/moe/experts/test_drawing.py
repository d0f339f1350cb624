"""Initial weights of experts: each from a stream of its own, the same in any company."""

import math

import pytest
import torch

from sparsegate.moe.experts import drawing
from sparsegate.moe.experts.drawing import expert_seed
from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.experts.stacked import StackedExperts
from sparsegate.moe.experts.swiglu import SwiGLU
from sparsegate.parallel.placement import experts_of
from tests.helpers.checkpoint_memory import RESET, peak

KINDS = [FeedForward, SwiGLU]
NUM_EXPERTS = 7


def drawn(kind: type[StackedExperts], own: range | None = None, **changes: object) -> dict[str, torch.Tensor]:
    options = {"width": 3, "hidden": 5, "num_experts": NUM_EXPERTS, "own": own, **changes}
    torch.manual_seed(1)
    return dict(kind(**options).named_parameters())


@pytest.fixture
def whole_stacks() -> dict[str, torch.Tensor]:
    """256 experts, [E, numbers], of deviation 1."""
    torch.manual_seed(2)
    experts = FeedForward(width=32, hidden=48, num_experts=256)
    stds = {"w_in": (2 / 32) ** 0.5, "w_out": 48**-0.5}
    return {name: p.detach().flatten(1).double() / stds[name] for name, p in experts.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, NUM_EXPERTS])
def test_on_any_number_of_ranks_experts_have_the_weights_that_they_have_among_all(kind, storage, num_ranks):
    whole = drawn(kind, storage=storage)
    after = torch.rand(3)
    for rank in range(num_ranks):
        own = experts_of(rank, num_experts=NUM_EXPERTS, num_ranks=num_ranks)
        for name, weight in drawn(kind, own, storage=storage).items():
            assert torch.equal(weight, whole[name][own.start : own.stop])
        assert torch.equal(torch.rand(3), after)  # so that what comes after them is the same, too


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_draws_what_these_experts_have_among_all(kind):
    whole = drawn(kind)
    part = kind(width=3, hidden=5, num_experts=NUM_EXPERTS, device="meta").part(1, 6).part(1, 4)
    part.to_empty(device="cpu")
    torch.manual_seed(1)
    part.reset_parameters()
    for name, weight in part.named_parameters():
        assert torch.equal(weight, whole[name][2:5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", [None, torch.bfloat16], ids=str)
def test_several_threads_draw_what_one_does(kind, storage, monkeypatch):
    alone = drawn(kind, storage=storage)
    monkeypatch.setattr(drawing, "_LEAST_OF_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for name, weight in drawn(kind, storage=storage).items():
        assert torch.equal(weight, alone[name])


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_weights_are_the_wide_ones_rounded(kind):
    wide = drawn(kind, width=40, hidden=900)  # of several blocks
    for changes in ({"storage": torch.bfloat16}, {"dtype": torch.bfloat16}):
        for name, weight in drawn(kind, width=40, hidden=900, **changes).items():
            assert torch.equal(weight, wide[name].bfloat16())


def test_wide_numbers_are_drawn_as_such():
    weight = drawn(FeedForward, dtype=torch.float64)["w_in"]
    assert not torch.equal(weight, weight.float().double())


def test_torch_looks_at_32_bits_of_a_seed():
    """Were it to look at more, `expert_seed` could be a plain hash of 64."""
    generator = torch.Generator()
    first, second = (torch.rand(9, generator=generator.manual_seed(seed)) for seed in (5, 5 + (1 << 32)))
    assert torch.equal(first, second)


@pytest.mark.parametrize("base", [0, 1, (1 << 62) - 1, 0x0123456789ABCDEF])
def test_of_131072_experts_no_two_have_the_same_seed(base):
    seeds = {expert_seed(base, expert) for expert in range(131_072)}
    assert len(seeds) == 131_072
    assert 0 <= min(seeds) <= max(seeds) < 1 << 32


def test_seeds_depend_on_all_bits_of_the_base():
    bases = [0, *(1 << bit for bit in range(64))]
    assert len({expert_seed(base, 3) for base in bases}) == len(bases)


def test_numbers_are_normal(whole_stacks):
    for rows in whole_stacks.values():
        number = rows.numel()
        assert abs(rows.mean()) < 5 / math.sqrt(number)
        assert abs(rows.var() - 1) < 5 * math.sqrt(2 / number)
        for point in (-2.0, -1.0, -0.3, 0.0, 0.3, 1.0, 2.0):
            below = torch.special.ndtr(torch.tensor(point, dtype=torch.float64)).item()
            share = (rows < point).double().mean().item()
            assert abs(share - below) < 5 * math.sqrt(below * (1 - below) / number)
        # Of each expert as well: its mean and its variance scatter as those of so many numbers do.
        num_experts, of_expert = rows.shape
        for score in (rows.mean(1) * of_expert**0.5, (rows.square().mean(1) - 1) * (of_expert / 2) ** 0.5):
            assert abs(score.square().sum() - num_experts) < 6 * math.sqrt(2 * num_experts)


def test_no_two_experts_are_alike_and_neighbours_have_nothing_in_common(whole_stacks):
    rows = torch.cat([*whole_stacks.values()])  # an expert's two matrices are as different as two experts
    correlation = rows @ rows.T / rows.shape[1]
    apart = correlation[~torch.eye(len(rows), dtype=torch.bool)]
    assert apart.abs().max() < 7 / math.sqrt(rows.shape[1])
    neighbours = correlation.diagonal(1)
    assert abs(neighbours.mean()) < 5 / math.sqrt(len(neighbours) * rows.shape[1])


def test_weights_that_are_spread_already_are_refused():
    """In silence they would stay as they were: a row of such a tensor is a copy."""

    class Sharded(torch.Tensor):
        pass

    experts = FeedForward(width=3, hidden=5, num_experts=2)
    experts.w_in = torch.nn.Parameter(torch.empty(2, 3, 5).as_subclass(Sharded))
    with pytest.raises(
        ValueError, match=r"experts: weights \(Sharded, Tensor\) cannot be drawn; reset_param"
    ):
        experts.reset_parameters()


def test_layers_differ():
    torch.manual_seed(1)
    first, second = (FeedForward(width=3, hidden=5, num_experts=NUM_EXPERTS) for _ in range(2))
    assert not (first.w_in == second.w_in).any()


@pytest.mark.skipif(not RESET.exists(), reason="only Linux tells a process's peak")
def test_narrow_weights_take_no_memory_beside_themselves():
    """Of one expert in float32 there would be 32 MB."""
    made = []
    experts = {"width": 512, "hidden": 8192, "num_experts": 4, "storage": torch.bfloat16}
    taken = peak(lambda: made.append(FeedForward(**experts)))
    assert taken < sum(p.nbytes for p in made[0].parameters()) + 8 * 2**20
