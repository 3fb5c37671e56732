"""Once a week: is every view what its query would give, and is it worth having?

A sample of every view first, which is cheap where a view has a unique index; then all rows, and the timings, in the
triggerer. The views come from the `matviews_create` DAG. The CSV file is written where the worker runs.
"""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG

from airflow_provider_matviews.operators.matview import VerifyMatViewOperator

with DAG(
    dag_id="matviews_verify",
    schedule="@weekly",
    catchup=False,
    max_active_runs=1,
    tags=["matviews"],
    doc_md=__doc__,
):
    sampled = VerifyMatViewOperator(
        task_id="sample",
        conn_id="warehouse",
        schemas=["analytics"],
        mode="sampled",
        # Other rows each week, and the same ones when the task is tried again.
        seed="{{ (dag_run.logical_date or dag_run.run_after).strftime('%Y%m%d') }}",
    )
    whole = VerifyMatViewOperator(
        task_id="verify",
        conn_id="warehouse",
        schemas=["analytics"],
        session_settings={"work_mem": "64MB"},
        execution_timeout=timedelta(hours=2),
        deferrable=True,
        timing_rounds=3,
        csv_path=str(Path(tempfile.gettempdir()) / "matviews_timings_{{ run_id | replace(':', '') }}.csv"),
        # What is found is worth telling though the sample has found something already.
        trigger_rule="all_done",
    )
    sampled >> whole
