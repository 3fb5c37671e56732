"""What the operations that run now are doing, seen from outside: by whoever has only the record and the locks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from statistics import median

import psycopg
from psycopg import sql

from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.instructions import Command, Session, Work, fetch_all, fetch_one
from airflow_provider_matviews.services.ledger import Ledger, Operation, RunStatus
from airflow_provider_matviews.services.locking import lock_holder, lock_name
from airflow_provider_matviews.services.progress import Progress
from airflow_provider_matviews.services.response import Report, Step
from airflow_provider_matviews.services.strategies.auto import PastRefresh

#: So many are looked at, the longest first: each costs a few round trips.
MOST_LOOKED_AT = 20

# Of a view that is built anew the index is not yet in anybody else's catalog.
_STEP = sql.SQL(
    """
    SELECT a.pid AS analyzing, v.pid AS vacuuming,
           CASE WHEN p.pid IS NOT NULL THEN coalesce(
               (SELECT c.relname::text FROM pg_catalog.pg_class c WHERE c.oid = p.index_relid), 'not named yet')
           END AS index
    FROM (SELECT %(pid)s::integer AS pid) one
    LEFT JOIN pg_catalog.pg_stat_progress_create_index p ON p.pid = one.pid
    LEFT JOIN pg_catalog.pg_stat_progress_analyze a ON a.pid = one.pid
    LEFT JOIN pg_catalog.pg_stat_progress_vacuum v ON v.pid = one.pid
    """
)


@dataclass(frozen=True)
class UnderWay:
    """An operation that runs now.

    :ivar run_id: its row.
    :ivar pid: of the server process that does it.
    :ivar seconds: for which it has run, waits for others included.
    :ivar usual_seconds: how long the view's latest refreshes took, the median; None for another operation, or before
        the first.
    :ivar said: what it is doing, in a sentence for a person; None where that cannot be seen.
    """

    run_id: int
    view: ResolvedName
    operation: str
    started_at: datetime
    pid: int
    seconds: float
    usual_seconds: float | None
    said: str | None


@dataclass(frozen=True)
class _Running:
    run_id: int
    view: ResolvedName
    operation: Operation
    started_at: datetime
    seconds: float


def running_now(ledger: Ledger) -> Work[list[tuple[_Running, int, list[PastRefresh]]]]:
    """Return what runs, the server process that does it, and the view's latest refreshes; by the record's connection.

    What says ``running`` while nobody holds its view's lock is lost, or has just ended: it is left out.

    :raises psycopg.errors.UndefinedTable: when there are no run tables yet.
    """
    rows = yield from fetch_all(
        sql.SQL(
            """
            SELECT r.id, d.id AS definition_id, d.schema_name, d.view_name, d.name, r.operation, r.started_at,
                   greatest(0, extract(epoch FROM clock_timestamp() - r.started_at))::double precision AS seconds
            FROM (SELECT id, mat_view_definition_id, operation, coalesce(started_at, created_at) AS started_at
                  FROM {} WHERE status = {}) r JOIN {} d ON d.id = r.mat_view_definition_id
            ORDER BY r.started_at LIMIT {}
            """
        ).format(
            ledger.table("mat_view_runs"),
            sql.Literal(int(RunStatus.RUNNING)),
            ledger.table("mat_view_definitions"),
            sql.Literal(MOST_LOOKED_AT),
        ),
        (),
        Session.RECORD,
    )
    found = []
    for row in rows:
        view = ResolvedName(row["schema_name"], row["view_name"], row["name"])
        holder = yield from fetch_one(
            sql.SQL("SELECT {} AS pid").format(lock_holder(sql.SQL("%s"))), (lock_name(view),), Session.RECORD
        )
        if holder is None or holder["pid"] is None:
            continue
        operation = Operation(row["operation"])
        past = (yield from ledger.past_refreshes(row["definition_id"])) if operation is Operation.REFRESH else []
        running = _Running(row["id"], view, operation, row["started_at"], row["seconds"])
        found.append((running, holder["pid"], past))
    return found


def look_at(running: _Running, pid: int, past: list[PastRefresh]) -> Work[UnderWay]:
    """Look at one of them, by the connection of a transaction of its own; what cannot be seen is passed over."""
    said = None
    yield Command(sql.SQL("SAVEPOINT look"))
    try:
        said = yield from _said(running, pid, past)
    except psycopg.Error:
        # It may be that the role may not; and who waits at a screen is told the rest all the same.
        yield Command(sql.SQL("ROLLBACK TO SAVEPOINT look"))
    return UnderWay(
        running.run_id,
        running.view,
        running.operation.word,
        running.started_at,
        pid,
        running.seconds,
        median(each.duration_ms for each in past) / 1000 if past else None,
        said,
    )


def _said(running: _Running, pid: int, past: list[PastRefresh]) -> Work[str | None]:
    step = yield from fetch_one(_STEP, {"pid": pid})
    assert step is not None
    report = Report.on(running.view.display, {})
    now = report.clock()
    # Which strategy it is by is only recorded at its end; most often it is that of the last time.
    report.told(strategy=past[0].strategy if past else None)
    if step["index"]:
        report.current = Step(f"index {step['index']}", now)
    elif step["analyzing"] or step["vacuuming"]:
        report.current = Step("analyze" if step["analyzing"] else "vacuum", now)
    elif running.operation is Operation.REFRESH:
        report.current = Step("refresh", now)

    def history() -> Work[list[PastRefresh]]:
        yield from ()
        return past

    progress = Progress(
        running.view, running.operation, pid, report, now - running.seconds, history, now - running.seconds
    )
    return (yield from progress.line())
