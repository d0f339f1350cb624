"""A translation model on text that it has not seen: perplexity, and the scores of its translations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean

import torch

from ..data.parallel import EvaluationBatches, Pair, TranslationBatch, TranslationDataset
from ..decoding import Decoding, LineTranslator, TranslationSampling
from ..decoding.inference import evaluation_mode
from ..decoding.peers import ALONE, Peers
from ..models.translation import TranslationModel, token_losses
from ..moe.routing import BalanceSums
from .sums import add_exactly
from .translation import Score, TargetLikelihood, score

_GREEDY = TranslationSampling()
# Pairs of source and target steps whose attention is computed at once: 64 MB in float32, some times over.
_MAX_ATTENTION = 1 << 24


@dataclass(frozen=True, kw_only=True)
class PairEvaluation:
    """A model on the text of one pair of languages.

    sums: what balance metrics are functions of, over the whole text in float64, by mixture layer. scores,
    hypotheses, references: of the sentences that were translated; empty where none was.
    """

    likelihood: TargetLikelihood
    sums: dict[str, BalanceSums]
    scores: list[Score]
    hypotheses: list[str]
    references: list[str]

    def metrics(self) -> dict[str, float]:
        """`loss`, nats per subword, perplexities and scores."""
        return _likelihood_metrics(self.likelihood) | {
            score.name.lower(): score.value for score in self.scores
        }


@dataclass(frozen=True, kw_only=True)
class TranslationEvaluation:
    """A model on the text of all pairs of languages, by name."""

    pairs: dict[str, PairEvaluation]

    @property
    def likelihood(self) -> TargetLikelihood:
        """Of all pairs together."""
        first, *others = (pair.likelihood for pair in self.pairs.values())
        return sum(others, start=first)

    def metrics(self) -> dict[str, float]:
        """Loss and perplexities of all text, the mean score of the pairs, and if there are several those of
        each."""
        of_pairs = {name: pair.metrics() for name, pair in self.pairs.items()}
        metrics = _likelihood_metrics(self.likelihood)
        for name in next(iter(of_pairs.values())).keys() - metrics.keys():
            metrics[name] = fmean(each[name] for each in of_pairs.values())
        if len(of_pairs) > 1:
            metrics |= {
                f"{pair}/{name}": value for pair, each in of_pairs.items() for name, value in each.items()
            }
        return metrics


def evaluate_pairs(
    model: TranslationModel,
    dataset: TranslationDataset,
    pairs: Mapping[str, Pair],
    *,
    num_translated: int | None,
    decoding: Decoding = _GREEDY,
    resamples: int = 0,
    batch_subwords: int = 4096,
    progress: Callable[[int], None] = lambda num_sentences: None,
    peers: Peers = ALONE,
) -> TranslationEvaluation:
    """Measure the likelihood of all references, and the scores of translations.

    num_translated: sentences of each pair that are translated, the first ones; None: all. decoding: how.
    resamples: of the test set, for the scores' intervals. batch_subwords: positions that the model reads at
    once. progress: is told the number of sentences of each batch, whether read or translated. peers: who read
    a share of each batch each, and get the same result; `decoding` is then to be of the same peers.

    The model is left in the mode that it was in.
    """
    found = {}
    for name, pair in pairs.items():
        likelihood, sums = pair_likelihood(
            model, pair, dataset, batch_subwords=batch_subwords, progress=progress, peers=peers
        )
        evaluation = PairEvaluation(likelihood=likelihood, sums=sums, scores=[], hypotheses=[], references=[])
        if num_translated != 0:
            hypotheses = translate_pair(
                model, pair, dataset, num_sentences=num_translated, decoding=decoding, progress=progress
            )
            references = list(islice(dataset.lines(pair.target), num_translated))
            scores = score(hypotheses, references, target_language=pair.target_language, resamples=resamples)
            evaluation = replace(evaluation, scores=scores, hypotheses=hypotheses, references=references)
        found[name] = evaluation
    return TranslationEvaluation(pairs=found)


def pair_likelihood(
    model: TranslationModel,
    pair: Pair,
    dataset: TranslationDataset,
    *,
    batch_subwords: int,
    progress: Callable[[int], None],
    peers: Peers = ALONE,
) -> tuple[TargetLikelihood, dict[str, BalanceSums]]:
    """The likelihood of all references of a pair, and the sums of the gates by layer."""
    nll_nats, sums = 0.0, {}
    batches = EvaluationBatches(pair=pair, vocabulary=dataset.vocabulary, batch_subwords=batch_subwords)
    with evaluation_mode(model):
        for whole in batches:
            # As many steps at a time on all peers, whatever their shares are.
            at_once = max(1, _MAX_ATTENTION // whole.source_mask_BS.numel())
            batch = whole.of_rows(peers.rows(whole.num_sentences))
            nll_of_batch, sums_of_batch = _read(model, batch, at_once)
            nll_nats += nll_of_batch
            sums = add_exactly(sums, sums_of_batch)
            progress(whole.num_sentences)
    (nll_nats,), sums = peers.sum(nll_nats), peers.total(sums)
    likelihood = TargetLikelihood(
        nll_nats=nll_nats,
        num_subwords=pair.target.num_tokens,
        num_words=pair.target.num_words,
        num_sentences=pair.num_examples,
    )
    return likelihood, sums


@torch.inference_mode()
def _read(
    model: TranslationModel, batch: TranslationBatch, at_once: int
) -> tuple[float, dict[str, BalanceSums]]:
    """Negative log-likelihood of a batch's labels, and its gates' sums.

    The decoder goes `at_once` steps at a time: all of a very long pair would fit no memory.
    """
    device = model.softmax.device
    source_mask_BS, target_mask_BS = batch.source_mask_BS.to(device), batch.target_mask_BS.to(device)
    target_BS, label_BS = batch.target_BS.to(device), batch.label_BS.to(device)
    memory, routings = model.encode(batch.source_BS.to(device), source_mask_BS)
    sums = {name: routing.sums for name, routing in routings.items()}
    nll_nats, state = 0.0, None
    num_steps = target_BS.shape[1]
    for first in range(0, num_steps, at_once):
        steps = slice(first, first + at_once)
        mask_BS = target_mask_BS[:, steps]
        output = model.decode(target_BS[:, steps], memory, state=state, mask_BS=mask_BS)
        state = output.state
        losses = token_losses(model.softmax, output.hidden_BSD, label_BS[:, steps], mask_BS)
        nll_nats += float(losses.nll_BS.sum(dtype=torch.float64))
        for name, routing in output.routings.items():
            sums[name] = sums[name] + routing.sums if name in sums else routing.sums
    return nll_nats, sums


def translate_pair(
    model: TranslationModel,
    pair: Pair,
    dataset: TranslationDataset,
    *,
    num_sentences: int | None,
    decoding: Decoding,
    progress: Callable[[int], None],
) -> list[str]:
    """The best translation of each of the first sources of a pair; None: of all."""
    translator = LineTranslator(
        model=model,
        vocabulary=dataset.vocabulary,
        target_language=pair.target_language,
        decoding=decoding,
    )
    hypotheses = []
    for best, *_ in translator.translate(islice(dataset.lines(pair.source), num_sentences)):
        hypotheses.append(best.text)
        progress(1)
    return hypotheses


def _likelihood_metrics(likelihood: TargetLikelihood) -> dict[str, float]:
    return {
        "loss": likelihood.nll_nats / likelihood.num_subwords,
        "perplexity": likelihood.perplexity,
        "word_perplexity": likelihood.word_perplexity,
    }
