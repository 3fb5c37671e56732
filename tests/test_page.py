"""The page and its API: who sees what, and what is seen; and the way there from a task."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote, urlencode

import pytest
import schemathesis
from airflow.api_fastapi.app import create_app
from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.configuration import conf
from airflow.sdk import DAG
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx import Response
from hypothesis import HealthCheck, given, settings
from psycopg.errors import DivisionByZero
from schemathesis import GenerationMode

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.links.matview import MatViewRunLink
from airflow_provider_matviews.operators.matview import CreateMatViewOperator, RefreshMatViewOperator
from airflow_provider_matviews.plugins.matviews import MatViewsPlugin
from airflow_provider_matviews.services import browsing
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.web import api
from airflow_provider_matviews.web.settings import shown_connections
from tests.airflow_dags import make_metadata_database, run_dag, set_connection
from tests.conftest import Database, hook_on
from tests.histories import FAILED, RUNNING, SKIPPED, SUCCESS, Past, define, live_through, steady
from tests.racing import beside, until

Get = Callable[..., Response]
MV = {"schema_name": "public", "view_name": "mv"}
#: Questions asked of each route; more for a hunt by hand.
EXAMPLES = int(os.environ.get("API_EXAMPLES", "8"))
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
    prefix = "/api/v1/connections/views"
    run, unknown = f"{prefix}/runs/1", f"{prefix}/runs/2"
    readable = [
        f"{prefix}/{path}"
        for path in (
            "views",
            "runs",
            "staleness",
            "running",
            "graph",
            "actions",
            "view?schema_name=public&view_name=mv",
            "view/catalog?schema_name=public&view_name=mv",
            "view/plan?schema_name=public&view_name=mv",
            "view/choice?schema_name=public&view_name=mv",
        )
    ]
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
    for path in readable:
        statuses = [get(path, role).status_code for role in (None, "viewer", "user", "op", "admin")]
        assert statuses == [401, 403, 403, 200, 200], path
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


def test_views_are_listed_with_their_state(db: Database, get: Get) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a", "CREATE SCHEMA app")
    hook = hook_on(db)
    names = ["good", "bad", 'app."O\'dd <b>"', "gone"]
    for name in names:
        hook.create(MatViewDefinition(name=name, sql="SELECT 1 / a AS b FROM t"))
    hook.delete("gone")
    hook.refresh("good")
    db.execute("UPDATE t SET a = 0")
    with pytest.raises(DivisionByZero):
        hook.refresh("bad")
    with pytest.raises(DivisionByZero):
        hook.create(MatViewDefinition(name="never_made", sql="SELECT 1 / a AS b FROM t"))
    views = {view["view"]: view for view in get("/api/v1/connections/views/views").json()["views"]}
    assert {name: view["state"] for name, view in views.items()} == {
        "good": "fresh",
        "bad": "failing",
        "never_made": "failing",
        'app."O\'dd <b>"': "fresh",
    }
    assert views["bad"]["last_run"]["error"].startswith("DivisionByZero: division by zero")
    assert views["good"]["row_count"] == 1
    assert len(views["good"]["durations_ms"]) == 1
    stale = {each["view"]: each for each in get("/api/v1/connections/views/staleness").json()["views"]}
    assert stale["good"]["stale"] is True
    assert stale.keys() <= views.keys()


def test_no_route_is_forgotten_in_the_table_of_who_may_what(get: Get) -> None:
    paths = get("/api/v1/openapi.json").json()["paths"]
    assert {path.removeprefix("/api/v1/connections/{connection_id}/") for path in paths} == {
        "/api/v1/connections",
        "views",
        "runs",
        "runs/{run_id}",
        "staleness",
        "running",
        "graph",
        "actions",
        "view",
        "view/catalog",
        "view/plan",
        "view/choice",
    }
    # Nothing that changes anything is asked for here: actions are Airflow's own to trigger.
    assert {method for routes in paths.values() for method in routes} == {"get"}


def test_who_may_trigger_the_dag_may_act(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/api/v1/connections/views/actions"
    assert get(path).json() == {"dag_id": None, "actions": []}
    monkeypatch.setenv("AIRFLOW__MATVIEWS__ACTIONS", "matviews_actions")
    assert get(path).json() == {"dag_id": "matviews_actions", "actions": ["refresh", "verify", "apply"]}
    monkeypatch.setattr(SimpleAuthManager, "is_authorized_dag", lambda *_, method, **__: method == "GET")
    assert get(path).json() == {"dag_id": "matviews_actions", "actions": []}
    monkeypatch.setenv("AIRFLOW__MATVIEWS__ACTIONS", "a=b=c")
    assert get(path).status_code == 503


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_whatever_is_asked_is_answered_as_the_schema_says(db: Database, get: Get, mode: GenerationMode) -> None:
    """What the schema allows, and what it does not: never an error of the server's own, and no answer unheard of."""
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a", unique_index_columns=("a",)))
    document = get("/api/v1/openapi.json").json()
    # Among what is made up there is hardly ever a connection or a view that exists.
    existing = {"connection_id": ["views"], "schema_name": ["public"], "view_name": ["mv", "none"], "run_id": [1, 2]}
    for routes in document["paths"].values():
        for parameter in routes["get"].get("parameters", ()):
            if parameter["name"] in existing and mode is GenerationMode.POSITIVE:
                parameter["schema"] = {"enum": existing[parameter["name"]]}
    schema = schemathesis.openapi.from_dict(document)
    schema.app = _app()
    user = SimpleAuthManagerUser(username="admin", role="admin")
    headers = {"Authorization": f"Bearer {_app().state.auth_manager.generate_jwt(user)}"}
    seen: Counter[int] = Counter()
    for found in schema.get_all_operations():
        strategy = found.ok().as_strategy(generation_mode=mode)

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def ask(case: schemathesis.Case) -> None:
            response = case.call(headers=headers)
            case.validate_response(response, headers=headers)
            assert response.status_code < 500
            seen[response.status_code] += 1

        ask()
    assert seen[200] > 25 if mode is GenerationMode.POSITIVE else seen[422] + seen[404] > 25, seen


def test_a_view_is_compared_with_what_it_was_declared_to_be(db: Database, get: Get) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a", comment="mine", unique_index_columns=("a",)))
    path = "/api/v1/connections/views/view/plan"
    assert get(path, params=MV).json()["steps"] == []
    db.execute("COMMENT ON MATERIALIZED VIEW mv IS 'of another'", "DROP INDEX mv_a_key", "GRANT SELECT ON mv TO PUBLIC")
    before = db.rows("SELECT oid::bigint, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1")
    found = get(path, params=MV).json()
    assert {step["kind"] for step in found["steps"]} == {"build index", "comment"}
    assert any("CREATE UNIQUE INDEX" in sql for step in found["steps"] for sql in step["sql"])
    assert found["left_alone"] != []
    assert db.value("SELECT obj_description('mv'::regclass)") == "of another"
    after = db.rows("SELECT oid::bigint, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1")
    assert after == before
    assert len(hook.runs()) == 1
    # Another query, by hand: a diff.
    db.execute("DROP MATERIALIZED VIEW mv", "CREATE MATERIALIZED VIEW mv AS SELECT 2 AS a")
    (changed,) = (s for s in get(path, params=MV).json()["steps"] if s["kind"] == "change query")
    assert "- SELECT 2 AS a;" in "\n".join(changed["detail"]).replace("-  ", "- ")
    assert any(line.startswith("+") and "1 AS a" in line for line in changed["detail"])


def test_what_a_create_found_and_did_is_told(db: Database, get: Get) -> None:
    path = "/api/v1/connections/views/view"

    def told() -> tuple[Any, ...]:
        shown = get(path, params=MV).json()
        return shown["drift"], shown["drift_mended"]

    hook = hook_on(db)
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS a", comment="mine")
    hook.create(definition)
    assert told()[0] is None
    hook.create(definition)
    assert told()[0] == []
    db.execute("COMMENT ON MATERIALIZED VIEW mv IS 'of another'")
    found = ["comment: it should be 'mine', it is 'of another'"]
    hook.create(definition, on_drift="report")
    assert told() == (found, False)
    hook.create(definition)
    assert told() == (found, True)


def test_what_cannot_be_compared_says_why(db: Database, get: Get) -> None:
    path = "/api/v1/connections/views/view/plan"
    assert get(path, params=MV).status_code == 404
    db.execute("CREATE TABLE t AS SELECT 1 AS a", "CREATE MATERIALIZED VIEW of_others AS SELECT 1 AS a")
    hook = hook_on(db)
    hook.refresh("of_others")
    answer = get(path, params={**MV, "view_name": "of_others"})
    assert (answer.status_code, "never declared" in answer.json()["detail"]) == (404, True)
    hook.create(MatViewDefinition(name="mv", sql="SELECT a FROM t"))
    db.execute("DROP TABLE t CASCADE")
    answer = get(path, params=MV)
    assert (answer.status_code, answer.json()["detail"]) == (
        409,
        'It cannot be compared: relation "t" does not exist.',
    )


def test_what_auto_would_choose_now_is_said_with_its_reason(db: Database, get: Get) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a", refresh_strategy="regular"))
    path = "/api/v1/connections/views/view/choice"
    found = get(path, params=MV).json()
    assert (found["declared"], found["strategy"]) == ("regular", "swap")
    assert "no unique index" in found["reason"]
    db.execute("CREATE UNIQUE INDEX ON mv (a)")
    assert get(path, params=MV).json()["strategy"] == "concurrent"
    (chosen, _) = (hook.refresh("mv", refresh_strategy="auto"), hook.runs())
    assert chosen.response["strategy"] == "concurrent"
    # Of others, and not on record.
    db.execute("CREATE MATERIALIZED VIEW other AS SELECT 1 AS a WITH NO DATA")
    found = get(path, params={**MV, "view_name": "other"}).json()
    assert (found["declared"], found["strategy"]) == ("auto", "regular")
    assert get(path, params={**MV, "view_name": "none"}).status_code == 404
    assert found["may_refresh"] is True


def test_what_runs_is_shown_with_how_far_it_is(db: Database, get: Get) -> None:
    path = "/api/v1/connections/views/running"
    assert get(path).json() == {"runs": []}
    hook = hook_on(db)
    db.execute("CREATE TABLE t (a int)")
    hook.create(MatViewDefinition(name="mv", sql="SELECT a FROM t"))
    hook.refresh("mv", refresh_strategy="regular")
    with db.connect() as changer:
        changer.execute("BEGIN")
        changer.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        with beside(lambda: hook.refresh("mv", refresh_strategy="regular"), changer.close) as refreshing:
            until(db, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
            (run,) = get(path).json()["runs"]
            # Nobody who looks waits for it.
            assert get("/api/v1/connections/views/views").json()["views"][0]["state"] == "running"
    assert refreshing.result().status == "updated"
    assert "waiting for a lock behind" in run["said"]
    assert (run["operation"], run["view_name"], run["run_id"]) == ("refresh", "mv", hook.runs()[0].id)
    assert run["usual_seconds"] < 5
    assert get(path).json() == {"runs": []}


def test_no_question_has_an_answer_without_end(db: Database, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsing, "MOST_ROWS", 3)
    ids = define(db, "a", "b", "c")
    live_through(db, ids["a"], steady())
    assert get("/api/v1/connections/views/views").status_code == 200
    define(db, "d")
    for path in ("views", "staleness", "runs"):
        answer = get(f"/api/v1/connections/views/{path}")
        assert answer.status_code == 400, path
        assert "more than 3 of these" in answer.json()["detail"]
    assert get("/api/v1/connections/views/runs?limit=3").status_code == 200


def test_a_running_view_and_a_lost_one_are_told_apart(db: Database, get: Get) -> None:
    ids = define(db, "busy", "lost")
    for each in ids.values():
        live_through(db, each, [*steady(), Past(5, RUNNING)])
    with db.connect() as connection, connection.transaction():
        key = lock_key(ResolvedName("public", "busy", "busy"))
        connection.execute(b"SELECT pg_advisory_xact_lock(" + key.as_bytes(None) + b")")
        views = {view["view"]: view for view in get("/api/v1/connections/views/views").json()["views"]}
    assert (views["busy"]["state"], views["busy"]["running"][0]["lost"]) == ("running", False)
    assert views["lost"]["running"][0]["lost"] is True
    runs = {run["view"]: run["id"] for run in get("/api/v1/connections/views/runs?status=running").json()["runs"]}
    assert get(f"/api/v1/connections/views/runs/{runs['lost']}").json()["lost"] is True


def test_those_who_wait_for_a_database_leave_room_for_others(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_LONGEST_WAIT", 0.05)
    with ExitStack() as stack:
        for _ in range(10):
            assert api._asking.acquire(timeout=0)
            stack.callback(api._asking.release)
        answer = get("/api/v1/connections/views/views")
        assert (answer.status_code, "Too many are waiting" in answer.json()["detail"]) == (503, True)
        assert get("/api/v1/connections").status_code == 200
    assert get("/api/v1/connections/views/views").status_code == 200
    # Whoever got an error has left, too.
    for _ in range(12):
        assert get("/api/v1/connections/missing/views").status_code == 404
    assert get("/api/v1/connections/views/views").status_code == 200


def test_one_view_is_shown_as_recorded_and_as_it_stands(db: Database, get: Get) -> None:
    hook = hook_on(db)
    hook.create(
        MatViewDefinition(
            name="mv", sql="SELECT 1 AS a", unique_index_columns=("a",), comment=HOSTILE, grants={"public": ["SELECT"]}
        )
    )
    hook.refresh("mv")
    db.execute("CREATE VIEW over AS SELECT * FROM mv")
    shown = get("/api/v1/connections/views/view", params=MV).json()
    assert shown["definition"]["sql"] == "SELECT 1 AS a"
    assert shown["definition"]["declaration"]["comment"] == HOSTILE
    assert len(shown["begun_at"]) == len(shown["row_counts"]) == 1
    found = get("/api/v1/connections/views/view/catalog", params=MV).json()
    assert found["columns"] == [{"name": "a", "type": "integer"}]
    assert found["dependents"] == ["view over"]
    assert found["indexes"] == ["CREATE UNIQUE INDEX mv_a_key ON public.mv USING btree (a)"]
    db.execute("CREATE MATERIALIZED VIEW top AS SELECT * FROM over", "CREATE MATERIALIZED VIEW apart AS SELECT 1 AS a")
    drawn = {each["view"]: each for each in get("/api/v1/connections/views/graph", params=MV).json()["views"]}
    assert {name: (each["level"], each["reads_views"]) for name, each in drawn.items()} == {
        "mv": (0, []),
        "top": (1, ["mv"]),
    }
    assert "apart" in get("/api/v1/connections/views/graph").text
    for schema, name in (("public", "none"), ("other", "mv"), ("public", "x" * 64), ("", "mv")):
        params = {"schema_name": schema, "view_name": name}
        assert get("/api/v1/connections/views/view", params=params).status_code in (404, 422)
    # Recorded, and standing no more.
    db.execute("DROP MATERIALIZED VIEW mv CASCADE")
    assert get("/api/v1/connections/views/view", params=MV).json()["summary"]["state"] == "gone"
    assert get("/api/v1/connections/views/view/catalog", params=MV).status_code == 404


def test_runs_are_filtered_and_paged_without_gaps_or_repeats(db: Database, get: Get) -> None:
    ids = define(db, "a", "b")
    history = [Past(ago, status) for ago in (3, 2, 1) for status in (SUCCESS, FAILED, SKIPPED)]
    live_through(db, ids["a"], history)
    live_through(db, ids["b"], history)
    # As a clock that stands still would have it.
    db.execute("UPDATE matviews.mat_view_runs SET created_at = date_trunc('minute', created_at)")

    def pages(**wanted: Any) -> list[int]:
        seen: list[int] = []
        before = None
        while True:
            query = {name: value for name, value in {**wanted, "before": before}.items() if value is not None}
            page = get("/api/v1/connections/views/runs", params=query).json()
            seen += [run["id"] for run in page["runs"]]
            before = page["next"]
            if before is None:
                return seen

    everything = [row[0] for row in db.rows("SELECT id FROM matviews.mat_view_runs ORDER BY created_at DESC, id DESC")]
    assert pages(limit=4) == everything
    assert len(pages(limit=2, schema_name="public", view_name="a")) == 9
    failed = pages(limit=1, status="failed", view_name="b", schema_name="public")
    assert len(failed) == 3
    assert set(failed) <= set(everything)
    assert pages(operation="drop") == []
    for half in ({"schema_name": "public"}, {"view_name": "a"}):
        for path in ("runs", "graph"):
            assert get(f"/api/v1/connections/views/{path}", params=half).status_code == 404
    for query in ({"status": "odd"}, {"limit": 0}, {"limit": 501}, {"before": "x"}, {"before": "1-2-3"}):
        assert get("/api/v1/connections/views/runs", params=query).status_code == 422


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("views, =x", "entry 2 of it names no connection"),
        ("=", "entry 1 of it names no connection"),
        (f"views={'x' * 70}", "70 bytes long"),
        ("views=a=b", "more than one ="),
        ("views, views=other", "entry 2 of it names a connection that an entry before it names"),
        ("..", "no address can hold"),
    ],
)
def test_what_cannot_be_read_of_the_configuration_is_told_and_breaks_nothing_else(
    get: Get, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str, why: str
) -> None:
    monkeypatch.setenv("AIRFLOW__MATVIEWS__CONNECTIONS", text)
    for path in ("/api/v1/connections", "/api/v1/connections/views/runs"):
        answer = get(path)
        assert answer.status_code == 503
        assert why in answer.json()["detail"]
        assert "connections = warehouse, finance=matviews_finance" in answer.json()["detail"]
        assert "views" not in answer.json()["detail"].replace("matviews", "")
    assert get("/api/v1/connections/views/runs", "viewer").status_code == 403
    assert get("/").status_code == 200
    assert MatViewsPlugin().external_views == []
    (told,) = (each.getMessage() for each in caplog.records if each.levelname == "ERROR")
    assert why in told
    task = SimpleNamespace(recorded_run_id=1, conn_id="views")
    assert MatViewRunLink().get_link(cast("Any", task), ti_key=None) == ""


def test_a_connection_with_slashes_is_one_like_others(db: Database, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "w/runs/1:x(y)"
    set_connection(monkeypatch, db, conn_id=odd)
    monkeypatch.setenv("AIRFLOW__MATVIEWS__CONNECTIONS", odd)
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    prefix = f"/api/v1/connections/{quote(odd, safe='')}"
    for path in (
        "views",
        "runs",
        "runs/1",
        "graph",
        "staleness",
        "view?" + urlencode(MV),
        "view/catalog?" + urlencode(MV),
    ):
        assert get(f"{prefix}/{path}").status_code == 200, path
        assert get(f"{prefix}/{path}", "user").status_code == 403, path
    assert get("/api/v1/connections/w/runs/1").status_code == 404


def test_what_cannot_be_is_refused_before_the_database_is_asked(db: Database, get: Get) -> None:
    db.execute("CREATE TABLE t (a int)")
    prefix = "/api/v1/connections/views"
    for path in ("view", "view/catalog", "graph", "runs"):
        for params in ({**MV, "schema_name": "a\0b"}, {**MV, "view_name": "\0"}):
            assert get(f"{prefix}/{path}", params=params).status_code == 422, path
    answer = get(f"{prefix}/view/catalog", params={**MV, "view_name": "t"})
    assert (answer.status_code, answer.json()["detail"]) == (404, "What stands there is no materialized view.")
    answer = get(f"{prefix}/runs/{2**63}")
    assert (answer.status_code, type(answer.json()["detail"])) == (404, str)


def test_a_run_that_another_program_wrote_is_shown_as_it_is(db: Database, get: Get) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    for status, error, meta in ((3, '"it broke"', "[1, 2]"), (3, "[]", '"text"'), (2, None, '{"response": []}')):
        run_id = db.value(
            "INSERT INTO matviews.mat_view_runs "
            "(mat_view_definition_id, status, operation, error, meta, started_at, finished_at) "
            "SELECT id, %s, 1, %s::jsonb, %s::jsonb, now(), now() FROM matviews.mat_view_definitions RETURNING id",
            (status, error, meta),
        )
        shown = get(f"/api/v1/connections/views/runs/{run_id}").json()
        assert (shown["error"], shown["meta"]) == (error and json.loads(error), json.loads(meta))
    assert len(get("/api/v1/connections/views/runs").json()["runs"]) == 4
    (view,) = get("/api/v1/connections/views/views").json()["views"]
    assert view["view"] == "mv"


def test_the_page_is_told_where_airflow_begins(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", 'https://airflow.example/a/matviews/"<b>/')
    assert 'content="/a/matviews/&quot;&lt;b&gt;"' in get("/").text


@pytest.mark.parametrize("number", ["0", "-1", "x", "99999999999999999999", "1;drop"])
def test_what_is_no_number_of_a_run_is_refused(get: Get, number: str) -> None:
    assert get(f"/api/v1/connections/views/runs/{number}").status_code in (404, 422)


def test_looking_changes_nothing_and_tells_nothing_of_the_server(db: Database, get: Get, monkeypatch: Any) -> None:
    assert get("/api/v1/connections/views/runs/1").status_code == 404
    for path in ("views", "runs", "staleness"):
        assert get(f"/api/v1/connections/views/{path}").json()[path.replace("staleness", "views")] == []
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
