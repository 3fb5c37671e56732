"""What applying a changed definition takes, and what readers feel. Run it: ``python -m benchmarks.apply``.

Five million source rows, 400,000 result rows, a unique and two further indexes, a plain view on top, and two readers
in processes of their own, one of the view and one of the plain view, who note failed reads and the longest time
that one of them took. Round by round, on a server that keeps its promises (fsync on): the query changes and gains or
loses a column that nobody reads; an index comes or goes; and, to set it against, what people do by hand: everything
dropped and made again in one transaction. Quoted are ratios of medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

# Read when Airflow loads: lines written to a terminal would be timed as well.
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "ERROR"

import psycopg

from airflow_provider_matviews.definition import Index, MatViewDefinition
from airflow_provider_matviews.hooks.matview import MatViewHook
from benchmarks.connecting import hook_on
from benchmarks.readers import Readers
from demo.postgres_server import PostgresServer, find_installations

READS = (
    "SELECT total FROM activity WHERE account = %s AND day = 3",
    "SELECT total FROM weekly WHERE account = %s",
)
OVER = "CREATE VIEW weekly AS SELECT account, sum(total) AS total FROM activity GROUP BY account"


def definition(number: int, *, more: bool, indexed: bool = False) -> MatViewDefinition:
    """Return what the view is to be: another query for another number."""
    column = f", max(amount) + {number} AS greatest" if more else ""
    return MatViewDefinition(
        name="activity",
        sql=f"SELECT account, day, count(*) AS events, sum(amount) + {number} AS total{column} "
        "FROM events GROUP BY account, day",
        unique_index_columns=["account", "day"],
        indexes=[
            Index(columns=["total"]),
            Index(columns=["day", "events"]),
            *([Index(columns=["events", "account", "total"], name="extra")] if indexed else []),
        ],
        exclusive=True,
    )


def by_hand(dsn: str, number: int) -> None:
    """Drop everything and make it again, in one transaction."""
    wanted = definition(number, more=False)
    with psycopg.connect(dsn) as connection:
        connection.execute("DROP MATERIALIZED VIEW activity CASCADE")
        connection.execute(f"CREATE MATERIALIZED VIEW activity AS {wanted.sql}")
        connection.execute("CREATE UNIQUE INDEX activity_account_day_key ON activity (account, day)")
        connection.execute("CREATE INDEX activity_total_idx ON activity (total)")
        connection.execute("CREATE INDEX activity_day_events_idx ON activity (day, events)")
        connection.execute(OVER)


def compare(server: PostgresServer, hook: MatViewHook, rounds: int) -> None:
    """Time the ways in turn and print medians and ratios."""
    ways: dict[str, Callable[[int], object]] = {
        "apply, query changed": lambda number: hook.create(definition(number, more=bool(number % 2))),
        "apply, index built": lambda number: hook.create(definition(number, more=bool(number % 2), indexed=True)),
        "apply, index dropped": lambda number: hook.create(definition(number, more=bool(number % 2))),
        "plan, nothing differs": lambda number: hook.plan(definition(number, more=bool(number % 2))),
        "dropped and made by hand": lambda number: by_hand(server.dsn(), number),
    }
    walls: dict[str, list[float]] = {way: [] for way in ways}
    stalls: dict[str, list[float]] = {way: [] for way in ways}
    failed = dict.fromkeys(ways, 0)
    for number in range(1, rounds + 1):
        for way, act in ways.items():
            with psycopg.connect(server.dsn(), autocommit=True) as connection:
                connection.execute("CHECKPOINT")
            with Readers(server.dsn(), *READS) as readers:
                begun = time.perf_counter()
                act(number)
                walls[way].append((time.perf_counter() - begun) * 1000)
            stalls[way].append(readers.longest)
            failed[way] += readers.failed
            print(
                f"  round {number}: {way:25} {walls[way][-1]:8.0f} ms, longest read {readers.longest:8.1f} ms, "
                f"{readers.failed} of {readers.queries} reads failed"
            )
    wall = {way: statistics.median(each) for way, each in walls.items()}
    stall = {way: statistics.median(each) for way, each in stalls.items()}
    print(f"\nMedians of {rounds}:")
    for way in ways:
        print(f"  {way:25} {wall[way]:8.0f} ms wall, longest read {stall[way]:8.1f} ms, {failed[way]} failed reads")
    print(
        f"  a changed query: longest read 1/{wall['apply, query changed'] / stall['apply, query changed']:.0f} of the "
        "build (aim: 1/200 or less)"
    )
    print(
        f"  and {wall['apply, query changed'] / wall['dropped and made by hand']:.2f} of the wall time by hand, "
        f"where the longest read is {stall['dropped and made by hand']:.0f} ms"
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    installations = find_installations()
    settings = {"max_wal_size": "4GB"}
    with PostgresServer(bin_dir=installations[max(installations)], durable=True, settings=settings) as server:
        hook = hook_on(server)
        with psycopg.connect(server.dsn(), autocommit=True) as session:
            session.execute("SELECT setseed(0.5)")
            session.execute(
                "CREATE TABLE events AS SELECT g AS id, g % 80000 AS account, (g / 80000) % 5 AS day, "
                "(random() * 1000)::numeric(10, 2) AS amount FROM generate_series(1, 5000000) g"
            )
            session.execute("VACUUM ANALYZE events")
            hook.create(definition(0, more=False))
            session.execute(OVER)
        compare(server, hook, arguments.rounds)


if __name__ == "__main__":
    main()
