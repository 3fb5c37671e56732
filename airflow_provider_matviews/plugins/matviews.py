"""The page in Airflow's menu. FastAPI is imported only by the server that mounts it."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

from airflow.providers.common.compat.sdk import AirflowPlugin

from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.web.settings import URL_PREFIX, root_path, shown_connections

_log = logging.getLogger(__name__)


class MatViewsPlugin(AirflowPlugin):
    """Browse > Materialized views, where the configuration names connections to show."""

    name = "matviews"

    @cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The application, for whichever connections the configuration names when it is asked."""
        from airflow_provider_matviews.web.app import create_app

        return [{"app": create_app(), "url_prefix": URL_PREFIX, "name": "Materialized views"}]

    @cached_property
    def external_views(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The entry in the menu."""
        try:
            if not shown_connections():
                return []
        except InvalidDefinition as error:
            # Airflow asks every plugin at once: what is raised here would cost it all the others, too.
            _log.error("Materialized views are not in the menu. %s", error)
            return []
        return [
            {
                "name": "Materialized views",
                "href": f"{root_path()}{URL_PREFIX}/",
                "destination": "nav",
                "category": "browse",
                "url_route": "matviews",
            }
        ]
