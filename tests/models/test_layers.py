"""The layers that language models are stacked from, against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from sparsegate.models.layers import Bidirectional, Dense, Mixture, Recurrent, reversed_rows
from tests.helpers.model_cases import WIDTH, lstm
from tests.helpers.moe_cases import NUM_EXPERTS, a_moe, gradients
from tests.helpers.tolerances import assert_close


def some_input():
    return torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)


def a_recurrent(*, projection: int, bias: bool) -> Recurrent:
    units = 9 if projection else WIDTH
    return Recurrent(width=WIDTH, units=units, projection=projection, bias=bias, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("projection", [0, WIDTH])
def test_a_recurrent_layer_is_the_recurrence_as_it_reads(projection, bias):
    layer, x_BSD = a_recurrent(projection=projection, bias=bias), some_input()
    ours, theirs = layer(x_BSD, None, None, None).y_BSD, lstm(layer.lstm, x_BSD)
    assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    of = (x_BSD, *layer.parameters())
    for our_gradient, their_gradient in zip(
        gradients((ours * cotangent).sum(), *of), gradients((theirs * cotangent).sum(), *of), strict=True
    ):
        assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("projection", [0, WIDTH])
def test_biases_are_no_multiply_adds(projection, bias):
    layer = a_recurrent(projection=projection, bias=bias)
    units = 9 if projection else WIDTH
    assert layer.ops_per_token() == 4 * (WIDTH + (projection or units)) * units + units * projection


def test_a_projection_as_wide_as_the_units_computes_what_a_projected_lstm_does():
    """Sak's recurrence by hand: what feeds the next step is the projection of the units."""
    layer = Recurrent(width=WIDTH, units=WIDTH, projection=WIDTH, bias=False, dtype=torch.float64)
    x_BSD = some_input()
    p, w_r = layer.project.weight, torch.randn(4 * WIDTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        layer.lstm.weight_hh_l0.copy_(w_r @ p)
    r_BD, c_BD = torch.zeros_like(x_BSD[:, 0]), torch.zeros_like(x_BSD[:, 0])
    outputs = []
    for x_BD in x_BSD.unbind(1):
        i, f, g, o = (x_BD @ layer.lstm.weight_ih_l0.T + r_BD @ w_r.T).chunk(4, dim=1)
        c_BD = f.sigmoid() * c_BD + i.sigmoid() * g.tanh()
        r_BD = (o.sigmoid() * c_BD.tanh()) @ p.T
        outputs.append(r_BD)
    assert_close(layer(x_BSD, None, None, None).y_BSD, torch.stack(outputs, dim=1))
    assert layer.ops_per_token() == sum(w.numel() for w in layer.parameters()) == 4 * 2 * WIDTH**2 + WIDTH**2
    assert all(weight.abs().max() <= WIDTH**-0.5 for weight in layer.project.parameters())


def test_forget_gates_start_open_and_all_other_biases_at_zero():
    cell = a_recurrent(projection=0, bias=True).lstm
    total = cell.bias_ih_l0 + cell.bias_hh_l0
    assert total.tolist() == [0.0] * WIDTH + [1.0] * WIDTH + [0.0] * 2 * WIDTH


@pytest.mark.parametrize("projection", [0, WIDTH])
def test_a_bidirectional_layer_reads_each_row_both_ways_without_its_padding(projection):
    layer = Bidirectional(
        forwards=a_recurrent(projection=projection, bias=True),
        backwards=a_recurrent(projection=projection, bias=True),
    )
    x_BSD, mask_BS = some_input(), torch.arange(4) < torch.tensor([[4], [1], [3]])
    ours = layer(x_BSD, None, mask_BS, None).y_BSD
    cotangent, theirs = torch.randn_like(ours), 0.0
    for row, length in enumerate((4, 1, 3)):
        x_1SD = x_BSD[row : row + 1, :length]
        y_1SD = lstm(layer.forwards.lstm, x_1SD) + lstm(layer.backwards.lstm, x_1SD.flip(1)).flip(1)
        assert_close(ours[row, :length], y_1SD[0])
        theirs = theirs + (y_1SD[0] * cotangent[row, :length]).sum()
    of = (x_BSD, *layer.parameters())
    for our_gradient, their_gradient in zip(
        gradients((ours * cotangent)[mask_BS].sum(), *of), gradients(theirs, *of), strict=True
    ):
        assert_close(our_gradient, their_gradient)
    whole = torch.ones_like(mask_BS)
    assert torch.equal(layer(x_BSD, None, None, None).y_BSD, layer(x_BSD, None, whole, None).y_BSD)
    assert layer.ops_per_token() == 2 * layer.forwards.ops_per_token()
    assert layer.sees_later_tokens


def test_rows_are_reversed_within_their_lengths():
    x_BSD = torch.arange(8.0).reshape(2, 4, 1)
    mask_BS = torch.arange(4) < torch.tensor([[3], [0]])
    assert reversed_rows(x_BSD, mask_BS)[:, :, 0].tolist() == [[2, 1, 0, 3], [4, 5, 6, 7]]
    assert torch.equal(reversed_rows(reversed_rows(x_BSD, mask_BS), mask_BS), x_BSD)
    assert reversed_rows(x_BSD, None)[0, :, 0].tolist() == [3, 2, 1, 0]


def test_a_mixture_is_the_sigmoid_of_the_layer():
    moe, x_BSD = a_moe(width=WIDTH), some_input()
    noise = torch.randn(3, 4, NUM_EXPERTS, dtype=torch.float64)
    mask_BS = torch.rand(3, 4) < 0.7
    out = Mixture(moe)(x_BSD, None, mask_BS, noise)
    y, routing = moe(x_BSD, mask_BS, noise)
    assert_close(out.y_BSD, 1 / (1 + (-y).exp()))
    assert (out.y_BSD[~mask_BS] == 0.5).all()
    assert torch.equal(out.routing.expert_N, routing.expert_N)
    assert out.state is None
    assert Mixture(moe).ops_per_token() == moe.ops_per_token()
    assert Mixture(moe).gate_ops_per_token() == moe.gate.ops_per_token()


def test_a_dense_layer_is_the_sigmoid_of_a_stack_of_relu_layers():
    layer, x_BSD = Dense(width=WIDTH, hidden=(5, 3), dtype=torch.float64), some_input()
    first, second, last = layer.weights
    ours = layer(x_BSD, None, None, None)
    theirs = torch.sigmoid(F.relu(F.relu(x_BSD @ first.T) @ second.T) @ last.T)
    assert_close(ours.y_BSD, theirs)
    assert ours.routing is None
    assert ours.state is None
    assert layer.ops_per_token() == WIDTH * 5 + 5 * 3 + 3 * WIDTH


def test_a_dense_layer_keeps_the_size_of_activations_at_the_start():
    layer = Dense(width=64, hidden=(256, 256))
    y = layer(torch.randn(5, 100, 64), None, None, None).y_BSD
    assert abs(float(torch.logit(y).detach().std()) - 1) < 0.1
