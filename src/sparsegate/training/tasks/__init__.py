"""Tasks: what a run trains a model for. Here stands which kind of model is for which."""

from typing import Any

from ...models.translation import Translation
from ..config import RunConfig
from .language import LanguageTask
from .task import Task
from .translation import TranslationTask


def open_task(config: RunConfig) -> Task[Any]:
    """The task of a configuration, with its dataset. ValueError and OSError where there is none that fits."""
    match config.model:
        case Translation():
            return TranslationTask(config)
        case _:
            return LanguageTask(config)
