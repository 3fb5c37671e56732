"""Operators in real DAG runs: what becomes of the task, the view, the record, XCom, the assets and the log."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.models.asset import AssetEvent, AssetModel
from airflow.sdk import DAG, Asset, AssetAlias, Param, chain
from airflow.sdk.log import redact
from airflow.utils.session import create_session
from sqlalchemy import select

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.operators.matview import (
    CreateMatViewOperator,
    DeleteMatViewOperator,
    RefreshMatViewOperator,
)
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.locking import lock_key
from tests.airflow_dags import DagRun, run_dag, set_connection
from tests.conftest import Database, hook_on
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "s3cret/pass word"
SUMMARY = {
    "view",
    "status",
    "strategy",
    "row_count_before",
    "row_count_after",
    "duration_ms",
    "reason",
    "mat_view_run_id",
}


@pytest.fixture(autouse=True)
def _connection(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    # The server trusts everybody here: a password that is sent for nothing is still one that must not be seen.
    set_connection(monkeypatch, db, password=PASSWORD)


def _view(db: Database) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT generate_series(1, 3) AS id",
        "CREATE MATERIALIZED VIEW mv AS SELECT id FROM t",
        "INSERT INTO t VALUES (4)",
    )


def _recorded(db: Database) -> list[tuple[str, str, str]]:
    """Every run in its order: operation, view and status."""
    return [(run.operation, run.view, run.status) for run in reversed(hook_on(db).runs(limit=100))]


def _events(run: DagRun) -> list[tuple[str, str, dict[str, Any]]]:
    """What Airflow recorded of the assets that a run updated: task, URI and extra."""
    with create_session() as session:
        query = (
            select(AssetEvent.source_task_id, AssetModel.uri, AssetEvent.extra)
            .join(AssetModel, AssetModel.id == AssetEvent.asset_id)
            .where(AssetEvent.source_run_id == run.run_id)
            .order_by(AssetEvent.id)
        )
        return [tuple(row) for row in session.execute(query)]


def test_create_refresh_and_delete_succeed_and_are_recorded_with_whose_task_it_was(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT generate_series(1, 3) AS id")
    definition = MatViewDefinition(name="mv", sql="SELECT id FROM t", unique_index_columns=["id"])
    with DAG("life", schedule=None) as dag:
        (
            CreateMatViewOperator(task_id="create", definition=definition)
            >> RefreshMatViewOperator(task_id="refresh", view="mv", row_count_strategy="exact")
            >> DeleteMatViewOperator(task_id="delete", view="mv")
        )
    run = run_dag(dag)
    assert run.state == "success"
    assert run.states == {"create": "success", "refresh": "success", "delete": "success"}
    assert _recorded(db) == [("create", "mv", "success"), ("refresh", "mv", "success"), ("drop", "mv", "success")]
    for recorded, task in zip(reversed(hook_on(db).runs()), ("create", "refresh", "delete"), strict=True):
        whose = {key: recorded.meta[key] for key in ("dag_id", "task_id", "run_id", "map_index", "try_number")}
        assert whose == {"dag_id": "life", "task_id": task, "run_id": run.run_id, "map_index": -1, "try_number": 1}
    assert db.value("SELECT to_regclass('mv') IS NULL")


def test_xcom_is_a_small_summary_that_json_can_hold(db: Database) -> None:
    _view(db)
    with DAG("summary", schedule=None) as dag:
        refresh = RefreshMatViewOperator(task_id="refresh", view="mv", row_count_strategy="exact")
        refresh >> DeleteMatViewOperator(task_id="delete", view="absent")
    run = run_dag(dag)
    summary = run.xcom("refresh")
    assert set(summary) == {*SUMMARY, "sources"}
    assert len(json.dumps(summary)) < 1000
    assert summary.pop("sources") == ["t"]
    recorded = hook_on(db).last_run("mv")
    assert recorded is not None
    assert summary.pop("reason").startswith("readers go on while it is rebuilt")
    assert summary == {
        "view": "mv",
        "status": "updated",
        "strategy": "swap",
        "row_count_before": 3,
        "row_count_after": 4,
        "duration_ms": recorded.duration_ms,
        "mat_view_run_id": recorded.id,
    }
    assert run.xcom("delete")["status"] == "skipped"


def test_mapped_tasks_each_have_their_view_and_their_run(db: Database) -> None:
    definitions = [MatViewDefinition(name=f"v{i}", sql=f"SELECT {i} AS one").to_dict() for i in range(3)]
    with DAG("mapped", schedule=None) as dag:
        create = CreateMatViewOperator.partial(task_id="create").expand(definition=definitions)
        create >> RefreshMatViewOperator.partial(task_id="refresh").expand(view=["v0", "v1", "v2"])
    run = run_dag(dag)
    assert run.state == "success"
    recorded = {(each.operation, each.meta["map_index"], each.view) for each in hook_on(db).runs(limit=100)}
    assert recorded == {(operation, i, f"v{i}") for operation in ("create", "refresh") for i in range(3)}
    assert [run.xcom(f"refresh[{i}]")["view"] for i in range(3)] == ["v0", "v1", "v2"]


def test_templates_are_rendered_and_sql_files_are_read(
    db: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    db.execute("CREATE SCHEMA reports")
    set_connection(monkeypatch, db, conn_id="second")
    monkeypatch.delenv("AIRFLOW_CONN_POSTGRES_DEFAULT")
    (tmp_path / "numbers.sql").write_text(
        '/* matview\nname = "reports.{{ params.view }}"\nunique_index_columns = ["n"]\n*/\n'
        "SELECT generate_series(1, {{ params.last }}) AS n -- to the last\n"
    )
    templates = {"conn_id": "{{ params.conn }}", "tracking_schema": "{{ params.view }}_runs"}
    params = {"conn": Param("second"), "view": Param("numbers"), "last": Param(7), "how": Param("regular")}
    with DAG("templates", schedule=None, params=params, template_searchpath=[str(tmp_path)]) as dag:
        create = CreateMatViewOperator(task_id="create", sql="numbers.sql", **templates)
        create >> RefreshMatViewOperator(
            task_id="refresh",
            view="{{ ti.xcom_pull(task_ids='create')['view'] }}",
            refresh_strategy="{{ params.how }}",
            **templates,
        )
    run = run_dag(dag)
    assert run.state == "success"
    assert run.xcom("create")["view"] == "reports.numbers"
    assert run.xcom("refresh")["reason"] == "asked for"
    assert db.value("SELECT count(*) FROM reports.numbers") == 7
    assert db.value("SELECT count(*) FROM numbers_runs.mat_view_runs") == 2
    assert "n" in db.value("SELECT indexdef FROM pg_indexes WHERE tablename = 'numbers'")


def test_a_failing_refresh_fails_the_task_and_what_comes_after_it(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS n", "CREATE MATERIALIZED VIEW mv AS SELECT 1 / n AS x FROM t")
    db.execute("UPDATE t SET n = 0")
    with DAG("failing", schedule=None) as dag:
        RefreshMatViewOperator(task_id="refresh", view="mv") >> DeleteMatViewOperator(task_id="delete", view="mv")
    run = run_dag(dag)
    assert run.state == "failed"
    assert run.states == {"refresh": "failed", "delete": "upstream_failed"}
    assert _recorded(db) == [("refresh", "mv", "failed")]
    assert db.rows("SELECT x FROM mv") == [(1,)]


def test_a_retry_succeeds_once_the_cause_is_mended_and_both_tries_are_recorded(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS n", "CREATE MATERIALIZED VIEW mv AS SELECT 1 / n AS x FROM t")
    db.execute("UPDATE t SET n = 0")
    with DAG("retried", schedule=None) as dag:
        RefreshMatViewOperator(
            task_id="refresh",
            view="mv",
            retries=1,
            retry_delay=timedelta(0),
            on_retry_callback=lambda context: db.execute("UPDATE t SET n = -1"),
        )
    run = run_dag(dag)
    assert run.state == "success"
    assert _recorded(db) == [("refresh", "mv", "failed"), ("refresh", "mv", "success")]
    assert [each.meta["try_number"] for each in reversed(hook_on(db).runs())] == [1, 2]
    assert db.rows("SELECT x FROM mv") == [(-1,)]


def test_a_task_that_would_wait_for_another_operation_is_skipped_when_asked(db: Database) -> None:
    _view(db)
    with DAG("locked", schedule=None) as dag:
        RefreshMatViewOperator(task_id="skip", view="mv", if_locked="skip", outlets=[AssetAlias("locked")])
        RefreshMatViewOperator(task_id="fail", view="mv", if_locked="fail")
    with db.connect() as other, other.transaction():
        other.execute(
            "SELECT pg_advisory_xact_lock(" + lock_key(ResolvedName("public", "mv", "mv")).as_string(None) + ")"
        )
        run = run_dag(dag)
    assert run.states == {"skip": "skipped", "fail": "failed"}
    assert sorted(_recorded(db)) == [("refresh", "mv", "skipped")] * 2
    assert "mv: another operation on the view is running." in run.log
    assert _events(run) == []
    assert db.value("SELECT count(*) FROM mv") == 3


def test_assets_and_aliases_get_an_event_with_the_summary(db: Database) -> None:
    db.execute('CREATE SCHEMA "Odd Schema"', "CREATE TABLE t AS SELECT generate_series(1, 3) AS id")
    with DAG("assets", schedule=None) as dag:
        create = CreateMatViewOperator(
            task_id="create",
            view='"Odd Schema"."häufig/viel"',
            sql="SELECT id FROM t",
            outlets=[AssetAlias("created")],
        )
        again = CreateMatViewOperator(
            task_id="again", view='"Odd Schema"."häufig/viel"', sql="SELECT id FROM t", outlets=[AssetAlias("created")]
        )
        refresh = CreateMatViewOperator(
            task_id="plain", view="plain", sql="SELECT 1 AS one", outlets=[Asset("views://plain"), AssetAlias("plain")]
        )
        create >> again >> refresh
    run = run_dag(dag)
    assert run.state == "success"
    base = f"postgres://127.0.0.1:{db.server.port}/{db.name}"
    # What stood already was not updated: no event for what `again` did.
    assert sorted(_events(run), key=lambda event: event[:2]) == [
        ("create", f"{base}/Odd%20Schema/h%C3%A4ufig%2Fviel", run.xcom("create")),
        ("plain", f"{base}/public/plain", run.xcom("plain")),
        ("plain", "views://plain/", run.xcom("plain")),
    ]
    assert run.xcom("again")["status"] == "skipped"


def test_a_changed_definition_is_applied_and_the_log_says_what_differed(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT generate_series(1, 3) AS id")
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT id FROM t"))
    db.execute("CREATE VIEW over AS SELECT id FROM mv")
    changed = MatViewDefinition(
        name="mv", sql="SELECT id, id + 1 AS next FROM t WHERE id > 1", unique_index_columns=["id"]
    )
    with DAG("changed", schedule=None) as dag:
        first = CreateMatViewOperator(task_id="apply", definition=changed, outlets=[AssetAlias("changed")])
        first >> CreateMatViewOperator(task_id="again", definition=changed.to_dict(), on_drift="fail")
    run = run_dag(dag)
    assert run.states == {"apply": "success", "again": "success"}
    assert {key: run.xcom("apply")[key] for key in ("status", "drift", "row_count_after")} == {
        "status": "updated",
        "drift": True,
        "row_count_after": 2,
    }
    assert (run.xcom("again")["status"], run.xcom("again")["drift"]) == ("skipped", False)
    assert len(_events(run)) == 1
    assert db.rows("SELECT id FROM over ORDER BY 1") == [(2,), (3,)]
    assert _recorded(db) == [("create", "mv", "success"), ("create", "mv", "success"), ("create", "mv", "skipped")]
    log = re.sub(r"^\S+ \[\w+ *\] (.*?) *\[airflow\.[^\]]*\].*$", r"\1", run.log, flags=re.MULTILINE)
    assert "\nPlan for mv: 3 steps.\n  1. change query: it is not the definition's\n" in log
    assert "\n       +  WHERE (id > 1);\n" in log
    assert "\n  3. build index mv_id_key: it is declared and does not stand\n" in log
    assert re.search(r"\nUpdated mv in \d+\.\d\d s: 2 rows", log)
    assert "mv stands already and is what its definition says." in log


@pytest.mark.parametrize("deferrable", [False, True])
def test_drift_fails_or_is_reported_as_asked_and_the_view_is_left_alone(db: Database, deferrable: bool) -> None:
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    changed = MatViewDefinition(name="mv", sql="SELECT 2 AS a")
    arguments: dict[str, Any] = {"definition": changed, "deferrable": deferrable}
    with DAG("drifted", schedule=None) as dag:
        CreateMatViewOperator(task_id="report", on_drift="report", **arguments)
        CreateMatViewOperator(task_id="ignore", on_drift="{{ 'ignore' }}", **arguments)
        CreateMatViewOperator(task_id="fail", on_drift="fail", **arguments)
        CreateMatViewOperator(task_id="wrong", on_drift="fix", **arguments)
    run = run_dag(dag)
    assert run.states == {"report": "success", "ignore": "success", "fail": "failed", "wrong": "failed"}
    assert (run.xcom("report")["drift"], run.xcom("ignore")["drift"]) == (True, None)
    assert "mv is not what its definition says: change query." in run.log
    assert "To mend it: apply it with on_drift='apply'" in run.log
    assert "on_drift='fix' does not exist. Choose one of 'apply', 'fail', 'ignore', 'report'." in run.log
    assert db.rows("TABLE mv") == [(1,)]
    failed = [run for run in hook_on(db).runs() if run.status == "failed"]
    assert [each.error and each.error["class"] for each in failed] == ["DriftFound"]
    assert failed[0].meta["response"]["plan"]["steps"][0]["kind"] == "change query"


def test_the_log_tells_what_was_done_and_why_and_how_long_it_took(db: Database) -> None:
    _view(db)
    with DAG("told", schedule=None) as dag:
        RefreshMatViewOperator(task_id="refresh", view="mv", row_count_strategy="exact")
    run = run_dag(dag)
    log = re.sub(r"^\S+ \[\w+ *\] ", "", run.log, flags=re.MULTILINE)
    assert "\nStrategy swap, chosen because readers go on while it is rebuilt, and it has no unique index" in log
    assert re.search(r"\nUpdated mv in \d+\.\d\d s: 4 rows \(before: 3\)\.", log)
    statements = re.search(r"\n::group::The [^\n]*statements[^\n]*\n(.*?)\n::endgroup::", log, re.DOTALL)
    assert statements is not None
    assert re.search(r"^ +\d+\.\d ms  REFRESH MATERIALIZED VIEW \"public\"\.\"mv_mv_", statements[1], re.MULTILINE)
    assert re.search(r"^ +\d+\.\d ms  DROP MATERIALIZED VIEW ", statements[1], re.MULTILINE)


def test_the_log_of_a_failure_says_how_to_mend_it(db: Database) -> None:
    _view(db)
    with DAG("told_failure", schedule=None) as dag:
        RefreshMatViewOperator(task_id="refresh", view="mv", refresh_strategy="concurrent")
    run = run_dag(dag)
    assert run.states == {"refresh": "failed"}
    (line, mending) = re.search(r"\[error +\] (mv cannot be refreshed concurrently[^\n]*)\n([^\n]*)", run.log).groups()  # type: ignore[union-attr]
    assert "it has no index" in line
    assert 'To mend it: CREATE UNIQUE INDEX CONCURRENTLY ON "public"."mv" (' in mending


def test_the_password_is_in_no_log_and_in_no_record_even_where_the_server_repeats_it(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as nobody:
        set_connection(monkeypatch, db, conn_id="closed", password=PASSWORD, port=nobody.getsockname()[1])
    db.execute("CREATE TABLE t (word text)", "CREATE MATERIALIZED VIEW mv AS SELECT word::integer AS n FROM t")
    with db.connect() as connection:
        connection.execute("INSERT INTO t VALUES (%s)", [PASSWORD])
    with DAG("repeated", schedule=None) as repeated:
        RefreshMatViewOperator(task_id="refresh", view="mv")
    with DAG("quiet", schedule=None) as quiet:
        RefreshMatViewOperator(task_id="elsewhere", view="mv", conn_id="closed")
        CreateMatViewOperator(task_id="create", view="other", sql="SELECT 1 AS one")
    run = run_dag(quiet)
    assert run.states == {"elsewhere": "failed", "create": "success"}
    assert "connection refused" in run.log.lower()
    assert PASSWORD not in run.log
    run = run_dag(repeated)
    assert run.states == {"refresh": "failed"}
    # A worker's log goes through this, but not that of dag.test().
    assert 'invalid input syntax for type integer: "***"' in redact(run.log)
    assert PASSWORD not in redact(run.log)
    failed = hook_on(db).last_run("mv")
    assert failed is not None
    assert failed.error is not None
    assert 'invalid input syntax for type integer: "***"' in failed.error["message"]
    recorded = db.rows("SELECT r::text FROM matviews.mat_view_runs r")
    assert len(recorded) == 2
    assert PASSWORD not in str(recorded)


class _Known(RefreshMatViewOperator):
    """Tells which instance is at work: Airflow runs a copy of the one in the DAG."""

    at_work: RefreshMatViewOperator

    def pre_execute(self, context: Any) -> None:
        _Known.at_work = self


def _on_kill() -> None:
    _Known.at_work.on_kill()


def _ended_at_the_gate(db: Database, end: Callable[[], None], **arguments: Any) -> DagRun:
    """Run a refresh that stands in the middle of its query, while `end` is called from another thread."""
    db.execute(GATE, "CREATE TABLE t AS SELECT 1 AS id", "CREATE MATERIALIZED VIEW mv AS SELECT id, gate() FROM t")
    db.execute("INSERT INTO t VALUES (2)")
    with DAG("killed", schedule=None) as dag:
        _Known(task_id="refresh", view="mv", lock_timeout=30, max_wait=30, **arguments)

    def end_it() -> None:
        until(db, AT_THE_GATE)
        end()

    with gate_closed(db), beside(end_it) as ended:
        run = run_dag(dag)
        ended.result()
        # The gate is still closed, so what no longer stands before it has been cancelled; and that by us: by itself
        # the server looks only every two seconds whether the client is gone.
        until(db, f"SELECT NOT ({AT_THE_GATE.removeprefix('SELECT ')})", seconds=0.7)
        assert db.rows("SELECT id FROM mv") == [(1,)]
    return run


@pytest.mark.parametrize(
    "end",
    [_on_kill, lambda: os.kill(os.getpid(), signal.SIGTERM)],
    ids=["on_kill", "sigterm"],
)
def test_killing_the_task_cancels_the_statement_and_the_old_rows_serve(db: Database, end: Callable[[], None]) -> None:
    run = _ended_at_the_gate(db, end)
    assert run.states == {"refresh": "failed"}
    recorded = hook_on(db).last_run("mv")
    assert recorded is not None
    assert recorded.status == "failed"
    assert recorded.error is not None
    assert (recorded.error["class"], recorded.error["sqlstate"]) == ("OperationCancelled", "57014")
    assert db.rows("SELECT id FROM mv") == [(1,)]


def test_an_execution_timeout_cancels_the_statement_and_the_old_rows_serve(db: Database) -> None:
    run = _ended_at_the_gate(db, lambda: None, execution_timeout=timedelta(seconds=2))
    assert run.states == {"refresh": "failed"}
    recorded = hook_on(db).last_run("mv")
    assert recorded is not None
    assert recorded.status == "failed"
    assert recorded.error is not None
    # The server was stopped a little before Airflow would have ended the process.
    assert (recorded.error["class"], recorded.error["sqlstate"]) == ("OperationTimedOut", "57014")
    assert db.rows("SELECT id FROM mv") == [(1,)]


_DECLARED = MatViewDefinition(name="mv", sql="SELECT 1 AS one")


def test_contradictory_and_missing_arguments_are_refused_at_execution_before_anything_is_touched(db: Database) -> None:
    wrong: list[tuple[type[Any], dict[str, Any], str]] = [
        (CreateMatViewOperator, {"view": "mv", "definition": _DECLARED}, "Give either view=... or definition=..., not"),
        (CreateMatViewOperator, {"sql": "SELECT 1", "definition": _DECLARED}, "Give either sql=... or definition=..."),
        (CreateMatViewOperator, {}, "What should the view be?"),
        (CreateMatViewOperator, {"view": "mv"}, "What should the view be?"),
        (CreateMatViewOperator, {"sql": "SELECT 1 AS one"}, "The definition has no name."),
        (CreateMatViewOperator, {"definition": {"name": "mv", "query": "x"}}, "'query' is no argument of"),
        (
            RefreshMatViewOperator,
            {"view": "mv", "definition": _DECLARED},
            "Give either view=... or definition=..., not",
        ),
        (RefreshMatViewOperator, {}, "Which view?"),
        (RefreshMatViewOperator, {"view": "mv", "refresh_strategy": "fast"}, "refresh_strategy='fast' does not exist."),
        (RefreshMatViewOperator, {"view": "mv", "if_locked": "hope"}, "if_locked='hope' does not exist."),
        (RefreshMatViewOperator, {"view": "a.b.c"}, "a.b.c"),
        (DeleteMatViewOperator, {"view": "mv", "definition": _DECLARED}, "Give either view=... or definition=..., not"),
        (DeleteMatViewOperator, {}, "Which view?"),
        (DeleteMatViewOperator, {"view": "mv", "lock_timeout": 0}, "lock_timeout=0 is not a number of seconds from"),
    ]
    with DAG("wrong", schedule=None) as dag:
        chain(
            *(
                operator(task_id=f"task_{number}", trigger_rule="all_done", **arguments)
                for number, (operator, arguments, _) in enumerate(wrong)
            )
        )
    run = run_dag(dag)
    assert run.states == {f"task_{number}": "failed" for number in range(len(wrong))}
    told = re.findall(r"\[error +\] ((?:(?!\[error ).)*?) \[airflow\.task\.operators\.", run.log, re.DOTALL)
    for (_, _, message), line in zip(wrong, told, strict=True):
        assert message in line
    assert db.rows("SELECT nspname FROM pg_namespace WHERE nspname = 'matviews'") == []


def test_the_dag_in_the_readme_works_when_pasted(db: Database, tmp_path: Path) -> None:
    (code,) = re.findall(
        r"^## A DAG\n+```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    file = tmp_path / "pasted.py"
    file.write_text(code)
    bag = DagBag(dag_folder=file)
    assert bag.import_errors == {}
    (dag,) = bag.dags.values()
    run = run_dag(dag)
    assert run.states == {"create": "success", "refresh": "success"}
    assert db.rows("SELECT events FROM daily_events") == [(42,)]
    assert _recorded(db) == [("create", "daily_events", "success"), ("refresh", "daily_events", "success")]
