"""All recipes by name."""

from collections.abc import Callable, Collection

from ..training.config import RunConfig
from ..training.overrides import did_you_mean
from . import news, paper, small, translation
from .translation import TranslationRecipe

_FUNCTIONS: tuple[Callable[[], RunConfig], ...] = (
    paper.moe_4,
    paper.moe_32,
    paper.moe_256,
    paper.moe_256_h,
    paper.moe_1024_h,
    paper.moe_4096_h,
    paper.moe_34m,
    paper.moe_143m,
    paper.moe_1_wide,
    paper.moe_1_deep,
    paper.four_lstm_512,
    paper.lstm_2048_512,
    paper.lstm_1024_512,
    paper.lstm_512_512,
    paper.two_lstm_8192_1024,
    news.news_4xlstm_512,
    news.news_moe_32,
    news.news_moe_256_h,
    news.news_moe_1024_h,
    news.news_moe_4096_h,
    news.news_moe_16384_h,
    news.news_moe_65536_h,
    news.news_moe_131072_h,
    small.small_moe_4,
    small.small_moe_32,
    small.small_moe_256,
    small.small_moe_256_h,
    small.small_moe_1024_h,
    small.small_moe_4096_h,
    small.small_moe_1_wide,
    small.small_moe_1_deep,
    small.small_4xlstm,
    small.small_lstm,
)
RECIPES: dict[str, Callable[[], RunConfig]] = {function().name: function for function in _FUNCTIONS}

_TRANSLATION_FUNCTIONS: tuple[Callable[[], TranslationRecipe], ...] = (
    translation.translation_lstm,
    translation.translation_dense,
    translation.translation_moe_32,
    translation.translation_moe_512_h,
    translation.translation_moe_2048_h,
    translation.translation_gnmt,
    translation.multilingual_dense,
    translation.multilingual_moe_512,
)
TRANSLATION_RECIPES: dict[str, Callable[[], TranslationRecipe]] = {
    function().name: function for function in _TRANSLATION_FUNCTIONS
}


def recipe(name: str) -> RunConfig:
    """The configuration of a named run. ValueError for a name that is none."""
    if name in TRANSLATION_RECIPES:
        raise ValueError(
            f"{name}: translation models cannot be trained yet; `sparsegate plan {name}` tells what it costs"
        )
    if name not in RECIPES:
        raise _unknown(name, RECIPES)
    return RECIPES[name]()


def planned_recipe(name: str) -> RunConfig | TranslationRecipe:
    """What can be planned under a name: a run, or a translation model. ValueError for a name that is none."""
    if name in TRANSLATION_RECIPES:
        return TRANSLATION_RECIPES[name]()
    if name not in RECIPES:
        raise _unknown(name, [*RECIPES, *TRANSLATION_RECIPES])
    return recipe(name)


def _unknown(name: str, known: Collection[str]) -> ValueError:
    return ValueError(f"{name}: no such recipe{did_you_mean(name, known)} (there are: {', '.join(known)})")
