"""The layer as one graph: compiled, exported, on fake tensors and on the meta device."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss
from sparsegate.moe.routing import Routing
from tests.helpers.moe_cases import (
    DRAWS_ITS_OWN,
    GATES,
    NUM_EXPERTS,
    WIDTH,
    a_batch,
    a_gate,
    a_moe,
    dense,
    some_experts,
)
from tests.helpers.tolerances import assert_close

COMPILER = "inductor" if shutil.which("g++") else "aot_eager"

# Of the compiler's own making: it builds an autograd function and uses what it has itself deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """What was compiled for another processor may crash this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def values_and_gradients(call, moe, batch, mask_T):
    y_TD, routing = call(batch.x_TD, mask_T, batch.noise_TE)
    assert isinstance(routing, Routing)
    loss = (y_TD * batch.cotangent_TD).sum() + importance_loss(routing) + load_loss(routing)
    of = (batch.x_TD, *moe.parameters())
    found = torch.autograd.grad(loss, of, allow_unused=True, materialize_grads=True)
    sums = routing.sums
    return y_TD, routing.weight_N, sums.importance_E, sums.load_E, sums.count_E, sums.num_tokens, *found


@pytest.mark.parametrize(
    ("training", "backend"), [(True, COMPILER), (False, "aot_eager")], ids=["train", "eval"]
)
def test_the_layer_compiles_to_one_graph_for_any_number_of_tokens(training, backend):
    moe = a_moe(dtype=torch.float32).train(training)
    counter, graphs = CompileCounterWithBackend(backend), 0
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    # Sizes that no other axis has: the compiler tells equal ones apart.
    for num_tokens in (7, 13, 30):
        batch, mask_T = a_batch(num_tokens, dtype=torch.float32), torch.rand(num_tokens) < 0.7
        ours = values_and_gradients(compiled, moe, batch, mask_T)
        theirs = values_and_gradients(moe, moe, batch, mask_T)
        for our_value, their_value in zip(ours, theirs, strict=True):
            assert_close(our_value, their_value, dtype=torch.float32, scale=4)
        # The compiler begins once more when it finds that the gate's epsilon must be a constant.
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs <= 2


@pytest.mark.nightly
@pytest.mark.parametrize("name", GATES)
def test_every_gate_compiles_to_one_graph(name):
    gate = a_gate(name, dtype=torch.float32)
    moe = MoE(gate=gate, experts=some_experts("feed_forward", dtype=torch.float32))
    counter, graphs = CompileCounterWithBackend(COMPILER), 0
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    # Sizes that no other axis has: the compiler takes equal ones for the same.
    for num_tokens in (11, 13, 30, 1, 0):
        x_TD = torch.randn(num_tokens, WIDTH)
        noise = torch.randn(num_tokens, gate.noise_width) if gate.noise_width else None
        ours, theirs = compiled(x_TD, None, noise), moe(x_TD, None, noise)
        assert_close(ours[1].sums.num_tokens, theirs[1].sums.num_tokens, dtype=torch.float32)
        if name not in DRAWS_ITS_OWN:
            assert_close(ours[0], theirs[0])
        # The graph of the first call does for any number; none and one are sizes of their own.
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs or num_tokens < 2


@pytest.mark.parametrize(("training", "num_inputs"), [(True, 3), (False, 1)], ids=["train", "eval"])
def test_the_layer_exports_with_any_number_of_tokens_and_gives_back_a_routing(training, num_inputs):
    def inputs(num_tokens):
        """x alone, or with a mask and noise."""
        batch, mask_T = a_batch(num_tokens, dtype=torch.float32), torch.rand(num_tokens) < 0.7
        return (batch.x_TD.detach(), mask_T, batch.noise_TE)[:num_inputs]

    moe = a_moe(dtype=torch.float32).train(training)
    tokens = torch.export.Dim("tokens", min=2)
    dynamic = ({0: tokens},) * num_inputs
    exported = torch.export.export(moe, inputs(6), dynamic_shapes=dynamic).module()
    for num_tokens in (2, 6, 11):
        given = inputs(num_tokens)
        y_TD, routing = exported(*given)
        expected_TD, expected = moe(*given)
        assert_close(y_TD, expected_TD)
        assert isinstance(routing, Routing)
        assert (routing.num_experts, routing.pairs_per_token) == (NUM_EXPERTS, 2)
        assert torch.equal(routing.expert_N, expected.expert_N)
        assert torch.equal(routing.sums.num_tokens, expected.sums.num_tokens)
        assert_close(routing.sums.load_E, expected.sums.load_E)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", GATES)
def test_every_gate_exports_with_any_number_of_tokens(name, training):
    gate = a_gate(name, dtype=torch.float32).train(training)
    width = gate.noise_width if training else 0

    def inputs(num_tokens):
        """x and a mask, and noise where the gate takes it."""
        given = torch.randn(num_tokens, WIDTH), torch.rand(num_tokens) < 0.7
        return (*given, torch.randn(num_tokens, width)) if width else given

    dynamic = ({0: torch.export.Dim("tokens", min=2)},) * len(inputs(6))
    exported = torch.export.export(gate, inputs(6), dynamic_shapes=dynamic).module()
    for num_tokens in (2, 6, 11):
        given = inputs(num_tokens)
        ours, theirs = exported(*given), gate(*given)
        assert torch.equal(ours.sums.num_tokens, theirs.sums.num_tokens)
        if not (training and name in DRAWS_ITS_OWN):
            assert_close(dense(ours), dense(theirs))


def test_the_meta_device_computes_shapes_and_allocates_nothing():
    """The experts of MoE-131072-h would fill half a terabyte."""
    moe = MoE.noisy_topk(width=512, hidden=1024, num_experts=131_072, k=4, device="meta")
    assert sum(p.numel() for p in moe.experts.parameters()) == 131_072 * 2 * 512 * 1024
    y, routing = moe(torch.empty(2, 3, 512, device="meta"))
    assert y.shape == (2, 3, 512)
    assert routing.sums.load_E.shape == (131_072,)


def test_fake_tensors_go_forward_and_backward():
    with FakeTensorMode():
        moe = MoE.noisy_topk(width=WIDTH, hidden=4, num_experts=NUM_EXPERTS, k=2)
        y, routing = moe(torch.randn(2, 3, WIDTH))
        (y.sum() + load_loss(routing)).backward()
        assert y.shape == (2, 3, WIDTH)
        assert {p.grad.shape == p.shape for p in moe.parameters()} == {True}


def test_a_layer_built_on_the_meta_device_is_initialised_where_it_lands():
    moe = MoE.noisy_topk(width=WIDTH, hidden=4, num_experts=NUM_EXPERTS, k=2, device="meta").to_empty(
        device="cpu"
    )
    assert all(p.isnan().all() for p in moe.parameters())
    for part in (moe.gate, moe.experts):
        part.reset_parameters()
    torch.manual_seed(0)
    moe.experts.reset_parameters()
    torch.manual_seed(0)
    fresh = MoE.noisy_topk(width=WIDTH, hidden=4, num_experts=NUM_EXPERTS, k=2)
    assert all(torch.equal(p, fresh.state_dict()[name]) for name, p in moe.state_dict().items())
