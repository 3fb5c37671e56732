"""Refresh the materialized views every minute, each in the way that suits it.

The views come from the `matviews_create` DAG.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider_matviews.operators.matview import RefreshMatViewOperator

CONN_ID = "warehouse"

with DAG(
    dag_id="matviews_refresh",
    schedule="* * * * *",
    catchup=False,
    max_active_runs=1,
    default_args={
        "conn_id": CONN_ID,
        "retries": 2,
        "retry_delay": timedelta(seconds=10),
        "execution_timeout": timedelta(minutes=10),
    },
    tags=["matviews"],
    doc_md=__doc__,
):
    # The fastest way, but readers wait meanwhile. The rows are counted one by one, before and after.
    daily_events = RefreshMatViewOperator(
        task_id="refresh_daily_events",
        view="analytics.daily_events",
        refresh_strategy="regular",
        row_count_strategy="exact",
    )

    # No strategy here, so the definition's: "concurrent", and readers never wait.
    account_weeks = RefreshMatViewOperator(
        task_id="refresh_account_weeks",
        view="analytics.account_weeks",
    )

    # One mapped task for each view; the list may as well be the output of another task. "auto" chooses the
    # strategy by the facts. Where a refresh of the view is under way already, that one will do. Deferred, they take no
    # worker's slot: all of them run in the triggerer.
    others = RefreshMatViewOperator.partial(
        task_id="refresh_others",
        refresh_strategy="auto",
        if_locked="skip",
        deferrable=True,
    ).expand(view=["analytics.account_retention", "analytics.user_ranking"])

    # account_retention reads account_weeks.
    account_weeks >> others
