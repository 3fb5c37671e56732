"""Refreshes to be stopped, in both modes: the name of a run is the view that it refreshes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Asset, AssetAlias

from airflow_provider_matviews.operators.matview import RefreshMatViewOperator


def refresh(deferrable: bool, **arguments: Any) -> None:
    RefreshMatViewOperator(
        task_id="refresh",
        conn_id="warehouse",
        view="{{ dag_run.conf.get('view', run_id) }}",
        deferrable=deferrable,
        **arguments,
    )


for deferrable, suffix in ((False, ""), (True, "_deferred")):
    with DAG(f"plain{suffix}", schedule=None):
        refresh(deferrable)

    with DAG(f"limited{suffix}", schedule=None):
        refresh(deferrable, execution_timeout=timedelta(seconds=10))

    with DAG(f"limited_run{suffix}", schedule=None, dagrun_timeout=timedelta(seconds=20)):
        refresh(deferrable)

    with DAG(f"compared{suffix}", schedule=None):
        refresh(deferrable, outlets=[Asset("refreshed"), AssetAlias("refreshed_by_name")])

with DAG("kept_deferred", schedule=None):
    refresh(deferrable=True, cancel_on_kill=False)

# Paused: the scheduler would take the run for one of its own.
with DAG("at_a_terminal", schedule=None):
    refresh(deferrable=False)
