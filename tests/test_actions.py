"""What a click on the page asks for: a run of the DAG that `matview_actions()` makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from airflow.api_fastapi.app import create_app
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.sdk import DAG
from fastapi.testclient import TestClient
from psycopg.errors import DivisionByZero

from airflow_provider_matviews.dags.actions import matview_actions
from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.web.settings import action_dag
from tests.airflow_dags import DagRun, run_dag, set_connection
from tests.conftest import Database, hook_on

Act = Callable[..., DagRun]


@pytest.fixture
def act(db: Database, monkeypatch: pytest.MonkeyPatch) -> Act:
    for name in ("views", "others", "hidden"):
        set_connection(monkeypatch, db, conn_id=name)
    monkeypatch.setenv("AIRFLOW__MATVIEWS__CONNECTIONS", "views=kept, others")
    monkeypatch.setenv("AIRFLOW__MATVIEWS__ACTIONS", "matviews_actions, others=other_actions")

    def trigger(action: str, view: str, connection_id: str = "views", **more: Any) -> DagRun:
        return run_dag(matview_actions(), {"action": action, "view": view, "connection_id": connection_id, **more})

    return trigger


def test_each_button_does_what_it_says_and_goes_on_record_as_the_dags(db: Database, act: Act) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a")
    hook = hook_on(db, tracking_schema="kept")
    name = '"O\'dd {{ ti }} <b>"'
    hook.create(MatViewDefinition(name=name, sql="SELECT a FROM t", unique_index_columns=("a",), comment="mine"))
    db.execute("INSERT INTO t VALUES (2)")
    run = act("refresh", name, refresh_strategy="swap")
    assert run.states == {"choose": "success", "refresh": "success", "verify": "skipped", "apply": "skipped"}
    (last, *_) = hook.runs()
    assert (last.operation, last.status, last.meta["strategy"]) == ("refresh", "success", "swap")
    assert (last.meta["dag_id"], last.meta["run_id"]) == ("matviews_actions", run.run_id)
    assert db.value(f"SELECT count(*) FROM public.{name}") == 2
    db.execute(f"COMMENT ON MATERIALIZED VIEW {name} IS 'of another'")
    # Elsewhere a view of the same name would be found first.
    db.execute("CREATE SCHEMA postgres", f"CREATE MATERIALIZED VIEW postgres.{name} AS SELECT 1")
    run = act("apply", f"public.{name}")
    assert run.states == {"choose": "success", "refresh": "skipped", "verify": "skipped", "apply": "success"}
    assert db.value(f"SELECT obj_description('public.{name.replace(chr(39), chr(39) * 2)}'::regclass)") == "mine"
    assert hook.runs()[0].operation == "create"
    run = act("verify", f"public.{name}")
    assert run.states == {"choose": "success", "refresh": "skipped", "verify": "success", "apply": "skipped"}


def test_what_it_may_not_act_on_it_leaves_alone(db: Database, act: Act) -> None:
    hook = hook_on(db, tracking_schema="kept")
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    for connection in ("hidden", "others", "no such one"):
        run = act("refresh", "mv", connection)
        assert run.states["choose"] == "failed"
        assert f"may not act on the connection '{connection}'" in run.log
        assert "actions = " in run.log
    # Adopted by its first refresh, and never declared.
    db.execute("CREATE MATERIALIZED VIEW of_others AS SELECT 1 AS a")
    hook.refresh("of_others")
    run = act("apply", "of_others")
    assert run.states["choose"] == "failed"
    assert "was never declared" in run.log
    assert [each.operation for each in hook.runs()] == ["refresh", "create"]


def test_a_refresh_that_fails_is_a_failed_run_of_the_dag(db: Database, act: Act) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a")
    hook_on(db, tracking_schema="kept").create(MatViewDefinition(name="mv", sql="SELECT 1 / a AS b FROM t"))
    db.execute("UPDATE t SET a = 0")
    run = act("refresh", "mv")
    assert (run.state, run.states["refresh"]) == ("failed", "failed")
    assert DivisionByZero.__name__ in run.log


def test_who_may_trigger_it_is_airflows_to_say_and_no_form_of_another_site_can(act: Act) -> None:
    run_dag(matview_actions(), {"action": "refresh", "view": "mv", "connection_id": "hidden"})
    app = create_app()
    path = "/api/v2/dags/matviews_actions/dagRuns"
    wish = {"logical_date": None, "conf": {"action": "refresh", "view": "mv", "connection_id": "views"}}

    def client(role: str | None, *, as_a_browser: bool = False) -> TestClient:
        if role is None:
            return TestClient(app)
        token = app.state.auth_manager.generate_jwt(SimpleAuthManagerUser(username=role, role=role))
        if as_a_browser:
            return TestClient(app, cookies={"_token": token})
        return TestClient(app, headers={"Authorization": f"Bearer {token}"})

    def count() -> int:
        return int(client("admin").get(path).json()["total_entries"])

    before = count()
    roles = (None, "viewer", "user", "op", "admin")
    assert {role: client(role).post(path, json=wish).status_code for role in roles} == {
        None: 401,
        "viewer": 403,
        "user": 200,
        "op": 200,
        "admin": 200,
    }
    assert count() == before + 3
    # What cannot be is refused before there is a run of it.
    for wrong in ({"action": "drop"}, {"view": ""}, {"view": 7}, {"refresh_strategy": "x"}):
        answer = client("admin").post(path, json={**wish, "conf": {**wish["conf"], **wrong}})
        assert answer.status_code == 400, wrong
    # What a form can send without the browser asking first: these types, and the cookie only from the same site.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = client("admin", as_a_browser=True).post(path, content=json.dumps(wish), headers={"Content-Type": kind})
        assert answer.status_code == 422, kind
    assert count() == before + 3


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        (" , ", None),
        ("a_dag", "a_dag"),
        ("a_dag, views = of_views", "of_views"),
        ("others=of_others", None),
        ("views=", "entry 1"),
        ("a=b=c", "entry 1"),
        ("one, two", "entry 2"),
        ("views=one, views=two", "entry 2"),
        ("one, veiws=two", "entry 2 of it names a connection that the option connections does not"),
    ],
)
def test_the_configuration_says_whose_dag_it_is(monkeypatch: pytest.MonkeyPatch, text: str, found: str | None) -> None:
    monkeypatch.setenv("AIRFLOW__MATVIEWS__CONNECTIONS", "views, others")
    monkeypatch.setenv("AIRFLOW__MATVIEWS__ACTIONS", text)
    if found and found.startswith("entry"):
        with pytest.raises(InvalidDefinition, match=found):
            action_dag("views")
    else:
        assert action_dag("views") == found


def test_it_is_a_dag_like_others() -> None:
    dag = matview_actions("mine", tags=["ours"], default_args={"retries": 2})
    assert isinstance(dag, DAG)
    assert (dag.dag_id, dag.tags, dag.get_task("refresh").retries) == ("mine", {"ours"}, 2)
