"""Reap: end the runs that nobody ended, because their process was killed."""

from __future__ import annotations

from psycopg import sql

from airflow_provider_matviews.services.instructions import Note, Work
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.locking import lock_is_held, lock_name
from airflow_provider_matviews.services.migrations import ensure_schema


def reap_runs(ledger: Ledger) -> Work[list[int]]:
    """Mark every run that says ``running`` and is not as failed (``RunLost``); return their ids.

    A run's row is inserted while its view's lock is held, and that lock is held until the row has its end. So where the
    lock is free after a row was seen to say ``running``, its process has ended, or has lost the connection that
    mattered. Every role can see whether an advisory lock is held; none has to be taken for it, and nobody stands back
    before us.

    :raises MissingPrivilege: when the role may not use the run tables.
    """
    yield from ensure_schema(ledger.tracking_schema)
    reaped: list[int] = []
    for run_id, view in (yield from ledger.running()):
        if (yield from ledger.lose(run_id, lock_is_held(sql.SQL("%(lock)s")), lock_name(view))):
            reaped.append(run_id)
            yield Note(f"Run {run_id} of {view.display} had ended without a word: marked as failed (RunLost).")
    return reaped
