"""Runs DAGs by hand and tells how they fare."""

from __future__ import annotations

import time
from collections.abc import Mapping

from demo.airflow_server import AirflowServer
from demo.console import print_block, say

POLL_SECONDS = 0.5
DAG_TIMEOUT_SECONDS = 60.0
RUN_TIMEOUT_SECONDS = 240.0
SCHEDULE_SECONDS = 5.0
LOG_LINES = 40
_ENDED = frozenset({"success", "failed"})


class DagRunError(RuntimeError):
    """A DAG could not be run to its end; what there is to read has been printed."""


def wait_for_dags(airflow: AirflowServer, dag_ids: tuple[str, ...]) -> None:
    """Wait until all DAGs have been read from their files.

    :raises DagRunError: when a file cannot be imported, or they do not appear.
    """
    deadline = time.monotonic() + DAG_TIMEOUT_SECONDS
    while not all(airflow.api.has_dag(dag_id) for dag_id in dag_ids):
        airflow.check()
        if errors := airflow.api.import_errors():
            print_block("DAG import errors", "\n".join(errors))
            raise DagRunError("a DAG file cannot be imported")
        if time.monotonic() > deadline:
            raise DagRunError(f"the DAGs {', '.join(dag_ids)} did not appear")
        time.sleep(POLL_SECONDS)


def run_dag(
    airflow: AirflowServer, dag_id: str, *, scheduled: bool = False, conf: Mapping[str, str] | None = None
) -> None:
    """Unpause a DAG, trigger one run and wait for its success, telling of each task that ends.

    :param conf: what a run that is triggered is asked for.
    :param scheduled: whether a run that the schedule starts at once will do.
    :raises DagRunError: when the run fails or does not end; the log of the failed task has been printed.
    """
    airflow.api.set_paused(dag_id, False)
    run_id = _scheduled_run(airflow, dag_id) if scheduled else None
    if run_id is None:
        run_id = airflow.api.trigger(dag_id, conf=conf)
        say(f"{dag_id}: triggered")
    else:
        say(f"{dag_id}: started by its schedule")
    told: set[tuple[str, int, int, str]] = set()
    deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
    while True:
        airflow.check()
        state = airflow.api.run_states(dag_id).get(run_id, "unknown")
        _tell_tasks(airflow, dag_id, run_id, told)
        if state in _ENDED:
            break
        if time.monotonic() > deadline:
            _print_failures(airflow, dag_id, run_id)
            raise DagRunError(f"{dag_id} has not ended after {RUN_TIMEOUT_SECONDS:.0f} s (state {state})")
        time.sleep(POLL_SECONDS)
    say(f"{dag_id}: {state}")
    if state != "success":
        _print_failures(airflow, dag_id, run_id)
        raise DagRunError(f"{dag_id} failed")


def pause_and_drain(airflow: AirflowServer, dag_id: str) -> None:
    """Pause a DAG when no run of it is under way, and see that it stays so.

    Airflow's scheduler looks at no run of a paused DAG: one that was under way would stay half-way for ever
    (Airflow 3.3.2, `DagRun.get_running_dag_runs_to_examine`).

    :raises DagRunError: when a run does not end, or one has failed.
    """
    deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
    while True:
        airflow.api.set_paused(dag_id, True)
        # A queued run of a paused DAG does not start.
        states = airflow.api.run_states(dag_id)
        if "running" not in states.values():
            break
        airflow.api.set_paused(dag_id, False)
        _wait_until_idle(airflow, dag_id, deadline)
    for run_id, state in states.items():
        if state == "failed":
            _print_failures(airflow, dag_id, run_id)
            raise DagRunError(f"{dag_id} failed in {run_id}")


def _wait_until_idle(airflow: AirflowServer, dag_id: str, deadline: float) -> None:
    while "running" in airflow.api.run_states(dag_id).values():
        airflow.check()
        if time.monotonic() > deadline:
            raise DagRunError(f"a run of {dag_id} has not ended after {RUN_TIMEOUT_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)


def _scheduled_run(airflow: AirflowServer, dag_id: str) -> str | None:
    """Wait a moment for the run that a schedule without catch-up starts when its DAG is unpaused."""
    deadline = time.monotonic() + SCHEDULE_SECONDS
    while time.monotonic() < deadline:
        if runs := list(airflow.api.run_states(dag_id)):
            return runs[0]
        time.sleep(POLL_SECONDS)
    return None


def _tell_tasks(airflow: AirflowServer, dag_id: str, run_id: str, told: set[tuple[str, int, int, str]]) -> None:
    for task in airflow.api.task_instances(dag_id, run_id):
        if task["state"] not in ("success", "failed", "up_for_retry", "skipped", "upstream_failed"):
            continue
        key = (task["task_id"], task["map_index"], task["try_number"], task["state"])
        if key in told:
            continue
        told.add(key)
        index = f"[{task['map_index']}]" if task["map_index"] >= 0 else ""
        say(f"{dag_id}: {task['task_id']}{index} {task['state']}")
        if task["state"] == "up_for_retry":
            print_block(f"log of {task['task_id']}{index}", _tail(airflow.api.log(task)))


def _print_failures(airflow: AirflowServer, dag_id: str, run_id: str) -> None:
    for task in airflow.api.task_instances(dag_id, run_id):
        if task["state"] not in ("success", "skipped", "upstream_failed", None):
            index = f"[{task['map_index']}]" if task["map_index"] >= 0 else ""
            print_block(f"log of {dag_id}.{task['task_id']}{index} ({task['state']})", _tail(airflow.api.log(task)))


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_LINES:])
