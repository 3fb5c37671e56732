"""Two workers of a distributed executor, and many tasks for one view: one refresh at a time, nobody fails for it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.live_airflow import REDIS, LiveAirflow, ancestors_of, live_airflow, redis_server, wait_until
from tests.preloading import MODULES

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(REDIS is None, reason="redis-server is not installed (apt install redis-server)"),
]

WORKERS = ("worker-1", "worker-2")
WAITING, SKIPPING = 25, 25
#: Slots of each worker. All that wait hold one, so both workers take part; the others are for those that do not wait.
SLOTS = 20


@pytest.fixture(scope="module")
def live() -> Iterator[LiveAirflow]:
    with redis_server() as redis:
        settings = {
            "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
            "AIRFLOW__CORE__PARALLELISM": "100",
            "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "100",
            "AIRFLOW__CELERY__BROKER_URL": f"{redis}/0",
            "AIRFLOW__CELERY__RESULT_BACKEND": f"{redis}/1",
            "AIRFLOW__CELERY__SYNC_PARALLELISM": "1",
            "AIRFLOW__CELERY__WORKER_PREFETCH_MULTIPLIER": "1",
            "AIRFLOW__CELERY__EXTRA_CELERY_CONFIG": json.dumps({"imports": MODULES}),
        }
        quiet = ("--skip-serve-logs", "--without-mingle", "--without-gossip")
        workers = {
            name: (
                *("celery", "worker", *quiet, "--concurrency", str(SLOTS)),
                *("--celery-hostname", name, "--queues", f"default,{name}"),
            )
            for name in WORKERS
        }
        with live_airflow("celery", ("crowd", "pair"), settings, workers) as running:
            yield running


def _worker_of(live: LiveAirflow, pid: int) -> str:
    ancestors = ancestors_of(pid)
    (name,) = (name for name in WORKERS if live.airflow.pids[name] in ancestors)
    return name


def test_of_fifty_tasks_one_refreshes_at_a_time_and_nobody_fails(live: LiveAirflow) -> None:
    view = live.view("crowded")
    view.close_gate()
    live.start("crowd", view.name)
    view.wait_for_builder()
    (first,) = view.runs()[:1]
    # Whoever comes first refreshes, and it may be one that would not have waited.
    standing_back = SKIPPING - (first["map_index"] >= WAITING)
    at_work = WAITING + SKIPPING - standing_back

    def states() -> Counter[str]:
        return Counter(str(task["state"]) for task in live.airflow.api.task_instances("crowd", view.name))

    # Those that wait hold a slot each, so all the others have to have had their turn before the gate opens. Seldom all
    # of them pause at the same moment: counted are those that are there.
    wait_until(
        lambda: len(view.runs()) == 1 + standing_back and len(live.sessions(view.name)) >= at_work,
        lambda: f"all have had their turn: {len(view.runs())} runs, {states()}, {live.sessions(view.name)}",
        120,
    )
    wait_until(lambda: states() == {"running": at_work, "skipped": standing_back}, "Airflow knows", 20)
    waiting = [task for task in live.airflow.api.task_instances("crowd", view.name) if task["state"] == "running"]
    assert {_worker_of(live, task["pid"]) for task in waiting} == set(WORKERS)
    view.open_gate()
    wait_until(
        lambda: live.sessions(view.name) == [],
        lambda: f"all have ended: {states()}, {live.sessions(view.name)}, {[run['status'] for run in view.runs()]}",
        240,
    )
    wait_until(lambda: "running" not in states(), "Airflow knows", 20)
    assert states() == {"success": at_work, "skipped": standing_back}
    runs = view.runs()
    assert Counter(run["status"] for run in runs) == {"success": at_work, "skipped": standing_back}
    assert len({run["map_index"] for run in runs}) == WAITING + SKIPPING
    assert view.served() == 2
    assert (view.most_at_once(), live.twins()) == (1, 0)
    done = [run for run in runs if run["status"] == "success"]
    assert all(one["finished_at"] <= next_one["started_at"] for one, next_one in pairwise(done))


def test_a_worker_takes_over_what_another_one_died_of(live: LiveAirflow) -> None:
    view = live.view("paired")
    view.close_gate()
    live.start("pair", view.name)
    builder = view.wait_for_builder()

    def running() -> dict[str, int]:
        tasks = live.airflow.api.task_instances("pair", view.name)
        return {_worker_of(live, task["pid"]): task["pid"] for task in tasks if task["state"] == "running"}

    wait_until(lambda: running().keys() == set(WORKERS) and len(live.sessions(view.name)) > 2, "both are there", 60)
    (building,) = view.runs()
    worker = building["task_id"].replace("_", "-")
    now = time.time()
    live.airflow.release(worker).end(timeout=10)
    assert view.wait_until_gone(builder) - now < 10
    view.wait_for_builder()
    view.open_gate()
    (other,) = {name.replace("-", "_") for name in WORKERS} - {building["task_id"]}

    def states() -> dict[str, str]:
        return {task["task_id"]: task["state"] for task in live.airflow.api.task_instances("pair", view.name)}

    wait_until(lambda: states()[other] == "success", "the other worker's task has succeeded", 60)
    lost, found = view.runs()
    assert (lost["id"], lost["status"], lost["error_class"]) == (building["id"], "failed", "RunLost")
    assert (found["status"], found["task_id"]) == ("success", other)
    assert (len(view.builders()), view.most_at_once(), live.twins()) == (2, 1, 0)
