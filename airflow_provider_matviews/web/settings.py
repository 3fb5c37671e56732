"""What of this installation may be seen on the page: the section ``[matviews]`` of Airflow's configuration."""

from __future__ import annotations

from urllib.parse import urlsplit

from airflow.providers.common.compat.sdk import conf

from airflow_provider_matviews.exceptions import InvalidDefinition, InvalidName
from airflow_provider_matviews.names import check_identifier

SECTION = "matviews"
#: What one may ask for on the page: new rows; whether they are right; what the definition says.
ACTIONS = ("refresh", "verify", "apply")
_EXAMPLE = "matviews_actions, finance=finance_actions"
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


def action_dag(connection_id: str) -> str | None:
    """Return the DAG that acts on the views of a connection when somebody asks for it on the page; None for none.

    ``[matviews] actions = matviews_actions, finance=finance_actions``: a DAG alone is that of all connections that
    are not named.

    :raises InvalidDefinition: when it cannot be read.
    """
    shown = shown_connections()
    of_all: str | None = None
    found: dict[str, str] = {}
    for place, entry in enumerate(conf.get(SECTION, "actions", fallback="").split(","), 1):
        parts = [part.strip() for part in entry.split("=")]
        if parts == [""]:
            continue
        if len(parts) > 2 or not all(parts):
            raise _refused(place, "is neither a DAG nor connection=DAG", "actions", _EXAMPLE)
        *named, dag_id = parts
        if named and named[0] not in shown:
            # Mistyped, it would hand the connection that was meant to the DAG of all others.
            raise _refused(place, "names a connection that the option connections does not", "actions", _EXAMPLE)
        known = found.get(named[0]) if named else of_all
        if known not in (None, dag_id):
            raise _refused(place, "says another DAG than an entry before it", "actions", _EXAMPLE)
        if named:
            found[named[0]] = dag_id
        else:
            of_all = dag_id
    return found.get(connection_id, of_all)


def _refused(
    place: int, why: str, option: str = "connections", example: str = "warehouse, finance=matviews_finance"
) -> InvalidDefinition:
    return InvalidDefinition(
        f"The option {option} in the section [{SECTION}] of Airflow's configuration cannot be read: "
        f"entry {place} of it {why.removesuffix('.')}.",
        hint=f"write {option} = {example}",
    )


def root_path() -> str:
    """Return what goes before every path of Airflow's own, without a slash at its end."""
    base_url: str = conf.get("api", "base_url", fallback="")
    return urlsplit(base_url).path.rstrip("/")
