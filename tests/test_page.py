"""The page and its API: who sees what, and what is seen; and the way there from a task."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
from airflow.api_fastapi.app import create_app
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.configuration import conf
from airflow.sdk import DAG
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx import Response

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.operators.matview import CreateMatViewOperator, RefreshMatViewOperator
from airflow_provider_matviews.web.settings import shown_connections
from tests.airflow_dags import make_metadata_database, run_dag, set_connection
from tests.conftest import Database, hook_on

Get = Callable[..., Response]
HOSTILE = '<script>alert("x")</script>'


@functools.cache
def _app() -> FastAPI:
    make_metadata_database()
    return create_app()


@pytest.fixture
def get(db: Database, monkeypatch: pytest.MonkeyPatch) -> Get:
    """Ask the server as somebody: ``get("/path", role="admin")``, under where it is mounted."""
    set_connection(monkeypatch, db, conn_id="views")
    set_connection(monkeypatch, db, conn_id="hidden")
    monkeypatch.setenv("AIRFLOW__MATVIEWS__CONNECTIONS", "views, elsewhere=other_schema, missing")
    set_connection(monkeypatch, db, conn_id="elsewhere")
    app = _app()

    def ask(path: str, role: str | None = "admin", **arguments: Any) -> Response:
        headers = {}
        if role is not None:
            user = SimpleAuthManagerUser(username=role, role=role)
            headers["Authorization"] = f"Bearer {app.state.auth_manager.generate_jwt(user)}"
        client = TestClient(app, headers=headers, follow_redirects=False)
        return client.get(f"/matviews{path}", **arguments)

    return ask


def test_nobody_sees_what_is_not_theirs(db: Database, get: Get) -> None:
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    run, unknown = "/api/v1/connections/views/runs/1", "/api/v1/connections/views/runs/2"
    shell = ("/", "/static/app.js", "/static/style.css", "/api/v1/openapi.json", "/api/v1/connections")
    others = (
        "/api/v1/connections/hidden/runs/1",
        "/api/v1/connections/elsewhere/runs/1",
        "/api/v1/connections/no/runs/1",
    )
    # By Airflow's simple auth manager a connection may be read from `op` on.
    assert {
        role: [get(path, role).status_code for path in (run, unknown, *others)]
        for role in (None, "viewer", "user", "op", "admin")
    } == {
        None: [401] * 5,
        "viewer": [403] * 5,
        "user": [403] * 5,
        "op": [200, 404, 404, 404, 404],
        "admin": [200, 404, 404, 404, 404],
    }
    for path in shell:
        assert get(path, None).status_code == (307 if path == "/" else 401)
        assert get(path, "viewer").status_code == 200
    assert get("/", None).headers["location"] == "/api/v2/auth/login?next=%2Fmatviews%2F"
    assert get("/api/v1/connections", "viewer").json() == {"connections": []}
    assert get("/api/v1/connections", "op").json() == {"connections": ["views", "elsewhere", "missing"]}


def test_a_run_is_shown_with_everything_that_is_recorded_of_it(db: Database, get: Get) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql=f"SELECT 1 AS a, '{HOSTILE}' AS b"))
    hook.refresh("mv")
    hook.delete("mv")
    (drop, refresh, create) = hook.runs()
    shown = get(f"/api/v1/connections/views/runs/{refresh.id}").json()
    assert (shown["view"], shown["operation"], shown["status"]) == ("mv", "refresh", "success")
    assert (shown["previous_id"], shown["next_id"]) == (create.id, drop.id)
    assert shown["meta"] == refresh.meta
    assert get(f"/api/v1/connections/views/runs/{create.id}").json()["previous_id"] is None


@pytest.mark.parametrize("number", ["0", "-1", "x", "99999999999999999999", "1;drop"])
def test_what_is_no_number_of_a_run_is_refused(get: Get, number: str) -> None:
    assert get(f"/api/v1/connections/views/runs/{number}").status_code in (404, 422)


def test_looking_changes_nothing_and_tells_nothing_of_the_server(db: Database, get: Get, monkeypatch: Any) -> None:
    assert get("/api/v1/connections/views/runs/1").status_code == 404
    assert db.value("SELECT to_regnamespace('matviews') IS NULL")
    assert get("/api/v1/connections/missing/runs/1").json()["detail"] == "Airflow knows no such connection."
    set_connection(monkeypatch, db, conn_id="views", login="nobody_of_that_name")
    answer = get("/api/v1/connections/views/runs/1")
    assert answer.status_code == 502
    assert "nobody" not in answer.text
    assert str(db.server.port) not in answer.text


def test_what_takes_long_is_ended(db: Database, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    hook_on(db).runs()
    monkeypatch.setattr("airflow_provider_matviews.web.api.LONGEST_STATEMENT", 0.1)
    with db.connect() as connection, connection.transaction():
        connection.execute("LOCK TABLE matviews.mat_view_runs IN ACCESS EXCLUSIVE MODE")
        answer = get("/api/v1/connections/views/runs/1")
    assert answer.status_code == 504


def test_every_answer_has_the_headers_that_protect_it(get: Get) -> None:
    for path in ("/", "/static/app.js", "/static/none.js", "/api/v1/connections", "/nowhere"):
        headers = get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"


def test_connections_are_read_from_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, wanted in {
        "": {},
        "a": {"a": "matviews"},
        " a , b=other ,": {"a": "matviews", "b": "other"},
    }.items():
        monkeypatch.setenv("AIRFLOW__MATVIEWS__CONNECTIONS", text)
        assert shown_connections() == wanted


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_task_links_to_its_run_whether_it_ends_well_or_not(
    db: Database, monkeypatch: pytest.MonkeyPatch, deferrable: bool
) -> None:
    set_connection(monkeypatch, db)
    set_connection(monkeypatch, db, conn_id="hidden")
    monkeypatch.setenv("AIRFLOW__MATVIEWS__CONNECTIONS", "postgres_default")
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example/base/")
    with DAG(f"links_{deferrable}") as dag:
        created = CreateMatViewOperator(task_id="create", view="mv", sql="SELECT 1 AS a", deferrable=deferrable)
        elsewhere = RefreshMatViewOperator(task_id="hidden", view="mv", conn_id="hidden", deferrable=deferrable)
        bad = RefreshMatViewOperator(
            task_id="bad", view="mv", refresh_strategy="concurrent", deferrable=deferrable, retries=0
        )
        created >> elsewhere >> bad
    run = run_dag(dag)
    assert run.states == {"create": "success", "hidden": "success", "bad": "failed"}
    runs = {each.meta["task_id"]: each.id for each in hook_on(db).runs()}

    def linked(task: str) -> Any:
        return run.tasks[task].xcom_pull(task_ids=task, key="_link_MatViewRunLink")

    prefix = "https://airflow.example/base/matviews/#/postgres_default/runs"
    assert linked("create") == f"{prefix}/{runs['create']}"
    assert linked("bad") == f"{prefix}/{runs['bad']}"
    assert not linked("hidden"), "a connection that is not shown has no page"


def test_the_page_asks_nobody_else(get: Get) -> None:
    for path in ("/", "/static/app.js", "/static/style.css"):
        assert "http://" not in get(path).text.replace("http://www.w3.org/", "")
        assert "https://" not in get(path).text
    assert json.loads(get("/api/v1/openapi.json").text)["info"]["title"] == "Materialized views"
    assert conf.get("matviews", "connections").startswith("views")
