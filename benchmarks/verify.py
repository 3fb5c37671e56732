"""What it takes to find one wrong row among ten million. Run it: ``python -m benchmarks.verify``.

A view of ten million rows and five columns with a unique index, one row of which is then changed behind PostgreSQL's
back (for a moment it is a table in the catalogs). Each mode is timed beside its query alone (EXPLAIN ANALYZE, which
computes all columns and sends nothing), with what it writes to temporary files. Quote ratios.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

# Read when Airflow loads: lines written to a terminal would be timed as well.
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "ERROR"

import psycopg

from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.services import verify
from benchmarks.connecting import hook_on
from demo.postgres_server import PostgresServer, find_installations


def fill(connection: psycopg.Connection[Any], rows: int) -> None:
    """Make the view and what it reads."""
    connection.execute(
        f"CREATE TABLE orders AS SELECT i AS order_id, i % 1000 AS shop, ((i * 7) % 100000) / 100.0 AS amount, "
        f"timestamptz '2024-01-01' + i * interval '1 s' AS placed_at, 'note ' || i % 5000 AS note "
        f"FROM generate_series(1, {rows}) i"
    )
    connection.execute("CREATE UNIQUE INDEX ON orders (order_id)")
    connection.execute("VACUUM ANALYZE orders")
    connection.execute("CREATE MATERIALIZED VIEW mv AS SELECT * FROM orders WHERE shop >= 0")
    connection.execute("CREATE UNIQUE INDEX ON mv (order_id)")
    connection.execute("ANALYZE mv")


def damage(connection: psycopg.Connection[Any], order: int) -> None:
    """Change one row of the view, and nothing that PostgreSQL would know of."""
    connection.execute("UPDATE pg_class SET relkind = 'r', relhasrules = false WHERE relname = 'mv'")
    connection.execute("UPDATE mv SET amount = amount + 1 WHERE order_id = %s", (order,))
    connection.execute("UPDATE pg_class SET relkind = 'm', relhasrules = true WHERE relname = 'mv'")


def temporary_bytes(connection: psycopg.Connection[Any]) -> int:
    """Return what the database has written to temporary files so far."""
    # Counters of the connections that have just ended.
    time.sleep(0.2)
    row = connection.execute("SELECT temp_bytes FROM pg_stat_database WHERE datname = current_database()").fetchone()
    assert row is not None
    return int(row[0])


def measure(hook: MatViewHook, connection: psycopg.Connection[Any], work_mem: str) -> None:
    """Verify in each mode and print what it took."""
    timing = hook.compare_timings(["mv"], rounds=1)[0]
    assert timing.query_ms is not None
    assert timing.view_ms is not None
    print(f"its query alone {timing.query_ms / 1000:.2f} s, the view alone {timing.view_ms / 1000:.2f} s")
    for mode in ("exact", "checksum", "sampled"):
        before, begun = temporary_bytes(connection), time.perf_counter()
        found = hook.verify("mv", mode=mode, session_settings={"work_mem": work_mem})
        seconds = time.perf_counter() - begun
        if found.verdict == "corrupt":
            seconds -= verify.SETTLING
        print(
            f"{mode:9} {seconds:7.2f} s ({seconds / timing.query_ms * 1000:.1f} times its query), "
            f"{(temporary_bytes(connection) - before) / 1e6:,.0f} MB of temporary files, {found.verdict.value}: "
            f"{'; '.join(example.line() for example in found.examples) or found.reason}",
            flush=True,
        )


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--work-mem", default="64MB")
    arguments = parser.parse_args()
    installations = find_installations()
    with PostgresServer(installations[max(installations)], settings={"max_wal_size": "4GB"}) as server:
        # Its counters have reached everybody when it ends: else the view would rightly count as stale.
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            fill(connection, arguments.rows)
        hook = hook_on(server)
        hook.refresh("mv", refresh_strategy="regular")
        print(f"PostgreSQL {max(installations)}, {arguments.rows:,} rows, work_mem {arguments.work_mem}", flush=True)
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            damage(connection, arguments.rows // 3)
            measure(hook, connection, arguments.work_mem)


if __name__ == "__main__":
    main()
