"""Say when a view fails, lags behind or becomes slow.

Looks at the record of all views at once, every ten minutes. Where a rule is broken the task fails at once, and its
callback says so where people are. The second task only reports, for whoever would rather go on.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, task

from airflow_provider_matviews.notifications.matview import MatViewNotifier
from airflow_provider_matviews.sensors.matview import MatViewMetricsSensor

CONN_ID = "warehouse"

with DAG(
    dag_id="matviews_alerts",
    schedule="*/10 * * * *",
    catchup=False,
    max_active_runs=1,
    tags=["matviews"],
    doc_md=__doc__,
):
    MatViewMetricsSensor(
        task_id="check",
        conn_id=CONN_ID,
        # Says which view broke, why, since when and what mends it: in the task's log, and by whichever notifier of
        # Airflow's it is given, such as MatViewNotifier(SlackWebhookNotifier(text="{{ matview.text }}")).
        on_failure_callback=MatViewNotifier(),
        # Everything that is on record. Each rule can be another one for some views.
        views=["analytics.*"],
        max_age=timedelta(hours=26),
        max_running=timedelta(hours=1),
        overrides={"analytics.daily_events": {"max_age": timedelta(hours=2), "max_duration_ratio": 5}},
    )

    report = MatViewMetricsSensor(
        task_id="report",
        conn_id=CONN_ID,
        views=["analytics.*"],
        # Worth knowing, and nothing to wake anybody for.
        failed=False,
        max_duration_ratio=None,
        max_row_count_ratio=2,
        max_bloat=2,
        on_breach="report",
    )

    @task
    def tell(found: dict[str, object]) -> str:
        """Return what a task of one's own makes of it."""
        return f"{found['views']} views, all is well: {found['healthy']}"

    tell(report.output)
