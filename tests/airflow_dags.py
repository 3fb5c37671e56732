"""Real DAG runs by ``dag.test()``: Airflow's own metadata database, scheduling and task runner, in this process."""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import pytest
from airflow.configuration import conf
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
from airflow.models.taskinstance import TaskInstance
from airflow.sdk import DAG
from airflow.utils.db import initdb

from tests.conftest import Database


@dataclass(frozen=True)
class DagRun:
    """How a run ended.

    :ivar state: of the whole run.
    :ivar tasks: the task instances by task id; mapped ones as ``task_id[map_index]``.
    :ivar log: what was logged meanwhile.
    """

    run_id: str
    state: str
    tasks: Mapping[str, TaskInstance]
    log: str

    @property
    def states(self) -> dict[str, str]:
        """The state of each task."""
        return {name: str(task.state) for name, task in self.tasks.items()}

    def xcom(self, task: str) -> Any:
        """What a task returned."""
        instance = self.tasks[task]
        return instance.xcom_pull(task_ids=instance.task_id, map_indexes=instance.map_index)


@functools.cache
def make_metadata_database() -> None:
    initdb()
    DagBundlesManager().sync_bundles_to_db()


def set_connection(
    monkeypatch: pytest.MonkeyPatch, database: Database, conn_id: str = "postgres_default", **fields: Any
) -> None:
    """Declare an Airflow connection to a test's database as a deployment may: in the environment."""
    connection = {
        "conn_type": "postgres",
        "host": "127.0.0.1",
        "port": database.server.port,
        "login": "postgres",
        "schema": database.name,
        **fields,
    }
    monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(connection))


def run_dag(dag: DAG, conf_of_run: Mapping[str, Any] | None = None) -> DagRun:
    """Run a DAG once, to its end, however it ends; what it and Airflow print goes into the outcome's log."""
    make_metadata_database()
    bag = DagBag(dag_folder=conf.get("core", "dags_folder"))
    bag.bag_dag(dag)
    sync_bag_to_db(bag, "dags-folder", None)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    out = StringIO()
    try:
        with redirect_stdout(out):
            run = dag.test(run_conf=dict(conf_of_run) if conf_of_run else None)
    finally:
        # The task runner leaves its own handler behind, which would keep SIGTERM from ending the tests.
        signal.signal(signal.SIGTERM, on_sigterm)
        sys.stdout.write(out.getvalue())
    tasks = {
        task.task_id if task.map_index < 0 else f"{task.task_id}[{task.map_index}]": task
        for task in run.get_task_instances()
    }
    return DagRun(run.run_id, str(run.state), tasks, out.getvalue())
