"""What both drivers keep in mind of their connections; how to open and to wait is theirs."""

from __future__ import annotations

import time
from typing import Any, Generic, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from airflow_provider_matviews.services.instructions import Session
from airflow_provider_matviews.services.stopping import Stop

_C = TypeVar("_C", psycopg.Connection[Any], psycopg.AsyncConnection[Any])


class Connections(Generic[_C]):
    """Base of the drivers: one connection for each :class:`Session`, and what is known of it."""

    def __init__(self) -> None:
        self._connections: dict[Session, _C] = {}
        self._stop = Stop()
        self._last_used: dict[Session, float] = {}
        #: Those that are in no transaction.
        self._resting: set[Session] = set()

    def _used(self, session: Session, connection: _C) -> None:
        """Keep in mind that something was done on a connection, and what it is left in."""
        self._last_used[session] = time.monotonic()
        if not connection.closed and connection.info.transaction_status is TransactionStatus.IDLE:
            self._resting.add(session)
        else:
            self._resting.discard(session)

    def _stands(self, session: Session) -> bool:
        connection = self._connections.get(session)
        return connection is not None and not connection.closed

    def _is_worth_a_wait(self, session: Session) -> bool:
        """Whether there is work that would be lost for want of a connection to its record."""
        at_work = self._stands(Session.WORK) and Session.WORK not in self._resting
        return session is Session.RECORD and session in self._last_used and at_work and not self._stop.told


def busy(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Whether the server works on something for it."""
    return not connection.closed and connection.info.transaction_status is TransactionStatus.ACTIVE
