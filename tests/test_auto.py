"""``auto``: chosen from facts that the server and the record tell, and said in one sentence."""

from __future__ import annotations

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_matviews.definition import MatViewDefinition, RefreshStrategy
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.services.catalog import IndexFacts
from airflow_provider_matviews.services.strategies.auto import SMALL, PastRefresh, Situation, choose
from tests.conftest import Database, hook_on

USABLE = IndexFacts("mv_key", "", True, True, True, False, False, ("id",))
PARTIAL = IndexFacts("mv_part", "", True, True, True, True, False, ("id",))
SWAP, CONCURRENT, REGULAR = RefreshStrategy.SWAP, RefreshStrategy.CONCURRENT, RefreshStrategy.REGULAR


def past(
    strategy: RefreshStrategy, ms: int = 1000, changed: float | None = None, size: int = 100 * SMALL
) -> PastRefresh:
    rows = None if changed is None else round(changed * 1000)
    return PastRefresh(strategy.value, ms, 1000, rows, rows, size)


def situation(**facts: object) -> Situation:
    large = {"populated": True, "indexes": [USABLE], "swap_obstacles": [], "heap_bytes": 100 * SMALL}
    return Situation(**{**large, "rows": 1000, "history": [], "max_bloat": 1.5, **facts})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "strategy", "because"),
    [
        ({"populated": False}, REGULAR, "no readers"),
        ({"indexes": [], "swap_obstacles": ["x stands on it"]}, REGULAR, "x stands on it"),
        ({"swap_obstacles": ["x stands on it"]}, CONCURRENT, "x stands on it"),
        ({"indexes": [PARTIAL]}, SWAP, "no unique index"),
        ({"heap_bytes": SMALL}, CONCURRENT, "small"),
        ({}, SWAP, "not known yet"),
        ({"history": [past(CONCURRENT, changed=0.01), past(CONCURRENT, changed=0.02)]}, CONCURRENT, "1.5%"),
        ({"history": [past(CONCURRENT, changed=0.5)]}, SWAP, "50%"),
        ({"history": [past(CONCURRENT, 9000, changed=0.01), past(SWAP, 1000)]}, SWAP, "9 times as long"),
        ({"history": [past(CONCURRENT, changed=0.01), past(SWAP, size=60 * SMALL)]}, SWAP, "takes 1.7 times"),
        ({"history": [past(CONCURRENT, changed=0.01), past(SWAP, size=90 * SMALL)]}, CONCURRENT, "1.0%"),
        # It has grown because there are more rows: no bloat.
        ({"rows": 2000, "history": [past(CONCURRENT, changed=0.01), past(SWAP, size=60 * SMALL)]}, CONCURRENT, "1.0%"),
    ],
)
def test_the_choice_follows_from_the_facts_and_says_them(
    facts: dict[str, object], strategy: RefreshStrategy, because: str
) -> None:
    chosen, reason = choose(situation(**facts))
    assert chosen is strategy
    assert because in reason


@given(
    populated=st.booleans(),
    indexes=st.lists(st.sampled_from([USABLE, PARTIAL])),
    obstacles=st.lists(st.just("an obstacle")),
    size=st.integers(0, 10**12),
    rows=st.none() | st.integers(0, 10**9),
    history=st.lists(
        st.builds(
            PastRefresh,
            st.sampled_from(["swap", "concurrent", "regular"]),
            st.integers(0, 10**7),
            st.none() | st.integers(0, 10**9),
            st.none() | st.integers(0, 10**9),
            st.none() | st.integers(0, 10**9),
            st.none() | st.integers(0, 10**12),
        ),
        max_size=20,
    ),
)
def test_readers_are_blocked_only_where_nothing_else_is_possible(
    populated: bool,
    indexes: list[IndexFacts],
    obstacles: list[str],
    size: int,
    rows: int | None,
    history: list[PastRefresh],
) -> None:
    chosen, reason = choose(Situation(populated, indexes, obstacles, size, rows, history, 1.5))
    possible = {SWAP} if not obstacles else set()
    if USABLE in indexes:
        possible.add(CONCURRENT)
    assert chosen in possible if populated and possible else chosen is REGULAR
    assert reason
    assert "\n" not in reason


def test_auto_learns_from_the_record_of_the_view(db: Database) -> None:
    db.execute(
        "CREATE TABLE source AS SELECT g AS id, 0 AS n, repeat('x', 100) AS filler FROM generate_series(1, 90000) g",
        # Autovacuum would make room for some of the new rows, if it came between.
        "CREATE MATERIALIZED VIEW mv WITH (autovacuum_enabled = off) AS SELECT * FROM source",
        "CREATE UNIQUE INDEX ON mv (id)",
    )
    hook = hook_on(db)
    first = hook.refresh("mv").response
    assert (first["strategy"], "not known yet" in first["reason"]) == ("swap", True)

    db.execute("UPDATE source SET n = 1 WHERE id <= 100")
    measured = hook.refresh("mv", refresh_strategy="concurrent").response
    assert (measured["rows_inserted"], measured["rows_deleted"], measured["dead_rows"]) == (100, 100, 100)
    assert hook.refresh("mv").response["strategy"] == "concurrent"

    # Every row changes twice: the view grows to three times its size.
    for _ in range(2):
        db.execute("UPDATE source SET n = n + 1")
        grown = hook.refresh("mv", refresh_strategy="concurrent").response
    assert grown["size_bytes"] > 2 * first["size_bytes"]
    rebuilt = hook.refresh("mv").response
    assert (rebuilt["strategy"], "times the room" in rebuilt["reason"]) == ("swap", True)
    assert rebuilt["size_bytes"] < 1.2 * first["size_bytes"]
    run = hook.last_run("mv")
    assert run is not None
    assert run.meta["response"]["reason"] == rebuilt["reason"]
    assert run.meta["response"]["server_wal_bytes"] > 1_000_000


def test_settings_hold_for_the_operation_alone_and_the_call_goes_before_the_definition(db: Database) -> None:
    definition = MatViewDefinition(
        name="mv",
        sql="SELECT current_setting('work_mem') AS work_mem, current_setting('hash_mem_multiplier') AS hash",
        session_settings={"work_mem": "77MB", "hash_mem_multiplier": 3},
    )
    hook = hook_on(db)
    with psycopg.connect(db.dsn(), autocommit=True) as connection:
        before = connection.execute("SELECT name, setting FROM pg_settings").fetchall()
        # The same connection again and again, as a pooler gives it out.
        hook._open = lambda: psycopg.connect(db.dsn())  # type: ignore[method-assign]
        hook.create(definition)
        assert db.rows("SELECT * FROM mv") == [("77MB", "3")]
        hook.refresh("mv", session_settings={"work_mem": "88MB"})
        assert db.rows("SELECT * FROM mv") == [("88MB", "3")]
        assert connection.execute("SELECT name, setting FROM pg_settings").fetchall() == before
    run = hook.last_run("mv")
    assert run is not None
    assert run.meta["request"]["session_settings"] == {"work_mem": "88MB"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"work_memm": "1MB"}, "work_memm"),
        ({"work_mem": "many"}, "invalid value"),
        ({"lock_timeout": "5s"}, "relies on it"),
        ({"ROLE": "postgres"}, "relies on it"),
        ({"transaction_read_only": "on"}, "relies on it"),
        ({"shared_buffers": "1GB"}, "cannot be changed"),
        ({"work_mem; DROP TABLE x": "1"}, "not the name"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(db: Database, settings: dict[str, str], words: str) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    with pytest.raises(InvalidDefinition, match=words):
        hook.refresh("mv", session_settings=settings)


def test_statistics_are_renewed_where_a_strategy_leaves_stale_ones(db: Database) -> None:
    db.execute(
        "CREATE TABLE source AS SELECT 1 AS a FROM generate_series(1, 100)",
    )
    distinct = "SELECT n_distinct FROM pg_stats WHERE tablename = 'mv' AND attname = 'a'"
    hook = hook_on(db)
    hook.create(
        MatViewDefinition(name="mv", sql="SELECT * FROM source", storage_parameters={"autovacuum_enabled": False})
    )
    for strategy, statements in (("regular", 1), ("swap", 1)):
        db.execute("INSERT INTO source SELECT max(a) + 1 FROM source, generate_series(1, 100)")
        hook.refresh("mv", refresh_strategy=strategy)
        assert db.rows(distinct) == [(float(db.value("SELECT count(DISTINCT a) FROM source")),)], statements
    db.execute("INSERT INTO source SELECT max(a) + 1 FROM source, generate_series(1, 100)")
    hook.refresh("mv", refresh_strategy="regular", analyze=False)
    assert db.rows(distinct) != [(float(db.value("SELECT count(DISTINCT a) FROM source")),)]


@pytest.mark.parametrize("strategy", ["regular", "swap"])
def test_vacuum_after_commit_marks_pages_all_visible(db: Database, strategy: str) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT g FROM generate_series(1, 1000) g"))
    visible = "SELECT relallvisible = relpages AND relpages > 0 FROM pg_class WHERE relname = 'mv'"
    hook.refresh("mv", refresh_strategy=strategy)
    assert db.value(visible) is False
    hook.refresh("mv", refresh_strategy=strategy, vacuum=True)
    assert db.value(visible) is True
