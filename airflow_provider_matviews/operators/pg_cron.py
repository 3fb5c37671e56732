"""The operator for those who have jobs of pg_cron beside Airflow. Thin: the hook does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_matviews.operators.base import HookOperator

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_matviews.services.pg_cron import CronImport


class ImportCronRunsOperator(HookOperator):
    """Write what pg_cron's jobs did to known views into the record, and warn of views that are scheduled twice.

    Only runs that have ended and are not there yet: it can be repeated at any time.

    :param conn_id: the connection to the database that holds the views. (templated)
    :param tracking_schema: the schema of the run tables. (templated)
    :param cron_database: the database that pg_cron's tables are in, on the same server; None for that of the views.
        (templated)
    :param limit: how many of pg_cron's rows to read at the most; None for all that are new.
    """

    template_fields: Sequence[str] = (*HookOperator.template_fields, "cron_database")

    def __init__(self, *, cron_database: str | None = None, limit: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cron_database = cron_database
        self.limit = limit

    def execute(self, context: Context) -> dict[str, Any]:
        """Do it, and return for XCom how many runs of which view were written, and the warnings.

        :raises UnsupportedServer: when pg_cron is not installed there, or too old to record its runs.
        :raises MissingPrivilege: when the role may not read its tables, or use the run tables.
        """
        with self._working(context) as hook:
            # A template that renders to nothing is no name of a database.
            result = hook.import_cron_runs(cron_database=self.cron_database or None, limit=self.limit)
        return self._tell(result)

    def _tell(self, result: CronImport) -> dict[str, Any]:
        runs = sum(result.imported.values())
        self.log.info("Imported %d run%s of pg_cron.", runs, "" if runs == 1 else "s")
        for view, count in sorted(result.imported.items()):
            self.log.info("%s: %d", view, count)
        if result.more:
            self.log.info("There are more than limit=%s: the next import goes on from there.", self.limit)
        return {"runs": runs, "imported": result.imported, "warnings": list(result.warnings), "more": result.more}
