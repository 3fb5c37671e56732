"""Drop the materialized views. The record of what was done to them stays.

Pause `matviews_refresh` first; `matviews_create` brings the views back.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, chain

from airflow_provider_matviews.definition import load_definitions
from airflow_provider_matviews.operators.matview import DeleteMatViewOperator

CONN_ID = "warehouse"
VIEWS = Path(__file__).parent / "views"

with DAG(
    dag_id="matviews_delete",
    schedule=None,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=30)},
    tags=["matviews"],
    doc_md=__doc__,
):
    definitions = load_definitions(VIEWS)
    # Last created, first dropped: what reads a view goes before it. Then nothing needs cascade=True, which
    # would drop what this DAG does not know of.
    chain(
        *(
            DeleteMatViewOperator(
                task_id=f"delete_{definition.view.name}",
                view=name,
                conn_id=CONN_ID,
            )
            for name, definition in reversed(definitions.items())
        )
    )
