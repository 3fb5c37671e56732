"""Which rules fire, and only where they should: labelled histories in the real tables."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition, InvalidName, ViewNotFound
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.browsing import RunFilter, run_list
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.services.overview import read_overview
from tests.conftest import Database, examples, hook_on
from tests.histories import (
    CREATE,
    DROP,
    FAILED,
    REFRESH,
    RUNNING,
    SKIPPED,
    SUCCESS,
    Past,
    define,
    live_through,
    steady,
)

HOUR = 3600.0
#: Every rule is on; and "hourly" views have an hour and a half.
RULES: dict[str, Any] = {
    # These views are histories only; what stands is tested below.
    "unreadable": False,
    "consecutive_failures": 3,
    "max_age": timedelta(hours=1.5),
    "max_running": timedelta(minutes=30),
    "max_row_count_ratio": 2,
    "max_bloat": 1.5,
}
LOCKED = {"response": {"status": "skipped", "locked": True}}
UNCHANGED = {"response": {"status": "skipped", "spared": "unchanged"}}

#: label -> the history, and the rules that fire.
HISTORIES: dict[str, tuple[list[Past], set[str]]] = {
    "steady": (steady(), set()),
    "slow once, just now": ([*steady(until=1200), Past(100, seconds=21)], {"slow"}),
    "not slow enough": ([*steady(until=1200), Past(100, seconds=19)], set()),
    "slow once, and well again": ([*steady(until=1200), Past(900, seconds=90), Past(100, seconds=10)], set()),
    "slow, but before that too few": ([*steady(4, until=1200), Past(100, seconds=90)], set()),
    "slow, after as many as are needed": ([*steady(5, until=1200), Past(100, seconds=90)], {"slow"}),
    "twice as slow, and still quick": ([*steady(until=1200, seconds=0.2), Past(100, seconds=0.9)], set()),
    "slow trend": ([Past(600.0 * (30 - n), seconds=10 * 1.1**n) for n in range(30)], {"slow"}),
    "slight trend": ([Past(600.0 * (30 - n), seconds=10 * 1.02**n) for n in range(30)], set()),
    # The quick ones are the skipped ones: were they counted, the others would look slow.
    "skips between": (
        [each for n in range(20) for each in (Past(6300 - 300 * n, SKIPPED, 0.01), Past(6200 - 300 * n, seconds=10))],
        set(),
    ),
    "failing": (
        [*steady(until=3000), *(Past(ago, FAILED) for ago in (2400, 1800, 1200))],
        {"failed", "consecutive_failures"},
    ),
    "failing, and skipped since": (
        [*steady(until=3000), *(Past(ago, FAILED) for ago in (2400, 1800, 1200)), Past(600, SKIPPED, meta=LOCKED)],
        {"failed", "consecutive_failures"},
    ),
    "failed once": ([*steady(until=1200), Past(600, FAILED)], {"failed"}),
    "failed, and well again": ([*steady(until=1800), Past(1200, FAILED), Past(600)], set()),
    "flapping, up": ([Past(600.0 * (21 - n), FAILED if n % 2 == 0 else SUCCESS) for n in range(20)], set()),
    "flapping, down": ([Past(600.0 * (21 - n), FAILED if n % 2 else SUCCESS) for n in range(20)], {"failed"}),
    "stopped running": (steady(until=2 * HOUR), {"late"}),
    "skipped, for it was at work": (
        [*steady(until=2 * HOUR), *(Past(ago, SKIPPED, 0.01, meta=LOCKED) for ago in (1200, 600))],
        {"late"},
    ),
    "skipped, for nothing had changed": (
        [*steady(until=2 * HOUR), *(Past(ago, SKIPPED, 0.01, meta=UNCHANGED) for ago in (1200, 600))],
        set(),
    ),
    "created, never refreshed": ([Past(600, operation=CREATE)], set()),
    "at work": ([*steady(), Past(15, RUNNING)], set()),
    "at work for unusually long": ([*steady(), Past(25, RUNNING)], {"running"}),
    "at work, for the first time": ([Past(6000, operation=CREATE), Past(1700, RUNNING)], {"late"}),
    "at work for longer than is allowed": ([Past(6000, operation=CREATE), Past(1900, RUNNING)], {"late", "running"}),
    "lost": ([*steady(), Past(25, RUNNING)], {"failed"}),
    "as many rows": ([*steady(until=1200, rows=100), Past(600, rows=199)], set()),
    "rows fell": ([*steady(until=1200, rows=100), Past(600, rows=49)], {"row_count"}),
    "rows gone": ([*steady(until=1200, rows=100), Past(600, rows=0)], {"row_count"}),
    "rows jumped": ([*steady(until=1200, rows=100), Past(600, rows=201)], {"row_count"}),
    "rows unknown": ([*steady(until=1200), Past(600, rows=7)], set()),
    "rows fell, but before that too few": ([*steady(4, until=1200, rows=100), Past(600, rows=1)], set()),
    "was empty until now": ([*steady(until=1200, rows=0), Past(600, rows=5)], set()),
    "found unchanged, and skipped for other reasons since": (
        [
            *steady(until=3 * HOUR),
            Past(600, SKIPPED, 0.01, meta=UNCHANGED),
            *(Past(500 - n, SKIPPED, 0.01, meta=LOCKED) for n in range(20)),
        ],
        set(),
    ),
    "its drop was refused": ([*steady(until=1200), Past(600, FAILED, operation=DROP)], set()),
    "dropped": ([*steady(until=2 * HOUR), Past(600, operation=DROP)], set()),
    "dropped, and that failed before": (
        [*steady(until=2 * HOUR), Past(700, FAILED), Past(600, operation=DROP)],
        set(),
    ),
    "gone when we came to drop it": ([*steady(until=2 * HOUR), Past(600, SKIPPED, operation=DROP)], set()),
    "mistyped": ([Past(600, FAILED)], set()),
    "mistyped, and dropped": ([Past(600, SKIPPED, operation=DROP)], set()),
    "cannot be created": ([Past(600, FAILED, operation=CREATE)], {"failed", "late"}),
}


def test_each_rule_fires_exactly_where_it_should(db: Database) -> None:
    ids = define(db, *HISTORIES)
    for label, (history, _) in HISTORIES.items():
        live_through(db, ids[label], history)
    hook = hook_on(db)
    with db.connect() as connection, connection.transaction():
        for label, (history, _) in HISTORIES.items():
            if label != "lost" and any(past.status == RUNNING for past in history):
                key = lock_key(ResolvedName("public", label, label))
                connection.execute(b"SELECT pg_advisory_xact_lock(" + key.as_bytes(None) + b")")
        checkup = hook.check(**RULES)
    fired: dict[str, set[str]] = {label: set() for label in HISTORIES}
    for breach in checkup.breaches:
        fired[ViewName.parse(breach.view).name].add(breach.rule)
    assert fired == {label: rules for label, (_, rules) in HISTORIES.items()}
    passed_over = {label for label in HISTORIES if label.startswith(("dropped", "gone", "mistyped"))}
    assert {each.view_name for each in checkup.metrics} == HISTORIES.keys() - passed_over


def test_views_that_stand_and_were_never_filled_by_us_are_late_in_time(db: Database) -> None:
    ids = define(db, "never_ran", "never_well", "only_skips")
    ids |= define(db, "new", age=60)
    live_through(db, ids["never_well"], [Past(600, FAILED)])
    live_through(db, ids["only_skips"], [Past(ago, SKIPPED, 0.01, meta=LOCKED) for ago in (1800, 1200, 600)])
    for view in ids:
        db.execute(f"CREATE MATERIALIZED VIEW {view} AS SELECT 1 AS a")  # type: ignore[arg-type]
    fired = {(breach.view, breach.rule) for breach in hook_on(db).check(**RULES).breaches}
    assert fired == {("never_ran", "late"), ("never_well", "late"), ("never_well", "failed"), ("only_skips", "late")}


def test_a_view_that_readers_get_an_error_from_is_told_whoever_did_it(db: Database) -> None:
    hook = hook_on(db)
    for name in ("fine", "gone", "renamed", "emptied", "bare"):
        hook.create(MatViewDefinition(name=name, sql="SELECT 1 AS a"), with_data=name != "bare")
    db.execute(
        "DROP MATERIALIZED VIEW gone",
        "ALTER MATERIALIZED VIEW renamed RENAME TO other",
        "REFRESH MATERIALIZED VIEW emptied WITH NO DATA",
    )
    told = {breach.view: breach.message for breach in hook.check().breaches if breach.rule == "unreadable"}
    assert told.keys() == {"gone", "renamed", "emptied", "bare"}
    assert "somebody else has dropped or renamed it" in told["gone"]
    assert "it holds no data" in told["bare"]
    assert hook.check(unreadable=False).healthy
    # What was meant is said by a drop.
    hook.delete("gone")
    assert "gone" not in {breach.view for breach in hook.check().breaches}


def test_looking_waits_for_nobody_and_makes_nothing(db: Database) -> None:
    hook = hook_on(db)
    with pytest.raises(ViewNotFound, match="no view to look at"):
        hook.check()
    assert hook.metrics() == []
    assert db.value("SELECT to_regnamespace('matviews') IS NULL")
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    with db.connect() as connection, connection.transaction():
        # Its lock keeps everybody out until it commits.
        connection.execute("REFRESH MATERIALIZED VIEW mv")
        assert hook.check(max_bloat=2, max_row_count_ratio=2).healthy
        assert [each.state.value for each in hook.browse(read_overview) or []] == ["fresh"]


def test_what_cannot_be_judged_and_what_means_nothing_is_said(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"), row_count_strategy="none")
    arguments: dict[str, Any] = {"max_row_count_ratio": 2, "overrides": {"publik.*": {"max_age": 1}}}
    assert hook.check(["*.*", "reports.*"], schemas=["nowhere"], **arguments).healthy
    out = capsys.readouterr().out
    for told in ("max_row_count_ratio says nothing of mv", "'publik.*' means none", "'reports.*'", "'nowhere'"):
        assert told in out


def test_a_role_that_may_only_read_may_look_also_at_what_others_wrote_there(db: Database) -> None:
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    db.execute(
        "INSERT INTO matviews.mat_view_runs (mat_view_definition_id, status, operation, finished_at, error, meta) "
        """VALUES (1, 3, 1, now(), '"odd"', '{"row_count_after": "x", "response": []}')""",
        "INSERT INTO matviews.mat_view_runs (mat_view_definition_id, status, operation) VALUES (1, 1, 1)",
    )
    role = db.role()
    with db.connect() as connection:
        for grant in ("USAGE ON SCHEMA matviews", "SELECT ON ALL TABLES IN SCHEMA matviews"):
            connection.execute(sql.SQL("GRANT {} TO {}").format(sql.SQL(grant), sql.Identifier(role)))  # type: ignore[arg-type]
    reader = hook_on(db, role)
    assert {breach.rule for breach in reader.check(max_row_count_ratio=2, max_bloat=2).breaches} == {"failed"}
    assert [each["status"] for each in reader.browse(lambda ledger: run_list(ledger, RunFilter(), 9)) or []]


def test_a_breach_says_what_is_so_since_when_and_what_to_do(db: Database) -> None:
    ids = define(db, "mv")
    *_, first, last = live_through(db, ids["mv"], [*steady(until=1800), Past(1200, FAILED), Past(600, FAILED)])
    (breach,) = hook_on(db).check(unreadable=False).breaches
    told = breach.as_dict()
    assert (told["view"], told["rule"], told["value"], told["mat_view_run_id"]) == ("mv", "failed", 2, last)
    assert "the last of 2 in a row: DivisionByZero: division by zero" in told["message"]
    assert f"run {last}" in told["what_to_do"]
    assert breach.since == db.value("SELECT created_at FROM matviews.mat_view_runs WHERE id = %s", (first,))


def test_rules_differ_by_view_and_pattern_and_the_later_go_before(db: Database) -> None:
    db.execute("CREATE SCHEMA app")
    ids = define(db, "app.a", "app.b", "c")
    for each in ids.values():
        live_through(db, each, steady(until=HOUR))
    hook = hook_on(db)

    def late(**arguments: Any) -> list[str]:
        return [breach.view for breach in hook.check(unreadable=False, **arguments).breaches]

    assert late(max_age=1800) == ["app.a", "app.b", "c"]
    assert late(max_age=1800, overrides={"app.*": {"max_age": None}}) == ["c"]
    assert late(overrides={"app.*": {"max_age": 1800}, "app.b": {"max_age": 2 * HOUR}}) == ["app.a"]
    assert late(overrides={"*": {"max_age": 1800}}) == ["c"]
    assert late(max_age=1800, views=["app.*"], exclude=["app.a"]) == ["app.b"]
    assert late(max_age=1800, views=(), schemas=["app"]) == ["app.a", "app.b"]


def test_a_name_may_be_of_a_view_that_stands_and_is_not_on_record(db: Database) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a", "CREATE TABLE t (a int)")
    hook = hook_on(db)
    assert hook.metrics(["*.*"]) == [], "a pattern means what is on record"
    with pytest.raises(ViewNotFound, match="no view to look at"):
        hook.check(["*.*"])
    (breach,) = hook.check(["public.mv"], max_age=60).breaches
    assert (breach.view, breach.rule) == ("mv", "late")
    assert hook.check(["mv"]).healthy
    for name in ("t", "nowhere"):
        with pytest.raises(ViewNotFound, match=name):
            hook.check([name])


def test_a_dropped_view_is_passed_over_unless_it_is_named(db: Database) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    assert [each.view for each in hook.metrics()] == ["mv"]
    hook.delete("mv")
    assert hook.metrics() == []
    with pytest.raises(ViewNotFound, match="mv: dropped"):
        hook.metrics(["mv"])


def test_bloat_is_measured_against_the_last_rebuild(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT g AS id, repeat('x', 100) AS pad FROM generate_series(1, 100000) g")
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT * FROM t", unique_index_columns=("id",)))
    # Created is as good as rebuilt.
    (fresh,) = hook.metrics()
    assert fresh.bloat == pytest.approx(1.0, rel=0.02)
    assert hook.check(max_bloat=1.5).healthy
    db.execute("DELETE FROM t WHERE id % 4 <> 0")
    hook.refresh("mv", refresh_strategy="concurrent")
    (breach,) = hook.check(max_bloat=1.5).breaches
    assert breach.rule == "bloat"
    assert breach.value == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_duration_ratio": 1}, "above 1"),
        ({"max_duration_ratio": float("nan")}, "above 1"),
        ({"max_row_count_ratio": "2"}, "above 1"),
        ({"max_age": 0}, "max_age"),
        ({"max_age": "1h"}, "max_age"),
        ({"overrides": ["a"]}, "overrides"),
        ({"overrides": {1: {}}}, "overrides"),
        ({"window": 2000}, "window"),
        ({"min_samples": True}, "min_samples"),
        ({"consecutive_failures": 0}, "consecutive_failures"),
        ({"failed": "no"}, "failed"),
        ({"min_duration": -1}, "min_duration"),
        ({"max_agee": 1}, "max_agee"),
        ({"overrides": {"a": {"max_agee": 1}}}, "max_agee"),
        ({"overrides": {"a": 5}}, "mapping"),
        ({"views": "mv"}, "views"),
        ({"views": []}, "Which views"),
    ],
)
def test_bad_rules_are_refused_before_anything_is_read(db: Database, arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidDefinition, match=error):
        hook_on(db).check(**arguments)
    assert db.value("SELECT to_regnamespace('matviews') IS NULL")


def test_a_name_in_overrides_has_to_be_one(db: Database) -> None:
    with pytest.raises(InvalidName):
        hook_on(db).check(overrides={"a b": {"failed": False}})


_PASTS = st.builds(
    Past,
    # Few moments: several runs fall on the same.
    ago=st.integers(1, 12).map(lambda each: each * 10_000.0),
    status=st.sampled_from([SUCCESS, FAILED, SKIPPED]),
    seconds=st.integers(1, 60).map(float),
    operation=st.sampled_from([CREATE, REFRESH, REFRESH, REFRESH]),
    rows=st.none() | st.integers(0, 1000),
)


@settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories=st.lists(st.lists(_PASTS, max_size=12), min_size=1, max_size=3))
def test_what_is_read_is_what_the_runs_say(db: Database, histories: list[list[Past]]) -> None:
    """Beside a model that goes through every run in Python."""
    if db.value("SELECT to_regclass('matviews.mat_view_runs') IS NOT NULL"):
        db.execute("TRUNCATE matviews.mat_view_definitions CASCADE")
    ids = define(db, *(f"v{number}" for number in range(len(histories))))
    # The same moment for runs of the same age, as a clock that stands still would have it.
    for (_, definition), history in zip(ids.items(), histories, strict=True):
        live_through(db, definition, history)
        db.execute("UPDATE matviews.mat_view_runs SET created_at = date_trunc('hour', created_at) WHERE status <> 1")
    for each in hook_on(db).metrics(window=3):
        runs = db.rows(
            "SELECT id, operation, status, created_at, finished_at, duration_ms, (meta->>'row_count_after')::bigint "
            "FROM matviews.mat_view_runs WHERE mat_view_definition_id = %s ORDER BY created_at DESC, id DESC",
            (each.definition_id,),
        )
        ended = [run for run in runs if run[2] in (SUCCESS, FAILED)]
        good = [run for run in runs if run[2] == SUCCESS]
        refreshed = [run for run in good if run[1] == REFRESH][:4]
        failures = [run for run in ended if run[2] == FAILED and (not good or run[3] > good[0][3])]
        assert (each.last_attempt and each.last_attempt.id) == (ended[0][0] if ended else None)
        assert each.durations_ms == tuple(run[5] for run in refreshed)
        assert each.row_counts == tuple(run[6] for run in refreshed)
        assert each.consecutive_failures == len(failures)
        assert each.failing_since == (failures[-1][3] if failures else None)
        assert each.last_filled_at == (good[0][4] if good else None)
