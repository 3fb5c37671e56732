"""The few calls of Airflow's REST API that the demo needs."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
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

    def trigger(self, dag_id: str) -> str:
        """Ask for a run of a DAG.

        :returns: the run's id.
        """
        run = self._call("POST", f"/api/v2/dags/{dag_id}/dagRuns", {"logical_date": None})
        return str(run["dag_run_id"])

    def run_states(self, dag_id: str) -> dict[str, str]:
        """Return the state of every run of a DAG by its id."""
        runs = self._call("GET", f"/api/v2/dags/{dag_id}/dagRuns?limit=100&order_by=-id")["dag_runs"]
        return {run["dag_run_id"]: run["state"] for run in runs}

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """Return the task instances of a run."""
        answer = self._call("GET", f"{_run(dag_id, run_id)}/taskInstances?limit=100")
        instances: list[dict[str, Any]] = answer["task_instances"]
        return instances

    def log(self, task_instance: dict[str, Any]) -> str:
        """Return the log of a task instance's latest try as text."""
        run = _run(task_instance["dag_id"], task_instance["dag_run_id"])
        task = f"{task_instance['task_id']}/logs/{max(1, task_instance['try_number'])}"
        answer = self._call("GET", f"{run}/taskInstances/{task}?map_index={task_instance['map_index']}")
        return "\n".join(_log_line(entry) for entry in answer["content"])

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
