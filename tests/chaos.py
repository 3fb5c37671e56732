"""Operations in processes of their own, for whatever may befall them: `python -m tests.chaos` forks them.

A blocking one is a process for each operation, as a task is; SIGTERM there calls ``cancel()``, as an operator's
``on_kill`` does. Deferred ones run many at once in one event loop, as in a triggerer; SIGTERM there cancels their
asyncio tasks. Knows no Airflow, so that a process is made in milliseconds.

An order is a JSON line with the fields of :class:`Order`. Lines ``<order> <what> ...`` answer it: ``started``, then
for each errand ``statement`` as often as it sends one and ``ended`` with its error, at last ``exited``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import psycopg

from airflow_provider_matviews.definition import Index, MatViewDefinition
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.execute_async import AsyncDriver
from airflow_provider_matviews.services.instructions import Session, Work
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.operations import Operations
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.timeouts import Timeouts

Deed = Literal[
    "create",
    "replace",
    "refresh regular",
    "refresh concurrent",
    "refresh swap",
    "refresh auto",
    "delete",
    "delete cascade",
]
DEEDS: tuple[Deed, ...] = get_args(Deed)
#: The role that may read the view.
READER = "chaos_reader"
#: How the application names of the processes begin: the view's query takes long for them only.
SLOW, VERY_SLOW = "chaos", "chaos_long"
DEFINITION = MatViewDefinition(
    name="mv",
    sql="SELECT slowly(id) AS id, version FROM source",
    unique_index_columns=["id"],
    indexes=[Index(columns=["version"])],
    comment="the view",
    grants={READER: ["SELECT"]},
)
#: Somebody looks at the operation all the while it runs, too.
PACE = (0.05,)
#: As an operation is asked for that is to fail if it finds anything in its way.
AT_ONCE: dict[str, Any] = {"if_locked": "fail", "timeouts": Timeouts(lock_timeout=0.5, max_wait=0.5)}


@dataclass(frozen=True)
class Errand:
    """One operation on the view ``mv``.

    :ivar dsn: where it connects to.
    :ivar name: what pg_stat_activity calls its connections, and what copies of a deferred one have in common.
    """

    dsn: str
    deed: Deed
    name: str


@dataclass(frozen=True)
class Order:
    """A process and what it does; blocking, it does one thing only."""

    number: int
    deferred: bool
    errands: Sequence[Errand]


def work(deed: Deed, **manners: Any) -> Work[ServiceResponse]:
    """Return what a deed amounts to, as the hook runs it on a blocking connection and a trigger in an event loop."""
    operations = Operations(Ledger("matviews"))
    match deed.split(" "):
        case ["refresh", strategy]:
            return operations.refresh("mv", refresh_strategy=strategy, row_count_strategy="exact", **manners)
        case ["delete", *how]:
            return operations.delete("mv", cascade=bool(how), **manners)
    return operations.create(DEFINITION, force=deed == "replace", **manners)


def _say(*words: object) -> None:
    # One write, shorter than a pipe's atom: many processes share this output.
    os.write(1, (" ".join(map(str, words))[:1000].replace("\n", " ") + "\n").encode())


class _Telling(Driver):
    """Tells of every statement."""

    def __init__(self, errand: Errand, order: int) -> None:
        super().__init__(
            lambda: psycopg.connect(errand.dsn, application_name=errand.name, connect_timeout=10), pace=PACE
        )
        self._order = order

    def _execute(self, session: Session, statement: Any, parameters: Any) -> Any:
        _say(self._order, "statement", 0)
        return super()._execute(session, statement, parameters)


class _TellingAsync(AsyncDriver):
    """Tells of every statement."""

    def __init__(self, errand: Errand, order: int, position: int) -> None:
        async def connect() -> psycopg.AsyncConnection[Any]:
            return await psycopg.AsyncConnection.connect(
                errand.dsn, application_name=errand.name, connect_timeout=10, autocommit=True
            )

        super().__init__(connect, pace=PACE)
        self._order, self._position = order, position

    async def _execute(self, session: Session, statement: Any, parameters: Any) -> Any:
        _say(self._order, "statement", self._position)
        return await super()._execute(session, statement, parameters)


def _run_blocking(order: Order) -> None:
    (errand,) = order.errands
    error: BaseException | None = None
    driver = _Telling(errand, order.number)
    signal.signal(signal.SIGTERM, lambda number, frame: driver.cancel())
    _say(order.number, "started", os.getpid())
    try:
        with driver:
            driver.run(work(errand.deed))
    except BaseException as raised:
        error = raised
    _say(order.number, "ended", 0, _described(error))


async def _run_deferred(order: Order) -> None:
    async def run(position: int, errand: Errand) -> None:
        error: BaseException | None = None
        try:
            async with _TellingAsync(errand, order.number, position) as driver:
                await driver.run(work(errand.deed, deferral=errand.name))
        except BaseException as raised:
            error = raised
        _say(order.number, "ended", position, _described(error))

    tasks = [asyncio.create_task(run(position, errand)) for position, errand in enumerate(order.errands)]

    def cancel_all() -> None:
        for task in tasks:
            task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, cancel_all)
    _say(order.number, "started", os.getpid())
    await asyncio.gather(*tasks, return_exceptions=True)


def _described(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


def _fork(order: Order) -> None:
    """Fork what waits for the process and tells how it ended, and the process itself."""
    if os.fork() != 0:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        try:
            if order.deferred:
                asyncio.run(_run_deferred(order))
            else:
                _run_blocking(order)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    _say(order.number, "exited", os.waitstatus_to_exitcode(status))
    os._exit(0)


@dataclass
class Victim:
    """A process that was started, as it tells of itself.

    :ivar statements: how many each errand has sent.
    :ivar errors: how the errands have ended, by their position; empty text for well.
    :ivar ended_at: when, by the monotonic clock.
    :ivar status: how the process has ended; None while it runs.
    """

    errands: Sequence[Errand]
    pid: int = 0
    statements: dict[int, int] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    ended_at: dict[int, float] = field(default_factory=dict)
    status: int | None = None
    news: threading.Condition = field(default_factory=threading.Condition)

    def hear(self, what: str, words: Sequence[str]) -> None:
        with self.news:
            match what:
                case "started":
                    self.pid = int(words[0])
                case "statement":
                    position = int(words[0])
                    self.statements[position] = self.statements.get(position, 0) + 1
                case "ended":
                    self.errors[int(words[0])] = " ".join(words[1:])
                    self.ended_at[int(words[0])] = time.monotonic()
                case "exited":
                    self.status = int(words[0])
            self.news.notify_all()

    def wait_for_statements(self, of_all: int, of_each: int = 0) -> None:
        """Wait until it has sent so many statements, or ends."""

        def sent() -> bool:
            counts = [self.statements.get(position, 0) for position in range(len(self.errands))]
            return self.status is not None or (sum(counts) >= of_all and min(counts) >= of_each)

        with self.news:
            self.news.wait_for(sent, timeout=30)

    def wait(self, seconds: float = 60) -> bool:
        """Wait for its end; return whether it came."""
        with self.news:
            return self.news.wait_for(lambda: self.status is not None, timeout=seconds)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended: its number could be another's by then."""
        with self.news, suppress(ProcessLookupError):
            if self.status is None:
                os.kill(self.pid, number)


class Launcher:
    """Starts processes, from any thread; all of them are gone when its block ends."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._victims: dict[int, Victim] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()

    def launch(self, errands: Sequence[Errand], *, deferred: bool = False) -> Victim:
        """Start a process; it runs when this returns."""
        assert self._process.stdin is not None
        victim = Victim(errands)
        with self._lock:
            number = next(self._numbers)
            self._victims[number] = victim
            self._process.stdin.write(json.dumps(asdict(Order(number, deferred, errands))) + "\n")
            self._process.stdin.flush()
        with victim.news:
            assert victim.news.wait_for(lambda: victim.pid, timeout=60), "the process did not start"
        return victim

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            number, what, *words = line.rstrip("\n").split(" ")
            self._victims[int(number)].hear(what, words)


def _main() -> None:
    # What waits for a process is not waited for in its turn.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        _fork(Order(order["number"], order["deferred"], [Errand(**errand) for errand in order["errands"]]))
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _main()
