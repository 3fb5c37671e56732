"""Many views in one task: which, in which order, how many at a time, and what one that fails means to the others."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, LiteralString

import psycopg
import pytest
from airflow.models.asset import AssetEvent, AssetModel
from airflow.sdk import DAG, AssetAlias
from airflow.sdk.exceptions import TaskDeferred
from airflow.utils.session import create_session
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql
from sqlalchemy import select

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import (
    FleetFailed,
    InvalidDefinition,
    MatViewError,
    OperationCancelled,
    ViewNotFound,
)
from airflow_provider_matviews.operators.matview import RefreshMatViewsOperator
from airflow_provider_matviews.services.fleet import Fleet, Outcome, carry_out
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.services.selection import Selection
from airflow_provider_matviews.triggers.matview import MatViewTrigger
from tests.airflow_dags import run_dag, set_connection
from tests.conftest import Database, hook_on
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

#: a1 -> b1 -> c1 and a2 -> b2, b2 through a plain view; alone reads nothing.
ESTATE: tuple[LiteralString, ...] = (
    "CREATE SCHEMA s",
    "CREATE TABLE t AS SELECT 1 AS a",
    "CREATE TABLE u AS SELECT 1 AS a",
    "CREATE MATERIALIZED VIEW s.a1 AS SELECT a FROM t",
    "CREATE MATERIALIZED VIEW s.a2 AS SELECT a FROM u",
    "CREATE VIEW s.between AS SELECT a FROM s.a2",
    "CREATE MATERIALIZED VIEW s.b1 AS SELECT a FROM s.a1",
    "CREATE MATERIALIZED VIEW s.b2 AS SELECT a FROM s.between",
    "CREATE MATERIALIZED VIEW c1 AS SELECT a FROM s.b1",
    'CREATE MATERIALIZED VIEW "Alone, and odd" AS SELECT 1 AS a',
)
ALL = ['"Alone, and odd"', "c1", "s.a1", "s.a2", "s.b1", "s.b2"]


def _views(outcomes: Sequence[Outcome], *statuses: str) -> list[str]:
    return sorted(outcome.view for outcome in outcomes if not statuses or outcome.status in statuses)


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        ({"views": ["*.*"]}, ALL),
        ({"views": ["s.*"]}, ["s.a1", "s.a2", "s.b1", "s.b2"]),
        ({"schemas": ["s"]}, ["s.a1", "s.a2", "s.b1", "s.b2"]),
        ({"views": ["*"]}, ['"Alone, and odd"', "c1"]),
        ({"views": ["public.c?", "s.[ab]2"]}, ["c1", "s.a2", "s.b2"]),
        ({"views": ["S.A1"]}, ["s.a1"]),
        ({"views": ['"Alone, and odd"', "public.c1"]}, ['"Alone, and odd"', "c1"]),
        ({"views": ["s.a1"], "feeds": True}, ["c1", "s.a1", "s.b1"]),
        ({"views": ["c1"], "needs": True}, ["c1", "s.a1", "s.b1"]),
        ({"views": ["s.b1"], "feeds": True, "needs": True}, ["c1", "s.a1", "s.b1"]),
        ({"views": ["*.*"], "exclude": ["s.*", "c1"]}, ['"Alone, and odd"']),
        ({"views": ["nothing.*"]}, []),
    ],
)
def test_views_are_chosen_by_name_by_pattern_and_by_what_they_read(
    db: Database, selection: dict[str, Any], chosen: list[str]
) -> None:
    db.execute(*ESTATE)
    result = hook_on(db).refresh_many(**selection)
    assert _views(result.outcomes) == chosen
    assert result.count("updated") == len(chosen)
    runs = db.rows("SELECT view FROM matviews.mat_view_run_history ORDER BY id")
    place = {view: number for number, (view,) in enumerate(runs)}
    assert sorted(place) == chosen
    for before, after in (("s.a1", "s.b1"), ("s.b1", "c1"), ("s.a2", "s.b2")):
        if before in place and after in place:
            assert place[before] < place[after]


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({}, InvalidDefinition, "Which views"),
        ({"views": "mv"}, InvalidDefinition, "views"),
        ({"views": ["no such view here"]}, InvalidDefinition, "does not parse"),
        ({"views": ["mv", "absent"]}, ViewNotFound, "absent"),
        ({"views": ["t"]}, ViewNotFound, "t"),
        ({"schemas": ["analitics"]}, ViewNotFound, "no schema analitics"),
        ({"views": ["*.*"], "at_once": 0}, InvalidDefinition, "at_once=0"),
        ({"views": ["*.*"], "at_once": True}, InvalidDefinition, "at_once=True"),
        ({"views": ["*.*"], "feeds": "yes"}, InvalidDefinition, "feeds"),
        ({"views": ["*.*"], "refresh_strategy": "fast"}, InvalidDefinition, "refresh_strategy"),
        ({"views": ["*.*"], "timeout": -1}, InvalidDefinition, "timeout=-1"),
        ({"views": ["*.*"], "max_staleness": 5}, InvalidDefinition, "skip_unchanged"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_touched(
    db: Database, arguments: dict[str, Any], error: type[MatViewError], told: str
) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a", "CREATE MATERIALIZED VIEW mv AS SELECT a FROM t")
    before = db.value("SELECT xmin::text FROM pg_class WHERE relname = 'mv'")
    with pytest.raises(error, match=told):
        hook_on(db).refresh_many(**arguments)
    assert db.value("SELECT xmin::text FROM pg_class WHERE relname = 'mv'") == before


def test_one_that_fails_stops_what_reads_it_and_nothing_else(db: Database) -> None:
    db.execute(*ESTATE, "CREATE MATERIALIZED VIEW broken AS SELECT 1 / a AS a FROM t")
    db.execute(
        "CREATE MATERIALIZED VIEW on_broken AS SELECT a FROM broken",
        "CREATE MATERIALIZED VIEW on_both AS SELECT a FROM on_broken UNION SELECT a FROM s.a1",
        "UPDATE t SET a = 0",
    )
    with pytest.raises(FleetFailed, match=r"1 of 9 views could not be refreshed, and 2 more") as failed:
        hook_on(db).refresh_many(["*.*"], at_once=3)
    assert (failed.value.failed, sorted(failed.value.stopped)) == (("broken",), ["on_both", "on_broken"])
    result = failed.value.result
    assert result is not None
    assert _views(result.outcomes, "updated") == ALL
    table = result.table()
    assert table[1].split()[:2] == ["broken", "failed"]
    assert "division by zero" in table[1]
    assert db.rows(
        "SELECT view, status, coalesce(error_class, meta->'response'->>'reason') FROM matviews.mat_view_run_history "
        "WHERE status <> 'success' ORDER BY view"
    ) == [
        ("broken", "failed", "DivisionByZero"),
        ("on_both", "skipped", "on_broken, which it reads, was not refreshed"),
        ("on_broken", "skipped", "broken, which it reads, was not refreshed"),
    ]
    db.execute("UPDATE t SET a = 1")
    again = hook_on(db).refresh_many(["*.*"], skip_unchanged=True)
    assert _views(again.outcomes, "updated") == ["broken", "c1", "on_both", "on_broken", "s.a1", "s.b1"]


def test_only_what_reads_a_changed_source_is_refreshed(db: Database) -> None:
    db.execute(*ESTATE)
    hook = hook_on(db)
    hook.refresh_many(["*.*"])
    unchanged = hook.refresh_many(["*.*"], skip_unchanged=True)
    assert (unchanged.count("skipped"), len(unchanged.outcomes)) == (6, 6)
    db.execute("INSERT INTO u VALUES (2)")
    until(db, "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")
    stale = hook.refresh_many(["*.*"], stale=True, dry_run=True)
    assert _views(stale.outcomes) == ["s.a2", "s.b2"]
    result = hook.refresh_many(["*.*"], skip_unchanged=True)
    assert _views(result.outcomes, "updated") == ["s.a2", "s.b2"]
    assert db.rows(
        "SELECT view, count(*) FROM matviews.mat_view_run_history WHERE status = 'skipped' GROUP BY 1 ORDER BY 1"
    ) == [('"Alone, and odd"', 2), ("c1", 2), ("s.a1", 2), ("s.a2", 1), ("s.b1", 2), ("s.b2", 1)]
    runs = len(hook.runs(limit=100))
    assert hook.refresh_many(["*.*"], stale=True).outcomes == ()
    assert len(hook.runs(limit=100)) == runs


def test_what_a_definition_says_that_it_comes_after_counts_too(db: Database) -> None:
    hook = hook_on(db)
    # Only people know that what the first one leaves matters to the other.
    hook.create(MatViewDefinition(name="a_first", sql="SELECT 1 AS a", depends_on=["z_last"]))
    hook.create(MatViewDefinition(name="z_last", sql="SELECT 1 AS a"))
    assert [outcome.view for outcome in hook.refresh_many(["*"]).outcomes] == ["z_last", "a_first"]


def _gated(db: Database, count: int) -> None:
    db.execute(GATE, "CREATE TABLE t AS SELECT 1 AS a")
    with db.connect() as connection:
        for number in range(count):
            connection.execute(f"CREATE MATERIALIZED VIEW v{number} AS SELECT gate() AS g, a FROM t WITH NO DATA")


@pytest.mark.parametrize("at_once", [1, 3])
def test_so_many_at_a_time_and_no_more(db: Database, at_once: int) -> None:
    _gated(db, 5)
    hook = hook_on(db)
    with gate_closed(db) as let_go_on, beside(lambda: hook.refresh_many(["v*"], at_once=at_once), let_go_on) as all_:
        waiting = sql.SQL("SELECT count(*) = {} FROM pg_locks WHERE objid = 4711 AND NOT granted").format(at_once)
        until(db, waiting)
        assert db.value("SELECT count(*) FROM matviews.mat_view_runs") == at_once
        assert not all_.done()
        let_go_on()
        assert all_.result().count("updated") == 5


def test_cancelled_none_is_begun_any_more_and_what_ran_is_undone(db: Database) -> None:
    _gated(db, 5)
    hook = hook_on(db)
    with gate_closed(db) as let_go_on, beside(lambda: hook.refresh_many(["v*"], at_once=2), let_go_on) as all_:
        until(db, "SELECT count(*) = 2 FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted")
        hook.refuse("somebody said so")
        with pytest.raises(OperationCancelled, match="somebody said so"):
            all_.result(20)
    assert (
        db.rows("SELECT status, error_class FROM matviews.mat_view_run_history")
        == [("failed", "OperationCancelled")] * 2
    )
    assert db.value("SELECT count(*) FROM pg_matviews WHERE ispopulated") == 0


def test_a_signal_to_the_task_reaches_the_server_while_its_loop_sleeps(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Airflow's task runner does on SIGTERM: ``on_kill`` in the handler, in the thread of the event loop."""
    _gated(db, 2)
    set_connection(monkeypatch, db)
    operator = RefreshMatViewsOperator(task_id="fleet", views=["v*"], at_once=2)
    before = signal.signal(signal.SIGTERM, lambda number, frame: operator.on_kill())

    def strike() -> None:
        until(db, AT_THE_GATE)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    whose = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, try_number=1)
    try:
        with gate_closed(db), beside(strike) as struck:
            with pytest.raises(OperationCancelled, match="Airflow stopped the task"):
                operator.execute({"ti": whose})  # type: ignore[typeddict-item]
            struck.result()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert db.value("SELECT count(*) FROM matviews.mat_view_run_history WHERE dag_id = 'd'") == 2


def test_a_stopped_trigger_ends_all_that_it_runs_and_begins_no_more(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    _gated(db, 5)
    set_connection(monkeypatch, db)
    trigger = MatViewTrigger(
        operation="refresh_many",
        subject=None,
        arguments={"views": ["v*"], "at_once": 2},
        conn_id="postgres_default",
        tracking_schema="matviews",
        context={"dag_id": "d"},
        deferral="this one",
        deadline=time.time() + 60,
        timeout=60,
    )
    assert type(trigger)(**trigger.serialize()[1]).serialize() == trigger.serialize()

    async def stop() -> None:
        firing = asyncio.ensure_future(anext(trigger.run()))
        await asyncio.to_thread(until, db, AT_THE_GATE)
        firing.cancel("__airflow_user_action__")
        with pytest.raises(asyncio.CancelledError):
            await firing

    with gate_closed(db):
        asyncio.run(stop())
    until(db, "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")
    runs = db.rows("SELECT status, error_message FROM matviews.mat_view_run_history")
    assert {status for status, _ in runs} == {"failed"}
    assert all("Airflow stopped the deferred task" in message for _, message in runs)
    assert 1 <= len(runs) <= 2


def test_all_of_them_together_get_no_more_time_than_the_task_has(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a")
    for number in range(3):
        with db.connect() as connection:
            connection.execute(
                f"CREATE MATERIALIZED VIEW v{number} AS SELECT pg_sleep(1.2)::text AS s FROM t WITH NO DATA"
            )
    hook = hook_on(db, longest=2.0)
    with pytest.raises(FleetFailed) as failed:
        hook.refresh_many(["v*"], at_once=1)
    assert failed.value.result is not None
    assert [outcome.status for outcome in failed.value.result.outcomes] == ["updated", "failed", "stopped"]
    reasons = [outcome.reason or "" for outcome in failed.value.result.outcomes]
    assert "Timed out after 2 s" in reasons[1]
    assert "all the time that was given (2 s) was over" in reasons[2]
    assert [run.status for run in hook.runs()] == ["skipped", "failed", "success"]


def test_parallel_queries_are_left_to_those_that_ask_for_them(db: Database) -> None:
    shown = "SELECT current_setting('max_parallel_workers_per_gather') AS workers"
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="a", sql=shown))
    hook.create(MatViewDefinition(name="b", sql=shown, session_settings={"max_parallel_workers_per_gather": 3}))
    workers: LiteralString = "SELECT a.workers, b.workers FROM a, b"
    hook.refresh_many(["*"], at_once=2)
    assert db.rows(workers) == [("0", "3")]
    hook.refresh_many(["*"], at_once=2, session_settings={"max_parallel_workers_per_gather": 1})
    assert db.rows(workers) == [("1", "1")]
    hook.refresh_many(["*"], at_once=1)
    assert db.rows(workers) == [("2", "3")]


def test_a_dry_run_changes_and_records_nothing(db: Database) -> None:
    db.execute(*ESTATE)
    before = db.rows("SELECT relname, xmin::text FROM pg_class WHERE relkind = 'm' ORDER BY 1")
    result = hook_on(db).refresh_many(["*.*"], dry_run=True, skip_unchanged=True)
    assert all(outcome.response and outcome.response.response["sql"] for outcome in result.outcomes)
    assert db.rows("SELECT relname, xmin::text FROM pg_class WHERE relkind = 'm' ORDER BY 1") == before
    assert db.value("SELECT to_regclass('matviews.mat_view_runs')") is None


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_task_tells_of_every_view_that_it_refreshed_and_of_no_other(
    db: Database, monkeypatch: pytest.MonkeyPatch, deferrable: bool
) -> None:
    db.execute(*ESTATE)
    set_connection(monkeypatch, db)
    how: dict[str, Any] = {"views": ["*.*"], "at_once": 2, "deferrable": deferrable}
    with DAG(f"fleet_{deferrable}", schedule=None) as dag:
        everything = RefreshMatViewsOperator(task_id="everything", outlets=[AssetAlias(f"all_{deferrable}")], **how)
        nothing = RefreshMatViewsOperator(
            task_id="nothing", outlets=[AssetAlias(f"none_{deferrable}")], skip_unchanged=True, **how
        )
        broken = RefreshMatViewsOperator(task_id="broken", views=["absent"], deferrable=deferrable)
        everything >> [nothing, broken]
    run = run_dag(dag)
    assert run.states == {"everything": "success", "nothing": "skipped", "broken": "failed"}
    summary = run.xcom("everything")
    assert (summary["updated"], summary["skipped"], len(summary["views"])) == (6, 0, 6)
    assert "No materialized view stands under absent" in run.log
    assert "view              status   strategy" in run.log
    with create_session() as session:
        events = session.scalars(
            select(AssetEvent)
            .join(AssetModel, AssetModel.id == AssetEvent.asset_id)
            .where(AssetModel.uri.contains(f"/{db.name}/"))
        ).all()
        uris = sorted(event.asset.uri.partition(db.name)[2] for event in events)
    assert uris == [
        "/public/Alone%2C%20and%20odd",
        "/public/c1",
        "/s/a1",
        "/s/a2",
        "/s/b1",
        "/s/b2",
    ]
    assert {event.extra["status"] for event in events} == {"updated"}
    assert all(event.extra["row_count_after"] == 1 and event.extra["duration_ms"] >= 0 for event in events)


def test_a_retry_counts_what_the_tries_before_it_did(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 0 AS a")
    db.execute(
        "CREATE MATERIALIZED VIEW good AS SELECT a FROM t",
        "CREATE MATERIALIZED VIEW bad AS SELECT 1 / a AS a FROM t WITH NO DATA",
    )
    until(db, "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")
    whose = {"dag_id": "d", "task_id": "t", "run_id": "r", "map_index": -1}
    again: dict[str, Any] = {"views": ["*"], "skip_unchanged": True}
    for attempt in (1, 2):
        with pytest.raises(FleetFailed) as failed:
            hook_on(db, context={**whose, "try_number": attempt}).refresh_many(**again)
        assert failed.value.result is not None
        assert _views(failed.value.result.outcomes, "updated") == ["good"]
    assert db.value("SELECT count(*) FROM matviews.mat_view_runs WHERE status = 2") == 1
    other = hook_on(db, context={**whose, "run_id": "another"}).refresh_many(exclude=["bad"], **again)
    assert _views(other.outcomes, "skipped") == ["good"]


def test_where_the_server_has_no_room_the_others_wait_for_it(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    _gated(db, 5)
    role = db.role("LOGIN IN ROLE postgres CONNECTION LIMIT 5")
    hook = hook_on(db, role)
    # A session that has ended makes room as soon as the server gets round to it.
    monkeypatch.setattr("airflow_provider_matviews.services.fleet._AGAIN_AFTER", (0.05,) * 600)
    with gate_closed(db) as let_go_on, beside(lambda: hook.refresh_many(["v*"], at_once=5), let_go_on) as all_:
        until(db, "SELECT count(*) >= 1 FROM pg_locks WHERE objid = 4711 AND NOT granted")
        let_go_on()
        assert all_.result().count("updated") == 5
    monkeypatch.setattr("airflow_provider_matviews.services.fleet._AGAIN_AFTER", (0.05, 0.1))
    # With none at all it is told, and on record as soon as there is one again.
    until(db, "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")
    with db.connect() as connection:
        connection.execute(sql.SQL("ALTER ROLE {} CONNECTION LIMIT 1").format(sql.Identifier(role)))
    with pytest.raises(FleetFailed, match="5 of 5 views were left as they are") as failed:
        hook.refresh_many(["v*"])
    assert sorted(failed.value.stopped) == [f"v{number}" for number in range(5)]
    assert db.value("SELECT count(*) FROM matviews.mat_view_runs WHERE status = 4") == 5


def test_what_people_say_wrongly_is_told_and_what_the_server_knows_holds(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="z_base", sql="SELECT 1 AS a", depends_on=["a_top"]))
    hook.create(MatViewDefinition(name="a_top", sql="SELECT a FROM z_base"))
    with caplog.at_level("WARNING"):
        result = hook.refresh_many(["*"], exclude=["typo"])
    assert [outcome.view for outcome in result.outcomes] == ["z_base", "a_top"]


def test_copies_of_one_deferred_fleet_do_each_view_once(db: Database) -> None:
    db.execute(*ESTATE)

    async def twice() -> list[Any]:
        copies = [hook_on(db).arefresh_many(["*.*"], at_once=2, deferral="one and the same") for _ in range(2)]
        return list(await asyncio.gather(*copies))

    first, second = asyncio.run(twice())
    assert first.count("updated") == second.count("updated") == 6
    assert db.rows("SELECT count(*), count(DISTINCT view) FROM matviews.mat_view_run_history") == [(6, 6)]


def test_it_is_refused_before_it_is_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    whose = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, try_number=1)
    for wrong in ({}, {"views": ["*.*"], "timeout": 0}, {"views": "all"}):
        with pytest.raises(InvalidDefinition):
            RefreshMatViewsOperator(task_id="t", deferrable=True, **wrong).execute({"ti": whose})  # type: ignore[typeddict-item]
    with pytest.raises(TaskDeferred):
        RefreshMatViewsOperator(task_id="t", deferrable=True, views=["*"]).execute({"ti": whose})  # type: ignore[typeddict-item]


NAMES = [f"v{number}" for number in range(9)]


@given(
    st.dictionaries(st.sampled_from(NAMES), st.sets(st.sampled_from(NAMES))),
    st.sets(st.sampled_from(NAMES)),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_whatever_fails_all_that_does_not_read_it_is_refreshed_in_order(
    needs: dict[str, set[str]], broken: set[str], at_once: int, dice: Any
) -> None:
    # Only to those before it: no circles.
    fleet = Fleet({name: frozenset(need for need in needs.get(name, ()) if need < name) for name in NAMES})
    running: set[str] = set()
    done: list[str] = []

    async def refresh(view: str) -> ServiceResponse:
        assert fleet.needs[view] <= set(done)
        running.add(view)
        assert len(running) <= at_once
        for _ in range(dice.randint(0, 3)):
            await asyncio.sleep(0)
        running.remove(view)
        if view in broken:
            raise psycopg.errors.DivisionByZero("broken")
        done.append(view)
        return ServiceResponse("updated", {}, {"view": view})

    asyncio.run(carry_out(fleet, refresh, at_once=at_once, tell=lambda outcome: None))
    bad: set[str] = set()
    for name in NAMES:
        if fleet.needs[name] & bad:
            assert fleet.outcomes[name].status == "stopped"
            bad.add(name)
        elif name in broken:
            assert fleet.outcomes[name].status == "failed"
            bad.add(name)
        else:
            assert fleet.outcomes[name].status == "updated"


def test_a_selection_is_what_it_says() -> None:
    assert Selection(["a.b"]).exact_names == ["a.b"]
    # Quoted, a star is a character like any other.
    assert Selection(['"odd*"']).exact_names == ['"odd*"']
