"""How long after a change its view is fresh again, in a real Airflow. Run it: ``python -m benchmarks.events``.

One row is written and committed; the watcher notices it, waits for a second of quiet (debounce) and fires; Airflow
makes a DAG run of the asset event, and its task refreshes the view. Measured by the database server's clock, from the
change's COMMIT to the COMMIT of the refresh that holds it, for both truths in turn. Between two changes everything has
come to rest, and the waits in between differ, so that no clock of Airflow's is met each time at the same moment.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import psycopg

from tests.live_airflow import LiveAirflow, live_airflow, wait_until

VIEWS = ("logged", "counted")


def set_up(live: LiveAirflow) -> None:
    """Make the views and their sources; of one of them the changes are logged."""
    for view in VIEWS:
        with live.database.connect() as connection:
            connection.execute(f"CREATE TABLE source_of_{view} (at timestamptz DEFAULT clock_timestamp())")  # type: ignore[arg-type]
            connection.execute(
                f"CREATE MATERIALIZED VIEW {view} AS SELECT count(*) AS rows, max(at) AS latest FROM source_of_{view}"  # type: ignore[arg-type]
            )
    live.hook.install_change_log("logged")
    for view in VIEWS:
        live.hook.refresh(view)


def one_change(live: LiveAirflow, view: str) -> float:
    """Write a row and return the seconds until the view had it."""
    rows = live.database.value(f"SELECT rows FROM {view}")  # type: ignore[arg-type]
    with psycopg.connect(live.database.dsn(), autocommit=True) as connection:
        connection.execute(f"INSERT INTO source_of_{view} DEFAULT VALUES")  # type: ignore[arg-type]
        committed = connection.execute("SELECT clock_timestamp()").fetchone()
    assert committed is not None
    wait_until(
        lambda: live.database.value(f"SELECT rows FROM {view}") == rows + 1,  # type: ignore[arg-type]
        f"{view} has the row",
        90,
    )
    refreshed = live.database.value(
        "SELECT finished_at FROM matviews.mat_view_run_history WHERE view = %s AND status = 'success' "
        "ORDER BY id DESC LIMIT 1",
        (view,),
    )
    return float((refreshed - committed[0]).total_seconds())


def main() -> None:
    """Start a server and Airflow, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="changes of each view (default 20)")
    arguments = parser.parse_args()
    with live_airflow("events", VIEWS, {}, {}) as live:
        set_up(live)
        for view in VIEWS:  # The first run of everything is slower.
            one_change(live, view)
        times: dict[str, list[float]] = {view: [] for view in VIEWS}
        for _ in range(arguments.rounds):
            for view in VIEWS:
                time.sleep(random.uniform(2, 4))
                times[view].append(one_change(live, view))
                print(f"{view}: {times[view][-1]:.2f} s", flush=True)
    print(f"\nFrom a change's COMMIT to its view's, debounce 1 s, {arguments.rounds} rounds:")
    for view, each in times.items():
        truth = "change log" if view == "logged" else "fingerprints"
        nine = statistics.quantiles(each, n=10)[-1]
        told = f"median {statistics.median(each):.2f} s, 9 of 10 within {nine:.2f} s"
        print(f"  {truth:14} {told} (from {min(each):.2f} to {max(each):.2f})")


if __name__ == "__main__":
    main()
