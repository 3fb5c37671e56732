"""The way from Airflow to a server: connections, secrets, whose task it is, and what runs there and can be stopped.

What one can ask of it is ``matview.py``'s.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, ClassVar, TypeVar, cast
from urllib.parse import quote

import psycopg
from airflow.providers.postgres.hooks.postgres import PostgresHook

from airflow_provider_matviews.exceptions import InvalidDefinition, UnsupportedServer
from airflow_provider_matviews.names import ViewName, check_identifier
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.execute_async import AsyncDriver
from airflow_provider_matviews.services.instructions import Work
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.migrations import explained
from airflow_provider_matviews.services.operations import Operations
from airflow_provider_matviews.services.run import MINIMUM_VERSION
from airflow_provider_matviews.services.stopping import conninfo_of
from airflow_provider_matviews.timeouts import Timeouts

_T = TypeVar("_T")

#: Sent to libpq unless the connection says otherwise: a dead network is noticed in about a minute, not in hours
#: (https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-KEEPALIVES).
_CONNECTION_DEFAULTS = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    # Names and texts are Unicode here, whatever the database's encoding.
    "client_encoding": "utf8",
}
#: NAMEDATALEN - 1: the server cuts a longer application_name off.
_APPLICATION_NAME_BYTES = 63
_SHORTEST_SECRET = 5
#: Seconds for which it stays true how a connection is opened.
_CONNINFO_KEEPS = 60.0
#: What a task is known by in the record, with the type that ``mat_view_run_history`` shows.
_CONTEXT = {"dag_id": str, "task_id": str, "run_id": str, "map_index": int, "try_number": int}
#: Words in the names of connection extras whose values are secrets.
_SECRET_WORDS = ("password", "passwd", "secret", "token", "key_data")


class ServerHook(PostgresHook):
    """A PostgreSQL connection on which services are run, blocking or in an event loop, and stopped.

    Everything that PostgresHook makes of a connection holds here too: extras, IAM, ``options``, ``database``.

    Its arguments are described where people make one, in ``matview.py``.
    """

    #: What goes to libpq where the Airflow connection says nothing else.
    connection_defaults: ClassVar[Mapping[str, Any]] = _CONNECTION_DEFAULTS

    def __init__(
        self,
        *args: Any,
        tracking_schema: str = "matviews",
        context: Mapping[str, Any] | None = None,
        longest: float | None = None,
        given: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tracking_schema = check_identifier(tracking_schema, "tracking_schema")
        self.context = dict(context or {})
        for key, value in self.context.items():
            if key not in _CONTEXT or not isinstance(value, (_CONTEXT[key], type(None))):
                raise InvalidDefinition(
                    f"context[{key!r}]={value!r} is none of {', '.join(_CONTEXT)}, each of its type."
                )
        self.longest = Timeouts(timeout=longest).timeout
        self.given = given
        self._drivers: set[Driver | AsyncDriver] = set()
        self._refused: str | None = None
        #: The event loop of a blocking call that runs one.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._conninfo: str | None = None
        self._learnt = 0.0

    def get_conn(self) -> Any:
        """Open a connection that tells the server whose it is and notices a dead network.

        :raises InvalidDefinition: when the Airflow connection is not one to PostgreSQL.
        :raises UnsupportedServer: when the server is older than PostgreSQL 14 or something else.
        :raises psycopg.OperationalError: when the server cannot be reached.
        """
        self._prepare_connection()
        connection = super().get_conn()
        version = getattr(getattr(connection, "info", None), "server_version", None)
        if not isinstance(connection, psycopg.Connection):
            raise UnsupportedServer(
                "PostgresHook opened this connection with another driver than psycopg 3.",
                hint="install SQLAlchemy 2 and apache-airflow-providers-postgres 7.0.0 or newer.",
            )
        if version is not None and version < MINIMUM_VERSION:
            connection.close()
            raise UnsupportedServer(
                f"The server behind {self.get_conn_id()} is version {version // 10000}; materialized views are "
                "run on PostgreSQL 14 or newer.",
                hint="upgrade the server: PostgreSQL 13 and older get no more fixes.",
            )
        return connection

    def cancel(self, reason: str = "cancel() was called") -> bool:
        """Stop the operation that runs now: its statement is cancelled on the server and everything undone.

        It then raises :class:`OperationCancelled`. Safe in a signal handler and, for a blocking operation, in another
        thread.

        :param reason: by whom or what, for the record.
        :returns: whether there was one.
        """
        running = list(self._drivers)
        if self._loop is not None:
            # A handler of signals, or another thread: the loop has to be woken for it.
            self._loop.call_soon_threadsafe(self._cancel, running, reason)
        else:
            self._cancel(running, reason)
        return bool(running)

    @staticmethod
    def _cancel(running: Sequence[Driver | AsyncDriver], reason: str) -> None:
        for driver in running:
            driver.cancel(reason)

    def refuse(self, reason: str) -> bool:
        """Stop the operation that runs now, and every one that is begun from now on, as :meth:`cancel` does."""
        self._refused = reason
        return self.cancel(reason)

    def redact(self, text: str) -> str:
        """Return text without the secrets of the connection; where that cannot be looked up there are none."""
        try:
            redact = self._ledger.redact
        except Exception:
            return text
        return redact(text)

    def asset_uri(self, view: str) -> str:
        """Return the URI of a view as an Airflow asset: ``postgres://host:port/database/schema/view``.

        :param view: the name as a response gives it, which stands for ``public`` where it has no schema.
        """
        connection = self.connection
        name = ViewName.parse(view)
        path = "/".join(
            quote(part, safe="")
            for part in (self.database or connection.schema or "", name.schema or "public", name.name)
        )
        return f"postgres://{connection.host or 'localhost'}:{connection.port or 5432}/{path}"

    @property
    def application_name(self) -> str:
        """What pg_stat_activity shows: DAG, task and run, at most 63 bytes of ASCII."""
        parts = [str(self.context[key]) for key in ("dag_id", "task_id", "run_id") if self.context.get(key)]
        name = "/".join(["matviews", *parts])
        # The server turns anything but ASCII into question marks.
        ascii_name = name.encode("ascii", "replace").decode()
        return ascii_name[:_APPLICATION_NAME_BYTES]

    def _run(self, work: Work[_T]) -> _T:
        with Driver(self._open, self.log, redact=self.redact) as driver, self._known(driver):
            return driver.run(work)

    async def _arun(self, make: Callable[[], Work[_T]]) -> _T:
        # In a thread: asking the Airflow connection for its extras may wait for the supervisor.
        work = await self._aside(make)
        async with AsyncDriver(self._aopen, self.log, redact=self.redact) as driver:
            with self._known(driver):
                return await driver.run(work)

    def _read(self, work: Work[_T]) -> _T:
        with Driver(self._open, self.log) as driver:
            return driver.run(explained(self.tracking_schema, work))

    @contextmanager
    def _known(self, driver: Driver | AsyncDriver) -> Iterator[None]:
        self._drivers.add(driver)
        try:
            if self._refused is not None:
                driver.cancel(self._refused)
            yield
        finally:
            self._drivers.discard(driver)

    @staticmethod
    async def _aside(function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(_asides(), function)

    def _open(self) -> psycopg.Connection[Any]:
        return cast("psycopg.Connection[Any]", self.get_conn())

    async def aconnect(self) -> psycopg.AsyncConnection[Any]:
        """Open an asynchronous connection as :meth:`get_conn` opens a blocking one, without holding up the loop.

        :raises InvalidDefinition: when the Airflow connection is not one to PostgreSQL.
        :raises UnsupportedServer: when the server is older than PostgreSQL 14 or something else.
        :raises psycopg.OperationalError: when the server cannot be reached.
        """
        return await self._aopen()

    async def _aopen(self) -> psycopg.AsyncConnection[Any]:
        # How to connect is PostgresHook's business, and get_conn() its only stable way in: it opens one connection, and
        # ours is opened as that one was. Learnt anew after a while, since passwords of IAM run out.
        if self._conninfo is None or time.monotonic() - self._learnt > _CONNINFO_KEEPS:
            self._conninfo = await self._aside(self._learn_conninfo)
            self._learnt = time.monotonic()
        return await psycopg.AsyncConnection.connect(self._conninfo)

    def _learn_conninfo(self) -> str:
        with self._open() as connection:
            return conninfo_of(connection)

    @cached_property
    def _operations(self) -> Operations:
        return Operations(self._ledger, self.context, self.longest, self.given)

    def _operations_for(self, seconds: float | None) -> Operations:
        """Return operations that end in so many seconds, of all that were given."""
        return replace(self._operations, longest=seconds, given=self.given or self.longest)

    @cached_property
    def _ledger(self) -> Ledger:
        secrets = self._secrets()

        def redact(text: str) -> str:
            for secret in secrets:
                text = text.replace(secret, "***")
            if "..." in text:
                # The line that an error points into is cut off at both ends, perhaps in the middle of a secret.
                for secret in secrets:
                    for size in range(len(secret) - 1, 2, -1):
                        text = text.replace(f"{secret[:size]}...", "***...").replace(f"...{secret[-size:]}", "...***")
            return text

        return Ledger(self.tracking_schema, redact)

    def _secrets(self) -> list[str]:
        connection = self.connection
        found = {connection.password}
        for name, value in connection.extra_dejson.items():
            if isinstance(value, str) and any(word in name.lower() for word in _SECRET_WORDS):
                found.add(value)
        # Shorter ones would strike out half of the record; Airflow's own masker passes them over too.
        secrets = {secret for secret in found if secret and len(secret) >= _SHORTEST_SECRET}
        # As they stand in a URL and in an SQL literal, too.
        secrets |= {quote(secret, safe="") for secret in secrets}
        secrets |= {secret.replace("'", "''") for secret in secrets}
        secrets |= {secret.replace("\\", "\\\\") for secret in secrets}
        # The longest first, so that a secret that holds another one goes whole.
        return sorted(secrets, key=len, reverse=True)

    def _prepare_connection(self) -> None:
        # PostgresHook hands every extra to libpq; adding ours there is the one way in that its get_conn()
        # leaves open. A copy, since Airflow may share the object.
        connection = deepcopy(self.connection)
        if (connection.conn_type or "postgres") not in ("postgres", "postgresql", "generic"):
            raise InvalidDefinition(
                f"The connection {self.get_conn_id()} is of type {connection.conn_type!r}, not PostgreSQL.",
                hint="give conn_id the id of a connection of type Postgres.",
            )
        extra = {**self.connection_defaults, "application_name": self.application_name, **connection.extra_dejson}
        connection.extra = json.dumps(extra)
        self._connection = connection


@cache
def _asides() -> ThreadPoolExecutor:
    # Not the loop's own threads, which other triggers need while a server of ours does not answer.
    return ThreadPoolExecutor(8, thread_name_prefix="matviews")
