"""The link from a task instance to its run's page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.providers.common.compat.sdk import BaseOperatorLink, conf

from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.web.settings import URL_PREFIX, shown_connections

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseOperator


class MatViewRunLink(BaseOperatorLink):
    """Leads to the page of the run that a task has recorded; of a task without one there is none.

    There is one where ``[matviews] connections`` names the task's connection: others have no page. Nor is there any
    while that option cannot be read.
    """

    name = "Materialized view run"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:  # noqa: ARG002
        """Return the address.

        :param operator: as it is when its task has ended.
        :param ti_key: of the task instance; not needed.
        """
        run_id, connection_id = getattr(operator, "recorded_run_id", None), getattr(operator, "conn_id", None)
        try:
            if run_id is None or connection_id not in shown_connections():
                return ""
        except InvalidDefinition:
            # The page's server says what is wrong with it; the task has nothing to do with that.
            return ""
        base = conf.get("api", "base_url", fallback="").rstrip("/")
        return f"{base}{URL_PREFIX}/#/{quote(str(connection_id), safe='')}/runs/{run_id}"
