"""The few calls of Airflow's REST API that the demo and the tests need."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

TIMEOUT_SECONDS = 30.0


class AirflowApi:
    """A client of one Airflow, as its administrator.

    :param base_url: the address of its API server, where everybody is an administrator.
    """

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url
        self._token = ""
        # Not through a proxy that the environment names: the server is on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def healthy(self) -> bool:
        """Tell whether the API server answers and sees a scheduler and a DAG processor at work."""
        try:
            health = self._call("GET", "/api/v2/monitor/health", signed=False)
        except (OSError, http.client.HTTPException):
            return False
        return all(health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor"))

    def import_errors(self) -> list[str]:
        """Return the traceback of each DAG file that could not be imported."""
        answer = self._call("GET", "/api/v2/importErrors")
        return [error["stack_trace"] for error in answer["import_errors"]]

    def has_dag(self, dag_id: str) -> bool:
        """Tell whether a DAG has been read from its file."""
        try:
            self._call("GET", f"/api/v2/dags/{dag_id}")
        except urllib.error.HTTPError as error:
            if error.code == http.client.NOT_FOUND:
                return False
            raise
        return True

    def set_paused(self, dag_id: str, paused: bool) -> None:
        """Pause or unpause a DAG."""
        self._call("PATCH", f"/api/v2/dags/{dag_id}", {"is_paused": paused})

    def trigger(self, dag_id: str, run_id: str | None = None, conf: Mapping[str, str] | None = None) -> str:
        """Ask for a run of a DAG.

        :param run_id: None for one that Airflow makes up.
        :param conf: the values of its params.
        :returns: the run's id.
        """
        wish: dict[str, Any] = {"logical_date": None, "conf": dict(conf or {})}
        if run_id is not None:
            wish["dag_run_id"] = run_id
        run = self._call("POST", f"/api/v2/dags/{dag_id}/dagRuns", wish)
        return str(run["dag_run_id"])

    def run_states(self, dag_id: str) -> dict[str, str]:
        """Return the state of every run of a DAG by its id."""
        runs = self._call("GET", f"/api/v2/dags/{dag_id}/dagRuns?limit=100&order_by=-id")["dag_runs"]
        return {run["dag_run_id"]: run["state"] for run in runs}

    def run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """Return a run as Airflow sees it."""
        run: dict[str, Any] = self._call("GET", _run(dag_id, run_id))
        return run

    def set_run_state(self, dag_id: str, run_id: str, state: str) -> None:
        """Mark a whole run as ``failed`` or ``success``."""
        self._call("PATCH", _run(dag_id, run_id), {"state": state})

    def set_task_state(self, dag_id: str, run_id: str, task_id: str, state: str) -> None:
        """Mark a task instance as ``failed`` or ``success``."""
        self._call("PATCH", f"{_run(dag_id, run_id)}/taskInstances/{task_id}", {"new_state": state})

    def clear_task(self, dag_id: str, run_id: str, task_id: str) -> None:
        """Clear a task instance, whatever its state, so that it runs again."""
        wish = {"dry_run": False, "dag_run_id": run_id, "task_ids": [task_id], "only_failed": False}
        self._call("POST", f"/api/v2/dags/{dag_id}/clearTaskInstances", wish)

    def xcom(self, task_instance: dict[str, Any]) -> Any:
        """Return what a task instance returned."""
        run = _run(task_instance["dag_id"], task_instance["dag_run_id"])
        path = f"{run}/taskInstances/{task_instance['task_id']}/xcomEntries/return_value?deserialize=true"
        return self._call("GET", f"{path}&map_index={task_instance['map_index']}")["value"]

    def asset_events(self, dag_id: str) -> list[dict[str, Any]]:
        """Return the asset events that a DAG's tasks have made, oldest first."""
        answer = self._call("GET", f"/api/v2/assets/events?source_dag_id={dag_id}&limit=100&order_by=timestamp")
        events: list[dict[str, Any]] = answer["asset_events"]
        return events

    def triggerers(self) -> list[str]:
        """Return the host names of the triggerers that are alive, as Airflow sees it."""
        jobs = self._call("GET", "/api/v2/jobs?job_type=TriggererJob&is_alive=true")["jobs"]
        return [job["hostname"] for job in jobs]

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """Return the task instances of a run."""
        answer = self._call("GET", f"{_run(dag_id, run_id)}/taskInstances?limit=100")
        instances: list[dict[str, Any]] = answer["task_instances"]
        return instances

    def log(self, task_instance: dict[str, Any]) -> str:
        """Return the log of a task instance's latest try as text."""
        return "\n".join(_log_line(entry) for entry in self.log_entries(task_instance))

    def log_entries(self, task_instance: dict[str, Any], try_number: int | None = None) -> list[Any]:
        """Return the log of one try of a task instance, entry by entry.

        :param try_number: None for the latest.
        """
        run = _run(task_instance["dag_id"], task_instance["dag_run_id"])
        task = f"{task_instance['task_id']}/logs/{try_number or max(1, task_instance['try_number'])}"
        answer = self._call("GET", f"{run}/taskInstances/{task}?map_index={task_instance['map_index']}")
        entries: list[Any] = answer["content"]
        return entries

    def _call(self, method: str, path: str, body: object = None, *, signed: bool = True) -> Any:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if signed:
            self._token = self._token or self._call("GET", "/auth/token", signed=False)["access_token"]
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base_url + path, data=data, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if signed and error.code == http.client.UNAUTHORIZED:  # A token lasts a day.
                self._token = ""
            raise


def _run(dag_id: str, run_id: str) -> str:
    return f"/api/v2/dags/{dag_id}/dagRuns/{urllib.parse.quote(run_id, safe='')}"


def _log_line(entry: Any) -> str:
    if not isinstance(entry, dict):
        return str(entry)
    lines = [str(entry.get("event", ""))]
    for error in entry.get("error_detail") or ():
        lines.append(f"{error.get('exc_type')}: {error.get('exc_value')}")
    return "\n".join(lines)
