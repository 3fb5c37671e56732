"""What one can ask of the record from Airflow: runs and definitions, and its upkeep. No SQL of its own."""

from __future__ import annotations

from copy import copy

from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.hooks.server import ServerHook
from airflow_provider_matviews.names import ViewName, check_identifier
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Session, Work
from airflow_provider_matviews.services.ledger import DefinitionRecord, Run
from airflow_provider_matviews.services.migrations import ensure_schema
from airflow_provider_matviews.services.pg_cron import CronImport, import_runs
from airflow_provider_matviews.services.reap import reap_runs


class RecordHook(ServerHook):
    """Read the record of a database's materialized views, and keep it in order.

    Its arguments are described where people make one, in ``matview.py``.
    """

    def runs(self, view: str | None = None, *, limit: int = 20) -> list[Run]:
        """Return the latest runs, newest first.

        :param view: of this view; None for all.
        :param limit: how many at the most.
        :raises InvalidDefinition: when ``limit`` is not a positive number.
        """
        _check_limit(limit)
        name = None if view is None else ViewName.parse(view)
        ledger = self._ledger

        def read() -> Work[list[Run]]:
            yield from ensure_schema(self.tracking_schema)
            resolved = None if name is None else (yield from catalog.resolve(name, session=Session.RECORD))
            return (yield from ledger.runs(resolved, limit))

        return self._read(read())

    def last_run(self, view: str) -> Run | None:
        """Return the latest run of a view, or None before its first."""
        runs = self.runs(view, limit=1)
        return runs[0] if runs else None

    def definitions(self) -> list[DefinitionRecord]:
        """Return every recorded definition, by name."""

        def read() -> Work[list[DefinitionRecord]]:
            yield from ensure_schema(self.tracking_schema)
            return (yield from self._ledger.definitions())

        return self._read(read())

    def reap(self) -> list[int]:
        """Mark every run that says ``running`` and is not as failed (``RunLost``).

        The next operation on a view does it by itself; this is for views on which there is none. A live run is never
        taken for a lost one: its view's lock is held, which any role can test.

        :returns: the ids of the runs that were marked.
        :raises MissingPrivilege: when the role may not use the run tables.
        """
        return self._read(reap_runs(self._ledger))

    def import_cron_runs(self, *, cron_database: str | None = None, limit: int | None = None) -> CronImport:
        """Write what pg_cron's jobs did to known views into the record, and warn of views that are scheduled twice.

        Only runs that have ended and are not there yet, so that it can be repeated at any time, by many at once. Known
        are the views that stand or are recorded; one that is not recorded yet gets a definition with
        ``managed=False``.

        :param cron_database: the database that pg_cron's tables are in, which is what ``cron.database_name`` says,
            on the same server; None for that of the views.
        :param limit: how many of pg_cron's rows to read at the most; None for all that are new.
        :returns: how many runs of which view were written, the warnings, which are logged too, and whether ``limit``
            left some for next time.
        :raises UnsupportedServer: when pg_cron is not installed there, or too old to record its runs.
        :raises MissingPrivilege: when the role may not read its tables, or use the run tables; the hint is the GRANT.
        :raises InvalidName: when ``cron_database`` is no identifier.
        :raises InvalidDefinition: when ``limit`` is not a positive number.
        """
        if limit is not None:
            _check_limit(limit)
        open_theirs = self._open
        if cron_database is not None:
            beside = copy(self)
            beside.database = check_identifier(cron_database, "cron_database")
            open_theirs = beside._open
        ledger = self._ledger
        with (
            Driver(self._open, self.log, redact=ledger.redact) as here,
            Driver(open_theirs, self.log, redact=ledger.redact) as there,
            self._known(here),
            self._known(there),
        ):
            return import_runs(ledger, here.run, there.run, limit=limit)


def _check_limit(limit: object) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise InvalidDefinition(f"limit={limit!r} is not a positive number of runs.")
