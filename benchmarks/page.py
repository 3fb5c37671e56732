"""How long the page's API takes to answer. Run it: ``python -m benchmarks.page``.

Five hundred views that stand, with a hundred thousand runs, behind a whole Airflow on loopback; each route is asked
over HTTP, as the page does, and takes a login, a connection to the database of its own, and the answer as JSON. Told
are the median and the slowest, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

# Read when Airflow loads: lines written to a terminal would be timed as well.
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "ERROR"

import psycopg

from airflow_provider_matviews.definition import MatViewDefinition
from benchmarks.connecting import hook_on
from benchmarks.long_history import fill, stand_up
from demo.airflow_server import AirflowServer
from demo.postgres_server import PostgresServer, find_installations


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--views", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    installations = find_installations()
    with (
        PostgresServer(bin_dir=installations[max(installations)]) as server,
        tempfile.TemporaryDirectory() as dags,
    ):
        hook = hook_on(server)
        hook.runs()  # Makes the tables.
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            fill(connection, arguments.runs, arguments.views)
            stand_up(connection)
        hook.create(MatViewDefinition(name="declared", sql="SELECT 1 AS a", unique_index_columns=("a",)))
        hook.refresh("analytics.mv7")
        place = {"conn_type": "postgres", "host": "127.0.0.1", "port": server.port, "login": "postgres"}
        connections = {"views": {**place, "schema": "postgres"}}
        with AirflowServer(Path(dags), connections) as airflow:
            airflow.begin_migration()
            airflow.start()
            _time(airflow.url, arguments.rounds)


def _time(url: str, rounds: int) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/auth/token") as answer:
        token = json.load(answer)["access_token"]
    of_one = urlencode({"schema_name": "analytics", "view_name": "mv7"})
    declared = urlencode({"schema_name": "public", "view_name": "declared"})
    routes = {
        "all views": "views",
        "which are stale": "staleness",
        "what runs": "running",
        "one view": f"view?{of_one}",
        "its last 500 refreshes": f"runs?{of_one}&operation=refresh&limit=500",
        "its catalog": f"view/catalog?{of_one}",
        "its drawing": f"graph?{of_one}",
        "what auto would choose": f"view/choice?{of_one}",
        "what differs": f"view/plan?{declared}",
        "50 runs of all": "runs",
        "50 failed runs of all": "runs?status=failed",
        "one run": "runs/1000",
    }
    took: dict[str, list[float]] = {name: [] for name in routes}
    sizes = {}
    # In turn, so that whatever else the machine does meets all of them.
    for _ in range(rounds + 1):
        for name, path in routes.items():
            request = urllib.request.Request(
                f"{url}/matviews/api/v1/connections/views/{path}", headers={"Authorization": f"Bearer {token}"}
            )
            begun = time.perf_counter()
            with opener.open(request) as answer:
                sizes[name] = len(answer.read())
            took[name].append((time.perf_counter() - begun) * 1000)
    print(f"{'':28}{'median':>10}{'slowest':>10}{'kB':>8}")
    for name, times in took.items():
        warm = times[1:]
        print(f"{name:28}{statistics.median(warm):>10.0f}{max(warm):>10.0f}{sizes[name] / 1024:>8.0f}")


if __name__ == "__main__":
    main()
