"""Refresh: the rows become those of the query, readers are not held up, and the numbers told are true."""

from __future__ import annotations

import re
import time
from functools import partial
from types import SimpleNamespace
from typing import Any, LiteralString

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_matviews.definition import Index, MatViewDefinition
from airflow_provider_matviews.exceptions import (
    ConcurrentRefreshRefused,
    InvalidDefinition,
    ViewNotFound,
)
from airflow_provider_matviews.hooks.matview import MatViewHook
from tests.conftest import Database, examples, hook_on
from tests.racing import beside, until

_BY_ID = "CREATE UNIQUE INDEX mv_id ON mv (id)"


def _source(database: Database, *statements: str) -> None:
    """Make a table of three rows, a view over it, and more."""
    database.execute(
        "CREATE TABLE t (id int, n int)",
        "INSERT INTO t SELECT i, i * 10 FROM generate_series(1, 3) i",
        "CREATE MATERIALIZED VIEW mv AS SELECT id, n FROM t",
    )
    with database.connect() as connection:
        for statement in statements:
            connection.execute(statement.encode())


def _listen(hook: MatViewHook) -> list[str]:
    """Collect the lines that a hook writes into the task log."""
    lines: list[str] = []

    def write(message: str, *arguments: object) -> None:
        lines.append(message % arguments)

    hook._log = SimpleNamespace(info=write, warning=lambda *line: write(f"WARNING {line[0]}", *line[1:]))
    return lines


#: What is asked for, the index that stands, what is done, and why.
_FITTING = [
    ("regular", None, "regular", "asked for"),
    ("regular", _BY_ID, "regular", "asked for"),
    ("concurrent", _BY_ID, "concurrent", "asked for"),
    ("swap", _BY_ID, "swap", "asked for"),
    ("auto", _BY_ID, "concurrent", "it is small"),
    ("auto", None, "swap", "it has no unique index"),
    (None, _BY_ID, "concurrent", "it is small"),
    (None, "CREATE UNIQUE INDEX ON mv (id) WHERE id > 0", "swap", "it has no unique index"),
]


def test_a_refresh_brings_the_rows_up_to_date_by_the_strategy_that_fits(db: Database) -> None:
    hook = hook_on(db)
    lines = _listen(hook)
    for asked, index, used, reason in _FITTING:
        lines.clear()
        _source(db, *([index] if index else []), "INSERT INTO t VALUES (4, 40)", "DELETE FROM t WHERE id = 1")
        response = hook.refresh("mv", refresh_strategy=asked)
        assert (response.status, response.response["strategy"]) == ("updated", used)
        assert reason in response.response["reason"]
        assert any(f"Strategy {used}" in line for line in lines)
        assert db.rows("TABLE mv ORDER BY id") == [(2, 20), (3, 30), (4, 40)]
        statement = next(text for text in response.response["sql"] if text.startswith("REFRESH MATERIALIZED VIEW"))
        assert ("CONCURRENTLY" in statement) is (used == "concurrent")
        run = hook.last_run("mv")
        assert run is not None
        assert (run.operation, run.status, run.meta["strategy"]) == ("refresh", "success", used)
        db.execute("DROP TABLE t CASCADE")


def test_the_declared_strategy_is_used_and_an_asked_one_goes_before_it(db: Database) -> None:
    hook = hook_on(db)
    definition = MatViewDefinition(
        name="mv", sql="SELECT 1 AS id", unique_index_columns=["id"], refresh_strategy="regular"
    )
    hook.create(definition)
    assert hook.refresh("mv").response["strategy"] == "regular"
    assert hook.refresh(definition).response["strategy"] == "regular"
    assert hook.refresh("mv", refresh_strategy="concurrent").response["strategy"] == "concurrent"


def test_a_concurrent_refresh_lets_readers_go_on_and_a_regular_one_does_not(db: Database) -> None:
    # The proof that the strategies are what they say: the locks that they hold at their end.
    _source(db, _BY_ID)
    hook = hook_on(db)
    connect = hook.get_conn
    held: list[str] = []

    class Watching(psycopg.Cursor[Any]):
        def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
            result = super().execute(query, *arguments, **options)
            if "REFRESH" in str(query):
                rows = db.rows("SELECT mode FROM pg_locks WHERE relation = 'mv'::regclass AND granted")
                held.extend(row[0] for row in rows)
            return result

    def watched() -> Any:
        connection = connect()
        connection.cursor_factory = Watching
        return connection

    hook.get_conn = watched  # type: ignore[method-assign]
    hook.refresh("mv", refresh_strategy="concurrent")
    assert "ExclusiveLock" in held
    assert "AccessExclusiveLock" not in held
    hook.refresh("mv", refresh_strategy="regular")
    assert "AccessExclusiveLock" in held


_USELESS = {
    "SELECT 1": "it has no index",
    "CREATE INDEX mv_n ON mv (n)": "none of its 1 indexes is unique",
    "CREATE UNIQUE INDEX mv_part ON mv (id) WHERE id > 0": "the index mv_part is partial (it has a WHERE clause)",
    "CREATE UNIQUE INDEX mv_expr ON mv ((id + 1))": "the index mv_expr is over an expression",
    "CREATE UNIQUE INDEX mv_both ON mv (id, (n + 1))": "the index mv_both is over an expression",
}


def test_a_concurrent_refresh_without_a_usable_index_is_refused_with_the_ddl_that_mends_it(each_db: Database) -> None:
    hook = hook_on(each_db)
    for index, explanation in _USELESS.items():
        _source(each_db, index)
        # That PostgreSQL would refuse too, and in fewer words.
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            each_db.execute("REFRESH MATERIALIZED VIEW CONCURRENTLY mv")
        with pytest.raises(ConcurrentRefreshRefused) as raised:
            hook.refresh("mv", refresh_strategy="concurrent")
        assert explanation in str(raised.value)
        assert "<columns that are unique together>" in str(raised.value)
        run = hook.last_run("mv")
        assert run is not None
        assert run.error is not None
        assert (run.status, run.error["class"]) == ("failed", "ConcurrentRefreshRefused")
        assert run.error["hint"] == raised.value.hint
        assert hook.refresh("mv").response["strategy"] == "swap"
        each_db.execute("DROP TABLE t CASCADE")


def _ddl_of(hint: str | None) -> str:
    assert hint is not None
    return hint.split(" Or ")[0]


def test_the_ddl_in_a_refusal_makes_the_refresh_work(each_db: Database) -> None:
    hook = hook_on(each_db)
    each_db.execute(
        'CREATE SCHEMA "Odd Schema"',
        'CREATE MATERIALIZED VIEW "Odd Schema"."Odd ""view""" AS SELECT 1 AS "Id", 2 AS b',
    )
    definition = MatViewDefinition(
        name='"Odd Schema"."Odd ""view"""',
        sql='SELECT 1 AS "Id", 2 AS b',
        refresh_strategy="concurrent",
        unique_index_columns=["Id", "b"],
    )
    with pytest.raises(ConcurrentRefreshRefused) as raised:
        hook.refresh(definition)
    with each_db.connect() as connection:
        connection.execute(_ddl_of(raised.value.hint).encode())
    assert hook.refresh(definition).response["strategy"] == "concurrent"


def test_an_index_whose_build_failed_half_way_is_told_from_a_good_one(each_db: Database) -> None:
    _source(each_db, "INSERT INTO t VALUES (3, 30)", "REFRESH MATERIALIZED VIEW mv")
    hook = hook_on(each_db)
    with pytest.raises(psycopg.errors.UniqueViolation):
        each_db.execute('CREATE UNIQUE INDEX CONCURRENTLY "mv Id" ON mv (id)')
    assert each_db.value("SELECT indisvalid FROM pg_index WHERE indrelid = 'mv'::regclass") is False
    each_db.execute("DELETE FROM t WHERE id = 3")
    with pytest.raises(ConcurrentRefreshRefused, match="the index mv Id is INVALID") as raised:
        hook.refresh("mv", refresh_strategy="concurrent")
    assert _ddl_of(raised.value.hint) == 'REINDEX INDEX CONCURRENTLY "public"."mv Id";'
    assert "Or refresh it with refresh_strategy='regular'" in (raised.value.hint or "")
    # The rows that stand are not unique: only a refresh mends both.
    with pytest.raises(psycopg.errors.UniqueViolation), each_db.connect() as connection:
        connection.execute(_ddl_of(raised.value.hint).encode())
    assert hook.refresh("mv").response["strategy"] == "regular"
    assert hook.refresh("mv", refresh_strategy="concurrent").response["strategy"] == "concurrent"


def test_reindex_as_told_mends_an_index_whose_build_was_interrupted(each_db: Database) -> None:
    _source(each_db)
    hook = hook_on(each_db)
    with each_db.connect() as old, each_db.connect() as building:
        old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1")
        build = partial(building.execute, "CREATE UNIQUE INDEX CONCURRENTLY mv_id ON mv (id)")
        with beside(build, old.close) as interrupted:
            # Built but for the last wait: for those who might still see what it does not hold.
            until(each_db, "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'virtualxid' AND NOT granted)")
            building.cancel_safe()
            with pytest.raises(psycopg.errors.QueryCanceled):
                interrupted.result()
    with pytest.raises(ConcurrentRefreshRefused, match="the index mv_id is INVALID") as raised:
        hook.refresh("mv", refresh_strategy="concurrent")
    with each_db.connect() as connection:
        connection.execute(_ddl_of(raised.value.hint).encode())
    assert hook.refresh("mv", refresh_strategy="concurrent").response["strategy"] == "concurrent"


def test_a_view_without_rows_is_filled_regularly_and_the_response_says_so(each_db: Database) -> None:
    hook = hook_on(each_db)
    for asked, reason in (
        ("regular", "asked for"),
        ("auto", "it holds no data yet, so there are no readers to keep waiting"),
        (
            "concurrent",
            "filled by a regular refresh: it holds no data yet, and PostgreSQL cannot fill an unpopulated "
            "view concurrently",
        ),
    ):
        hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS id", unique_index_columns=["id"]), with_data=False)
        response = hook.refresh("mv", refresh_strategy=asked, row_count_strategy="exact").response
        assert (response["strategy"], response["reason"]) == ("regular", reason)
        assert (response["row_count_before"], response["row_count_after"]) == (None, 1)
        assert hook.refresh("mv").response["strategy"] == "concurrent"
        hook.delete("mv")


def test_nulls_in_the_unique_key_are_warned_of(each_db: Database) -> None:
    hook = hook_on(each_db)
    lines = _listen(hook)
    hook.create(
        MatViewDefinition(
            name="mv",
            sql="SELECT n AS id, CASE WHEN n % 4 > 0 THEN n END AS often, n AS never FROM generate_series(1, 400) n",
            unique_index_columns=["id", "often"],
        )
    )
    each_db.execute("ANALYZE mv")
    response = hook.refresh("mv", refresh_strategy="concurrent").response
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "The unique key of mv holds NULLs: often (25%)" in warnings[0]
    # What it warns of is so: rows that did not change were written anew.
    assert (response["rows_inserted"], response["rows_deleted"]) == (100, 100)


def test_a_unique_key_without_nulls_is_not_warned_of(db: Database) -> None:
    _source(db, _BY_ID, "INSERT INTO t SELECT 100 + i, NULL FROM generate_series(1, 50) i")
    hook = hook_on(db)
    hook.refresh("mv")
    db.execute("ANALYZE mv")
    lines = _listen(hook)
    hook.refresh("mv")
    assert not [line for line in lines if line.startswith("WARNING")]


def test_a_view_that_was_never_declared_is_refreshed_and_recorded_as_somebody_elses(each_db: Database) -> None:
    each_db.execute("CREATE SCHEMA other", "CREATE MATERIALIZED VIEW other.mv AS SELECT 1 AS a")
    hook = hook_on(each_db)
    assert hook.refresh("other.mv").status == "updated"
    (record,) = hook.definitions()
    assert (record.name, record.schema_name, record.view_name) == ("other.mv", "other", "mv")
    assert (record.managed, record.refresh_strategy, record.declaration) == (False, "auto", {})
    assert record.sql == each_db.value("SELECT pg_get_viewdef('other.mv'::regclass)")
    hook.refresh("other.mv")
    assert [each.id for each in hook.definitions()] == [record.id]
    assert [run.status for run in hook.runs("other.mv")] == ["success", "success"]
    each_db.execute("DROP MATERIALIZED VIEW other.mv", "CREATE MATERIALIZED VIEW other.mv AS SELECT 2 AS b")
    hook.refresh("other.mv")
    (again,) = hook.definitions()
    assert (again.id, again.sql) == (record.id, each_db.value("SELECT pg_get_viewdef('other.mv'::regclass)"))


def test_a_view_that_does_not_exist_is_refused_and_recorded(db: Database) -> None:
    hook = hook_on(db)
    for name in ("absent", "public.absent", '"No Such Schema".mv'):
        with pytest.raises(ViewNotFound, match="does not exist") as raised:
            hook.refresh(name)
        assert "create it first" in str(raised.value)
        run = hook.last_run(name)
        assert run is not None
        assert run.error is not None
        assert (run.status, run.error["class"]) == ("failed", "ViewNotFound")


def test_arguments_that_make_no_sense_are_refused_before_anything_is_touched(db: Database) -> None:
    _source(db)
    refused: list[dict[str, Any]] = [
        {"refresh_strategy": "quick"},
        {"row_count_strategy": "guess"},
        {"if_locked": "maybe"},
        {"lock_timeout": 0},
        {"max_wait": -1},
        {"lock_timeout": "1s"},
    ]
    for arguments in refused:
        with pytest.raises(InvalidDefinition, match=next(iter(arguments))):
            hook_on(db).refresh("mv", **arguments)
    assert db.value("SELECT to_regnamespace('matviews')") is None


def _counts(response: dict[str, Any]) -> tuple[int | None, int | None]:
    return response["row_count_before"], response["row_count_after"]


def test_exact_row_counts_are_exact_in_any_round_of_changes(each_db: Database) -> None:
    each_db.execute("CREATE TABLE t (id int PRIMARY KEY, n int)")
    hook = hook_on(each_db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT id, n FROM t", unique_index_columns=["id", "n"]))

    @given(
        st.sampled_from(["regular", "concurrent"]),
        st.integers(0, 40),
        st.integers(1, 5),
        st.integers(0, 3),
        st.integers(1, 4),
    )
    @settings(max_examples=examples(8), deadline=None, suppress_health_check=list(HealthCheck))
    def a_round(strategy: str, inserted: int, deleted: int, changed: int, nulls: int) -> None:
        with each_db.connect() as connection:
            before = connection.execute("SELECT count(*) FROM mv").fetchone()
            connection.execute("DELETE FROM t WHERE id %% %s = 0", [deleted])
            connection.execute("UPDATE t SET n = n + 1 WHERE id %% 3 < %s", [changed])
            connection.execute(
                "INSERT INTO t SELECT coalesce(max(id), 0) + i, CASE WHEN i %% %s > 0 THEN i END "
                "FROM t RIGHT JOIN generate_series(1, %s) i ON true GROUP BY i",
                [nulls, inserted],
            )
            response = hook.refresh("mv", refresh_strategy=strategy, row_count_strategy="exact").response
            assert response["strategy"] == strategy
            after = connection.execute("SELECT count(*) FROM mv").fetchone()
            assert connection.execute("SELECT count(*) FROM t").fetchone() == after
            assert before is not None
            assert after is not None
            assert _counts(response) == (before[0], after[0])

    a_round()


def test_a_concurrent_refresh_tells_how_many_rows_it_changed(each_db: Database) -> None:
    _source(each_db, _BY_ID)
    hook = hook_on(each_db)
    each_db.execute(
        "INSERT INTO t VALUES (4, 40), (5, 50)", "DELETE FROM t WHERE id = 1", "UPDATE t SET n = 0 WHERE id = 2"
    )
    response = hook.refresh("mv", row_count_strategy="exact").response
    assert (response["rows_inserted"], response["rows_deleted"]) == (3, 2)
    assert _counts(response) == (3, 4)


def test_an_unknown_estimate_is_none_and_never_minus_one(each_db: Database) -> None:
    _source(each_db)
    hook = hook_on(each_db)
    assert each_db.value("SELECT reltuples FROM pg_class WHERE relname = 'mv'") == -1
    # What is known after a regular refresh was counted by the server as it wrote.
    assert _counts(hook.refresh("mv").response) == (None, 3)
    run = hook.last_run("mv")
    assert run is not None
    assert (run.row_count_before, run.row_count_after) == (None, 3)
    assert each_db.value("SELECT meta->>'row_count_before' IS NULL FROM matviews.mat_view_runs") is True
    each_db.execute(_BY_ID)
    each_db.execute("DELETE FROM t WHERE id > 1")
    assert _counts(hook.refresh("mv", refresh_strategy="concurrent").response) == (3, 1)
    with each_db.connect() as connection:
        connection.execute("UPDATE pg_class SET reltuples = -1 WHERE relname = 'mv'")
    assert _counts(hook.refresh("mv", refresh_strategy="concurrent").response) == (None, None)


def test_no_rows_are_counted_where_none_are_asked_for(db: Database) -> None:
    _source(db, _BY_ID, "ANALYZE mv")
    hook = hook_on(db)
    for strategy in ("regular", "concurrent"):
        response = hook.refresh("mv", refresh_strategy=strategy, row_count_strategy="none").response
        assert _counts(response) == (None, None)


def _scans(database: Database) -> int:
    with database.connect() as connection:
        connection.execute("SELECT pg_stat_force_next_flush()")
    return int(database.value("SELECT seq_scan + coalesce(idx_scan, 0) FROM pg_stat_user_tables WHERE relname = 'mv'"))


def test_counting_scans_the_view_no_more_often_than_it_must(each_db: Database) -> None:
    _source(each_db)
    hook = hook_on(each_db)
    # Only the old rows have to be read to be counted; the new ones the server counts as it writes them.
    for strategy, scans in (("none", 0), ("estimated", 0), ("exact", 1)):
        before = _scans(each_db)
        response = hook.refresh("mv", refresh_strategy="regular", row_count_strategy=strategy).response
        assert _scans(each_db) - before == scans, strategy
    assert _counts(response) == (3, 3)
    before = _scans(each_db)
    created = hook.create(MatViewDefinition(name="other", sql="SELECT id FROM mv"), row_count_strategy="exact")
    assert created.response["row_count_after"] == 3
    assert _scans(each_db) - before == 1


def test_rows_are_counted_by_hand_where_the_server_does_not_count(each_db: Database) -> None:
    _source(each_db, _BY_ID, "ANALYZE mv", f'ALTER DATABASE "{each_db.name}" SET track_counts = off')
    hook = hook_on(each_db)
    each_db.execute("INSERT INTO t VALUES (4, 40)")

    def counts(strategy: str, counting: str) -> tuple[int | None, int | None]:
        return _counts(hook.refresh("mv", refresh_strategy=strategy, row_count_strategy=counting).response)

    assert counts("regular", "exact") == (3, 4)
    each_db.execute("INSERT INTO t VALUES (5, 50)")
    # What changed is not to be known then: the old number is gone with the old rows.
    assert counts("concurrent", "exact") == (None, 5)
    assert counts("concurrent", "none") == (None, None)
    each_db.execute("INSERT INTO t VALUES (6, 60)", "ANALYZE mv")
    assert counts("concurrent", "estimated") == (5, None)
    # Building the index anew tells the planner, before PostgreSQL 18 even then.
    assert counts("regular", "estimated") in {(5, 6), (5, None)}


_FAILURES: list[tuple[str, LiteralString, str, type[psycopg.Error]]] = [
    ("regular", "INSERT INTO t VALUES (3, 99)", "23505", psycopg.errors.UniqueViolation),
    ("concurrent", "INSERT INTO t VALUES (3, 99)", "23505", psycopg.errors.UniqueViolation),
    ("concurrent", "INSERT INTO t VALUES (3, 30)", "21000", psycopg.errors.CardinalityViolation),
    ("regular", "UPDATE t SET n = 0", "22012", psycopg.errors.DivisionByZero),
    ("concurrent", "UPDATE t SET n = 0", "22012", psycopg.errors.DivisionByZero),
]


def test_a_failing_refresh_raises_postgresqls_error_and_leaves_the_view_and_a_full_record(each_db: Database) -> None:
    each_db.execute("CREATE TABLE t (id int, n int)", "INSERT INTO t VALUES (1, 10), (2, 20), (3, 30)")
    hook = hook_on(each_db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT id, 60 / n AS n FROM t", unique_index_columns=["id"]))
    for strategy, cause, sqlstate, error in _FAILURES:
        each_db.execute("TRUNCATE t", "INSERT INTO t VALUES (1, 10), (2, 20), (3, 30)", cause)
        with pytest.raises(error) as raised:
            hook.refresh("mv", refresh_strategy=strategy)
        assert each_db.rows("TABLE mv ORDER BY id") == [(1, 6), (2, 3), (3, 2)]
        run = hook.last_run("mv")
        assert run is not None
        assert (run.operation, run.status) == ("refresh", "failed")
        assert run.started_at is not None
        assert run.finished_at is not None
        assert run.finished_at >= run.started_at
        assert run.duration_ms is not None
        assert 0 <= run.duration_ms < 60_000
        assert run.error is not None
        assert (run.error["class"], run.error["sqlstate"]) == (error.__name__, sqlstate)
        assert run.error["message"] == str(raised.value)
        assert run.error["backtrace"][0].startswith("Traceback (most recent call last)")
        assert any("services/strategies" in line for line in run.error["backtrace"])
        assert run.meta["strategy"] == strategy
        response = raised.value.response  # type: ignore[attr-defined]
        assert (response.status, response.success, response.run_id) == (None, False, run.id)
        assert response.response["sql"][-1].startswith("REFRESH")
        assert run.meta["response"] == {"status": None, **response.response}
        assert each_db.value("SELECT error_class FROM matviews.mat_view_run_history ORDER BY id DESC LIMIT 1") == (
            error.__name__
        )


_WAITING = "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'mv'::regclass AND NOT granted)"


def test_newcomers_never_wait_behind_a_refresh_that_waits_for_a_reader(each_db: Database) -> None:
    _source(each_db, "INSERT INTO t VALUES (4, 40)")
    hook = hook_on(each_db)
    hook.refresh("mv")
    each_db.execute("DELETE FROM t WHERE id = 4")
    lines = _listen(hook)
    lock_timeout, spare = 0.2, 1.5
    with each_db.connect(application_name="slow reader") as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM mv")
        with beside(
            lambda: hook.refresh("mv", refresh_strategy="regular", lock_timeout=lock_timeout), reader.close
        ) as refreshing:
            for _ in range(3):
                until(each_db, _WAITING)
                with each_db.connect(options="-c statement_timeout=10s") as newcomer:
                    begun = time.monotonic()
                    assert newcomer.execute("SELECT count(*) FROM mv").fetchone() == (4,)
                    assert time.monotonic() - begun < lock_timeout + spare
            assert not refreshing.done()
            reader.execute("ROLLBACK")
            response = refreshing.result()
    assert each_db.value("SELECT count(*) FROM mv") == 3
    assert response.response["row_count_after"] == 3
    # What was undone between the attempts is not in the record.
    assert len(response.response["sql"]) == 1
    (told,) = [line for line in lines if "In the way" in line]
    assert re.search(r"pid \d+ \(postgres, slow reader, transaction of \d+ s\): SELECT count\(\*\) FROM mv", told)
    assert hook.runs("mv")[0].status == "success"


def test_a_refresh_that_never_has_its_lock_gives_up_after_max_wait(each_db: Database) -> None:
    _source(each_db, _BY_ID)
    hook = hook_on(each_db)
    for strategy in ("regular", "concurrent"):
        with each_db.connect() as blocking:
            blocking.execute("BEGIN")
            blocking.execute("REFRESH MATERIALIZED VIEW CONCURRENTLY mv")
            begun = time.monotonic()
            refresh = partial(hook.refresh, "mv", refresh_strategy=strategy, lock_timeout=0.1, max_wait=0.4)
            with (
                beside(refresh, blocking.close) as refreshing,
                pytest.raises(psycopg.errors.LockNotAvailable) as raised,
            ):
                refreshing.result(timeout=10)
            assert time.monotonic() - begun >= 0.4
        note = "\n".join(raised.value.__notes__)
        assert "Gave up after" in note
        assert "raise max_wait" in note
        run = hook.last_run("mv")
        assert run is not None
        assert run.error is not None
        assert (run.status, run.error["class"], run.error["sqlstate"]) == ("failed", "LockNotAvailable", "55P03")
        assert run.error["hint"] == note
        assert hook.refresh("mv", refresh_strategy=strategy).status == "updated"


def test_a_unique_index_that_carries_columns_along_or_takes_nulls_as_equal_serves(each_db: Database) -> None:
    hook = hook_on(each_db)
    for index in (
        Index(columns=["id"], unique=True, include=["n"]),
        Index(columns=["id", "n"], unique=True, nulls_not_distinct=True),
    ):
        definition = MatViewDefinition(
            name="mv", sql="SELECT 1 AS id, NULL::int AS n", refresh_strategy="concurrent", indexes=[index]
        )
        hook.create(definition)
        assert hook.refresh("mv").response["strategy"] == "concurrent"
        hook.delete("mv")


@pytest.mark.parametrize("flag", ["vacuum", "analyze"])
def test_words_are_no_flags_of_a_refresh(flag: str, db: Database) -> None:
    with pytest.raises(InvalidDefinition, match="true or false"):
        hook_on(db).refresh("mv", **{flag: "no"})


@pytest.mark.parametrize("flag", ["cascade", "force"])
def test_words_are_no_flags_of_a_delete(flag: str, db: Database) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a", "CREATE VIEW dep AS SELECT * FROM mv")
    with pytest.raises(InvalidDefinition, match="true or false"):
        hook_on(db).delete("mv", **{flag: "False"})
    assert db.value("SELECT a FROM dep") == 1
