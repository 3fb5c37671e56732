"""What each refresh strategy takes, and what readers feel. Run it: ``python -m benchmarks.strategies``.

Five million source rows, 400,000 result rows, a unique and two further indexes, and a reader in a loop in a process
of its own, who notes the longest time one of its queries took. Before each refresh half of the result rows change.
The strategies take turns, round by round, on a server that keeps its promises (fsync on). Quoted are ratios of
medians. A last part holds the view in a reader's transaction and shows how long newcomers wait for a swap.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time

# Read when Airflow loads: lines written to a terminal would be timed as well.
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "ERROR"

import psycopg

from airflow_provider_matviews.hooks.matview import MatViewHook
from benchmarks.connecting import hook_on
from benchmarks.readers import Readers
from demo.postgres_server import PostgresServer, find_installations

STRATEGIES = ("regular", "swap", "concurrent")


READ = "SELECT total FROM activity WHERE account = %s AND day = 3"


def prepare(connection: psycopg.Connection) -> None:
    """Make the source, the view and its indexes."""
    for statement in (
        "SELECT setseed(0.5)",
        "CREATE TABLE knob (value numeric)",
        "INSERT INTO knob VALUES (0)",
        "CREATE TABLE events AS SELECT g AS id, g % 80000 AS account, (g / 80000) % 5 AS day, "
        "(random() * 1000)::numeric(10, 2) AS amount FROM generate_series(1, 5000000) g",
        "VACUUM ANALYZE events",
        # Half of the rows move with the knob; the others stay what they are.
        "CREATE MATERIALIZED VIEW activity AS SELECT account, day, count(*) AS events, "
        "sum(amount) + CASE WHEN account % 2 = 0 THEN (SELECT value FROM knob) ELSE 0 END AS total "
        "FROM events GROUP BY account, day",
        "CREATE UNIQUE INDEX ON activity (account, day)",
        "CREATE INDEX ON activity (total)",
        "CREATE INDEX ON activity (day, events)",
        "ANALYZE activity",
    ):
        connection.execute(statement)


def compare(server: PostgresServer, hook: MatViewHook, rounds: int) -> None:
    """Time the strategies in turn and print medians and ratios."""
    walls: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    stalls: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    for number in range(rounds):
        for strategy in STRATEGIES:
            with psycopg.connect(server.dsn(), autocommit=True) as connection:
                connection.execute("UPDATE knob SET value = value + 1")
                connection.execute("CHECKPOINT")
            with Readers(server.dsn(), READ) as reader:
                begun = time.perf_counter()
                hook.refresh("activity", refresh_strategy=strategy, analyze=False, row_count_strategy="none")
                walls[strategy].append((time.perf_counter() - begun) * 1000)
            if reader.failed:
                raise RuntimeError(f"{reader.failed} reads failed during a {strategy} refresh")
            stalls[strategy].append(reader.longest)
            print(
                f"  round {number + 1}: {strategy:10} {walls[strategy][-1]:8.0f} ms, "
                f"longest read {reader.longest:8.1f} ms"
            )
    wall = {strategy: statistics.median(each) for strategy, each in walls.items()}
    stall = {strategy: statistics.median(each) for strategy, each in stalls.items()}
    print(f"\nMedians of {rounds}:")
    for strategy in STRATEGIES:
        print(f"  {strategy:10} {wall[strategy]:8.0f} ms wall, longest read {stall[strategy]:8.1f} ms")
    print(f"  swap's wall time is {wall['swap'] / wall['regular']:.2f} of a plain REFRESH's (aim: at most 1.10)")
    print(
        f"  and {wall['swap'] / wall['concurrent']:.2f} of CONCURRENTLY's with half the rows changed "
        "(aim: at most 0.50)"
    )
    print(
        f"  swap's longest read is 1/{wall['regular'] / stall['swap']:.0f} of a plain REFRESH's wall "
        "(aim: 1/200 or less)"
    )


def hold(server: PostgresServer, hook: MatViewHook, lock_timeout: float) -> None:
    """Hold the view in a transaction of 12 s while a swap wants it; print what newcomers waited."""
    with psycopg.connect(server.dsn()) as holder, Readers(server.dsn(), READ) as reader:
        holder.execute("SELECT count(*) FROM activity")
        timer = threading.Timer(12, holder.rollback)
        timer.start()
        hook.refresh("activity", refresh_strategy="swap", lock_timeout=lock_timeout)
        timer.join()
    print(
        f"\nWith a reader's transaction holding the view for 12 s and lock_timeout={lock_timeout:g} s, "
        f"the longest wait of a newcomer was {reader.longest:.0f} ms."
    )


def main() -> None:
    """Start a server, make the view, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    arguments = parser.parse_args()
    installations = find_installations()
    with PostgresServer(
        bin_dir=installations[max(installations)], durable=True, settings={"max_wal_size": "4GB"}
    ) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            prepare(connection)
        hook = hook_on(server)
        hook.runs()
        print(f"PostgreSQL {server.major}, durable, loopback, {os.cpu_count()} cores")
        compare(server, hook, arguments.rounds)
        hold(server, hook, 1.0)


if __name__ == "__main__":
    main()
