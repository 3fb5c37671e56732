"""What pruning the record takes beside the document's statement. Run it: ``python -m benchmarks.retention``.

Ten million runs over 1,000 views, made in SQL with rows as wide as real ones. Then, again and again, ten new successes
of every view come, so that ten of every view are too many, 10,000 in all; ``hook.prune()`` and the statement of the
run-tracking document take turns to delete them, and what they leave is compared. While ours runs once more, runs of two
other views begin and end, and the longest time that one of their statements took is noted, as is the longest statement
of the prune, each of which is a transaction. Quoted are ratios of medians. Shown is also the first prune, which counts
everything, and what a policy in a definition adds to each run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Read when Airflow loads: lines written to a terminal would be timed as well.
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "ERROR"

import psycopg

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.services import execute
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.retention import retain
from benchmarks.connecting import hook_on
from demo.postgres_server import PostgresServer, find_installations

#: Of the runs of a view; the others are failures and skipped runs.
SUCCESSES = 0.96
#: Of the run-tracking document, character for character.
DOCUMENT = Path(__file__).resolve().parent.parent / "tests" / "sql" / "keep_last_500.sql"
#: A run begins and ends as the operations have it, on a view of its own.
BEGIN = (
    "INSERT INTO matviews.mat_view_runs (mat_view_definition_id, operation, started_at) "
    "VALUES (%s, 1, clock_timestamp()) RETURNING id"
)
END = (
    "UPDATE matviews.mat_view_runs SET status = 2, finished_at = clock_timestamp(), duration_ms = 5, "
    "updated_at = clock_timestamp() WHERE id = %s"
)


def fill(connection: psycopg.Connection, rows: int, views: int) -> int:
    """Make the runs, in the order in which they would have come, and return how many successes each view has."""
    per_view = rows // views
    connection.execute(
        "INSERT INTO matviews.mat_view_definitions (name, schema_name, view_name, sql) "
        "SELECT format('mart.view_%%s', n), 'mart', format('view_%%s', n), 'SELECT 1' FROM generate_series(1, %s) n",
        [views],
    )
    connection.execute("SET synchronous_commit = off")
    indexes = connection.execute(
        "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index "
        "WHERE indrelid = 'matviews.mat_view_runs'::regclass AND NOT indisprimary"
    ).fetchall()
    for name, _ in indexes:
        connection.execute(f"DROP INDEX {name}")
    connection.execute(
        """
        INSERT INTO matviews.mat_view_runs (mat_view_definition_id, status, operation, started_at, finished_at,
                                            duration_ms, error, meta, created_at)
        SELECT d.id, k.status, 1, k.at, k.at + interval '1 second', 1000 + n %% 100,
               CASE WHEN k.status = 3 THEN '{"class": "UniqueViolation", "message": "duplicate key"}'::jsonb END,
               jsonb_build_object('row_count_before', n, 'row_count_after', n + 1, 'strategy', 'concurrent',
                   'dag_id', 'nightly', 'task_id', 'refresh', 'run_id', 'scheduled__' || n,
                   'request', jsonb_build_object('view', d.name, 'if_locked', 'wait', 'vacuum', false),
                   'response', jsonb_build_object('view', d.name, 'status', 'updated', 'sql',
                       jsonb_build_array('REFRESH MATERIALIZED VIEW CONCURRENTLY ' || d.name))),
               k.at
        FROM generate_series(1, %s) n CROSS JOIN matviews.mat_view_definitions d
        CROSS JOIN LATERAL (
            SELECT now() - (%s - n) * interval '5 min' + d.id * interval '1 ms' AS at,
                   CASE WHEN n %% 50 = 7 THEN 3 WHEN n %% 50 = 8 THEN 4 ELSE 2 END AS status
        ) k
        """,
        [per_view, per_view],
    )
    for _, definition in indexes:
        connection.execute(definition)
    connection.execute("VACUUM ANALYZE matviews.mat_view_runs")
    row = connection.execute(
        "SELECT count(*) FROM matviews.mat_view_runs WHERE status = 2 AND mat_view_definition_id = "
        "(SELECT min(id) FROM matviews.mat_view_definitions)"
    ).fetchone()
    assert row is not None
    return int(row[0])


class Traffic:
    """Runs of other views that begin and end meanwhile, on two connections.

    :ivar longest: milliseconds that one of their statements took at the most.
    """

    def __init__(self, dsn: str, definitions: list[int]) -> None:
        self.longest = 0.0
        self.runs = 0
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._go_on, args=(dsn, number), daemon=True) for number in definitions
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _go_on(self, dsn: str, definition: int) -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not self._stop.is_set():
                begun = time.perf_counter()
                row = connection.execute(BEGIN, [definition]).fetchone()
                began = time.perf_counter()
                assert row is not None
                connection.execute(END, [row[0]])
                self.longest = max(self.longest, (began - begun) * 1000, (time.perf_counter() - began) * 1000)
                self.runs += 1
                self._stop.wait(0.005)


@contextmanager
def longest_statement() -> Iterator[list[float]]:
    """Note the longest time that a statement of ours took, in milliseconds."""
    noted = [0.0]
    fetch = execute._fetch

    def timed(*arguments: object) -> object:
        begun = time.perf_counter()
        try:
            return fetch(*arguments)  # type: ignore[arg-type]
        finally:
            noted[0] = max(noted[0], (time.perf_counter() - begun) * 1000)

    execute._fetch = timed  # type: ignore[assignment]
    try:
        yield noted
    finally:
        execute._fetch = fetch


def in_ms(action: Callable[[], object]) -> float:
    """Return how long something takes."""
    begun = time.perf_counter()
    action()
    return (time.perf_counter() - begun) * 1000


def come(connection: psycopg.Connection, each: int) -> None:
    """Let so many new successes of every view come, and settle."""
    connection.execute(
        """
        INSERT INTO mat_view_runs (mat_view_definition_id, status, operation, started_at, finished_at, duration_ms,
                                   meta, created_at)
        SELECT d.id, 2, 1, last.created_at, last.created_at, 1000, last.meta, last.created_at + n * interval '5 min'
        FROM generate_series(1, %s) n CROSS JOIN mat_view_definitions d CROSS JOIN LATERAL (
            SELECT created_at, meta FROM mat_view_runs r WHERE mat_view_definition_id = d.id AND operation = 1
            AND status = 2 ORDER BY created_at DESC, id DESC LIMIT 1
        ) last WHERE d.name LIKE 'mart.view%%'
        """,
        [each],
    )
    connection.execute("VACUUM ANALYZE mat_view_runs")
    connection.execute("CHECKPOINT")


def check(connection: psycopg.Connection, keep: int, views: int) -> None:
    """See to it that every view has the successes that are to be kept."""
    left = connection.execute(
        "SELECT successes, count(*) FROM (SELECT count(*) AS successes FROM mat_view_runs WHERE status = 2 "
        "AND operation = 1 GROUP BY mat_view_definition_id) each GROUP BY 1 ORDER BY 2 DESC"
    ).fetchone()
    assert left == (keep, views), left


def compare(server: PostgresServer, hook: MatViewHook, keep: int, views: int, surplus: int, rounds: int) -> None:
    """Let both take turns, and print medians and their ratio."""
    theirs, ours, statements, waits = [], [], [], []

    def prune() -> None:
        hook.prune(keep_successes=keep, views=["mart.view_*"])

    with psycopg.connect(server.dsn(), autocommit=True, options="-c search_path=matviews") as connection:
        other = connection.execute(
            "INSERT INTO mat_view_definitions (name, schema_name, view_name) VALUES ('mart.a', 'mart', 'a'), "
            "('mart.b', 'mart', 'b') RETURNING id"
        ).fetchall()
        document = DOCUMENT.read_text().replace("500", str(keep)).encode()
        for number in range(rounds):
            come(connection, surplus // views)
            first = in_ms(prune)
            come(connection, surplus // views)
            ours.append(in_ms(prune))
            come(connection, surplus // views)
            with longest_statement() as noted, Traffic(server.dsn(), [row[0] for row in other]) as traffic:
                beside = in_ms(prune)
            statements.append(noted[0])
            waits.append(traffic.longest)
            check(connection, keep, views)
            come(connection, surplus // views)
            theirs.append(in_ms(lambda: connection.execute(document)))
            check(connection, keep, views)
            print(
                f"  round {number + 1}: document {theirs[-1]:8.0f} ms, prune() {ours[-1]:6.0f} ms, where it has to "
                f"count everything {first:6.0f} ms; beside {traffic.runs} runs {beside:6.0f} ms, its longest statement "
                f"{noted[0]:4.0f} ms, the longest wait of a run's statement {traffic.longest:5.1f} ms",
                flush=True,
            )
    print(f"\nMedians of {rounds}:")
    print(f"  the document's statement {statistics.median(theirs):8.0f} ms, one transaction")
    print(f"  prune()                  {statistics.median(ours):8.0f} ms; its longest transaction beside")
    print(f"    runs that begin and end {statistics.median(statements):.0f} ms, their longest wait {max(waits):.1f} ms")
    print(f"  {statistics.median(theirs) / statistics.median(ours):.0f} times as quick (aim: at least 20)")


def declared(server: PostgresServer, hook: MatViewHook, refreshes: int) -> None:
    """Time refreshes of a small view with a policy in its definition, and without, in turn."""
    took: dict[str, list[float]] = {"plain": [], "kept": []}
    for name, retention in (("plain", None), ("kept", {"keep_successes": 500, "max_age": 90 * 86400})):
        hook.create(MatViewDefinition(name=name, sql="SELECT 1 AS a", retention=retention))
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(
            "INSERT INTO matviews.mat_view_runs (mat_view_definition_id, status, operation, finished_at, created_at) "
            "SELECT d.id, 2, 1, now(), now() - n * interval '1 min' FROM generate_series(1, 500) n "
            "CROSS JOIN matviews.mat_view_definitions d WHERE d.name IN ('plain', 'kept')"
        )
    for _ in range(refreshes):
        for name, times in took.items():
            times.append(in_ms(lambda name=name: hook.refresh(name, analyze=False)))  # type: ignore[misc]
    plain, kept = (statistics.median(times) for times in took.values())
    ledger = Ledger("matviews")
    records = [record for record in hook.definitions() if record.name == "kept"]
    firsts, alone = [], []
    for _ in range(10):
        with Driver(lambda: psycopg.connect(server.dsn())) as driver:
            driver.run(ledger.definitions())
            firsts.append(in_ms(lambda: driver.run(retain(ledger, records))))
            alone += [in_ms(lambda: driver.run(retain(ledger, records))) for _ in range(20)]
    print(
        f"\nA refresh of a view of one row, connections and all (median of {refreshes}): {plain:.2f} ms; with "
        f"retention declared, 500 kept: {kept:.2f} ms, {kept - plain:+.2f} ms. The statement alone: "
        f"{statistics.median(alone):.2f} ms, the first of a connection {statistics.median(firsts):.2f} ms"
    )


def main() -> None:
    """Start a server, make the runs, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="runs (default 10,000,000)")
    parser.add_argument("--views", type=int, default=1000, help="views (default 1,000)")
    parser.add_argument("--surplus", type=int, default=10_000, help="runs that are too many (default 10,000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    arguments = parser.parse_args()
    installations = find_installations()
    with PostgresServer(
        bin_dir=installations[max(installations)],
        durable=True,
        settings={"max_wal_size": "8GB", "shared_buffers": "2GB", "maintenance_work_mem": "512MB"},
    ) as server:
        hook = hook_on(server)
        hook.runs()
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            begun = time.perf_counter()
            successes = fill(connection, arguments.rows, arguments.views)
            size = connection.execute(
                "SELECT pg_size_pretty(pg_table_size('matviews.mat_view_runs')), "
                "pg_size_pretty(pg_indexes_size('matviews.mat_view_runs'))"
            ).fetchone()
        assert size is not None
        print(
            f"PostgreSQL {server.major}, durable, loopback, {os.cpu_count()} cores; {arguments.rows:,} runs over "
            f"{arguments.views:,} views ({size[0]}, indexes {size[1]}), made in {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        compare(server, hook, successes, arguments.views, arguments.surplus, arguments.rounds)
        declared(server, hook, 100)


if __name__ == "__main__":
    main()
