import pytest

from sparsegate.benchmarking.roofline import Bandwidth, least_time, measure_bandwidth

BANDWIDTH = Bandwidth(read=10.0, write=5.0, fresh_write=1.0)


@pytest.mark.parametrize(("training", "traffic"), [(True, 2 * 20 / 10 + 30 / 5), (False, 20 / 10)])
@pytest.mark.parametrize("dense_seconds", [1.0, 100.0])
def test_weights_are_read_in_each_pass_and_gradients_written_once(
    training: bool, traffic: float, dense_seconds: float
):
    least = least_time(
        dense_seconds=dense_seconds,
        used_weight_bytes=20,
        gradient_bytes=30,
        training=training,
        bandwidth=BANDWIDTH,
    )
    assert least.traffic == traffic
    assert least.overlapped == max(dense_seconds, traffic)
    assert least.in_turn == dense_seconds + traffic


def test_bandwidth_is_that_of_some_machine():
    measured = measure_bandwidth(1 << 20, repeats=2)
    assert all(1e7 < value < 1e13 for value in vars(measured).values())
