"""Runs services on asynchronous psycopg connections: hundreds at once in one event loop, without a thread for each.

The twin of ``execute.py``. Only how to wait differs; what is done is in the services, which are the same.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import chain, repeat
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from airflow_provider_matviews.services.connections import Connections, busy
from airflow_provider_matviews.services.execute import initial
from airflow_provider_matviews.services.instructions import (
    Alone,
    Command,
    Deadline,
    Instruction,
    Note,
    Pause,
    Query,
    Result,
    Session,
    Watch,
    Work,
)
from airflow_provider_matviews.services.stopping import (
    CANCEL_TIMEOUT,
    CUT_AFTER,
    IDLE_LONG,
    INSIST_EVERY,
    LIMITED_LOOK,
    LONG_PAUSE,
    PACE,
    REOPEN_AFTER,
    conninfo_of,
    cut,
)

_T = TypeVar("_T")

#: How many operations of one event loop look at themselves at the same time.
_LOOKS_AT_ONCE = 4
_looks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


class AsyncDriver(Connections[psycopg.AsyncConnection[Any]]):
    """Runs services on connections that it opens when they are first needed.

    :param connect: opens a new connection. Called once for each :class:`Session` used, and again for
        ``Session.RECORD`` when the first one broke or was given back during a long statement or wait.
    :param log: where a service's notes go.
    :param pace: seconds between the looks at an operation that takes long; the last one goes on.
    :param redact: takes secrets out of the notes.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[psycopg.AsyncConnection[Any]]],
        log: logging.Logger | Any | None = None,
        pace: Sequence[float] = PACE,
        redact: Callable[[str], str] = str,
    ) -> None:
        super().__init__()
        self._connect = connect
        self._log = log or logging.getLogger(__name__)
        self._pace = pace
        self._redact = redact
        self._wake = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None
        # The loop holds tasks by weak references only.
        self._cancelling: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; what was not committed is undone by the server."""
        if self._ending:
            # A look ends with its operation, unless its server does not answer.
            await asyncio.wait(self._ending, timeout=1.0)
        connections = list(self._connections.values())
        self._connections.clear()
        for connection in connections:
            await connection.close()

    def cancel(self, reason: str = "cancel() was called") -> None:
        """Ask the server to cancel what runs for the operation.

        The service then fails with :class:`OperationCancelled`, rolls back and records it.

        :param reason: by whom or what, for the record.
        """
        self._stop.request(reason)
        self._interrupt()

    async def run(self, work: Work[_T]) -> _T:
        """Run a service to its end and return what it returns.

        :raises asyncio.CancelledError: when its task was cancelled; the service has heard of it as of ``cancel()``.
        :raises BaseException: whatever the service lets through.
        """
        interruption: asyncio.CancelledError | None = None
        result = Result()
        error: BaseException | None = None
        try:
            while True:
                try:
                    instruction = work.send(initial(work, result)) if error is None else work.throw(error)
                    error = None
                    result = await self._perform(instruction)
                except StopIteration as stop:
                    value: _T = stop.value
                    break
                except asyncio.CancelledError as raised:
                    # Its own cause where there is one: cancel() came first, and the loop's end with it.
                    interruption = raised
                    self._stop.request("its process was told to end")
                    error = self._stop.tell()
                    error.__cause__ = raised
                except BaseException as raised:
                    if inspect.getgeneratorstate(work) == inspect.GEN_CLOSED:
                        if interruption is not None:
                            raise interruption from raised
                        raise
                    error = raised
        finally:
            self._dismiss()
        if interruption is not None:
            raise interruption
        return value

    def _interrupt(self) -> None:
        self._wake.set()
        self._ask_to_cancel()
        if not self._cancelling:
            task = asyncio.get_running_loop().create_task(self._insist())
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    def _ask_to_cancel(self) -> None:
        for session, connection in self._connections.items():
            # Not the record's once it has been told: that is the clean-up.
            if not busy(connection) or (session is Session.RECORD and self._stop.told):
                continue
            task = asyncio.get_running_loop().create_task(_cancel(connection))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _insist(self) -> None:
        """See to it that a request to stop is heard."""
        cut_at = time.monotonic() + CUT_AFTER
        while not self._stop.told:
            await asyncio.sleep(INSIST_EVERY)
            if self._stop.told:
                return
            if time.monotonic() < cut_at:
                self._ask_to_cancel()
                continue
            for connection in self._connections.values():
                if busy(connection):
                    cut(connection)

    def _time_out(self, deadline: Deadline) -> None:
        self._stop.time_out(deadline)
        self._interrupt()

    def _dismiss(self) -> None:
        self._dismiss_deadline()
        self._watch(Watch(None))
        for task in self._cancelling:
            task.cancel()

    async def _perform(self, instruction: Instruction) -> Result:
        if self._stop.requested and not self._stop.told and not isinstance(instruction, Note):
            # As in the blocking driver.
            raise self._stop.tell()
        match instruction:
            case Query(statement, parameters, session):
                return await self._execute(session, statement, parameters)
            case Command(statement, session, undoing):
                if undoing and not self._stands(session):
                    return Result()
                if instruction.begins:
                    return await self._begin(session, statement)
                return await self._execute(session, statement, None)
            case Alone(command, settings):
                await self._mind(command.session, settings)
                return await self._execute(command.session, command.statement, None)
            case Pause(seconds):
                if seconds >= LONG_PAUSE:
                    await self._give_back_the_record()
                await self._wait(seconds)
            case Note(message, warning):
                self._tell(message, warning=warning)
            case Deadline(at):
                loop = asyncio.get_running_loop()
                self._dismiss_deadline()
                self._deadline = loop.call_later(max(0.0, at - time.monotonic()), self._time_out, instruction)
            case Watch():
                self._watch(instruction)
        return Result()

    def _dismiss_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _watch(self, watch: Watch) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._ending.add(self._watching)
        self._watching = None if watch.look is None else asyncio.create_task(self._keep_watch(watch))

    async def _wait(self, seconds: float) -> None:
        if self._stop.told:
            await asyncio.sleep(seconds)
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)
            raise self._stop.tell()

    def _tell(self, message: str, *, warning: bool = False) -> None:
        # Whatever becomes of a line, the operation goes on.
        with suppress(Exception):
            (self._log.warning if warning else self._log.info)("%s", self._redact(message))

    async def _execute(self, session: Session, statement: Any, parameters: Any) -> Result:
        connection = await self._connection(session)
        try:
            # Cancelled, psycopg cancels the statement on the server and waits for its end.
            return await _fetch(connection, statement, parameters)
        except psycopg.OperationalError as error:
            stopped = self._stop.instead_of(error)
            if stopped is error:
                raise
            raise stopped from error
        finally:
            self._used(session, connection)

    async def _begin(self, session: Session, statement: Any) -> Result:
        self._resting.add(session)
        stood = self._stands(session)
        try:
            return await self._execute(session, statement, None)
        except psycopg.OperationalError:
            if not stood or self._stands(session) or self._stop.requested:
                raise
            # Somebody ended the connection while nothing was in it that could be lost.
            self._resting.add(session)
            return await self._execute(session, statement, None)

    async def _mind(self, session: Session, settings: sql.Composable) -> None:
        connection = await self._connection(session)
        pid = (await _fetch(connection, "SELECT pg_backend_pid() AS pid", None)).rows[0]["pid"]
        if pid == connection.info.backend_pid:
            await _fetch(connection, sql.SQL("SELECT {}").format(settings), None)

    async def _connection(self, session: Session) -> psycopg.AsyncConnection[Any]:
        connection = self._connections.get(session)
        if connection is not None and not await self._alive(connection, session):
            await connection.close()
            connection = None
        if connection is None:
            connection = await self._open(session)
            self._connections[session] = connection
            await connection.set_autocommit(True)
            # A prepared statement is session state, which a transaction pooler hands to somebody else.
            connection.prepare_threshold = None
        return connection

    async def _open(self, session: Session) -> psycopg.AsyncConnection[Any]:
        for pause in REOPEN_AFTER if self._is_worth_a_wait(session) else ():
            try:
                await asyncio.sleep(pause)
                return await self._connect_or_stop()
            except psycopg.OperationalError:
                if self._stop.requested or not await self._work_is_there():
                    break
        return await self._connect_or_stop()

    async def _work_is_there(self) -> bool:
        """As in the blocking driver."""
        try:
            await self._connections[Session.WORK].execute("SELECT 1", prepare=False)
        except psycopg.OperationalError:
            return False
        except psycopg.Error:
            return True
        return True

    async def _connect_or_stop(self) -> psycopg.AsyncConnection[Any]:
        if self._stop.told:
            return await self._connect()
        connecting = asyncio.ensure_future(self._connect())
        waking = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({connecting, waking}, return_when=asyncio.FIRST_COMPLETED)
            if connecting.done():
                return connecting.result()
            raise self._stop.tell()
        finally:
            waking.cancel()
            connecting.cancel()

    async def _alive(self, connection: psycopg.AsyncConnection[Any], session: Session) -> bool:
        """As in the blocking driver."""
        if connection.closed:
            return session not in self._resting
        if connection.info.transaction_status is not TransactionStatus.IDLE:
            return True
        if time.monotonic() - self._last_used.get(session, time.monotonic()) < IDLE_LONG:
            return True
        try:
            await connection.execute("SELECT 1", prepare=False)
        except psycopg.Error:
            return False
        return True

    async def _keep_watch(self, watch: Watch) -> None:
        for pause in chain(self._pace, repeat(self._pace[-1])):
            await asyncio.sleep(pause)
            connection = self._connections.get(Session.WORK)
            if connection is None or not busy(connection):
                continue
            try:
                await self._give_back_the_record()
                async with _turn_to_look():
                    line = await _look(conninfo_of(connection), watch) if busy(connection) else None
            except Exception as error:
                self._log.debug("No look at the operation: %s", type(error).__name__)
            else:
                if line is not None:
                    self._tell(line)

    async def _give_back_the_record(self) -> None:
        # Of hundreds of refreshes that take long each needs only one.
        connection = self._connections.get(Session.RECORD)
        if connection is not None and connection.info.transaction_status is TransactionStatus.IDLE:
            del self._connections[Session.RECORD]
            await connection.close()


def _turn_to_look() -> asyncio.Semaphore:
    # Hundreds that began together would all look together, each on a connection of its own.
    return _looks.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(_LOOKS_AT_ONCE))


async def _look(conninfo: str, watch: Watch) -> str | None:
    beside = await psycopg.AsyncConnection.connect(conninfo, autocommit=True)
    async with beside, beside.transaction():
        await _fetch(beside, LIMITED_LOOK, None)
        assert watch.look is not None
        return await _run_on(beside, watch.look())


async def _fetch(connection: psycopg.AsyncConnection[Any], statement: Any, parameters: Any) -> Result:
    async with connection.cursor(row_factory=dict_row) as cursor:
        # The binary format for the extended protocol, as in the blocking driver.
        await cursor.execute(statement, parameters, binary=True, prepare=False)
        return Result(await cursor.fetchall() if cursor.description else [])


async def _run_on(connection: psycopg.AsyncConnection[Any], work: Work[_T]) -> _T:
    """Run work that only asks, on one connection."""
    result = Result()
    while True:
        try:
            instruction = work.send(initial(work, result))
        except StopIteration as stop:
            value: _T = stop.value
            return value
        if isinstance(instruction, Query):
            result = await _fetch(connection, instruction.statement, instruction.parameters)


async def _cancel(connection: psycopg.AsyncConnection[Any]) -> None:
    with suppress(psycopg.Error, OSError):
        await connection.cancel_safe(timeout=CANCEL_TIMEOUT)
