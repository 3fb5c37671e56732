"""What one can ask of materialized views from Airflow, handed to the service layer. No SQL of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from airflow_provider_matviews import stats
from airflow_provider_matviews.definition import (
    IfLocked,
    MatViewDefinition,
    OnDrift,
    ParameterValue,
    RefreshStrategy,
    RowCountStrategy,
    check_flag,
)
from airflow_provider_matviews.exceptions import FleetFailed, MatViewError, ViewNotFound
from airflow_provider_matviews.hooks.change_log import ChangeLogHook
from airflow_provider_matviews.hooks.fleet import FleetRun, had_no_room
from airflow_provider_matviews.hooks.verify import VerificationRun
from airflow_provider_matviews.names import ViewName, check_identifier
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.adopt import Adopted, read_definition, read_definitions, write_definitions
from airflow_provider_matviews.services.attachments import Attachment, attachments_of
from airflow_provider_matviews.services.catalog import IndexFacts
from airflow_provider_matviews.services.fleet import FleetResponse
from airflow_provider_matviews.services.graph import Graph, read_graph
from airflow_provider_matviews.services.instructions import Session, Work
from airflow_provider_matviews.services.ledger import DefinitionRecord, Run
from airflow_provider_matviews.services.migrations import ensure_schema
from airflow_provider_matviews.services.observing import Ended, ObservedOperations
from airflow_provider_matviews.services.plan_steps import Plan
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.services.run import Subject
from airflow_provider_matviews.services.staleness import Judgement, judge_views
from airflow_provider_matviews.services.verification import (
    Timing,
    Verification,
    VerificationReport,
    VerifyMode,
    check_rounds,
)
from airflow_provider_matviews.timeouts import Timeouts

_T = TypeVar("_T")


@dataclass(frozen=True)
class ViewDescription:
    """A materialized view as it stands, beside what is recorded of it.

    :ivar name: the view, as one would type it.
    :ivar query: its query, as PostgreSQL words it.
    :ivar populated: whether it answers queries.
    :ivar estimated_rows: the planner's estimate; None where it has none.
    :ivar columns: names and types, in order.
    :ivar indexes: its indexes, by name.
    :ivar dependents: what is built on it.
    :ivar sources: the relations that its query reads directly.
    :ivar attachments: everything else it has: grants, comments, options ...
    :ivar definition: its row in ``mat_view_definitions``; None where it was never declared or tracked.
    :ivar last_run: its latest run; None before the first.
    """

    name: str
    owner: str
    query: str
    populated: bool
    estimated_rows: int | None
    columns: tuple[tuple[str, str], ...]
    indexes: tuple[IndexFacts, ...]
    dependents: tuple[str, ...]
    sources: tuple[str, ...]
    attachments: tuple[Attachment, ...]
    definition: DefinitionRecord | None
    last_run: Run | None


class MatViewHook(ChangeLogHook):
    """Create, refresh and drop materialized views over a PostgreSQL connection, and read the record.

    Everything that PostgresHook makes of a connection holds here too: extras, IAM, ``options``, ``database``.

    :param postgres_conn_id: the connection to the database that holds the views.
    :param tracking_schema: the schema, in that database, of the run tables; made on first use.
    :param context: what is recorded of whose task it is; operators give dag_id, task_id, run_id, map_index
        and try_number.
    :param longest: seconds that any operation may take in all, whatever its ``timeout`` says; operators give what
        ``execution_timeout`` leaves.
    :param given: seconds of which ``longest`` is what is left, for the story; None for all.
    :raises InvalidName: when ``tracking_schema`` is no identifier.
    :raises InvalidDefinition: when ``context`` holds anything else than that.
    """

    hook_name = "PostgreSQL materialized views"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Whether to read what the views are made of; said by who tells OpenLineage of it, before the first operation.
        self.wants_lineage = False
        #: How each operation has ended, where that is wanted.
        self.ended: list[Ended] = []

    def create(
        self,
        definition: MatViewDefinition,
        *,
        force: bool = False,
        with_data: bool = True,
        on_drift: OnDrift | str = OnDrift.APPLY,
        exclusive: bool | None = None,
        row_count_strategy: RowCountStrategy | str = RowCountStrategy.ESTIMATED,
        session_settings: Mapping[str, ParameterValue] | None = None,
        if_locked: IfLocked | str = IfLocked.WAIT,
        lock_timeout: float | None = None,
        max_wait: float | None = None,
        statement_timeout: float | None = None,
        timeout: float | None = None,
        dry_run: bool = False,
    ) -> ServiceResponse:
        """Create a view as its definition says, or make one that stands what it says.

        What a view that stands has and its definition does not mention is left alone. A changed query is applied by
        building a new view beside the one that stands, and one short cut: readers and what is built on it go on.

        :param definition: what the view should be.
        :param force: build a view that stands anew, even where nothing differs.
        :param with_data: False makes it without rows.
        :param on_drift: where a view stands that is not what its definition says: ``apply`` makes it so, ``fail``
            raises, ``report`` says what differs and leaves it, ``ignore`` does not look.
        :param exclusive: whether it should have nothing that is not declared; None for what the definition says.
        :param row_count_strategy: ``none``, ``estimated`` or ``exact``.
        :param session_settings: PostgreSQL settings for this operation, before those of the definition.
        :param if_locked: what to do while another operation on the view runs: ``wait``, ``skip`` or ``fail``.
        :param lock_timeout: seconds for which readers may queue behind one attempt to lock; None for what the
            definition says, which is 1 where it says nothing.
        :param max_wait: seconds after which waiting for locks ends in failure; None likewise, and 600.
        :param statement_timeout: seconds that one statement may take; None likewise, and the server's setting.
        :param timeout: seconds after which the whole operation is stopped on the server; None likewise, and never.
        :param dry_run: only find out what would be done: the response's ``sql`` and ``locks``, which are logged;
            nothing is changed, and no run is recorded.
        :returns: the response: ``created``, ``updated`` (changed), or ``skipped`` (nothing to do). ``plan`` in it tells
            what differed.
        :raises DriftFound: with ``on_drift="fail"``.
        :raises MatViewError: one of ``exceptions.py``, when it cannot be done as asked.
        :raises psycopg.Error: what PostgreSQL says.
        """
        return self._run(
            self._operations.create(
                definition,
                force=force,
                with_data=with_data,
                on_drift=on_drift,
                exclusive=exclusive,
                dry_run=dry_run,
                row_count_strategy=row_count_strategy,
                session_settings=session_settings,
                if_locked=if_locked,
                timeouts=Timeouts(
                    lock_timeout=lock_timeout,
                    max_wait=max_wait,
                    statement_timeout=statement_timeout,
                    timeout=timeout,
                ),
            )
        )

    def refresh(
        self,
        view_or_definition: str | MatViewDefinition,
        *,
        refresh_strategy: RefreshStrategy | str | None = None,
        row_count_strategy: RowCountStrategy | str = RowCountStrategy.ESTIMATED,
        max_bloat: float = 1.5,
        analyze: bool | None = None,
        vacuum: bool = False,
        skip_unchanged: bool = False,
        max_staleness: float | None = None,
        ignore_windows: bool = False,
        session_settings: Mapping[str, ParameterValue] | None = None,
        if_locked: IfLocked | str = IfLocked.WAIT,
        lock_timeout: float | None = None,
        max_wait: float | None = None,
        statement_timeout: float | None = None,
        timeout: float | None = None,
        dry_run: bool = False,
    ) -> ServiceResponse:
        """Refresh a view, declared or not.

        :param view_or_definition: the view's name or its definition.
        :param refresh_strategy: None for the one that was declared, which is ``auto`` where nothing was.
        :param row_count_strategy: ``none``, ``estimated`` or ``exact``.
        :param max_bloat: ``auto`` rebuilds when a row takes so many times the room it took after the last rebuild.
        :param analyze: whether the planner's statistics are renewed; None leaves it to the strategy.
        :param vacuum: VACUUM after COMMIT, which lets index-only scans skip the heap.
        :param skip_unchanged: leave it alone where nothing that it reads has changed since its last refresh by us. A
            change may be seen late, mostly within 10 s of its COMMIT (see ``services/staleness.py``), by the next
            refresh then. Refreshed all the same are views
            whose result may move by itself: the clock, random values, foreign tables, functions that cannot be seen
            into.
        :param max_staleness: seconds after which such a view is refreshed; until then it is left alone, too.
        :param ignore_windows: pass over its windows and its minimum interval.
        :param session_settings: PostgreSQL settings for this operation, before those of the definition.
        :param if_locked: what to do while another operation on the view runs: ``wait``, ``skip`` or ``fail``.
        :param lock_timeout: seconds for which readers may queue behind one attempt to lock; None for what the
            definition says, which is 1 where it says nothing.
        :param max_wait: seconds after which waiting for locks ends in failure; None likewise, and 600.
        :param statement_timeout: seconds that one statement may take; None likewise, and the server's setting.
        :param timeout: seconds after which the whole operation is stopped on the server; None likewise, and never.
        :param dry_run: only find out what would be done: the response's ``sql`` and ``locks``, which are logged;
            nothing is changed, and no run is recorded.
        :returns: the response: ``updated``; ``skipped`` with ``if_locked="skip"``, with ``skip_unchanged``, and outside
            of its windows.
        :raises MatViewError: one of ``exceptions.py``, when it cannot be done as asked.
        :raises psycopg.Error: what PostgreSQL says.
        """
        return self._run(
            self._operations.refresh(
                view_or_definition,
                dry_run=dry_run,
                refresh_strategy=refresh_strategy,
                row_count_strategy=row_count_strategy,
                max_bloat=max_bloat,
                analyze=analyze,
                vacuum=vacuum,
                skip_unchanged=skip_unchanged,
                max_staleness=max_staleness,
                ignore_windows=ignore_windows,
                session_settings=session_settings,
                if_locked=if_locked,
                timeouts=Timeouts(
                    lock_timeout=lock_timeout,
                    max_wait=max_wait,
                    statement_timeout=statement_timeout,
                    timeout=timeout,
                ),
            )
        )

    def delete(
        self,
        view_or_definition: str | MatViewDefinition,
        *,
        cascade: bool = False,
        force: bool = False,
        if_locked: IfLocked | str = IfLocked.WAIT,
        lock_timeout: float | None = None,
        max_wait: float | None = None,
        statement_timeout: float | None = None,
        timeout: float | None = None,
        dry_run: bool = False,
    ) -> ServiceResponse:
        """Drop a view; ``skipped`` when it does not stand. Its definition row and its history stay.

        :param view_or_definition: the view's name or its definition.
        :param cascade: drop what is built on it too; all of it is named in the log and the response.
        :param force: drop a view that is not managed.
        :param if_locked: what to do while another operation on the view runs: ``wait``, ``skip`` or ``fail``.
        :param lock_timeout: seconds for which readers may queue behind one attempt to lock; None for what the
            definition says, which is 1 where it says nothing.
        :param max_wait: seconds after which waiting for locks ends in failure; None likewise, and 600.
        :param statement_timeout: seconds that one statement may take; None likewise, and the server's setting.
        :param timeout: seconds after which the whole operation is stopped on the server; None likewise, and never.
        :param dry_run: only find out what would be done: the response's ``sql`` and ``locks``, which are logged;
            nothing is changed, and no run is recorded.
        :returns: the response: ``deleted`` or ``skipped``.
        :raises MatViewError: one of ``exceptions.py``, when it cannot be done as asked.
        :raises psycopg.Error: what PostgreSQL says.
        """
        return self._run(
            self._operations.delete(
                view_or_definition,
                dry_run=dry_run,
                cascade=cascade,
                force=force,
                if_locked=if_locked,
                timeouts=Timeouts(
                    lock_timeout=lock_timeout,
                    max_wait=max_wait,
                    statement_timeout=statement_timeout,
                    timeout=timeout,
                ),
            )
        )

    def plan(self, definition: MatViewDefinition, *, exclusive: bool | None = None) -> Plan:
        """Compare a definition with the view that stands, and say what :meth:`create` would do.

        The comparison is the server's own, in a transaction that is rolled back: the definition is made real for a
        moment, empty. The query does not run, nothing is changed, and no run is recorded.

        :param definition: what the view should be.
        :param exclusive: whether it should have nothing that is not declared; None for what the definition says.
        :returns: the steps, each with its SQL, why, and what it locks; ``empty`` where there is nothing to do.
        :raises InvalidDefinition: when the definition cannot be a view.
        :raises NotAMaterializedView: when something else stands under its name.
        :raises MissingPrivilege: when the role has neither CREATE on the view's schema nor TEMP on the database.
        :raises psycopg.Error: what PostgreSQL says of the definition.
        """
        return self._run(self._operations.plan(definition, exclusive=exclusive))

    async def acreate(self, definition: MatViewDefinition, **arguments: Any) -> ServiceResponse:
        """Do as :meth:`create` does, on asynchronous connections.

        For a triggerer: the hook is then built with ``connection=``, which it would otherwise look up blocking.

        :param arguments: those of :meth:`create`, and ``deferral``: what all copies of one deferred operation have
            in common, of which one is carried out.
        """
        return await self._arun(lambda: self._operations.create(definition, **_with_timeouts(arguments)))

    async def arefresh(self, view_or_definition: str | MatViewDefinition, **arguments: Any) -> ServiceResponse:
        """Do as :meth:`refresh` does, on asynchronous connections; see :meth:`acreate`."""
        return await self._arun(lambda: self._operations.refresh(view_or_definition, **_with_timeouts(arguments)))

    def refresh_many(
        self,
        views: Sequence[str] = (),
        *,
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        feeds: bool = False,
        needs: bool = False,
        stale: bool = False,
        at_once: int = 4,
        **arguments: Any,
    ) -> FleetResponse:
        """Refresh several views, each after those that it reads, so many at a time. One run row each.

        One that fails stops what reads it, near and far, and nothing else.

        :param views: names as one would type them, or patterns with ``*``, ``?`` and ``[...]`` over ``schema.name``;
            ``*.*`` is all of the database.
        :param schemas: exact names of schemas, all views of which are meant.
        :param exclude: names and patterns of views that are not meant after all.
        :param feeds: whether everything that reads them is meant too.
        :param needs: whether everything that they read is meant too.
        :param stale: whether of all these only those are meant that are older than what they read, and what reads
            those. The others leave no run row, which ``skip_unchanged`` gives them.
        :param at_once: how many at a time, on connections of their own. Where it is more than one,
            ``max_parallel_workers_per_gather`` is 0 unless the call or the definition says otherwise: with parallel
            queries left on there was no gain (measured on 2 cores).
        :param arguments: those of :meth:`refresh`; ``timeout`` and the others are each view's own.
        :returns: what came of each.
        :raises FleetFailed: when some were not refreshed; ``result`` of it tells what came of all.
        :raises ViewNotFound: when a name stands for no materialized view.
        :raises InvalidDefinition: when an argument is nothing of that, or a view is given by none of them.
        :raises OperationCancelled: when one was cancelled; none is begun then.
        """
        return self._in_a_loop(
            lambda: self.arefresh_many(
                views,
                schemas=schemas,
                exclude=exclude,
                feeds=feeds,
                needs=needs,
                stale=stale,
                at_once=at_once,
                **arguments,
            )
        )

    async def arefresh_many(self, views: Sequence[str] = (), **arguments: Any) -> FleetResponse:
        """Do as :meth:`refresh_many` does, in an event loop; see :meth:`acreate`.

        :param arguments: those of :meth:`refresh_many`, and ``deferral`` as of :meth:`acreate`.
        """
        try:
            response = await FleetRun(self, self.log).run(views, **arguments)
        except FleetFailed as error:
            self._tell_left(error.result, arguments)
            raise
        self._tell_left(response, arguments)
        return response

    @cached_property
    def _operations(self) -> ObservedOperations:
        counted = stats.enabled()
        return ObservedOperations(
            self._ledger,
            self.context,
            self.longest,
            self.given,
            tell=self._tell_end if counted or self.wants_lineage else None,
            wants_lag=counted,
            wants_lineage=self.wants_lineage,
        )

    def _operations_for(self, seconds: float | None) -> ObservedOperations:
        remaining = replace(self._operations, longest=seconds, given=self.given or self.longest)
        return replace(remaining, passes_over=had_no_room)

    @property
    def dataset_place(self) -> tuple[str, str]:
        """The namespace of OpenLineage's datasets of this connection, and the database; empty for that of the role."""
        connection = self.connection
        host = (connection.host or "localhost").lower()
        return f"postgres://{host}:{connection.port or 5432}", self.database or connection.schema or ""

    def _tell_end(self, ended: Ended) -> None:
        if self.wants_lineage:
            self.ended.append(ended)
        if not ended.again:
            self._count(lambda: stats.emit(ended, self.get_conn_id(), self.redact))

    def _tell_left(self, result: FleetResponse | None, arguments: Mapping[str, Any]) -> None:
        if result is not None and not arguments.get("dry_run"):
            self._count(lambda: stats.emit_left(result, self.get_conn_id(), self.redact))

    def _count(self, emit: Callable[[], None]) -> None:
        if not stats.enabled():
            return
        try:
            emit()
        except Exception as error:
            # Whatever a deployment has put there: the operation is what it is.
            self.log.warning("Its metrics could not be sent: %s: %s", type(error).__name__, error)

    def describe(self, view: str) -> ViewDescription:
        """Return what a view is, beside what is recorded of it.

        :raises ViewNotFound: when no materialized view of this name stands.
        """
        name = ViewName.parse(view)
        ledger = self._ledger

        def read() -> Work[ViewDescription]:
            resolved = yield from catalog.resolve(name)
            facts = yield from catalog.require_view(resolved)
            yield from ensure_schema(self.tracking_schema)
            runs = yield from ledger.runs(resolved, 1)
            return ViewDescription(
                name=resolved.display,
                owner=facts.owner,
                query=(yield from catalog.query_of(resolved)) or "",
                populated=facts.populated,
                estimated_rows=facts.estimated_rows,
                columns=tuple((yield from catalog.columns_of(facts.oid))),
                indexes=tuple((yield from catalog.indexes_of(facts.oid))),
                dependents=tuple((yield from catalog.dependents_of(facts.oid))),
                sources=tuple((yield from catalog.sources_of(facts.oid))),
                attachments=tuple((yield from attachments_of(facts.oid))),
                definition=(yield from ledger.definition(resolved)),
                last_run=runs[0] if runs else None,
            )

        return self._read(read())

    def definition_of(self, view: str) -> MatViewDefinition:
        """Write the definition of a view that stands, with everything it has. Nothing is changed or recorded.

        What no definition can say is logged as warnings.

        :param view: its name, as one would type it in SQL.
        :raises ViewNotFound: when no materialized view of this name stands.
        :raises WouldBeLost: when it has something that would make its definition a wrong one.
        """
        name = ViewName.parse(view)

        def read() -> Work[Adopted]:
            return (yield from read_definition((yield from catalog.resolve(name))))

        definition, notes = self._read(read())
        self._warn(definition, notes)
        return definition

    def adopt(
        self, schema: str = "public", *, folder: str | Path | None = None, overwrite: bool = False
    ) -> dict[str, MatViewDefinition]:
        """Write the definitions of all materialized views of a schema. Nothing is changed or recorded.

        :param schema: its exact name.
        :param folder: where to write each into a ``.sql`` file, which ``load_definitions`` reads; None for nowhere.
        :param overwrite: whether to replace files that are there; else none is written.
        :returns: name -> definition, each after those that it depends on.
        :raises InvalidDefinition: when there is no such schema, or a file is in the way.
        :raises WouldBeLost: when a view has something that would make its definition a wrong one.
        :raises OSError: when a file cannot be written.
        """
        check_identifier(schema, "schema name")
        check_flag(overwrite, "overwrite")
        adopted = self._read(read_definitions(schema))
        definitions = {definition.name: definition for definition, _ in adopted}
        for definition, notes in adopted:
            self._warn(definition, notes)
        count = f"{len(definitions)} materialized view{'' if len(definitions) == 1 else 's'}"
        if folder is None:
            self.log.info("Read the definitions of %s in schema %s.", count, schema)
        else:
            files = write_definitions(definitions.values(), folder, overwrite=overwrite)
            for name, file in zip(definitions, files, strict=True):
                self.log.info("%s: %s", name, file)
            self.log.info("Wrote the definitions of %s in schema %s into %s.", count, schema, folder)
        return definitions

    def _warn(self, definition: MatViewDefinition, notes: Sequence[str]) -> None:
        for note in notes:
            self.log.warning("%s: %s.", definition.name, note)

    def judge(self, *views: str, max_staleness: float | None = None) -> list[Judgement]:
        """Say of views whether they are older than what they read, and why. Nothing is refreshed or recorded.

        A change may be seen late, mostly within 10 s of its COMMIT (see ``services/staleness.py``).

        :param views: their names; none for all of the database.
        :param max_staleness: seconds that a view may be old whose result may move by itself; None for not at all.
        :raises ViewNotFound: when a name stands for no materialized view.
        """
        names = [ViewName.parse(view) for view in views]

        def read() -> Work[list[Judgement]]:
            resolved = []
            for name in names:
                resolved.append((yield from catalog.resolve(name, session=Session.RECORD)))
            kept = yield from self._ledger.source_states(resolved or None)
            judgements = yield from judge_views(kept, resolved or None, max_staleness=max_staleness)
            found = {(each.view.schema, each.view.name) for each in judgements}
            for each in resolved:
                if (each.schema, each.name) not in found:
                    raise ViewNotFound(f"No materialized view stands under {each.display}.")
            return judgements

        return self._read(read())

    def verify(
        self,
        view_or_definition: str | MatViewDefinition,
        *,
        mode: VerifyMode | str = VerifyMode.EXACT,
        sample: int = 1000,
        seed: int = 0,
        examples: int = 5,
        session_settings: Mapping[str, ParameterValue] | None = None,
        lock_timeout: float | None = None,
        max_wait: float | None = None,
        statement_timeout: float | None = None,
        timeout: float | None = None,
    ) -> Verification:
        """Compare a view with its query, in one snapshot. Nothing is changed or recorded; only ACCESS SHARE is locked.

        The query runs as the view's owner where the role may become that, as REFRESH runs it; else as the role.

        :param view_or_definition: the view's name; or its definition, with which the view is then compared, too.
        :param mode: ``exact``: all rows, as multisets; ``sampled``: some rows of the view; ``checksum``: whether, not
            where, in little memory.
        :param sample: how many rows ``sampled`` looks at.
        :param seed: which rows; the same seed picks the same ones.
        :param examples: how many differing rows of each kind are told, with their values; 0 for none.
        :param session_settings: PostgreSQL settings for the comparison, before those of the definition: ``work_mem``
            bounds its memory.
        :param lock_timeout: seconds that one attempt waits for a lock; None for 1.
        :param max_wait: seconds after which waiting for locks ends in failure; None for 600.
        :param statement_timeout: seconds that one statement may take; None for the server's setting.
        :param timeout: seconds after which it is stopped on the server; None for never.
        :returns: what came of it; ``verdict`` of it says whether it is equal, stale, corrupt ...
        :raises ViewNotFound: when no materialized view of this name stands.
        :raises MissingPrivilege: when the role may not read it, or what its query reads; the hint is the GRANT.
        :raises InvalidDefinition: when an argument is nothing of that.
        :raises psycopg.Error: what PostgreSQL says, of the query too.
        """
        run = VerificationRun(
            self,
            mode=mode,
            sample=sample,
            seed=seed,
            examples=examples,
            session_settings=session_settings,
            lock_timeout=lock_timeout,
            max_wait=max_wait,
            statement_timeout=statement_timeout,
            timeout=timeout,
        )
        return self._run(run.verifying(_subject_of(view_or_definition)))

    def verify_many(
        self,
        views: Sequence[str] = (),
        *,
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        definitions: Sequence[MatViewDefinition] = (),
        rounds: int = 0,
        **arguments: Any,
    ) -> VerificationReport:
        """Compare several views with their queries, one after the other, each in a snapshot of its own.

        One that cannot be verified has the verdict ``failed``; the others are verified all the same.

        :param views: names and patterns, as of :meth:`refresh_many`.
        :param schemas: exact names of schemas, all views of which are meant.
        :param exclude: names and patterns of views that are not meant after all.
        :param definitions: of further views, which are compared with these, too.
        :param rounds: how often each is timed against its query as well; see :meth:`compare_timings`.
        :param arguments: those of :meth:`verify`; ``timeout`` and the others are each view's own.
        :raises ViewNotFound: when a name stands for no materialized view.
        :raises InvalidDefinition: when an argument is nothing of that.
        :raises OperationCancelled: when one was cancelled.
        """
        return self._in_a_loop(
            lambda: self.averify_many(
                views, schemas=schemas, exclude=exclude, definitions=definitions, rounds=rounds, **arguments
            )
        )

    async def averify_many(
        self,
        views: Sequence[str] = (),
        *,
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        definitions: Sequence[MatViewDefinition] = (),
        **arguments: Any,
    ) -> VerificationReport:
        """Do as :meth:`verify_many` does, in an event loop; see :meth:`acreate`."""
        run = VerificationRun(self, **arguments)
        return await run.verify_many(views, schemas=schemas, exclude=exclude, definitions=definitions)

    def compare_timings(
        self,
        views: Sequence[str] = (),
        *,
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        rounds: int = 3,
        **arguments: Any,
    ) -> tuple[Timing, ...]:
        """Say how much faster views answer than their queries would: both are run in full, in turn, on the server.

        :param views: names and patterns, as of :meth:`refresh_many`.
        :param schemas: exact names of schemas, all views of which are meant.
        :param exclude: names and patterns of views that are not meant after all.
        :param rounds: how often; told are the medians.
        :param arguments: ``session_settings`` and the limits (``lock_timeout`` to ``timeout``), as of :meth:`verify`.
        :raises ViewNotFound: when a name stands for no materialized view.
        :raises InvalidDefinition: when an argument is nothing of that.
        """
        run = VerificationRun(self, rounds=check_rounds(rounds), **arguments)
        return self._in_a_loop(lambda: run.time_many(views, schemas=schemas, exclude=exclude))

    def _in_a_loop(self, make: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        # Here, where asking Airflow for the connection is what it is for any other operation.
        self._conninfo, self._learnt = self._learn_conninfo(), time.monotonic()

        async def run() -> _T:
            self._loop = asyncio.get_running_loop()
            try:
                return await make()
            finally:
                self._loop = None

        return asyncio.run(run())

    def graph(self) -> Graph:
        """Read which materialized views of the database read which, and which tables; nothing is recorded of it."""
        return self._read(read_graph())


def _subject_of(view_or_definition: str | MatViewDefinition) -> Subject:
    if isinstance(view_or_definition, MatViewDefinition):
        return Subject(view_or_definition.view, view_or_definition)
    return Subject(ViewName.parse(view_or_definition))


def _with_timeouts(arguments: dict[str, Any]) -> dict[str, Any]:
    rest = dict(arguments)
    limits = {name: rest.pop(name) for name in Timeouts.names() if name in rest}
    return {**rest, "timeouts": Timeouts(**limits)}


__all__ = ["MatViewError", "MatViewHook", "ViewDescription"]
