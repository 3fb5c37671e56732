"""Many views refreshed together: which ones, in which order, and what becomes of those that read one that failed.

Knows no Airflow. The order is the catalog's, with what definitions declare beside it (``depends_on``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import psycopg
from psycopg import sql

from airflow_provider_matviews.exceptions import (
    MatViewError,
    OperationCancelled,
    ViewNotFound,
)
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.graph import Graph, read_graph
from airflow_provider_matviews.services.instructions import Note, Session, Work, fetch_all
from airflow_provider_matviews.services.ledger import DefinitionRecord, Ledger, Operation
from airflow_provider_matviews.services.response import Report, ServiceResponse, would_be
from airflow_provider_matviews.services.retention import retain
from airflow_provider_matviews.services.run import Terms, meta_of
from airflow_provider_matviews.services.selection import Selection
from airflow_provider_matviews.services.sparing import Sparing
from airflow_provider_matviews.services.staleness import judge_views

#: Seconds before a view is tried again for which the server had no connection, though no other one of ours had any.
_AGAIN_AFTER = (0.1, 0.3, 1.0, 2.0, 4.0)
_STANDING = sql.SQL(
    """
    SELECT given.name, n.nspname::text AS schema, c.relname::text AS relation
    FROM unnest(%(names)s::text[]) AS given (name)
    LEFT JOIN pg_catalog.pg_class c ON c.oid = to_regclass(given.name)
    LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    """
)

Status = Literal["updated", "skipped", "failed", "stopped"]
STATUSES: tuple[Status, ...] = get_args(Status)


class NotBegun(Exception):
    """A view's turn came when it could not be refreshed any more; the message says why."""


class NoRoom(Exception):
    """A view's turn came and the server had no connection left for it; the message is the server's."""


@dataclass(frozen=True)
class Outcome:
    """What became of one view.

    :ivar status: ``updated``, ``skipped``, ``failed``, or ``stopped``: not begun, because something that it reads was
        not refreshed, or because time was up.
    :ivar reason: why, for a person; the error's message where it failed.
    :ivar response: of its refresh; None where none was begun.
    """

    view: str
    status: Status
    reason: str | None = None
    response: ServiceResponse | None = None
    run_id: int | None = None

    @property
    def headline(self) -> str:
        """The first line of the reason."""
        return next(iter((self.reason or "").splitlines()), "")

    def as_dict(self, redact: Callable[[str], str] = str) -> dict[str, Any]:
        """Return it as plain data, for XCom.

        :param redact: takes secrets out of text: a reason may be in the words of the server, which may repeat a query.
        """
        facts = self.response.response if self.response else {}
        return {
            "view": self.view,
            "status": self.status,
            "strategy": facts.get("strategy"),
            "row_count_before": facts.get("row_count_before"),
            "row_count_after": facts.get("row_count_after"),
            "duration_ms": self.response.duration_ms if self.response else None,
            "reason": redact(self.reason) if self.reason else self.reason,
            "mat_view_run_id": self.run_id,
            **({"sources": facts["sources"]} if "sources" in facts else {}),
        }


@dataclass
class Fleet:
    """The views that are to be refreshed, and how far that has come.

    :ivar needs: of each of them, those among them that it waits for.
    :ivar views: where they stand, by name.
    :ivar definitions: what is recorded of them, by name.
    """

    needs: dict[str, frozenset[str]]
    views: Mapping[str, ResolvedName] = field(default_factory=dict)
    definitions: Mapping[str, DefinitionRecord] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)

    def ready(self) -> list[str]:
        """Return the views whose turn has come and that have not begun, those first that most wait for."""
        ready = [
            view for view, needed in self.needs.items() if view not in self.begun and needed <= self.outcomes.keys()
        ]
        return sorted(ready, key=lambda view: -self._waiting[view])

    @cached_property
    def _waiting(self) -> dict[str, int]:
        """How many views wait for each."""
        graph = Graph({}, self.needs)
        return {view: len(graph.fed_by([view])) for view in self.needs}

    def end(self, outcome: Outcome) -> None:
        """Take note of how one has ended."""
        self.begun.add(outcome.view)
        self.outcomes[outcome.view] = outcome

    def blamed(self, view: str) -> str | None:
        """Return what keeps a view from being refreshed: one that it reads, and that was not."""
        blamed = [need for need in self.needs[view] if self.outcomes[need].status in ("failed", "stopped")]
        return min(blamed, default=None)

    def with_status(self, *statuses: Status) -> list[str]:
        """Return the views that have ended so, in order."""
        return [view for view in self.needs if view in self.outcomes and self.outcomes[view].status in statuses]


@dataclass(frozen=True)
class FleetResponse:
    """What came of refreshing several views.

    :ivar outcomes: of each, in the order in which they depend on each other.
    :ivar seconds: that all of it took.
    :ivar dry_run: whether it only says what would come of it.
    """

    outcomes: tuple[Outcome, ...]
    seconds: float
    dry_run: bool = False

    def count(self, status: Status) -> int:
        """Return how many have ended so."""
        return sum(outcome.status == status for outcome in self.outcomes)

    def story(self) -> str:
        """Say it in one line."""
        counts = {status: self.count(status) for status in STATUSES}
        if self.dry_run:
            told = ", ".join(f"{count} {would_be(status)}" for status, count in counts.items() if count)
            return f"Dry run, {self.seconds:.2f} s: {told or 'nothing to do'}. Nothing was changed."
        told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return f"{told or 'Nothing done'} in {self.seconds:.2f} s."

    def as_dict(self, redact: Callable[[str], str] = str) -> dict[str, Any]:
        """Return it as plain data, for XCom.

        :param redact: takes secrets out of text.
        """
        return {
            **{status: self.count(status) for status in STATUSES},
            "seconds": round(self.seconds, 3),
            "views": [outcome.as_dict(redact) for outcome in self.outcomes],
        }

    def table(self) -> list[str]:
        """Return the lines of a table of all of it, those first that somebody has to look at."""
        urgency = {"failed": 0, "stopped": 1, "updated": 2, "skipped": 3}
        rows = [("view", "status", "strategy", "rows", "seconds", "reason")]
        for outcome in sorted(self.outcomes, key=lambda outcome: urgency[outcome.status]):
            facts = outcome.as_dict()
            rows.append(
                (
                    outcome.view,
                    would_be(outcome.status) if self.dry_run else outcome.status,
                    facts["strategy"] or "",
                    "" if facts["row_count_after"] is None else f"{facts['row_count_after']:,}",
                    "" if facts["duration_ms"] is None else f"{facts['duration_ms'] / 1000:.2f}",
                    # What it was, not why it was chosen.
                    "" if outcome.status == "updated" else outcome.headline,
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return [
            "  ".join(
                [
                    cell.rjust(width) if column in (3, 4) else cell.ljust(width)
                    for column, (cell, width) in enumerate(zip(row, widths, strict=False))
                ]
                + [row[5]]
            ).rstrip()
            for row in rows
        ]


def muster(
    ledger: Ledger,
    selection: Selection,
    sparing: Sparing,
    terms: Terms,
    *,
    dry_run: bool = False,
) -> Work[Fleet]:
    """Find out which views are to be refreshed and in which order; record those that are left alone.

    With ``skip_unchanged`` the views of which nothing has changed, and nothing that they read will be refreshed, are
    skipped here, all by a few statements.

    :param terms: what was asked and whose task it is, for the run rows of those; and the settings of the call, which go
        before those of a view's definition.
    :param dry_run: record nothing.
    :raises ViewNotFound: when a name stands for no materialized view, or a schema does not exist.
    """
    graph = yield from read_graph(Session.RECORD)
    definitions = yield from _on_record(ledger, dry_run=dry_run)
    graph = _with_declared(graph, definitions)
    yield from _require_schemas(selection.schemas)
    standing = yield from _standing(selection.exact_names, graph)
    chosen = selection.of(graph, standing)
    for note in (*selection.without_effect(graph, standing), *_told_circles(graph, chosen)):
        yield Note(note, warning=True)
    order = [view for view in graph.order if view in chosen]
    needs = {view: graph.needs_in_order[view] & chosen for view in order}
    if not definitions or not (selection.stale or sparing.skip_unchanged):
        return Fleet(needs, graph.views, definitions)
    judgements = {
        judgement.view.display: judgement
        for judgement in (
            yield from judge_views(
                {(each.schema_name, each.view_name): each.source_state for each in definitions.values()},
                [graph.views[view] for view in order],
                max_staleness=sparing.max_staleness,
                given={
                    graph.views[view]: {**definitions[view].session_settings, **terms.session_settings}
                    for view in order
                    if view in definitions
                },
            )
        )
    }
    # What reads a view that is to be refreshed is looked at when that has ended.
    changing: set[str] = set()
    for view in order:
        if view not in judgements or judgements[view].stale or needs[view] & changing:
            changing.add(view)
    if selection.stale:
        return Fleet({view: needs[view] & changing for view in order if view in changing}, graph.views, definitions)
    fleet = Fleet(needs, graph.views, definitions)
    unchanged = [judgements[view] for view in order if view not in changing]
    ids = {definitions[each.view.display].id: each.view.display for each in unchanged}
    for definition_id, earlier in (yield from ledger.done_by(terms.context, list(ids))).items():
        # An earlier try of the task failed or was lost, and what follows it has heard nothing of this one yet.
        response = ServiceResponse("updated", {}, earlier.facts, earlier.run_id, earlier.duration_ms)
        fleet.end(Outcome(ids[definition_id], "updated", earlier.facts["reason"], response, earlier.run_id))
    unchanged = [each for each in unchanged if each.view.display not in fleet.outcomes]
    run_ids: Sequence[int | None] = [None] * len(unchanged)
    if not dry_run:
        yield from ledger.settle_sources(
            {definitions[each.view.display].id: each.settled_at for each in unchanged if each.settled_at is not None}
        )
        run_ids = yield from _record_skipped(
            ledger, definitions, [(each.view.display, each.reason) for each in unchanged], terms, spared="unchanged"
        )
    for judgement, run_id in zip(unchanged, run_ids, strict=True):
        fleet.end(Outcome(judgement.view.display, "skipped", judgement.reason, None, run_id))
    return fleet


def _require_schemas(schemas: Sequence[str]) -> Work[None]:
    rows = yield from fetch_all(
        sql.SQL("SELECT nspname::text AS name FROM pg_catalog.pg_namespace WHERE nspname = ANY (%(schemas)s)"),
        {"schemas": list(schemas)},
        Session.RECORD,
    )
    if missing := sorted(set(schemas) - {row["name"] for row in rows}):
        raise ViewNotFound(
            f"There is no schema {', '.join(missing)} in this database.",
            hint="names in schemas= are exact, without quotes; create it first, or mend the name.",
        )


def _told_circles(graph: Graph, chosen: Collection[str]) -> Iterator[str]:
    for view, passed_over in sorted(graph.passed_over.items()):
        for needed in sorted(passed_over.intersection(chosen) if view in chosen else ()):
            why = "depends_on says so" if needed in graph.declared.get(view, ()) else "which is legal"
            yield f"{view} and {needed} come after each other in a circle ({why}): {view} does not wait for {needed}."


def _on_record(ledger: Ledger, *, dry_run: bool) -> Work[dict[str, DefinitionRecord]]:
    try:
        records = yield from ledger.definitions()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        # A dry run makes no tables.
        if not dry_run:
            raise
        return {}
    return {record.name: record for record in records}


def _standing(names: Sequence[str], graph: Graph) -> Work[dict[str, str | None]]:
    """Return which view of the graph each name stands for, as the search path has it."""
    written = {name: str(ViewName.parse(name)) for name in names}
    rows = yield from fetch_all(_STANDING, {"names": list(written.values())}, Session.RECORD)
    found = {row["name"]: (row["schema"], row["relation"]) for row in rows}
    displays = {(view.schema, view.name): display for display, view in graph.views.items()}
    return {name: displays.get(found[text]) for name, text in written.items()}


def _with_declared(graph: Graph, definitions: Mapping[str, DefinitionRecord]) -> Graph:
    """Return the graph with what definitions say that a view comes after (``depends_on``)."""
    displays = {(view.schema, view.name): display for display, view in graph.views.items()}
    declared: dict[str, frozenset[str]] = {}
    for name, record in definitions.items():
        if name not in graph.needs:
            continue
        parsed = [ViewName.parse(other) for other in record.declaration.get("depends_on", ())]
        others = {displays.get((other.schema or "public", other.name)) for other in parsed}
        declared[name] = frozenset(other for other in others if other is not None and other != name) - graph.needs[name]
    needs = {view: needed | declared.get(view, frozenset()) for view, needed in graph.needs.items()}
    return Graph(graph.views, needs, graph.sources, declared)


async def carry_out(
    fleet: Fleet,
    refresh: Callable[[str], Awaitable[ServiceResponse]],
    *,
    at_once: int,
    tell: Callable[[Outcome], None],
) -> None:
    """Refresh the views of a fleet, each after those that it waits for, so many at a time.

    One that fails stops what reads it, near and far, and nothing else.

    :param refresh: refreshes one view, by its name.
    :param at_once: how many at a time.
    :param tell: is told of each that has ended.
    :raises OperationCancelled: when one was cancelled on purpose: no other is begun then.
    :raises BaseException: what ends the process; what runs is cancelled first, and its end waited for.
    """
    running: dict[asyncio.Task[ServiceResponse], str] = {}
    cancelled: OperationCancelled | None = None
    #: How often the server had no room though nothing of ours ran.
    refused = 0
    try:
        while True:
            while cancelled is None and (turn := _turn(fleet, len(running) < at_once)) is not None:
                view, blamed = turn
                if blamed is not None:
                    outcome = Outcome(view, "stopped", f"{blamed}, which it reads, was not refreshed")
                    fleet.end(outcome)
                    tell(outcome)
                else:
                    fleet.begun.add(view)
                    running[asyncio.ensure_future(refresh(view))] = view
            if not running:
                break
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if isinstance(error := task.exception(), NoRoom) and (len(running) > 1 or refused < len(_AGAIN_AFTER)):
                    # There is room again when another one of ours has ended, or of others.
                    fleet.begun.remove(running.pop(task))
                    at_once = max(1, at_once - 1)
                    if not running:
                        await asyncio.sleep(_AGAIN_AFTER[refused])
                        refused += 1
                    continue
                outcome = _outcome(running.pop(task), task)
                fleet.end(outcome)
                tell(outcome)
                if isinstance(error, OperationCancelled):
                    cancelled = error
    except BaseException:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        raise
    if cancelled is not None:
        raise cancelled


def _turn(fleet: Fleet, room: bool) -> tuple[str, str | None] | None:
    for view in fleet.ready():
        blamed = fleet.blamed(view)
        if room or blamed is not None:
            return view, blamed
    return None


def _outcome(view: str, task: asyncio.Task[ServiceResponse]) -> Outcome:
    error = task.exception()
    if error is None:
        response = task.result()
        facts = response.response
        status: Status = "skipped" if response.status == "skipped" and not facts.get("already") else "updated"
        return Outcome(view, status, facts.get("stale") or facts.get("reason"), response, response.run_id)
    if not isinstance(error, Exception):
        raise error
    if isinstance(error, (NotBegun, NoRoom)):
        return Outcome(view, "stopped", str(error))
    so_far = getattr(error, "response", None)
    return Outcome(view, "failed", _told(error), so_far, so_far.run_id if so_far else None)


def _told(error: Exception) -> str:
    if isinstance(error, MatViewError):
        return error.message
    # Without the excerpt of the statement.
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return primary or str(error) or type(error).__name__


def record_stopped(ledger: Ledger, fleet: Fleet, terms: Terms) -> Work[None]:
    """Record, of each view that was stopped because of another one, that it was skipped and why."""
    stopped = [(view, fleet.outcomes[view].reason or "") for view in fleet.with_status("stopped")]
    definitions = dict(fleet.definitions)
    for view, _ in stopped:
        if view not in definitions:
            definitions[view] = yield from ledger.adopt(fleet.views[view], None, None)
    run_ids = yield from _record_skipped(ledger, definitions, stopped, terms)
    for (view, _), run_id in zip(stopped, run_ids, strict=True):
        fleet.end(replace(fleet.outcomes[view], run_id=run_id))


def _record_skipped(
    ledger: Ledger,
    definitions: Mapping[str, DefinitionRecord],
    views: Sequence[tuple[str, str]],
    terms: Terms,
    **more: Any,
) -> Work[list[int]]:
    runs = []
    for view, reason in views:
        report = Report.on(view, dict(terms.request))
        report.told(reason=reason, **more)
        runs.append((definitions[view].id, meta_of(report, terms, "skipped")))
    run_ids = yield from ledger.skip(Operation.REFRESH, runs, 0)
    yield from retain(ledger, [definitions[view] for view, _ in views], ended=False)
    return run_ids
