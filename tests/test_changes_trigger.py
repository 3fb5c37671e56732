"""The trigger that watches views: it says so when they are stale, in time, once, and again where nothing came of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from airflow.models.trigger import Trigger
from airflow.sdk.serde import serialize

from airflow_provider_matviews.exceptions import InvalidDefinition, InvalidName
from airflow_provider_matviews.triggers.changes import StaleMatViewsTrigger
from tests.airflow_dags import set_connection
from tests.conftest import Database, hook_on
from tests.racing import until

#: Long enough that it never comes in a test, and short enough that a test does not wait for it.
NEVER, AT_ONCE = 3600.0, 0.0
#: What a look is, as pg_stat_activity shows it.
WATCHERS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'matviews'"


@pytest.fixture(autouse=True)
def _connection(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    set_connection(monkeypatch, db)


@pytest.fixture
def views(db: Database) -> Database:
    """Two views of a table each, refreshed and recorded."""
    for name in ("a", "b"):
        with db.connect() as connection:
            connection.execute(f"CREATE TABLE source_{name} (id integer)")  # type: ignore[arg-type]
            connection.execute(f"CREATE MATERIALIZED VIEW {name} AS SELECT count(*) FROM source_{name}")  # type: ignore[arg-type]
        hook_on(db).refresh(name)
    return db


def _trigger(**arguments: Any) -> StaleMatViewsTrigger:
    usual: dict[str, Any] = {"views": ["a", "b"], "debounce": AT_ONCE, "poll_interval": 0.1, "truth": "change_log"}
    trigger = StaleMatViewsTrigger(**{**usual, **arguments})
    _, kwargs = trigger.serialize()
    return StaleMatViewsTrigger(**json.loads(json.dumps(kwargs)))


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
        return [payload["views"] for payload in self.payloads]


@asynccontextmanager
async def listening(*triggers: StaleMatViewsTrigger) -> AsyncIterator[list[Heard]]:
    """Run triggers as a triggerer does, until the block ends."""
    heard = [Heard(trigger) for trigger in triggers]
    try:
        yield heard
    finally:
        for each in heard:
            each.task.cancel()
        await asyncio.gather(*(each.task for each in heard), return_exceptions=True)


async def test_try(views: Database) -> None:
    pass


def test_it_fires(views: Database) -> None:
    async def scenario() -> None:
        async with listening(_trigger(), _trigger(truth="fingerprints", views=None)) as (log, prints):
            await asyncio.sleep(0.5)
            assert log.payloads == []
            await asyncio.to_thread(views.execute, "INSERT INTO source_a VALUES (1)")
            print(await log.wait(1), log.payloads)
            print(await prints.wait(1), prints.payloads)
            print(views.rows(WATCHERS))
        print(views.rows(WATCHERS))
    hook_on(views).install_change_log("a", "b")
    hook_on(views).refresh("a")
    hook_on(views).refresh("b")
    asyncio.run(scenario())
