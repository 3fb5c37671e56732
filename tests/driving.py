"""Recorded operations without Airflow, run by drivers that let a test act between two statements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg

from airflow_provider_matviews.definition import RefreshStrategy, RowCountStrategy
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Command, Instruction, Result, Work
from airflow_provider_matviews.services.ledger import Ledger, Operation
from airflow_provider_matviews.services.locking import Patience
from airflow_provider_matviews.services.refresh import refresh_view
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.services.run import Prepared, Subject, Terms, record_run
from airflow_provider_matviews.timeouts import Timeouts
from tests.conftest import Database


class InterruptedDriver(Driver):
    """Calls ``before(text)`` and ``after(text)`` around every command."""

    def __init__(
        self,
        connect: Callable[[], psycopg.Connection[Any]],
        before: Callable[[str], None] = lambda text: None,
        after: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__(connect)
        self.before, self.after = before, after

    def _perform(self, instruction: Instruction) -> Result:
        text = instruction.text if isinstance(instruction, Command) else None
        if text is not None:
            self.before(text)
        result = super()._perform(instruction)
        if text is not None:
            self.after(text)
        return result


def refreshing(view: str, strategy: RefreshStrategy, patience: Patience | None = None) -> Work[ServiceResponse]:
    """Return a recorded refresh, to be run by a driver."""
    ledger = Ledger("matviews")

    def service(prepared: Prepared) -> Work[ServiceResponse]:
        return refresh_view(
            prepared.view,
            prepared.server,
            prepared.report,
            strategy=strategy,
            row_counts=RowCountStrategy.EXACT,
            patience=prepared.patience,
            history=lambda: ledger.past_refreshes(prepared.record.id),
        )

    timeouts = (
        Timeouts() if patience is None else Timeouts(lock_timeout=patience.lock_timeout, max_wait=patience.max_wait)
    )
    terms = Terms(timeouts=timeouts)
    return record_run(Operation.REFRESH, Subject(ViewName.parse(view)), ledger, terms, service)


def connecting(database: Database) -> Callable[[], psycopg.Connection[Any]]:
    """Return what a driver opens its connections with."""
    return lambda: psycopg.connect(database.dsn())
