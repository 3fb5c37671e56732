"""What the page asks for, as JSON; the same rules hold for whoever else asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from threading import BoundedSemaphore
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import psycopg
from airflow.providers.common.compat.sdk import AirflowNotFoundException
from fastapi import APIRouter, Depends, HTTPException, Path, Query, status
from pydantic import BaseModel

from airflow_provider_matviews.exceptions import (
    InvalidDefinition,
    MatViewError,
    MissingPrivilege,
    NotAMaterializedView,
    UnsupportedServer,
    ViewLocked,
)
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.services import browsing
from airflow_provider_matviews.services.instructions import Work
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.overview import ViewGlance, read_overview
from airflow_provider_matviews.services.plan_steps import Plan
from airflow_provider_matviews.web.access import Shown, may_read, may_trigger, readable_connections
from airflow_provider_matviews.web.settings import ACTIONS

#: The greatest bigint: what is beyond it is no id.
_LARGEST_ID = 2**63 - 1
_NOTHING = "Nothing of this name or number is on record there."
#: Seconds that a statement may take while somebody waits at a screen.
LONGEST_STATEMENT = 5.0
#: Characters of an error in a list: all of it is with its run.
_LONGEST_ERROR = 300
#: So many ask databases at a time: they share their threads with all of Airflow's API, which a database that hangs
#: must not stop.
_asking = BoundedSemaphore(10)
#: Seconds for which the next one waits.
_LONGEST_WAIT = 2.0
_T = TypeVar("_T")
#: What PostgreSQL could hold: no NUL.
_HELD = r"^[^\x00]*$"
#: A part of a view's name, as it is and not as one would type it. No part of a path: it may hold slashes.
NamePart = Annotated[str, Query(min_length=1, max_length=63, pattern=_HELD)]
SomeNamePart = Annotated[str | None, Query(max_length=63, pattern=_HELD)]
#: The id of a connection may hold slashes, too; Airflow's own check of who may read it looks for it in the path. What
#: comes after it is fixed, but for a number, so that a path is read in one way only.
_OF_CONNECTION = "/connections/{connection_id:path}"


class Refusal(BaseModel):
    """Why there is no answer, in a sentence for a person."""

    detail: str


router = APIRouter(
    prefix="/api/v1",
    tags=["Materialized views"],
    responses={
        code: {"model": Refusal, "description": meaning}
        for code, meaning in {
            400: "There is more of it than is read at once.",
            401: "The caller is not logged in.",
            403: "The caller may not read this connection.",
            404: "There is no such connection, view or run, or it is not shown here.",
            502: "The database could not be read.",
            503: "The configuration of this page cannot be read, or too many are waiting for a database.",
            504: "The database took too long to answer.",
        }.items()
    },
)


class ConnectionList(BaseModel):
    """The connections whose views may be seen."""

    connections: list[str]


class RunningNow(BaseModel):
    """A run that is under way."""

    id: int
    operation: str
    started_at: datetime
    seconds: float
    lost: bool


class LastRun(BaseModel):
    """The latest run that came to an end."""

    id: int
    operation: str | None
    status: str | None
    finished_at: datetime | None
    duration_ms: int | None
    strategy: str | None
    dag_id: str | None
    error: str | None


class ViewSummary(BaseModel):
    """A view at a glance. Durations are in milliseconds, the oldest first."""

    view: str
    schema_name: str
    view_name: str
    managed: bool | None
    state: str
    reason: str
    last_run: LastRun | None
    last_filled_at: datetime | None
    age: float | None
    usual_interval: float | None
    consecutive_failures: int
    failures_24h: int
    running: list[RunningNow]
    durations_ms: list[int]
    row_count: int | None
    heap_bytes: int | None
    bloat: float | None


class ViewList(BaseModel):
    """All views that are on record behind a connection."""

    at: datetime | None
    views: list[ViewSummary]


class Staleness(BaseModel):
    """Whether a view is older than what it reads, and why."""

    view: str
    stale: bool
    reason: str


class StalenessList(BaseModel):
    """Of the views that stand behind a connection, which are older than what they read."""

    views: list[Staleness]


class RunRow(BaseModel):
    """A run, in a list of them."""

    id: int
    view: str
    operation: str | None
    status: str | None
    started_at: datetime | None
    finished_at: datetime | None
    duration_ms: int | None
    strategy: str | None
    row_count_before: int | None
    row_count_after: int | None
    size_bytes: int | None
    error: str | None
    dag_id: str | None
    created_at: datetime


class RunList(BaseModel):
    """A page of runs, newest first; ``next`` is what to give as ``before`` for the page after it."""

    runs: list[RunRow]
    next: str | None


class RunDetail(BaseModel):
    """A run, with everything that is recorded of it, be it as another program has written it."""

    id: int
    view: str
    operation: str | None
    status: str | None
    started_at: datetime | None
    finished_at: datetime | None
    duration_ms: int | None
    error: Any
    meta: Any
    created_at: datetime
    schema_name: str
    view_name: str
    previous_id: int | None
    next_id: int | None
    lost: bool


class GraphView(BaseModel):
    """A view, and what it reads; those of level 0 read no other view."""

    view: str
    schema_name: str
    view_name: str
    level: int
    reads_views: list[str]
    reads_tables: list[str]
    in_a_circle: list[str]


class GraphDetail(BaseModel):
    """Which views read which."""

    views: list[GraphView]


class DeclaredDefinition(BaseModel):
    """What a view should be, as far as that was declared; of others only the query is known."""

    sql: str | None
    refresh_strategy: str
    managed: bool
    declaration: Any
    created_at: datetime
    updated_at: datetime


class ViewDetail(BaseModel):
    """A view, as it is on record."""

    summary: ViewSummary
    definition: DeclaredDefinition
    row_counts: list[int | None]
    begun_at: list[datetime]
    drift: list[str] | None
    drift_run_id: int | None
    drift_mended: bool


class Attached(BaseModel):
    """Something that a view has."""

    kind: str
    key: str
    description: str


class Column(BaseModel):
    """A column of a view."""

    name: str
    type: str


class CatalogDetail(BaseModel):
    """What the catalogs say a view is."""

    owner: str
    query: str
    populated: bool
    estimated_rows: int | None
    columns: list[Column]
    indexes: list[str]
    dependents: list[str]
    sources: list[str]
    attachments: list[Attached]


class PlanStepDetail(BaseModel):
    """One thing in which a view differs from its definition, and what would mend it."""

    kind: str
    subject: str
    title: str
    why: str
    detail: list[str]
    sql: list[str]
    lock: str
    cost: str


class PlanDetail(BaseModel):
    """In what a view differs from what it was last declared to be."""

    stands: bool
    steps: list[PlanStepDetail]
    left_alone: list[str]
    refusals: list[str]
    notes: list[str]


class ChoiceDetail(BaseModel):
    """How a refresh would go now: the strategy declared, and what ``auto`` would choose."""

    declared: str
    strategy: str
    reason: str
    swap_obstacles: list[str]
    bloat: float | None
    may_refresh: bool


class RunUnderWay(BaseModel):
    """An operation that runs now. ``said`` is None where it cannot be seen how far it is."""

    run_id: int
    schema_name: str
    view_name: str
    operation: str
    started_at: datetime
    seconds: float
    usual_seconds: float | None
    said: str | None


class RunsUnderWay(BaseModel):
    """What runs now behind a connection, the longest first; up to 20."""

    runs: list[RunUnderWay]


class ActionList(BaseModel):
    """What may be done about the views of a connection: by triggering a DAG, by Airflow's own API.

    ``dag_id`` is None where the configuration names none; ``actions`` is empty where the caller may not trigger it.
    """

    dag_id: str | None
    actions: list[str]


@router.get("/connections")
def list_connections(connections: Annotated[list[str], Depends(readable_connections)]) -> ConnectionList:
    """List the connections that the configuration names and the caller may read."""
    return ConnectionList(connections=connections)


@router.get(_OF_CONNECTION + "/views", dependencies=[Depends(may_read)])
def list_views(shown: Shown) -> ViewList:
    """List every view that is on record, with its state and what it is judged by."""
    found = _ask(shown, read_overview, [])
    return ViewList(at=found[0].metrics.at if found else None, views=[_summary(each) for each in found])


@router.get(_OF_CONNECTION + "/staleness", dependencies=[Depends(may_read)])
def list_staleness(shown: Shown) -> StalenessList:
    """Say of every view whether it is older than what it reads; this takes longer than the list."""
    found = _ask(shown, browsing.staleness, [])
    return StalenessList(
        views=[Staleness(view=each.view.display, stale=each.stale, reason=each.reason) for each in found]
    )


@router.get(_OF_CONNECTION + "/graph", dependencies=[Depends(may_read)])
def read_graph(
    shown: Shown,
    schema_name: SomeNamePart = None,
    view_name: SomeNamePart = None,
) -> GraphDetail:
    """Read which views read which, of all of them or around one; of more than 300 there is no drawing."""
    _whole_name(schema_name, view_name)
    graph = _ask(
        shown,
        lambda _: browsing.view_graph(schema_name, view_name),
        nothing_of_it="There is no such view, or there are more of them than a drawing could show (300): "
        "ask for those around one.",
    )
    levels = {name: level for level, names in enumerate(graph.levels) for name in names}
    return GraphDetail(
        views=[
            GraphView(
                view=name,
                schema_name=view.schema,
                view_name=view.name,
                level=levels[name],
                reads_views=sorted(graph.needs_in_order[name]),
                reads_tables=sorted(graph.sources.get(name, ())),
                in_a_circle=sorted(graph.passed_over.get(name, ())),
            )
            for name, view in graph.views.items()
        ]
    )


@router.get(_OF_CONNECTION + "/runs", dependencies=[Depends(may_read)])
def list_runs(
    shown: Shown,
    schema_name: SomeNamePart = None,
    view_name: SomeNamePart = None,
    operation: Literal["create", "refresh", "drop"] | None = None,
    run_status: Annotated[Literal["running", "success", "failed", "skipped"] | None, Query(alias="status")] = None,
    before: Annotated[str | None, Query(pattern=r"^\d{1,18}-\d{1,18}$")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> RunList:
    """List runs, newest first: of one view, where both parts of its name are given, or of all."""
    _whole_name(schema_name, view_name)
    wanted = browsing.RunFilter(schema_name, view_name, operation, run_status, before)
    rows = _ask(shown, lambda ledger: browsing.run_list(ledger, wanted, limit), [])
    last = rows[-1]["mark"] if len(rows) == limit else None
    return RunList(runs=[RunRow(**row) for row in rows], next=last)


@router.get(_OF_CONNECTION + "/runs/{run_id}", dependencies=[Depends(may_read)])
def read_run(shown: Shown, run_id: Annotated[int, Path(ge=1)]) -> RunDetail:
    """Read one run, and which runs of its view came before and after it."""
    if run_id > _LARGEST_ID:
        raise HTTPException(status.HTTP_404_NOT_FOUND, _NOTHING)
    page = _ask(shown, lambda ledger: browsing.run_page(ledger, run_id))
    return RunDetail(**vars(page.run), **{name: value for name, value in vars(page).items() if name != "run"})


@router.get(_OF_CONNECTION + "/view", dependencies=[Depends(may_read)])
def read_view(shown: Shown, schema_name: NamePart, view_name: NamePart) -> ViewDetail:
    """Read what is on record of one view."""
    page = _ask(shown, lambda ledger: browsing.view_page(ledger, schema_name, view_name))
    known = page.definition
    return ViewDetail(
        summary=_summary(page.glance),
        definition=DeclaredDefinition(
            sql=known.sql,
            refresh_strategy=known.refresh_strategy.value,
            managed=known.managed,
            declaration=known.declaration,
            created_at=known.created_at,
            updated_at=known.updated_at,
        ),
        row_counts=list(reversed(page.glance.metrics.row_counts)),
        begun_at=list(reversed(page.glance.metrics.begun_at)),
        drift=page.drift,
        drift_run_id=page.drift_run_id,
        drift_mended=page.drift_mended,
    )


@router.get(_OF_CONNECTION + "/view/catalog", dependencies=[Depends(may_read)])
def read_catalog(shown: Shown, schema_name: NamePart, view_name: NamePart) -> CatalogDetail:
    """Read what the catalogs say of one view; this waits for whoever has locked it, for a while."""
    hook = _hook(shown)
    page = _answer(lambda: hook.browse_catalog(schema_name, view_name, seconds=LONGEST_STATEMENT))
    return CatalogDetail(
        **{name: value for name, value in vars(page).items() if name not in ("columns", "attachments")},
        columns=[Column(name=name, type=kind) for name, kind in page.columns],
        attachments=[Attached(kind=each.kind, key=each.key, description=each.description) for each in page.attachments],
    )


@router.get(
    _OF_CONNECTION + "/view/plan",
    dependencies=[Depends(may_read)],
    responses={409: {"model": Refusal, "description": "The definition can be compared no more; why."}},
)
def read_plan(shown: Shown, schema_name: NamePart, view_name: NamePart) -> PlanDetail:
    """Compare a view with what it was last declared to be, in a transaction that is rolled back."""
    hook = _hook(shown)

    def compare() -> Plan | None:
        try:
            return hook.browse_plan(schema_name, view_name, seconds=LONGEST_STATEMENT)
        except (InvalidDefinition, MissingPrivilege, UnsupportedServer) as error:
            raise HTTPException(status.HTTP_409_CONFLICT, hook.redact(str(error))) from error
        except psycopg.ProgrammingError as error:
            # What the server says of the definition, which the caller may read.
            told = error.diag.message_primary or type(error).__name__
            raise HTTPException(status.HTTP_409_CONFLICT, hook.redact(f"It cannot be compared: {told}.")) from error

    plan = _answer(compare, nothing_of_it="It was never declared, so there is nothing to compare it with.")
    return PlanDetail(
        stands=plan.stands,
        steps=[PlanStepDetail(title=step.title, **step.as_dict()) for step in plan.steps],
        left_alone=list(plan.left_alone),
        refusals=list(plan.refusals),
        notes=list(plan.notes),
    )


@router.get(_OF_CONNECTION + "/view/choice", dependencies=[Depends(may_read)])
def read_choice(shown: Shown, schema_name: NamePart, view_name: NamePart) -> ChoiceDetail:
    """Say what ``auto`` would choose for a view now, and why."""
    hook = _hook(shown)
    return ChoiceDetail(**vars(_answer(lambda: hook.browse_choice(schema_name, view_name, seconds=LONGEST_STATEMENT))))


@router.get(_OF_CONNECTION + "/running", dependencies=[Depends(may_read)])
def list_running(shown: Shown) -> RunsUnderWay:
    """Say what runs now, and how far it is."""
    hook = _hook(shown)
    return RunsUnderWay(
        runs=[
            RunUnderWay(
                run_id=each.run_id,
                schema_name=each.view.schema,
                view_name=each.view.name,
                operation=each.operation,
                started_at=each.started_at,
                seconds=each.seconds,
                usual_seconds=each.usual_seconds,
                said=each.said and hook.redact(each.said),
            )
            for each in _answer(lambda: hook.under_way(seconds=LONGEST_STATEMENT))
        ]
    )


@router.get(_OF_CONNECTION + "/actions", dependencies=[Depends(may_read)])
def list_actions(trigger: Annotated[tuple[str | None, bool], Depends(may_trigger)]) -> ActionList:
    """Say which DAG acts on views, and what of it the caller may ask for."""
    dag_id, may = trigger
    return ActionList(dag_id=dag_id, actions=list(ACTIONS) if may else [])


def _summary(each: ViewGlance) -> ViewSummary:
    known = each.metrics
    last = known.last_attempt
    return ViewSummary(
        view=known.view,
        schema_name=known.schema_name,
        view_name=known.view_name,
        managed=known.managed,
        state=each.state.value,
        reason=each.reason,
        last_run=None
        if last is None
        else LastRun(
            id=last.id,
            operation=last.operation,
            status=last.status,
            finished_at=last.finished_at,
            duration_ms=last.duration_ms,
            strategy=last.strategy,
            dag_id=last.dag_id,
            error=_told(last.error),
        ),
        last_filled_at=known.last_filled_at,
        age=known.age,
        usual_interval=each.usual_interval,
        consecutive_failures=known.consecutive_failures,
        failures_24h=known.failures_24h,
        running=[
            RunningNow(
                id=run.id,
                operation=run.operation,
                started_at=run.started_at,
                seconds=(known.at - run.started_at).total_seconds(),
                lost=run.lost,
            )
            for run in known.running
        ],
        durations_ms=list(reversed(known.durations_ms)),
        row_count=known.row_count,
        heap_bytes=known.heap_bytes,
        bloat=known.bloat,
    )


def _told(error: object) -> str | None:
    if error is None:
        return None
    told = f"{error.get('class')}: {error.get('message')}" if isinstance(error, dict) else str(error)
    return told[:_LONGEST_ERROR]


class _Hook(MatViewHook):
    """For somebody who waits at a screen."""

    connection_defaults: ClassVar[Mapping[str, Any]] = {**MatViewHook.connection_defaults, "connect_timeout": 3}


def _whole_name(schema_name: str | None, view_name: str | None) -> None:
    if (schema_name is None) != (view_name is None):
        raise HTTPException(
            status.HTTP_404_NOT_FOUND, "Half a name is no view's: give both schema_name and view_name, or neither."
        )


def _hook(shown: tuple[str, str]) -> MatViewHook:
    connection_id, tracking_schema = shown
    return _Hook(postgres_conn_id=connection_id, tracking_schema=tracking_schema)


def _ask(
    shown: tuple[str, str],
    question: Callable[[Ledger], Work[_T | None]],
    nothing: Any = None,
    *,
    nothing_of_it: str = _NOTHING,
) -> _T:
    hook = _hook(shown)
    return _answer(lambda: hook.browse(question, seconds=LONGEST_STATEMENT), nothing, nothing_of_it=nothing_of_it)


def _answer(ask: Callable[[], _T | None], nothing: Any = None, *, nothing_of_it: str = _NOTHING) -> _T:
    if not _asking.acquire(timeout=_LONGEST_WAIT):
        raise HTTPException(
            status.HTTP_503_SERVICE_UNAVAILABLE, "Too many are waiting for a database just now. Try it again."
        )
    try:
        answer = ask()
    except AirflowNotFoundException as error:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "Airflow knows no such connection.") from error
    except NotAMaterializedView as error:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "What stands there is no materialized view.") from error
    except browsing.TooManyRows as error:
        raise HTTPException(status.HTTP_400_BAD_REQUEST, str(error)) from error
    except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable, ViewLocked) as error:
        raise HTTPException(status.HTTP_504_GATEWAY_TIMEOUT, "The database took too long to answer.") from error
    except (MatViewError, psycopg.Error) as error:
        # Not in the server's own words, which may tell of its host and its user.
        raise HTTPException(
            status.HTTP_502_BAD_GATEWAY, f"The database could not be read ({type(error).__name__})."
        ) from error
    finally:
        _asking.release()
    if answer is None:
        answer = nothing
    if answer is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, nothing_of_it)
    return answer
