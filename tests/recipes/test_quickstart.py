"""The quickstart's comparison is fair, and it says so in its table."""

from sparsegate.recipes.planner import plan
from sparsegate.recipes.quickstart import FULL, SHORT, dense, mixture
from sparsegate.training.config import RunConfig


def without_model(config: RunConfig) -> tuple[object, ...]:
    return config.seed, config.batches, config.losses, config.optim, config.training


def test_the_dense_model_costs_at_least_as_much_and_hardly_more() -> None:
    for size in (FULL, SHORT):
        sparse_ops = plan(mixture(size).model).ops_per_timestep
        assert sparse_ops <= plan(dense(size).model).ops_per_timestep <= 1.001 * sparse_ops


def test_both_models_are_trained_alike() -> None:
    for size in (FULL, SHORT):
        assert without_model(mixture(size)) == without_model(dense(size))
        assert mixture(size).model.dropout == dense(size).model.dropout
