"""Refresh, in one task, every view of which something has changed, and all that reads them.

The second DAG runs whenever one of them was refreshed. The views come from the `matviews_create` DAG.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, AssetAlias, task

from airflow_provider_matviews.operators.base import asset_alias
from airflow_provider_matviews.operators.matview import RefreshMatViewsOperator

with DAG(
    dag_id="matviews_nightly",
    schedule="0 4 * * *",
    catchup=False,
    max_active_runs=1,
    tags=["matviews"],
    doc_md=__doc__,
):
    RefreshMatViewsOperator(
        task_id="refresh",
        conn_id="warehouse",
        views=["analytics.*"],
        at_once=2,
        skip_unchanged=True,
        retries=2,
        retry_delay=timedelta(seconds=30),
        execution_timeout=timedelta(minutes=30),
    )


with DAG(
    dag_id="matviews_after_refresh",
    schedule=[AssetAlias(asset_alias("warehouse"))],
    catchup=False,
    max_active_runs=1,
    tags=["matviews"],
    doc_md=__doc__,
):

    @task
    def say_what_was_refreshed(triggering_asset_events: dict | None = None) -> list[str]:
        """Return the views whose refresh this run is about."""
        return sorted({event.extra["view"] for events in (triggering_asset_events or {}).values() for event in events})

    say_what_was_refreshed()
