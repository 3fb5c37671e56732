"""Many tasks for one view, which is the name of the run: some wait for each other, some do not."""

from __future__ import annotations

from airflow.sdk import DAG

from airflow_provider_matviews.operators.matview import RefreshMatViewOperator

with DAG("crowd", schedule=None, max_active_tasks=100):
    RefreshMatViewOperator.partial(task_id="refresh", conn_id="warehouse", view="{{ run_id }}").expand(
        if_locked=["wait"] * 25 + ["skip"] * 25
    )

with DAG("pair", schedule=None):
    for worker in ("worker-1", "worker-2"):
        RefreshMatViewOperator(task_id=worker.replace("-", "_"), queue=worker, conn_id="warehouse", view="{{ run_id }}")
