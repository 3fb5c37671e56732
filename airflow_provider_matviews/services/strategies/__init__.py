"""One file for each refresh strategy, all of one shape: ``refresh(job) -> Work[None]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from airflow_provider_matviews.definition import RefreshStrategy
from airflow_provider_matviews.services.instructions import Work
from airflow_provider_matviews.services.strategies import concurrent, regular, swap
from airflow_provider_matviews.services.strategies.base import Refreshing

#: ``auto`` is not among them: it chooses one of these.
STRATEGIES: Mapping[RefreshStrategy, Callable[[Refreshing], Work[None]]] = {
    RefreshStrategy.REGULAR: regular.refresh,
    RefreshStrategy.CONCURRENT: concurrent.refresh,
    RefreshStrategy.SWAP: swap.refresh,
}
