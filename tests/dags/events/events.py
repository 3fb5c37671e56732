"""Two views that are refreshed whenever their sources have changed, told in either way."""

from __future__ import annotations

from airflow.sdk import DAG, Asset, AssetWatcher

from airflow_provider_matviews.operators.matview import RefreshMatViewOperator
from airflow_provider_matviews.triggers.changes import StaleMatViewsTrigger

NAMED_BY_THE_EVENT = "{{ (triggering_asset_events.values() | first | last).extra['payload']['views'] | first }}"

for view, truth in (("logged", "change_log"), ("counted", "fingerprints")):
    watcher = AssetWatcher(
        name=f"{view}_is_stale",
        trigger=StaleMatViewsTrigger(views=[view], conn_id="warehouse", truth=truth, max_wait=10, again_after=10),
    )
    with DAG(view, schedule=[Asset(f"sources_of_{view}", watchers=[watcher])], max_active_runs=1):
        RefreshMatViewOperator(
            task_id="refresh", view=NAMED_BY_THE_EVENT, conn_id="warehouse", refresh_strategy="regular"
        )
