"""BLEU, chrF and perplexity of translations.

Scores are those of ``sacrebleu``, whose own command line gives the same on the same files. A hypothesis is
one line: line ends and other control characters in it are spaces, and white space at its end is none. A
reference is as it was published; only a line feed in it, which would end a line of a file, is a space.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..data.files import write_atomically
from ..data.parallel.cleaning import one_line

# Without spaces between words, an n-gram of "words" would be one of sentences.
_TOKENIZERS = {"zh": "zh", "ja": "char", "ko": "char", "th": "char"}


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measure of one system.

    value: from 0 to 100. interval: half the width of its 95% interval over resampled test sets; None if there
    was no resampling. signature: of all that it depends on, as sacrebleu prints it.
    """

    name: str
    value: float
    interval: float | None
    signature: str

    def __str__(self) -> str:
        interval = "" if self.interval is None else f" ± {self.interval:.2f}"
        return f"{self.name} {self.value:.2f}{interval} ({self.signature})"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measure of two systems on the same sentences, by paired bootstrap.

    p_value: how probable a difference as large as this one would be if the systems were equally good. It
    means nothing where there is no difference.
    """

    name: str
    baseline: float
    system: float
    p_value: float
    signature: str

    @property
    def difference(self) -> float:
        """How much better the system is than the baseline."""
        return self.system - self.baseline

    def __str__(self) -> str:
        sign = f"{self.difference:+.2f}, p = {self.p_value:.3f}"
        return f"{self.name} {self.baseline:.2f} -> {self.system:.2f} ({sign}; {self.signature})"


@dataclass(frozen=True, kw_only=True)
class TargetLikelihood:
    """The likelihood of reference translations, as sums that add up over batches.

    nll_nats: negative log-likelihood of all subwords, ends of sentences included, as `num_subwords` counts
    them. num_words: of the plain text, without ends.
    """

    nll_nats: float
    num_subwords: int
    num_words: int
    num_sentences: int

    def __add__(self, other: "TargetLikelihood") -> "TargetLikelihood":
        return TargetLikelihood(
            nll_nats=self.nll_nats + other.nll_nats,
            num_subwords=self.num_subwords + other.num_subwords,
            num_words=self.num_words + other.num_words,
            num_sentences=self.num_sentences + other.num_sentences,
        )

    @property
    def perplexity(self) -> float:
        """Per subword, ends included, as in the paper; compares models of one table of subwords."""
        return _exp(self.nll_nats / self.num_subwords)

    @property
    def word_perplexity(self) -> float:
        """Per word and one end for each sentence; compares models of different subwords."""
        return _exp(self.nll_nats / (self.num_words + self.num_sentences))


def score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    target_language: str | None = None,
    resamples: int = 0,
) -> list[Score]:
    """BLEU and chrF of translations, one reference for each.

    target_language: for those that are written without spaces, BLEU counts characters (ja, ko, th) or as
    sacrebleu does for zh; None and all others: its tokenizer 13a. resamples: of the test set, for intervals;
    1000 is usual, 0 leaves them out.

    ValueError for unequal numbers of lines, for none, or if sacrebleu is not installed.
    """
    cleaned, references = _checked(hypotheses, references)
    if resamples < 0:
        raise ValueError(f"resamples ({resamples}) must not be negative")
    scores = []
    for metric in _metrics(target_language).values():
        result = metric.corpus_score(cleaned, [references])
        scores.append(
            Score(
                name=result.name,
                value=float(result.score),
                interval=_interval(metric, cleaned, references, resamples) if resamples else None,
                signature=str(metric.get_signature()),
            )
        )
    return scores


def compare(
    baseline: Sequence[str],
    system: Sequence[str],
    references: Sequence[str],
    *,
    target_language: str | None = None,
    resamples: int = 1000,
) -> list[Comparison]:
    """BLEU and chrF of two systems, and whether their difference could be chance, by sacrebleu's paired
    bootstrap.

    Its random numbers begin at 12345, or at the value of the environment variable SACREBLEU_SEED.

    ValueError as in `score`.
    """
    if resamples < 1:
        raise ValueError(f"resamples ({resamples}) must be at least 1")
    base_lines, references = _checked(baseline, references)
    system_lines, _ = _checked(system, references)
    test = _imported("sacrebleu.significance").PairedTest(
        [("baseline", base_lines), ("system", system_lines)],
        _metrics(target_language),
        [references],
        test_type="bs",
        n_samples=resamples,
    )
    signatures, results = test()
    return [
        Comparison(
            name=name,
            baseline=float(first.score),
            system=float(second.score),
            p_value=float(second.p_value),
            signature=str(signatures[name]),
        )
        for name, (first, second) in results.items()
        if name != "System"
    ]


def require_scores() -> None:
    """ValueError if sacrebleu is not installed."""
    _imported("sacrebleu.metrics")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write hypotheses to a new file or over an old one, one per line, as they are scored."""
    _write(path, map(one_line, lines))


def write_references(path: Path, lines: Iterable[str]) -> None:
    """The same for references."""
    _write(path, map(_reference, lines))


def _reference(text: str) -> str:
    return text.replace("\n", " ")


def _write(path: Path, lines: Iterable[str]) -> None:
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def _interval(metric: Any, hypotheses: Sequence[str], references: Sequence[str], resamples: int) -> float:
    """Half the width of the 95% interval over resampled test sets.

    As sacrebleu finds it in `corpus_score`, which fails where some of the resampled scores are 0: they are of
    another type than the others.
    """
    statistics = metric._extract_corpus_statistics(hypotheses, [references])
    resample = _imported("sacrebleu.significance")._bootstrap_resample
    metric.n_bootstrap = resamples  # both stand in the signature
    metric.seed, results = resample(statistics, metric, resamples)
    values = sorted(float(result.score) for result in results)
    outside = len(values) // 40
    return (values[-1 - outside] - values[outside]) / 2


def _metrics(target_language: str | None) -> dict[str, Any]:
    metrics = _imported("sacrebleu.metrics")
    language = (target_language or "").split("_")[0]
    return {"BLEU": metrics.BLEU(tokenize=_TOKENIZERS.get(language, "13a")), "chrF2": metrics.CHRF()}


def _checked(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
    if len(hypotheses) != len(references):
        raise ValueError(
            f"hypotheses ({len(hypotheses):,}) must be as many as references ({len(references):,})"
        )
    if not hypotheses:
        raise ValueError("hypotheses: there is none; give at least one line")
    return [one_line(line) for line in hypotheses], [_reference(line) for line in references]


def _imported(module: str) -> Any:
    """A module of sacrebleu, which is not installed with the package itself."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name}: not installed; pip install 'sparsegate[translation]'") from None


def _exp(value: float) -> float:
    """The exponential, infinite where it is too large for a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
