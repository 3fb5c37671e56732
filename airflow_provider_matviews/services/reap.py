"""Reap: end the runs that nobody ended, because their process was killed."""

from __future__ import annotations

from psycopg import sql

from airflow_provider_matviews.services.instructions import Command, Note, Work, fetch_one
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.services.migrations import ensure_schema


def reap_runs(ledger: Ledger) -> Work[list[int]]:
    """Mark every run that says ``running`` and is not as failed (``RunLost``); return their ids.

    A run lives as long as its view's lock is held, which every role can test: no need to see other users' activity.
    So whoever gets the lock holds the proof, and keeps it until the mark is made.

    :raises MissingPrivilege: when the role may not use the run tables.
    """
    yield from ensure_schema(ledger.tracking_schema)
    reaped: list[int] = []
    for definition_id, view in (yield from ledger.views_with_running()):
        yield Command(sql.SQL("BEGIN"))
        row = yield from fetch_one(sql.SQL("SELECT pg_try_advisory_xact_lock({}) AS taken").format(lock_key(view)))
        if row is not None and row["taken"]:
            lost = yield from ledger.lose(definition_id)
            reaped += lost
            for run_id in lost:
                yield Note(f"Run {run_id} of {view.display} had ended without a word: marked as failed (RunLost).")
        yield Command(sql.SQL("ROLLBACK"))
    return reaped
