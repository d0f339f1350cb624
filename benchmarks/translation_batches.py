"""How much of the batches of a translation dataset is padding, and how fast they are made.

    python -m benchmarks.translation_batches datasets/many

A whole epoch over all train pairs for each size of batch and each temperature; at temperature 1 it must hold
every example once before it counts. padding: share of all positions of source and target. full: how much of
`batch_subwords` the longer of both takes. in order: the padding of batches of as many subwords in the order
of the text, of the first pair.
"""

import argparse
import time
from pathlib import Path

from sparsegate.benchmarking.measuring import markdown, store
from sparsegate.data.parallel import (
    EvaluationBatches,
    TranslationBatch,
    TranslationBatches,
    TranslationDataset,
)


def main() -> None:
    args = _arguments()
    dataset = TranslationDataset.open(args.dataset)
    rows = [
        _row(dataset, size, temperature) for temperature in args.temperatures for size in args.batch_subwords
    ]
    print(markdown(rows))
    print(store("translation_batches", rows))


def _row(dataset: TranslationDataset, size: int, temperature: float) -> dict[str, object]:
    pairs = list(dataset.part("train").values())
    started = time.perf_counter()
    making = TranslationBatches(
        pairs=pairs, vocabulary=dataset.vocabulary, batch_subwords=size, seed=0, temperature=temperature
    )
    batches = [making.batch(index) for index in range(making.batches_per_epoch)]
    seconds = time.perf_counter() - started
    sentences = sum(batch.num_sentences for batch in batches)
    assert temperature != 1 or sentences == sum(pair.num_examples for pair in pairs)
    longest = sum(max(batch.source_BS.numel(), batch.target_BS.numel()) for batch in batches)
    in_order = EvaluationBatches(pair=pairs[0], vocabulary=dataset.vocabulary, batch_subwords=size)
    return {
        "temperature": temperature,
        "batch_subwords": size,
        "batches": len(batches),
        "sentences": sentences,
        "padding": _padding(batches),
        "in order": _padding(list(in_order)),
        "full": longest / len(batches) / size,
        "sentences/s": round(sentences / seconds),
    }


def _padding(batches: list[TranslationBatch]) -> float:
    cells = sum(batch.source_BS.numel() + batch.target_BS.numel() for batch in batches)
    return 1 - sum(int(batch.source_mask_BS.sum()) + batch.num_tokens for batch in batches) / cells


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--batch-subwords", type=int, nargs="+", default=[2048, 4096, 16384])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 5.0])
    return parser.parse_args()


if __name__ == "__main__":
    main()
