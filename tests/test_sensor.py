"""The sensor in real DAG runs: what its task becomes, what it tells, and what follows it."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
from airflow.configuration import conf
from airflow.providers.standard.sensors.python import PythonSensor
from airflow.sdk import DAG

from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.operators.matview import RefreshMatViewOperator
from airflow_provider_matviews.sensors.matview import MatViewMetricsSensor
from airflow_provider_matviews.triggers.metrics import HealthyMatViewsTrigger
from tests.airflow_dags import DagRun, run_dag, set_connection
from tests.conftest import Database, hook_on
from tests.racing import beside

PASSWORD = "s3cret/pass word"


@pytest.fixture(autouse=True)
def _connection(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    set_connection(monkeypatch, db, password=PASSWORD)


def _broken(db: Database) -> None:
    """A view whose last refresh failed, with a secret in what the server said of it."""
    db.execute(
        "CREATE TABLE t AS SELECT 1 AS a",
        "CREATE MATERIALIZED VIEW mv AS SELECT 1 / a AS b, a || 's3cret/pass word' AS c FROM t",
        "UPDATE t SET a = 0",
    )
    with pytest.raises(Exception, match="division by zero"):
        hook_on(db, password=PASSWORD).refresh("mv")


def _mend(db: Database) -> None:
    db.execute("UPDATE t SET a = 1")
    hook_on(db).refresh("mv")


def _breaches(run: DagRun) -> Any:
    instance = run.tasks["check"]
    return instance.xcom_pull(task_ids="check", key="breaches")


def _dag(name: str, **arguments: Any) -> DAG:
    with DAG(dag_id=f"sensor_{name}") as dag:
        MatViewMetricsSensor(task_id="check", **arguments)
    return dag


def test_all_is_well(db: Database) -> None:
    _broken(db)
    _mend(db)
    run = run_dag(_dag("well"))
    assert run.state == "success"
    assert run.xcom("check") == {"healthy": True, "views": 1, "breaches": []}
    assert "Looked at 1 view: all is well." in run.log


def test_a_breach_fails_the_task_at_once_whatever_its_retries(db: Database) -> None:
    _broken(db)
    called = []
    arguments = {"retries": 3, "retry_delay": timedelta(hours=1), "on_failure_callback": called.append}
    run = run_dag(_dag("fail", **arguments))
    assert run.states == {"check": "failed"}
    assert run.tasks["check"].try_number == 1
    assert len(called) == 1
    (breach,) = _breaches(run)
    assert (breach["view"], breach["rule"]) == ("mv", "failed")
    assert "division by zero" in breach["message"]
    assert "Looked at 1 view: 1 of them breaks a rule." in run.log
    assert "view  rule    what" in run.log
    assert PASSWORD not in run.log + json.dumps(breach)


def test_it_may_only_report(db: Database) -> None:
    _broken(db)
    run = run_dag(_dag("report", on_breach="report", views=["{{ 'm' }}v"]))
    assert run.state == "success"
    found = run.xcom("check")
    assert (found["healthy"], found["views"]) == (False, 1)
    assert found["breaches"] == _breaches(run)


def _has_told(dag_id: str) -> bool:
    """Whether the sensor has told what it saw."""
    path = conf.get("database", "sql_alchemy_conn").removeprefix("sqlite:///")
    with closing(sqlite3.connect(path)) as metadata:
        told = metadata.execute("SELECT count(*) FROM xcom WHERE dag_id = ? AND key = 'breaches'", (dag_id,))
        return bool(told.fetchone()[0])


def _after_first_look(dag_id: str, function: Callable[[], None]) -> None:
    deadline = time.monotonic() + 60
    while not _has_told(dag_id):
        assert time.monotonic() < deadline, "the sensor told nothing"
        time.sleep(0.02)
    function()


@pytest.mark.parametrize("deferrable", [False, True])
def test_it_waits_until_all_is_well(db: Database, deferrable: bool) -> None:
    _broken(db)
    name = f"wait_{deferrable}"
    arguments = {"on_breach": "wait", "poke_interval": 0.2, "timeout": 60, "deferrable": deferrable}
    with beside(lambda: _after_first_look(f"sensor_{name}", lambda: _mend(db))) as mending:
        run = run_dag(_dag(name, **arguments))
    mending.result()
    assert run.states == {"check": "success"}
    assert run.xcom("check")["healthy"] is True
    assert _breaches(run) == []
    assert run.log.count("division by zero") == 1, "what is as before is not told again"


def test_what_is_rescheduled_leaves_its_slot_to_what_mends_it(db: Database) -> None:
    _broken(db)
    db.execute("UPDATE t SET a = 1")
    with DAG(dag_id="sensor_reschedule") as dag:
        MatViewMetricsSensor(task_id="check", on_breach="wait", mode="reschedule", poke_interval=0.05)
        looked = PythonSensor(
            task_id="looked",
            python_callable=lambda: _has_told("sensor_reschedule"),
            mode="reschedule",
            poke_interval=0.05,
        )
        looked >> RefreshMatViewOperator(task_id="refresh", view="mv")
    run = run_dag(dag)
    assert set(run.states.values()) == {"success"}
    assert "1 of them breaks a rule" in run.log


@pytest.mark.parametrize("deferrable", [False, True])
def test_what_stays_broken_does_not_wait_for_ever(db: Database, deferrable: bool) -> None:
    _broken(db)
    arguments = {"on_breach": "wait", "poke_interval": 0.05, "timeout": 0.3}
    if deferrable:
        # `dag.test()` runs a trigger to its end, however long that takes: what it meets then fails the task.
        arguments |= {"deferrable": True, "poke_interval": 0.3}
        with beside(lambda: _after_first_look("sensor_stays_True", lambda: db.execute("DROP SCHEMA matviews CASCADE"))):
            run = run_dag(_dag("stays_True", **arguments))
        assert run.states["check"] == "failed"
        assert "There is no view to look at" in run.log
        return
    run = run_dag(_dag("stays_False", **arguments))
    assert run.states == {"check": "failed"}
    assert "Sensor has timed out" in run.log


def test_soft_fail_skips(db: Database) -> None:
    _broken(db)
    assert run_dag(_dag("soft", soft_fail=True)).states == {"check": "skipped"}


def test_a_view_that_is_not_there_fails_and_says_so(db: Database) -> None:
    run = run_dag(_dag("absent", views=["nowhere"], on_breach="report"))
    assert run.states == {"check": "failed"}
    assert "No materialized view stands under nowhere" in run.log


def test_rules_and_modes_are_refused_when_the_dag_is_read() -> None:
    with pytest.raises(InvalidDefinition, match="on_breach='shout' does not exist"):
        MatViewMetricsSensor(task_id="check", on_breach="shout")
    with pytest.raises(InvalidDefinition, match="max_age"):
        MatViewMetricsSensor(task_id="check", max_age=-1)


def test_the_trigger_survives_a_restart_of_the_triggerer() -> None:
    arguments = {"views": ("*.*",), "overrides": {"a": {"max_age": 60.0}}, "max_age": 3600.0}
    trigger = HealthyMatViewsTrigger(
        arguments=arguments, conn_id="c", tracking_schema="s", context={"dag_id": "d"}, poke_interval=1.5
    )
    path, given = trigger.serialize()
    assert path == "airflow_provider_matviews.triggers.metrics.HealthyMatViewsTrigger"
    assert HealthyMatViewsTrigger(**json.loads(json.dumps(given))).serialize()[1] == json.loads(json.dumps(given))
