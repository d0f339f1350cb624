"""All recipes by name."""

from collections.abc import Callable

from ..training.config import RunConfig
from ..training.overrides import did_you_mean
from . import medium_translation, news, paper, quickstart_translation, small, small_translation, translation

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
    small.small_4xlstm_256,
    small.small_moe_32_256,
    translation.translation_lstm,
    translation.translation_dense,
    translation.translation_moe_32,
    translation.translation_moe_512_h,
    translation.translation_moe_2048_h,
    translation.translation_gnmt,
    translation.multilingual_dense,
    translation.multilingual_moe_512,
    small_translation.small_translation_lstm,
    small_translation.small_translation_dense,
    small_translation.small_translation_moe_32,
    small_translation.small_translation_moe_32_noisy,
    small_translation.small_translation_moe_256_h,
    small_translation.small_multilingual_dense,
    small_translation.small_multilingual_moe_64,
    medium_translation.medium_translation_lstm,
    medium_translation.medium_translation_dense,
    medium_translation.medium_translation_moe_32,
    medium_translation.medium_translation_moe_32_noisy,
    medium_translation.medium_translation_moe_256_h,
    medium_translation.medium_multilingual_dense,
    medium_translation.medium_multilingual_moe_64,
    quickstart_translation.quickstart_translation,
)
RECIPES: dict[str, Callable[[], RunConfig]] = {function().name: function for function in _FUNCTIONS}


def recipe(name: str) -> RunConfig:
    """The configuration of a named run. ValueError for a name that is none."""
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise ValueError(f"{name}: no such recipe{did_you_mean(name, RECIPES)} (there are: {known})")
    return RECIPES[name]()
