"""A step of a translation model: the gradient of the whole batch, however it is cut, and of the formula."""

from dataclasses import replace

import pytest
import torch

from sparsegate.data.parallel import TranslationBatch, TranslationBatches
from sparsegate.models.translation import TranslationModel, build_translation
from sparsegate.moe.losses import importance_loss, load_loss
from sparsegate.training.config import LossConfig, RunConfig
from sparsegate.training.noise import row_noise
from sparsegate.training.step import Gradient, compute_gradient
from sparsegate.training.tasks import open_task
from sparsegate.training.tasks.translation import translation_parts
from tests.helpers.runs import make_translation_dataset
from tests.helpers.tiny_runs import GATES, tiny_translation_run, with_gates


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    dataset = make_translation_dataset(tmp_path_factory.mktemp("text") / "text")
    config = open_task(tiny_translation_run(dataset.directory)).config
    losses = LossConfig(importance=0.3, load=0.7, switch=0.2, z=0.1, threshold=0.5)
    return replace(config, model=replace(config.model, dropout=0.0), losses=losses)


@pytest.fixture
def batch(config: RunConfig) -> TranslationBatch:
    """Sentences of unequal length, both sides padded."""
    batches = open_task(config).batches
    assert isinstance(batches, TranslationBatches)
    found = next(b for b in map(batches.batch, range(100)) if b.num_sentences >= 5 and padded(b))
    assert not found.source_mask_BS.all()
    return found


def padded(batch: TranslationBatch) -> bool:
    return not batch.source_mask_BS.all() and not batch.target_mask_BS.all()


def a_model(config: RunConfig) -> TranslationModel:
    torch.manual_seed(0)
    model = build_translation(config.model, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate.w" in name or ".w_gate" in name:
                parameter.normal_()
    return model


def gradient_of(model: TranslationModel, batch: TranslationBatch, config: RunConfig) -> Gradient:
    return compute_gradient(model, list(translation_parts(model, batch, config)), config)


def gradients(model: TranslationModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cut(config: RunConfig, micro_batches: int) -> RunConfig:
    return replace(config, training=replace(config.training, micro_batches=micro_batches))


def plain_loss(model: TranslationModel, batch: TranslationBatch, config: RunConfig) -> torch.Tensor:
    """The formula, of noisy gates: mean smoothed nll of the real labels, and each layer's balance losses."""
    shapes = {
        name: ((batch.source_BS if name.startswith("encoder") else batch.target_BS).shape[1], width)
        for name, width in model.noise_widths().items()
    }
    noise = row_noise(
        shapes, seed=config.seed, batch_index=batch.index, first_row=0, num_rows=batch.num_sentences
    )
    output = model(
        source_BS=batch.source_BS,
        source_mask_BS=batch.source_mask_BS,
        target_BS=batch.target_BS,
        target_mask_BS=batch.target_mask_BS,
        noise=noise,
    )
    logprob_TV = model.softmax(output.hidden_BSD)[batch.target_mask_BS].log_softmax(dim=-1)
    label_T = batch.label_BS[batch.target_mask_BS]
    e = config.losses.label_smoothing
    nll_T = -logprob_TV.gather(1, label_T[:, None])[:, 0]
    loss = ((1 - e) * nll_T - e * logprob_TV.mean(dim=1)).mean()
    assert set(output.routings) == {"encoder.moe", "decoder.moe"}
    for routing in output.routings.values():
        loss = loss + 0.3 * importance_loss(routing) + 0.7 * load_loss(routing)
    return loss


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("micro_batches", [1, 3, 100])
def test_micro_batches_give_the_gradient_of_the_joined_batch(
    config: RunConfig, batch: TranslationBatch, micro_batches: int, label_smoothing: float
):
    losses = LossConfig(importance=0.3, load=0.7, label_smoothing=label_smoothing)
    config = cut(replace(config, losses=losses), micro_batches)
    model = a_model(config)
    loss = plain_loss(model, batch, config)
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    result = gradient_of(model, batch, config)
    for (name, parameter), wanted in zip(model.named_parameters(), expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-8, atol=1e-12, msg=name)
    assert result.num_tokens == int(batch.target_mask_BS.sum())
    if not label_smoothing:
        assert result.nll + result.balance == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize(
    "name", [name for name in GATES if name not in ("balanced", "balanced_hierarchy", "expert_choice")]
)
def test_so_they_do_with_every_gate_that_chooses_within_a_token(
    config: RunConfig, batch: TranslationBatch, name: str
):
    """Those that choose over a batch choose within each micro-batch, which is another loss."""
    config = with_gates(config, name)
    model = a_model(config)
    whole = gradient_of(model, batch, config)
    expected = gradients(model)
    parts = gradient_of(model, batch, cut(config, 4))
    assert parts.balance == pytest.approx(whole.balance, rel=1e-12)
    assert gradients(model).keys() == expected.keys()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-8, atol=1e-12, msg=parameter)


def test_gates_see_the_real_positions_and_no_others(config: RunConfig, batch: TranslationBatch):
    sums = gradient_of(a_model(config), batch, cut(config, 2)).sums
    assert int(sums["encoder.moe"].num_tokens) == int(batch.source_mask_BS.sum())
    assert int(sums["decoder.moe"].num_tokens) == int(batch.target_mask_BS.sum())
    assert int(sums["encoder.moe"].count_E.sum()) == 2 * int(batch.source_mask_BS.sum())


def test_what_stands_in_padding_has_no_influence(config: RunConfig, batch: TranslationBatch):
    model = a_model(config)
    expected_nll = gradient_of(model, batch, config).nll
    expected = gradients(model)
    filled = {
        name: torch.where(mask, value, torch.randint(3, config.model.vocab_size, value.shape))
        for name, value, mask in (
            ("source_BS", batch.source_BS, batch.source_mask_BS),
            ("target_BS", batch.target_BS, batch.target_mask_BS),
            ("label_BS", batch.label_BS, batch.target_mask_BS),
        )
    }
    assert gradient_of(model, replace(batch, **filled), config).nll == pytest.approx(expected_nll, rel=1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13, msg=name)


def test_with_dropout_the_second_pass_repeats_the_first_bit_for_bit(
    config: RunConfig, batch: TranslationBatch, monkeypatch: pytest.MonkeyPatch
):
    config = cut(replace(config, model=replace(config.model, dropout=0.5)), 2)
    model, seen, plain = a_model(config), [], TranslationModel.forward

    def forward(*args: object, **keywords: object) -> object:
        output = plain(*args, **keywords)
        seen.append((torch.is_grad_enabled(), output.hidden_BSD.detach()))
        return output

    monkeypatch.setattr(TranslationModel, "forward", forward)
    gradient_of(model, batch, config)
    assert [with_graph for with_graph, _ in seen] == [False, False, True, True]
    assert torch.equal(seen[0][1], seen[2][1])
    assert torch.equal(seen[1][1], seen[3][1])
