"""Say every night whether a view is not what its definition says.

Somebody dropped an index by hand, a grant is gone, a deployment was forgotten: the task of that view fails and its
log is the plan that mends it. `matviews_create` applies it.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from airflow.sdk import DAG

from airflow_provider_matviews.definition import load_definitions
from airflow_provider_matviews.operators.matview import CreateMatViewOperator

CONN_ID = "warehouse"
VIEWS = Path(__file__).parent / "views"

with DAG(
    dag_id="matviews_drift",
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    tags=["matviews"],
    doc_md=__doc__,
):
    for definition in load_definitions(VIEWS).values():
        CreateMatViewOperator(
            task_id=f"check_{definition.view.name}",
            definition=definition,
            conn_id=CONN_ID,
            on_drift="fail",
        )
