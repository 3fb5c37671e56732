"""Refresh every view of a folder, each after those that it reads, the others at the same time.

Which view reads which is found in their queries. The views come from the `matviews_create` DAG.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider_matviews.task_groups.matview import MatViewTaskGroup

with DAG(
    dag_id="matviews_fleet",
    schedule="@hourly",
    catchup=False,
    max_active_runs=1,
    tags=["matviews"],
    doc_md=__doc__,
):
    MatViewTaskGroup(
        "refresh",
        # The folder beside this file. A new file in it is a new task.
        "views",
        conn_id="warehouse",
        retries=2,
        retry_delay=timedelta(seconds=30),
        execution_timeout=timedelta(minutes=10),
        # `matviews_refresh` may be at one of them just now; what reads that one is refreshed all the same.
        if_locked="skip",
        # In the triggerer: a task takes no worker's slot while its view is refreshed.
        deferrable=True,
        # Most of the time goes here, and everything waits for it.
        task_overrides={"analytics.account_weeks": {"execution_timeout": timedelta(minutes=30), "retries": 5}},
    )
