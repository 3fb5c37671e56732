"""Operations in processes that are killed: `python -m tests.killing` forks one for each order it reads.

A process of its own, because a test process full of Airflow and threads is not one to fork; knows no Airflow.
An order is a JSON line with the fields of :class:`Order`. Two lines answer it: the pid, and how it ended.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psycopg

from airflow_provider_matviews.definition import Index, MatViewDefinition, RefreshStrategy
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.create import Creating, create_view
from airflow_provider_matviews.services.delete import delete_view
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Session, Work
from airflow_provider_matviews.services.ledger import Ledger, Operation
from airflow_provider_matviews.services.migrations import ensure_schema
from airflow_provider_matviews.services.refresh import refresh_view
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.services.run import Prepared, Subject, Terms, record_run

#: What pg_stat_activity calls the connections of the processes that are killed.
VICTIM = "victim"
QUERY = "SELECT id, value FROM source"
DEFINITION = MatViewDefinition(name="mv", sql=QUERY, unique_index_columns=["id"], comment="the view")

Deed = Literal[
    "create",
    "replace",
    "alter",
    "apply",
    "rename",
    "refresh",
    "refresh concurrently",
    "delete",
    "delete cascade",
    "migrate",
]
#: What a view that is as :data:`DEFINITION` says is to become.
CHANGES: dict[Deed, MatViewDefinition] = {
    "alter": replace(
        DEFINITION,
        comment="altered",
        grants={"public": ["SELECT"]},
        indexes=[Index(columns=["value"])],
        exclusive=True,
    ),
    "apply": replace(
        DEFINITION, sql="SELECT id, value, value + 1 AS next FROM source", indexes=[Index(columns=["next"])]
    ),
    "rename": replace(DEFINITION, name="renamed", renamed_from="mv", comment="renamed"),
}


@dataclass(frozen=True)
class Order:
    """What a process is to do, and when it dies.

    :ivar dsn: where it connects to.
    :ivar deed: what it does, to the view ``mv``.
    :ivar at: at which of its statements it kills itself, from 1 on; 0 never. The statement has been sent then
        and its answer is still out, so the server sees the same as when it dies before the following one.
    :ivar looking_too: whether statements that only look at something are counted. What they leave on the server is
        what the statement before them has left.
    """

    dsn: str
    deed: Deed
    at: int = 0
    tracking_schema: str = "matviews"
    looking_too: bool = True


@dataclass(frozen=True)
class End:
    """How a process ended.

    :ivar killed: by SIGKILL; otherwise it did all that it was to do.
    :ivar statement: at which statement it killed itself.
    """

    killed: bool
    statement: str


def _service(deed: Deed, prepared: Prepared) -> Work[ServiceResponse]:
    view, server, report = prepared.view, prepared.server, prepared.report
    match deed:
        case "refresh" | "refresh concurrently":
            strategy = RefreshStrategy.REGULAR if deed == "refresh" else RefreshStrategy.CONCURRENT
            return refresh_view(view, server, report, strategy=strategy, analyze=False)
        case "create" | "replace" | "alter" | "apply" | "rename":
            definition = CHANGES.get(deed, DEFINITION)
            job = Creating(
                view, prepared.origin, definition, server, report, prepared.patience, force=deed == "replace"
            )
            return create_view(job)
        case "delete" | "delete cascade":
            return delete_view(view, server, report, managed=True, cascade=deed == "delete cascade")
    raise ValueError(deed)


def work(deed: Deed, tracking_schema: str = "matviews") -> Work[Any]:
    """Return what a deed amounts to, as the hook would run it."""
    if deed == "migrate":
        return ensure_schema(tracking_schema)
    match deed:
        case "create" | "replace" | "alter" | "apply" | "rename":
            operation = Operation.CREATE
        case "delete" | "delete cascade":
            operation = Operation.DROP
        case _:
            operation = Operation.REFRESH
    definition = CHANGES.get(deed, DEFINITION)
    subject = Subject(definition.view, definition) if operation is Operation.CREATE else Subject(ViewName("mv"))
    return record_run(operation, subject, Ledger(tracking_schema), Terms(), lambda prepared: _service(deed, prepared))


#: A query, and what makes one more than a look.
_QUERY = ("SELECT", "WITH", "TABLE")
_MORE = re.compile(r"\b(INSERT|UPDATE|DELETE|MERGE|nextval|pg_\w*advisory\w*)\b", re.IGNORECASE)


def _only_looks(text: str) -> bool:
    return text.lstrip().startswith(_QUERY) and not _MORE.search(text)


class _Doomed(Driver):
    """Kills its own process at a chosen statement."""

    def __init__(self, order: Order, tell: int) -> None:
        super().__init__(lambda: psycopg.connect(order.dsn, application_name=VICTIM))
        self._order, self._tell, self._statements = order, tell, 0

    def _execute(self, session: Session, statement: Any, parameters: Any) -> Any:
        connection = self._connection(session)
        text = psycopg.ClientCursor(connection).mogrify(statement, parameters)
        self._statements += self._order.looking_too or not _only_looks(text)
        if self._statements == self._order.at:
            os.write(self._tell, f"{session.value}: {' '.join(text.split())[:200]}".encode())
            connection.pgconn.send_query(text.encode())
            while connection.pgconn.flush():
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._execute(session, statement, parameters)


def _carry_out(order: Order) -> None:
    """Fork the process, and tell of it."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with _Doomed(order, tell) as driver:
                driver.run(work(order.deed, order.tracking_schema))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(tell)
    _answer(pid)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(told, "rb") as pipe:
        statement = pipe.read().decode()
    _answer([os.waitstatus_to_exitcode(status), statement])


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


class Gallows:
    """Asks for processes, from the tests."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, order: Order) -> int:
        """Start a process and return its pid; :meth:`end` waits for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self) -> End:
        """Wait for the process that was started, which fails the test when it ended by an error."""
        assert self._process.stdout is not None
        status, statement = json.loads(self._process.stdout.readline())
        assert status in (0, -signal.SIGKILL), f"it ended with status {status}"
        return End(status != 0, statement)

    def run(self, order: Order) -> End:
        """Start a process and wait for it."""
        self.start(order)
        return self.end()


@contextmanager
def gallows() -> Iterator[Gallows]:
    """Yield what starts processes; it is gone when the block ends."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.killing"],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Gallows(process)


if __name__ == "__main__":
    for line in sys.stdin:
        _carry_out(Order(**json.loads(line)))
