"""Watched views in a real Airflow: however the changes come, and whatever dies meanwhile, the last one is refreshed.

And what this Airflow tells of its refreshes by OpenLineage and StatsD meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import LiteralString

import pytest
from psycopg import sql

from tests.conftest import Database
from tests.live_airflow import LiveAirflow, descendants_of, kill, live_airflow, wait_until
from tests.test_lineage import Receiver, transport
from tests.test_stats import StatsD

pytestmark = pytest.mark.e2e

#: One is told by the change log, the other by fingerprints.
VIEWS: tuple[LiteralString, ...] = ("logged", "counted")
CHANGES = 10_000
SETTINGS = {
    "AIRFLOW__CORE__EXECUTOR": "tests.preloading.PreloadingLocalExecutor",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.3",
    # A triggerer that was killed is given up after a few seconds, not after half a minute.
    "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "6",
    # All of Airflow's own would not fit into the socket's buffer.
    "AIRFLOW__METRICS__METRICS_ALLOW_LIST": "matviews",
    "AIRFLOW__METRICS__STATSD_ON": "True",
    "AIRFLOW__METRICS__STATSD_HOST": "127.0.0.1",
    "AIRFLOW__METRICS__STATSD_INFLUXDB_ENABLED": "True",
}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with closing(Receiver()) as receiver:
        yield receiver


@pytest.fixture(scope="module")
def statsd() -> Iterator[StatsD]:
    with closing(StatsD()) as statsd:
        yield statsd


@pytest.fixture(scope="module")
def live(receiver: Receiver, statsd: StatsD) -> Iterator[LiveAirflow]:
    settings = {
        **SETTINGS,
        "AIRFLOW__OPENLINEAGE__TRANSPORT": transport(receiver),
        "AIRFLOW__METRICS__STATSD_PORT": str(statsd.port),
    }
    with live_airflow("events", (*VIEWS, "observed"), settings, {}) as running:
        for view in VIEWS:
            with running.database.connect() as connection:
                connection.execute(sql.SQL("CREATE TABLE {} (id integer)").format(_source(view)))
                connection.execute(
                    sql.SQL("CREATE MATERIALIZED VIEW {} AS SELECT count(*) AS rows FROM {}").format(
                        sql.Identifier(view), _source(view)
                    )
                )
        running.hook.install_change_log("logged")
        for view in VIEWS:
            running.hook.refresh(view)
        # The triggerer takes up watchers some time after it has started.
        wait_until(
            lambda: running.database.rows("SELECT FROM pg_stat_activity WHERE application_name = 'matviews'") != [],
            "somebody watches",
            60,
        )
        yield running


def _source(view: str) -> sql.Identifier:
    return sql.Identifier(f"source_of_{view}")


def _change(database: Database, view: str, begun: threading.Event | None = None) -> None:
    """Make many changes, each with a COMMIT of its own."""
    part = sql.SQL("DO $$BEGIN FOR n IN 1..{} LOOP INSERT INTO {} VALUES (n); COMMIT; END LOOP; END$$").format(
        sql.Literal(CHANGES // 4), _source(view)
    )
    with database.connect() as connection:
        for _ in range(4):
            connection.execute(part)
            if begun is not None:
                begun.set()


def _rows(database: Database, view: str) -> int:
    with database.connect() as connection:
        row = connection.execute(sql.SQL("SELECT rows FROM {}").format(sql.Identifier(view))).fetchone()
    assert row is not None
    return int(row[0])


def _wait_for_rows(live: LiveAirflow, view: str, rows: int, triggerer: str) -> None:
    def story() -> str:
        runs = "\n".join(map(str, live.hook.runs(view)))
        return f"{view} has {rows} rows, not {_rows(live.database, view)}\n{runs}\n{live.airflow.log_text(triggerer)}"

    wait_until(lambda: _rows(live.database, view) == rows, story, 60)


def _refreshes(live: LiveAirflow, view: str) -> int:
    return len([run for run in live.hook.runs(view, limit=100) if run.operation == "refresh"])


def test_a_refresh_is_told_of_by_worker_and_triggerer_alike(
    live: LiveAirflow, receiver: Receiver, statsd: StatsD
) -> None:
    live.database.execute(
        "CREATE TABLE t AS SELECT 1 AS id",
        "CREATE VIEW v AS SELECT id FROM t",
        "CREATE MATERIALIZED VIEW mv AS SELECT id FROM v",
    )
    statsd.received()
    live.start("observed", "one")

    def states() -> dict[str, str]:
        return {each["task_id"]: each["state"] for each in live.airflow.api.task_instances("observed", "one")}

    def told() -> list[str]:
        return [each["job"]["name"] for each in receiver.events if each["eventType"] == "COMPLETE" and each["outputs"]]

    wait_until(lambda: states() == {"worker": "success", "triggerer": "success"}, lambda: str(states()), 120)
    wait_until(lambda: {"observed.worker", "observed.triggerer"} <= set(told()), lambda: str(told()), 30)
    metrics = statsd.received()
    for task in ("worker", "triggerer"):
        event = receiver.ended(task)
        assert [each["name"] for each in event["inputs"]] == ["warehouse.public.t"]
        assert [each["name"] for each in event["outputs"]] == ["warehouse.public.mv"]
        fields = event["outputs"][0]["facets"]["columnLineage"]["fields"]
        assert [each["field"] for each in fields["id"]["inputFields"]] == ["id"]
    ended = [tags for name, tags, _, _ in metrics if name == "refresh.duration" and tags["view"] == "mv"]
    assert [(tags["conn_id"], tags["status"]) for tags in ended] == [("warehouse", "updated")] * 2


def test_a_burst_of_changes_is_followed_by_a_refresh_and_not_by_many(live: LiveAirflow) -> None:
    before = {view: _refreshes(live, view) for view in VIEWS}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda view: _change(live.database, view), VIEWS))
    for view in VIEWS:
        _wait_for_rows(live, view, CHANGES, "triggerer")
        assert 1 <= _refreshes(live, view) - before[view] <= 6


def test_nothing_is_missed_where_the_triggerer_is_killed_in_the_middle_of_it(live: LiveAirflow) -> None:
    begun = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        changing = [pool.submit(_change, live.database, view, begun) for view in VIEWS]
        assert begun.wait(60)
        triggerer = live.airflow.release("triggerer")
        kill(triggerer.pid, *descendants_of(triggerer.pid))
        for each in changing:
            each.result()
    # What was told before has been done: of the last change nobody has heard.
    for view in VIEWS:
        wait_until(
            lambda view=view: set(live.airflow.api.run_states(view).values()) == {"success"},  # type: ignore[misc]
            f"no run of {view} is under way",
            60,
        )
        with live.database.connect() as connection:
            connection.execute(sql.SQL("INSERT INTO {} VALUES (1)").format(_source(view)))
    live.airflow.add("triggerer-2", "triggerer", "--skip-serve-logs")
    for view in VIEWS:
        _wait_for_rows(live, view, 2 * CHANGES + 1, "triggerer-2")
