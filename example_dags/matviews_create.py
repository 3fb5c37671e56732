"""Create the materialized views that `views/*.sql` declare.

Run it by hand, or after each deployment: a view that stands is made what its file says, and readers go on meanwhile.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG

from airflow_provider_matviews.definition import load_definitions
from airflow_provider_matviews.operators.matview import CreateMatViewOperator

CONN_ID = "warehouse"
VIEWS = Path(__file__).parent / "views"

with DAG(
    dag_id="matviews_create",
    schedule=None,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=30)},
    tags=["matviews"],
    doc_md=__doc__,
):
    definitions = load_definitions(VIEWS)
    tasks = {
        name: CreateMatViewOperator(
            task_id=f"create_{definition.view.name}",
            definition=definition,
            conn_id=CONN_ID,
        )
        for name, definition in definitions.items()
    }
    # A view that reads another one is created after it.
    for name, definition in definitions.items():
        for source in definition.depends_on:
            tasks[source] >> tasks[name]
