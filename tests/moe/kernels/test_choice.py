"""One table chooses: the first kernel that suits, said once; a named one that does not suit is refused."""

import logging

import pytest
import torch

from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.kernels import choice
from sparsegate.moe.kernels.choice import KERNELS, Setting, feed_forward_kernel
from tests.helpers.moe_cases import a_routing


def setting(**changes) -> Setting:
    return Setting(
        **{"device": "cpu", "dtype": torch.float32, "num_experts": 4, "width": 8, "hidden": 16, **changes}
    )


def chosen(**changes) -> str:
    return choice.chosen_kernel(None, setting(**changes))


def test_the_cpu_computes_in_threads_and_an_unknown_device_in_a_loop():
    assert chosen() == chosen(dtype=torch.float64) == chosen(dtype=torch.bfloat16) == "threaded"
    assert chosen(device="mps") == chosen(device="meta") == "loop"


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"num_experts": 1024},
        {"width": 12},
        {"hidden": 20},
    ],
)
def test_torchs_grouped_product_has_limits(changes):
    suited = {"device": "cuda", "dtype": torch.bfloat16}
    unsuited = KERNELS["grouped_mm"].unsuited
    assert unsuited(setting(**suited)) is None
    assert unsuited(setting(**{**suited, **changes})) is not None


def test_on_a_gpu_torchs_product_is_chosen_and_the_others_by_name_alone():
    assert chosen(device="cuda", dtype=torch.bfloat16) == "grouped_mm"
    assert chosen(device="cuda", dtype=torch.float32) == chosen(device="cuda", dtype=torch.float64) == "loop"
    unsuited = KERNELS["triton"].unsuited
    assert "float64" in unsuited(setting(device="cuda", dtype=torch.float64))
    assert "cpu" in unsuited(setting())


def test_a_kernel_that_does_not_suit_is_refused_with_one_that_does():
    with pytest.raises(
        ValueError, match=r"kernel \('grouped_mm'\) is for CUDA devices, not for cpu: 'threaded' can be used"
    ):
        feed_forward_kernel("grouped_mm", setting())


def test_an_unknown_kernel_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"kernel \('cuda'\) must be one of .*threaded, grouped_mm, loop"):
        feed_forward_kernel("cuda", setting())


def test_the_choice_is_logged_once_with_its_reason(caplog):
    choice.chosen_kernel.cache_clear()
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        for _ in range(3):
            feed_forward_kernel(None, setting(device="meta"))
    assert caplog.messages == [
        "experts on meta in torch.float32: kernel loop "
        "(threaded: is for the CPU, not for meta; grouped_mm: is for CUDA devices, not for meta; "
        "triton: is for CUDA devices, not for meta)"
    ]


@pytest.mark.parametrize("name", ["threaded", "loop", None])
def test_experts_use_the_kernel_they_are_told(name, monkeypatch):
    used = []
    kernel = KERNELS[name or "threaded"]

    def spying(*args, **options):
        used.append(kernel.name)
        return kernel.load()(*args, **options)

    monkeypatch.setitem(choice.KERNELS, kernel.name, kernel._replace(load=lambda: spying))
    experts = FeedForward(width=8, hidden=16, num_experts=4, kernel=name)
    experts(torch.randn(3, 8), a_routing(torch.tensor([[0], [1], [1]]), torch.ones(3, 1), num_experts=4))
    assert used == [kernel.name]
