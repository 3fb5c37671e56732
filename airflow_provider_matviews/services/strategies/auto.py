"""``auto``: the strategy that costs readers least, chosen from facts."""

from __future__ import annotations

from collections.abc import Sequence

from airflow_provider_matviews.definition import RefreshStrategy
from airflow_provider_matviews.services.catalog import IndexFacts, ViewFacts
from airflow_provider_matviews.services.strategies.concurrent import usable_indexes


def choose(facts: ViewFacts, indexes: Sequence[IndexFacts]) -> tuple[RefreshStrategy, str]:
    """Return the strategy to use on a view now, and why, in one clause."""
    if not facts.populated:
        return RefreshStrategy.REGULAR, "it holds no data yet, so there are no readers to keep waiting"
    usable = usable_indexes(indexes)
    if usable:
        return RefreshStrategy.CONCURRENT, f"its unique index {usable[0].name} lets readers go on meanwhile"
    return (
        RefreshStrategy.REGULAR,
        "it has no unique index that would let readers go on; they wait while it runs",
    )
