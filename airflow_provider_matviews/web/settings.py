"""What of this installation may be seen on the page: the section ``[matviews]`` of Airflow's configuration."""

from __future__ import annotations

from urllib.parse import urlsplit

from airflow.providers.common.compat.sdk import conf

from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.names import check_identifier

SECTION = "matviews"
#: Where the page is mounted.
URL_PREFIX = "/matviews"


def shown_connections() -> dict[str, str]:
    """Return the connections whose views may be shown, each with its tracking schema, in the order given.

    ``[matviews] connections = warehouse, finance=matviews_finance``: without a schema it is ``matviews``. None are
    shown where it says nothing.

    :raises InvalidDefinition: when it cannot be read.
    """
    shown: dict[str, str] = {}
    for entry in conf.get(SECTION, "connections", fallback="").split(","):
        connection_id, _, schema = (part.strip() for part in entry.partition("="))
        if connection_id:
            shown[connection_id] = check_identifier(schema or "matviews", "tracking schema")
        elif schema:
            raise InvalidDefinition(
                f"[{SECTION}] connections has {entry.strip()!r}, which names no connection.",
                hint="write connections = warehouse, finance=matviews_finance",
            )
    return shown


def root_path() -> str:
    """Return what goes before every path of Airflow's own, without a slash at its end."""
    base_url: str = conf.get("api", "base_url", fallback="")
    return urlsplit(base_url).path.rstrip("/")
