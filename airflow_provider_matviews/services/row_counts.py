"""How many rows a view has, at the least cost that gives a true answer. Unknown is None, never a guess."""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from airflow_provider_matviews.definition import RowCountStrategy
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.instructions import Work, fetch_one


@dataclass(frozen=True)
class Written:
    """Rows that an operation has inserted into and deleted from a view, as the server counted them."""

    inserted: int
    deleted: int


def counted(view: ResolvedName) -> Work[int]:
    """Count by reading every row."""
    row = yield from fetch_one(sql.SQL("SELECT count(*) AS n FROM {}").format(view.identifier))
    assert row is not None
    return int(row["n"])


def estimated(oid: int) -> Work[int | None]:
    """Return the planner's estimate, or None where it has none yet."""
    row = yield from fetch_one(
        sql.SQL("SELECT reltuples::double precision AS n FROM pg_catalog.pg_class WHERE oid = {}").format(
            sql.Literal(oid)
        )
    )
    return None if row is None or row["n"] < 0 else int(row["n"])


def written_since(facts: ViewFacts, server: ServerFacts) -> Work[Written | None]:
    """Return what this transaction has written to a view since ``facts``; None where the server does not count.

    The counters of the transaction itself are exact: after REFRESH, ``inserted`` is every row; after
    REFRESH ... CONCURRENTLY, both are the difference (measured on PostgreSQL 15 to 18). They count what was
    rolled back to a savepoint too, hence the difference to ``facts``.
    """
    if not server.track_counts:
        return None
    row = yield from fetch_one(
        sql.SQL(
            "SELECT pg_stat_get_xact_tuples_inserted({oid}) AS inserted, "
            "pg_stat_get_xact_tuples_deleted({oid}) AS deleted"
        ).format(oid=sql.Literal(facts.oid))
    )
    assert row is not None
    return Written(row["inserted"] - facts.inserted, row["deleted"] - facts.deleted)


def before_refresh(view: ResolvedName, facts: ViewFacts, strategy: RowCountStrategy) -> Work[int | None]:
    """Return the rows of a view that is about to be rewritten; None for one that was never filled."""
    if strategy is RowCountStrategy.NONE or not facts.populated:
        return None
    if strategy is RowCountStrategy.ESTIMATED:
        return facts.estimated_rows
    return (yield from counted(view))
