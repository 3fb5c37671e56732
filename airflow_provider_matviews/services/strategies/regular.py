"""``regular``: REFRESH MATERIALIZED VIEW. The least work for the server; readers wait while it runs.

It holds ACCESS EXCLUSIVE from its start
(https://www.postgresql.org/docs/current/sql-refreshmaterializedview.html).
"""

from __future__ import annotations

from psycopg import sql

from airflow_provider_matviews.definition import RowCountStrategy
from airflow_provider_matviews.services import row_counts
from airflow_provider_matviews.services.instructions import Command, Work
from airflow_provider_matviews.services.maintenance import maintenance
from airflow_provider_matviews.services.plan_steps import Lock
from airflow_provider_matviews.services.strategies.base import Refreshing


def refresh(job: Refreshing) -> Work[None]:
    """Rewrite the view; its new row count comes for free with it."""
    before = yield from row_counts.before_refresh(job.view, job.facts, job.row_counts)
    refresh = Command(sql.SQL("REFRESH MATERIALIZED VIEW {}").format(job.view.identifier))
    yield from job.report.run("refresh", refresh, lock=Lock.ACCESS_EXCLUSIVE)
    job.report.told(strategy="regular", row_count_before=before)
    if job.report.dry_run:
        _follow_up(job)
        return
    outcome = yield from row_counts.outcome(job.facts, job.server)
    job.told(outcome, rebuilt=True)
    _follow_up(job)
    if job.row_counts is RowCountStrategy.NONE:
        return
    after = outcome.estimated if outcome.inserted is None else outcome.inserted
    if outcome.inserted is None and job.row_counts is RowCountStrategy.EXACT:
        after = yield from row_counts.counted(job.view)
    job.report.told(row_count_after=after)


def _follow_up(job: Refreshing) -> None:
    if job.analyze is not False:
        # After COMMIT: it would hold up the readers who are waiting already.
        job.report.later("analyze", maintenance("ANALYZE", job.view))
