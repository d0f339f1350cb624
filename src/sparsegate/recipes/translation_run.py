"""A trained translation model, ready to translate and be measured."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data.joint_subwords import JointSubwords
from ..data.languages import languages_of
from ..data.parallel import Pair, TranslationDataset
from ..decoding import BeamSearch, Decoding, LineTranslator
from ..evaluation.translating import TranslationEvaluation, evaluate_pairs
from ..models.translation import TranslationModel
from ..training.config import ParallelConfig, RunConfig
from .texts import several

_SEARCH = BeamSearch()


@dataclass(frozen=True, kw_only=True)
class TranslationRun:
    """A trained translation model, in evaluation mode, with its subwords and how it came about.

    step: of the checkpoint that the weights are from.
    """

    folder: Path
    config: RunConfig
    vocabulary: JointSubwords
    model: TranslationModel
    step: int

    @property
    def pairs(self) -> tuple[str, ...]:
        """The pairs of languages that it was trained for, such as `en-fr`."""
        batches = self.config.batches
        assert isinstance(batches, ParallelConfig)
        return batches.pairs

    def translator(
        self,
        *,
        to: str | None = None,
        source: str | None = None,
        decoding: Decoding = _SEARCH,
        max_subwords: int = 250,
        lines_at_once: int = 64,
        align: bool = False,
    ) -> LineTranslator:
        """What translates lines; see `LineTranslator`.

        to: the language to translate into; None where the run was trained for one alone. source: the language
        of the lines. The model need not be told; None is any.

        Raises:
            ValueError: the run was not trained for that, or for several and it is not said which.
        """
        return LineTranslator(
            model=self.model,
            vocabulary=self.vocabulary,
            target_language=self._target(to, source),
            decoding=decoding,
            max_subwords=max_subwords,
            lines_at_once=lines_at_once,
            align=align,
        )

    def translate(
        self,
        lines: Iterable[str],
        *,
        to: str | None = None,
        source: str | None = None,
        decoding: Decoding = _SEARCH,
    ) -> Iterator[str]:
        """The best translation of each line, in their order; see `translator`."""
        translator = self.translator(to=to, source=source, decoding=decoding)
        for best, *_ in translator.translate(several("lines", lines)):
            yield best.text

    def evaluate(
        self,
        part: str = "test",
        *,
        data: Path | str | None = None,
        pairs: Iterable[str] | None = None,
        num_translated: int | None = None,
        decoding: Decoding = _SEARCH,
        resamples: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> TranslationEvaluation:
        """Measure the model on a part of a dataset; see `evaluation.translating.evaluate_pairs`.

        data: the dataset. None: the one it was trained on. pairs: of languages, by name; None: all. progress:
        is told the sentences done and all sentences, each of which is read and translated.

        Raises:
            ValueError, OSError: the dataset is damaged, absent or made with other subwords, or has no such
                pair.
        """
        dataset = self.dataset(data)
        chosen = {name: dataset.pair(part, name) for name in pairs or dataset.part(part)}
        for pair in chosen.values():
            for side in (pair.source, pair.target):
                side.verify(vocabulary_size=self.vocabulary.size)
        total, done = sum(_num_steps(pair, num_translated) for pair in chosen.values()), 0

        def advance(num_sentences: int) -> None:
            nonlocal done
            done += num_sentences
            if progress is not None:
                progress(done, total)

        return evaluate_pairs(
            self.model,
            dataset,
            chosen,
            num_translated=num_translated,
            decoding=decoding,
            resamples=resamples,
            progress=advance,
        )

    def dataset(self, data: Path | str | None = None) -> TranslationDataset:
        """The dataset in a folder, or the one that the run was trained on. ValueError for other subwords."""
        if data is None and not Path(self.config.data).is_dir():
            raise ValueError(
                f"{self.config.data}: the dataset that {self.folder} was trained on is not there; give --data"
            )
        dataset = TranslationDataset.open(Path(self.config.data if data is None else data))
        dataset.require_vocabulary(self.vocabulary)
        return dataset

    def _target(self, to: str | None, source: str | None) -> str:
        for name, language in (("source", source), ("to", to)):
            if language is not None and language not in self.vocabulary.languages:
                raise ValueError(
                    f"{name} ({language}): not a language of {self.folder}, which has "
                    f"{', '.join(self.vocabulary.languages)}"
                )
        known = sorted(self.pairs)
        fitting = [
            pair
            for pair in known
            if source in (None, languages_of(pair)[0]) and to in (None, languages_of(pair)[1])
        ]
        if not fitting:
            raise ValueError(f"{self.folder}: was not trained for that pair, but for {', '.join(known)}")
        targets = {languages_of(pair)[1] for pair in fitting}
        if len(targets) > 1:
            raise ValueError(
                f"{self.folder}: was trained for {', '.join(known)}; give --to with one of "
                f"{', '.join(sorted(targets))}"
            )
        return targets.pop()


def _num_steps(pair: Pair, num_translated: int | None) -> int:
    translated = pair.num_examples if num_translated is None else min(num_translated, pair.num_examples)
    return pair.num_examples + translated
