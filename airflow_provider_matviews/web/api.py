"""What the page asks for, as JSON; the same rules hold for whoever else asks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, TypeVar

import psycopg
from airflow.providers.common.compat.sdk import AirflowNotFoundException
from fastapi import APIRouter, Depends, HTTPException, Path, status
from pydantic import BaseModel

from airflow_provider_matviews.exceptions import MatViewError
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.services import browsing
from airflow_provider_matviews.services.instructions import Work
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.web.access import Shown, may_read, readable_connections

#: The greatest bigint: what is beyond it is no id.
_LARGEST_ID = 2**63 - 1
#: Seconds that a statement may take while somebody waits at a screen.
LONGEST_STATEMENT = 5.0
_T = TypeVar("_T")

router = APIRouter(prefix="/api/v1", tags=["Materialized views"])


class ConnectionList(BaseModel):
    """The connections whose views may be seen."""

    connections: list[str]


class RunDetail(BaseModel):
    """A run, with everything that is recorded of it."""

    id: int
    view: str
    operation: str
    status: str
    started_at: datetime | None
    finished_at: datetime | None
    duration_ms: int | None
    error: dict[str, Any] | None
    meta: dict[str, Any]
    created_at: datetime
    previous_id: int | None
    next_id: int | None


@router.get("/connections")
def list_connections(connections: Annotated[list[str], Depends(readable_connections)]) -> ConnectionList:
    """List the connections that the configuration names and the caller may read."""
    return ConnectionList(connections=connections)


@router.get("/connections/{connection_id}/runs/{run_id}", dependencies=[Depends(may_read)])
def read_run(shown: Shown, run_id: Annotated[int, Path(ge=1, le=_LARGEST_ID)]) -> RunDetail:
    """Read one run, and which runs of its view came before and after it."""
    page = _ask(shown, lambda ledger: browsing.run_page(ledger, run_id))
    return RunDetail(**vars(page.run), previous_id=page.previous_id, next_id=page.next_id)


def _ask(shown: tuple[str, str], question: Callable[[Ledger], Work[_T | None]]) -> _T:
    connection_id, tracking_schema = shown
    try:
        hook = MatViewHook(postgres_conn_id=connection_id, tracking_schema=tracking_schema)
        answer = hook.browse(question, seconds=LONGEST_STATEMENT)
    except AirflowNotFoundException as error:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "Airflow knows no such connection.") from error
    except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable) as error:
        raise HTTPException(status.HTTP_504_GATEWAY_TIMEOUT, "The database took too long to answer.") from error
    except (MatViewError, psycopg.Error) as error:
        # Not in the server's own words, which may tell of its host and its user.
        raise HTTPException(
            status.HTTP_502_BAD_GATEWAY, f"The database could not be read ({type(error).__name__})."
        ) from error
    if answer is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "Nothing of this name or number is on record there.")
    return answer
