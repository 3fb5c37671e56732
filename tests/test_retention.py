"""Retention: what is kept is what the policy says, whatever else goes on, and what goes costs nobody a wait."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from airflow.sdk import DAG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import (
    InvalidDefinition,
    MatViewError,
    MissingPrivilege,
    OperationCancelled,
    ViewLocked,
    ViewNotFound,
)
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.operators.matview import PruneMatViewRunsOperator
from airflow_provider_matviews.retention import RetentionPolicy
from airflow_provider_matviews.services import retention as service
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Instruction, Pause, Query, Result, Work
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.retention import RETAINED_AT_ONCE, Pruning, prune_runs, retain
from demo.postgres_server import PostgresServer
from tests.airflow_dags import run_dag, set_connection
from tests.conftest import INSTALLATIONS, NEWEST, Database, examples, hook_on
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

#: (definition, operation, status, seconds ago)
History = Sequence[tuple[int, int, int, int]]
_INSERT = """
INSERT INTO {} (mat_view_definition_id, operation, status, started_at, finished_at, error, created_at)
SELECT r.definition, r.operation, r.status, r.at, CASE WHEN r.status <> 1 THEN r.at END,
       CASE WHEN r.status = 3 THEN '{{"class": "Boom"}}'::jsonb END, r.at
FROM (SELECT n, definition, operation, status, now() - ago * interval '1 second' AS at
      FROM unnest(%s::bigint[], %s::int[], %s::int[], %s::int[]) WITH ORDINALITY
           AS given (definition, operation, status, ago, n)) r
ORDER BY r.n RETURNING id
"""


def _insert(connection: psycopg.Connection[Any], history: History, schema: str = "matviews") -> list[int]:
    """Insert runs in this order; of equal age the later one is the newer one."""
    columns = [list(column) for column in zip(*history, strict=True)] or [[], [], [], []]
    with connection.transaction():
        # Of one moment, so that equal ages are equal dates.
        return [row[0] for row in connection.execute(sql.SQL(_INSERT).format(_runs_of(schema)), columns)]


def _runs_of(schema: str) -> sql.Composable:
    return sql.SQL(sql.Identifier(schema, "mat_view_runs").as_string(None).replace("%", "%%"))


def _defined(database: Database, *names: str, **arguments: Any) -> tuple[MatViewHook, dict[str, int]]:
    """Make views, and forget that they were made."""
    hook = hook_on(database)
    for name in names:
        hook.create(MatViewDefinition(name=name, sql="SELECT 1 AS a", **arguments))
    database.execute("DELETE FROM matviews.mat_view_runs")
    return hook, {record.name: record.id for record in hook.definitions()}


def _left(database: Database) -> set[int]:
    return {row[0] for row in database.rows("SELECT id FROM matviews.mat_view_runs")}


def _watched(
    work: Work[Any], look: Callable[[Query], None], after: Callable[[Instruction], None] = lambda _: None
) -> Work[Any]:
    """Carry out a work, with a look at each of its queries just before it is sent, and at each instruction after it."""
    result: Result | None = None
    error: psycopg.Error | None = None
    while True:
        try:
            instruction: Instruction
            if error is not None:
                instruction = work.throw(error)
            else:
                instruction = next(work) if result is None else work.send(result)
        except StopIteration as stop:
            return stop.value
        error = None
        if isinstance(instruction, Query):
            look(instruction)
        try:
            result = yield instruction
        except psycopg.Error as raised:
            error = raised
        after(instruction)


# -- the policy


@pytest.mark.parametrize("name", ["keep_successes", "keep_failures", "keep_skipped"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "500", math.nan, math.inf, 10**12])
def test_a_number_of_runs_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidDefinition, match=f"{name}=.*is not a whole number of runs from 1 to"):
        RetentionPolicy(**{name: value})


@pytest.mark.parametrize("value", [0, -1, True, "90", math.nan, math.inf, timedelta(0), timedelta(days=-1)])
def test_an_age_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(InvalidDefinition, match=r"max_age=.* is not a positive number of seconds, or a timedelta"):
        RetentionPolicy(max_age=value)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({}, "without any limit keeps everything"),
        ({"max_age": 1e11}, "more than a hundred years"),
        ({"keep": 5}, "'keep' is no argument of a retention policy. There are: keep_successes"),
        (500, "retention is a RetentionPolicy or a table of its arguments, not 500"),
    ],
)
def test_what_is_no_policy_is_refused_where_it_is_declared(policy: Any, said: str) -> None:
    with pytest.raises(InvalidDefinition, match=said):
        MatViewDefinition(name="mv", sql="SELECT 1", retention=policy)


@given(
    st.builds(
        RetentionPolicy,
        keep_successes=st.integers(1, 10**9),
        keep_failures=st.none() | st.integers(1, 10**9),
        keep_skipped=st.none() | st.integers(1, 10**9),
        max_age=st.none() | st.timedeltas(timedelta(seconds=1), timedelta(days=3650)) | st.floats(0.001, 1e9),
    )
)
def test_a_policy_survives_the_record_and_the_header_of_a_file(policy: RetentionPolicy) -> None:
    definition = MatViewDefinition(name="a.mv", sql="SELECT 1", retention=policy)
    assert MatViewDefinition.from_dict(definition.to_dict()) == definition
    assert MatViewDefinition.from_sql(definition.to_sql()).retention == policy
    assert MatViewDefinition(name="a.mv", sql="SELECT 1").to_dict()["retention"] is None


# -- what is kept


def _kept(history: dict[int, tuple[int, int, int, int]], policies: dict[int, RetentionPolicy]) -> set[int]:
    """Say which runs a policy keeps, run by run, as its docstring has it."""
    kept = set()
    for number, (definition, operation, status, ago) in history.items():
        policy = policies[definition]
        newer = [
            other
            for other, (*kind, age) in history.items()
            if kind == [definition, operation, status] and (-age, other) > (-ago, number)
        ]
        keep = {2: policy.keep_successes, 3: policy.keep_failures, 4: policy.skipped_kept}.get(status)
        seconds = policy.max_age_seconds
        fits = (keep is None or len(newer) < keep) and (seconds is None or ago < seconds)
        if status == 1 or not newer or fits:
            kept.add(number)
    return kept


_POLICIES = st.builds(
    RetentionPolicy,
    keep_successes=st.integers(1, 6),
    keep_failures=st.none() | st.integers(1, 4),
    keep_skipped=st.none() | st.integers(1, 4),
    # Between the ages, so that the time that a test takes is nothing to it.
    max_age=st.none() | st.integers(0, 20).map(lambda n: n * 1000 + 500),
) | st.builds(RetentionPolicy, max_age=st.integers(0, 20).map(lambda n: n * 1000 + 500))
_HISTORIES = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from([1, 2, 2, 2, 3, 4]), st.integers(0, 20)),
    max_size=60,
)


@pytest.fixture
def odd(each_db: Database) -> Iterator[tuple[psycopg.Connection[Any], Ledger, Driver]]:
    """A record in a schema of an odd name, with three definitions."""
    ledger = Ledger('100% "odd" s')
    hook_on(each_db, tracking_schema=ledger.tracking_schema).runs()
    with each_db.connect() as connection, Driver(lambda: psycopg.connect(each_db.dsn())) as driver:
        connection.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(ledger.tracking_schema)))
        connection.execute(
            "INSERT INTO mat_view_definitions (name, schema_name, view_name, declaration) "
            "SELECT format('v%s', n), 'public', format('v%s', n), '{\"name\": \"v\"}' FROM generate_series(1, 3) n"
        )
        yield connection, ledger, driver


_OFTEN = settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_OFTEN
@given(_HISTORIES, _POLICIES, _POLICIES, st.integers(1, 7))
def test_what_is_kept_is_what_the_policy_says_of_each_run(
    odd: tuple[psycopg.Connection[Any], Ledger, Driver],
    history: list[tuple[int, int, int, int]],
    policy: RetentionPolicy,
    own: RetentionPolicy,
    batch_size: int,
) -> None:
    connection, ledger, driver = odd
    connection.execute("DELETE FROM mat_view_runs")
    connection.execute(
        "UPDATE mat_view_definitions SET declaration = declaration || %s WHERE name = 'v3'",
        [psycopg.types.json.Jsonb({"retention": own.said()})],
    )
    ids = [row[0] for row in connection.execute("SELECT id FROM mat_view_definitions ORDER BY id")]
    rows = [(ids[view], operation, status, ago * 1000) for view, operation, status, ago in history]
    given_runs = dict(zip(_insert(connection, rows, ledger.tracking_schema), rows, strict=True))
    policies = {ids[0]: policy, ids[1]: policy, ids[2]: own}
    expected = _kept(given_runs, policies)

    def left() -> set[int]:
        return {row[0] for row in connection.execute("SELECT id FROM mat_view_runs")}

    # The one that is declared, as a run ends: before, for its three kinds of operation go apart.
    (record,) = [each for each in driver.run(ledger.definitions()) if each.name == "v3"]
    driver.run(retain(ledger, [record]))
    of_others = {number for number, run in given_runs.items() if run[0] != ids[2]}
    assert left() == {number for number in expected if number not in of_others} | of_others

    # Reaped runs would be failures; here the ones that run are to stay what they are.
    pruning = Pruning(policy, batch_size=batch_size, pause=0, dry_run=True)
    dry = driver.run(prune_runs(ledger, pruning))
    assert dry.removed == len(left()) - len(expected)
    assert left() >= expected
    connection.execute("DELETE FROM mat_view_runs WHERE status = 1")
    expected = {number for number in expected if given_runs[number][2] != 1}
    done = driver.run(prune_runs(ledger, Pruning(policy, batch_size=batch_size, pause=0)))
    assert left() == expected
    assert [(each.view, each.operation, each.status, each.removed, each.left) for each in done.kinds] == [
        (each.view, each.operation, each.status, each.removed, each.left) for each in dry.kinds
    ]
    assert driver.run(prune_runs(ledger, Pruning(policy, pause=0))).removed == 0


_DOCUMENT = (Path(__file__).parent / "sql" / "keep_last_500.sql").read_text().replace("500", "5")


@_OFTEN
@given(
    st.lists(st.tuples(st.integers(0, 2), st.just(1), st.sampled_from([2, 2, 2, 3]), st.integers(0, 20)), max_size=60)
)
def test_where_there_are_only_refreshes_it_keeps_what_the_documents_statement_keeps(
    odd: tuple[psycopg.Connection[Any], Ledger, Driver], history: list[tuple[int, int, int, int]]
) -> None:
    connection, ledger, driver = odd
    connection.execute("DELETE FROM mat_view_runs")
    ids = [row[0] for row in connection.execute("SELECT id FROM mat_view_definitions ORDER BY id")]
    rows = [(ids[view], *rest) for view, *rest in history]
    _insert(connection, rows, ledger.tracking_schema)  # type: ignore[arg-type]

    def left() -> list[tuple[Any, ...]]:
        # Of those of one date the document does not say which go first.
        return connection.execute(
            "SELECT mat_view_definition_id, status, created_at FROM mat_view_runs ORDER BY 1, 2, 3"
        ).fetchall()

    with connection.transaction(force_rollback=True):
        connection.execute(_DOCUMENT)
        expected = left()
    driver.run(prune_runs(ledger, Pruning(RetentionPolicy(keep_successes=5), pause=0)))
    assert left() == expected


# -- among others


def test_what_somebody_has_locked_is_left_and_not_waited_for(each_db: Database) -> None:
    hook, ids = _defined(each_db, "mv")
    with each_db.connect() as connection, each_db.connect() as holder:
        runs = _insert(connection, [(ids["mv"], 1, 2, ago) for ago in range(20, 0, -1)])
        with holder.transaction():
            holder.execute("SELECT FROM matviews.mat_view_runs WHERE id = ANY (%s) FOR UPDATE", [[runs[0], runs[7]]])
            with beside(lambda: hook.prune(keep_successes=5, pause=0, batch_size=3), holder.close) as pruning:
                result = pruning.result(timeout=20)
    assert [(kind.removed, kind.left) for kind in result.kinds] == [(13, 7)]
    assert _left(each_db) == {runs[0], runs[7], *runs[-5:]}
    assert hook.prune(keep_successes=5).removed == 2


def test_a_run_whose_status_changes_between_the_look_and_the_deletion_stays(db: Database) -> None:
    _, ids = _defined(db, "mv")
    with db.connect() as connection, Driver(lambda: psycopg.connect(db.dsn())) as driver:
        runs = _insert(connection, [(ids["mv"], 1, 3, ago) for ago in range(10, 0, -1)])

        def look(query: Query) -> None:
            # A run that was held for lost, and had committed after all.
            if "DELETE" in query.statement.as_string(None):
                connection.execute(
                    "UPDATE matviews.mat_view_runs SET status = 2, error = NULL WHERE id = %s", [runs[0]]
                )

        pruning = Pruning(RetentionPolicy(keep_failures=4))
        result = driver.run(_watched(prune_runs(Ledger("matviews"), pruning), look))
    assert result.removed == 5
    assert _left(db) == {runs[0], *runs[-4:]}


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
def test_two_prunes_and_runs_that_begin_and_end_do_not_mind_each_other(db: Database, isolation: str) -> None:
    _, ids = _defined(db, "mv", "other")
    with db.connect() as connection:
        _insert(connection, [(ids["mv"], 1, 2, ago) for ago in range(3000, 0, -1)])
        connection.execute(
            sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = {}").format(
                sql.Identifier(db.name), sql.Literal(isolation)
            )
        )
    start = threading.Barrier(3)

    def prune() -> int:
        hook = hook_on(db)
        start.wait(20)
        return hook.prune(keep_successes=500, views=["mv"], batch_size=50, pause=0).removed

    def refresh() -> int:
        hook = hook_on(db)
        start.wait(20)
        return len([hook.refresh("mv", row_count_strategy="none") for _ in range(8)])

    with beside(prune) as one, beside(prune) as two, beside(refresh) as runs:
        removed, refreshed = one.result(60) + two.result(60), runs.result(60)
    assert db.value("SELECT count(*) FROM matviews.mat_view_runs") == 3000 + refreshed - removed
    assert 2500 <= removed <= 2500 + refreshed
    assert db.value("SELECT count(*) FROM matviews.mat_view_runs WHERE meta <> '{}' AND status = 2") == refreshed


def test_a_prune_that_is_stopped_ends_at_once_and_what_went_stays_gone(db: Database) -> None:
    hook, ids = _defined(db, "mv")
    with db.connect() as connection:
        _insert(connection, [(ids["mv"], 1, 2, ago) for ago in range(300, 0, -1)])
    with beside(lambda: hook.prune(keep_successes=10, batch_size=20, pause=3600), hook.cancel) as pruning:
        until(db, "SELECT count(*) = 280 FROM matviews.mat_view_runs")
        hook.refuse("enough")
        with pytest.raises(OperationCancelled, match="enough"):
            pruning.result(timeout=20)
    assert db.value("SELECT count(*) FROM matviews.mat_view_runs") == 280
    assert hook_on(db).prune(keep_successes=10).removed == 270


def _counted(database: Database, hook: MatViewHook) -> int:
    """Prune, and return how many entries of the index it took to know how many runs there are."""
    counted: list[int] = []
    with database.connect() as connection, Driver(lambda: psycopg.connect(database.dsn())) as driver:

        def look(query: Query) -> None:
            text = query.statement.as_string(None)
            if "AS doomed" in text:
                plan = connection.execute(
                    b"EXPLAIN (ANALYZE, TIMING OFF, SUMMARY OFF, COSTS OFF, FORMAT JSON) " + text.encode(),
                    query.parameters,  # type: ignore[arg-type]
                ).fetchall()[0][0]
                counted.append(_most_rows(plan[0]["Plan"]))

        pruning = Pruning(RetentionPolicy(keep_successes=900), pause=0)
        driver.run(_watched(prune_runs(hook._ledger, pruning), look))
    return max(counted)


def _most_rows(plan: dict[str, Any]) -> int:
    rows = int(plan["Actual Rows"] * plan["Actual Loops"])
    return max([rows, *(_most_rows(each) for each in plan.get("Plans", ()))])


def test_a_prune_counts_what_has_come_since_the_last_one_unless_somebody_else_has_deleted(each_db: Database) -> None:
    hook, ids = _defined(each_db, "a", "b")
    with each_db.connect() as connection:

        def come(many: int) -> None:
            for number in ids.values():
                _insert(connection, [(number, 1, 2, -n) for n in range(len(came), len(came) + many)])
            came.extend([None] * many)

        def settle() -> int:
            # What a session has done shows in the counters some time after, at the latest when it ends.
            until(
                each_db,
                "SELECT pg_stat_get_tuples_deleted('matviews.mat_view_runs'::regclass) "
                "= (SELECT deletions FROM matviews.mat_view_retention)",
            )
            return _counted(each_db, hook)

        def left() -> list[int]:
            return [
                row[0]
                for row in each_db.rows("SELECT count(*) FROM matviews.mat_view_runs GROUP BY mat_view_definition_id")
            ]

        came: list[None] = []
        come(1000)
        assert _counted(each_db, hook) >= 2000
        assert left() == [900, 900]
        come(5)
        assert settle() <= 40
        assert left() == [900, 900]
        assert settle() <= 20
        connection.execute("UPDATE matviews.mat_view_retention SET counted_at = counted_at - interval '49 hours'")
        assert settle() >= 1800
        assert settle() <= 20
        # The oldest are gone, which the counters may not tell yet.
        connection.execute(
            "DELETE FROM matviews.mat_view_runs WHERE created_at IN "
            "(SELECT created_at FROM matviews.mat_view_runs ORDER BY 1 LIMIT 10)"
        )
        assert left() == [895, 895]
        come(5)
        _counted(each_db, hook)
        assert left() == [900, 900]
        # Some are gone from the middle, and it is long enough ago.
        each_db.execute(
            "DELETE FROM matviews.mat_view_runs WHERE id % 2 = 0 AND id NOT IN "
            "(SELECT min(id) FROM matviews.mat_view_runs GROUP BY mat_view_definition_id)"
        )
        some = left()
        come(10)
        assert _counted(each_db, hook) >= 900
        assert left() == [each + 10 for each in some]
        settle()
        # All are gone, and others come with the very ids that there were.
        with connection.transaction():
            first = connection.execute("SELECT min(id) FROM matviews.mat_view_runs").fetchall()[0][0]
            connection.execute("TRUNCATE matviews.mat_view_runs")
            connection.execute("SELECT setval('matviews.mat_view_runs_id_seq', %s, false)", [first])
        come(480)
        _counted(each_db, hook)
        assert left() == [480, 480]


_RECOUNTED = "What the last prune has counted is not so any more"
#: Some of the middle, which nothing but a count tells.
_MIDDLE = (
    "id IN (SELECT id FROM matviews.mat_view_runs WHERE status = 2 AND operation = 1 "
    "ORDER BY created_at, id OFFSET 20 LIMIT 60)"
)


def _hundred(database: Database) -> tuple[MatViewHook, Callable[[int], None]]:
    """Make a view with a hundred successes, which a prune has counted; return what makes more come."""
    hook, ids = _defined(database, "mv")

    def come(many: int) -> None:
        with database.connect() as connection:
            _insert(connection, [(ids["mv"], 1, 2, 0)] * many)

    come(100)
    assert hook.prune(keep_successes=100).removed == 0
    return hook, come


def test_what_was_counted_is_not_believed_when_the_counters_have_begun_anew(capsys: pytest.CaptureFixture[str]) -> None:
    def reset() -> None:
        db.execute("SELECT pg_stat_reset()")

    def crash() -> None:
        # All others are ended with it, and the server starts anew under the same start time.
        with db.connect() as victim, db.connect() as witness:
            os.kill(victim.info.backend_pid, signal.SIGKILL)
            with pytest.raises(psycopg.OperationalError):
                witness.execute("SELECT pg_sleep(60)")

    with PostgresServer(INSTALLATIONS[NEWEST], None) as server:
        db = Database(server, "postgres")
        _, come = _hundred(db)
        for event in (reset, crash, server.restart):
            db.execute("DELETE FROM matviews.mat_view_runs WHERE " + _MIDDLE)
            # What it would have left behind if nothing had been deleted before either.
            db.execute("UPDATE matviews.mat_view_retention SET deletions = 0")
            event()
            _wait_for(db, "SELECT pg_stat_get_tuples_deleted('matviews.mat_view_runs'::regclass) = 0")
            come(30)
            hook = hook_on(db)
            assert hook.prune(keep_successes=100).removed == 0
            assert len(_left(db)) == 70
            # Not for having looked into it, which is by chance.
            assert _RECOUNTED not in capsys.readouterr().out
            come(30)
            assert hook.prune(keep_successes=100).removed == 0


def _wait_for(database: Database, condition: LiteralString) -> None:
    for _ in range(300):
        with suppress(psycopg.OperationalError):
            return until(database, condition)
        time.sleep(0.1)
    pytest.fail("The server did not come back.")


@pytest.mark.parametrize(
    "unseen",
    [
        "DELETE FROM matviews.mat_view_runs WHERE " + _MIDDLE,
        "UPDATE matviews.mat_view_runs SET status = 4 WHERE " + _MIDDLE,
    ],
    ids=["deleted", "updated"],
)
def test_what_was_counted_is_looked_into_before_anything_goes_by_it(
    db: Database, capsys: pytest.CaptureFixture[str], unseen: LiteralString
) -> None:
    hook, come = _hundred(db)
    with db.connect(options="-c track_counts=off") as connection:
        connection.execute(unseen)
    come(60)
    assert hook.prune(keep_successes=100, dry_run=True).removed == 0
    come(10)
    capsys.readouterr()
    assert [(kind.status, kind.removed, kind.left) for kind in hook.prune(keep_successes=100).kinds] == [
        ("success", 10, 100)
    ]
    assert capsys.readouterr().out.count(_RECOUNTED) == 1
    come(5)
    assert hook.prune(keep_successes=100).removed == 5
    assert _RECOUNTED not in capsys.readouterr().out
    # What this one deletes nobody counts, so nothing is left behind that says how many there are.
    uncounted = hook_on(db, extra='{"options": "-c track_counts=off"}')
    assert uncounted.prune(keep_successes=90).removed == 10
    assert db.value("SELECT count(*) FROM matviews.mat_view_retention") == 0


def test_two_histories_that_have_become_one_are_counted_again(db: Database) -> None:
    hook, ids = _defined(db, "former", "latter")
    with db.connect() as connection:
        _insert(connection, [(number, 1, 2, ago) for ago in range(20, 0, -1) for number in ids.values()])
    assert hook.prune(keep_successes=10).removed == 20
    hook.delete("latter", force=True)
    hook.create(MatViewDefinition(name="latter", sql="SELECT 1 AS a", renamed_from="former"))
    assert _statuses(db)["refresh success"] == 20
    assert hook.prune(keep_successes=10).removed == 10
    assert _statuses(db)["refresh success"] == 10


# -- what is odd


@pytest.mark.parametrize("style", ["German", "SQL, DMY"])
def test_moments_that_python_does_not_know_are_pruned_in_their_order(db: Database, style: str) -> None:
    _, ids = _defined(db, "mv", "other")
    hook = hook_on(db, extra=json.dumps({"options": f"-c datestyle={style.replace(' ', '')} -c timezone=Asia/Kolkata"}))
    moments = ["-infinity", "0044-03-15 BC", "1999-02-03", "2001-01-02 03:04:05.678901", "20000-01-02", "infinity"]
    with db.connect() as connection:
        for view in ids.values():
            for moment in moments:
                connection.execute(
                    "INSERT INTO matviews.mat_view_runs (mat_view_definition_id, status, operation, finished_at, "
                    "created_at) VALUES (%s, 2, 1, now(), %s)",
                    [view, moment],
                )
    # Again and again by what the one before has left behind.
    for keep in (5, 4, 3, 2, 1):
        assert hook.prune(keep_successes=keep, batch_size=1, pause=0).removed == 2
        left = db.rows(
            "SELECT created_at = any(%s::timestamptz[]), count(*) FROM matviews.mat_view_runs GROUP BY 1",
            [moments[-keep:]],
        )
        assert left == [(True, 2 * keep)]
    assert hook.prune(keep_successes=5, max_age=1).removed == 0


def test_runs_that_others_protect_or_reference_stay_and_the_others_go(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    hook, ids = _defined(db, "mv", "other")
    with db.connect() as connection:
        runs = _insert(connection, [(number, 1, 2, ago) for number in ids.values() for ago in range(50, 0, -1)])
        connection.execute(
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN RETURN CASE WHEN old.meta ? 'keep' THEN NULL ELSE old END; END$$"
        )
        connection.execute(
            "CREATE TRIGGER keep BEFORE DELETE ON matviews.mat_view_runs FOR EACH ROW EXECUTE FUNCTION keep()"
        )
        protected, referenced = {runs[0], runs[3], runs[12]}, {runs[5], runs[31], runs[32]}
        connection.execute(
            "UPDATE matviews.mat_view_runs SET meta = '{\"keep\": 1}' WHERE id = ANY (%s)", [list(protected)]
        )
        connection.execute("CREATE TABLE note (run bigint REFERENCES matviews.mat_view_runs (id))")
        connection.execute("INSERT INTO note SELECT unnest(%s::bigint[])", [list(referenced)])
    capsys.readouterr()
    result = hook.prune(keep_successes=5, batch_size=60, pause=0)
    assert {(kind.view, kind.removed, kind.left) for kind in result.kinds} == {("mv", 39, 11), ("other", 45, 5)}
    assert _left(db) == {*protected, *referenced, *runs[45:50], *runs[95:]}
    told = capsys.readouterr().out
    assert "3 runs of mv that were to go stay: a trigger or row security protects them" in told
    assert "3 runs of mv that were to go stay: a foreign key on them protects them" in told
    assert 'violates foreign key constraint "note_run_fkey" on table "note"' in told


def test_a_lock_on_the_table_is_waited_for_briefly_and_who_has_it_is_named(
    db: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service, "_LOCK_TIMEOUT", "50ms")
    monkeypatch.setattr(service, "_LOCK_PAUSES", (0.05, 0.05))
    hook, ids = _defined(db, "mv")
    with db.connect() as connection:
        _insert(connection, [(ids["mv"], 1, 2, ago) for ago in range(20, 0, -1)])
        for mode in ("SHARE", "ACCESS EXCLUSIVE"):
            holder = db.connect(application_name="an index")
            with suppress(psycopg.OperationalError), holder.transaction():
                holder.execute(f"LOCK TABLE matviews.mat_view_runs IN {mode} MODE")  # type: ignore[arg-type]
                with (
                    beside(lambda: hook.prune(keep_successes=5), holder.close) as pruning,
                    pytest.raises(MatViewError, match=r"mat_view_runs .* was not to be had .* an index, transaction"),
                ):
                    pruning.result(timeout=20)
                assert "trying again in 0.05 s without making others queue" in capsys.readouterr().out
        holder = db.connect()
        with holder.transaction():
            holder.execute("LOCK TABLE matviews.mat_view_runs IN SHARE MODE")
            assert hook.prune(keep_successes=5, dry_run=True).removed == 15

        def look(query: Query) -> None:
            # The lock comes between the look and the deletion.
            if "DELETE" in query.statement.as_string(None) and not met:
                met.append(query)
                holder.execute("BEGIN")
                holder.execute("LOCK TABLE matviews.mat_view_runs IN SHARE MODE")

        def release(instruction: Instruction) -> None:
            if isinstance(instruction, Pause) and met:
                holder.execute("ROLLBACK")
                met.append(instruction)

        met: list[Instruction] = []
        pruning = Pruning(RetentionPolicy(keep_successes=5), pause=0)
        with Driver(lambda: psycopg.connect(db.dsn())) as driver:
            result = driver.run(_watched(prune_runs(Ledger("matviews"), pruning), look, release))
    holder.close()
    assert result.removed == 15
    assert [type(each) for each in met] == [Query, Pause]


def test_a_vacuum_that_was_passed_over_is_said_to_be_so(each_db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    hook, ids = _defined(each_db, "mv")
    role = each_db.role("LOGIN NOSUPERUSER")
    with each_db.connect() as connection, each_db.connect(application_name="an index") as holder:
        for statement in ("GRANT USAGE ON SCHEMA matviews TO {}", "GRANT ALL ON ALL TABLES IN SCHEMA matviews TO {}"):
            connection.execute(sql.SQL(statement).format(sql.Identifier(role)))  # type: ignore[arg-type]
        if each_db.server.major >= 17:
            connection.execute(
                sql.SQL("REVOKE MAINTAIN ON matviews.mat_view_runs FROM {}").format(sql.Identifier(role))
            )
        _insert(connection, [(ids["mv"], 1, 2, ago) for ago in range(20, 0, -1)])
        capsys.readouterr()
        assert hook_on(each_db, user=role).prune(keep_successes=9, vacuum=True).removed == 11
        assert "VACUUM was passed over, since the role may not" in capsys.readouterr().out
        with holder.transaction():
            holder.execute("LOCK TABLE matviews.mat_view_runs IN SHARE UPDATE EXCLUSIVE MODE")
            assert hook.prune(keep_successes=8, vacuum=True).removed == 1
        told = capsys.readouterr().out
        assert "VACUUM was passed over, since somebody had locked the table" in told
        assert "an index" in told
        assert "Then VACUUM" not in told
        if each_db.server.major >= 17:
            connection.execute(sql.SQL("GRANT MAINTAIN ON matviews.mat_view_runs TO {}").format(sql.Identifier(role)))
            assert hook_on(each_db, user=role).prune(keep_successes=7, vacuum=True).removed == 1
            assert "Then VACUUM" in capsys.readouterr().out


def test_every_statement_goes_by_way_of_an_index(each_db: Database) -> None:
    _, ids = _defined(each_db, "a", "b", "c", retention={"keep_successes": 1000})
    explained: list[str] = []
    with each_db.connect() as connection, Driver(lambda: psycopg.connect(each_db.dsn())) as driver:
        _insert(connection, [(number, 1, 2 + n % 3, 100_000 - n) for number in ids.values() for n in range(12_000)])
        connection.execute("VACUUM ANALYZE matviews.mat_view_runs")

        def look(query: Query) -> None:
            text = query.statement.as_string(None)
            if "mat_view_runs" in text and "mat_view_definition_id" in text:
                plan = connection.execute(b"EXPLAIN " + text.encode(), query.parameters)  # type: ignore[arg-type]
                explained.append("\n".join(row[0] for row in plan))

        ledger = Ledger("matviews")
        driver.run(_watched(retain(ledger, driver.run(ledger.definitions())), look))
        driver.run(_watched(prune_runs(ledger, Pruning(RetentionPolicy(keep_successes=5), pause=0)), look))
    assert sum("Delete on mat_view_runs" in plan for plan in explained) >= 2
    assert [plan for plan in explained if "Seq Scan on mat_view_runs" in plan] == []
    assert all("index_mat_view_runs_on_kind" in plan for plan in explained if "Delete on" in plan)


# -- as each run ends


def _statuses(database: Database) -> dict[str, int]:
    rows = database.rows("SELECT operation || ' ' || status, count(*) FROM matviews.mat_view_run_history GROUP BY 1")
    return {str(kind): count for kind, count in rows}


def test_a_declared_policy_is_applied_as_each_run_ends_however_it_does(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a", GATE)
    definition = MatViewDefinition(
        name="mv",
        sql="SELECT 1 / a AS a, gate() AS g FROM t",
        retention={"keep_successes": 2, "keep_failures": 3, "keep_skipped": 1},
    )
    hook = hook_on(db)
    for _ in range(4):
        hook.create(definition)
    assert _statuses(db) == {"create success": 1, "create skipped": 1}
    for _ in range(4):
        hook.refresh("mv")
    assert _statuses(db)["refresh success"] == 2
    db.execute("UPDATE t SET a = 0")
    for _ in range(5):
        with pytest.raises(psycopg.errors.DivisionByZero):
            hook.refresh("mv")
    assert _statuses(db)["refresh failed"] == 3
    db.execute("UPDATE t SET a = 1")
    with gate_closed(db) as open_gate, beside(lambda: hook_on(db).refresh("mv"), open_gate):
        until(db, AT_THE_GATE)
        for _ in range(3):
            assert hook.refresh("mv", if_locked="skip").status == "skipped"
            with pytest.raises(ViewLocked):
                hook.refresh("mv", if_locked="fail")
        assert _statuses(db)["refresh skipped"] == 1
        assert _statuses(db)["refresh running"] == 1
    assert _statuses(db)["refresh success"] == 2
    # A definition that was refused is not what the view should be, nor what its history should be.
    with pytest.raises(psycopg.Error):
        hook.create(MatViewDefinition(name="mv", sql="SELECT nothing", retention={"keep_failures": 1, "max_age": 1e-3}))
    assert _statuses(db)["refresh failed"] == 3
    assert hook.delete("mv").status == "deleted"


def test_a_fleet_that_skips_views_applies_what_they_declare(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a")
    hook = hook_on(db)
    for name, retention in (("kept", {"keep_skipped": 2}), ("plain", None)):
        hook.create(MatViewDefinition(name=name, sql="SELECT a FROM t", retention=retention))
    hook.refresh_many(["*"])
    for _ in range(4):
        assert hook.refresh_many(["*"], skip_unchanged=True).count("skipped") == 2
    rows = db.rows("SELECT view, count(*) FROM matviews.mat_view_run_history WHERE status = 'skipped' GROUP BY 1")
    assert dict(rows) == {"kept": 2, "plain": 4}


def test_a_policy_that_is_declared_over_a_long_history_deletes_it_by_and_by(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    hook, ids = _defined(db, "mv", retention={"keep_successes": 5})
    with db.connect() as connection:
        _insert(connection, [(ids["mv"], ago % 2, 2, ago) for ago in range(2 * RETAINED_AT_ONCE + 100, 0, -1)])
    capsys.readouterr()
    hook.refresh("mv")
    assert "Retention has deleted 1,000 older runs" in capsys.readouterr().out
    assert db.value("SELECT count(*) FROM matviews.mat_view_runs") == RETAINED_AT_ONCE + 101
    hook.refresh("mv")
    hook.refresh("mv")
    assert _statuses(db) == {"create success": 5, "refresh success": 5}
    hook.refresh("mv")
    assert capsys.readouterr().out.count("Retention has deleted") == 1


def test_a_run_is_a_success_although_its_history_could_not_be_pruned(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    role = db.role("LOGIN NOSUPERUSER")
    hook_on(db).runs()
    with db.connect() as connection:
        for statement in (
            "GRANT USAGE ON SCHEMA matviews TO {}",
            "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA matviews TO {}",
            "CREATE SCHEMA mart AUTHORIZATION {}",
        ):
            connection.execute(sql.SQL(statement).format(sql.Identifier(role)))  # type: ignore[arg-type]
    hook = hook_on(db, user=role)
    definition = MatViewDefinition(name="mart.mv", sql="SELECT 1 AS a", retention={"keep_successes": 1})
    assert hook.create(definition).status == "created"
    assert hook.refresh("mart.mv").status == "updated"
    assert hook.last_run("mart.mv").status == "success"  # type: ignore[union-attr]
    told = capsys.readouterr().out
    assert told.count("The run has ended as it has; what retention does not keep was left this time") == 2
    grant = f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "matviews" TO "{role}"'
    assert told.count(grant) == 2
    hook_on(db).refresh("mart.mv")
    hook_on(db).refresh("mart.mv")
    hook.create(replace(definition, retention=None))
    db.execute("UPDATE matviews.mat_view_runs SET operation = 1, status = 2")
    with pytest.raises(MissingPrivilege, match="permission denied for table mat_view_runs") as raised:
        hook.prune(keep_successes=1)
    assert grant in (raised.value.hint or "")


# -- from Airflow


def test_the_operator_prunes_dropped_views_too_and_tells_what_went_and_what_is_left(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_connection(monkeypatch, db)
    hook, ids = _defined(db, "daily", "gone", "other", "own")
    hook.delete("gone")
    hook.create(MatViewDefinition(name="own", sql="SELECT 1 AS a", retention={"keep_successes": 60}))
    db.execute("DELETE FROM matviews.mat_view_runs")
    with db.connect() as connection:
        for name in ids:
            _insert(connection, [(ids[name], 1, 2, ago) for ago in range(100, 0, -1)])
        # Its process has ended without a word; as the last failure of its kind it stays.
        (lost,) = _insert(connection, [(ids["other"], 0, 1, 50)])

    def prune(dry_run: bool) -> Any:
        with DAG("prune", schedule=None) as dag:
            PruneMatViewRunsOperator(
                task_id="prune",
                views=["{{ 'd' }}aily", "[gno]*"],
                exclude=["nothing"],
                keep_successes=30,
                dry_run=dry_run,
            )
        return run_dag(dag)

    counts = {"daily": 70, "gone": 70, "other": 70, "own": 40}
    dry = prune(dry_run=True)
    assert dry.state == "success"
    assert db.value("SELECT count(*) FROM matviews.mat_view_runs") == 401
    assert dry.xcom("prune")["reaped"] == []
    run = prune(dry_run=False)
    assert run.state == "success"
    told = run.xcom("prune")
    assert {key: told[key] for key in ("dry_run", "removed", "views", "reaped", "more_kinds")} == {
        "dry_run": False,
        "removed": 250,
        "views": 4,
        "reaped": [lost],
        "more_kinds": 0,
    }
    assert told["kinds"] == dry.xcom("prune")["kinds"]
    assert {kind["view"]: kind["removed"] for kind in told["kinds"]} == counts
    assert {kind["left"] for kind in told["kinds"]} == {30, 60}
    assert "exclude='nothing' means no view that is on record" in run.log
    assert "1 of them by what its definition declares" in run.log
    assert "::group::What was removed of each view" in run.log
    assert "250 runs of 4 views deleted in" in run.log
    assert "250 runs of 4 views would be deleted, found in" in dry.log
    assert dict(db.rows("SELECT view, count(*) FROM matviews.mat_view_run_history GROUP BY 1")) == {
        "daily": 30,
        "gone": 30,
        "other": 31,
        "own": 60,
    }


def test_what_a_template_leaves_empty_is_nobody_and_schemas_are_these_alone(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_connection(monkeypatch, db)
    db.execute("CREATE SCHEMA mart")
    hook, ids = _defined(db, "mv", "mart.mv")
    with db.connect() as connection:
        _insert(connection, [(number, 1, 2, ago) for number in ids.values() for ago in range(20, 0, -1)])

    with DAG("prune", schedule=None, render_template_as_native_obj=True) as dag:
        for task, arguments in (
            ("no_views", {"views": "{{ [] }}"}),
            ("no_schemas", {"schemas": "{{ [] }}"}),
            ("mart", {"schemas": "{{ ['mart'] }}"}),
        ):
            PruneMatViewRunsOperator(task_id=task, keep_successes=5, **arguments)  # type: ignore[arg-type]
    run = run_dag(dag)
    assert run.log.count("InvalidDefinition: Which views? views= and schemas= are empty") == 2
    assert run.xcom("mart")["removed"] == 15
    left = dict(db.rows("SELECT mat_view_definition_id, count(*) FROM matviews.mat_view_runs GROUP BY 1"))
    assert left == {ids["mv"]: 20, ids["mart.mv"]: 5}
    assert hook.prune(keep_successes=4, schemas=("mart",)).removed == 1


def test_a_long_table_is_cut_short_in_the_log(db: Database) -> None:
    hook, _ = _defined(db, "mv")
    with db.connect() as connection:
        connection.execute(
            "INSERT INTO matviews.mat_view_definitions (name, schema_name, view_name) "
            "SELECT 's.v' || n, 's', 'v' || n FROM generate_series(1, 60) n"
        )
        numbers = connection.execute("SELECT id FROM matviews.mat_view_definitions WHERE schema_name = 's'").fetchall()
        _insert(connection, [(number, 1, 2, ago) for (number,) in numbers for ago in (3, 2, 1)])
    result = hook.prune(keep_successes=1, schemas=["s"])
    table = result.table()
    assert (result.removed, result.views, len(table)) == (120, 60, 22)
    assert table[0].split() == ["view", "operation", "status", "removed", "left"]
    assert table[-1] == "and 40 more, with 80 runs"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"keep_successes": 0}, "keep_successes=0 is not a whole number"),
        ({"keep_successes": None}, "keeps everything"),
        ({"batch_size": 0}, "batch_size=0 is not a number of runs"),
        ({"pause": -1}, "pause=-1 is not a number of seconds"),
        ({"dry_run": "no"}, "dry_run is true or false"),
        ({"vacuum": 1}, "vacuum is true or false"),
        ({"views": "mv"}, "views is a list or tuple"),
        ({"views": None}, "views is a list or tuple, not None"),
        ({"views": []}, r"Which views\? views= and schemas= are empty"),
        ({"views": [], "schemas": []}, r"Which views\?"),
        ({"schemas": []}, r"Which views\?"),
        ({"policy": RetentionPolicy(keep_failures=1), "max_age": 5}, "Give either a policy or max_age"),
        ({"policy": 5}, "retention is a RetentionPolicy"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(db: Database, arguments: Any, said: str) -> None:
    with pytest.raises(InvalidDefinition, match=said):
        hook_on(db).prune(**arguments)
    assert db.rows("SELECT nspname FROM pg_namespace WHERE nspname = 'matviews'") == []


def test_a_name_that_is_not_on_record_is_refused_and_a_dry_run_makes_no_tables(db: Database) -> None:
    assert hook_on(db).prune(dry_run=True).removed == 0
    assert db.rows("SELECT nspname FROM pg_namespace WHERE nspname = 'matviews'") == []
    with pytest.raises(ViewNotFound, match=r"Nothing is on record of nowhere\.mv"):
        hook_on(db).prune(views=["nowhere.mv"])


def test_what_else_grows_is_pruned_with_it_and_the_room_given_back(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a")
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT a FROM t"))
    hook.install_change_log("mv")
    for _ in range(3):
        db.execute("UPDATE t SET a = a + 1")
    hook.refresh("mv", skip_unchanged=True)
    with db.connect() as connection:
        _insert(connection, [(1, 1, 2, ago) for ago in range(11_000, 0, -1)])
        connection.execute("ANALYZE matviews.mat_view_runs")
    before = db.value("SELECT count(*) FROM matviews.mat_view_changes")
    capsys.readouterr()
    result = hook.prune(keep_successes=900)
    assert result.change_log == before - 1
    assert before > 1
    assert "vacuum=True, or VACUUM" in capsys.readouterr().out
    hook.prune(keep_successes=100, vacuum=True)
    assert "Then VACUUM" in capsys.readouterr().out
    until(db, "SELECT last_vacuum IS NOT NULL FROM pg_stat_user_tables WHERE relname = 'mat_view_runs'")


def test_a_policy_that_only_a_newer_version_understands_keeps_everything(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    hook, ids = _defined(db, "mv", retention={"keep_successes": 1})
    with db.connect() as connection:
        runs = _insert(connection, [(ids["mv"], 1, 2, ago) for ago in range(5, 0, -1)])
        connection.execute(
            """UPDATE matviews.mat_view_definitions SET declaration = declaration || '{"retention": {"keep_odd": 1}}'"""
        )
    assert hook.prune(keep_successes=1).removed == 0
    hook.refresh("mv")
    assert set(runs) < _left(db)
    assert capsys.readouterr().out.count("'keep_odd' is no argument of a retention policy") == 2
