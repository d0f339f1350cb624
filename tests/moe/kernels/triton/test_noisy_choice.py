"""Noisy top-k choice in Triton: values and gradients of the equations as they read."""

from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sparsegate import NoisyTopK, importance_loss, load_loss, z_loss
from sparsegate.moe.kernels import choice, noisy_choice, threaded_choice
from sparsegate.moe.kernels.triton import noisy_choice as operators
from tests.helpers.tolerances import assert_close
from tests.moe.kernels.test_noisy_choice import CASES, outputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ONE_GROUP = [name for name, (*_, num_groups) in CASES.items() if num_groups == 1]


def inputs_of(num_rows: int, num_experts: int) -> list[Tensor]:
    """Clean logits and those of the noise, some of it next to nothing, some large; and its draws."""
    logits_NS = torch.randn(num_rows, 2 * num_experts, device=DEVICE)
    logits_NS[1::3, num_experts:] = -40.0
    logits_NS[2::5, num_experts:] *= 15.0
    noise_NB = torch.randn(num_rows, num_experts, device=DEVICE)
    return [logits_NS.requires_grad_(), noise_NB.requires_grad_()]


def choices(inputs: list[Tensor], group_N: Tensor | None, k: int, noise_epsilon: float = 0.01):
    group_N = group_N if group_N is None else group_N.to(DEVICE)
    return [
        choose(*inputs, group_N, num_groups=1, k=k, noise_epsilon=noise_epsilon)
        for choose in (operators.noisy_choice, noisy_choice.equations)
    ]


@pytest.mark.parametrize("case", ONE_GROUP)
@pytest.mark.parametrize("noise_epsilon", [0.0, 0.01])
@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (9, 3), (16, 15), (37, 4)])
def test_values_and_gradients_are_those_of_the_equations(case, noise_epsilon, num_experts, k, monkeypatch):
    monkeypatch.setattr(operators, "_NUMBERS", 128)  # so that there are several tiles
    num_rows, group_N, _ = CASES[case]
    inputs = inputs_of(num_rows, num_experts)
    found = choices(inputs, group_N, k, noise_epsilon)
    ours, theirs = (outputs(choice) for choice in found)
    used_N = (torch.ones(num_rows, dtype=torch.bool) if group_N is None else group_N < 1).to(DEVICE)
    assert torch.equal(found[0].expert_NK[used_N], found[1].expert_NK[used_N])
    cotangents = [torch.randn_like(value) for value in theirs]
    cotangents[0] *= used_N[:, None]  # as a gate does
    assert_close(ours[0][used_N], theirs[0][used_N])
    for our_value, their_value in zip(ours[1:], theirs[1:], strict=True):
        assert_close(our_value, their_value)
    for part in (slice(None), slice(1), slice(1, 2), slice(2, 3), slice(3, 4)):  # together, and each alone
        gradients = [
            torch.autograd.grad(
                values[part], inputs, cotangents[part], retain_graph=True, materialize_grads=True
            )
            for values in (ours, theirs)
        ]
        for our_gradient, their_gradient in zip(*gradients, strict=True):
            assert_close(our_gradient, their_gradient, scale=10)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_row_that_is_not_finite_chooses_as_torch_does_and_spoils_no_other(value):
    inputs = [tensor.detach() for tensor in inputs_of(6, 9)]
    inputs[0][2, :7] = value
    ours, theirs = choices(inputs, torch.tensor([0, 0, 1, 0, 0, 0]), 3)
    expert_NK = ours.expert_NK
    assert ((expert_NK >= 0) & (expert_NK < 9)).all()
    assert all(len(set(row)) == 3 for row in expert_NK.tolist())
    others = torch.tensor([0, 1, 3, 4, 5], device=DEVICE)
    assert torch.equal(expert_NK[others], theirs.expert_NK[others])
    for our_value, their_value in zip(outputs(ours)[1:], outputs(theirs)[1:], strict=True):
        assert_close(our_value, their_value)
    if value > 0:
        assert set(expert_NK[2].tolist()) <= set(range(7))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_padding_that_is_not_finite_leaves_the_gradients_of_others_alone():
    inputs = inputs_of(6, 9)
    with torch.no_grad():
        inputs[0][2] = float("nan")
    ours, _ = choices(inputs, torch.tensor([0, 0, 1, 0, 0, 0]), 3)
    (grad_NS,) = torch.autograd.grad(sum(value.sum() for value in outputs(ours)[1:]), inputs[:1])
    others = torch.tensor([0, 1, 3, 4, 5], device=DEVICE)
    assert grad_NS[others].isfinite().all()


def test_of_equals_no_expert_is_chosen_twice_and_the_first_come_first():
    logits_NS, noise_NB = torch.zeros(3, 74, device=DEVICE), torch.zeros(3, 37, device=DEVICE)
    found = operators.noisy_choice(logits_NS, noise_NB, None, num_groups=1, k=4, noise_epsilon=0.0)
    assert found.expert_NK.tolist() == [[0, 1, 2, 3]] * 3


def test_softplus_is_exact_where_it_is_small():
    """A deviation that is lost there would make a P of 0 or 1 of what is between."""
    num_experts = 16
    raw_B = torch.linspace(-80, 80, num_experts, device=DEVICE)
    logits_NS = torch.cat([torch.zeros(num_experts, device=DEVICE), raw_B])[None]
    noise_NB = torch.ones(1, num_experts, device=DEVICE)
    for power in (0.0, 20.0, 40.0):
        scaled_NS = logits_NS.clone()
        scaled_NS[:, num_experts:] -= power
        scaled_NS.requires_grad_()
        values = choices([scaled_NS, noise_NB], None, 4, noise_epsilon=0.0)
        ours, theirs = (torch.autograd.grad(choice.load_AB.square().sum(), scaled_NS)[0] for choice in values)
        assert_close(values[0].load_AB, values[1].load_AB)
        assert_close(ours, theirs, scale=10)


def test_second_derivatives_are_those_of_the_equations():
    inputs = inputs_of(4, 6)

    def twice(choice: noisy_choice.Choice) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(
            sum(value.square().sum() for value in outputs(choice)), inputs, create_graph=True
        )
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)

    ours, theirs = (twice(choice) for choice in choices(inputs, None, 2))
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient, scale=100)


@pytest.mark.parametrize("case", ONE_GROUP)
def test_the_operators_are_what_torch_expects_of_operators(case):
    num_rows, group_N, _ = CASES[case]
    group_N = group_N if group_N is None else group_N.to(DEVICE)
    inputs = inputs_of(num_rows, 9)
    check = partial(torch.library.opcheck, test_utils=["test_schema", "test_faketensor"])
    check(operators._forward, (*inputs, group_N, 1, 3, 0.01))
    weight_NK, *_, expert_NK1 = operators._forward(*inputs, group_N, 1, 3, 0.01)
    plain = [tensor.detach() for tensor in inputs]
    grads = torch.randn_like(weight_NK), torch.randn(1, 9, device=DEVICE), None, None
    for needs_noise in (False, True):
        check(
            operators._backward,
            (*grads, *plain, group_N, expert_NK1, weight_NK.detach(), 1, 0.01, needs_noise),
        )


def gates(**sizes: int) -> list[NoisyTopK]:
    """Two of the same weights, of which the first chooses by Triton."""
    both = [NoisyTopK(**sizes, kernel=kernel, device=DEVICE) for kernel in ("triton", None)]
    for parameter in both[0].parameters():
        torch.nn.init.normal_(parameter)
    both[1].load_state_dict(both[0].state_dict())
    return both


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_gate_decides_as_it_does_without(padded, compiled, monkeypatch):
    monkeypatch.setattr(choice, "without_triton", lambda device: None)
    mask_T = torch.rand(40, device=DEVICE) < 0.7 if padded else None
    x_TD, noise = torch.randn(40, 8, device=DEVICE), torch.randn(40, 12, device=DEVICE)
    found = []
    for gate in gates(width=8, num_experts=12, k=3):
        call = torch.compile(gate, fullgraph=True, backend="aot_eager") if compiled else gate
        routing = call(x_TD, mask_T, noise)
        loss = importance_loss(routing) + load_loss(routing) + z_loss(routing)
        (loss + routing.weight_N.square().sum()).backward()
        found.append((routing.expert_N, loss, gate.w_gate.grad, gate.w_noise.grad))
    assert torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        assert_close(ours, theirs, scale=20)


def test_where_it_does_not_suit_it_says_what_does():
    def refused(device: str, dtype: torch.dtype, num_experts: int, name: str = "triton") -> str:
        with pytest.raises(ValueError, match=r"^kernel ") as error:
            choice.noisy_choice_kernel(name, device, dtype, num_experts)
        return str(error.value)

    devices = "kernel ('triton') is for CUDA devices, not for cpu: 'threaded' can be used"
    chooses = "kernel ('triton') chooses from at most 4,096 experts, not 4,097: 'equations' can be used"
    assert refused("cpu", torch.float32, 9) == devices
    assert refused("cuda", torch.float32, 4097) == chooses
    assert "does not compute in torch.float64: 'equations'" in refused("cuda", torch.float64, 9)
    assert "must be one of threaded, equations, triton" in refused("cuda", torch.float32, 9, "fast")
    assert "is for the CPU, not for cuda: 'equations'" in refused("cuda", torch.float32, 9, "threaded")
    assert choice.noisy_choice_kernel("triton", "cuda", torch.float32, 4096) is operators.noisy_choice
    assert choice.noisy_choice_kernel(None, "cuda", torch.float32, 9) is noisy_choice.equations
    assert choice.noisy_choice_kernel("equations", "cpu", torch.float32, 9) is noisy_choice.equations
    assert choice.noisy_choice_kernel(None, "cpu", torch.float64, 9) is threaded_choice.noisy_choice


def test_several_groups_are_refused():
    with pytest.raises(ValueError, match=r"num_groups \(2\) must be 1 .*'equations' takes more"):
        operators.noisy_choice(
            *inputs_of(4, 6), torch.tensor([0, 0, 1, 1]), num_groups=2, k=2, noise_epsilon=0.0
        )
