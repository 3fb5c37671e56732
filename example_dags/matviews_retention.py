"""Keep the record small: every night, the runs that nobody needs any more are deleted.

Of each view and operation the last 500 successes stay, and every failure of the last 90 days. The first task only says
what would go. Views whose definition declares a `retention` of its own keep that.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider_matviews.operators.matview import PruneMatViewRunsOperator

with DAG(
    dag_id="matviews_retention",
    schedule="@daily",
    catchup=False,
    max_active_runs=1,
    tags=["matviews"],
    doc_md=__doc__,
):
    what_would_go = PruneMatViewRunsOperator(
        task_id="what_would_go",
        conn_id="warehouse",
        keep_successes=500,
        max_age=timedelta(days=90),
        dry_run=True,
    )
    prune = PruneMatViewRunsOperator(
        task_id="prune",
        conn_id="warehouse",
        keep_successes=500,
        max_age=timedelta(days=90),
        execution_timeout=timedelta(minutes=30),
    )
    what_would_go >> prune
