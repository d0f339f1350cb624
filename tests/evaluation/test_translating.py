"""A translation model on text: the likelihood of every label once, and the scores of its translations."""

from pathlib import Path

import pytest
import torch

from sparsegate import load
from sparsegate.data.parallel import TranslationDataset
from sparsegate.decoding import BeamSearch, TranslationSampling
from sparsegate.evaluation import translating
from sparsegate.evaluation.translating import evaluate_pairs
from sparsegate.evaluation.translation import score
from sparsegate.recipes.translation_run import TranslationRun
from tests.helpers.runs import LINES, make_translation_dataset, make_translation_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TranslationDataset:
    return make_translation_dataset(
        tmp_path_factory.mktemp("text") / "text", lines=LINES[:15], both_directions=True
    )


@pytest.fixture
def run(dataset: TranslationDataset, tmp_path: Path) -> TranslationRun:
    make_translation_run(tmp_path / "run", dataset)
    return load(tmp_path / "run")


@pytest.mark.parametrize(
    ("batch_subwords", "max_attention"), [(1, 1 << 24), (60, 1 << 24), (4096, 1 << 24), (60, 200), (60, 1)]
)
def test_the_likelihood_is_that_of_each_pair_by_itself(
    run, dataset, batch_subwords: int, max_attention: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(translating, "_MAX_ATTENTION", max_attention)
    found = evaluate_pairs(
        run.model, dataset, dataset.part("valid"), num_translated=0, batch_subwords=batch_subwords
    )
    assert list(found.pairs) == ["en-fr", "fr-en"]
    vocabulary = dataset.vocabulary
    for name, pair in dataset.part("valid").items():
        nll, num_subwords = 0.0, 0
        for source, target in zip(dataset.lines(pair.source), dataset.lines(pair.target), strict=True):
            source_1S = torch.tensor([vocabulary.encode_source(source, target_language=name[3:])])
            label_1S = torch.tensor([[*vocabulary.encode(target), vocabulary.end_id]])
            target_1S = torch.cat([torch.tensor([[vocabulary.begin_id]]), label_1S[:, :-1]], dim=1)
            with torch.no_grad():
                output = run.model(
                    source_BS=source_1S,
                    source_mask_BS=torch.ones_like(source_1S, dtype=torch.bool),
                    target_BS=target_1S,
                    target_mask_BS=torch.ones_like(target_1S, dtype=torch.bool),
                )
                logprob_SV = run.model.softmax(output.hidden_BSD)[0].log_softmax(dim=-1)
            nll -= float(logprob_SV.gather(1, label_1S[0][:, None]).sum())
            num_subwords += label_1S.shape[1]
        likelihood = found.pairs[name].likelihood
        assert likelihood.nll_nats == pytest.approx(nll, rel=1e-5)
        assert (likelihood.num_subwords, likelihood.num_sentences) == (num_subwords, 15)
        sums = found.pairs[name].sums
        assert int(sums["decoder.moe"].num_tokens) == num_subwords
        assert int(sums["encoder.moe"].num_tokens) == pair.source.num_tokens + pair.num_examples
    whole = sum(pair.likelihood.nll_nats for pair in found.pairs.values())
    assert found.likelihood.nll_nats == pytest.approx(whole)


def test_scores_are_those_of_the_translations_and_of_several_pairs_the_mean(run, dataset):
    found = evaluate_pairs(
        run.model, dataset, dataset.part("valid"), num_translated=6, decoding=TranslationSampling()
    )
    metrics = found.metrics()
    for name, pair in dataset.part("valid").items():
        references = list(dataset.lines(pair.target))[:6]
        hypotheses = list(
            run.translate(list(dataset.lines(pair.source))[:6], to=name[3:], decoding=TranslationSampling())
        )
        assert found.pairs[name].references == references
        assert found.pairs[name].hypotheses == hypotheses
        bleu, chrf = score(hypotheses, references, target_language=name[3:])
        assert (metrics[f"{name}/bleu"], metrics[f"{name}/chrf2"]) == (bleu.value, chrf.value)
    assert metrics["chrf2"] == pytest.approx((metrics["en-fr/chrf2"] + metrics["fr-en/chrf2"]) / 2)
    assert metrics["loss"] == pytest.approx(found.likelihood.nll_nats / found.likelihood.num_subwords)


def test_progress_tells_every_sentence_that_is_read_and_translated(run):
    told: list[tuple[int, int]] = []
    run.evaluate(
        "valid",
        pairs=["fr-en"],
        num_translated=4,
        decoding=BeamSearch(beam_size=1),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (19, 19)


@pytest.mark.parametrize(
    ("to", "source", "target"),
    [("fr", None, "fr"), ("en", None, "en"), (None, "en", "fr"), (None, "fr", "en"), ("fr", "en", "fr")],
)
def test_the_language_to_translate_into_follows_from_what_is_given(run, to, source, target: str):
    assert run.translator(to=to, source=source).target_language == target


@pytest.mark.parametrize(
    ("to", "source", "message"),
    [
        (None, None, "was trained for en-fr, fr-en; give --to with one of en, fr"),
        ("de", None, r"^to \(de\): not a language of .*, which has en, fr"),
        (None, "xx", r"^source \(xx\): not a language of"),
        ("en", "en", "was not trained for that pair, but for en-fr, fr-en"),
    ],
)
def test_a_language_that_is_none_of_them_is_refused(run, to, source, message: str):
    with pytest.raises(ValueError, match=message):
        run.translator(to=to, source=source)
