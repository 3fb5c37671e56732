"""The operator for those who have jobs of pg_cron beside Airflow. Thin: the hook does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseOperator

from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.outcome import log_error

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_matviews.services.pg_cron import CronImport


class ImportCronRunsOperator(BaseOperator):
    """Write what pg_cron's jobs did to known views into the record, and warn of views that are scheduled twice.

    Only runs that have ended and are not there yet: it can be repeated at any time.

    :param conn_id: the connection to the database that holds the views. (templated)
    :param tracking_schema: the schema of the run tables. (templated)
    :param cron_database: the database that pg_cron's tables are in, on the same server; None for that of the views.
        (templated)
    :param limit: how many of pg_cron's rows to read at the most; None for all that are new.
    """

    template_fields: Sequence[str] = ("conn_id", "tracking_schema", "cron_database")
    ui_color = "#e6f1f2"

    def __init__(
        self,
        *,
        conn_id: str = "postgres_default",
        tracking_schema: str = "matviews",
        cron_database: str | None = None,
        limit: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.conn_id = conn_id
        self.tracking_schema = tracking_schema
        self.cron_database = cron_database
        self.limit = limit
        self._hook: MatViewHook | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Do it, and return for XCom how many runs of which view were written, and the warnings.

        :raises UnsupportedServer: when pg_cron is not installed there, or too old to record its runs.
        :raises MissingPrivilege: when the role may not read its tables, or use the run tables.
        """
        whose = {key: getattr(context["ti"], key) for key in ("dag_id", "task_id", "run_id")}
        hook = self._hook = MatViewHook(
            postgres_conn_id=self.conn_id, tracking_schema=self.tracking_schema, context=whose
        )
        try:
            # A template that renders to nothing is no name of a database.
            result = hook.import_cron_runs(cron_database=self.cron_database or None, limit=self.limit)
        except Exception as error:
            log_error(self.log, error, hook.redact)
            raise
        finally:
            self._hook = None
        return self._tell(result)

    def on_kill(self) -> None:
        """Stop the statement on the server; what has been written stays, and the next import goes on from there."""
        if self._hook is not None:
            self._hook.refuse("Airflow stopped the task")

    def _tell(self, result: CronImport) -> dict[str, Any]:
        runs = sum(result.imported.values())
        self.log.info("Imported %d run%s of pg_cron.", runs, "" if runs == 1 else "s")
        for view, count in sorted(result.imported.items()):
            self.log.info("%s: %d", view, count)
        if result.more:
            self.log.info("There are more than limit=%s: the next import goes on from there.", self.limit)
        return {"runs": runs, "imported": result.imported, "warnings": list(result.warnings), "more": result.more}
