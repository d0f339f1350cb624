"""What one run scored on the test split, piece by piece, at each of its budgets of words."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from ...data import Dataset
from ...data.dataset import TokenFile
from ...evaluation import evaluate, pieces_of
from ...inspection.balance import balance_metrics
from ...models import LanguageModel
from ...moe.routing import BalanceSums
from ...training.log import read_log
from ...training.overrides import from_json, to_json
from ...training.storage import read_json, write_json_atomically

MEASURED = "measured.json"
PIECES = 50  # of the test split, for the bootstrap
_BATCH_SIZE, _NUM_STEPS = 64, 64


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run at one budget.

    words, passes: trained on so far, ends of sentences counted as words, and as passes over the training
    text. tokens_per_second: of training, the median over the log. nll_nats, tokens: of each piece of the test
    split, sentence by sentence. tokens_per_word: of the test split, which turns one perplexity into the
    other. balance: by mixture layer, on the test split.
    """

    learning_rate: float
    expert_rate: float
    step: int
    tokens_seen: int
    words: int
    passes: float
    tokens_per_second: float
    nll_nats: tuple[float, ...]
    tokens: tuple[int, ...]
    tokens_per_word: float
    unknown_share: float
    balance: dict[str, dict[str, float]]

    @property
    def log_perplexity(self) -> float:
        """Natural logarithm of the test perplexity per word, one end for each sentence counted."""
        return sum(self.nll_nats) / sum(self.tokens) * self.tokens_per_word

    @property
    def perplexity(self) -> float:
        """Per word."""
        return math.exp(self.log_perplexity)


def words_per_token(split: TokenFile) -> float:
    """Words and ends of sentences for each token of a split."""
    return (split.num_words + split.num_sentences) / split.num_tokens


def measure(
    model: LanguageModel,
    dataset: Dataset,
    *,
    learning_rate: float,
    expert_rate: float,
    step: int,
    tokens_seen: int,
    log: Path,
) -> Measured:
    """Evaluate a model on the test split, sentence by sentence. log: of its run."""
    train, test = dataset.split("train"), dataset.split("test")
    unknown_id = dataset.vocabulary.unknown_id
    results = [
        evaluate(
            model,
            piece,
            batch_size=_BATCH_SIZE,
            num_steps=_NUM_STEPS,
            unknown_id=unknown_id,
            context="sentence",
        )
        for piece in pieces_of(test, PIECES)
    ]
    sums: dict[str, BalanceSums] = results[0].sums
    for result in results[1:]:
        sums = {layer: total + result.sums[layer] for layer, total in sums.items()}
    speeds = [line["train/tokens_per_second"] for line in read_log(log) if line["kind"] == "step"]
    return Measured(
        learning_rate=learning_rate,
        expert_rate=expert_rate,
        step=step,
        tokens_seen=tokens_seen,
        words=round(tokens_seen * words_per_token(train)),
        passes=tokens_seen / train.num_tokens,
        tokens_per_second=statistics.median(speeds),
        nll_nats=tuple(result.nll_nats for result in results),
        tokens=tuple(result.num_tokens for result in results),
        tokens_per_word=1 / words_per_token(test),
        unknown_share=sum(result.num_unknown for result in results) / test.num_tokens,
        balance={layer: balance_metrics(total) for layer, total in sums.items()},
    )


def read_measured(run: Path) -> dict[int, Measured]:
    """What has been measured of a run, by budget, ascending; nothing where it has not come so far."""
    path = run / MEASURED
    if not path.is_file():
        return {}
    content = read_json(path)
    try:
        if not isinstance(content, dict):
            raise ValueError("does not hold measurements")
        measured = {int(words): from_json(Measured, value) for words, value in content.items()}
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}; remove the run's folder, and it begins anew") from None
    return dict(sorted(measured.items()))


def write_measured(run: Path, measured: dict[int, Measured]) -> None:
    """Keep what has been measured of a run."""
    write_json_atomically(run / MEASURED, {str(words): to_json(value) for words, value in measured.items()})
