"""The trigger that watches views: it says so when they are stale, in time, once, and again where nothing came of it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, LiteralString

import pytest
from airflow.models.trigger import Trigger
from airflow.sdk.serde import serialize
from psycopg import sql

from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.services.staleness import Judgement
from airflow_provider_matviews.services.watching import Rhythm, Watched
from airflow_provider_matviews.triggers.changes import StaleMatViewsTrigger
from tests.airflow_dags import set_connection
from tests.conftest import Database, hook_on
from tests.racing import until

#: Long enough that it does not come in a test.
NEVER = 3600.0
WATCHERS: LiteralString = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'matviews'"
)


@pytest.fixture(autouse=True)
def _connection(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    set_connection(monkeypatch, db)


@pytest.fixture
def views(db: Database) -> Database:
    """Two views ``a`` and ``b`` of a table each, whose changes are logged, refreshed and recorded."""
    for name in ("a", "b"):
        with db.connect() as connection:
            table = sql.Identifier(f"source_{name}")
            connection.execute(sql.SQL("CREATE TABLE {} (id integer)").format(table))
            connection.execute(
                sql.SQL("CREATE MATERIALIZED VIEW {} AS SELECT count(*) AS rows FROM {}").format(
                    sql.Identifier(name), table
                )
            )
    hook_on(db).install_change_log("a", "b", bell=True)
    refresh(db, "a", "b")
    return db


def refresh(db: Database, *views: str) -> None:
    for view in views:
        hook_on(db).refresh(view, refresh_strategy="regular")


def trigger(**arguments: Any) -> StaleMatViewsTrigger:
    """Return a trigger as the triggerer has it: it went through Airflow's database."""
    usual: dict[str, Any] = {"views": ["a", "b"], "debounce": 0, "poll_interval": 0.1, "truth": "change_log"}
    path, kwargs = StaleMatViewsTrigger(**{**usual, **arguments}).serialize()
    row = Trigger(classpath=path, kwargs={})
    row.encrypted_kwargs = json.dumps(serialize(kwargs))
    assert row.classpath == "airflow_provider_matviews.triggers.changes.StaleMatViewsTrigger"
    return StaleMatViewsTrigger(**row.kwargs)


class Heard:
    """The events of a trigger that runs beside the test."""

    def __init__(self, trigger: StaleMatViewsTrigger) -> None:
        self.payloads: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self.task = asyncio.create_task(self._listen(trigger))

    async def _listen(self, trigger: StaleMatViewsTrigger) -> None:
        async for event in trigger.run():
            self.payloads.append(json.loads(json.dumps(event.payload)))
            self._news.set()

    async def wait(self, count: int) -> list[list[str]]:
        """Wait until so many events have been heard, and return the views that they name."""
        async with asyncio.timeout(10):
            while len(self.payloads) < count:
                self._news.clear()
                await self._news.wait()
        return self.views

    @property
    def views(self) -> list[list[str]]:
        return [payload["views"] for payload in self.payloads]


@asynccontextmanager
async def _listening(*triggers: StaleMatViewsTrigger) -> AsyncIterator[list[Heard]]:
    heard = [Heard(trigger) for trigger in triggers]
    try:
        yield heard
    finally:
        for each in heard:
            each.task.cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(*(each.task for each in heard), return_exceptions=True)


def listen(scenario: Callable[..., Awaitable[None]], *triggers: StaleMatViewsTrigger) -> None:
    """Run triggers as a triggerer does, until the scenario is over, which is given what is heard of them."""

    async def run() -> None:
        async with _listening(*triggers) as heard:
            await scenario(*heard)

    asyncio.run(run())


async def change(db: Database, view: str = "a") -> None:
    statement = sql.SQL("INSERT INTO {} VALUES (1)").format(sql.Identifier(f"source_{view}"))

    def write() -> None:
        with db.connect() as connection:
            connection.execute(statement)

    await asyncio.to_thread(write)


async def looked(db: Database, times: int = 2) -> None:
    """Wait until a watcher has looked so many times; the second time at nothing but what there is now."""
    for _ in range(times):
        # What a look asks last, and what is done after it.
        ended = sql.SQL(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'matviews' "
            "AND datname = current_database() AND query_start > {} "
            "AND (query LIKE '%AS w (relation, snapshot)%' OR query LIKE '%virtualtransaction%'))"
        ).format(sql.Literal(db.value("SELECT clock_timestamp()")))
        await asyncio.to_thread(until, db, ended)


# The trigger as data


ARGUMENTS: dict[str, Any] = {
    "views": ['reports."Odd Näme"', "mv"],
    "conn_id": "elsewhere",
    "tracking_schema": "odd %s",
    "truth": "change_log",
    "debounce": 2.5,
    "max_wait": 60.0,
    "poll_interval": 5.0,
    "again_after": 90.0,
    "max_staleness": 600.0,
    "bell": True,
}


def test_every_argument_survives_the_way_to_the_triggerer() -> None:
    assert trigger(**ARGUMENTS).serialize()[1] == ARGUMENTS
    assert set(ARGUMENTS) == set(StaleMatViewsTrigger().serialize()[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"views": "mv"},
        {"views": []},
        {"views": ["a b"]},
        {"tracking_schema": ""},
        {"truth": "hearsay"},
        {"debounce": -1},
        {"max_wait": "soon"},
        {"poll_interval": 0},
        {"again_after": float("nan")},
        {"max_staleness": True},
        {"bell": "yes"},
        {"truth": "fingerprints", "bell": True},
    ],
    ids=str,
)
def test_what_it_cannot_be_is_refused_where_the_dag_is_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidDefinition):
        StaleMatViewsTrigger(**wrong)


# When it is time


def _judged(digest: str, *, stale: bool = True, refreshed: int = 1) -> Judgement:
    return Judgement(ResolvedName("public", "a", "a"), stale, "", digest, datetime(2026, 1, refreshed))


def test_a_view_is_due_after_some_quiet_or_at_the_latest_after_max_wait() -> None:
    watched = Watched(Rhythm(debounce=2, max_wait=5, again_after=100))
    said = [
        watched.is_due(_judged(digest, stale=stale), now, at_work=False)
        for now, digest, stale in ((0, "", False), (1, "x", True), (2, "x", True), (3, "x", True), (4, "y", True))
    ]
    assert said == [False, False, False, True, False]
    # Refreshed, and changed all the time since.
    said = [watched.is_due(_judged(str(now), refreshed=2), now, at_work=False) for now in range(10, 20)]
    assert said == [now == 15 for now in range(10, 20)]
    # How long it has been quiet may be known, but not of what was only committed now.
    assert not watched.is_due(_judged("z", stale=False, refreshed=3), 28, at_work=False)
    assert not watched.is_due(_judged("z", refreshed=3), 29, quiet=7, at_work=False)
    assert watched.is_due(_judged("z", refreshed=3), 30, at_work=False)


def test_it_is_said_again_less_and_less_often_until_a_refresh_comes_and_never_while_one_is_at_work() -> None:
    watched = Watched(Rhythm(debounce=0, max_wait=0, again_after=10))
    said = [now for now in range(200) if watched.is_due(_judged("x"), now, at_work=40 <= now < 80)]
    assert said == [0, 10, 30, 80, 160]
    assert watched.is_due(_judged("x", refreshed=2), 200, at_work=False)
    assert [now for now in range(201, 215) if watched.is_due(_judged("x", refreshed=2), now, at_work=False)] == [210]


# What it hears


def test_each_change_is_told_of_the_views_that_read_it_and_all_watchers_share_one_connection(views: Database) -> None:
    async def scenario(log: Heard, prints: Heard, only_b: Heard) -> None:
        await looked(views)
        assert len(views.rows(WATCHERS)) == 1
        await change(views)
        assert await log.wait(1) == [["public.a"]]
        assert await prints.wait(1) == [["public.a"]]
        assert log.payloads[0]["reasons"]["public.a"].startswith("source_a changed at 20")
        assert log.payloads[0]["conn_id"] == "postgres_default"
        assert only_b.payloads == []
        await asyncio.to_thread(refresh, views, "a")
        await change(views, "b")
        assert await log.wait(2) == [["public.a"], ["public.b"]]
        assert await only_b.wait(1) == [["public.b"]]
        assert await prints.wait(2) == [["public.a"], ["public.b"]]

    everything = trigger(views=None, truth="fingerprints")
    listen(scenario, trigger(), everything, trigger(views=["b"]))
    # The last to leave closes it.
    until(views, sql.SQL("SELECT NOT EXISTS ({})").format(sql.SQL(WATCHERS)))


def test_a_burst_is_one_event_and_what_comes_later_another(views: Database) -> None:
    async def scenario(heard: Heard) -> None:
        for _ in range(50):
            await change(views)
        await change(views, "b")
        assert await heard.wait(1) == [["public.a", "public.b"]]
        await asyncio.to_thread(refresh, views, "a", "b")
        await looked(views)
        await change(views)
        assert await heard.wait(2) == [["public.a", "public.b"], ["public.a"]]

    listen(scenario, trigger(debounce=0.5))


def test_what_changed_while_nobody_watched_is_told_at_the_start(views: Database) -> None:
    async def scenario(heard: Heard) -> None:
        assert await heard.wait(1) == [["public.a"]]

    asyncio.run(change(views))
    listen(scenario, trigger())


def test_it_is_told_again_where_no_refresh_comes_of_it(views: Database) -> None:
    async def scenario(heard: Heard) -> None:
        await change(views)
        assert await heard.wait(2) == [["public.a"], ["public.a"]]

    listen(scenario, trigger(again_after=1))


def test_while_a_refresh_is_under_way_nothing_is_told_and_after_it_what_it_missed(views: Database) -> None:
    async def scenario(heard: Heard) -> None:
        key = lock_key(ResolvedName("public", "a", "a")).as_string(None)
        with views.connect() as other, other.transaction():
            other.execute(sql.SQL("SELECT pg_advisory_xact_lock({})").format(sql.SQL(key)))
            await change(views)
            await looked(views)
            await looked(views)
            assert heard.payloads == []
        assert await heard.wait(1) == [["public.a"]]

    listen(scenario, trigger())


def test_a_lost_connection_delays_and_loses_nothing(views: Database, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(heard: Heard) -> None:
        await looked(views)
        with views.connect() as connection:
            pids = connection.execute(WATCHERS).fetchall()
            connection.execute("SELECT pg_terminate_backend(%s)", pids[0])
        await change(views)
        assert await heard.wait(1) == [["public.a"]]

    listen(scenario, trigger())
    assert "Nothing is missed meanwhile" in caplog.text


def test_a_server_that_is_not_there_yet_is_waited_for(views: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(heard: Heard) -> None:
        await change(views)
        async with asyncio.timeout(10):
            while "Cannot look" not in messages.text:
                await asyncio.sleep(0.05)
        set_connection(monkeypatch, views)
        assert await heard.wait(1) == [["public.a"]]
        assert "s3cret-word" not in messages.text

    messages = _Messages()
    logging.getLogger("airflow_provider_matviews.triggers.changes").addHandler(messages)
    set_connection(monkeypatch, views, port=1, password="s3cret-word")
    listen(scenario, trigger())


class _Messages(logging.Handler):
    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage()


def test_the_bell_wakes_a_watcher_that_hardly_ever_looks(views: Database) -> None:
    async def scenario(heard: Heard) -> None:
        await looked(views, times=1)
        await change(views)
        assert await heard.wait(1) == [["public.a"]]
        await asyncio.to_thread(refresh, views, "a")
        await change(views)
        assert await heard.wait(2) == [["public.a"], ["public.a"]]

    listen(scenario, trigger(bell=True, poll_interval=NEVER))


def test_a_watcher_keeps_the_log_short(views: Database) -> None:
    async def scenario(heard: Heard) -> None:
        await asyncio.to_thread(until, views, "SELECT (SELECT count(*) FROM matviews.mat_view_changes) = 2")

    for _ in range(20):
        asyncio.run(change(views))
    assert views.value("SELECT count(*) FROM matviews.mat_view_changes") > 20
    listen(scenario, trigger())


# Views that are out of the ordinary


def test_a_view_that_moves_by_itself_is_passed_over_unless_its_age_is_limited(
    views: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    views.execute("CREATE MATERIALIZED VIEW moving AS SELECT now() AS at, count(*) AS rows FROM source_a")
    refresh(views, "moving")

    async def scenario(without: Heard, limited: Heard) -> None:
        await change(views, "b")
        assert await without.wait(1) == [["public.b"]]
        assert await limited.wait(1) == [["public.moving"]]
        assert "max_staleness" in limited.payloads[0]["reasons"]["public.moving"]

    listen(
        scenario,
        trigger(views=["moving", "b"], max_wait=0),
        trigger(views=["moving"], max_staleness=1),
    )
    assert "moving is passed over: it calls now()" in capsys.readouterr().out


def test_a_view_that_does_not_stand_is_named_and_watched_once_it_does(
    views: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(heard: Heard) -> None:
        await looked(views)
        await asyncio.to_thread(views.execute, 'CREATE MATERIALIZED VIEW "x; DROP TABLE source_a" AS SELECT 1 AS a')
        assert await heard.wait(1) == [['public."x; DROP TABLE source_a"']]

    listen(scenario, trigger(views=['"x; DROP TABLE source_a"', "a"]))
    assert 'There is no materialized view "x; DROP TABLE source_a" (yet)' in capsys.readouterr().out


def test_what_is_not_logged_is_named_and_told_all_the_same(views: Database, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(heard: Heard) -> None:
        await change(views)
        assert await heard.wait(1) == [["public.a"]]
        assert heard.payloads[0]["reasons"] == {"public.a": "source_a changed"}

    hook_on(views).remove_change_log("source_a")
    listen(scenario, trigger())
    assert "Changes of source_a, which a reads, are not all logged: it has no trigger" in capsys.readouterr().out
