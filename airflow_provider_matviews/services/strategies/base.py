"""What every strategy is given."""

from __future__ import annotations

from dataclasses import dataclass

from airflow_provider_matviews.definition import RowCountStrategy
from airflow_provider_matviews.services.catalog import IndexFacts, ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.locking import Patience
from airflow_provider_matviews.services.response import Report


@dataclass(frozen=True)
class Refreshing:
    """One refresh under way: the view as it stands, what was asked, and the report to fill."""

    view: ResolvedName
    facts: ViewFacts
    indexes: tuple[IndexFacts, ...]
    unique_index_columns: tuple[str, ...]
    server: ServerFacts
    row_counts: RowCountStrategy
    patience: Patience
    report: Report
    #: None leaves it to the strategy.
    analyze: bool | None = None
