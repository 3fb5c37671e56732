"""How many rows a view has, at the least cost that gives a true answer. Unknown is None, never a guess."""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from airflow_provider_matviews.definition import RowCountStrategy
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.instructions import Work, fetch_one


@dataclass(frozen=True)
class Outcome:
    """What a refresh did to a view, as the server tells it before COMMIT.

    :ivar inserted: rows written; None where the server does not count (``track_counts=off``).
    :ivar deleted: rows taken away; None likewise.
    :ivar estimated: the planner's estimate of the rows there are; None where it has none.
    :ivar size_bytes: the view with its indexes and TOAST.
    :ivar heap_bytes: the same without its indexes.
    :ivar wal_position: how far the whole server has written WAL, in bytes.
    """

    inserted: int | None
    deleted: int | None
    estimated: int | None
    size_bytes: int
    heap_bytes: int
    wal_position: int


def counted(view: ResolvedName) -> Work[int]:
    """Count by reading every row."""
    row = yield from fetch_one(sql.SQL("SELECT count(*) AS n FROM {}").format(view.identifier))
    assert row is not None
    return int(row["n"])


def outcome(facts: ViewFacts, server: ServerFacts) -> Work[Outcome]:
    """Return what this transaction has done to a view since ``facts``, in one round trip.

    The counters of the transaction itself are exact: after REFRESH, ``inserted`` is every row; after
    REFRESH ... CONCURRENTLY, both are the difference (measured on PostgreSQL 15 to 18). They count what was
    rolled back to a savepoint too, hence the difference to ``facts``.
    """
    row = yield from fetch_one(
        sql.SQL(
            "SELECT pg_stat_get_xact_tuples_inserted(oid) AS inserted, "
            "pg_stat_get_xact_tuples_deleted(oid) AS deleted, nullif(reltuples, -1)::bigint AS estimated, "
            "pg_total_relation_size(oid) AS size_bytes, pg_table_size(oid) AS heap_bytes, "
            "(pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint AS wal_position "
            "FROM pg_catalog.pg_class WHERE oid = {}::oid"
        ).format(sql.Literal(facts.oid))
    )
    assert row is not None
    if server.track_counts:
        row["inserted"] -= facts.inserted
        row["deleted"] -= facts.deleted
    else:
        row["inserted"] = row["deleted"] = None
    return Outcome(**row)


def before_refresh(view: ResolvedName, facts: ViewFacts, strategy: RowCountStrategy) -> Work[int | None]:
    """Return the rows of a view that is about to be rewritten; None for one that was never filled."""
    if strategy is RowCountStrategy.NONE or not facts.populated:
        return None
    if strategy is RowCountStrategy.ESTIMATED:
        return facts.estimated_rows
    return (yield from counted(view))
