"""What a screen shows of the record: single statements, read only, each with a limit on its rows and its time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition, RefreshStrategy
from airflow_provider_matviews.exceptions import MatViewError
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.attachments import Attachment, attachments_of
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.graph import Graph, read_graph
from airflow_provider_matviews.services.instructions import Command, Query, Session, Work, fetch_all, fetch_one
from airflow_provider_matviews.services.ledger import DefinitionRecord, Ledger, Operation, Run, RunStatus
from airflow_provider_matviews.services.metrics import lost_and_ended, number, read_recorded
from airflow_provider_matviews.services.overview import ViewGlance, glance
from airflow_provider_matviews.services.plan_steps import PlanStep, StepKind
from airflow_provider_matviews.services.refresh import situation_of
from airflow_provider_matviews.services.staleness import Judgement, judge_views
from airflow_provider_matviews.services.strategies.auto import PastRefresh, Situation, choose
from airflow_provider_matviews.services.underway import UnderWay, look_at, running_now

_T = TypeVar("_T")

#: No question has an answer of more rows.
MOST_ROWS = 20_000
# In order: a subquery with ORDER BY is not taken apart by the planner.
_LIMITED = sql.SQL("SELECT * FROM ({}) AS asked LIMIT {}")


@dataclass(frozen=True)
class RunPage:
    """One run, among the others of its view.

    :ivar schema_name: of its view.
    :ivar view_name: likewise, without the schema.
    :ivar previous_id: the run before it; None where it is the first that is left.
    :ivar next_id: the run after it; None where it is the last.
    :ivar lost: whether it says ``running``, and its process is gone.
    """

    run: Run
    schema_name: str
    view_name: str
    previous_id: int | None
    next_id: int | None
    lost: bool


class TooManyRows(MatViewError):
    """There is more of it than anybody could look at."""


def read_only(work: Work[_T], seconds: float, session: Session = Session.RECORD) -> Work[_T]:
    """Do something in one transaction that may change nothing, whose statements take no longer and give no more rows
    than somebody at a screen could do with.

    In a transaction, because behind a pooler what a session is told would stay there for others.

    :param work: whose use of that connection is limited.
    :param seconds: that a statement of it may take, or wait for a lock.
    :raises psycopg.errors.QueryCanceled: when one took longer.
    :raises TooManyRows: when one gives more than ``MOST_ROWS`` rows.
    """
    yield Command(sql.SQL("BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY"), session)
    try:
        # Planned as long ones, all of these are short: over 500 views compiling took 0.9 s of 1.05 s (PostgreSQL 15).
        yield Command(sql.SQL("SET LOCAL jit = off"), session)
        for setting in ("statement_timeout", "lock_timeout"):
            limit = sql.Literal(f"{round(seconds * 1000)}ms")
            yield Command(sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(setting), limit), session)
        return (yield from _few_rows(work, session))
    finally:
        # A connection that is lost has nothing left to end.
        with suppress(psycopg.Error):
            yield Command(sql.SQL("ROLLBACK"), session, undoing=True)


def _few_rows(work: Work[_T], session: Session) -> Work[_T]:
    """Limit every query of some work, on the server; none can be forgotten that way."""
    try:
        instruction = next(work)
        while True:
            limited = isinstance(instruction, Query) and instruction.session is session
            if isinstance(instruction, Query) and limited:
                instruction = replace(
                    instruction, statement=_LIMITED.format(instruction.statement, sql.Literal(MOST_ROWS + 1))
                )
            try:
                result = yield instruction
            except BaseException as error:
                instruction = work.throw(error)
                continue
            if limited and len(result.rows) > MOST_ROWS:
                work.close()
                raise TooManyRows(
                    f"There are more than {MOST_ROWS:,} of these, which is more than this page reads.",
                    hint="ask for part of them, or read the tables with SQL.",
                )
            instruction = work.send(result)
    except StopIteration as end:
        ended: _T = end.value
        return ended


def ask_record(ledger: Ledger, question: Callable[[Ledger], Work[_T | None]], seconds: float) -> Work[_T | None]:
    """Ask the record something for somebody at a screen: as :func:`read_only`; None where there are no run tables."""
    return recorded(ledger, lambda known: read_only(question(known), seconds))


def recorded(ledger: Ledger, question: Callable[[Ledger], Work[_T | None]]) -> Work[_T | None]:
    """Ask the record something; None where there are no run tables yet."""
    try:
        return (yield from question(ledger))
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return None


def run_page(ledger: Ledger, run_id: int) -> Work[RunPage | None]:
    """Read one run and its neighbours; None where it is not on record."""
    run = yield from ledger.run(run_id)
    if run is None:
        return None
    row = yield from fetch_one(
        sql.SQL(
            """
            SELECT d.schema_name, d.view_name,
                   (SELECT n.id FROM {runs} n WHERE n.mat_view_definition_id = r.mat_view_definition_id
                      AND (n.created_at, n.id) < (r.created_at, r.id)
                    ORDER BY n.created_at DESC, n.id DESC LIMIT 1) AS previous,
                   (SELECT n.id FROM {runs} n WHERE n.mat_view_definition_id = r.mat_view_definition_id
                      AND (n.created_at, n.id) > (r.created_at, r.id)
                    ORDER BY n.created_at, n.id LIMIT 1) AS next
            FROM {runs} r JOIN {definitions} d ON d.id = r.mat_view_definition_id WHERE r.id = %s
            """
        ).format(runs=ledger.table("mat_view_runs"), definitions=ledger.table("mat_view_definitions")),
        (run_id,),
        Session.RECORD,
    )
    if row is None:
        # Deleted in between.
        return None
    lost: set[int] = set()
    if run.status == "running":
        view = ResolvedName(row["schema_name"], row["view_name"], row["view_name"])
        lost, _ = yield from lost_and_ended(ledger, {run_id: view})
    return RunPage(run, row["schema_name"], row["view_name"], row["previous"], row["next"], run_id in lost)


@dataclass(frozen=True)
class RunFilter:
    """Which runs are wanted; None for whichever.

    :ivar schema_name: with ``view_name``: of this view.
    :ivar before: the mark of the last run of the page before: microseconds since 1970 of its ``created_at``, and its
        id.
    """

    schema_name: str | None = None
    view_name: str | None = None
    operation: str | None = None
    status: str | None = None
    before: str | None = None


def run_list(ledger: Ledger, wanted: RunFilter, limit: int) -> Work[list[dict[str, Any]]]:
    """Read a page of runs, newest first."""
    parameters: dict[str, Any] = {"limit": limit}
    of_view, before = sql.SQL("true"), sql.SQL("true")
    if wanted.schema_name is not None and wanted.view_name is not None:
        of_view = sql.SQL("d.schema_name = %(schema)s AND d.view_name = %(name)s")
        parameters |= {"schema": wanted.schema_name, "name": wanted.view_name}
    if wanted.before is not None:
        at, _, run_id = wanted.before.partition("-")
        before = sql.SQL("(r.created_at, r.id) < (timestamptz 'epoch' + %(at)s * interval '1 microsecond', %(id)s)")
        parameters |= {"at": int(at), "id": int(run_id)}
    names = {
        "runs": ledger.table("mat_view_runs"),
        "definitions": ledger.table("mat_view_definitions"),
        "of_view": of_view,
        "before": before,
    }
    return (
        yield from fetch_all(
            sql.SQL(
                """
                SELECT r.id, d.name AS view, {operation} AS operation, {status} AS status, r.started_at, r.finished_at,
                       r.duration_ms, r.meta->>'strategy' AS strategy,
                       {rows_before} AS row_count_before, {rows_after} AS row_count_after, {size} AS size_bytes,
                       r.meta->>'dag_id' AS dag_id,
                       left((r.error->>'class') || ': ' || (r.error->>'message'), 300) AS error, r.created_at,
                       (extract(epoch FROM r.created_at) * 1000000)::bigint || '-' || r.id AS mark
                FROM ({chosen}) chosen JOIN {runs} r ON r.id = chosen.id
                JOIN {definitions} d ON d.id = r.mat_view_definition_id
                ORDER BY r.created_at DESC, r.id DESC
                """
            ).format(
                **names,
                operation=_in_words("operation", Operation),
                status=_in_words("status", RunStatus),
                rows_before=number("r.meta->'row_count_before'"),
                rows_after=number("r.meta->'row_count_after'"),
                size=number("r.meta->'response'->'size_bytes'"),
                chosen=_chosen(wanted).format(**names, kinds=_kinds(wanted)),
            ),
            parameters,
            Session.RECORD,
        )
    )


def _chosen(wanted: RunFilter) -> sql.SQL:
    if wanted.operation is None and wanted.status is None:
        if wanted.schema_name is None or wanted.view_name is None:
            return sql.SQL(
                "SELECT r.id FROM {runs} r WHERE {before} ORDER BY r.created_at DESC, r.id DESC LIMIT %(limit)s"
            )
        return sql.SQL(
            "SELECT r.id FROM {runs} r WHERE r.mat_view_definition_id = (SELECT d.id FROM {definitions} d "
            "WHERE {of_view}) AND {before} ORDER BY r.created_at DESC, r.id DESC LIMIT %(limit)s"
        )
    # The latest of each kind of each view, by the index, and of these the latest: a kind that is rare would otherwise
    # be looked for through all of the history.
    return sql.SQL(
        """
        SELECT latest.id FROM {definitions} d
        CROSS JOIN (VALUES {kinds}) AS kind (operation, status)
        CROSS JOIN LATERAL (
            SELECT r.id, r.created_at FROM {runs} r
            WHERE r.mat_view_definition_id = d.id AND r.operation = kind.operation AND r.status = kind.status
              AND {before}
            ORDER BY r.created_at DESC, r.id DESC LIMIT %(limit)s
        ) latest
        WHERE {of_view} ORDER BY latest.created_at DESC, latest.id DESC LIMIT %(limit)s
        """
    )


def _kinds(wanted: RunFilter) -> sql.Composable:
    operations = [each for each in Operation if wanted.operation in (None, each.word)]
    statuses = [each for each in RunStatus if wanted.status in (None, each.name.lower())]
    return sql.SQL(", ").join(
        sql.SQL("({}, {})").format(sql.Literal(int(operation)), sql.Literal(int(status)))
        for operation in operations
        for status in statuses
    )


def _in_words(column: str, kind: type[IntEnum]) -> sql.Composed:
    words = sql.SQL(" ").join(
        sql.SQL("WHEN {} THEN {}").format(sql.Literal(int(each)), sql.Literal(each.name.lower())) for each in kind
    )
    return sql.SQL("CASE r.{0} {1} ELSE r.{0}::text END").format(sql.Identifier(column), words)


def staleness(ledger: Ledger) -> Work[list[Judgement]]:
    """Say of every view that stands, and of which that can be said, whether it is older than what it reads."""
    kept = yield from ledger.definitions()
    judged = yield from judge_views({(each.schema_name, each.view_name): each.source_state for each in kept})
    # Of others it is not known: they have not been refreshed since they are on record.
    return [each for each in judged if each.refreshed_at is not None]


@dataclass(frozen=True)
class ViewPage:
    """One view, as it is on record.

    :ivar drift: what the latest create that looked found to differ from the definition, each in a sentence; None where
        none looked.
    :ivar drift_run_id: that run.
    :ivar drift_mended: whether it put that right.
    """

    glance: ViewGlance
    definition: DefinitionRecord
    drift: list[str] | None
    drift_run_id: int | None
    drift_mended: bool


def view_page(ledger: Ledger, schema_name: str, view_name: str) -> Work[ViewPage | None]:
    """Read what is on record of a view; None where nothing is."""
    definition = yield from ledger.glance(ResolvedName(schema_name, view_name, view_name))
    if definition is None:
        return None
    found = yield from read_recorded(ledger, [definition], window=100, times=True, rows=True)
    row = yield from fetch_one(
        sql.SQL(
            "SELECT id, status, meta->'response'->'drift' AS drift, meta->'response'->'plan'->'steps' AS steps FROM {} "
            "WHERE mat_view_definition_id = %s AND operation = {} AND status = ANY({}) "
            "ORDER BY created_at DESC, id DESC LIMIT 1"
        ).format(
            ledger.table("mat_view_runs"),
            sql.Literal(int(Operation.CREATE)),
            sql.Literal([int(RunStatus.SUCCESS), int(RunStatus.SKIPPED)]),
        ),
        (definition.id,),
        Session.RECORD,
    )
    if row is None or not isinstance(row["drift"], bool):
        return ViewPage(glance(found[0]), definition, None, None, False)
    mended = row["status"] == RunStatus.SUCCESS
    return ViewPage(glance(found[0]), definition, _differences(row["steps"]), row["id"], mended)


def _differences(steps: object) -> list[str]:
    """Word the steps of a plan, as far as they are as we write them."""
    told = []
    for step in steps if isinstance(steps, list) else ():
        if isinstance(step, dict):
            kind, subject, why = (str(step.get(name, "")) for name in ("kind", "subject", "why"))
            known = kind in StepKind.__members__.values()
            title = PlanStep(StepKind(kind), subject, why).title if known else f"{kind} {subject}"
            told.append(f"{title}: {why}")
    return told


@dataclass(frozen=True)
class CatalogPage:
    """What the catalogs say a view is.

    :ivar columns: names and types, in order.
    :ivar indexes: their definitions, and what is wrong with them.
    """

    owner: str
    query: str
    populated: bool
    estimated_rows: int | None
    columns: list[tuple[str, str]]
    indexes: list[str]
    dependents: list[str]
    sources: list[str]
    attachments: list[Attachment]


def catalog_page(schema_name: str, view_name: str) -> Work[CatalogPage | None]:
    """Read what the catalogs say of a view; None where it does not stand."""
    view = ResolvedName(schema_name, view_name, view_name)
    facts = yield from catalog.find_view(view)
    if facts is None:
        return None
    query = yield from catalog.query_of(view)
    if query is None:
        return None
    attachments = yield from attachments_of(facts.oid)
    return CatalogPage(
        facts.owner,
        query,
        facts.populated,
        facts.estimated_rows,
        (yield from catalog.columns_of(facts.oid)),
        [
            index.definition + ("" if index.valid else " -- INVALID: a build of it failed half-way")
            for index in (yield from catalog.indexes_of(facts.oid))
        ],
        (yield from catalog.dependents_of(facts.oid)),
        (yield from catalog.sources_of(facts.oid)),
        [each for each in attachments if each.kind != "index"],
    )


#: Views beyond which a drawing says nothing any more.
MOST_DRAWN = 300


def view_graph(schema_name: str | None, view_name: str | None) -> Work[Graph | None]:
    """Read which views read which: of all of the database, or of what feeds a view and what it feeds, near and far.

    :returns: None where that view does not stand, or where there are too many to be drawn.
    """
    graph = yield from read_graph(Session.RECORD)
    if schema_name is not None and view_name is not None:
        wanted = [name for name, view in graph.views.items() if (view.schema, view.name) == (schema_name, view_name)]
        if not wanted:
            return None
        shown = {*wanted, *graph.needed_by(wanted), *graph.fed_by(wanted)}
    else:
        shown = set(graph.needs)
    if len(shown) > MOST_DRAWN:
        return None
    return Graph(
        {name: view for name, view in graph.views.items() if name in shown},
        {name: needed & shown for name, needed in graph.needs.items() if name in shown},
        {name: tables for name, tables in graph.sources.items() if name in shown},
    )


@dataclass(frozen=True)
class Choice:
    """How a refresh would go now.

    :ivar declared: the strategy that the definition says; of a view that was never declared ``auto``.
    :ivar strategy: what ``auto`` would choose.
    :ivar reason: why, in one clause.
    :ivar swap_obstacles: why it cannot be swapped; empty where it can.
    :ivar bloat: how many times the room of the last rebuild a row of it takes; None where unknown.
    :ivar may_refresh: whether the connection's role may refresh it at all.
    """

    declared: str
    strategy: str
    reason: str
    swap_obstacles: list[str]
    bloat: float | None
    may_refresh: bool


def view_choice(ledger: Ledger, schema_name: str, view_name: str, seconds: float) -> Work[Choice | None]:
    """Say what ``auto`` would choose for a view now; None where it does not stand. Locks nothing beyond reading."""
    view = ResolvedName(schema_name, view_name, view_name)

    def of_record() -> Work[tuple[DefinitionRecord, list[PastRefresh]] | None]:
        definition = yield from ledger.glance(view)
        return None if definition is None else (definition, (yield from ledger.past_refreshes(definition.id)))

    def now(past: list[PastRefresh]) -> Work[tuple[Situation, bool, RefreshStrategy, str] | None]:
        server, _ = yield from catalog.arrive(ViewName(view_name, schema_name))
        facts = yield from catalog.find_view(view)
        if facts is None:
            return None
        situation = yield from situation_of(facts, (yield from catalog.indexes_of(facts.oid)), server, past)
        return situation, facts.can_maintain, *choose(situation)

    known = yield from ask_record(ledger, lambda _: of_record(), seconds)
    definition, past = known or (None, [])
    chosen = yield from read_only(now(past), seconds, Session.WORK)
    if chosen is None:
        return None
    situation, may_refresh, strategy, reason = chosen
    return Choice(
        (definition.refresh_strategy if definition else RefreshStrategy.AUTO).value,
        strategy.value,
        reason,
        list(situation.swap_obstacles),
        situation.bloat,
        may_refresh,
    )


def under_way(ledger: Ledger, seconds: float) -> Work[list[UnderWay]]:
    """Look at what runs now; nothing of it is waited for."""
    running = (yield from ask_record(ledger, running_now, seconds)) or []
    if not running:
        return []

    def looks() -> Work[list[UnderWay]]:
        found = []
        for each in running:
            found.append((yield from look_at(*each)))
        return found

    return (yield from read_only(looks(), seconds, Session.WORK))


def declared_definition(ledger: Ledger, view: ResolvedName) -> Work[MatViewDefinition | None]:
    """Return what a view was last declared to be, under its name with its schema; None where it never was."""
    known = yield from ledger.glance(view)
    if known is None or not known.declaration:
        return None
    name = str(ViewName(known.view_name, known.schema_name))
    return MatViewDefinition.from_dict({**known.declaration, "name": name, "renamed_from": None})
