"""Whatever ends an operation, at whatever moment: nothing is left of it but its record, and that is true.

Processes are ended by signals, their connections by the server and on the way to it, the server and a pooler by
restarts, at random moments of every operation. ``CHAOS_SEED`` repeats the choices of a run (not the scheduling of
the machine), ``CHAOS_TIMES=10`` makes ten times as many.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, LiteralString

import psycopg
import pytest
from psycopg import sql

from airflow_provider_matviews.exceptions import MatViewError
from airflow_provider_matviews.services.execute import Driver
from demo.postgres_server import PostgresServer
from tests.chaos import AT_ONCE, DEEDS, READER, SLOW, VERY_SLOW, Deed, Errand, Launcher, Victim, work
from tests.conftest import INSTALLATIONS
from tests.pgbouncer import PROGRAM, PgBouncer
from tests.proxy import _Proxy

pytestmark = [pytest.mark.chaos, pytest.mark.e2e]

#: What is wrong is told by the problems found, and would be hard to find among thousands of notes.
SILENT = logging.getLogger("tests.chaos.silent")
SILENT.disabled = True
Blow = Literal[
    "SIGTERM",
    "SIGKILL",
    "backend terminated",
    "query cancelled",
    "network cut",
    "network cut for good",
    "server restarted",
    "server crashed",
    "pooler restarted",
]
#: What strikes one process, and how often each of them is to have struck in the middle of each operation.
SINGLE: tuple[Blow, ...] = (
    "SIGTERM",
    "SIGKILL",
    "backend terminated",
    "query cancelled",
    "network cut",
    "network cut for good",
)
ROUNDS = 2
#: What strikes all at once, and how many operations it is to have struck in all.
BLOCKING_BLOWS: dict[Blow, int] = {"server restarted": 14, "server crashed": 14, "pooler restarted": 20}
DEFERRED_BLOWS: dict[Blow, int] = {
    "SIGTERM": 20,
    "SIGKILL": 20,
    "backend terminated": 8,
    "network cut": 8,
    "server restarted": 8,
    "server crashed": 8,
    "pooler restarted": 8,
}
LEAST_KILLS = 200
#: Seconds after which nothing of an operation that was struck may run on the server.
LONGEST_LEFT_OVER = 20.0
WORKERS = 7
#: How often the query is one that would not end by itself in time.
SHARE_OF_LONG = 0.25
#: After so many statements an operation has both its connections.
UNDER_WAY = 5
#: How often a blow that came too late is tried again.
ATTEMPTS = 6
ROWS = 250

SET_UP: tuple[LiteralString, ...] = (
    f"CREATE TABLE source AS SELECT id, 1 AS version FROM generate_series(1, {ROWS}) AS id",
    # Some 0.2 s for those who are struck, so that the moments hit the query too, or longer than a query may be left
    # over, so that it has to be stopped; nothing for the others.
    f"""
    CREATE FUNCTION slowly(id integer) RETURNS integer LANGUAGE plpgsql AS $$
    BEGIN
        IF id % 10 = 0 AND current_setting('application_name') LIKE '{SLOW}%' THEN
            PERFORM pg_sleep(
                CASE WHEN current_setting('application_name') LIKE '{VERY_SLOW}%' THEN 1.2 ELSE 0.008 END);
        END IF;
        RETURN id;
    END$$
    """,
)
MAKE_DEPENDENT: LiteralString = "CREATE VIEW dependent AS SELECT count(*) AS rows, sum(version) AS total FROM mv"
#: Every object with all that it has. Array types take the first name that is free.
OBJECTS: LiteralString = """
    SELECT 'relation', c.relkind::text, n.nspname || '.' || regexp_replace(c.relname, '^(pg_toast_)[0-9]+', '\\1N'),
           pg_get_userbyid(c.relowner)::text,
           ARRAY(SELECT x::text FROM unnest(c.relacl) AS x ORDER BY 1)::text, obj_description(c.oid, 'pg_class'),
           CASE WHEN c.relkind = 'i' AND n.nspname <> 'pg_toast' THEN pg_get_indexdef(c.oid)
                WHEN c.relkind IN ('v', 'm') THEN pg_get_viewdef(c.oid) END
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname <> ALL ('{pg_catalog,information_schema}')
    UNION ALL
    SELECT 'type', t.typtype::text, n.nspname || '.' || CASE WHEN t.typcategory = 'A' THEN '(array)' ELSE t.typname END,
           pg_get_userbyid(t.typowner)::text, t.typacl::text, obj_description(t.oid, 'pg_type'), NULL
    FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
    WHERE n.nspname <> ALL ('{pg_catalog,information_schema}')
    ORDER BY 1, 2, 3
"""
#: Behind a pooler a backend stays, and keeps the name of who used it last.
LEFT_OVER = sql.SQL("""
    SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = {name}
                   AND ({any} OR state IS DISTINCT FROM 'idle'))
""")
LOCKS: LiteralString = """
    SELECT l.locktype, l.mode, l.relation::regclass::text, a.application_name, a.query
    FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND l.pid IS DISTINCT FROM pg_backend_pid() AND a.backend_type IS DISTINCT FROM 'autovacuum worker'
      -- A look at an operation may end a moment after it; it reads system catalogs, which is in nobody's way.
      AND NOT (l.mode = 'AccessShareLock' AND l.relation < 16384)
"""
SERVED: LiteralString = "SELECT count(*), min(version), max(version), count(DISTINCT id) FROM mv"
RUNS: LiteralString = """
    SELECT operation, status, error_class FROM matviews.mat_view_run_history WHERE id > %s ORDER BY id
"""


class Left(AssertionError):
    """Something that should not be there, or is missing."""


@dataclass
class Figures:
    """What happened, from all threads."""

    seed: int
    kills: Counter[Blow] = field(default_factory=Counter)
    deeds: Counter[Deed] = field(default_factory=Counter)
    deferred: Counter[Blow] = field(default_factory=Counter)
    without_effect: int = 0
    longest: float = 0.0
    longest_blow: str = ""
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def struck(self, blow: Blow, deed: Deed, left_over: float, *, deferred: bool) -> None:
        with self.lock:
            self.kills[blow] += 1
            self.deeds[deed] += 1
            if deferred:
                self.deferred[blow] += 1
            if left_over > self.longest:
                self.longest = left_over
                self.longest_blow = f"{blow} of {'deferred' if deferred else 'blocking'} {deed}"

    def of(self, blow: Blow, *, deferred: bool) -> int:
        """How many operations a blow has struck, of the deferred ones or of the others."""
        return self.deferred[blow] if deferred else self.kills[blow] - self.deferred[blow]

    def missed(self) -> None:
        with self.lock:
            self.without_effect += 1

    def found(self, problem: str) -> None:
        with self.lock:
            self.problems.append(problem)

    def __str__(self) -> str:
        total = self.kills.total()
        each = ", ".join(f"{blow} {count}" for blow, count in sorted(self.kills.items()))
        return (
            f"chaos: {total} kills ({each}; {self.deferred.total()} of deferred operations), "
            f"{total - len(self.problems)} survived, longest query left over {self.longest:.1f} s "
            f"({self.longest_blow}), {self.without_effect} more came too late, seed {self.seed}"
        )


@dataclass
class Typical:
    """How long operations take and how many statements they have, as seen so far: when to strike."""

    seconds: dict[Deed, float] = field(default_factory=dict)
    statements: dict[Deed, int] = field(default_factory=dict)

    def learn(self, deed: Deed, seconds: float, statements: int) -> None:
        self.seconds[deed], self.statements[deed] = seconds, statements

    def moment(self, dice: random.Random, deeds: Sequence[Deed], *, by_statement: bool) -> tuple[int, float]:
        """Choose a statement, and how many seconds after it was sent."""
        if not by_statement:
            return 0, dice.uniform(0, max(self.seconds[deed] for deed in deeds))
        return dice.randint(1, sum(self.statements[deed] for deed in deeds)), dice.uniform(0, 0.003)


class Place:
    """A database with the view ``mv``, and what can be seen of it from outside."""

    def __init__(self, server: PostgresServer, name: str) -> None:
        self.server, self.name = server, name
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        self._eye: psycopg.Connection[Any] | None = None
        for statement in SET_UP:
            self.execute(statement)
        self.version = 1
        self._pictures: dict[tuple[bool, bool], list[tuple[Any, ...]]] = {}
        self.operate("create")
        self.execute(MAKE_DEPENDENT)
        self._pictures[True, True] = self.objects()
        self.execute("DROP VIEW dependent")
        self._pictures[True, False] = self.objects()
        self.execute("DROP MATERIALIZED VIEW mv")
        self._pictures[False, False] = self.objects()

    @property
    def dsn(self) -> str:
        return self.server.dsn(self.name)

    def execute(self, statement: Any, parameters: Any = None) -> list[tuple[Any, ...]]:
        try:
            return self._ask(statement, parameters)
        except psycopg.OperationalError:
            # The server was restarted: whatever is asked here may be asked twice.
            if self._eye is None or not self._eye.closed:
                raise
            self._eye = None
            return self._ask(statement, parameters)

    def _ask(self, statement: Any, parameters: Any) -> list[tuple[Any, ...]]:
        if self._eye is None:
            self._eye = psycopg.connect(self.dsn, autocommit=True, application_name="eye")
        cursor = self._eye.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        if self._eye is not None:
            self._eye.close()
            self._eye = None

    def operate(self, deed: Deed, deferral: str | None = None) -> None:
        """Do something oneself, which has to work at once."""
        with Driver(lambda: psycopg.connect(self.dsn), SILENT) as driver:
            driver.run(work(deed, deferral=deferral, **AT_ONCE))

    def objects(self) -> list[tuple[Any, ...]]:
        return self.execute(OBJECTS)

    def served(self) -> int | None:
        """The version that a reader gets; None where there is no view.

        :raises Left: when it is not one version, whole.
        """
        try:
            ((rows, lowest, highest, ids),) = self.execute(SERVED)
        except psycopg.errors.UndefinedTable:
            return None
        if not (rows == ids == ROWS and lowest == highest):
            raise Left(f"{rows} rows of versions {lowest} to {highest}")
        return int(highest)

    def set_up(self, deed: Deed) -> None:
        """Make things as they are to be before a deed, the view older than its source."""
        self.execute("DROP VIEW IF EXISTS dependent")
        if deed == "create":
            self.execute("DROP MATERIALIZED VIEW IF EXISTS mv")
        elif self.served() is None:
            self.operate("create")
        if deed.startswith("refresh") or deed == "delete cascade":
            self.execute(MAKE_DEPENDENT)
        self.old = self.served()
        self.version += 1
        self.execute("UPDATE source SET version = %s", (self.version,))
        self.new = None if deed.startswith("delete") else self.version
        self.dependent = deed.startswith("refresh") or deed == "delete cascade"
        ((self.last_run,),) = self.execute("SELECT coalesce(max(id), 0) FROM matviews.mat_view_runs")

    def verify(self, deed: Deed, *, succeeded: bool, deferral: str | None = None) -> None:
        """Look at what an operation that has ended has left, and whether the next one goes on from there.

        :param succeeded: whether its process said so.
        :param deferral: of a deferred one, which Airflow would start again.
        :raises Left: when anything is not as it should be.
        """
        locks = self.execute(LOCKS)
        _require(locks == [], f"locks: {locks}")
        done = self._verify_objects() == self.new
        _require(done or not succeeded, "its process said that it was done, and it was not")
        runs = self.runs()
        _require(len(runs) <= 1, f"runs {runs}")
        _require(not runs or (runs[0][1] == "success") is done, f"done is {done} and the record says {runs}")
        _require(bool(runs) or not done, "done, and not on record")
        if deferral is not None:
            self._verify_the_copy(deed, deferral, runs, done=done)
        self._verify_the_next_one(deed)

    def runs(self) -> list[tuple[Any, ...]]:
        """The runs since it was set up."""
        return self.execute(RUNS, (self.last_run,))

    def _verify_objects(self) -> int | None:
        served = self.served()
        _require(served in (self.old, self.new), f"version {served}, neither {self.old} nor {self.new}")
        dependent = served is not None and self.dependent
        expected, objects = self._pictures[served is not None, dependent], self.objects()
        if objects != expected:
            raise Left(f"more: {set(objects) - set(expected)}, less: {set(expected) - set(objects)}")
        if served is not None and dependent:
            totals = self.execute("SELECT rows, total FROM dependent")
            _require(totals == [(ROWS, ROWS * served)], f"the dependent view says {totals}")
        return served

    def _verify_the_copy(self, deed: Deed, deferral: str, before: list[tuple[Any, ...]], *, done: bool) -> None:
        """Start it again, as Airflow does when its triggerer was lost: what was done is not done twice."""
        self.operate(deed, deferral)
        _require(self._verify_objects() == self.new, f"the copy left version {self.served()}")
        after = self.runs()
        if done:
            _require(after == before, f"the copy did it again: {after}, before that {before}")
        else:
            _require(
                [run[1] for run in after] == [*["failed"] * len(before), "success"], f"runs with the copy: {after}"
            )

    def _verify_the_next_one(self, deed: Deed) -> None:
        before = self.runs()
        following: Deed = "create" if self.served() is None else "refresh regular"
        self.operate(following)
        _require(self.served() == self.version, f"the next {following} left version {self.served()}")
        *earlier, newest = self.runs()
        _require(newest == (_operation(following), "success", None), f"the next one's run: {newest}")
        _require(len(earlier) == len(before), f"runs {earlier}, before that {before}")
        for (operation, status, error), (_, status_before, error_before) in zip(earlier, before, strict=True):
            _require(operation == _operation(deed), f"run of {operation}")
            lost = ("failed", "RunLost") if status_before == "running" else (status_before, error_before)
            _require((status, error) == lost, f"run {earlier} was {before}")
            _require((status == "failed") is (error is not None), f"run {earlier}")


def _operation(deed: Deed) -> str:
    return {"refresh": "refresh", "delete": "drop"}.get(deed.split(" ")[0], "create")


def _require(true: bool, otherwise: str) -> None:
    if not true:
        raise Left(otherwise)


#: Strikes processes, which do these errands.
Strike = Callable[[Sequence[Victim], Sequence[Errand]], None]


@dataclass
class Round:
    """Operations at once, each at a place of its own, struck at the same moment.

    :ivar port: where the processes connect to; None for the server itself.
    :ivar pooled: whether a pooler is there.
    """

    launcher: Launcher
    figures: Figures
    typical: Typical
    dice: random.Random
    places: Sequence[Place]
    deeds: Sequence[Deed]
    deferred: bool = False
    port: int | None = None
    pooled: bool = False

    _numbers = itertools.count(1)

    def run(self, blow: Blow, strike: Strike) -> bool:
        """Do it all, look at all of it, and return whether any operation was struck before it was done."""
        # Where the query is long every moment of it is as good as another, and one that comes before there is
        # anything to strike would have to wait for its end.
        long = blow != "query cancelled" and self.dice.random() < SHARE_OF_LONG
        errands = [self._set_up(place, deed, long=long) for place, deed in zip(self.places, self.deeds, strict=True)]
        # By time alone nearly all would strike in the query; by statements alone, hardly any.
        by_statement = not long and self.dice.random() < 0.6
        deeds = self.deeds if self.deferred else self.deeds[:1]
        statement, seconds = self.typical.moment(self.dice, deeds, by_statement=by_statement)
        victims = self._launch(errands)
        victims[0].wait_for_statements(statement)
        if long:
            for victim in victims:
                victim.wait_for_statements(0, UNDER_WAY)
        time.sleep(seconds)
        strike(victims, errands)
        left_over = self._wait_until_gone(errands)
        ended = all(victim.wait() for victim in victims)
        # What was not struck went on, and somebody may have looked at it until its very end.
        self._wait_until_gone(errands)
        succeeded = [
            (victims[0].errors.get(position) if self.deferred else victims[position].errors.get(0)) == ""
            for position in range(len(errands))
        ]
        for place, errand, left, success in zip(self.places, errands, left_over, succeeded, strict=True):
            if success:
                self.figures.missed()
            else:
                self.figures.struck(blow, errand.deed, left, deferred=self.deferred)
            try:
                _require(ended, "its process goes on")
                _require(left < LONGEST_LEFT_OVER, "its query goes on")
                place.verify(errand.deed, succeeded=success, deferral=errand.name if self.deferred else None)
            except (Left, psycopg.Error, MatViewError) as error:
                kind = "deferred" if self.deferred else "blocking"
                self.figures.found(
                    f"{blow}, {seconds:.3f} s after statement {statement} of {kind} {errand.deed}{' (long)' * long}, "
                    f"at {place.name}: {type(error).__name__}: {error}"
                )
        return not all(succeeded)

    def calibrate(self) -> None:
        """Do it without any blow, to learn when to strike."""
        errands = [self._set_up(place, deed) for place, deed in zip(self.places, self.deeds, strict=True)]
        begun = time.monotonic()
        for place, victim in zip(self.places, self._launch(errands), strict=True):
            assert victim.wait()
            (errand,) = victim.errands
            assert victim.errors[0] == "", f"{errand.deed} without any blow: {victim.errors}"
            place.verify(errand.deed, succeeded=True)
            self.typical.learn(errand.deed, victim.ended_at[0] - begun, victim.statements[0])

    def _set_up(self, place: Place, deed: Deed, *, long: bool = False) -> Errand:
        place.set_up(deed)
        port = self.port or place.server.port
        dsn = f"host=127.0.0.1 port={port} dbname={place.name} user=postgres"
        return Errand(dsn, deed, f"{VERY_SLOW if long else SLOW}_{next(self._numbers)}")

    def _launch(self, errands: Sequence[Errand]) -> list[Victim]:
        if self.deferred:
            return [self.launcher.launch(errands, deferred=True)]
        return [self.launcher.launch([errand]) for errand in errands]

    def _wait_until_gone(self, errands: Sequence[Errand]) -> list[float]:
        """Wait until nothing of any of them runs on the server; return how many seconds that took of each."""
        begun = time.monotonic()
        left = [LONGEST_LEFT_OVER] * len(errands)
        waiting = set(range(len(errands)))
        while waiting and time.monotonic() - begun < LONGEST_LEFT_OVER:
            for position in sorted(waiting):
                name = sql.Literal(errands[position].name)
                ((there,),) = self.places[position].execute(
                    LEFT_OVER.format(name=name, any=sql.Literal(not self.pooled))
                )
                if not there:
                    left[position] = time.monotonic() - begun
                    waiting.remove(position)
            time.sleep(0.02)
        return left


def _signal(number: signal.Signals) -> Strike:
    def strike(victims: Sequence[Victim], errands: Sequence[Errand]) -> None:
        for victim in victims:
            victim.send(number)

    return strike


def _at_backends(places: Sequence[Place], statement: LiteralString) -> Strike:
    def strike(victims: Sequence[Victim], errands: Sequence[Errand]) -> None:
        for place, errand in zip(places, errands, strict=True):
            place.execute(statement, (errand.name,))

    return strike


TERMINATE: LiteralString = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
CANCEL: LiteralString = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = %s"


def _cut(proxy: _Proxy) -> None:
    for client in list(proxy._clients):
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@contextmanager
def _striking(blow: Blow, places: Sequence[Place], pooler: PgBouncer | None) -> Iterator[tuple[Strike, int | None]]:
    """Yield what strikes, and the port that the processes are to connect to for it."""
    server = places[0].server
    match blow:
        case "SIGTERM" | "SIGKILL":
            yield _signal(signal.Signals[blow]), None
        case "backend terminated":
            yield _at_backends(places, TERMINATE), None
        case "query cancelled":
            yield _at_backends(places, CANCEL), None
        case "server restarted":
            yield lambda victims, errands: server.restart("fast"), None
        case "server crashed":
            yield lambda victims, errands: server.restart("immediate"), None
        case "pooler restarted":
            assert pooler is not None
            yield lambda victims, errands: pooler.restart(), pooler.port
        case "network cut" | "network cut for good":
            proxy = _Proxy(server.port, bytes, bytes)
            # It waits for the server to hang up, too.
            closing = threading.Thread(target=proxy.close)

            def strike(victims: Sequence[Victim], errands: Sequence[Errand]) -> None:
                if blow == "network cut":
                    _cut(proxy)
                else:
                    closing.start()

            try:
                yield strike, proxy.port
            finally:
                if blow == "network cut":
                    closing.start()
                closing.join()


@dataclass
class Chaos:
    """What all parts of it share."""

    launcher: Launcher
    figures: Figures
    typical: Typical

    def dice(self, name: str) -> random.Random:
        return random.Random(f"{self.figures.seed} {name}")

    def round(
        self,
        blow: Blow,
        places: Sequence[Place],
        deeds: Sequence[Deed],
        dice: random.Random,
        *,
        deferred: bool = False,
        pooler: PgBouncer | None = None,
    ) -> bool:
        with _striking(blow, places, pooler) as (strike, port):
            return Round(
                self.launcher,
                self.figures,
                self.typical,
                dice,
                places,
                deeds,
                deferred,
                port,
                pooled=blow == "pooler restarted",
            ).run(blow, strike)

    def one_by_one(self, place: Place, orders: deque[tuple[Blow, Deed, int]]) -> None:
        """Strike one operation after the other, until there are no more orders."""
        dice = self.dice(place.name)
        while not self.enough:
            try:
                blow, deed, attempts = orders.popleft()
            except IndexError:
                return
            if not self.round(blow, [place], [deed], dice) and attempts < ATTEMPTS:
                orders.append((blow, deed, attempts + 1))

    def all_at_once(
        self, places: Sequence[Place], blows: dict[Blow, int], pooler: PgBouncer | None, *, deferred: bool
    ) -> None:
        """Strike many operations at once, until each blow has struck as many as it should."""
        dice = self.dice(places[0].name)
        for blow in blows:
            if blow == "pooler restarted" and pooler is None:
                continue
            # However often it comes too late.
            for _ in range(blows[blow]):
                if self.enough or self.figures.of(blow, deferred=deferred) >= blows[blow]:
                    break
                deeds = dice.sample(DEEDS, len(DEEDS))
                self.round(blow, places, deeds[: len(places)], dice, deferred=deferred, pooler=pooler)

    @property
    def enough(self) -> bool:
        """Whether so much is wrong that more of it says nothing."""
        return len(self.figures.problems) >= 8


def _places(server: PostgresServer, prefix: str, count: int) -> list[Place]:
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(READER)))
    return [Place(server, f"{prefix}_{number}") for number in range(count)]


def _strike_everything(figures: Figures, times: int) -> None:
    with ExitStack() as stack:
        chaos = Chaos(stack.enter_context(Launcher()), figures, Typical())
        # Each part on another major, as far as there are.
        majors = itertools.cycle(sorted(INSTALLATIONS, reverse=True))
        # What must find nothing in its way is not to meet an autovacuum worker.
        settings = {"autovacuum": "off"}
        servers = [stack.enter_context(PostgresServer(INSTALLATIONS[next(majors)], None, settings)) for _ in range(3)]
        poolers = [stack.enter_context(PgBouncer(server)) if PROGRAM else None for server in servers[1:]]
        pool = stack.enter_context(ThreadPoolExecutor(WORKERS + 2))
        counts = (WORKERS, len(DEEDS), len(DEEDS))
        singles, together, deferred = pool.map(_places, servers, ("single", "together", "deferred"), counts)
        for place in (*singles, *together, *deferred):
            stack.callback(place.close)
        Round(chaos.launcher, figures, chaos.typical, chaos.dice("calibration"), together, DEEDS).calibrate()
        orders = deque((blow, deed, 1) for blow in SINGLE for deed in DEEDS for _ in range(times * ROUNDS))
        chaos.dice("orders").shuffle(orders)
        parts = [pool.submit(chaos.one_by_one, place, orders) for place in singles]
        for places, blows, pooler in ((together, BLOCKING_BLOWS, poolers[0]), (deferred, DEFERRED_BLOWS, poolers[1])):
            wanted = {blow: count * times for blow, count in blows.items()}
            parts.append(pool.submit(chaos.all_at_once, places, wanted, pooler, deferred=places is deferred))
        for part in parts:
            part.result()


def test_whatever_ends_an_operation_leaves_the_view_whole_and_the_record_true(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(1_000_000))
    figures = Figures(seed)
    try:
        _strike_everything(figures, int(os.environ.get("CHAOS_TIMES") or 1))
    finally:
        with capsys.disabled():
            # Not to standard output, which nobody sees where tests run on several workers.
            sys.stderr.write(f"\n{figures}\n")
    assert not figures.problems, "\n".join([f"seed {seed}:", *figures.problems])
    assert figures.kills.total() >= LEAST_KILLS
    assert set(figures.deeds) == set(DEEDS)
    assert all(figures.kills[blow] for blow in SINGLE)
