"""Fire when what materialized views read has changed: the trigger of an ``AssetWatcher``.

All watchers of one database in a triggerer share one connection and one look at a time. They do so by themselves: what
Airflow offers for it (shared streams) came with 3.3, and gives each group one set of arguments, while here each
watcher has views of its own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from airflow.providers.common.compat.connection import get_async_connection
from airflow.triggers.base import BaseEventTrigger, TriggerEvent

from airflow_provider_matviews.checks import check_flag, choice
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.names import ViewName, check_identifier
from airflow_provider_matviews.services import change_log, watching
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.execute_async import AsyncDriver
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.migrations import ensure_schema, explained
from airflow_provider_matviews.services.watching import Rhythm, Sight, Truth, Watched

log = logging.getLogger(__name__)

#: Seconds that one look may take: a server that is gone without a word is noticed by then.
_LONGEST_LOOK = 60.0
#: Seconds between two looks at the least, however often the bell rings.
_SHORTEST_PAUSE = 0.1
#: Seconds before each attempt to connect again; the last one goes on.
_CONNECT_AGAIN_AFTER = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_PRUNE_EVERY = 60.0


class StaleMatViewsTrigger(BaseEventTrigger):
    """Fire whenever materialized views are older than what they read, in an ``AssetWatcher``.

    What it tells is read from the database, each time anew, and told again until a refresh has come of it: an event
    that Airflow passed over, a triggerer that was killed or a connection that was lost can delay a refresh, and never
    lose one. One event names all views that are due at that moment::

        {"views": ["public.mv"], "reasons": {"public.mv": "app.events changed"}, "conn_id": ..., "tracking_schema": ...}

    Views whose result moves by itself (the clock, random values, foreign tables, functions that cannot be seen into)
    are passed over with a warning, unless ``max_staleness`` says how old they may be.

    :param views: their names, as one would type them; None for all that are on record.
    :param conn_id: the PostgreSQL connection. For the bell, to a primary and not through a transaction pooler.
    :param tracking_schema: the schema of the run tables.
    :param truth: ``fingerprints`` reads the server's own counters, which costs writers nothing and may be 10 s late;
        ``change_log`` reads what the triggers wrote that ``MatViewHook.install_change_log`` puts on the tables. Tables
        without them are judged by fingerprints all the same.
    :param debounce: seconds for which a view's sources have to be quiet.
    :param max_wait: seconds after which it fires though they are not.
    :param poll_interval: seconds between two looks at the database at the most.
    :param again_after: seconds after which it fires again where no refresh has come of it; each time twice as long, up
        to 32 times. Never while a refresh of the view is under way.
    :param max_staleness: seconds that a view may be old whose result moves by itself.
    :param bell: look as soon as a change rings (NOTIFY); for tables whose log was installed with ``bell=True``.
    :raises InvalidDefinition: when one of them is not what it should be.
    """

    def __init__(
        self,
        *,
        views: Sequence[str] | None = None,
        conn_id: str = "postgres_default",
        tracking_schema: str = "matviews",
        truth: str = Truth.FINGERPRINTS.value,
        debounce: float = 1.0,
        max_wait: float = 30.0,
        poll_interval: float = 0.5,
        again_after: float = 30.0,
        max_staleness: float | None = None,
        bell: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if isinstance(views, str) or (views is not None and not views):
            raise InvalidDefinition(
                f"views={views!r} is not a list of names.", hint='for example views=["my_view"]; None for all.'
            )
        self.views = None if views is None else list(views)
        self._names = None if views is None else tuple(map(ViewName.parse, views))
        self.conn_id = conn_id
        self.tracking_schema = check_identifier(tracking_schema, "tracking_schema")
        self.truth = choice(Truth, truth, "truth").value
        self.debounce = _seconds(debounce, "debounce", at_least=0.0)
        self.max_wait = _seconds(max_wait, "max_wait", at_least=0.0)
        self.poll_interval = _seconds(poll_interval, "poll_interval", at_least=_SHORTEST_PAUSE)
        self.again_after = _seconds(again_after, "again_after", at_least=1.0)
        self.max_staleness = None if max_staleness is None else _seconds(max_staleness, "max_staleness", at_least=1.0)
        check_flag(bell, "bell")
        if bell and self.truth != Truth.CHANGE_LOG:
            raise InvalidDefinition("bell=True goes with truth='change_log': it is the log's triggers that ring it.")
        self.bell = bell

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what the triggerer makes the trigger of again."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "views": self.views,
                "conn_id": self.conn_id,
                "tracking_schema": self.tracking_schema,
                "truth": self.truth,
                "debounce": self.debounce,
                "max_wait": self.max_wait,
                "poll_interval": self.poll_interval,
                "again_after": self.again_after,
                "max_staleness": self.max_staleness,
                "bell": self.bell,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Watch for ever; fire whenever views are due."""
        rhythm = Rhythm(self.debounce, self.max_wait, self.again_after)
        watched: dict[ResolvedName, Watched] = {}
        told: set[str] = set()
        watcher = _Watcher(self._names, Truth(self.truth), self.poll_interval, self.bell)
        async with _joined(self.conn_id, self.tracking_schema, watcher):
            while True:
                sight = await watcher.next_sight()
                due = self._due(sight, watched, rhythm, told)
                watcher.due_at = min((each.due_at for each in watched.values() if each.due_at), default=None)
                if due:
                    self.log.info("Stale: %s.", "; ".join(f"{view} ({reason})" for view, reason in due.items()))
                    payload = {
                        "views": list(due),
                        "reasons": due,
                        "conn_id": self.conn_id,
                        "tracking_schema": self.tracking_schema,
                    }
                    yield TriggerEvent(payload)  # type: ignore[no-untyped-call]

    def _due(
        self, sight: Sight, watched: dict[ResolvedName, Watched], rhythm: Rhythm, told: set[str]
    ) -> dict[str, str]:
        """Return the views that are due, and why."""
        due = {}
        for view in self._mine(sight, told):
            judgement = sight.judge(view, Truth(self.truth), self.max_staleness)
            if judgement.moving and self.max_staleness is None:
                self._warn(
                    f"{view.display} is passed over: it {judgement.moving[0]}, so that its result moves though no "
                    "table changes. Give max_staleness, or refresh it by a schedule.",
                    told,
                )
                watched.pop(view, None)
                continue
            if self.truth == Truth.CHANGE_LOG:
                for table, gap in sight.gaps(view).items():
                    self._warn(
                        f"Changes of {table}, which {view.display} reads, are not all logged: {gap}. Until then its "
                        "counters are looked at, which may be 10 s late.",
                        told,
                    )
            each = watched.setdefault(view, Watched(rhythm))
            quiet = sight.quiet(view) if self.truth == Truth.CHANGE_LOG else 0.0
            if each.is_due(judgement, time.monotonic(), quiet=quiet, at_work=view in sight.at_work):
                due[str(ViewName(view.name, view.schema))] = judgement.reason
        return due

    def _mine(self, sight: Sight, told: set[str]) -> list[ResolvedName]:
        if self._names is None:
            return sorted(sight.on_record, key=lambda view: view.ddl)
        for name in self._names:
            if name not in sight.names:
                self._warn(f"There is no materialized view {name} (yet); the others are watched.", told)
        return [sight.names[name] for name in self._names if name in sight.names]

    def _warn(self, message: str, told: set[str]) -> None:
        if message not in told:
            told.add(message)
            self.log.warning("%s", message)


def _seconds(value: object, argument: str, *, at_least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not at_least <= value < math.inf:
        raise InvalidDefinition(f"{argument}={value!r} is not a number of seconds, {at_least:g} or more.")
    return value


@dataclass(eq=False)
class _Watcher:
    """One trigger's part in a look that is shared.

    :ivar due_at: when it wants to look at the latest, by ``time.monotonic()``.
    """

    names: tuple[ViewName, ...] | None
    truth: Truth
    poll_interval: float
    bell: bool
    due_at: float | None = None
    _sights: asyncio.Queue[Sight] = field(default_factory=lambda: asyncio.Queue(1))

    def show(self, sight: Sight) -> None:
        """Hand over what is seen; what was seen before and not taken is no longer true."""
        with suppress(asyncio.QueueEmpty):
            self._sights.get_nowait()
        self._sights.put_nowait(sight)

    async def next_sight(self) -> Sight:
        """Wait for what is seen next."""
        return await self._sights.get()


class _Lookout:
    """Looks at one database for all who watch it."""

    def __init__(self, conn_id: str, tracking_schema: str) -> None:
        self.watchers: set[_Watcher] = set()
        self._conn_id = conn_id
        self._ledger = Ledger(tracking_schema)
        self._failures = 0
        # Of no watcher's own: it may outlive the one that came first, and its log with it.
        self._task = asyncio.create_task(self._keep_looking(), context=Context())

    async def close(self) -> None:
        """End it and its connection."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _keep_looking(self) -> None:
        while True:
            hook: MatViewHook | None = None
            try:
                # Looked up here, without blocking the loop that all triggers share; and anew each time.
                hook = MatViewHook(
                    postgres_conn_id=self._conn_id,
                    connection=await get_async_connection(self._conn_id),
                    tracking_schema=self._ledger.tracking_schema,
                )
                async with _connected(hook) as (connection, driver):
                    await driver.run(
                        explained(self._ledger.tracking_schema, ensure_schema(self._ledger.tracking_schema))
                    )
                    await self._look_on(connection, driver)
            except Exception as error:
                pause = _CONNECT_AGAIN_AFTER[min(self._failures, len(_CONNECT_AGAIN_AFTER) - 1)]
                self._failures += 1
                message = f"{type(error).__name__}: {error}"
                log.warning(
                    "Cannot look at the views behind %s; trying again in %s s. Nothing is missed meanwhile. %s",
                    self._conn_id,
                    pause,
                    hook.redact(message) if hook else message,
                )
                await asyncio.sleep(pause)

    async def _look_on(self, connection: psycopg.AsyncConnection[Any], driver: AsyncDriver) -> None:
        """Look until the connection is lost."""
        sight: Sight | None = None
        listening = False
        pruning = _Pruning(self._ledger.tracking_schema)
        while True:
            watchers = tuple(self.watchers)
            if not listening and any(watcher.bell for watcher in watchers):
                await driver.run(watching.listen())
                listening = True
            with_log = any(watcher.truth is Truth.CHANGE_LOG for watcher in watchers)
            names = {name for watcher in watchers for name in watcher.names or ()}
            everything = any(watcher.names is None for watcher in watchers)
            work = watching.see(self._ledger, names, sight, everything=everything, with_log=with_log)
            async with asyncio.timeout(_LONGEST_LOOK):
                sight = await driver.run(work)
            self._failures = 0
            for watcher in watchers:
                watcher.show(sight)
            if with_log:
                async with asyncio.timeout(_LONGEST_LOOK):
                    await pruning.go_on(driver)
            # Let them see it, and say when they want to look again.
            await asyncio.sleep(_SHORTEST_PAUSE)
            await self._wait(connection if listening else None)

    async def _wait(self, bell: psycopg.AsyncConnection[Any] | None) -> None:
        now = time.monotonic()
        pauses = [watcher.poll_interval for watcher in self.watchers]
        pauses += [watcher.due_at - now for watcher in self.watchers if watcher.due_at and watcher.due_at > now]
        pause = min(pauses, default=0.0)
        if bell is None:
            await asyncio.sleep(pause)
            return
        async for _ in bell.notifies(timeout=pause, stop_after=1):
            pass


@dataclass
class _Pruning:
    """Keeps the change log short, a little at a time."""

    tracking_schema: str
    _next_at: float = 0.0
    _mark: change_log.PruneMark | None = None

    async def go_on(self, driver: AsyncDriver) -> None:
        """Do the next bit, where it is time for one."""
        now = time.monotonic()
        if now < self._next_at:
            return
        if self._mark is None:
            self._mark = await driver.run(change_log.mark())
            return
        try:
            pruned = await driver.run(change_log.prune(self.tracking_schema, self._mark))
        except psycopg.errors.InsufficientPrivilege as error:
            log.warning("The change log is not pruned: %s.", error.diag.message_primary)
            pruned = 0
        if pruned is not None and pruned < change_log.PRUNED_AT_ONCE:
            self._mark, self._next_at = None, now + _PRUNE_EVERY


_lookouts: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], _Lookout]] = WeakKeyDictionary()


@asynccontextmanager
async def _joined(conn_id: str, tracking_schema: str, watcher: _Watcher) -> AsyncIterator[None]:
    """Have a watcher see what the others see; the first one begins to look, and the last one ends it."""
    lookouts = _lookouts.setdefault(asyncio.get_running_loop(), {})
    key = (conn_id, tracking_schema)
    lookout = lookouts.get(key)
    if lookout is None:
        lookout = lookouts[key] = _Lookout(conn_id, tracking_schema)
    lookout.watchers.add(watcher)
    try:
        yield
    finally:
        lookout.watchers.discard(watcher)
        if not lookout.watchers and lookouts.get(key) is lookout:
            del lookouts[key]
            await lookout.close()


@asynccontextmanager
async def _connected(hook: MatViewHook) -> AsyncIterator[tuple[psycopg.AsyncConnection[Any], AsyncDriver]]:
    """Yield one connection and a driver that has no other."""
    connection = await hook.aconnect()

    async def take() -> psycopg.AsyncConnection[Any]:
        if connection.closed:
            raise psycopg.OperationalError("the connection was lost")
        return connection

    async with connection, AsyncDriver(take, log, redact=hook.redact) as driver:
        yield connection, driver
