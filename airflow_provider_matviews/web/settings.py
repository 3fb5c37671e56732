"""What of this installation may be seen on the page: the section ``[matviews]`` of Airflow's configuration."""

from __future__ import annotations

from urllib.parse import urlsplit

from airflow.providers.common.compat.sdk import conf

from airflow_provider_matviews.exceptions import InvalidDefinition, InvalidName
from airflow_provider_matviews.names import check_identifier

SECTION = "matviews"
#: Where the page is mounted.
URL_PREFIX = "/matviews"


def shown_connections() -> dict[str, str]:
    """Return the connections whose views may be shown, each with its tracking schema, in the order given.

    ``[matviews] connections = warehouse, finance=matviews_finance``: without a schema it is ``matviews``. None are
    shown where it says nothing.

    :raises InvalidDefinition: when it cannot be read. Its message tells places and not ids, for it may be told to
        people who may not know which connections there are.
    """
    shown: dict[str, str] = {}
    for place, entry in enumerate(conf.get(SECTION, "connections", fallback="").split(","), 1):
        connection_id, _, schema = (part.strip() for part in entry.partition("="))
        if not connection_id and not schema:
            if "=" in entry:
                raise _refused(place, "names no connection")
            continue
        if not connection_id:
            raise _refused(place, "names no connection")
        if connection_id in (".", ".."):
            # In an address they mean a folder, however they are encoded.
            raise _refused(place, "names a connection that no address can hold; give that one another id")
        if "=" in schema:
            raise _refused(place, "has more than one =")
        try:
            check_identifier(schema or "matviews", "tracking schema")
        except InvalidName as error:
            raise _refused(place, f"is refused: {error.message}") from None
        if shown.setdefault(connection_id, schema or "matviews") != (schema or "matviews"):
            raise _refused(place, "names a connection that an entry before it names with another tracking schema")
    return shown


def _refused(place: int, why: str) -> InvalidDefinition:
    return InvalidDefinition(
        f"The option connections in the section [{SECTION}] of Airflow's configuration cannot be read: "
        f"entry {place} of it {why.removesuffix('.')}.",
        hint="write connections = warehouse, finance=matviews_finance",
    )


def root_path() -> str:
    """Return what goes before every path of Airflow's own, without a slash at its end."""
    base_url: str = conf.get("api", "base_url", fallback="")
    return urlsplit(base_url).path.rstrip("/")
