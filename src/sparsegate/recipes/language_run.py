"""A trained language model, ready to score, write and be measured."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data import Dataset, Vocabulary
from ..decoding import Generated, Sampling, Scored, generate, score
from ..evaluation import Evaluation, Part, evaluate, part_of
from ..models import LanguageModel
from ..training.config import RunConfig
from .texts import several


@dataclass(frozen=True, kw_only=True)
class LanguageRun:
    """A trained language model, in evaluation mode, with its vocabulary and how it came about.

    step: of the checkpoint that the weights are from.
    """

    folder: Path
    config: RunConfig
    vocabulary: Vocabulary
    model: LanguageModel
    step: int

    def score(self, lines: Iterable[str]) -> Iterator[Scored]:
        """Log-probability of each line and its tokens; see `decoding.score`."""
        return score(self.model, self.vocabulary, several("lines", lines))

    def generate(
        self, prompts: Iterable[str], *, sampling: Sampling | None = None, batch_size: int = 32
    ) -> Iterator[Generated]:
        """How each prompt goes on; see `decoding.generate`. sampling: None is `Sampling()`."""
        return generate(
            self.model,
            self.vocabulary,
            several("prompts", prompts),
            sampling=sampling or Sampling(),
            batch_size=batch_size,
        )

    def evaluate(
        self,
        split: str = "test",
        *,
        data: Path | str | None = None,
        part: Part = "all",
        batch_size: int = 16,
        num_steps: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        """Measure the model on a split of a dataset, with the context that it was trained with.

        data: the dataset. None: the one it was trained on. part: of the split. batch_size, num_steps: see
        `evaluation.evaluate`; with these defaults the result is the one that training reports. progress: is
        told the tokens done and all tokens.

        Raises:
            ValueError, OSError: the dataset is damaged, absent or made with another vocabulary.
        """
        dataset = self._dataset(data)
        token_file = dataset.split(split)
        token_file.verify(vocabulary_size=self.vocabulary.size)
        text = part_of(token_file, dataset.vocabulary, part)
        done = 0

        def advance(num_tokens: int) -> None:
            nonlocal done
            done += num_tokens
            if progress is not None:
                progress(done, len(text.token_N))

        return evaluate(
            self.model,
            text,
            batch_size=batch_size,
            num_steps=num_steps,
            unknown_id=self.vocabulary.unknown_id,
            context=self.config.batches.context,
            progress=advance,
        )

    def _dataset(self, data: Path | str | None) -> Dataset:
        if data is None and not Path(self.config.data).is_dir():
            raise ValueError(
                f"{self.config.data}: the dataset that {self.folder} was trained on is not there; give --data"
            )
        dataset = Dataset.open(Path(self.config.data if data is None else data))
        dataset.require_vocabulary(self.vocabulary)
        return dataset
