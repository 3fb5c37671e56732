"""One view, refreshed in a worker and in the triggerer."""

from airflow.sdk import DAG

from airflow_provider_matviews.operators.matview import RefreshMatViewOperator

with DAG("observed", schedule=None):
    RefreshMatViewOperator(task_id="worker", conn_id="warehouse", view="mv") >> RefreshMatViewOperator(
        task_id="triggerer", conn_id="warehouse", view="mv", deferrable=True
    )
