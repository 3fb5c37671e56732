"""What a screen shows of the record: single statements, read only, each with a limit on its rows and its time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import psycopg
from psycopg import sql

from airflow_provider_matviews.services.instructions import Command, Session, Work, fetch_one
from airflow_provider_matviews.services.ledger import Ledger, Run

_T = TypeVar("_T")


@dataclass(frozen=True)
class RunPage:
    """One run, among the others of its view.

    :ivar previous_id: the run before it; None where it is the first that is left.
    :ivar next_id: the run after it; None where it is the last.
    """

    run: Run
    previous_id: int | None
    next_id: int | None


def read_only(work: Work[_T], seconds: float) -> Work[_T]:
    """Do something in one transaction that may change nothing, and none of whose statements takes long.

    In a transaction, because behind a pooler what a session is told would stay there for others.

    :param work: that uses the record's connection only.
    :param seconds: that a statement of it may take, or wait for a lock.
    :raises psycopg.errors.QueryCanceled: when one took longer.
    """
    yield Command(sql.SQL("BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY"), Session.RECORD)
    try:
        for setting in ("statement_timeout", "lock_timeout"):
            limit = sql.Literal(f"{round(seconds * 1000)}ms")
            yield Command(sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(setting), limit), Session.RECORD)
        return (yield from work)
    finally:
        # A connection that is lost has nothing left to end.
        with suppress(psycopg.Error):
            yield Command(sql.SQL("ROLLBACK"), Session.RECORD, undoing=True)


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
            SELECT (SELECT n.id FROM {runs} n WHERE n.mat_view_definition_id = r.mat_view_definition_id
                      AND (n.created_at, n.id) < (r.created_at, r.id)
                    ORDER BY n.created_at DESC, n.id DESC LIMIT 1) AS previous,
                   (SELECT n.id FROM {runs} n WHERE n.mat_view_definition_id = r.mat_view_definition_id
                      AND (n.created_at, n.id) > (r.created_at, r.id)
                    ORDER BY n.created_at, n.id LIMIT 1) AS next
            FROM {runs} r WHERE r.id = %s
            """
        ).format(runs=ledger.table("mat_view_runs")),
        (run_id,),
        Session.RECORD,
    )
    beside = row or {}
    return RunPage(run, beside.get("previous"), beside.get("next"))
