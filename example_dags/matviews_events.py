"""Refresh views as soon as what they read has changed, instead of by the clock.

A watcher in the triggerer looks at the database all the time; once a view's sources have changed and then been quiet
for five seconds, it makes an asset event that names the view, and this DAG runs. Whatever comes between, it says so
again until a refresh has come of it. The views come from the `matviews_create` DAG.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Asset, AssetWatcher, task

from airflow_provider_matviews.operators.matview import RefreshMatViewOperator
from airflow_provider_matviews.triggers.changes import StaleMatViewsTrigger

CONN_ID = "warehouse"

stale_views = Asset(
    "stale_views",
    watchers=[
        AssetWatcher(
            name="stale_views",
            trigger=StaleMatViewsTrigger(
                conn_id=CONN_ID,
                views=["analytics.daily_events", "analytics.account_weeks"],
                # Quiet for so long, or changing for so long, in seconds.
                debounce=5,
                max_wait=60,
                # With the change log installed (`MatViewHook.install_change_log`) it is told at once:
                # truth="change_log",
            ),
        )
    ],
)

with DAG(
    dag_id="matviews_events",
    schedule=[stale_views],
    catchup=False,
    # What changes while a refresh is under way is told after it.
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=10), "execution_timeout": timedelta(minutes=10)},
    tags=["matviews"],
    doc_md=__doc__,
):

    @task
    def named_views(triggering_asset_events: Any = None) -> list[str]:
        """Return the views that the events name; none where somebody starts a run by hand."""
        payloads = [event.extra["payload"] for events in triggering_asset_events.values() for event in events]
        return sorted({view for payload in payloads for view in payload["views"]})

    RefreshMatViewOperator.partial(task_id="refresh", conn_id=CONN_ID, if_locked="skip").expand(view=named_views())
