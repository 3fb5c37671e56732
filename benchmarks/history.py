"""What it takes to read a long history. Run it: ``python -m benchmarks.history``.

Ten million runs of a thousand views: mostly successful refreshes, one in fifty failed, one in twenty skipped. Timed are
the hook's own questions and the queries of ``docs/history.md``, each on a warm server, and beside them the queries as
they are mostly written, with DISTINCT ON and window functions over the whole table. Read sequentially is nothing: the
server's own counter of sequential scans says so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import LiteralString, cast

# Read when Airflow loads: lines written to a terminal would be timed as well.
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "ERROR"

import psycopg

from benchmarks.connecting import hook_on
from benchmarks.long_history import fill, queries
from demo.postgres_server import PostgresServer, find_installations

#: The obvious ways to ask the same.
OBVIOUS: dict[str, LiteralString] = {
    "latest run of every view": "SELECT DISTINCT ON (mat_view_definition_id) * FROM matviews.mat_view_runs "
    "ORDER BY mat_view_definition_id, created_at DESC",
    "moving average of every view": "SELECT mat_view_definition_id, avg(duration_ms) FROM (SELECT "
    "mat_view_definition_id, duration_ms, row_number() OVER (PARTITION BY mat_view_definition_id ORDER BY created_at "
    "DESC) AS n FROM matviews.mat_view_runs WHERE status = 2 AND operation = 1) r WHERE n <= 20 GROUP BY 1",
}


def median_ms(function: Callable[[], object], rounds: int) -> float:
    """Call a function so many times, once more to warm up, and return the median of milliseconds."""
    function()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        function()
        times.append((time.perf_counter() - begun) * 1000)
    return statistics.median(times)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000_000)
    parser.add_argument("--views", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without-obvious", action="store_true", help="leave out the queries that take seconds")
    arguments = parser.parse_args()
    installations = find_installations()
    settings = {"shared_buffers": "1GB", "max_wal_size": "8GB", "maintenance_work_mem": "512MB"}
    with PostgresServer(bin_dir=installations[max(installations)], settings=settings) as server:
        hook = hook_on(server)
        hook.runs()
        with psycopg.connect(server.dsn(), autocommit=True) as session:
            begun = time.perf_counter()
            fill(session, arguments.runs, arguments.views)
            sizes = session.execute(
                "SELECT pg_size_pretty(pg_table_size('matviews.mat_view_runs')), "
                "pg_size_pretty(pg_indexes_size('matviews.mat_view_runs'))"
            ).fetchone()
            print(
                f"{arguments.runs:,} runs of {arguments.views:,} views in {time.perf_counter() - begun:.0f} s: {sizes}"
            )

            def scans() -> int:
                row = session.execute(
                    "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'mat_view_runs'"
                ).fetchone()
                assert row is not None
                return int(row[0])

            before = scans()
            connecting = median_ms(lambda: hook.get_conn().close(), arguments.rounds)
            timed: dict[str, float] = {"(connecting, which is in the next ones)": connecting}
            for name, function in {
                "hook.check(), all views, the usual rules": lambda: hook.check(max_age=86400),
                "hook.check(), with rows and bloat": lambda: hook.check(max_row_count_ratio=3, max_bloat=2),
                "hook.metrics(), all views": hook.metrics,
                "hook.metrics(), one view": lambda: hook.metrics(["analytics.mv7"]),
                "hook.runs(), the last 20 of all": hook.runs,
                "hook.runs('analytics.mv7')": lambda: hook.runs("analytics.mv7"),
            }.items():
                timed[name] = median_ms(function, arguments.rounds)
            for name, text in queries().items():
                timed[name] = median_ms(
                    lambda text=text: session.execute(cast("LiteralString", text)).fetchall(), arguments.rounds
                )
            for name, milliseconds in timed.items():
                print(f"{milliseconds:10.1f} ms  {name}")
            session.execute("SELECT pg_stat_force_next_flush()")
            print(f"sequential scans of the runs: {scans() - before}")
            if not arguments.without_obvious:
                for name, text in OBVIOUS.items():
                    obvious = median_ms(lambda text=text: session.execute(text).fetchall(), 3)
                    print(f"{obvious:10.1f} ms  {name}, as mostly written: {obvious / timed[name]:.0f} times as long")


if __name__ == "__main__":
    main()
