"""Who may see what: those who may read the connection, of connections that are on the list."""

from __future__ import annotations

from typing import Annotated

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import ConnectionDetails, DagAccessEntity
from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_connection, requires_access_dag
from fastapi import Depends, HTTPException, Path, Request, status

from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.web.settings import action_dag, shown_connections

#: Raises where the user may not read the connection that the path names.
may_read = requires_access_connection("GET")


def _shown_connections() -> dict[str, str]:
    try:
        return shown_connections()
    except InvalidDefinition as error:
        raise HTTPException(status.HTTP_503_SERVICE_UNAVAILABLE, str(error)) from error


def _on_the_list(connection_id: Annotated[str, Path(max_length=250)]) -> tuple[str, str]:
    schema = _shown_connections().get(connection_id)
    if schema is None:
        raise HTTPException(
            status.HTTP_404_NOT_FOUND,
            "This connection is not shown here: [matviews] connections in Airflow's configuration does not name it.",
        )
    return connection_id, schema


#: A connection and its tracking schema. What is asked first is whether the user may read it, so that nobody learns
#: which connections there are.
Shown = Annotated[tuple[str, str], Depends(_on_the_list)]


def readable_connections(user: GetUserDep) -> list[str]:
    """Return the connections on the list that a user may read."""
    manager = get_auth_manager()
    return [
        connection_id
        for connection_id in _shown_connections()
        if manager.is_authorized_connection(method="GET", details=ConnectionDetails(conn_id=connection_id), user=user)
    ]


def may_trigger(request: Request, user: GetUserDep, shown: Shown) -> tuple[str | None, bool]:
    """Return the DAG that acts on the views of a connection, if any, and whether the user may trigger it.

    What decides in the end is Airflow itself, which the page asks to trigger it.
    """
    try:
        dag_id = action_dag(shown[0])
    except InvalidDefinition as error:
        raise HTTPException(status.HTTP_503_SERVICE_UNAVAILABLE, str(error)) from error
    if dag_id is None:
        return None, False
    try:
        requires_access_dag("POST", DagAccessEntity.RUN, dag_id)(request, user)
    except HTTPException as error:
        if error.status_code != status.HTTP_403_FORBIDDEN:
            raise
        return dag_id, False
    return dag_id, True
