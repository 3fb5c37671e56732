"""What the record says of how views fare: their latest runs, failures, durations and sizes, of all views at once.

Driven from the definitions, of which there are few, by LATERAL and the indexes of the runs: what it costs does not
grow with the history. Over 5 million runs of 500 views a window function took 4.2 s for what this does in 15 ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from statistics import fmean
from typing import Any

import psycopg
from psycopg import sql

from airflow_provider_matviews.exceptions import ViewNotFound
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.graph import Graph
from airflow_provider_matviews.services.instructions import Note, Session, Work, fetch_all
from airflow_provider_matviews.services.ledger import DefinitionRecord, Ledger, Operation, RunStatus
from airflow_provider_matviews.services.locking import lock_is_held, lock_name
from airflow_provider_matviews.services.selection import Selection

#: A view that has failed for so long is no worse than one that has failed longer.
_MOST_FAILURES = 1000
_WORDS = {operation.value: operation.word for operation in Operation}
_STATUSES = {status.value: status.name.lower() for status in RunStatus}


@dataclass(frozen=True)
class Attempt:
    """A run that came to an end, well or not.

    :ivar status: ``success`` or ``failed``.
    :ivar error: class, message, hint; None unless failed.
    :ivar strategy: how it refreshed, where it did.
    :ivar dag_id: whose task it was; None where it was nobody's.
    """

    id: int
    operation: str
    status: str
    started_at: datetime | None
    finished_at: datetime | None
    duration_ms: int | None
    error: Mapping[str, Any] | None = None
    strategy: str | None = None
    dag_id: str | None = None


@dataclass(frozen=True)
class RunningRun:
    """A run that says ``running``.

    :ivar process: the process, and its machine.
    :ivar lost: whether that is gone: nothing holds the view's lock any more.
    """

    id: int
    operation: str
    started_at: datetime
    process: str | None = None
    lost: bool = False


@dataclass(frozen=True)
class ViewMetrics:
    """How one view fares.

    :ivar view: its name as one would type it; without its schema where that is ``public``.
    :ivar at: now, by the server's clock.
    :ivar recorded_at: since when it is on record; None where it is not.
    :ivar stands: whether there is such a materialized view.
    :ivar populated: whether it holds data, so that it answers queries.
    :ivar last_attempt: its latest create or refresh that succeeded or failed.
    :ivar dropped_at: when we last dropped it, or found that there was nothing to drop.
    :ivar last_filled_at: when a create or a refresh last succeeded.
    :ivar unchanged_at: when a refresh was last left out because nothing had changed, if that is among the latest.
    :ivar consecutive_failures: how many runs have failed since the last that succeeded.
    :ivar failing_since: when the first of those began.
    :ivar failures_24h: how many failed within 24 hours.
    :ivar running: the runs that say so.
    :ivar durations_ms: of its latest successful refreshes, newest first.
    :ivar begun_at: when these began; empty where that was not asked for.
    :ivar row_count: after it was last filled; None where unknown.
    :ivar row_counts: after the same refreshes, None where unknown; empty where they were not asked for.
    :ivar heap_bytes: its size without indexes after its last run, or by the last ANALYZE.
    :ivar bloat: how many times the room of the last rebuild a row of it takes; None where unknown or not asked for.
    """

    view: str
    schema_name: str
    view_name: str
    at: datetime
    definition_id: int | None = None
    managed: bool | None = None
    recorded_at: datetime | None = None
    stands: bool = True
    populated: bool = True
    dropped_at: datetime | None = None
    last_attempt: Attempt | None = None
    last_filled_at: datetime | None = None
    unchanged_at: datetime | None = None
    consecutive_failures: int = 0
    failing_since: datetime | None = None
    failures_24h: int = 0
    running: tuple[RunningRun, ...] = ()
    durations_ms: tuple[int, ...] = ()
    begun_at: tuple[datetime, ...] = ()
    row_count: int | None = None
    row_counts: tuple[int | None, ...] = ()
    heap_bytes: int | None = None
    bloat: float | None = field(default=None)

    @property
    def age(self) -> float | None:
        """Seconds since it was last filled, or found unchanged; None where it never was."""
        known = [each for each in (self.last_filled_at, self.unchanged_at) if each is not None]
        return (self.at - max(known)).total_seconds() if known else None

    @property
    def was_dropped(self) -> bool:
        """Whether it is gone because it was dropped by us, or was never made; what is left is its history."""
        if self.stands:
            return False
        last = self.last_attempt
        if self.last_filled_at is None and (last is None or last.operation != Operation.CREATE.word):
            # A name that somebody mistyped.
            return True
        return self.dropped_at is not None and (
            last is None or last.started_at is None or last.started_at <= self.dropped_at
        )

    @property
    def average_ms(self) -> float | None:
        """How long the successful refreshes took, all that were looked at; None before the first."""
        return fmean(self.durations_ms) if self.durations_ms else None


def read_metrics(
    ledger: Ledger,
    selection: Selection,
    *,
    window: int = 20,
    times: bool = False,
    rows: bool = True,
    bloat: bool = True,
) -> Work[list[ViewMetrics]]:
    """Read how views fare, by name.

    Patterns mean views that are on record and were not dropped by us. An exact name may also be of one that stands and
    is not on record.

    :param window: how many successful refreshes to look at, beside the latest.
    :param times: whether it is wanted when each of them began.
    :param rows: whether row counts are wanted, which the index does not hold.
    :param bloat: whether sizes are wanted.
    :raises ViewNotFound: when an exact name is of a view that neither stands nor is on record, or was dropped.
    """
    recorded = yield from _recorded(ledger)
    standing, unknown = yield from _standing(selection, recorded)
    graph = Graph({view.display: view for view in (*(view for _, view in recorded.values()), *unknown)}, {})
    for note in selection.without_effect(graph, standing):
        yield Note(note, warning=True)
    chosen = selection.of(graph, standing)
    found = yield from _read(
        ledger, [recorded[name][0] for name in chosen if name in recorded], window, times=times, rows=rows, bloat=bloat
    )
    dropped = [each for each in found if each.was_dropped]
    if gone := sorted({each.view for each in dropped} & set(standing.values())):
        raise ViewNotFound(
            f"No materialized view stands under {', '.join(gone)}: dropped, or never made; only the history is left.",
            hint="create it again, or take its name out of views=...",
        )
    gone_ids = {each.definition_id for each in dropped}
    found = [each for each in found if each.definition_id not in gone_ids]
    at = found[0].at if found else None
    if unknown and at is None:
        at = (yield from fetch_all(sql.SQL("SELECT clock_timestamp() AS at"), None, Session.RECORD))[0]["at"]
    found += [
        ViewMetrics(view.display, view.schema, view.name, at)
        for view in unknown
        if at is not None and view.display in chosen
    ]
    return sorted((yield from _with_lost(ledger, found, recorded)), key=lambda each: each.view)


def read_recorded(
    ledger: Ledger,
    definitions: Sequence[DefinitionRecord],
    *,
    window: int = 20,
    times: bool = False,
    rows: bool = True,
    bloat: bool = True,
) -> Work[list[ViewMetrics]]:
    """Read how views fare whose definitions are at hand, dropped or not; arguments as of :func:`read_metrics`."""
    recorded = {each.name: (each.id, ResolvedName(each.schema_name, each.view_name, each.name)) for each in definitions}
    ids = [each.id for each in definitions]
    found = yield from _read(ledger, ids, window, times=times, rows=rows, bloat=bloat)
    return (yield from _with_lost(ledger, found, recorded))


def _recorded(ledger: Ledger) -> Work[dict[str, tuple[int, ResolvedName]]]:
    try:
        rows = yield from fetch_all(
            sql.SQL("SELECT id, schema_name, view_name, name FROM {}").format(ledger.table("mat_view_definitions")),
            (),
            Session.RECORD,
        )
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        # Made by the first operation, never by whoever only looks.
        return {}
    return {row["name"]: (row["id"], ResolvedName(row["schema_name"], row["view_name"], row["name"])) for row in rows}


def _standing(
    selection: Selection, recorded: Mapping[str, tuple[int, ResolvedName]]
) -> Work[tuple[dict[str, str | None], list[ResolvedName]]]:
    """Return which view each exact name means, and those among them that stand and are not on record."""
    by_name = {(view.schema, view.name): view for _, view in recorded.values()}
    standing: dict[str, str | None] = {}
    unknown = []
    for name in selection.exact_names:
        view = yield from catalog.resolve(ViewName.parse(name), session=Session.RECORD)
        known = by_name.get((view.schema, view.name))
        if known is None:
            (kind,) = yield from catalog.kinds_of(view, session=Session.RECORD)
            if kind == catalog.MATERIALIZED_VIEW:
                unknown.append(view)
                known = view
        standing[name] = None if known is None else known.display
    return standing, unknown


_METRICS = """
    SELECT d.id, d.name AS view, d.schema_name, d.view_name, d.managed, d.created_at AS recorded_at,
           statement_timestamp() AS at,
           c.oid IS NOT NULL AS stands, coalesce(c.relispopulated, false) AS populated, c.reltuples,
           -- Not pg_relation_size(): that waits for whoever has locked the view.
           coalesce({heap_bytes}, nullif(c.relpages, 0)::bigint * current_setting('block_size')::bigint) AS heap_bytes,
           last.id AS run_id, last.operation, last.status, last.started_at, last.finished_at, last.duration_ms,
           CASE jsonb_typeof(last.error) WHEN 'object' THEN last.error - 'backtrace' END AS error,
           last.meta->>'strategy' AS strategy, last.meta->>'dag_id' AS dag_id,
           CASE WHEN c.relispopulated IS NOT FALSE THEN filled.finished_at END AS last_filled_at,
           newest.dropped_at, unchanged.created_at AS unchanged_at,
           failures.consecutive AS consecutive_failures, failures.since AS failing_since,
           failures.lately AS failures_24h,
           (SELECT coalesce(jsonb_agg(jsonb_build_object('id', r.id, 'operation', r.operation,
                       'started_at', coalesce(r.started_at, r.created_at), 'process', r.meta->>'process')
                   ORDER BY r.id), '[]')
            FROM {runs} r WHERE r.mat_view_definition_id = d.id AND r.status = {running}) AS running,
           {durations} AS durations, {times} AS times, {rows} AS row_counts, {rebuilt} AS rebuilt,
           {row_count} AS row_count
    FROM {definitions} d
    LEFT JOIN LATERAL (
        SELECT c.oid, c.reltuples, c.relpages, c.relispopulated
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = d.schema_name AND c.relname = d.view_name AND c.relkind = 'm'
    ) c ON true
    CROSS JOIN LATERAL (
        -- One look at the index for each kind: sorted by time it is within a kind.
        SELECT (array_agg(each.id ORDER BY each.created_at DESC, each.id DESC)
                FILTER (WHERE each.operation < {drop}))[1] AS id,
               coalesce(max(each.created_at) FILTER (WHERE each.status = {success} AND each.operation < {drop}),
                        '-infinity') AS succeeded_at,
               max(each.created_at) FILTER (WHERE each.status = {failed}) AS failed_at,
               max(each.created_at) FILTER (WHERE each.operation = {drop}) AS dropped_at,
               (array_agg(each.id ORDER BY each.created_at DESC, each.id DESC)
                FILTER (WHERE each.status = {success} AND each.operation < {drop}))[1] AS filled_id
        FROM (VALUES (0, {success}), (0, {failed}), (1, {success}), (1, {failed}), ({drop}, {success}),
                     -- What was not there.
                     ({drop}, {skipped})) AS kind (operation, status)
        CROSS JOIN LATERAL (
            SELECT r.id, r.operation, r.status, r.created_at FROM {runs} r
            WHERE r.mat_view_definition_id = d.id AND r.operation = kind.operation AND r.status = kind.status
            ORDER BY r.created_at DESC, r.id DESC LIMIT 1
        ) each
    ) newest
    LEFT JOIN {runs} last ON last.id = newest.id
    LEFT JOIN {runs} filled ON filled.id = newest.filled_id
    CROSS JOIN LATERAL (
        -- Counted only where there is one to count.
        SELECT count(*) FILTER (WHERE each.created_at > newest.succeeded_at) AS consecutive,
               min(each.created_at) FILTER (WHERE each.created_at > newest.succeeded_at) AS since,
               count(*) FILTER (WHERE each.created_at >= statement_timestamp() - interval '24 hours') AS lately
        FROM (VALUES (0), (1)) AS kind (operation)
        CROSS JOIN LATERAL (
            SELECT r.created_at FROM {runs} r
            WHERE r.mat_view_definition_id = d.id AND r.operation = kind.operation AND r.status = {failed}
              AND r.created_at >= least(newest.succeeded_at, statement_timestamp() - interval '24 hours')
            ORDER BY r.created_at DESC, r.id DESC LIMIT {most}
        ) each
        WHERE newest.failed_at >= least(newest.succeeded_at, statement_timestamp() - interval '24 hours')
    ) failures
    LEFT JOIN LATERAL (
        -- In the words of its index: among the skipped runs it may be far back.
        SELECT r.created_at FROM {runs} r
        WHERE r.mat_view_definition_id = d.id AND r.status = 4 AND r.meta->'response'->>'spared' = 'unchanged'
        ORDER BY r.created_at DESC LIMIT 1
    ) unchanged ON true
    WHERE d.id = ANY(%(ids)s)
"""
_LATEST = """
    ARRAY(SELECT {what} FROM {runs} r
          WHERE r.mat_view_definition_id = d.id AND r.operation = {refresh} AND r.status = {success}
            AND r.duration_ms IS NOT NULL
          ORDER BY r.created_at DESC, r.id DESC LIMIT %(window)s)
"""
#: A hundred refreshes without a rebuild leave it unknown how large a rebuilt view would be. One that was created is as
#: one that was rebuilt.
_REBUILT = """
    (SELECT each.bytes / each.rows FROM (
         SELECT {bytes_after}::float8 AS bytes, {rows_after}::float8 AS rows, r.created_at, r.id,
                r.operation = 0 OR r.meta->>'strategy' IN ('swap', 'regular') AS rebuilt
         FROM (VALUES (0, 1), (1, 100)) AS kind (operation, most)
         CROSS JOIN LATERAL (
             SELECT * FROM {runs} r
             WHERE r.mat_view_definition_id = d.id AND r.operation = kind.operation AND r.status = {success}
             ORDER BY r.created_at DESC, r.id DESC LIMIT kind.most
         ) r
     ) each
     WHERE each.rebuilt AND each.rows > 0 AND each.bytes > 0
     ORDER BY each.created_at DESC, each.id DESC LIMIT 1)
"""


def number(path: str) -> sql.SQL:
    """Return the expression of a number in a run's ``meta``, and nothing where it is none: others may write there."""
    return sql.SQL("(CASE jsonb_typeof({0}) WHEN 'number' THEN ({0})::numeric::bigint END)".replace("{0}", path))


def _read(
    ledger: Ledger, ids: Sequence[int], window: int, *, times: bool, rows: bool, bloat: bool
) -> Work[list[ViewMetrics]]:
    if not ids:
        return []
    names: dict[str, sql.Composable] = {
        "runs": ledger.table("mat_view_runs"),
        "definitions": ledger.table("mat_view_definitions"),
        "refresh": sql.Literal(int(Operation.REFRESH)),
        "drop": sql.Literal(int(Operation.DROP)),
        "most": sql.Literal(_MOST_FAILURES),
        **{status.name.lower(): sql.Literal(int(status)) for status in RunStatus},
    }
    names["rows_after"] = number("r.meta->'row_count_after'")
    names["bytes_after"] = number("r.meta->'response'->'heap_bytes'")
    names["row_count"] = number("filled.meta->'row_count_after'")
    names["heap_bytes"] = number("filled.meta->'response'->'heap_bytes'")
    latest = sql.SQL(_LATEST)
    names["durations"] = latest.format(what=sql.SQL("r.duration_ms"), **names)
    names["times"] = latest.format(what=sql.SQL("r.created_at"), **names) if times else sql.SQL("'{}'::timestamptz[]")
    names["rows"] = latest.format(what=names["rows_after"], **names) if rows else sql.SQL("'{}'::bigint[]")
    names["rebuilt"] = sql.SQL(_REBUILT).format(**names) if bloat else sql.SQL("NULL::float8")
    found = yield from fetch_all(
        sql.SQL(_METRICS).format(**names), {"ids": list(ids), "window": window + 1}, Session.RECORD
    )
    return [_metrics(row) for row in found]


def _metrics(row: Mapping[str, Any]) -> ViewMetrics:
    attempt = None
    if row["run_id"] is not None:
        attempt = Attempt(
            row["run_id"],
            _WORDS.get(row["operation"], str(row["operation"])),
            _STATUSES.get(row["status"], str(row["status"])),
            row["started_at"],
            row["finished_at"],
            row["duration_ms"],
            row["error"],
            row["strategy"],
            row["dag_id"],
        )
    bloat = None
    rows = row["row_count"] or row["reltuples"]
    if row["rebuilt"] and row["heap_bytes"] and rows and rows > 0:
        bloat = row["heap_bytes"] / rows / row["rebuilt"]
    return ViewMetrics(
        view=row["view"],
        schema_name=row["schema_name"],
        view_name=row["view_name"],
        at=row["at"],
        definition_id=row["id"],
        managed=row["managed"],
        recorded_at=row["recorded_at"],
        stands=row["stands"],
        populated=row["populated"],
        dropped_at=row["dropped_at"],
        last_attempt=attempt,
        last_filled_at=row["last_filled_at"],
        unchanged_at=row["unchanged_at"],
        consecutive_failures=row["consecutive_failures"],
        failing_since=row["failing_since"],
        failures_24h=row["failures_24h"],
        running=tuple(
            RunningRun(
                each["id"],
                _WORDS.get(each["operation"], str(each["operation"])),
                datetime.fromisoformat(each["started_at"]),
                each["process"],
            )
            for each in row["running"]
        ),
        durations_ms=tuple(row["durations"]),
        begun_at=tuple(row["times"]),
        row_count=row["row_count"],
        row_counts=tuple(row["row_counts"]),
        heap_bytes=row["heap_bytes"],
        bloat=bloat,
    )


def _with_lost(
    ledger: Ledger, found: Iterable[ViewMetrics], recorded: Mapping[str, tuple[int, ResolvedName]]
) -> Work[list[ViewMetrics]]:
    """Say of each running run whether its process is gone."""
    found = list(found)
    lost, ended = yield from lost_and_ended(
        ledger, {run.id: recorded[each.view][1] for each in found for run in each.running}
    )
    return [
        replace(
            each,
            running=tuple(replace(run, lost=run.id in lost) for run in each.running if run.id not in ended),
        )
        for each in found
    ]


def lost_and_ended(ledger: Ledger, running: Mapping[int, ResolvedName]) -> Work[tuple[set[int], set[int]]]:
    """Return which of the runs that said ``running`` have lost their process, and which have ended meanwhile.

    :param running: the views of the runs by the runs' ids.
    """
    if not running:
        return set(), set()
    free = yield from fetch_all(
        sql.SQL("SELECT given.id FROM unnest(%s::bigint[], %s::text[]) AS given (id, lock) WHERE NOT {}").format(
            lock_is_held(sql.SQL("given.lock"))
        ),
        (list(running), [lock_name(view) for view in running.values()]),
        Session.RECORD,
    )
    # By a statement of its own, whose snapshot is newer: a run that ended meanwhile does not say `running` in it, since
    # a lock is released after what was done under it can be seen.
    still = yield from fetch_all(
        sql.SQL("SELECT id FROM {} WHERE id = ANY(%s) AND status = %s").format(ledger.table("mat_view_runs")),
        ([row["id"] for row in free], RunStatus.RUNNING),
        Session.RECORD,
    )
    lost = {row["id"] for row in still}
    return lost, {row["id"] for row in free} - lost
