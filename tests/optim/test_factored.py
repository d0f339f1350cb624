"""Factored Adam against the second moment as it reads, matrix by matrix."""

import copy

import pytest
import torch

from sparsegate.optim.factored import FactoredAdam
from tests.helpers.tolerances import assert_close

LR, BETA2 = 0.1, 0.9


def a_parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape))


def as_it_reads(weight: torch.Tensor, grads: list[torch.Tensor], *, eps: float = 1e-8) -> torch.Tensor:
    """One matrix: V is kept whole, and its outer product is taken from its averages."""
    v = torch.zeros(weight.shape, dtype=torch.float64)
    weight = weight.double()
    for step, grad in enumerate(grads, start=1):
        v = BETA2 * v + (1 - BETA2) * grad.double() ** 2
        v_hat = v / (1 - BETA2**step)
        row, col = v_hat.mean(dim=1), v_hat.mean(dim=0)
        outer = torch.outer(row, col) / row.mean()
        weight = weight - LR * grad.double() / (outer.sqrt() + eps)
    return weight


@pytest.mark.parametrize("shape", [(3, 4), (5, 3, 4), (2, 5, 3, 4), (5, 1, 4), (5, 3, 1)])
def test_every_matrix_is_updated_by_the_outer_product_of_its_averages(shape):
    parameter = a_parameter(*shape)
    start = parameter.detach().clone()
    optimizer = FactoredAdam([parameter], lr=LR, beta2=BETA2)
    grads = [torch.randn(shape) * 10.0**step for step in range(-2, 3)]
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, grad)
    ours = parameter.detach().reshape(-1, *shape[-2:])
    theirs = start.reshape(-1, *shape[-2:])
    for number, (our_matrix, their_start) in enumerate(zip(ours, theirs, strict=True)):
        of_matrix = [grad.reshape(-1, *shape[-2:])[number] for grad in grads]
        assert_close(our_matrix, as_it_reads(their_start, of_matrix).float(), dtype=torch.float32, scale=10)


def test_where_the_squared_gradient_has_rank_one_it_is_adam_without_a_first_moment():
    row, col = torch.rand(3, 6, 1) + 0.1, torch.rand(3, 1, 4) + 0.1
    parameter = a_parameter(3, 6, 4)
    other = torch.nn.Parameter(parameter.detach().clone())
    ours = FactoredAdam([parameter], lr=LR, beta2=BETA2)
    theirs = torch.optim.Adam([other], lr=LR, betas=(0.0, BETA2))
    for step in range(6):
        sign = torch.randint(0, 2, (3, 6, 4)) * 2.0 - 1
        parameter.grad = sign * (row * col) * (step + 1)
        other.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    assert_close(parameter, other, dtype=torch.float32, scale=10)


def test_an_expert_without_a_gradient_stays_and_its_averages_decay():
    parameter = a_parameter(2, 3, 4)
    optimizer = FactoredAdam([parameter], lr=LR, beta2=BETA2)
    parameter.grad = torch.randn(2, 3, 4)
    optimizer.step()
    before, row = parameter.detach().clone(), optimizer.state[parameter]["row"].clone()
    parameter.grad = torch.cat([torch.zeros(1, 3, 4), torch.randn(1, 3, 4)])
    optimizer.step()
    assert torch.equal(parameter[0], before[0])
    assert not torch.equal(parameter[1], before[1])
    assert_close(optimizer.state[parameter]["row"][0], BETA2 * row[0], dtype=torch.float32)


def test_a_matrix_that_never_had_a_gradient_stays_finite():
    parameter = a_parameter(2, 3, 4)
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(2, 3, 4)
    FactoredAdam([parameter]).step()
    assert torch.equal(parameter, before)


def test_the_state_is_a_small_share_of_the_weights():
    parameter = a_parameter(4, 512, 1024)
    parameter.grad = torch.ones_like(parameter)
    optimizer = FactoredAdam([parameter])
    optimizer.step()
    state = sum(value.nbytes for value in optimizer.state[parameter].values())
    assert state < 0.01 * parameter.nbytes / 2  # also of bfloat16 weights


def steps(num_steps: int, *, num_experts: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients [E, 3, 4], zero for experts that are not used, and which are used."""
    used = [torch.rand(num_experts) < 0.5 for _ in range(num_steps)]
    return [(torch.randn(num_experts, 3, 4) * used_E[:, None, None], used_E) for used_E in used]


def leaving_out(optimizer, parameter, grad_EDH, used_E):
    parameter.grad = grad_EDH.masked_fill(~used_E[:, None, None], torch.nan)  # not even read
    optimizer.only({parameter: used_E})
    optimizer.step()


def in_backward(optimizer, parameter, grad_EDH, used_E):
    for expert in used_E.nonzero().flatten().tolist():
        optimizer.consume(parameter, expert, grad_EDH[expert : expert + 1].to(torch.float32).clone())
    optimizer.step()


def many_in_backward(optimizer, parameter, grad_EDH, used_E):
    optimizer.consume(parameter, 0, grad_EDH[:2].clone())
    optimizer.consume(parameter, 2, grad_EDH[2:].clone())
    optimizer.step()


@pytest.mark.parametrize("way", [leaving_out, in_backward, many_in_backward])
@pytest.mark.parametrize(
    ("dtype", "seed"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 7)]
)
def test_experts_without_tokens_are_later_as_if_decayed_at_every_step(way, dtype, seed):
    start = torch.randn(5, 3, 4).to(dtype)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [FactoredAdam([p], lr=LR, beta2=BETA2, rounding_seed=seed) for p in (ours, theirs)]
    for grad_EDH, used_E in steps(12):
        way(optimizers[0], ours, grad_EDH.to(dtype), used_E)
        theirs.grad = grad_EDH.to(dtype)
        optimizers[1].step()
        assert_close(ours, theirs, dtype=torch.float32, scale=10)
    everyone = torch.ones(5, 3, 4)
    for optimizer, parameter in zip(optimizers, (ours, theirs), strict=True):
        parameter.grad = everyone.to(dtype)
        optimizer.step()
    for key in ("row", "col", "last", "step"):
        assert_close(optimizers[0].state[ours][key], optimizers[1].state[theirs][key], dtype=torch.float32)


def test_an_expert_that_is_left_out_costs_nothing_and_keeps_its_state():
    parameter = a_parameter(3, 3, 4)
    optimizer = FactoredAdam([parameter], lr=LR)
    before = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    leaving_out(optimizer, parameter, torch.ones(3, 3, 4), torch.tensor([True, False, True]))
    state = optimizer.state[parameter]
    assert torch.equal(state["row"][1], before["row"][1])
    assert state["last"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("num_matrices", [1, 2])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_not_consumed(num_matrices, wrong):
    parameter = a_parameter(2, 3, 4)
    before = parameter.detach().clone()
    optimizer = FactoredAdam([parameter])
    grad_EDH = torch.randn(num_matrices, 3, 4)
    grad_EDH[0, 1, 2] = wrong
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.consume(parameter, 0, grad_EDH)
    assert torch.equal(parameter, before)
    assert not any(value.any() for value in optimizer.state[parameter].values())


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1e-5), (torch.float16, 1e3)]
)
def test_a_gradient_in_half_precision_is_squared_in_float32(dtype, size):
    ours, theirs = (torch.nn.Parameter(torch.zeros(1, 3, 4)) for _ in range(2))
    grad_EDH = (size * torch.randn(1, 3, 4)).to(dtype)
    one = FactoredAdam([ours], lr=LR)
    one.consume(ours, 0, grad_EDH.clone())
    theirs.grad = grad_EDH.float()
    FactoredAdam([theirs], lr=LR).step()
    assert_close(ours, theirs, dtype=torch.float32)


def test_weights_that_were_moved_are_updated_where_they_are():
    parameter = a_parameter(2, 3, 4)
    optimizer = FactoredAdam([parameter], lr=LR)
    for _ in range(2):
        before = parameter.detach().clone()
        optimizer.consume(parameter, 1, torch.ones(1, 3, 4))
        optimizer.step()
        assert (parameter - before)[1].abs().min() > LR / 2
        parameter.data = parameter.data.clone()  # as vector_to_parameters does


@pytest.mark.parametrize("num_matrices", [1, 2])
def test_a_matrix_is_updated_once_in_a_step(num_matrices):
    """Several micro-batches' gradients would be as many steps of one number."""
    parameter = a_parameter(3, 3, 4)
    optimizer = FactoredAdam([parameter])
    optimizer.consume(parameter, 1, torch.ones(1, 3, 4))
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError, match=r"twice in one step; call step\(\) after each backward pass"):
        optimizer.consume(parameter, 2 - num_matrices, torch.ones(num_matrices, 3, 4))
    assert torch.equal(parameter, before)
    optimizer.consume(parameter, 2, torch.ones(1, 3, 4))
    optimizer.step()
    optimizer.consume(parameter, 1, torch.ones(num_matrices, 3, 4))
    assert not torch.equal(parameter, before)


def test_a_step_has_begun_from_its_first_update_to_its_end():
    parameter = a_parameter(2, 3, 4)
    optimizer = FactoredAdam([parameter])
    assert not optimizer.has_begun
    optimizer.consume(parameter, 0, torch.ones(1, 3, 4))
    assert optimizer.has_begun
    optimizer.step()
    assert not optimizer.has_begun
    assert optimizer.state[parameter]["step"] == 1


def test_rounded_at_random_weights_follow_those_in_float32_where_rounded_to_the_nearest_they_stay():
    """Steps of a hundredth of the spacing of bfloat16 numbers between 1 and 2."""

    def moved(dtype: torch.dtype, seed: int | None) -> float:
        parameter = torch.nn.Parameter(torch.full((4, 64, 64), 1.5, dtype=dtype))
        optimizer = FactoredAdam([parameter], lr=2.0**-7 / 100, rounding_seed=seed)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return 1.5 - parameter.detach().double().mean().item()

    exact = moved(torch.float32, None)
    assert exact == pytest.approx(2.0**-7, rel=1e-3)
    assert moved(torch.bfloat16, None) == 0
    # 16,384 weights of variance below one spacing, which is what they should have moved.
    assert moved(torch.bfloat16, 3) == pytest.approx(exact, rel=0.04)


@pytest.mark.parametrize("chunk", [1, 12, 25, 10**9])
def test_parts_that_are_updated_together_change_nothing(chunk, monkeypatch):
    def weights():
        torch.manual_seed(0)
        parameter = a_parameter(7, 3, 4)
        optimizer = FactoredAdam([parameter], lr=LR, beta2=BETA2)
        for _ in range(3):
            parameter.grad = torch.randn(7, 3, 4)
            optimizer.step()
        return parameter.detach()

    expected = weights()
    monkeypatch.setattr("sparsegate.optim.factored._CHUNK", chunk)
    assert torch.equal(weights(), expected)


def test_weights_in_bfloat16_have_averages_in_float32():
    parameter = torch.nn.Parameter(torch.randn(2, 3, 4).bfloat16())
    parameter.grad = torch.full((2, 3, 4), 1e-3).bfloat16()
    optimizer = FactoredAdam([parameter], lr=0.5)
    before = parameter.detach().clone()
    optimizer.step()
    assert parameter.dtype == torch.bfloat16
    assert {optimizer.state[parameter][key].dtype for key in ("row", "col")} == {torch.float32}
    assert_close((before - parameter).float(), torch.full((2, 3, 4), 0.5), dtype=torch.bfloat16, scale=4)


@pytest.mark.parametrize("way", [leaving_out, in_backward])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_goes_on_where_it_stopped(way, dtype):
    def run(restore: bool) -> torch.Tensor:
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(5, 3, 4).to(dtype))
        optimizer = FactoredAdam([parameter], lr=LR, rounding_seed=5)
        for step, (grad_EDH, used_E) in enumerate(steps(6)):
            if restore and step == 2:
                other = FactoredAdam([parameter], lr=LR, rounding_seed=5)
                other.load_state_dict(optimizer.state_dict())
                optimizer = other
            way(optimizer, parameter, grad_EDH.to(dtype), used_E)
        return parameter.detach()

    assert torch.equal(run(restore=False), run(restore=True))


def test_a_copy_goes_on_as_the_original_does():
    optimizer = FactoredAdam([torch.nn.Parameter(torch.randn(2, 3, 4).bfloat16())], lr=LR, rounding_seed=5)

    def after_another_step(optimizer: FactoredAdam) -> torch.Tensor:
        (parameter,) = optimizer.param_groups[0]["params"]
        optimizer.consume(parameter, 0, torch.ones(1, 3, 4))
        optimizer.step()
        return parameter.detach()

    after_another_step(optimizer)
    assert torch.equal(after_another_step(copy.deepcopy(optimizer)), after_another_step(optimizer))


def test_what_is_loaded_has_not_begun():
    parameter = a_parameter(2, 3, 4)
    optimizer = FactoredAdam([parameter])
    stored = copy.deepcopy(optimizer.state_dict())
    optimizer.consume(parameter, 0, torch.ones(1, 3, 4))
    optimizer.load_state_dict(stored)
    assert not optimizer.has_begun


def test_what_belongs_on_the_cpu_is_there_whatever_the_default_device_is():
    parameter, grad_EDH = torch.nn.Parameter(torch.randn(2, 3, 4).bfloat16()), torch.ones(1, 3, 4)
    with torch.device("meta"):
        optimizer = FactoredAdam([parameter], rounding_seed=1)
        optimizer.consume(parameter, 0, grad_EDH)
        optimizer.step()
    assert optimizer.state[parameter]["last"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, r"lr \(-1.0\) must not be negative"),
        ({"beta2": 1.0}, r"beta2 \(1.0\) must be at least 0 and below 1"),
        ({"eps": 0.0}, r"eps \(0.0\) must be above 0"),
        ({"rounding_seed": -1}, r"rounding_seed \(-1\) must not be negative"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        FactoredAdam([a_parameter(3, 4)], **wrong)


def test_a_vector_is_refused():
    with pytest.raises(
        ValueError, match=r"params: one has the shape \[3\], and rows and columns need two axes"
    ):
        FactoredAdam([a_parameter(3)])
