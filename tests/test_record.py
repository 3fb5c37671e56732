"""The record never lies: what a run row holds when an operation failed, and that the unfinished is no success."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import (
    ConcurrentRefreshRefused,
    InvalidDefinition,
    InvalidName,
    MatViewError,
    ViewNotFound,
)
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.ledger import Ledger, Operation, RunStatus
from airflow_provider_matviews.services.response import ServiceResponse
from tests.conftest import Database, hook_on
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

MV = MatViewDefinition(name="mv", sql="SELECT id, 10 / value AS tenth FROM source")
CONTEXT = {"dag_id": "nightly", "task_id": "refresh", "run_id": "scheduled__1", "map_index": 3, "try_number": 2}


@pytest.fixture
def broken(db: Database) -> Database:
    """A database whose view ``mv`` can no longer be refreshed."""
    db.execute("CREATE TABLE source AS SELECT id, 1 AS value FROM generate_series(1, 5) AS id")
    hook_on(db).create(MV, row_count_strategy="exact")
    db.execute("UPDATE source SET value = 0 WHERE id = 3")
    return db


def test_a_failed_operation_leaves_everything_there_is_to_know(broken: Database) -> None:
    hook = hook_on(broken, context=CONTEXT)
    with pytest.raises(psycopg.errors.DivisionByZero) as raised:
        hook.refresh("mv", refresh_strategy="regular", row_count_strategy="exact")
    (row,) = broken.rows(
        "SELECT status, operation, started_at <= finished_at, duration_ms >= 0, error, meta, updated_at >= created_at "
        "FROM matviews.mat_view_runs ORDER BY id OFFSET 1"
    )
    status, operation, in_order, has_duration, error, meta, updated = row
    assert (status, operation, in_order, has_duration, updated) == (3, 1, True, True, True)
    assert error["class"] == "DivisionByZero"
    assert error["message"].startswith("division by zero")
    assert error["sqlstate"] == "22012"
    assert error["hint"] is None
    assert error["backtrace"][0] == "Traceback (most recent call last):"
    assert error["backtrace"][-1] == "psycopg.errors.DivisionByZero: division by zero"
    assert any("refresh_view" in line for line in error["backtrace"])
    assert {key: meta[key] for key in CONTEXT} == CONTEXT
    assert (meta["row_count_before"], meta["row_count_after"], meta["strategy"]) == (None, None, "regular")
    assert meta["request"] == {
        "view": "mv",
        "refresh_strategy": "regular",
        "analyze": None,
        "vacuum": False,
        "max_bloat": 1.5,
        "skip_unchanged": False,
        "max_staleness": None,
        "ignore_windows": False,
        "session_settings": {},
        "row_count_strategy": "exact",
        "if_locked": "wait",
    }
    assert meta["response"]["status"] is None
    assert meta["response"]["sql"] == ['REFRESH MATERIALIZED VIEW "public"."mv"']
    assert [step["step"] for step in meta["response"]["steps"]] == ["refresh"]
    # The error that is raised tells as much.
    response: ServiceResponse = raised.value.response  # type: ignore[attr-defined]
    assert (response.success, response.run_id) == (False, 2)
    assert {"status": None, **response.response} == meta["response"]
    # And nothing happened.
    assert broken.rows("SELECT count(*), sum(tenth) FROM mv") == [(5, 50)]


def test_a_refusal_of_ours_is_recorded_with_what_mends_it(broken: Database) -> None:
    with pytest.raises(ConcurrentRefreshRefused) as raised:
        hook_on(broken).refresh("mv", refresh_strategy="concurrent")
    run = hook_on(broken).last_run("mv")
    assert run is not None
    assert run.status == "failed"
    assert run.error is not None
    assert run.error["class"] == "ConcurrentRefreshRefused"
    assert run.error["message"] == raised.value.message
    assert run.error["hint"] == raised.value.hint
    assert run.error["hint"].startswith("CREATE UNIQUE INDEX")
    assert run.error["sqlstate"] is None


@pytest.mark.parametrize("operation", ["create", "refresh", "delete"])
def test_every_operation_that_fails_is_recorded_as_what_it_is(db: Database, operation: str) -> None:
    db.execute("CREATE TABLE mv AS SELECT 1 AS a")
    subject: Any = MatViewDefinition(name="mv", sql="SELECT 1 AS a") if operation == "create" else "mv"
    with pytest.raises(MatViewError, match="is a table"):
        getattr(hook_on(db), operation)(subject)
    word = "drop" if operation == "delete" else operation
    assert db.rows("SELECT view, operation, status, error_class FROM matviews.mat_view_run_history") == [
        ("mv", word, "failed", "NotAMaterializedView")
    ]


def test_a_success_leaves_everything_there_is_to_know(broken: Database) -> None:
    broken.execute("UPDATE source SET value = 2", "INSERT INTO source VALUES (6, 1)")
    response = hook_on(broken, context=CONTEXT).refresh("mv", row_count_strategy="exact")
    run = hook_on(broken).last_run("mv")
    assert run is not None
    assert (run.id, run.view, run.operation, run.status) == (response.run_id, "mv", "refresh", "success")
    assert run.duration_ms == response.duration_ms
    assert run.error is None
    assert (run.row_count_before, run.row_count_after) == (5, 6)
    assert run.started_at is not None
    assert run.finished_at is not None
    assert run.started_at < run.finished_at
    assert run.meta["response"] == {"status": "updated", **response.response}
    assert {key: run.meta[key] for key in CONTEXT} == CONTEXT


def test_the_history_says_in_words_what_the_table_says_in_codes(db: Database) -> None:
    hook = hook_on(db, context=CONTEXT)
    hook.create(MatViewDefinition(name='"Odd Name"', sql="SELECT 1 AS a"), row_count_strategy="exact")
    hook.create(MatViewDefinition(name='"Odd Name"', sql="SELECT 1 AS a"))
    hook.refresh('"Odd Name"')
    with pytest.raises(ConcurrentRefreshRefused):
        hook.refresh('"Odd Name"', refresh_strategy="concurrent")
    hook.delete('"Odd Name"')
    db.execute(
        "INSERT INTO matviews.mat_view_runs (mat_view_definition_id, status, operation) VALUES (1, 1, 1)",
    )
    assert db.rows("SELECT status, operation FROM matviews.mat_view_runs ORDER BY id") == [
        (2, 0),
        (4, 0),
        (2, 1),
        (3, 1),
        (2, 2),
        (1, 1),
    ]
    assert db.rows(
        "SELECT view, operation, status, strategy, row_count_after, error_class, dag_id, task_id, run_id, map_index, "
        "try_number FROM matviews.mat_view_run_history ORDER BY id"
    ) == [
        ('"Odd Name"', "create", "success", None, 1, None, *CONTEXT.values()),
        ('"Odd Name"', "create", "skipped", None, None, None, *CONTEXT.values()),
        ('"Odd Name"', "refresh", "success", "swap", 1, None, *CONTEXT.values()),
        ('"Odd Name"', "refresh", "failed", "concurrent", None, "ConcurrentRefreshRefused", *CONTEXT.values()),
        ('"Odd Name"', "drop", "success", None, None, None, *CONTEXT.values()),
        ('"Odd Name"', "refresh", "running", None, None, None, *[None] * 5),
    ]


def test_runs_come_newest_first_as_many_as_asked_for(db: Database) -> None:
    hook = hook_on(db)
    for name in ("one", "two"):
        hook.create(MatViewDefinition(name=name, sql="SELECT 1 AS a"))
    for _ in range(12):
        hook.refresh("one")
        hook.refresh("two")
    ids = [run.id for run in hook.runs()]
    assert ids == list(range(26, 6, -1)), "20 unless asked otherwise"
    assert [run.id for run in hook.runs(limit=3)] == [26, 25, 24]
    assert [(run.id, run.view) for run in hook.runs("one", limit=2)] == [(25, "one"), (23, "one")]
    assert len(hook.runs("two", limit=100)) == 13
    assert [run.id for run in hook.runs("public.two", limit=1)] == [26]
    assert (hook.last_run("one"), hook.last_run("two")) == tuple(
        next(run for run in hook.runs(limit=100) if run.view == name) for name in ("one", "two")
    )
    # By when they began, even where ids say otherwise.
    db.execute("UPDATE matviews.mat_view_runs SET created_at = now() + interval '1 hour' WHERE id = 1")
    assert hook.last_run("one").id == 1  # type: ignore[union-attr]


def test_the_runs_of_a_view_are_found_by_its_name_in_any_form_and_after_it_is_gone(db: Database) -> None:
    db.execute("CREATE SCHEMA b")
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="b.mv", sql="SELECT 1 AS a"))
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    hook.delete("b.mv")
    assert [run.operation for run in hook.runs(' B . "mv" ')] == ["drop", "create"]
    assert [run.operation for run in hook.runs("mv")] == ["create"]
    assert hook.runs("nothing") == []
    assert hook.last_run("nothing") is None


@pytest.mark.parametrize("limit", [0, -1, 1.5, "3", None, True])
def test_a_limit_that_is_no_number_of_runs_is_refused(db: Database, limit: Any) -> None:
    with pytest.raises(InvalidDefinition, match="limit="):
        hook_on(db).runs(limit=limit)


def test_a_name_that_does_not_parse_is_refused_and_not_recorded(db: Database) -> None:
    hook = hook_on(db)
    for operation in (hook.refresh, hook.delete, hook.runs, hook.describe):
        with pytest.raises(InvalidName):
            operation("no;name")
    assert db.rows("SELECT 1 FROM pg_namespace WHERE nspname = 'matviews'") == []


ODD = "nul \0 half \ud83d emoji \U0001f600 quote ' \" backslash \\ percent %s newline \n end"


def test_odd_characters_in_an_error_are_recorded_as_far_as_jsonb_holds_them(db: Database) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    with _running(db) as (ledger, run_id, driver):
        error = ValueError(ODD)
        error.add_note(ODD)
        assert driver.run(ledger.fail(run_id, error, 7, {"odd": ODD, ODD: [ODD]})) is RunStatus.FAILED
    run = hook.last_run("mv")
    assert run is not None
    readable = ODD.replace("\0", "\ufffd").replace("\ud83d", "?")
    assert run.error is not None
    assert run.error["message"] == readable
    assert run.error["hint"] == readable
    assert run.meta == {"odd": readable, readable: [readable]}
    assert run.duration_ms == 7


def test_an_error_without_words_is_recorded_by_its_class(db: Database) -> None:
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    with _running(db) as (ledger, run_id, driver):
        driver.run(ledger.fail(run_id, RuntimeError(), 7, {}))
    run = hook_on(db).last_run("mv")
    assert run is not None
    assert run.error is not None
    assert (run.error["class"], run.error["message"]) == ("RuntimeError", "RuntimeError")


@contextmanager
def _running(db: Database) -> Iterator[tuple[Ledger, int, Driver]]:
    ledger = Ledger("matviews")
    with Driver(db.connect) as driver:
        run_id, _ = driver.run(ledger.start(1, Operation.REFRESH, {}))
        yield ledger, run_id, driver


def test_what_is_unfinished_is_never_a_success(db: Database) -> None:
    db.execute(GATE)
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT gate()"), with_data=False)
    with gate_closed(db) as let_go_on, beside(lambda: hook_on(db).refresh("mv"), let_go_on) as running:
        until(db, AT_THE_GATE)
        run = hook.last_run("mv")
        assert run is not None
        assert (run.status, run.finished_at, run.duration_ms, run.error) == ("running", None, None, None)
        assert run.started_at is not None
        assert run.meta["request"]["view"] == "mv"
        assert run.meta["response"]["status"] is None
        let_go_on()
        assert running.result().run_id == run.id


@pytest.mark.parametrize(
    "lie",
    [
        "status = 2, finished_at = NULL",
        "status = 3, finished_at = now()",
        "status = 1, finished_at = now()",
        "status = 2, finished_at = now(), error = '{}'",
        "status = 4, finished_at = NULL",
        "status = 0",
        "status = 5, finished_at = now()",
        "status = NULL",
        "operation = 3",
    ],
)
def test_the_tables_themselves_refuse_rows_that_contradict_themselves(db: Database, lie: str) -> None:
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    with db.connect() as connection, pytest.raises(psycopg.errors.IntegrityError):
        connection.execute(f"UPDATE matviews.mat_view_runs SET {lie}")  # type: ignore[arg-type]


def test_a_definition_is_recorded_as_it_was_declared_and_kept_after_the_drop(db: Database) -> None:
    hook = hook_on(db)
    definition = MatViewDefinition(
        name="mv", sql="SELECT 1 AS a -- one", refresh_strategy="concurrent", unique_index_columns=["a"], comment="ü"
    )
    hook.create(definition)
    (first,) = hook.definitions()
    assert MatViewDefinition.from_dict(first.declaration) == definition
    assert (first.sql, first.unique_index_columns, first.managed) == (definition.sql, ("a",), True)
    hook.create(definition)
    hook.refresh("mv")
    (second,) = hook.definitions()
    assert replace(second, source_state=None) == first, "nothing new was declared, so nothing of it was written"
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    (second,) = hook.definitions()
    assert (second.id, second.created_at) == (first.id, first.created_at)
    assert second.updated_at > first.updated_at
    assert second.refresh_strategy.value == "auto"
    hook.delete("mv")
    assert hook.definitions() == [second]


def test_a_view_that_was_never_declared_gets_a_row_made_from_the_catalog(db: Database) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
    hook = hook_on(db)
    hook.refresh("mv")
    (first,) = hook.definitions()
    assert (first.name, first.managed, first.declaration) == ("mv", False, {})
    assert first.sql is not None
    assert "1 AS a" in first.sql
    db.execute("DROP MATERIALIZED VIEW mv", "CREATE MATERIALIZED VIEW mv AS SELECT 2 AS b")
    hook.refresh("mv")
    (second,) = hook.definitions()
    assert second.id == first.id
    assert second.sql is not None
    assert "2 AS b" in second.sql


def test_a_refresh_of_what_does_not_stand_is_recorded_as_failed(db: Database) -> None:
    with pytest.raises(ViewNotFound, match="does not exist"):
        hook_on(db).refresh("nothing")
    run = hook_on(db).last_run("nothing")
    assert run is not None
    assert run.status == "failed"


def test_everything_that_is_recorded_is_json_that_others_can_read(broken: Database) -> None:
    hook = hook_on(broken, context=CONTEXT)
    with pytest.raises(psycopg.errors.DivisionByZero) as raised:
        hook.refresh("mv")
    assert json.loads(json.dumps(raised.value.response.as_dict()))  # type: ignore[attr-defined]
    assert broken.value("SELECT bool_and(jsonb_typeof(meta) = 'object') FROM matviews.mat_view_runs")
