"""Progress lines: every phase is held open by a gate or a lock, and looked at as the driver would look."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql
from psycopg.rows import dict_row

from airflow_provider_matviews.definition import Index, MatViewDefinition, RefreshStrategy, RowCountStrategy
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.create import Creating, create_view
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Command, Instruction, Query, Result, Work
from airflow_provider_matviews.services.ledger import Ledger, Operation
from airflow_provider_matviews.services.maintenance import maintenance
from airflow_provider_matviews.services.progress import Progress, duration_text, size_text
from airflow_provider_matviews.services.refresh import refresh_view
from airflow_provider_matviews.services.response import Report
from airflow_provider_matviews.services.strategies.auto import PastRefresh
from tests.conftest import Database, hook_on
from tests.racing import beside, gate_closed, until

SECONDS = 20

#: Returns its first argument. Where that is ``at``, in a statement that begins so, it waits for the gate to open, and
#: asks again and again: whoever waits for a lock is another story.
PASS = """
CREATE FUNCTION pass(id integer, at integer, statement text) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF id = at AND current_query() LIKE statement || '%' THEN
        WHILE NOT pg_try_advisory_xact_lock_shared(4711) LOOP PERFORM pg_sleep(0.005); END LOOP;
    END IF;
    RETURN id;
END$$
"""
SOURCE = "CREATE TABLE t AS SELECT g AS id, repeat('x', 100) AS filler FROM generate_series(1, 10000) g"
#: Integers whose order is asked of a function that waits for the gate, within a refresh or the build of an index.
SLOW_ORDER = (
    """
    CREATE FUNCTION slow_compare(a integer, b integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS $$
    BEGIN
        IF current_query() LIKE 'REFRESH%' OR current_query() LIKE 'CREATE INDEX%' THEN
            WHILE NOT pg_try_advisory_xact_lock_shared(4711) LOOP PERFORM pg_sleep(0.005); END LOOP;
        END IF;
        RETURN btint4cmp(a, b);
    END$$
    """,
    "CREATE OPERATOR === (LEFTARG = integer, RIGHTARG = integer, FUNCTION = int4eq, COMMUTATOR = ===, MERGES, "
    "RESTRICT = eqsel, JOIN = eqjoinsel)",
    "CREATE OPERATOR <<< (LEFTARG = integer, RIGHTARG = integer, FUNCTION = int4lt)",
    "CREATE OPERATOR <<= (LEFTARG = integer, RIGHTARG = integer, FUNCTION = int4le)",
    "CREATE OPERATOR >>= (LEFTARG = integer, RIGHTARG = integer, FUNCTION = int4ge)",
    "CREATE OPERATOR >>> (LEFTARG = integer, RIGHTARG = integer, FUNCTION = int4gt)",
    "CREATE OPERATOR CLASS slow FOR TYPE integer USING btree AS OPERATOR 1 <<<, OPERATOR 2 <<=, OPERATOR 3 ===, "
    "OPERATOR 4 >>=, OPERATOR 5 >>>, FUNCTION 1 slow_compare(integer, integer)",
)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def no_history() -> Work[Sequence[PastRefresh]]:
    yield from ()
    return []


@dataclass
class Running:
    """An operation under way, and what can be told of it."""

    database: Database
    user: str
    progress: Progress
    driver: Driver
    future: Future[None] = field(default_factory=Future)

    def look(self) -> str | None:
        """Have a look, under limits that nothing in it may reach."""
        return self.looked()[0]

    def looked(self) -> tuple[str | None, list[Instruction]]:
        """Have a look; return the line and what was asked of the server for it."""
        asked: list[Instruction] = []
        with self.database.connect(self.user, row_factory=dict_row) as connection, connection.transaction():
            connection.execute(
                "SELECT set_config('statement_timeout', '2s', true), set_config('lock_timeout', '5ms', true)"
            )
            work, result = self.progress.line(), Result()
            try:
                instruction = next(work)
                while True:
                    assert isinstance(instruction, Query)
                    asked.append(instruction)
                    result = Result(connection.execute(instruction.statement, instruction.parameters).fetchall())
                    instruction = work.send(result)
            except StopIteration as stop:
                return stop.value, asked

    def told(self, pattern: str) -> re.Match[str]:
        """Look until the whole line is as expected."""
        deadline = time.monotonic() + SECONDS
        while True:
            line = self.look()
            if line is not None and (match := re.fullmatch(pattern, line)):
                return match
            if self.future.done():
                self.future.result()
                raise AssertionError(f"it has ended; the last line was {line!r}")
            assert time.monotonic() < deadline, f"{line!r} is not {pattern!r}"

    def await_gate(self) -> None:
        """Wait until it stands before the gate."""
        asleep = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {} AND wait_event = 'PgSleep')"
        until(self.database, sql.SQL(asleep).format(self.pid))

    @property
    def pid(self) -> int:
        return self.progress.pid


@contextmanager
def running(
    database: Database,
    work: Callable[[Report], Work[None]],
    release: Callable[[], object] = lambda: None,
    *,
    user: str = "postgres",
    view: str = "mv",
    operation: Operation = Operation.REFRESH,
    history: Callable[[], Work[Sequence[PastRefresh]]] = no_history,
    clock: Callable[[], float] = time.monotonic,
    earlier: float = 0.0,
) -> Iterator[Running]:
    """Run an operation beside the test; after the block it has ended well.

    :param release: opens what it waits for.
    :param earlier: seconds that the operation had waited before its turn came.
    """
    report = Report({"view": view}, {}, clock)
    report.restart()
    connection = database.connect(user)
    connections = [connection]
    with Driver(lambda: connections.pop() if connections else database.connect(user)) as driver:
        name = ResolvedName("public", view, view)
        progress = Progress(name, operation, connection.info.backend_pid, report, clock() - earlier, history)
        under_way = Running(database, user, progress, driver)
        with beside(lambda: driver.run(work(report)), release) as under_way.future:
            yield under_way
        under_way.future.result()


def refreshing(strategy: str, view: str = "mv") -> Callable[[Report], Work[None]]:
    def work(report: Report) -> Work[None]:
        yield Command(sql.SQL("BEGIN"))
        server, resolved = yield from catalog.arrive(ViewName(view, "public"))
        # Counting before it locks the view's indexes too.
        counting = RowCountStrategy.EXACT
        yield from refresh_view(resolved, server, report, strategy=RefreshStrategy(strategy), row_counts=counting)
        yield Command(sql.SQL("COMMIT"))

    return work


def megabytes(match: re.Match[str]) -> float:
    return float(match[1]) * {"kB": 1 / 1024, "MB": 1, "GB": 1024}[match[2]]


ELAPSED = r"(?:less than 1|\d+) s"
SIZE = r"([\d.]+) (kB|MB|GB)"


def standing(database: Database, query: str, *more: str) -> None:
    """Make a view over the source, with what else is to stand."""
    with database.connect() as connection:
        for statement in (PASS, SOURCE, f"CREATE MATERIALIZED VIEW mv AS {query}", *more):
            connection.execute(statement.encode())


@pytest.mark.parametrize("columns", ["AS id, filler", "AS id"], ids=["toast", "plain"])
@pytest.mark.parametrize("strategy", ["regular", "concurrent", "swap"])
def test_first_the_query_runs(each_db: Database, strategy: str, columns: str) -> None:
    standing(
        each_db,
        f"SELECT pass(id, 1, 'REFRESH') {columns} FROM t",
        "CREATE UNIQUE INDEX mv_id ON mv (id)",
        # A swap carries it over under the lock that ANALYZE takes too.
        "ALTER MATERIALIZED VIEW mv ALTER COLUMN id SET STATISTICS 50",
    )
    with gate_closed(each_db) as release, running(each_db, refreshing(strategy), release) as it:
        it.told(f"Refreshing mv for {ELAPSED}: running the query\\.")


@pytest.mark.parametrize("strategy", ["regular", "concurrent", "swap"])
def test_then_rows_are_written(each_db: Database, strategy: str) -> None:
    standing(each_db, "SELECT pass(id, 9000, 'REFRESH') AS id, filler FROM t", "CREATE UNIQUE INDEX mv_id ON mv (id)")
    whole = each_db.value("SELECT pg_relation_size('mv')") / 1024**2
    with gate_closed(each_db) as release, running(each_db, refreshing(strategy), release) as it:
        it.await_gate()
        size = megabytes(it.told(f"Refreshing mv for {ELAPSED}: writing rows, {SIZE} so far\\."))
    # 9,000 rows of 10,000 are; newer servers make room for some more at once.
    assert 0.8 * whole < size < 1.5 * whole


@pytest.mark.parametrize("strategy", ["regular", "swap"])
def test_what_is_stored_out_of_line_counts_too_and_so_does_another_tablespace(each_db: Database, strategy: str) -> None:
    space = sql.Identifier(f"space_{each_db.name}")
    with each_db.connect() as connection, ExitStack() as stack:
        connection.execute("SET allow_in_place_tablespaces = on")
        connection.execute(sql.SQL("CREATE TABLESPACE {} LOCATION ''").format(space))
        stack.callback(lambda: connection.execute(sql.SQL("DROP TABLESPACE {}").format(space)))
        each_db.execute(PASS, "CREATE TABLE t AS SELECT g AS id FROM generate_series(1, 200) g")
        connection.execute(
            sql.SQL(
                "CREATE MATERIALIZED VIEW mv TABLESPACE {} AS SELECT pass(id, 200, 'REFRESH') AS id, "
                "(SELECT string_agg(md5(g::text || id), '') FROM generate_series(1, 200) g) AS long FROM t"
            ).format(space)
        )
        stack.callback(lambda: connection.execute("DROP MATERIALIZED VIEW mv"))
        heap, all_of_it = each_db.rows("SELECT pg_relation_size('mv') / 1024 ^ 2, pg_table_size('mv') / 1024 ^ 2")[0]
        assert heap < 0.1 * all_of_it
        with gate_closed(each_db) as release, running(each_db, refreshing(strategy), release) as it:
            it.await_gate()
            size = megabytes(it.told(f"Refreshing mv for {ELAPSED}: writing rows, {SIZE} so far\\."))
        assert 0.8 * all_of_it < size < 1.2 * all_of_it


def test_every_segment_of_a_large_heap_counts(db: Database) -> None:
    standing(db, "SELECT pass(id, 1, 'REFRESH') AS id, filler FROM t")
    with gate_closed(db) as release, running(db, refreshing("regular"), release) as it:
        it.told(f"Refreshing mv for {ELAPSED}: running the query\\.")
        heap = db.value(
            "SELECT relation::bigint FROM pg_locks l WHERE pid = %s AND mode = 'ExclusiveLock' "
            "AND locktype = 'relation' AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = l.relation)",
            (it.pid,),
        )
        number = db.value("SELECT oid::bigint FROM pg_database WHERE datname = current_database()")
        file = db.server.data_dir / "base" / str(number) / str(heap)
        # Holes, which take no room. The server drops them with the heap.
        os.truncate(file, 1024**3)
        for segment, size in ((1, 1024**3), (2, 512 * 1024**2)):
            with (file.parent / f"{file.name}.{segment}").open("wb") as opened:
                opened.truncate(size)
        it.told(f"Refreshing mv for {ELAPSED}: writing rows, 2\\.5 GB so far\\.")
        os.truncate(file, 0)
        for segment in (1, 2):
            (file.parent / f"{file.name}.{segment}").unlink()


#: Made in an order that is not that of their names; the refresh stands still in the building of the second one.
THREE_INDEXES = (
    "CREATE UNIQUE INDEX mv_c ON mv (id)",
    "CREATE INDEX mv_a ON mv (pass(id, 7500, 'REFRESH'))",
    "CREATE INDEX mv_b ON mv (filler)",
)


@pytest.mark.parametrize("user", ["postgres", "owner"])
def test_a_regular_refresh_tells_which_index_it_builds(each_db: Database, user: str) -> None:
    standing(each_db, "SELECT id, filler FROM t", *THREE_INDEXES)
    if user == "owner":
        user = owner_of_mv(each_db)
    with gate_closed(each_db) as release, running(each_db, refreshing("regular"), release, user=user) as it:
        it.told(f"Refreshing mv for {ELAPSED}: building index 2 of 3 \\(mv_a\\)\\.")


@pytest.mark.parametrize("method", ["btree", "brin"])
@pytest.mark.parametrize("user", ["postgres", "owner"])
def test_a_swap_tells_how_far_the_building_of_an_index_is(each_db: Database, user: str, method: str) -> None:
    standing(
        each_db,
        "SELECT id, filler FROM t",
        "CREATE UNIQUE INDEX mv_c ON mv (id)",
        f"CREATE INDEX mv_b ON mv USING {method} (pass(id, 7500, 'CREATE INDEX'))",
        "CREATE INDEX mv_a ON mv (filler)",
    )
    if user == "owner":
        user = owner_of_mv(each_db)
    # Newer servers have made room for more rows than there are, so that 7,500 of 10,000 are a smaller share.
    phase = ", reading rows" if method == "btree" else ","
    with gate_closed(each_db) as release, running(each_db, refreshing("swap"), release, user=user) as it:
        it.told(f"Refreshing mv for {ELAPSED}: building index 2 of 3 \\(mv_b\\){phase} (6[5-9]|7[0-6]) %\\.")


def test_a_swap_tells_that_it_sorts_for_an_index(each_db: Database) -> None:
    standing(each_db, "SELECT id FROM t WHERE id < 9", *SLOW_ORDER, "CREATE INDEX mv_id ON mv (id slow)")
    with gate_closed(each_db) as release, running(each_db, refreshing("swap"), release) as it:
        it.told(f"Refreshing mv for {ELAPSED}: building index 1 of 1 \\(mv_id\\), sorting\\.")


@pytest.mark.parametrize("user", ["postgres", "owner"])
def test_a_concurrent_refresh_tells_that_it_compares(each_db: Database, user: str) -> None:
    standing(each_db, "SELECT id FROM t WHERE id < 9", *SLOW_ORDER, "CREATE UNIQUE INDEX mv_id ON mv (id slow)")
    if user == "owner":
        user = owner_of_mv(each_db)
    with gate_closed(each_db) as release, running(each_db, refreshing("concurrent"), release, user=user) as it:
        it.told(f"Refreshing mv for {ELAPSED}: comparing the new rows with the old ones\\.")


@pytest.mark.parametrize("user", ["postgres", "owner"])
def test_a_concurrent_refresh_tells_that_it_applies_what_differs(each_db: Database, user: str) -> None:
    standing(
        each_db,
        "SELECT id FROM t",
        "CREATE UNIQUE INDEX mv_id ON mv (id)",
        "CREATE INDEX mv_pass ON mv (pass(id, 10001, 'REFRESH'))",
        "INSERT INTO t VALUES (10001)",
    )
    if user == "owner":
        user = owner_of_mv(each_db)
    with gate_closed(each_db) as release, running(each_db, refreshing("concurrent"), release, user=user) as it:
        it.told(f"Refreshing mv for {ELAPSED}: applying what has changed\\.")


def test_a_swap_tells_that_it_collects_statistics(each_db: Database) -> None:
    standing(each_db, "SELECT id FROM t", "CREATE INDEX mv_pass ON mv (pass(id, 7500, 'ANALYZE'))")
    with gate_closed(each_db) as release, running(each_db, refreshing("swap"), release) as it:
        it.told(f"Refreshing mv for {ELAPSED}: collecting statistics\\.")


def test_a_vacuum_afterwards_tells_how_far_it_is(each_db: Database) -> None:
    standing(each_db, "SELECT id, filler FROM t")

    def work(report: Report) -> Work[None]:
        # A page or so at a time: it would take a minute, and is cancelled.
        yield Command(sql.SQL("SET vacuum_cost_limit = 1"))
        yield Command(sql.SQL("SET vacuum_cost_delay = '100ms'"))
        with report.running("vacuum"), pytest.raises(psycopg.errors.QueryCanceled):
            yield maintenance("VACUUM", ResolvedName("public", "mv", "mv"))

    def cancel() -> None:
        each_db.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_progress_vacuum")

    with running(each_db, work, cancel) as it:
        it.told(f"Refreshing mv for {ELAPSED}: vacuuming, [1-9] %\\.")


def owner_of_mv(database: Database) -> str:
    """Give the view, and the record, to a role that may do nothing else; return the role."""
    owner = database.role()
    with database.connect() as connection:
        for grant in (
            "GRANT CREATE, USAGE ON SCHEMA public TO {}",
            "GRANT SELECT ON t TO {}",
            "CREATE SCHEMA matviews AUTHORIZATION {}",
            "ALTER MATERIALIZED VIEW mv OWNER TO {}",
        ):
            connection.execute(sql.SQL(grant).format(sql.Identifier(owner)))
    return owner


@pytest.mark.parametrize("strategy", ["regular", "concurrent", "swap"])
def test_a_role_that_may_not_look_at_files_hears_of_no_size(each_db: Database, strategy: str) -> None:
    standing(each_db, "SELECT pass(id, 9000, 'REFRESH') AS id, filler FROM t", "CREATE UNIQUE INDEX mv_id ON mv (id)")
    owner, unsized = owner_of_mv(each_db), "running the query and writing its rows"
    with gate_closed(each_db) as release, running(each_db, refreshing(strategy), release, user=owner) as it:
        it.told(f"Refreshing mv for {ELAPSED}: {unsized}\\.")

    may = sql.SQL("GRANT EXECUTE ON FUNCTION pg_stat_file(text, boolean) TO {}").format(sql.Identifier(owner))
    may_not = sql.SQL("REVOKE EXECUTE ON FUNCTION pg_stat_file(text, boolean) FROM {}").format(sql.Identifier(owner))
    with (
        each_db.connect() as connection,
        gate_closed(each_db) as release,
        running(each_db, refreshing(strategy), release, user=owner) as it,
    ):
        connection.execute(may)
        it.told(f"Refreshing mv for {ELAPSED}: writing rows, {SIZE} so far\\.")
        # What fails once fails that look, and is not asked for again.
        connection.execute(may_not)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            it.look()
        connection.execute(may)
        assert unsized in str(it.look())
        connection.execute(may_not)


@contextmanager
def in_the_way(database: Database, statement: bytes, application: str, user: str = "postgres") -> Iterator[int]:
    """Hold, in an open transaction, the locks that a statement takes."""
    with database.connect(user, application_name=application) as connection:
        connection.execute("BEGIN")
        connection.execute(statement)
        yield connection.info.backend_pid
        connection.execute("ROLLBACK")


def test_who_is_in_the_way_is_named(each_db: Database) -> None:
    standing(each_db, "SELECT id, filler FROM t")
    with ExitStack() as stack:
        pid = stack.enter_context(in_the_way(each_db, b"SELECT count(*)\n  FROM mv", "reporting"))
        with running(each_db, refreshing("regular"), stack.close, history=long_history) as it:
            it.told(
                f"Refreshing mv for {ELAPSED}: waiting for a lock behind pid {pid} \\(postgres, reporting, transaction "
                f"of \\d+ s\\): SELECT count\\(\\*\\) FROM mv\\."
            )


def long_history() -> Work[Sequence[PastRefresh]]:
    yield from ()
    return [PastRefresh("regular", 100_000, None, None, None, None)]


def test_many_in_the_way_are_counted_and_what_a_role_may_not_see_is_said(each_db: Database) -> None:
    standing(each_db, "SELECT id, filler FROM t")
    owner = owner_of_mv(each_db)
    with ExitStack() as stack:
        for number in range(5):
            stack.enter_context(in_the_way(each_db, b"SELECT 'hidden' FROM mv", f"reader {number}"))
        with running(each_db, refreshing("regular"), stack.close, user=owner) as it:
            line = it.told(f"Refreshing mv for {ELAPSED}: waiting for a lock behind .*; and 2 more\\.")[0]
    assert line.count("transaction of ? s): query not visible;") == 3
    assert "hidden" not in line


def test_a_prepared_transaction_in_the_way_is_named_too(each_db: Database) -> None:
    standing(each_db, "SELECT id, filler FROM t")
    with each_db.connect() as connection:
        for statement in ("BEGIN", "COMMENT ON MATERIALIZED VIEW mv IS 'x'", "PREPARE TRANSACTION 'left'"):
            connection.execute(statement.encode())

        def end() -> None:
            if connection.execute("SELECT FROM pg_prepared_xacts WHERE gid = 'left'").fetchone() is not None:
                connection.execute("ROLLBACK PREPARED 'left'")

        with running(each_db, refreshing("regular"), end) as it:
            it.told(
                f"Refreshing mv for {ELAPSED}: waiting for a lock behind a prepared transaction \\(see "
                f"pg_prepared_xacts\\)\\."
            )


def recorded(database: Database, strategy: str, *durations_ms: int) -> Callable[[], Work[Sequence[PastRefresh]]]:
    """Record refreshes that took so long; return what asks for them."""
    hook = hook_on(database)
    for duration in durations_ms:
        response = hook.refresh("mv", refresh_strategy=strategy)
        with database.connect() as connection:
            connection.execute(
                "UPDATE matviews.mat_view_runs SET duration_ms = %s WHERE id = %s", (duration, response.run_id)
            )
    definition = database.value("SELECT id FROM matviews.mat_view_definitions")
    return lambda: Ledger("matviews").past_refreshes(definition)


def test_what_is_left_is_estimated_from_the_same_strategys_past(db: Database) -> None:
    standing(db, "SELECT pass(id, 1, 'REFRESH') AS id, filler FROM t")
    history, clock = recorded(db, "regular", 10_000, 500_000, 90_000), Clock()
    arguments: dict[str, Any] = {"history": history, "clock": clock, "earlier": 600.0}
    with gate_closed(db) as release, running(db, refreshing("regular"), release, **arguments) as it:
        # It had waited 10 minutes for its turn, which is told and says nothing about the rest.
        it.told(r"Refreshing mv for 10 min: running the query; about 1 min 30 s left\.")
        clock.now += 33
        assert it.look() == "Refreshing mv for 10 min 33 s: running the query; about 55 s left."
        clock.now += 57
        assert it.look() == "Refreshing mv for 11 min 30 s: running the query."
        clock.now += 20
        assert it.look() == "Refreshing mv for 11 min 50 s: running the query; longer than usual (1 min 30 s)."
    with gate_closed(db) as release, running(db, refreshing("swap"), release, **arguments) as it:
        it.told(r"Refreshing mv for 10 min: running the query\.")


def test_the_size_is_set_against_last_time(db: Database) -> None:
    standing(db, "SELECT pass(id, 9000, 'REFRESH') AS id, filler FROM t")
    history = recorded(db, "regular", 100_000)
    heap = size_text(db.value("SELECT pg_table_size('mv')"))
    with gate_closed(db) as release, running(db, refreshing("regular"), release, history=history) as it:
        it.told(f"Refreshing mv for {ELAPSED}: writing rows, {SIZE} so far \\({heap} last time\\); about .* left\\.")


def test_a_creation_is_told_while_its_rows_are_written(db: Database) -> None:
    db.execute(PASS, SOURCE)
    definition = MatViewDefinition(
        name="mv",
        sql="SELECT pass(id, 9000, 'REFRESH') AS id, filler FROM t",
        indexes=[Index(columns=["id"])],
    )

    def work(report: Report) -> Work[None]:
        yield Command(sql.SQL("BEGIN"))
        server, view = yield from catalog.arrive(ViewName("mv", "public"), creating=True)
        yield from create_view(Creating(view, view, definition, server, report))
        yield Command(sql.SQL("COMMIT"))

    arguments: dict[str, Any] = {"operation": Operation.CREATE, "history": long_history}
    with gate_closed(db) as release, running(db, work, release, **arguments) as it:
        it.told(f"Creating mv for {ELAPSED}: writing rows, {SIZE} so far\\.")


def test_a_look_is_one_statement_and_never_reads_what_the_operation_has_locked(each_db: Database) -> None:
    standing(each_db, "SELECT pass(id, 9000, 'REFRESH') AS id, filler FROM t", "CREATE UNIQUE INDEX mv_id ON mv (id)")
    with gate_closed(each_db) as release, running(each_db, refreshing("regular"), release) as it:
        it.told(f"Refreshing mv for {ELAPSED}: writing rows, {SIZE} so far\\.")
        exclusive = each_db.value(
            "SELECT array_agg(DISTINCT relation::bigint) FROM pg_locks WHERE pid = %s AND mode = 'AccessExclusiveLock'",
            (it.pid,),
        )
        assert each_db.value("SELECT 'mv'::regclass::oid::bigint") in exclusive
        with (
            each_db.connect(options="-c lock_timeout=5ms") as connection,
            pytest.raises(psycopg.errors.LockNotAvailable),
        ):
            connection.execute("SELECT pg_relation_size(%s::oid)", (max(exclusive),))
        line, asked = it.looked()
        assert line is not None
        assert len(asked) == 1


def test_a_history_that_cannot_be_read_costs_one_line(db: Database) -> None:
    standing(db, "SELECT pass(id, 1, 'REFRESH') AS id, filler FROM t")
    with (
        gate_closed(db) as release,
        running(db, refreshing("regular"), release, history=lambda: Ledger("nowhere").past_refreshes(1)) as it,
    ):
        with pytest.raises(psycopg.errors.UndefinedTable):
            it.look()
        it.told(f"Refreshing mv for {ELAPSED}: running the query\\.")


def test_between_two_steps_the_time_alone_is_told_and_after_the_end_nothing(db: Database) -> None:
    with gate_closed(db) as release:

        def work(report: Report) -> Work[None]:
            yield Command(sql.SQL("SELECT pass(1, 1, 'SELECT')"))

        db.execute(PASS)
        with running(db, work, release) as it:
            until(db, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE 'SELECT pass(%')")
            it.told(f"Refreshing mv for {ELAPSED}\\.")
        until(db, sql.SQL("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {})").format(it.pid))
        assert it.look() is None


def test_a_name_in_two_lines_makes_one_line(db: Database) -> None:
    db.execute(PASS, SOURCE, "CREATE MATERIALIZED VIEW \"odd\nname\" AS SELECT pass(id, 1, 'REFRESH') AS id FROM t")
    work = refreshing("regular", "odd\nname")
    with gate_closed(db) as release, running(db, work, release, view="odd\nname") as it:
        it.told(f"Refreshing odd name for {ELAPSED}: running the query\\.")


# What a swap has to keep now that it builds the indexes after the rows.


def test_a_swap_builds_each_index_once_over_its_rows(each_db: Database) -> None:
    standing(each_db, "SELECT id, filler FROM t", *THREE_INDEXES)
    response = hook_on(each_db).refresh("mv", refresh_strategy="swap").response
    steps = [step["step"] for step in response["steps"]]
    names = ["index mv_a", "index mv_b", "index mv_c"]
    first = steps.index("fill") + 1
    assert steps[first : first + 4] == [*names, "analyze"]
    assert [step for step in steps if step in names] == names
    assert len(steps) == len(response["sql"])


def test_rows_that_are_not_unique_fail_a_swap_and_leave_the_old_view_alone(each_db: Database) -> None:
    standing(each_db, "SELECT id, filler FROM t", "CREATE UNIQUE INDEX mv_id ON mv (id)", "INSERT INTO t VALUES (1)")
    relations = "SELECT array_agg(relname::text ORDER BY oid) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    before = each_db.value(relations)
    with pytest.raises(psycopg.errors.UniqueViolation):
        hook_on(each_db).refresh("mv", refresh_strategy="swap")
    assert each_db.value(relations) == before
    assert each_db.value("SELECT count(*) FROM mv") == 10000


def test_an_index_that_may_not_be_made_is_found_before_the_query_runs(each_db: Database) -> None:
    space = f"space_{each_db.name}"
    standing(each_db, "SELECT id, filler FROM t")
    owner = owner_of_mv(each_db)
    with each_db.connect() as connection:
        connection.execute("SET allow_in_place_tablespaces = on")
        connection.execute(sql.SQL("CREATE TABLESPACE {} LOCATION ''").format(sql.Identifier(space)))
        connection.execute(sql.SQL("CREATE INDEX mv_id ON mv (id) TABLESPACE {}").format(sql.Identifier(space)))
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match=space) as raised:
            hook_on(each_db, user=owner).refresh("mv", refresh_strategy="swap")
        assert "fill" not in [step["step"] for step in raised.value.response.response["steps"]]

        assert hook_on(each_db).refresh("mv", refresh_strategy="swap").status == "updated"
        assert (
            each_db.value(
                "SELECT spcname::text FROM pg_tablespace s JOIN pg_class c ON c.reltablespace = s.oid "
                "WHERE c.oid = 'mv_id'::regclass"
            )
            == space
        )
        connection.execute("DROP MATERIALIZED VIEW mv")
        connection.execute(sql.SQL("DROP TABLESPACE {}").format(sql.Identifier(space)))


def test_a_function_in_an_index_finds_what_it_names_by_the_search_path_as_in_a_refresh(each_db: Database) -> None:
    if each_db.server.major >= 17:
        pytest.skip("from PostgreSQL 17 on a function in an index has a search path of its own")
    each_db.execute(
        SOURCE,
        "CREATE FUNCTION plus(integer) RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT $1 + 1'",
        "CREATE FUNCTION finds(integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN plus($1); END'",
        "CREATE MATERIALIZED VIEW mv AS SELECT id, filler FROM t",
        "CREATE INDEX mv_finds ON mv (finds(id))",
    )
    assert hook_on(each_db).refresh("mv", refresh_strategy="swap").status == "updated"
    assert hook_on(each_db).refresh("mv", refresh_strategy="regular").status == "updated"


UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@given(st.floats(0, 1e9))
def test_a_duration_reads_as_what_it_is(seconds: float) -> None:
    text = duration_text(seconds)
    if text == "less than 1 s":
        assert seconds < 1
        return
    words = text.split()
    parts = [(int(number), unit) for number, unit in zip(words[::2], words[1::2], strict=True)]
    units = [unit for _, unit in parts]
    assert units in (["s"], ["min"], ["min", "s"], ["h"], ["h", "min"], ["d"], ["d", "h"])
    limits = {"s": 60, "min": 60, "h": 24, "d": float("inf")}
    assert all(0 < number < limits[unit] for number, unit in parts)
    smallest = {"s": 1, "min": 1, "h": 60, "d": 3600}[units[0]]
    assert abs(sum(number * UNITS[unit] for number, unit in parts) - seconds) <= smallest / 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.99, "less than 1 s"),
        (59.4, "59 s"),
        (59.7, "1 min"),
        (125, "2 min 5 s"),
        (3599.6, "1 h"),
        (7500, "2 h 5 min"),
        (86399, "1 d"),
        (100000, "1 d 4 h"),
    ],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


POWERS = {"bytes": 0, "kB": 1, "MB": 2, "GB": 3, "TB": 4, "PB": 5}


@given(st.integers(0, 2**59))
def test_a_size_reads_as_what_it_is(size: int) -> None:
    number, unit = size_text(size).split()
    assert len(number) <= 4
    assert float(number) < 1024
    assert float(number) * 1024 ** POWERS[unit] == pytest.approx(size, rel=0.051)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 kB"),
        (10 * 1024 - 1, "10 kB"),
        (1024**2 - 1, "1.0 MB"),
        (480 * 1024**2, "480 MB"),
        (int(2.5 * 1024**3), "2.5 GB"),
        (1024**6, "1024 PB"),
    ],
)
def test_sizes_in_words(size: int, text: str) -> None:
    assert size_text(size) == text
