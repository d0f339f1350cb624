"""The layer agrees with the code that the paper's authors published, values and gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss
from tests.helpers import moe_oracle as oracle
from tests.helpers.moe_cases import gradients
from tests.helpers.tolerances import assert_close

FILES = sorted(Path(__file__).with_name("golden").glob("*.npz"))
DTYPES = [torch.float32, torch.float64]


def read(file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    with np.load(file, allow_pickle=False) as arrays:
        values = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name: v.to(dtype) if v.is_floating_point() else v for name, v in values.items()}


def layer_of(golden: dict[str, Tensor], dtype: torch.dtype) -> MoE:
    num_experts, width, hidden = golden["w1"].shape
    sizes = {"width": width, "hidden": hidden, "num_experts": num_experts, "k": int(golden["k"])}
    moe = MoE.noisy_topk(**sizes, noise_epsilon=1e-2, dtype=dtype)
    moe.load_state_dict(
        {
            "gate.w_gate": golden["w_gate"],
            "gate.w_noise": golden["w_noise"],
            "experts.w_in": golden["w1"],
            "experts.w_out": golden["w2"],
        }
    )
    return moe.train(bool(golden["train"]))


def test_there_are_cases_for_training_and_for_evaluation():
    assert {bool(read(file, torch.float32)["train"]) for file in FILES} == {True, False}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_outputs_equal_the_authors(file, dtype):
    golden = read(file, dtype)
    y, routing = layer_of(golden, dtype)(golden["x"], None, golden["noise"])
    loss = (y * golden["cotangent"]).sum() + 0.1 * importance_loss(routing) + 0.1 * load_loss(routing)
    ours = {
        "y": y,
        "gates": oracle.dense_gates(routing),
        "load": routing.sums.load_E,
        "importance": routing.sums.importance_E,
        "cv2_importance": importance_loss(routing),
        "cv2_load": load_loss(routing),
        "loss": loss,
    }
    for name, value in ours.items():
        assert_close(value, golden[name], dtype=torch.float32, scale=float(golden[name].abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_gradients_equal_the_authors(file, dtype):
    golden = read(file, dtype)
    moe, x = layer_of(golden, dtype), golden["x"].requires_grad_()
    y, routing = moe(x, None, golden["noise"])
    balance = importance_loss(routing) + load_loss(routing)
    of = (x, moe.gate.w_gate, moe.gate.w_noise, moe.experts.w_in, moe.experts.w_out)
    ours = dict(zip(("gl_x", "gl_wg", "gl_wn"), gradients(balance, *of[:3]), strict=False))
    loss = (y * golden["cotangent"]).sum() + 0.1 * balance
    ours |= dict(zip(("g_x", "g_wg", "g_wn", "g_w1", "g_w2"), gradients(loss, *of), strict=True))
    for name, gradient in ours.items():
        assert gradient.isfinite().all(), name
        known = ~golden[name].isnan()
        scale = float(golden[name][known].abs().max()) if known.any() else 1.0
        assert_close(gradient[known], golden[name][known], dtype=torch.float32, scale=scale)


def test_where_the_authors_gradient_is_no_number_ours_is_the_true_one():
    (golden,) = (g for g in (read(file, torch.float64) for file in FILES) if not g["train"])
    assert golden["g_x"].isnan().all()
    assert golden["g_wn"].isnan().all()

    moe, x = layer_of(golden, torch.float64), golden["x"].requires_grad_()
    y, routing = moe(x)
    loss = (y * golden["cotangent"]).sum() + 0.1 * importance_loss(routing) + 0.1 * load_loss(routing)
    ours_x, ours_wn = gradients(loss, x, moe.gate.w_noise)

    gates_TE = oracle.gates(x @ golden["w_gate"], int(golden["k"]))
    y_oracle = oracle.mixture(x, gates_TE, oracle.feed_forward(golden["w1"], golden["w2"]))
    loss = (y_oracle * golden["cotangent"]).sum() + 0.1 * oracle.squared_cv(gates_TE.sum(dim=0))
    assert_close(ours_x, gradients(loss, x)[0])
    assert not ours_wn.any()
