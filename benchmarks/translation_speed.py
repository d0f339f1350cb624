"""Sentences and tokens per second of translating: mixtures beside dense models and models with neither.

    python -m benchmarks.translation_speed
    python -m benchmarks.translation_speed --models translation-dense translation-moe-32 --sentences 64

Random sources of 8 to 32 tokens through recipes at random weights, one at a time and many together, with a
beam of one hypothesis and of several. A model without training ends no translation, so that each is as long
as its source, with all models. Gates that choose by trained thresholds are replaced by noisy top-k ones: k
experts for each token, which is what they choose on average. Before anything is timed, translations made
together must be those made one at a time.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import RESULTS
from sparsegate.benchmarking.measuring import circumstances, markdown, median_ratio, seconds, store
from sparsegate.decoding import BeamSearch, Hypothesis, MaxLength, TargetTokens, beam_search
from sparsegate.models.gates import NoisyTopKGate
from sparsegate.models.translation import (
    BlockConfig,
    MixtureBlock,
    Translation,
    TranslationModel,
    build_translation,
)
from sparsegate.recipes.registry import recipe

MODELS = ("small-translation-dense", "small-translation-moe-32", "small-translation-lstm")
TOKENS = TargetTokens(begin_id=1, end_id=2, never=(0,))
Sources = Sequence[Sequence[int]]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    models = {name: model_of(name) for name in args.models}
    vocab_size = min(model.softmax.weight.shape[0] for model in models.values())
    sources = random_sources(args.sentences, vocab_size)
    rows: list[dict[str, Any]] = []
    for beam in args.beams:
        search = BeamSearch(beam_size=beam, max_length=MaxLength(ratio=1.0, extra=1))
        num_tokens = {name: checked(model, sources, search, args.alone) for name, model in models.items()}
        for batch in (1, args.sentences):
            some = sources if batch > 1 else sources[: args.alone]
            times = seconds(
                {name: translating(model, some, search, batch) for name, model in models.items()},
                repeats=args.repeats,
            )
            for name in models:
                time = statistics.median(times[name])
                rows.append(
                    {
                        "model": name,
                        "together": batch,
                        "beam": beam,
                        "sentences/s": len(some) / time,
                        "tokens/s": sum(num_tokens[name][: len(some)]) / time,
                        f"rate to {args.models[0]}": median_ratio(times[args.models[0]], times[name]),
                    }
                )
    print(markdown(rows))
    print(store(RESULTS / f"{args.name}.json", {**circumstances(), "rows": rows}))


def model_of(name: str) -> TranslationModel:
    """A recipe at random weights, with gates that need no training."""
    config = recipe(name).model
    assert isinstance(config, Translation), name
    blocks = (without_thresholds(block) for block in (config.encoder_block, config.decoder_block))
    encoder_block, decoder_block = blocks
    return build_translation(replace(config, encoder_block=encoder_block, decoder_block=decoder_block)).eval()


def without_thresholds(block: BlockConfig) -> BlockConfig:
    return replace(block, gate=NoisyTopKGate()) if isinstance(block, MixtureBlock) else block


def random_sources(num_sentences: int, vocab_size: int) -> list[list[int]]:
    """Ids behind those of special tokens."""
    draws = random.Random(1)
    return [
        [draws.randrange(3, vocab_size) for _ in range(draws.randint(8, 32))] for _ in range(num_sentences)
    ]


def translated(model: TranslationModel, sources: Sources, search: BeamSearch) -> list[Hypothesis]:
    """All together."""
    found = beam_search(model, sources, tokens=TOKENS, search=search, max_tokens=1 << 30)
    return [best for best, *_ in found]


def checked(model: TranslationModel, sources: Sources, search: BeamSearch, num_alone: int) -> list[int]:
    """Tokens of each translation, its end included, which is the same made together and alone."""
    together = translated(model, sources, search)
    alone = [best for source in sources[:num_alone] for best in translated(model, [source], search)]
    for one, other in zip(together, alone, strict=False):
        assert one.tokens == other.tokens, (one.tokens, other.tokens)
        torch.testing.assert_close(one.score, other.score, rtol=1e-4, atol=1e-4)
    return [len(best.tokens) + 1 for best in together]


def translating(
    model: TranslationModel, sources: Sources, search: BeamSearch, batch: int
) -> Callable[[], object]:
    batches = [sources[first : first + batch] for first in range(0, len(sources), batch)]
    return lambda: [translated(model, some, search) for some in batches]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="the others are compared with the first")
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--alone", type=int, default=8, help="of the sentences, one at a time")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="translation_speed", help="of the file of results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
