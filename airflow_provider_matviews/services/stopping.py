"""Why an operation is being stopped, told to it exactly once.

What both drivers share, and no more: the clean-up after the news has to get through undisturbed.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from airflow_provider_matviews.exceptions import OperationCancelled, OperationTimedOut
from airflow_provider_matviews.services.instructions import Deadline

#: Seconds that asking the server to cancel may take; an unreachable server must not hold up the task's end.
CANCEL_TIMEOUT = 5.0
#: Seconds after which the server is asked again to cancel, and after which the connection is cut: whoever waits for a
#: pooler's server connection, or whose server is not to be reached, cannot be cancelled.
INSIST_EVERY, CUT_AFTER = 0.5, 5.0
#: Seconds after which a connection is asked whether it is still there before it is given something to do.
IDLE_LONG = 0.25
#: Seconds before each attempt to open the record's connection once more: others may have taken its place meanwhile.
REOPEN_AFTER = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0)
#: Seconds of waiting from which on the record's connection is given back: fifty who wait for a view need one each.
LONG_PAUSE = 0.5
#: Seconds between the looks at an operation that takes long; the last one goes on.
PACE = (5.0, 5.0, 10.0, 10.0, 30.0, 30.0, 60.0)
#: What one look may cost. In a transaction of its own, so that nothing of it stays in the session.
LIMITED_LOOK = (
    "SELECT set_config('statement_timeout', '2s', true), set_config('lock_timeout', '100ms', true), "
    "set_config('idle_in_transaction_session_timeout', '10s', true)"
)


class Stop:
    """A request to stop: plain assignments only, since it is made in signal handlers and other threads."""

    def __init__(self) -> None:
        self.requested = False
        self.told = False
        self._begun = time.monotonic()
        self._cause: tuple[type[OperationCancelled | OperationTimedOut], str] | None = None

    def request(self, reason: str) -> None:
        """Ask for the end. The first to ask gives the cause."""
        self._ask(OperationCancelled, f"Cancelled after {time.monotonic() - self._begun:.1f} s: {reason}.")

    def time_out(self, deadline: Deadline) -> None:
        """Ask for the end because time is up."""
        self._ask(OperationTimedOut, f"Timed out after {deadline.seconds:.4g} s, all the time that it was given.")

    def _ask(self, kind: type[OperationCancelled | OperationTimedOut], message: str) -> None:
        self._cause = self._cause or (kind, message)
        self.requested = True

    def tell(self) -> OperationCancelled | OperationTimedOut:
        """Return the news as an error, for the operation to hear."""
        self.told = True
        kind, message = self._cause or (OperationCancelled, "Cancelled.")
        if kind is OperationTimedOut:
            return kind(
                message,
                hint="give it more by timeout=... (execution_timeout stands for it), or see what took so long.",
            )
        return kind(message)

    def instead_of(self, error: psycopg.OperationalError) -> BaseException:
        """Return what a statement's end means: our own doing, or somebody else's."""
        if self.requested and not self.told:
            return self.tell()
        if isinstance(error, psycopg.errors.QueryCanceled):
            # It has been heard: what follows is the clean-up.
            self.told = True
        return error


def conninfo_of(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> str:
    """Return what opens another connection like this one, its password in it."""
    return make_conninfo(**connection.info.get_parameters(), password=connection.info.password or None)


def cut(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """End a connection on which somebody else waits; who waits hears of it as of a lost connection."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.pgconn.socket)) as end:
        end.shutdown(socket.SHUT_RDWR)
