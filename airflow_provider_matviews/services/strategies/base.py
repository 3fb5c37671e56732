"""What every strategy is given."""

from __future__ import annotations

from dataclasses import dataclass

from airflow_provider_matviews.definition import RowCountStrategy
from airflow_provider_matviews.services.catalog import IndexFacts, ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.locking import Patience
from airflow_provider_matviews.services.response import Report
from airflow_provider_matviews.services.row_counts import Outcome


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

    def told(self, outcome: Outcome, *, rebuilt: bool) -> None:
        """Tell what the refresh left: size, dead rows, and the WAL that the whole server wrote meanwhile.

        :param rebuilt: whether the rows were all written anew, so that none is dead.
        """
        self.report.told(
            size_bytes=outcome.size_bytes,
            heap_bytes=outcome.heap_bytes,
            dead_rows=0 if rebuilt else self.facts.dead_rows + (outcome.deleted or 0),
            server_wal_bytes=outcome.wal_position - self.facts.wal_position,
        )
