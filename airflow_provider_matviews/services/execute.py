"""Runs services on blocking psycopg connections.

The driver performs what a service yields and throws into it what goes wrong, so that the service's own
clean-up runs whatever happens: an error of the server, Ctrl-C, Airflow's task timeout. ``execute_async.py`` holds
its twin for an event loop; what services do is written once, for both.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum, auto
from itertools import chain, repeat
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from airflow_provider_matviews.services.connections import Connections, busy
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


class Driver(Connections[psycopg.Connection[Any]]):
    """Runs services on connections that it opens when they are first needed.

    :param connect: opens a new connection. Called once for each :class:`Session` used, and again for
        ``Session.RECORD`` when the first one broke or was given back during a long wait.
    :param log: where a service's notes go.
    :param pace: seconds between the looks at an operation that takes long; the last one goes on.
    :param redact: takes secrets out of the notes.
    """

    def __init__(
        self,
        connect: Callable[[], psycopg.Connection[Any]],
        log: logging.Logger | Any | None = None,
        pace: Sequence[float] = PACE,
        redact: Callable[[str], str] = str,
    ) -> None:
        super().__init__()
        self._connect = connect
        self._log = log or logging.getLogger(__name__)
        self._pace = pace
        self._redact = redact
        # Not a threading.Event: its lock could be held by the very thread that a signal handler interrupts.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._watchman: _Watchman | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; what was not committed is undone by the server."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def cancel(self, reason: str = "cancel() was called") -> None:
        """Ask the server to cancel what runs for the operation. Safe in a signal handler or another thread.

        The service then fails with :class:`OperationCancelled`, rolls back and records it.

        :param reason: by whom or what, for the record.
        """
        self._stop.request(reason)
        self._interrupt()
        if self._watchman is not None:
            # The statement may be sent only now, after the look whether it should be.
            self._watchman.insist()

    def run(self, work: Work[_T]) -> _T:
        """Run a service to its end and return what it returns.

        :raises BaseException: whatever the service lets through.
        """
        result, error = Result(), None
        try:
            while True:
                try:
                    instruction = work.send(initial(work, result)) if error is None else work.throw(error)
                    error = None
                    result = self._perform(instruction)
                except StopIteration as stop:
                    value: _T = stop.value
                    return value
                except BaseException as raised:
                    if inspect.getgeneratorstate(work) == inspect.GEN_CLOSED:
                        raise
                    error = raised
        finally:
            if self._watchman is not None:
                self._watchman.dismiss()
                self._watchman = None

    def time_out(self, deadline: Deadline) -> None:
        """Stop whatever runs, because time is up."""
        self._stop.time_out(deadline)
        self._interrupt()

    def tell(self, message: str, *, warning: bool = False) -> None:
        """Log a line. Whatever becomes of it, the operation goes on."""
        with suppress(Exception):
            (self._log.warning if warning else self._log.info)("%s", self._redact(message))

    def look(self, watch: Watch) -> str | None:
        """Have a look at a statement that runs, from another connection; None where there is nothing to say."""
        connection = self._connections.get(Session.WORK)
        if watch.look is None or connection is None or not busy(connection):
            return None
        try:
            with psycopg.connect(conninfo_of(connection), autocommit=True) as beside, beside.transaction():
                _fetch(beside, LIMITED_LOOK, None)
                return _run_on(beside, watch.look())
        except Exception as error:
            self._log.debug("No look at the operation: %s", type(error).__name__)
            return None

    def _interrupt(self) -> None:
        self._wake.put(None)
        # Not the record's once it has been told: that is the clean-up.
        for session, connection in list(self._connections.items()):
            if session is Session.WORK or not self._stop.told:
                _cancel(connection)

    def insist(self, *, for_the_last_time: bool) -> bool:
        """Ask the server again while what was asked has not been heard; return whether that was so.

        :param for_the_last_time: end the connection that does not listen.
        """
        if not self._stop.requested or self._stop.told:
            return False
        if for_the_last_time:
            for connection in list(self._connections.values()):
                if busy(connection):
                    cut(connection)
        else:
            self._interrupt()
        return True

    def _perform(self, instruction: Instruction) -> Result:
        if self._stop.requested and not self._stop.told and not isinstance(instruction, Note):
            # cancel() came while nothing ran on the server. Told once: the clean-up has to get through. Not at a
            # note: after COMMIT there are only notes, and it is too late.
            raise self._stop.tell()
        match instruction:
            case Query(statement, parameters, session):
                return self._execute(session, statement, parameters)
            case Command(statement, session, undoing):
                if undoing and not self._stands(session):
                    return Result()
                if instruction.begins:
                    return self._begin(session, statement)
                return self._execute(session, statement, None)
            case Alone(command, settings):
                self._mind(command.session, settings)
                return self._execute(command.session, command.statement, None)
            case Pause(seconds):
                if seconds >= LONG_PAUSE:
                    self._give_back_the_record()
                self._wait(seconds)
            case Note(message, warning):
                self.tell(message, warning=warning)
            case Watch() | Deadline():
                self._watchman = self._watchman or _Watchman(self, self._pace)
                self._watchman.order(instruction)
        return Result()

    def _give_back_the_record(self) -> None:
        connection = self._connections.get(Session.RECORD)
        if connection is not None and connection.info.transaction_status is TransactionStatus.IDLE:
            del self._connections[Session.RECORD]
            connection.close()

    def _wait(self, seconds: float) -> None:
        if self._stop.told:
            time.sleep(seconds)
            return
        # Not time.sleep(): cancel() ends the pause, and with it the wait.
        with suppress(Empty):
            self._wake.get(timeout=seconds)
            raise self._stop.tell()

    def _execute(self, session: Session, statement: Any, parameters: Any) -> Result:
        connection = self._connection(session)
        try:
            return _fetch(connection, statement, parameters)
        except psycopg.OperationalError as error:
            stopped = self._stop.instead_of(error)
            if stopped is error:
                raise
            raise stopped from error
        except psycopg.Error:
            raise
        except BaseException:
            # Something other than the server ended the wait (a signal, a timeout): the statement still runs
            # there and would run on, and even commit, after a mere close() (measured).
            _cancel(connection)
            if busy(connection):
                connection.close()
            raise
        finally:
            self._used(session, connection)

    def _begin(self, session: Session, statement: Any) -> Result:
        self._resting.add(session)
        stood = self._stands(session)
        try:
            return self._execute(session, statement, None)
        except psycopg.OperationalError:
            if not stood or self._stands(session) or self._stop.requested:
                raise
            # Somebody ended the connection while nothing was in it that could be lost.
            self._resting.add(session)
            return self._execute(session, statement, None)

    def _mind(self, session: Session, settings: sql.Composable) -> None:
        connection = self._connection(session)
        pid = _fetch(connection, "SELECT pg_backend_pid() AS pid", None).rows[0]["pid"]
        if pid == connection.info.backend_pid:
            _fetch(connection, sql.SQL("SELECT {}").format(settings), None)

    def _connection(self, session: Session) -> psycopg.Connection[Any]:
        connection = self._connections.get(session)
        if connection is not None and not self._alive(connection, session):
            connection.close()
            connection = None
        if connection is None:
            connection = self._open(session)
            connection.autocommit = True
            # A prepared statement is session state, which a transaction pooler hands to somebody else.
            connection.prepare_threshold = None
            self._connections[session] = connection
        return connection

    def _open(self, session: Session) -> psycopg.Connection[Any]:
        for pause in REOPEN_AFTER if self._is_worth_a_wait(session) else ():
            try:
                time.sleep(pause)
                return self._connect()
            except psycopg.OperationalError:
                if self._stop.requested or not self._work_is_there():
                    break
        return self._connect()

    def _work_is_there(self) -> bool:
        """Whether the work that a record is wanted for is still to be had, as the server says."""
        try:
            self._connections[Session.WORK].execute("SELECT 1", prepare=False)
        except psycopg.OperationalError:
            return False
        except psycopg.Error:
            # In a transaction that has failed it answers that.
            return True
        return True

    def _alive(self, connection: psycopg.Connection[Any], session: Session) -> bool:
        """Whether a connection that was idle for a while still answers: a long build outlasts many an idle timeout.

        Asked outside of transactions alone: there nothing is lost with it.
        """
        if connection.closed:
            # Lost in the middle of a transaction it is for the service to hear of.
            return session not in self._resting
        if connection.info.transaction_status is not TransactionStatus.IDLE:
            return True
        if time.monotonic() - self._last_used.get(session, time.monotonic()) < IDLE_LONG:
            return True
        try:
            connection.execute("SELECT 1", prepare=False)
        except psycopg.Error:
            return False
        return True


_NEVER = float("inf")


class _Order(Enum):
    INSIST = auto()
    GO_HOME = auto()


class _Watchman(threading.Thread):
    """Does beside a blocked driver what cannot wait for it: looks at it now and then, and ends it in time.

    Talks to the server on connections of its own, and to the driver as a signal handler does.
    """

    def __init__(self, driver: Driver, pace: Sequence[float]) -> None:
        super().__init__(name="matviews-watchman", daemon=True)
        self._driver = driver
        self._pauses = chain(pace, repeat(pace[-1]))
        self._orders: SimpleQueue[Watch | Deadline | _Order] = SimpleQueue()
        self._dismissed = False
        self._looking: threading.Thread | None = None

    def order(self, order: Watch | Deadline) -> None:
        """Hand over what to watch, or until when."""
        self._orders.put(order)
        if self.ident is None:
            self.start()

    def insist(self) -> None:
        """Have it see to it that a request to stop is heard. Safe in a signal handler, as nothing else here is."""
        self._orders.put(_Order.INSIST)

    def dismiss(self) -> None:
        """Send it home. It is not waited for: it may be in the middle of a look, which then says nothing."""
        self._dismissed = True
        self._orders.put(_Order.GO_HOME)

    def run(self) -> None:
        """Watch until dismissed."""
        watch, deadline, look_at, insist_at, cut_at = Watch(None), None, _NEVER, _NEVER, _NEVER
        while not self._dismissed:
            next_at = min(look_at, insist_at, deadline.at if deadline else _NEVER)
            try:
                order = self._orders.get(timeout=None if next_at == _NEVER else max(0.0, next_at - time.monotonic()))
            except Empty:
                order = None
            now = time.monotonic()
            if isinstance(order, Deadline):
                deadline = order
            elif isinstance(order, Watch):
                watch, look_at = order, _NEVER if order.look is None else now + next(self._pauses)
            elif order is _Order.INSIST:
                insist_at, cut_at = now + INSIST_EVERY, now + CUT_AFTER
            elif order is None and deadline is not None and now >= deadline.at:
                self._driver.time_out(deadline)
                deadline, insist_at, cut_at = None, now + INSIST_EVERY, now + CUT_AFTER
            elif order is None and now >= insist_at:
                unheard = self._driver.insist(for_the_last_time=now >= cut_at)
                insist_at = now + INSIST_EVERY if unheard else _NEVER
            elif order is None and now >= look_at:
                look_at = now + next(self._pauses)
                if self._looking is None or not self._looking.is_alive():
                    # In a thread of its own: connecting may hang, and time is to be kept all the same.
                    self._looking = threading.Thread(target=self._look, args=(watch,), name=self.name, daemon=True)
                    self._looking.start()

    def _look(self, watch: Watch) -> None:
        line = self._driver.look(watch)
        if line is not None and not self._dismissed:
            self._driver.tell(line)


def initial(work: Work[Any], result: Result) -> Any:
    """Return what a generator is to be sent next: the first time it takes nothing."""
    return None if inspect.getgeneratorstate(work) == inspect.GEN_CREATED else result


def _fetch(connection: psycopg.Connection[Any], statement: Any, parameters: Any) -> Result:
    with connection.cursor(row_factory=dict_row) as cursor:
        # The binary format makes psycopg use the extended protocol without parameters too, and does not
        # depend on the session's DateStyle.
        cursor.execute(statement, parameters, binary=True, prepare=False)
        return Result(cursor.fetchall() if cursor.description else [])


def _run_on(connection: psycopg.Connection[Any], work: Work[_T]) -> _T:
    """Run work that only asks, on one connection."""
    result = Result()
    while True:
        try:
            instruction = work.send(initial(work, result))
        except StopIteration as stop:
            value: _T = stop.value
            return value
        if isinstance(instruction, Query):
            result = _fetch(connection, instruction.statement, instruction.parameters)


def _cancel(connection: psycopg.Connection[Any]) -> None:
    if busy(connection):
        with suppress(psycopg.Error):
            connection.cancel_safe(timeout=CANCEL_TIMEOUT)
