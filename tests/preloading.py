"""A LocalExecutor whose workers have imported what every task needs, so that their tasks do not do it one by one."""

from __future__ import annotations

from importlib import import_module

from airflow.executors.local_executor import LocalExecutor

#: What a task's process imports before it begins.
MODULES = ("airflow.sdk.execution_time.task_runner", "airflow_provider_matviews.operators.matview")


class PreloadingLocalExecutor(LocalExecutor):
    """The workers are forks of the scheduler, and tasks are forks of the workers."""

    def start(self) -> None:
        for module in MODULES:
            import_module(module)
        super().start()
