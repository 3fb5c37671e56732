"""Runs services on blocking psycopg connections.

The driver performs what a service yields and throws into it what goes wrong, so that the service's own
clean-up runs whatever happens: an error of the server, Ctrl-C, Airflow's task timeout.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from airflow_provider_matviews.services.instructions import (
    Command,
    Instruction,
    Note,
    Pause,
    Query,
    Result,
    Session,
    Work,
)

_T = TypeVar("_T")

#: Seconds that asking the server to cancel may take; an unreachable server must not hold up the task's end.
CANCEL_TIMEOUT = 5.0
#: Seconds after which a connection is asked whether it is still there before it is given something to do.
_IDLE_LONG = 0.25


class Driver:
    """Runs services on connections that it opens when they are first needed.

    :param connect: opens a new connection. Called once for each :class:`Session` used, and again for
        ``Session.RECORD`` when the first one broke.
    :param log: where a service's notes go.
    """

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]], log: logging.Logger | Any | None = None) -> None:
        self._connect = connect
        self._log = log or logging.getLogger(__name__)
        self._connections: dict[Session, psycopg.Connection[Any]] = {}
        self._cancelled = False
        # Not a threading.Event: its lock could be held by the very thread that a signal handler interrupts.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._cancellation_told = False
        self._last_used = time.monotonic()

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

    def cancel(self) -> None:
        """Ask the server to cancel what runs for the operation. Safe in a signal handler or another thread.

        The service then fails with ``psycopg.errors.QueryCanceled``, rolls back and records it.
        """
        self._cancelled = True
        self._wake.put(None)
        if connection := self._connections.get(Session.WORK):
            _cancel(connection)

    def run(self, work: Work[_T]) -> _T:
        """Run a service to its end and return what it returns.

        :raises BaseException: whatever the service lets through.
        """
        result, error = Result(), None
        while True:
            try:
                instruction = work.send(_initial(work, result)) if error is None else work.throw(error)
                error = None
                result = self._perform(instruction)
            except StopIteration as stop:
                value: _T = stop.value
                return value
            except BaseException as raised:
                if inspect.getgeneratorstate(work) == inspect.GEN_CLOSED:
                    raise
                error = raised

    def _perform(self, instruction: Instruction) -> Result:
        if self._cancelled and not self._cancellation_told and not isinstance(instruction, Note):
            # cancel() came while nothing ran on the server. Told once: the clean-up has to get through. Not at a
            # note: after COMMIT there are only notes, and it is too late.
            self._cancellation_told = True
            raise psycopg.errors.QueryCanceled("cancelled between two statements")
        match instruction:
            case Query(statement, parameters, session):
                return self._execute(session, statement, parameters)
            case Command(statement, session):
                return self._execute(session, statement, None)
            case Pause(seconds):
                # Not time.sleep(): cancel() ends the pause, and with it the wait.
                try:
                    self._wake.get(timeout=seconds)
                except Empty:
                    return Result()
                self._cancellation_told = True
                raise psycopg.errors.QueryCanceled("cancelled while waiting")
            case Note(message, warning):
                (self._log.warning if warning else self._log.info)("%s", message)
        return Result()

    def _execute(self, session: Session, statement: Any, parameters: Any) -> Result:
        connection = self._connection(session)
        if session is Session.RECORD:
            self._last_used = time.monotonic()
        try:
            with connection.cursor(row_factory=dict_row) as cursor:
                # The binary format makes psycopg use the extended protocol without parameters too, and does not
                # depend on the session's DateStyle.
                cursor.execute(statement, parameters, binary=True, prepare=False)
                return Result(cursor.fetchall() if cursor.description else [])
        except psycopg.errors.QueryCanceled:
            self._cancellation_told = True
            raise
        except psycopg.Error:
            raise
        except BaseException:
            # Something other than the server ended the wait (a signal, a timeout): the statement still runs
            # there and would run on, and even commit, after a mere close() (measured).
            _cancel(connection)
            if connection.info.transaction_status is TransactionStatus.ACTIVE:
                connection.close()
            raise

    def _connection(self, session: Session) -> psycopg.Connection[Any]:
        connection = self._connections.get(session)
        if connection is not None and session is Session.RECORD and not self._alive(connection):
            connection.close()
            connection = None
        if connection is None:
            connection = self._connect()
            connection.autocommit = True
            # A prepared statement is session state, which a transaction pooler hands to somebody else.
            connection.prepare_threshold = None
            self._connections[session] = connection
        return connection

    def _alive(self, connection: psycopg.Connection[Any]) -> bool:
        """Whether a connection that was idle for a while still answers: a long build outlasts many an idle timeout."""
        if connection.closed:
            return False
        idle = time.monotonic() - self._last_used
        if idle < _IDLE_LONG or connection.info.transaction_status is not TransactionStatus.IDLE:
            return True
        try:
            connection.execute("SELECT 1", prepare=False)
        except psycopg.Error:
            return False
        return True


def _initial(work: Work[Any], result: Result) -> Any:
    return None if inspect.getgeneratorstate(work) == inspect.GEN_CREATED else result


def _cancel(connection: psycopg.Connection[Any]) -> None:
    if not connection.closed and connection.info.transaction_status is TransactionStatus.ACTIVE:
        with suppress(psycopg.Error):
            connection.cancel_safe(timeout=CANCEL_TIMEOUT)
