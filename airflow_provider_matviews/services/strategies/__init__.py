"""One file for each refresh strategy, all of one shape: ``refresh(job) -> Work[None]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from airflow_provider_matviews.definition import RefreshStrategy
from airflow_provider_matviews.exceptions import StrategyNotAvailable
from airflow_provider_matviews.services.instructions import Work
from airflow_provider_matviews.services.strategies import concurrent, regular, swap
from airflow_provider_matviews.services.strategies.base import Refreshing

_STRATEGIES: Mapping[RefreshStrategy, Callable[[Refreshing], Work[None]]] = {
    RefreshStrategy.REGULAR: regular.refresh,
    RefreshStrategy.CONCURRENT: concurrent.refresh,
    RefreshStrategy.SWAP: swap.refresh,
}


def strategy_named(strategy: RefreshStrategy) -> Callable[[Refreshing], Work[None]]:
    """Return what carries out a strategy.

    :raises StrategyNotAvailable: when this version does not have it.
    """
    try:
        return _STRATEGIES[strategy]
    except KeyError:
        raise StrategyNotAvailable(
            f"The refresh strategy {strategy.value!r} does not exist yet in this version.",
            hint="use 'auto', 'concurrent' or 'regular'.",
        ) from None
