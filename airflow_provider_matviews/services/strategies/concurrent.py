"""``concurrent``: REFRESH MATERIALIZED VIEW CONCURRENTLY. Readers go on; needs a unique index.

It holds EXCLUSIVE, which lets reads pass, and writes only the rows that differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from airflow_provider_matviews.definition import RowCountStrategy
from airflow_provider_matviews.exceptions import ConcurrentRefreshRefused
from airflow_provider_matviews.services import row_counts
from airflow_provider_matviews.services.catalog import IndexFacts, ResolvedName
from airflow_provider_matviews.services.instructions import Command, Note, Work, fetch_all
from airflow_provider_matviews.services.maintenance import maintenance
from airflow_provider_matviews.services.plan_steps import Lock
from airflow_provider_matviews.services.strategies import regular
from airflow_provider_matviews.services.strategies.base import Refreshing

#: Share of NULLs in a key column above which every refresh rewrites a noticeable part of the view.
_MANY_NULLS = 0.01


def refresh(job: Refreshing) -> Work[None]:
    """Bring the view up to date row by row; an unpopulated one is filled by a regular refresh instead.

    :raises ConcurrentRefreshRefused: when no index allows it; the hint is the DDL.
    """
    usable = require_usable_index(job.view, job.indexes, job.unique_index_columns)
    if not job.facts.populated:
        reason = "it holds no data yet, and PostgreSQL cannot fill an unpopulated view concurrently"
        yield Note(f"{job.view.display} is filled by a regular refresh first: {reason}.")
        job.report.told(reason=f"filled by a regular refresh: {reason}")
        yield from regular.refresh(job)
        return
    yield from _warn_of_nulls(job, usable)
    refresh = Command(sql.SQL("REFRESH MATERIALIZED VIEW CONCURRENTLY {}").format(job.view.identifier))
    yield from job.report.run("refresh", refresh, lock=Lock.EXCLUSIVE)
    job.report.told(strategy="concurrent")
    if job.analyze:
        job.report.later("analyze", maintenance("ANALYZE", job.view))
    if job.report.dry_run:
        return
    outcome = yield from row_counts.outcome(job.facts, job.server)
    job.told(outcome, rebuilt=False)
    if outcome.inserted is None or outcome.deleted is None:
        yield from _count_without_counters(job)
        return
    job.report.told(rows_inserted=outcome.inserted, rows_deleted=outcome.deleted)
    growth = outcome.inserted - outcome.deleted
    if job.row_counts is RowCountStrategy.EXACT:
        # One scan gives both: REFRESH still holds its lock, so nobody else can have refreshed in between.
        after: int | None = yield from row_counts.counted(job.view)
        assert after is not None
        job.report.told(row_count_before=after - growth, row_count_after=after)
    elif job.row_counts is RowCountStrategy.ESTIMATED:
        before = job.facts.estimated_rows
        after = None if before is None else max(0, before + growth)
        job.report.told(row_count_before=before, row_count_after=after)


def _count_without_counters(job: Refreshing) -> Work[None]:
    if job.row_counts is RowCountStrategy.EXACT:
        job.report.told(row_count_after=(yield from row_counts.counted(job.view)))
    elif job.row_counts is RowCountStrategy.ESTIMATED:
        job.report.told(row_count_before=job.facts.estimated_rows)


def usable_indexes(indexes: Sequence[IndexFacts]) -> list[IndexFacts]:
    """Return the indexes that let a view be refreshed concurrently."""
    return [index for index in indexes if index.obstacle is None]


def require_usable_index(
    view: ResolvedName, indexes: Sequence[IndexFacts], unique_index_columns: Sequence[str]
) -> list[IndexFacts]:
    """Return the indexes that let a view be refreshed concurrently.

    :raises ConcurrentRefreshRefused: when there is none, saying what is wrong with those there are.
    """
    usable = usable_indexes(indexes)
    if usable:
        return usable
    unique = [index for index in indexes if index.unique]
    if unique:
        reasons = "; ".join(f"the index {index.name} {index.obstacle}" for index in unique)
    elif indexes:
        reasons = f"none of its {len(indexes)} indexes is unique"
    else:
        reasons = "it has no index"
    raise ConcurrentRefreshRefused(
        f"{view.display} cannot be refreshed concurrently: PostgreSQL needs a unique index over plain columns, "
        f"valid and without a WHERE clause, and {reasons}.",
        hint=_ddl(view, unique, unique_index_columns),
    )


def _ddl(view: ResolvedName, unique: Sequence[IndexFacts], unique_index_columns: Sequence[str]) -> str:
    invalid = [index for index in unique if not index.valid and not index.partial and not index.expressions]
    if invalid:
        name = sql.Identifier(view.schema, invalid[0].name).as_string(None)
        # A regular refresh builds every index anew; REINDEX fails while the rows that stand are not unique.
        return f"REINDEX INDEX CONCURRENTLY {name}; Or refresh it with refresh_strategy='regular'."
    columns = ", ".join(sql.Identifier(column).as_string(None) for column in unique_index_columns)
    ddl = f"CREATE UNIQUE INDEX CONCURRENTLY ON {view.ddl} ({columns or '<columns that are unique together>'});"
    # CREATE INDEX CONCURRENTLY works on materialized views and lets readers and refreshes of others go on.
    return f"{ddl} Or use refresh_strategy='swap', which needs no index."


def _warn_of_nulls(job: Refreshing, usable: Sequence[IndexFacts]) -> Work[None]:
    rows = yield from fetch_all(
        sql.SQL(
            "SELECT attname::text AS name, null_frac::double precision AS share FROM pg_catalog.pg_stats "
            "WHERE schemaname = {} AND tablename = {} AND attname = ANY({}) AND null_frac > {}"
        ).format(
            sql.Literal(job.view.schema),
            sql.Literal(job.view.name),
            sql.Literal(sorted({column for index in usable for column in index.columns})),
            sql.Literal(_MANY_NULLS),
        )
    )
    nullable = {row["name"]: row["share"] for row in rows}
    # PostgreSQL joins old and new rows on the keys of every usable index at once.
    if nullable:
        shares = ", ".join(f"{name} ({share:.0%})" for name, share in sorted(nullable.items()))
        yield Note(
            f"The unique key of {job.view.display} holds NULLs: {shares}. A row with a NULL in its key is never "
            "equal to itself, so each concurrent refresh deletes and inserts all of them anew. "
            "COALESCE them in the query, or use refresh_strategy='regular'.",
            warning=True,
        )
