"""The example DAGs, as they are shipped, over the demo's data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG

from demo.postgres_server import PostgresServer
from demo.warehouse import DATA
from tests.airflow_dags import run_dag, set_connection
from tests.conftest import NEWEST, Database, hook_on
from tests.conftest import _database as fresh_database

EXAMPLES = Path(__file__).resolve().parent.parent / "example_dags"


def _dags() -> dict[str, DAG]:
    bag = DagBag(dag_folder=EXAMPLES)
    assert bag.import_errors == {}
    return bag.dags


@pytest.fixture(scope="module")
def warehouse(servers: dict[int, PostgresServer]) -> Iterator[Database]:
    """The demo's database in its full size."""
    for database in fresh_database(servers, NEWEST):
        with database.connect() as connection:
            connection.execute(DATA.read_bytes())
        # Made by the data; roles belong to the whole server.
        database.roles.append("reporting")
        yield database


def test_every_example_is_read_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AIRFLOW_CONN_")]:
        monkeypatch.delenv(name)
    dags = _dags()
    assert sorted(dags) == [
        "matviews_actions",
        "matviews_after_refresh",
        "matviews_alerts",
        "matviews_create",
        "matviews_delete",
        "matviews_drift",
        "matviews_events",
        "matviews_fleet",
        "matviews_nightly",
        "matviews_refresh",
        "matviews_retention",
        "matviews_verify",
    ]
    assert {Path(dag.fileloc).name for dag in dags.values()} == {path.name for path in EXAMPLES.glob("*.py")}
    assert all(dag.doc_md for dag in dags.values())


@pytest.mark.e2e
def test_every_example_succeeds_over_the_demos_data(warehouse: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    set_connection(monkeypatch, warehouse, conn_id="warehouse")
    dags = _dags()
    views = [f"analytics.{path.stem}" for path in sorted((EXAMPLES / "views").glob("*.sql"))]
    assert len(views) == 4

    created = run_dag(dags["matviews_create"])
    assert created.state == "success"
    assert set(created.states.values()) == {"success"}
    rows = {view: hook_on(warehouse).last_run(view).row_count_after for view in views}  # type: ignore[union-attr]
    assert all(rows.values()), rows
    assert warehouse.value("SELECT has_table_privilege('reporting', 'analytics.account_retention', 'SELECT')")

    # Nothing differs; somebody changes a view; that is told, and put back.
    assert run_dag(dags["matviews_drift"]).state == "success"
    warehouse.execute("DROP INDEX analytics.account_retention_first_quarter")
    drifted = run_dag(_dags()["matviews_drift"])
    assert {task for task, state in drifted.states.items() if state == "failed"} == {"check_account_retention"}
    assert "build index account_retention_first_quarter" in drifted.log
    assert run_dag(_dags()["matviews_create"]).state == "success"
    assert run_dag(_dags()["matviews_drift"]).state == "success"

    warehouse.execute("DELETE FROM app.events WHERE occurred_at >= '2024-12-31 00:00+00'")
    refreshed = run_dag(dags["matviews_refresh"])
    assert refreshed.state == "success"
    assert set(refreshed.states.values()) == {"success"}
    runs = {run.view: run for run in hook_on(warehouse).runs(limit=4)}
    assert {view: (run.operation, run.meta["strategy"]) for view, run in runs.items()} == {
        "analytics.account_retention": ("refresh", "concurrent"),
        "analytics.account_weeks": ("refresh", "concurrent"),
        "analytics.daily_events": ("refresh", "regular"),
        "analytics.user_ranking": ("refresh", "concurrent"),
    }
    assert runs["analytics.daily_events"].row_count_before == rows["analytics.daily_events"]
    assert (runs["analytics.daily_events"].row_count_after or 0) < (rows["analytics.daily_events"] or 0)

    fleet = run_dag(dags["matviews_fleet"])
    assert fleet.states == {f"refresh.{view}": "success" for view in views}
    order = [run.view for run in reversed(hook_on(warehouse).runs(limit=4))]
    assert order.index("analytics.account_weeks") < order.index("analytics.account_retention")

    nightly = run_dag(dags["matviews_nightly"])
    assert nightly.states == {"refresh": "skipped"}
    warehouse.execute("DELETE FROM app.events WHERE occurred_at >= '2024-12-30 00:00+00'")
    nightly = run_dag(_dags()["matviews_nightly"])
    assert nightly.states == {"refresh": "success"}
    assert nightly.xcom("refresh")["updated"] == 4
    assert run_dag(dags["matviews_after_refresh"]).xcom("say_what_was_refreshed") == []

    alerts = run_dag(dags["matviews_alerts"])
    assert alerts.state == "success"
    assert alerts.xcom("tell") == "4 views, all is well: True"
    verified = run_dag(dags["matviews_verify"])
    assert verified.state == "success"
    assert verified.xcom("verify")["equal"] == 4
    assert run_dag(dags["matviews_retention"]).xcom("prune")["removed"] == 0

    monkeypatch.setenv("AIRFLOW__MATVIEWS__CONNECTIONS", "warehouse")
    monkeypatch.setenv("AIRFLOW__MATVIEWS__ACTIONS", "matviews_actions")
    asked = {"action": "apply", "connection_id": "warehouse", "view": "analytics.daily_events"}
    acted = run_dag(dags["matviews_actions"], asked)
    assert acted.states == {"choose": "success", "refresh": "skipped", "verify": "skipped", "apply": "success"}

    deleted = run_dag(dags["matviews_delete"])
    assert deleted.state == "success"
    assert set(deleted.states.values()) == {"success"}
    assert warehouse.rows("SELECT matviewname FROM pg_matviews") == []
    assert warehouse.value("SELECT count(*) FROM matviews.mat_view_runs WHERE status = 2") == 21
