"""Writers, DDL and refreshes at random: what ``skip_unchanged`` leaves alone is never older than what it reads.

In rounds: for a moment everything happens at once, then writers fall silent and what they wrote is counted; one last
``refresh_many(skip_unchanged=True)``, and whatever it skipped must equal its query, by EXCEPT ALL both ways, in one
snapshot. Tables rest in some rounds, so that there is something to skip. ``FIRE_SEED`` repeats the choices of a run
(not the scheduling of the machine), ``FIRE_SECONDS`` says for how long, ``FIRE_MAJOR`` on which PostgreSQL.
``FIRE_HUNT=1`` also lets it run with mistakes made on purpose, which it has to find.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import FleetFailed, MatViewError
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.services import staleness
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.instructions import Work
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.staleness import Baseline, Judgement, Look
from demo.postgres_server import PostgresServer
from tests.conftest import INSTALLATIONS, NEWEST, Database, hook_on

SILENT = logging.getLogger("tests.fire.silent")
SILENT.disabled = True
SECONDS = 25.0
#: Databases that burn beside each other, on one server.
PLACES = 3
#: The shortest and the longest time for which everything happens at once, in seconds.
BURST = (0.05, 0.15)
LEAST_ROUNDS = 15
LEAST_SHARE_SKIPPED = 0.1
#: Seconds within which a test that looks away has to be caught.
LONGEST_HUNT = 300.0

#: Each with the same columns, so that anything may be written to any of them: the kinds of tables that there are.
AREAS: dict[str, tuple[LiteralString, ...]] = {
    "orders": ("CREATE TABLE orders (id integer, key integer, n integer)",),
    "customers": ("CREATE TABLE customers (id integer, key integer, n integer)",),
    "rests": ("CREATE TABLE rests (id integer, key integer, n integer)",),
    "pets": ("CREATE TABLE pets (id integer, key integer, n integer)",),
    "events": (
        "CREATE TABLE events (id integer, key integer, n integer) PARTITION BY LIST (key)",
        "CREATE TABLE events_0 PARTITION OF events FOR VALUES IN (0)",
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES IN (1)",
        "CREATE TABLE events_2 PARTITION OF events FOR VALUES IN (2) PARTITION BY HASH (id)",
        "CREATE TABLE events_2_even PARTITION OF events_2 FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
        "CREATE TABLE events_2_odd PARTITION OF events_2 FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
        "CREATE TABLE events_3 PARTITION OF events FOR VALUES IN (3)",
    ),
    "animals": (
        "CREATE TABLE animals (id integer, key integer, n integer)",
        "CREATE TABLE cats () INHERITS (animals)",
        "CREATE TABLE dogs (LIKE cats)",
    ),
}
#: What can be written to, by area.
TABLES = {area: (area,) for area in AREAS} | {
    "events": ("events", "events_0", "events_1", "events_2", "events_2_odd", "events_3"),
    "animals": ("animals", "cats", "dogs"),
}
BETWEEN: tuple[LiteralString, ...] = (
    "CREATE VIEW large AS SELECT id, key, n FROM orders WHERE n > 1",
    "CREATE VIEW named AS SELECT c.id, c.key, coalesce(sum(l.n), 0) AS n "
    "FROM customers c LEFT JOIN large l ON l.key = c.key GROUP BY 1, 2",
    "CREATE FUNCTION total(wanted integer) RETURNS bigint LANGUAGE sql STABLE "
    "RETURN (SELECT coalesce(sum(n), 0) + 0 FROM orders WHERE key = wanted)",
    "CREATE FUNCTION plus(a integer, b integer) RETURNS integer LANGUAGE sql IMMUTABLE RETURN a + b + 0",
    "CREATE OPERATOR <+> (FUNCTION = plus, LEFTARG = integer, RIGHTARG = integer)",
)
#: By level, each after what it reads: its strategy, its query, and whether ``id`` is unique in it.
VIEWS: dict[str, tuple[str, LiteralString, bool]] = {
    "by_key": ("regular", "SELECT key AS id, count(*) AS n, sum(n) AS total FROM orders GROUP BY 1", True),
    "by_name": ("auto", "SELECT id, count(*) AS rows, sum(n) AS n FROM named GROUP BY 1", True),
    "by_event": ("concurrent", "SELECT id, count(*) AS n, sum(key * n) AS total FROM events GROUP BY 1", True),
    "by_animal": ("swap", "SELECT tableoid::bigint AS kind, key, n FROM animals", False),
    "by_function": ("regular", "SELECT key AS id, total(key) AS n FROM customers GROUP BY 1", True),
    "by_operator": ("auto", "SELECT id, n <+> key AS n FROM rests", False),
    "by_rest": ("concurrent", "SELECT id, sum(n) AS n FROM rests GROUP BY 1", True),
    "by_pet": ("regular", "SELECT to_jsonb(p) AS whole FROM pets p", False),
    "over_both": (
        "auto",
        "SELECT k.id, k.n + coalesce(m.n, 0) AS n FROM by_key k LEFT JOIN by_name m USING (id)",
        True,
    ),
    "over_events": ("concurrent", "SELECT e.n AS id, count(*) AS n FROM by_event e GROUP BY 1", True),
    "over_rest": ("regular", "SELECT n AS id, count(*) AS n FROM by_rest GROUP BY 1", True),
    "top": ("swap", "SELECT b.id, b.n, e.n AS events FROM over_both b LEFT JOIN over_events e USING (id)", False),
    "top_mixed": ("concurrent", "SELECT e.id, e.n + (SELECT count(*) FROM animals) AS n FROM over_events e", True),
    "top_rest": ("auto", "SELECT sum(id * n) AS n FROM (SELECT id, n FROM over_rest) r", False),
}
#: What is written to a table {t} of an area, with numbers at random.
WRITES: tuple[LiteralString, ...] = (
    "INSERT INTO {t} SELECT g, {key}, {n} FROM generate_series({n}, {n} + 3) g",
    "INSERT INTO {t} VALUES ({id}, {key}, {n})",
    "INSERT INTO {t} VALUES ({id}, {key}, {n})",
    "UPDATE {t} SET n = n + 1 WHERE id % 5 = {key}",
    "UPDATE {t} SET n = {n} WHERE id % 7 = {key}",
    "DELETE FROM {t} WHERE id % 3 = {key}",
    "DELETE FROM {t} WHERE id % 2 = {key} % 2",
    "WITH gone AS (DELETE FROM {t} WHERE n = {n} RETURNING id) INSERT INTO {t} SELECT id, {key}, {n} FROM gone",
    "TRUNCATE {t}",
    "COPY",
)
#: What is done to an area's objects; for its refusals (an attached partition is attached again) nobody cares.
CHANGES: dict[str, tuple[LiteralString, ...]] = {
    "orders": (
        "CREATE OR REPLACE VIEW large AS SELECT id, key, n FROM orders WHERE n > {key}",
        "CREATE OR REPLACE FUNCTION total(wanted integer) RETURNS bigint LANGUAGE sql STABLE "
        "RETURN (SELECT coalesce(sum(n), 0) + {key} FROM orders WHERE key = wanted)",
        "ALTER TABLE orders ALTER COLUMN id TYPE integer USING id + {key}",
        "SELECT pg_stat_reset_single_table_counters('orders'::regclass)",
    ),
    "customers": (
        "CREATE OR REPLACE VIEW named AS SELECT c.id, c.key, coalesce(sum(l.n), 0) + {key} AS n "
        "FROM customers c LEFT JOIN large l ON l.key = c.key GROUP BY 1, 2",
        "VACUUM FULL customers",
        "CREATE INDEX IF NOT EXISTS customers_id ON customers (id)",
        "CLUSTER customers USING customers_id",
    ),
    "rests": (
        "CREATE OR REPLACE FUNCTION plus(a integer, b integer) RETURNS integer LANGUAGE sql IMMUTABLE "
        "RETURN a + b + {key}",
        "ALTER TABLE rests SET UNLOGGED",
        "ALTER TABLE rests SET LOGGED",
    ),
    "pets": (
        "ALTER TABLE pets ADD COLUMN more integer DEFAULT {n}",
        "ALTER TABLE pets DROP COLUMN more",
        "ALTER TABLE pets RENAME COLUMN more TO other_{key}",
        "ALTER TABLE pets DROP COLUMN other_{key}",
    ),
    "events": (
        "ALTER TABLE events DETACH PARTITION events_3",
        "ALTER TABLE events DETACH PARTITION events_3 CONCURRENTLY",
        "ALTER TABLE events DETACH PARTITION events_3 FINALIZE",
        "ALTER TABLE events ATTACH PARTITION events_3 FOR VALUES IN (3)",
        "ALTER TABLE events ATTACH PARTITION events_3 FOR VALUES IN (3)",
        "ALTER TABLE events_2 DETACH PARTITION events_2_odd",
        "ALTER TABLE events_2 ATTACH PARTITION events_2_odd FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
        "VACUUM FULL events_0",
    ),
    "animals": (
        "ALTER TABLE dogs INHERIT animals",
        "ALTER TABLE dogs NO INHERIT animals",
        "ALTER TABLE cats RENAME TO tigers",
        "ALTER TABLE tigers RENAME TO cats",
        "VACUUM FULL dogs",
    ),
}
#: What changes no result, and may be done to what rests as well.
IDLE_CHANGES: tuple[LiteralString, ...] = (
    "GRANT SELECT ON {view} TO PUBLIC",
    "REVOKE SELECT ON {view} FROM PUBLIC",
    "COMMENT ON MATERIALIZED VIEW {view} IS 'busy'",
    "ANALYZE {view}",
    "VACUUM {view}",
    "ANALYZE",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name = 'writer {key}'",
)
#: From PostgreSQL 18 on.
VIRTUAL: tuple[LiteralString, ...] = (
    "ALTER TABLE pets ADD COLUMN twice integer GENERATED ALWAYS AS (n * 2) VIRTUAL",
    "ALTER TABLE pets ALTER COLUMN twice SET EXPRESSION AS (n * {key})",
)
LIMITS = "-c lock_timeout=100ms -c statement_timeout=10s"


@dataclass
class Figures:
    """What happened, in all places."""

    seed: int
    happened: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    missed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, times: int = 1) -> None:
        with self._lock:
            self.happened[what] += times

    def found(self, problem: str, missed: int = 0) -> None:
        with self._lock:
            self.problems.append(f"seed {self.seed}, {problem}")
            self.missed += missed

    def __str__(self) -> str:
        told = ", ".join(f"{count} {what}" for what, count in sorted(self.happened.items()))
        return f"fire: {told}; {self.missed} changes missed, {len(self.problems)} problems, seed {self.seed}"


class Place:
    """A database on fire."""

    def __init__(self, server: PostgresServer, number: int, figures: Figures) -> None:
        self.figures = figures
        self.name = f"fire_{number}"
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(self.name)))
        self.database = Database(server, self.name)
        self.dice = random.Random(f"{figures.seed} {number}")
        self.in_play: list[str] = []
        self.over = threading.Event()
        self.prepared: list[str] = []
        self.changes = dict(CHANGES)
        self.eye = self.database.connect(application_name="eye")
        for statement in (*(each for area in AREAS.values() for each in area), *BETWEEN):
            self.eye.execute(statement)
        if server.major >= 18:
            self.eye.execute(VIRTUAL[0])
            self.changes["pets"] += VIRTUAL[1:]
        hook = self.hook()
        for name, (strategy, query, unique) in VIEWS.items():
            columns = ("id",) if unique else ()
            hook.create(
                MatViewDefinition(name=name, sql=query, refresh_strategy=strategy, unique_index_columns=columns)
            )
        # Of the views' own text, which never changes; what it reads does.
        self.texts = {
            str(name): str(text)
            for name, text in self.eye.execute("SELECT matviewname, definition FROM pg_matviews").fetchall()
        }
        self.actors: list[Actor] = [
            *(Writer(self, f"writer {each}") for each in range(3)),
            Changer(self, "changer"),
            Outsider(self, "outsider"),
            *(Latecomer(self, f"latecomer {each}") for each in range(2)),
            Refresher(self, "refresher"),
            FleetRefresher(self, "fleet"),
        ]

    def hook(self) -> MatViewHook:
        hook = hook_on(self.database)
        # Nobody reads what thousands of operations tell.
        hook._log = SILENT
        return hook

    def close(self) -> None:
        for actor in self.actors:
            actor.close()
        self.eye.close()

    def burn(self, pool: ThreadPoolExecutor) -> None:
        """Have one round."""
        dice = self.dice
        share = dice.choice((0.0, 0.2, 0.4, 0.8))
        self.in_play = [area for area in AREAS if dice.random() < share]
        # What writers do hides what DDL has done.
        calm = dice.random() < 0.3
        acting = [
            actor for actor in self.actors if dice.random() < actor.share and not (calm and type(actor) is Writer)
        ]
        self.over.clear()
        running = [pool.submit(actor.act) for actor in acting]
        time.sleep(dice.uniform(*BURST))
        self.over.set()
        for each in running:
            each.result()
        self._be_quiet()
        self._check()
        self.figures.count("rounds")

    def _be_quiet(self) -> None:
        """Wait until nobody writes and all that was written is counted."""
        for actor in self.actors:
            actor.be_counted()
        for (gid,) in self.eye.execute("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"):
            self.eye.execute(sql.SQL("{} PREPARED {}").format(sql.SQL(self._ending()), sql.Literal(gid)))
        self.prepared.clear()
        self.eye.execute("SELECT pg_stat_force_next_flush()")
        # A session that was closed is counted when its process ends.
        known = [actor.pid for actor in self.actors if actor.pid is not None]
        deadline = time.monotonic() + 20
        while self.eye.execute(
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend' "
            "AND pid <> pg_backend_pid() AND pid <> ALL (%s)",
            (known,),
        ).fetchall():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: sessions do not end")
            time.sleep(0.002)

    def _ending(self) -> LiteralString:
        return "COMMIT" if self.dice.random() < 0.8 else "ROLLBACK"

    def _check(self) -> None:
        before = self._contents()
        try:
            response = self.hook().refresh_many(["*.*"], skip_unchanged=True, at_once=2)
        except FleetFailed as failure:
            self.figures.found(f"{self.name}: the last refresh, when all was quiet, failed: {failure}")
            return
        after = self._contents()
        for outcome in response.outcomes:
            content, differing = after[outcome.view]
            self.figures.count(f"views {outcome.status} at last")
            if differing:
                self.figures.found(
                    f"{self.name}: {outcome.view} was {outcome.status} ({outcome.reason}), and {differing} rows differ "
                    f"from its query; in play: {', '.join(self.in_play) or 'nothing'}; "
                    f"what is kept: {self._kept(outcome.view)}",
                    missed=outcome.status == "skipped",
                )
            if outcome.status == "updated" and before[outcome.view][0] == content:
                self.figures.count("needless refreshes at last")
        if self.figures.problems:
            # The next round is to begin with what is true.
            self.hook().refresh_many(["*.*"])

    def _contents(self) -> dict[str, tuple[str, int]]:
        """Return, of every view, a digest of its rows and how many differ from its query; in one snapshot."""
        each = sql.SQL(" UNION ALL ").join(
            sql.SQL(
                "SELECT {name}, (SELECT md5(coalesce(string_agg(v::text, ',' ORDER BY v::text), '')) FROM {view} v), "
                "(SELECT count(*) FROM (TABLE {view} EXCEPT ALL ({text})) more) + "
                "(SELECT count(*) FROM (({text}) EXCEPT ALL TABLE {view}) less)"
            ).format(
                name=sql.Literal(name),
                view=sql.Identifier(name),
                text=sql.SQL(text.rstrip(";")),  # type: ignore[arg-type]
            )
            for name, text in self.texts.items()
        )
        return {name: (digest, differing) for name, digest, differing in self.eye.execute(each).fetchall()}

    def _kept(self, view: str) -> Any:
        return self.eye.execute(
            "SELECT source_state FROM matviews.mat_view_definitions WHERE view_name = %s", (view,)
        ).fetchall()


class Actor:
    """Does one kind of thing for as long as a burst lasts, on a connection that it keeps, most of the time."""

    #: How often it takes part in a round.
    share = 0.8

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name = place, name
        self.dice = random.Random(f"{place.figures.seed} {place.name} {name}")
        self._connection: psycopg.Connection[Any] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._connection is None else self._connection.info.backend_pid

    @property
    def connection(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = self.place.database.connect(application_name=self.name, options=LIMITS)
        return self._connection

    def act(self) -> None:
        while not self.place.over.is_set():
            self.attempt()

    def attempt(self) -> None:
        try:
            self.step()
        except (psycopg.Error, MatViewError):
            self.place.figures.count(f"refusals of {self.name.split()[0]}s")
            with suppress(psycopg.Error):
                self.roll_back()

    def step(self) -> None:
        raise NotImplementedError

    def roll_back(self) -> None:
        if self._connection is not None:
            self._connection.execute("ROLLBACK")

    def be_counted(self) -> None:
        """End what is open, and have all that was written counted."""
        if self._connection is None:
            return
        try:
            self.roll_back()
            self._connection.execute("SELECT pg_stat_force_next_flush()")
        except psycopg.OperationalError:
            # Terminated, and so counted when it ends.
            self.close()
        if self.dice.random() < 0.1:
            self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def pause(self, longest: float) -> None:
        self.place.over.wait(self.dice.uniform(0, longest))

    def numbers(self) -> dict[str, sql.Composable]:
        dice = self.dice
        return {
            "id": sql.Literal(dice.randrange(30)),
            "key": sql.SQL(str(dice.randrange(4))),  # type: ignore[arg-type]
            "n": sql.Literal(dice.randrange(9)),
        }


class Writer(Actor):
    def act(self) -> None:
        super().act()
        # A refresh of ours may end long after a burst: some changes are to come in the middle of it.
        end = time.monotonic() + self.dice.choice((0.0, 0.0, 0.1, 0.3))
        while time.monotonic() < end:
            self.attempt()
            time.sleep(0.01)

    def step(self) -> None:
        if not self.place.in_play:
            self.place.over.wait()
            return
        if self.place.prepared and self.dice.random() < 0.5:
            self._end_prepared()
            return
        connection = self.connection
        if self.dice.random() < 0.4:
            self._write()
        else:
            connection.execute("BEGIN" if self.dice.random() < 0.7 else "BEGIN ISOLATION LEVEL REPEATABLE READ")
            for _ in range(self.dice.randint(1, 4)):
                self._write_or_not() if self.dice.random() < 0.3 else self._write()
            if self.dice.random() < 0.5:
                self.pause(0.03)
            self._end()
        if self.dice.random() < 0.8:
            # Else the server counts it only later: its sessions do that once in a second.
            connection.execute("SELECT pg_stat_force_next_flush()")
        elif self.dice.random() < 0.1:
            self.close()
        self.pause(0.02)

    def _write(self) -> None:
        area = self.dice.choice(self.place.in_play)
        table = sql.Identifier(self.dice.choice(TABLES[area]))
        statement = self.dice.choice(WRITES)
        if statement == "COPY":
            with self.connection.cursor().copy(sql.SQL("COPY {} (id, key, n) FROM STDIN").format(table)) as copy:
                for _ in range(self.dice.randint(0, 4)):
                    copy.write_row([self.dice.randrange(30), self.dice.randrange(4), self.dice.randrange(9)])
        else:
            self.connection.execute(sql.SQL(statement).format(t=table, **self.numbers()))
        self.place.figures.count("writes")

    def _write_or_not(self) -> None:
        self.connection.execute("SAVEPOINT perhaps")
        try:
            self._write()
        except psycopg.Error:
            self.connection.execute("ROLLBACK TO SAVEPOINT perhaps")
        else:
            self.connection.execute(self.dice.choice(("RELEASE SAVEPOINT perhaps", "ROLLBACK TO SAVEPOINT perhaps")))

    def _end(self) -> None:
        chosen = self.dice.random()
        if chosen < 0.65:
            self.connection.execute("COMMIT")
        elif chosen < 0.8:
            self.connection.execute("ROLLBACK")
        else:
            prepare(self)

    def _end_prepared(self) -> None:
        with suppress(IndexError):
            gid = self.place.prepared.pop()
            ending: LiteralString = "COMMIT" if self.dice.random() < 0.8 else "ROLLBACK"
            self.connection.execute(sql.SQL("{} PREPARED {}").format(sql.SQL(ending), sql.Literal(gid)))
            self.place.figures.count("prepared transactions")


def prepare(actor: Actor) -> None:
    """End an actor's transaction so that anybody can commit it later."""
    gid = f"{actor.place.name} {actor.name} {time.monotonic_ns()}"
    actor.connection.execute(sql.SQL("PREPARE TRANSACTION {}").format(sql.Literal(gid)))
    actor.place.prepared.append(gid)


class Changer(Actor):
    share = 0.6

    def step(self) -> None:
        if self.place.in_play and self.dice.random() < 0.7:
            statement = self.dice.choice(self.place.changes[self.dice.choice(self.place.in_play)])
        else:
            statement = self.dice.choice(IDLE_CHANGES)
        view = sql.Identifier(self.dice.choice(list(VIEWS)))
        in_transaction = self.dice.random() < 0.4
        if in_transaction:
            self.connection.execute("BEGIN")
        self.connection.execute(sql.SQL(statement).format(view=view, **self.numbers()))
        if in_transaction:
            self.pause(0.02)
            self.connection.execute(self.dice.choice(("COMMIT", "COMMIT", "ROLLBACK")))
        self.place.figures.count("changes by DDL")
        self.pause(0.01)


def refresh_plainly(actor: Actor) -> None:
    """Refresh a view as psql does."""
    name = actor.dice.choice(list(VIEWS))
    how: LiteralString = "CONCURRENTLY " if VIEWS[name][2] and actor.dice.random() < 0.5 else ""
    actor.connection.execute(sql.SQL("REFRESH MATERIALIZED VIEW {}{}").format(sql.SQL(how), sql.Identifier(name)))


class Outsider(Actor):
    share = 0.4

    def step(self) -> None:
        refresh_plainly(self)
        self.place.figures.count("refreshes by others")
        self.pause(0.05)


class Latecomer(Actor):
    """Refreshes from a snapshot that it has taken long before, perhaps in a round before: older rows come back."""

    share = 0.7

    def __init__(self, place: Place, name: str) -> None:
        super().__init__(place, name)
        self._begun = False

    def step(self) -> None:
        if not self._begun:
            self._begin()
        if self.dice.random() < 0.5:
            # Not in this round: the older its snapshot gets, the more has been refreshed since.
            self.place.over.wait()
            return
        self.pause(0.08)
        if self.place.over.is_set():
            return
        for _ in range(self.dice.randint(1, 5)):
            refresh_plainly(self)
        self._begun = False
        if self.dice.random() < 0.3:
            prepare(self)
            self.pause(0.05)
        else:
            self.pause(0.01)
            self.connection.execute("COMMIT")
        self.place.figures.count("refreshes from older snapshots")

    def _begin(self) -> None:
        connection = self.connection
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        if self.dice.random() < 0.3:
            # In a transaction that is younger than its snapshot.
            ((snapshot,),) = connection.execute("SELECT pg_export_snapshot()").fetchall()
            younger = self.place.database.connect(application_name=self.name, options=LIMITS)
            younger.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            younger.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
            self.close()
            self._connection = younger
        else:
            connection.execute("SELECT")
        self._begun = True

    def roll_back(self) -> None:
        self._begun = False
        super().roll_back()

    def be_counted(self) -> None:
        # It has written nothing: what it has refreshed has ended.
        if not self._begun or self.dice.random() < 0.1:
            super().be_counted()


class Refresher(Actor):
    def step(self) -> None:
        name = self.dice.choice(list(VIEWS))
        response = self.place.hook().refresh(name, skip_unchanged=True, lock_timeout=0.05, max_wait=0.5)
        self.place.figures.count(f"{response.status} by refresh()")


class FleetRefresher(Actor):
    share = 0.6

    def step(self) -> None:
        try:
            response = self.place.hook().refresh_many(
                ["*.*"], skip_unchanged=True, lock_timeout=0.05, max_wait=0.5, at_once=2
            )
        except FleetFailed as failure:
            response = failure.result
        for outcome in response.outcomes:
            self.place.figures.count(f"{outcome.status} by refresh_many()")


def burn(
    server: PostgresServer, figures: Figures, seconds: float, places: int, enough: Callable[[], bool] = lambda: False
) -> None:
    """Have rounds in so many databases beside each other until the time is over, or it is enough."""
    deadline = time.monotonic() + seconds

    def one(number: int) -> None:
        place = Place(server, number, figures)
        try:
            with ThreadPoolExecutor(len(place.actors)) as pool:
                while time.monotonic() < deadline and not enough():
                    place.burn(pool)
        finally:
            place.over.set()
            place.close()

    with ThreadPoolExecutor(places) as pool:
        for each in [pool.submit(one, number) for number in range(places)]:
            each.result()


@contextmanager
def fire() -> Iterator[tuple[PostgresServer, Figures]]:
    seed = int(os.environ.get("FIRE_SEED") or random.SystemRandom().randrange(1_000_000))
    server = PostgresServer(
        bin_dir=INSTALLATIONS[int(os.environ.get("FIRE_MAJOR") or NEWEST)],
        settings={"max_prepared_transactions": "60", "max_connections": "200", "deadlock_timeout": "50ms"},
    )
    with server:
        yield server, Figures(seed)


@pytest.mark.e2e
def test_what_is_left_alone_is_never_older_than_what_it_reads(capsys: pytest.CaptureFixture[str]) -> None:
    with fire() as (server, figures):
        try:
            burn(server, figures, float(os.environ.get("FIRE_SECONDS") or SECONDS), PLACES)
        finally:
            with capsys.disabled():
                # Not to standard output, which nobody sees where tests run on several workers.
                sys.stderr.write(f"\n{figures}\n")
    assert not figures.problems, "\n".join(figures.problems)
    happened = figures.happened
    skipped, updated = happened["views skipped at last"], happened["views updated at last"]
    assert happened["rounds"] >= LEAST_ROUNDS
    assert skipped >= LEAST_SHARE_SKIPPED * (skipped + updated)


def _baseline_after(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Ledger.keep_sources

    def keep_late(self: Ledger, definition_id: int, view: ResolvedName, state: Mapping[str, Any]) -> Work[None]:
        look = (yield from staleness.look_at([view]))[view]
        yield from keep(self, definition_id, view, {**state, "sources": look.sources, "shape": look.shape})

    monkeypatch.setattr(Ledger, "keep_sources", keep_late)


def _refreshes_of_others_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = staleness.judge

    def look_away(look: Look, baseline: Baseline | None, **arguments: Any) -> Judgement:
        return judge(look if baseline is None else replace(look, version=baseline.version), baseline, **arguments)

    monkeypatch.setattr(staleness, "judge", look_away)


def _older_snapshots_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staleness, "_settles", lambda baseline, now: True)


def _refreshed_sources_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = staleness.judge

    def look_away(look: Look, baseline: Baseline | None, **arguments: Any) -> Judgement:
        sources = {} if baseline is None else {name: baseline.sources.get(name, "") for name in VIEWS}
        kept = {name: sources.get(name, state) for name, state in look.sources.items()}
        return judge(replace(look, sources=kept), baseline, **arguments)

    monkeypatch.setattr(staleness, "judge", look_away)


@pytest.mark.e2e
@pytest.mark.skipif("FIRE_HUNT" not in os.environ, reason="by hand (FIRE_HUNT=1): chance decides how long it takes")
@pytest.mark.parametrize(
    "mistake",
    [
        _baseline_after,
        _refreshes_of_others_passed_over,
        _older_snapshots_passed_over,
        _refreshed_sources_passed_over,
    ],
)
def test_the_fire_finds_what_looks_away(
    mistake: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mistake(monkeypatch)
    with fire() as (server, figures):
        burn(server, figures, LONGEST_HUNT, PLACES, enough=lambda: figures.missed > 0)
    with capsys.disabled():
        sys.stderr.write(f"\n{mistake.__name__}: {figures}\n")
    assert figures.missed


# What the fire has found, or what was added to it because of what was found beside it.


def test_columns_that_are_renamed_or_added_change_what_reads_whole_rows(db: Database) -> None:
    hook = _quiet(db)
    db.execute(
        "CREATE TABLE pets AS SELECT 1 AS id, 2 AS n",
        "CREATE VIEW between AS SELECT id, n FROM pets",
        "CREATE MATERIALIZED VIEW of_table AS SELECT to_jsonb(p) AS whole FROM pets p",
        "CREATE MATERIALIZED VIEW of_view AS SELECT to_jsonb(b) AS whole FROM between b",
    )
    _refresh_twice(hook, "of_table", "of_view")
    for change in (
        "ALTER TABLE pets ADD COLUMN more integer DEFAULT 5",
        "ALTER TABLE pets RENAME COLUMN more TO other",
        "ALTER TABLE pets DROP COLUMN other",
    ):
        db.execute(change)
        assert hook.refresh("of_table", skip_unchanged=True).status == "updated", change
    db.execute("ALTER VIEW between RENAME COLUMN n TO m")
    assert hook.refresh("of_view", skip_unchanged=True).status == "updated"


@pytest.mark.skipif(NEWEST < 18, reason="virtual columns came with PostgreSQL 18")
def test_another_expression_of_a_virtual_column_is_a_change(db: Database) -> None:
    hook = _quiet(db)
    db.execute(
        "CREATE TABLE pets (n integer, twice integer GENERATED ALWAYS AS (n * 2) VIRTUAL)",
        "CREATE MATERIALIZED VIEW mv AS SELECT sum(twice) FROM pets",
    )
    _refresh_twice(hook, "mv")
    db.execute("ALTER TABLE pets ALTER COLUMN twice SET EXPRESSION AS (n * 3)")
    assert hook.refresh("mv", skip_unchanged=True).status == "updated"


def test_a_partition_that_was_left_half_detached_is_one_that_is_gone(db: Database) -> None:
    hook = _quiet(db)
    db.execute(
        "CREATE TABLE events (key integer) PARTITION BY LIST (key)",
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES IN (1)",
        "INSERT INTO events VALUES (1)",
        "CREATE MATERIALIZED VIEW mv AS SELECT count(*) AS n FROM events",
    )
    _refresh_twice(hook, "mv")
    with db.connect() as reader, db.connect(options="-c lock_timeout=50ms") as changer:
        reader.execute("BEGIN")
        reader.execute("SELECT FROM events")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            changer.execute("ALTER TABLE events DETACH PARTITION events_1 CONCURRENTLY")
    assert hook.refresh("mv", skip_unchanged=True).status == "updated"
    assert db.value("SELECT n FROM mv") == db.value("SELECT count(*) FROM events") == 0
    db.execute("ALTER TABLE events DETACH PARTITION events_1 FINALIZE")
    assert hook.refresh("mv", skip_unchanged=True).status == "skipped"


@pytest.mark.parametrize("way", ["itself", "prepared", "imported"])
def test_older_rows_that_come_back_are_replaced_however_late_they_come(db: Database, way: str) -> None:
    hook = _quiet(db)
    db.execute("CREATE TABLE source AS SELECT 1 AS n")
    hook.create(MatViewDefinition(name="mv", sql="TABLE source"))
    with db.connect() as older, db.connect() as younger:
        older.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        older.execute("SELECT")
        snapshot = older.execute("SELECT pg_export_snapshot()").fetchall()[0][0] if way == "imported" else ""
        db.execute("INSERT INTO source VALUES (2)")
        hook.refresh("mv", refresh_strategy="regular")
        if way == "imported":
            younger.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            younger.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
            older.execute("COMMIT")
            assert hook.refresh("mv", skip_unchanged=True).status == "skipped"
        returning = younger if way == "imported" else older
        returning.execute("REFRESH MATERIALIZED VIEW mv")
        if way == "prepared":
            returning.execute("PREPARE TRANSACTION 'late'")
            assert hook.refresh("mv", skip_unchanged=True).status == "skipped"
            returning.execute("COMMIT PREPARED 'late'")
        else:
            returning.execute("COMMIT")
    assert db.rows("TABLE mv") == [(1,)]
    assert hook.refresh("mv", skip_unchanged=True).status == "updated"
    assert hook.refresh("mv", skip_unchanged=True).status == "skipped"


def _quiet(database: Database) -> MatViewHook:
    hook = hook_on(database)
    hook._log = SILENT
    return hook


def _refresh_twice(hook: MatViewHook, *views: str) -> None:
    for view in views:
        assert hook.refresh(view, skip_unchanged=True).status == "updated"
        assert hook.refresh(view, skip_unchanged=True).status == "skipped"
