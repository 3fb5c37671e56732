"""What one can ask of the record from Airflow: runs and definitions, and its upkeep. No SQL of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, TypeVar

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.hooks.server import ServerHook
from airflow_provider_matviews.names import ViewName, check_identifier
from airflow_provider_matviews.retention import EVERY_VIEW, RetentionPolicy
from airflow_provider_matviews.rules import AlertRules
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.alerts import Checkup, RuleBook, check_views
from airflow_provider_matviews.services.browsing import (
    CatalogPage,
    Choice,
    ask_record,
    catalog_page,
    declared_definition,
    read_only,
    recorded,
    under_way,
    view_choice,
)
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Session, Work
from airflow_provider_matviews.services.ledger import DefinitionRecord, Ledger, Run
from airflow_provider_matviews.services.metrics import ViewMetrics, read_metrics
from airflow_provider_matviews.services.migrations import ensure_schema, explained
from airflow_provider_matviews.services.pg_cron import CronImport, import_runs
from airflow_provider_matviews.services.plan_steps import Plan
from airflow_provider_matviews.services.reap import reap_runs
from airflow_provider_matviews.services.retention import PruneResponse, Pruning, prune_runs
from airflow_provider_matviews.services.selection import Selection
from airflow_provider_matviews.services.underway import UnderWay
from airflow_provider_matviews.timeouts import Timeouts

_T = TypeVar("_T")


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

    def recorded_run(self, run_id: int) -> Run | None:
        """Return one run by its id, or None. (``run`` is what every hook of Airflow's runs SQL with.)"""

        return self._read(recorded(self._ledger, lambda ledger: ledger.run(run_id)))

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

    def browse(self, question: Callable[[Ledger], Work[_T | None]], *, seconds: float = 5.0) -> _T | None:
        """Ask the record something for somebody who waits at a screen. Nothing is changed, not even tables made.

        :param question: of ``services/browsing.py``.
        :param seconds: that one statement may take.
        :returns: None where there is nothing of the kind, or no run tables yet.
        :raises MissingPrivilege: when the role may not read the run tables.
        :raises psycopg.errors.QueryCanceled: when a statement took longer.
        """
        return self._read(ask_record(self._ledger, question, seconds))

    def browse_catalog(self, schema_name: str, view_name: str, *, seconds: float = 5.0) -> CatalogPage | None:
        """Read what the catalogs say of a view, as :meth:`browse` reads the record; None where it does not stand."""
        return self._read(read_only(catalog_page(schema_name, view_name), seconds, Session.WORK))

    def browse_choice(self, schema_name: str, view_name: str, *, seconds: float = 5.0) -> Choice | None:
        """Say what ``auto`` would choose for a view now, and why, as :meth:`browse` does; None where none stands.

        :raises NotAMaterializedView: when something else stands under its name.
        """
        return self._read(view_choice(self._ledger, schema_name, view_name, seconds))

    def under_way(self, *, seconds: float = 5.0) -> list[UnderWay]:
        """Say what runs now, and how far it is, as :meth:`browse` does. Nothing of it is waited for."""
        return self._read(under_way(self._ledger, seconds))

    def browse_plan(self, schema_name: str, view_name: str, *, seconds: float = 5.0) -> Plan | None:
        """Compare a view with what it was last declared to be, as ``plan()`` does.

        :param seconds: that one statement may take, or wait for a lock; twice that in all.
        :returns: None for a view that was never declared.
        :raises MatViewError: when the definition can be compared no more.
        :raises psycopg.Error: what PostgreSQL says of the definition.
        """
        view = ResolvedName(schema_name, view_name, view_name)
        definition = self.browse(lambda ledger: declared_definition(ledger, view), seconds=seconds)
        if definition is None:
            return None
        # What the definition allows itself is no measure for who waits at a screen.
        definition = replace(definition, timeouts={}, session_settings={})
        limits = Timeouts(statement_timeout=seconds, lock_timeout=seconds, max_wait=seconds, timeout=2 * seconds)
        return self._read(self._operations.plan(definition, timeouts=limits))

    def declared_definition(self, view: str) -> MatViewDefinition:
        """Return what a view was last declared to be, by an operator, the hook or the command line.

        :param view: its name.
        :raises InvalidDefinition: when it was never declared; or by a version that knew other arguments.
        """
        name = ViewName.parse(view)

        def read() -> Work[MatViewDefinition | None]:
            resolved = yield from catalog.resolve(name, session=Session.RECORD)
            return (yield from declared_definition(self._ledger, resolved))

        found = self._read(recorded(self._ledger, lambda _: read()))
        if found is None:
            raise InvalidDefinition(
                f"{name} was never declared, so there is no definition of it to go by.",
                hint="create it from a definition, or adopt it (airflow matviews adopt) and create it from that.",
            )
        return found

    def metrics(
        self,
        views: Sequence[str] = ("*.*",),
        *,
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        window: int = 20,
    ) -> list[ViewMetrics]:
        """Read how views fare: latest run, age, failures, durations, row counts and bloat, of all of them at once.

        What it costs does not grow with the history (see ``services/metrics.py``).

        :param views: names as one would type them, or patterns with ``*``, ``?`` and ``[...]`` over ``schema.name``.
            Patterns mean the views that are on record; a name may also be of one that stands and is not.
        :param schemas: exact names of schemas, all views of which are meant.
        :param exclude: names and patterns of views that are not meant after all.
        :param window: how many successful refreshes to look at, beside the latest.
        :returns: the metrics, by name; without views that were dropped.
        :raises ViewNotFound: when a name is of a view that neither stands nor is on record, or that was dropped.
        :raises InvalidDefinition: when an argument is nothing of that.
        :raises MissingPrivilege: when the role may not use the run tables.
        """
        selection = Selection(views, schemas, exclude)
        window = AlertRules(window=window, min_samples=1).window
        return self._read(read_metrics(self._ledger, selection, window=window))

    def check(
        self,
        views: Sequence[str] = ("*.*",),
        *,
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        **rules: Any,
    ) -> Checkup:
        """Say which rules views break.

        :param views: as of :meth:`metrics`.
        :param schemas: as of :meth:`metrics`.
        :param exclude: as of :meth:`metrics`.
        :param overrides: name or pattern -> what is different for those views; the later go before.
        :param rules: those of :class:`AlertRules`.
        :raises ViewNotFound: as of :meth:`metrics`.
        :raises InvalidDefinition: when a rule is not what it should be.
        :raises MissingPrivilege: when the role may not use the run tables.
        """
        return self._run(self._checkup(views, schemas, exclude, overrides, rules))

    async def acheck(self, views: Sequence[str] = ("*.*",), **arguments: Any) -> Checkup:
        """Do as :meth:`check` does, on an asynchronous connection, for a triggerer."""
        rules = dict(arguments)
        schemas, exclude, overrides = rules.pop("schemas", ()), rules.pop("exclude", ()), rules.pop("overrides", None)
        return await self._arun(lambda: self._checkup(views, schemas, exclude, overrides, rules))

    def _checkup(
        self,
        views: Sequence[str],
        schemas: Sequence[str],
        exclude: Sequence[str],
        overrides: Mapping[str, Mapping[str, Any]] | None,
        rules: Mapping[str, Any],
    ) -> Work[Checkup]:
        book = RuleBook(AlertRules.of(rules), {} if overrides is None else overrides)
        work = check_views(self._ledger, Selection(views, schemas, exclude), book)
        return explained(self.tracking_schema, work)

    def reap(self) -> list[int]:
        """Mark every run that says ``running`` and is not as failed (``RunLost``).

        The next operation on a view does it by itself; this is for views on which there is none. A live run is never
        taken for a lost one: its view's lock is held, which any role can test.

        :returns: the ids of the runs that were marked.
        :raises MissingPrivilege: when the role may not use the run tables.
        """
        return self._read(reap_runs(self._ledger))

    def prune(
        self,
        policy: RetentionPolicy | None = None,
        *,
        views: Sequence[str] = EVERY_VIEW,
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        dry_run: bool = False,
        batch_size: int = 5000,
        pause: float = 0.05,
        vacuum: bool = False,
        **limits: Any,
    ) -> PruneResponse:
        """Delete the runs that retention does not keep, in short transactions that nobody waits for.

        Runs that ended without a word are marked first, and the change log is pruned too; neither in a dry run. Safe
        beside operations, and beside another prune.

        :param policy: what is kept; None for what ``limits`` say.
        :param views: names as one would type them, or patterns with ``*``, ``?`` and ``[...]`` over ``schema.name``, of
            views on record, whether they stand or were dropped. All of them unless this or ``schemas`` is given; an
            empty list of both is refused, so that what came out empty does not mean everybody. What a view's
            definition declares itself goes before ``policy`` and ``limits``.
        :param schemas: exact names of schemas, all views of which are meant; without ``views``, these alone.
        :param exclude: names and patterns of views that are not meant after all.
        :param dry_run: only count what would go.
        :param batch_size: runs that one transaction deletes at the most.
        :param pause: seconds between two of them.
        :param vacuum: VACUUM the run table after something was deleted, which its owner may, the database's, and from
            PostgreSQL 17 on who has MAINTAIN (https://www.postgresql.org/docs/current/sql-vacuum.html); a warning says
            where it was passed over. Without it autovacuum does.
        :param limits: the arguments of :class:`RetentionPolicy`; ``keep_successes`` is 500 unless it is given, None for
            all.
        :raises InvalidDefinition: when an argument cannot be what it should be.
        :raises ViewNotFound: when a name is of a view that is not on record.
        :raises MissingPrivilege: when the role may not use the run tables; the hint is the GRANT.
        :raises MatViewError: when somebody keeps a lock on the run table, four attempts of 1 s; it says who.
        :raises OperationCancelled: when it was stopped by :meth:`cancel`; what was deleted until then stays deleted.
        """
        if policy is not None and limits:
            raise InvalidDefinition(f"Give either a policy or {', '.join(sorted(limits))}, not both.")
        pruning = Pruning(
            RetentionPolicy.of({"keep_successes": 500, **limits} if policy is None else policy),
            Selection(() if views is EVERY_VIEW and schemas != () else views, schemas, exclude),
            dry_run,
            batch_size,
            pause,
            vacuum,
            self.longest,
        )
        return self._run(explained(self.tracking_schema, prune_runs(self._ledger, pruning)))

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
