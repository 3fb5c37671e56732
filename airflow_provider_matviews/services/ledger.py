"""The record: one row for every definition, one for every run.

Written by what wraps the services (``run.py``), never by a service. A run is inserted ``running`` on a
connection of its own while the view's lock is held, and ends ``success`` in the operation's own transaction:
so a success and its data commit together, and a ``running`` row whose lock is free is an orphan.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from enum import IntEnum
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from airflow_provider_matviews.definition import MatViewDefinition, RefreshStrategy
from airflow_provider_matviews.exceptions import RunLost
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.instructions import Command, Session, Work, fetch_all, fetch_one, raw
from airflow_provider_matviews.services.migrations import LATEST, ensure_schema
from airflow_provider_matviews.services.strategies.auto import PastRefresh


class RunStatus(IntEnum):
    """The codes in ``mat_view_runs.status``."""

    RUNNING = 1
    SUCCESS = 2
    FAILED = 3
    SKIPPED = 4


class Operation(IntEnum):
    """The codes in ``mat_view_runs.operation``."""

    CREATE = 0
    REFRESH = 1
    DROP = 2

    @property
    def word(self) -> str:
        """As ``mat_view_run_history`` says it."""
        return self.name.lower()


#: The codes in ``mat_view_definitions.refresh_strategy``.
STRATEGY_CODES = {
    RefreshStrategy.REGULAR: 0,
    RefreshStrategy.CONCURRENT: 1,
    RefreshStrategy.SWAP: 2,
    RefreshStrategy.AUTO: 3,
}
_EXCERPT = re.compile(r"(LINE \d+: | *\^$)")
#: What is known of a run that nobody ended; the process is the one that its meta names.
_LOST: dict[str, Any] = {
    "class": RunLost.__name__,
    "message": "The process that ran this ended without a word (killed, or its machine or its connection was lost): "
    "{process}. The server undid what it had begun; the view serves as before.",
    "sqlstate": None,
    "backtrace": [],
    "hint": None,
}
_LOST_ERROR = sql.SQL(
    "%(error)s || jsonb_build_object('message', replace(%(error)s->>'message', '{process}', "
    "coalesce(meta->>'process', 'unknown')))"
)
_STRATEGIES = {code: strategy for strategy, code in STRATEGY_CODES.items()}


@dataclass(frozen=True)
class DefinitionRecord:
    """A row of ``mat_view_definitions``.

    :ivar name: the view as one would type it; without its schema where that is ``public``.
    :ivar sql: the query; None for a view of which nothing but the name is known.
    :ivar declaration: the whole definition, as :meth:`MatViewDefinition.from_dict` reads it; empty for a view
        that was never declared.
    :ivar source_state: what its sources looked like before its last refresh, as ``staleness.Baseline`` reads it.
    """

    id: int
    name: str
    schema_name: str
    view_name: str
    sql: str | None
    refresh_strategy: RefreshStrategy
    unique_index_columns: tuple[str, ...]
    managed: bool
    declaration: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    source_state: dict[str, Any] | None = None

    @property
    def session_settings(self) -> dict[str, Any]:
        """The settings that the definition declares."""
        return dict(self.declaration.get("session_settings", {}))

    @property
    def timeouts(self) -> dict[str, float]:
        """The limits that the definition declares, in seconds."""
        return dict(self.declaration.get("timeouts", {}))


@dataclass(frozen=True)
class Run:
    """A row of ``mat_view_runs``, with words for its codes.

    :ivar view: the view's name, as in :class:`DefinitionRecord`.
    :ivar operation: ``create``, ``refresh`` or ``drop``.
    :ivar status: ``running``, ``success``, ``failed`` or ``skipped``.
    :ivar duration_ms: milliseconds by the worker's monotonic clock.
    :ivar error: message, class, sqlstate, backtrace (a list of lines), hint; None unless failed.
    :ivar meta: row_count_before, row_count_after, strategy, request, response, and whose task it was.
    """

    id: int
    view: str
    operation: str
    status: str
    started_at: datetime | None
    finished_at: datetime | None
    duration_ms: int | None
    error: dict[str, Any] | None
    meta: dict[str, Any]
    created_at: datetime

    @property
    def row_count_before(self) -> int | None:
        """Rows before the operation; None where unknown."""
        return self.meta.get("row_count_before")

    @property
    def row_count_after(self) -> int | None:
        """Rows after the operation; None where unknown."""
        return self.meta.get("row_count_after")


@dataclass(frozen=True)
class EarlierTry:
    """A view's refresh by an earlier try of the same task.

    :ivar duration_ms: milliseconds by the worker's monotonic clock.
    """

    run_id: int
    duration_ms: int
    meta: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """What a response says of it. ``already`` is the id of its run."""
        response = self.meta["response"]
        told = {name: response.get(name) for name in ("strategy", "row_count_before", "row_count_after", "sources")}
        reason = f"an earlier try of this task has refreshed it (run {self.run_id}), and nothing has changed since"
        return {**told, "reason": reason, "already": self.run_id}


@dataclass(frozen=True)
class Ledger:
    """Writes and reads the record in one schema.

    :param tracking_schema: the schema's name, not quoted.
    :param redact: takes secrets out of text, before any of it is written.
    """

    tracking_schema: str
    redact: Callable[[str], str] = str

    def table(self, name: str) -> sql.Composable:
        """Return a table of the record, as a part of a statement that has parameters."""
        # psycopg would otherwise take a % in the schema's name for a placeholder.
        return raw(sql.Identifier(self.tracking_schema, name).as_string(None).replace("%", "%%"))

    def clean(self, value: Any) -> Any:
        """Return plain data without secrets, and without what jsonb cannot hold.

        Keys are ours, and left as they are.
        """
        if isinstance(value, str):
            return _storable(self.redact(value))
        if isinstance(value, Mapping):
            return {_storable(str(key)): self.clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.clean(item) for item in value]
        return value

    def definition(self, view: ResolvedName) -> Work[DefinitionRecord | None]:
        """Return what is recorded of a view, or None; make or upgrade the tables first where that is needed.

        :raises MissingPrivilege: when the role may not use or make the tables.
        """
        lookup = sql.SQL(
            "SELECT d.*, m.version AS ledger_version FROM (SELECT max(version) AS version FROM {}) m "
            "LEFT JOIN {} d ON d.schema_name = %s AND d.view_name = %s"
        ).format(self.table("mat_view_migrations"), self.table("mat_view_definitions"))

        def look() -> Work[dict[str, Any] | None]:
            return (yield from fetch_one(lookup, (view.schema, view.name), Session.RECORD))

        try:
            row = yield from look()
            if row is not None and (row["ledger_version"] or 0) < LATEST:
                row = None
        except (
            psycopg.errors.UndefinedTable,
            psycopg.errors.InvalidSchemaName,
            psycopg.errors.InsufficientPrivilege,
        ):
            row = None
        if row is None:
            yield from ensure_schema(self.tracking_schema)
            row = yield from look()
        assert row is not None
        del row["ledger_version"]
        return None if row["id"] is None else _definition(row)

    def definitions(self) -> Work[list[DefinitionRecord]]:
        """Return every definition, by name."""
        rows = yield from fetch_all(
            sql.SQL("SELECT * FROM {} ORDER BY name").format(self.table("mat_view_definitions")),
            (),
            Session.RECORD,
        )
        return [_definition(row) for row in rows]

    def declare(
        self, view: ResolvedName, definition: MatViewDefinition, known: DefinitionRecord | None
    ) -> Work[DefinitionRecord]:
        """Record what a view should be, in the operation's own transaction. Writes nothing where nothing changed.

        :param known: the row that stands.
        """
        declaration = definition.to_dict()
        if known is not None and known.declaration == declaration:
            return known
        record = yield from self._write_definition(
            view,
            definition.sql,
            RefreshStrategy(definition.refresh_strategy),
            list(definition.unique_index_columns),
            definition.managed,
            declaration,
            Session.WORK,
        )
        assert record is not None
        return record

    def glance(self, view: ResolvedName) -> Work[DefinitionRecord | None]:
        """Return what is recorded of a view, or None, also where there are no tables yet; make nothing.

        :raises psycopg.errors.InsufficientPrivilege: when the role may not read the tables.
        """
        try:
            row = yield from fetch_one(
                sql.SQL("SELECT * FROM {} WHERE schema_name = %s AND view_name = %s").format(
                    self.table("mat_view_definitions")
                ),
                (view.schema, view.name),
                Session.RECORD,
            )
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            return None
        return None if row is None else _definition(row)

    def rename(self, former: DefinitionRecord, view: ResolvedName) -> Work[None]:
        """Give a definition and its runs a view's new name, in the operation's own transaction.

        What is recorded under that name already, of a view that was called so before or by somebody who stood back
        just now, becomes part of its history.

        :param former: the row under the name that it has had.
        """
        definitions = self.table("mat_view_definitions")
        rename = sql.SQL(
            "UPDATE {} SET name = %s, schema_name = %s, view_name = %s, updated_at = clock_timestamp() WHERE id = %s"
        ).format(definitions)
        named = (view.display, view.schema, view.name, former.id)
        yield Command(sql.SQL("SAVEPOINT renaming"))
        try:
            yield from fetch_all(rename, named)
        except psycopg.errors.UniqueViolation:
            yield Command(sql.SQL("ROLLBACK TO SAVEPOINT renaming"))
        else:
            yield Command(sql.SQL("RELEASE SAVEPOINT renaming"))
            return
        # Locked, so that nobody hangs another run on it.
        left = yield from fetch_one(
            sql.SQL("SELECT id FROM {} WHERE schema_name = %s AND view_name = %s FOR UPDATE").format(definitions),
            (view.schema, view.name),
        )
        assert left is not None
        yield from fetch_all(
            sql.SQL("UPDATE {} SET mat_view_definition_id = %s WHERE mat_view_definition_id = %s").format(
                self.table("mat_view_runs")
            ),
            (former.id, left["id"]),
        )
        yield from fetch_all(sql.SQL("DELETE FROM {} WHERE id = %s").format(definitions), (left["id"],))
        yield from fetch_all(rename, named)

    def adopt(self, view: ResolvedName, known: DefinitionRecord | None, query: str | None) -> Work[DefinitionRecord]:
        """Return the row of a view; make one, ``managed=false``, for a view that was never declared.

        :param known: the row that stands.
        :param query: the standing view's query; None where none stands.
        """
        if known is not None and (known.declaration or known.sql == query or query is None):
            return known
        record = yield from self._write_definition(view, query, RefreshStrategy.AUTO, [], False, {}, Session.RECORD)
        if record is None:
            record = yield from self.definition(view)
        assert record is not None
        return record

    def _write_definition(
        self,
        view: ResolvedName,
        query: str | None,
        strategy: RefreshStrategy,
        unique_index_columns: list[str],
        managed: bool,
        declaration: dict[str, Any],
        session: Session,
    ) -> Work[DefinitionRecord | None]:
        # Who stands back adopts without the view's lock: whoever holds it may have declared it by now, and nothing
        # adopted overwrites what was declared. None then.
        row = yield from fetch_one(
            sql.SQL(
                """
                INSERT INTO {} AS d (name, schema_name, view_name, sql, refresh_strategy, unique_index_columns,
                                     managed, declaration)
                VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
                ON CONFLICT (schema_name, view_name) DO UPDATE
                SET sql = excluded.sql, refresh_strategy = excluded.refresh_strategy,
                    unique_index_columns = excluded.unique_index_columns, managed = excluded.managed,
                    declaration = excluded.declaration, updated_at = clock_timestamp()
                WHERE d.declaration = '{{}}' OR excluded.declaration <> '{{}}'
                RETURNING d.*
                """
            ).format(self.table("mat_view_definitions")),
            (
                view.display,
                view.schema,
                view.name,
                query,
                STRATEGY_CODES[strategy],
                Jsonb(unique_index_columns),
                managed,
                Jsonb(declaration),
            ),
            session,
        )
        return None if row is None else _definition(row)

    def start(self, definition_id: int, operation: Operation, meta: Mapping[str, Any]) -> Work[tuple[int, list[int]]]:
        """Insert a run as ``running``, mark the view's orphans as failed (``RunLost``), and return their ids.

        The caller holds the view's lock, so every run of it that still says ``running`` has ended.

        :returns: the new run's id, and those of the orphans.
        """
        row = yield from fetch_one(
            sql.SQL(
                """
                WITH lost AS (
                    UPDATE {runs} SET status = %(failed)s, finished_at = clock_timestamp(),
                           updated_at = clock_timestamp(), error = {lost}
                    WHERE mat_view_definition_id = %(definition)s AND status = %(running)s
                    RETURNING id
                ), started AS (
                    INSERT INTO {runs} (mat_view_definition_id, status, operation, started_at, meta)
                    VALUES (%(definition)s, %(running)s, %(operation)s, clock_timestamp(), %(meta)s)
                    RETURNING id
                )
                SELECT started.id, ARRAY(SELECT lost.id FROM lost ORDER BY lost.id) AS orphans FROM started
                """
            ).format(runs=self.table("mat_view_runs"), lost=_LOST_ERROR),
            {
                "definition": definition_id,
                "operation": operation,
                "running": RunStatus.RUNNING,
                "failed": RunStatus.FAILED,
                "meta": Jsonb(self.clean(meta)),
                "error": Jsonb(_LOST),
            },
            Session.RECORD,
        )
        assert row is not None
        return int(row["id"]), list(row["orphans"])

    def running(self) -> Work[list[tuple[int, ResolvedName]]]:
        """Return id and view of every run that says ``running``, be it alive or not."""
        rows = yield from fetch_all(
            sql.SQL(
                "SELECT r.id, d.schema_name, d.view_name, d.name FROM {} r JOIN {} d "
                "ON d.id = r.mat_view_definition_id WHERE r.status = {} ORDER BY r.id"
            ).format(
                self.table("mat_view_runs"), self.table("mat_view_definitions"), sql.Literal(int(RunStatus.RUNNING))
            ),
            (),
            Session.RECORD,
        )
        return [(row["id"], ResolvedName(row["schema_name"], row["view_name"], row["name"])) for row in rows]

    def lose(self, run_id: int, held: sql.Composable, lock: str) -> Work[bool]:
        """Mark a run that says ``running`` as failed (``RunLost``) unless its view's lock is held; return whether.

        :param held: the expression of whether the lock ``%(lock)s`` is held.
        :param lock: the lock's name.
        """
        row = yield from fetch_one(
            sql.SQL(
                "UPDATE {runs} SET status = %(failed)s, finished_at = clock_timestamp(), "
                "updated_at = clock_timestamp(), error = {lost} "
                "WHERE id = %(id)s AND status = %(running)s AND NOT {held} RETURNING id"
            ).format(runs=self.table("mat_view_runs"), lost=_LOST_ERROR, held=held),
            {
                "failed": RunStatus.FAILED,
                "error": Jsonb(_LOST),
                "id": run_id,
                "running": RunStatus.RUNNING,
                "lock": lock,
            },
            Session.RECORD,
        )
        return row is not None

    def ended_well(self, deferral: str) -> Work[tuple[int, int, dict[str, Any]] | None]:
        """Return id, duration (milliseconds) and meta of the latest run with this deferral that ended well."""
        row = yield from fetch_one(
            sql.SQL(
                "SELECT id, duration_ms, meta FROM {} WHERE meta ? 'deferral' AND meta->>'deferral' = %s "
                "AND status = ANY(%s) AND (status <> {} OR meta->'response'->>'status' IS NOT NULL) "
                "ORDER BY id DESC LIMIT 1"
            ).format(self.table("mat_view_runs"), sql.Literal(int(RunStatus.SKIPPED))),
            (deferral, [int(RunStatus.SUCCESS), int(RunStatus.SKIPPED)]),
            Session.RECORD,
        )
        return None if row is None else (row["id"], row["duration_ms"], row["meta"])

    def skip(
        self, operation: Operation, runs: Sequence[tuple[int, Mapping[str, Any]]], duration_ms: int
    ) -> Work[list[int]]:
        """Insert runs that never began, as ``skipped``, and return their ids in the same order.

        :param runs: of each the id of its definition, and its meta.
        :param duration_ms: milliseconds that it took to find out.
        """
        if not runs:
            return []
        rows = yield from fetch_all(
            sql.SQL(
                "INSERT INTO {} (mat_view_definition_id, status, operation, started_at, finished_at, duration_ms, "
                "meta) SELECT new.definition_id, %s, %s, now - %s * interval '1 ms', now, %s, new.meta "
                "FROM clock_timestamp() AS now, "
                "unnest(%s::bigint[], %s::jsonb[]) WITH ORDINALITY AS new (definition_id, meta, position) "
                "ORDER BY new.position RETURNING id"
            ).format(self.table("mat_view_runs")),
            (
                RunStatus.SKIPPED,
                operation,
                duration_ms,
                duration_ms,
                [definition_id for definition_id, _ in runs],
                [Jsonb(self.clean(meta)) for _, meta in runs],
            ),
            Session.RECORD,
        )
        return sorted(int(row["id"]) for row in rows)

    def finish(self, run_id: int, status: RunStatus, duration_ms: int, meta: Mapping[str, Any]) -> Work[None]:
        """End a run well, in the operation's own transaction."""
        yield from fetch_all(
            sql.SQL(
                "UPDATE {} SET status = %s, finished_at = clock_timestamp(), duration_ms = %s, meta = %s, "
                "updated_at = clock_timestamp() WHERE id = %s"
            ).format(self.table("mat_view_runs")),
            (status, duration_ms, Jsonb(self.clean(meta)), run_id),
        )

    def keep_sources(self, definition_id: int, view: ResolvedName, state: Mapping[str, Any]) -> Work[None]:
        """Keep what a view's sources looked like before its refresh, in the operation's own transaction.

        Added is which version of the view and of its stored query came of it.
        """
        yield from fetch_all(
            sql.SQL(
                "UPDATE {} d SET source_state = %s || jsonb_build_object("
                "'oid', c.oid::bigint, 'version', c.xmin::text, 'rule', w.oid || ':' || w.xmin) "
                "FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
                "JOIN pg_catalog.pg_rewrite w ON w.ev_class = c.oid AND w.rulename = '_RETURN' "
                "WHERE n.nspname = %s AND c.relname = %s AND d.id = %s"
            ).format(self.table("mat_view_definitions")),
            (Jsonb(state), view.schema, view.name, definition_id),
        )

    def source_states(
        self, views: Sequence[ResolvedName] | None = None
    ) -> Work[dict[tuple[str, str], dict[str, Any] | None]]:
        """Return what is kept of the sources of views that are on record, by schema and name.

        Nothing where there are no tables yet; none are made.

        :param views: of these; None for all.
        """
        try:
            rows = yield from fetch_all(
                sql.SQL(
                    "SELECT schema_name, view_name, source_state FROM {} WHERE %(schemas)s::text[] IS NULL OR "
                    "(schema_name, view_name) IN (SELECT * FROM unnest(%(schemas)s::text[], %(names)s::text[]))"
                ).format(self.table("mat_view_definitions")),
                catalog.named(views),
                Session.RECORD,
            )
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            return {}
        return {(row["schema_name"], row["view_name"]): row["source_state"] for row in rows}

    def settle_sources(self, settled: Mapping[int, datetime]) -> Work[None]:
        """Note of views that no transaction is left that is older than what was kept of their sources at a moment.

        :param settled: definition id -> that moment.
        """
        if not settled:
            return
        yield from fetch_all(
            sql.SQL(
                "UPDATE {} d SET source_state = d.source_state || '{{\"open\": []}}' "
                "FROM unnest(%s::bigint[], %s::text[]) AS settled (id, at) "
                "WHERE d.id = settled.id AND d.source_state->>'at' = settled.at"
            ).format(self.table("mat_view_definitions")),
            (list(settled), [at.isoformat() for at in settled.values()]),
            Session.RECORD,
        )

    def done_by(self, context: Mapping[str, Any], definition_ids: Sequence[int]) -> Work[dict[int, EarlierTry]]:
        """Return, of views whose latest refresh was an earlier try of a task's, what came of that.

        :param context: whose task it is; where it is nobody's, nothing is returned.
        """
        whose = {key: context.get(key) for key in ("dag_id", "task_id", "run_id", "map_index")}
        if None in whose.values():
            return {}
        rows = yield from fetch_all(
            sql.SQL(
                "SELECT r.* FROM unnest(%s::bigint[]) AS wanted (id) CROSS JOIN LATERAL (SELECT id, "
                "mat_view_definition_id, duration_ms, meta FROM {} WHERE mat_view_definition_id = wanted.id "
                "AND status = %s AND operation = %s ORDER BY created_at DESC, id DESC LIMIT 1) r WHERE r.meta @> %s"
            ).format(self.table("mat_view_runs")),
            (list(definition_ids), RunStatus.SUCCESS, Operation.REFRESH, Jsonb(whose)),
            Session.RECORD,
        )
        return {row["mat_view_definition_id"]: EarlierTry(row["id"], row["duration_ms"], row["meta"]) for row in rows}

    def last_filled(self, definition_id: int) -> Work[datetime | None]:
        """Return when a view was last filled, by whichever operation, or None."""
        row = yield from fetch_one(
            sql.SQL(
                "SELECT finished_at FROM {} WHERE mat_view_definition_id = %s AND status = %s AND operation < %s "
                "ORDER BY created_at DESC, id DESC LIMIT 1"
            ).format(self.table("mat_view_runs")),
            (definition_id, RunStatus.SUCCESS, Operation.DROP),
            Session.RECORD,
        )
        return None if row is None else row["finished_at"]

    def fail(self, run_id: int, error: BaseException, duration_ms: int, meta: Mapping[str, Any]) -> Work[RunStatus]:
        """End a run as ``failed`` unless it did commit, and return the status that it now has.

        Where the answer to COMMIT was lost this waits, on the row's lock, until the server has decided.
        An orphan verdict that came first is replaced: this is the process itself speaking.
        """
        row = yield from fetch_one(
            sql.SQL(
                """
                WITH ended AS (
                    UPDATE {runs} SET status = %(failed)s, finished_at = clock_timestamp(),
                           duration_ms = %(duration)s, error = %(error)s, meta = %(meta)s,
                           updated_at = clock_timestamp()
                    WHERE id = %(id)s AND (status = %(running)s
                                           OR (status = %(failed)s AND error->>'class' = %(lost)s))
                    RETURNING status
                )
                SELECT status FROM ended
                """
            ).format(runs=self.table("mat_view_runs")),
            {
                "id": run_id,
                "failed": RunStatus.FAILED,
                "running": RunStatus.RUNNING,
                "lost": RunLost.__name__,
                "duration": duration_ms,
                "error": Jsonb(self.describe_error(error, duration_ms / 1000)),
                "meta": Jsonb(self.clean(meta)),
            },
            Session.RECORD,
        )
        if row is None:
            # A statement of its own: its snapshot is newer than whatever the UPDATE had to wait for.
            row = yield from fetch_one(
                sql.SQL("SELECT status FROM {} WHERE id = %s").format(self.table("mat_view_runs")),
                (run_id,),
                Session.RECORD,
            )
        return RunStatus.FAILED if row is None else RunStatus(row["status"])

    def runs(self, view: ResolvedName | None, limit: int) -> Work[list[Run]]:
        """Return the latest runs, newest first: of one view, or of all."""
        where: sql.Composable = sql.SQL("")
        parameters: dict[str, Any] = {"limit": limit}
        if view is not None:
            where = sql.SQL(
                "WHERE mat_view_definition_id = "
                "(SELECT id FROM {} WHERE schema_name = %(schema)s AND view_name = %(name)s)"
            ).format(self.table("mat_view_definitions"))
            parameters |= {"schema": view.schema, "name": view.name}
        rows = yield from fetch_all(
            sql.SQL(
                "SELECT id, view, operation, status, started_at, finished_at, duration_ms, error, meta, created_at "
                "FROM {} {} ORDER BY created_at DESC, id DESC LIMIT %(limit)s"
            ).format(self.table("mat_view_run_history"), where),
            parameters,
            Session.RECORD,
        )
        return [Run(**row) for row in rows]

    def run(self, run_id: int) -> Work[Run | None]:
        """Return one run, or None."""
        row = yield from fetch_one(
            sql.SQL(
                "SELECT id, view, operation, status, started_at, finished_at, duration_ms, error, meta, created_at "
                "FROM {} WHERE id = %s"
            ).format(self.table("mat_view_run_history")),
            (run_id,),
            Session.RECORD,
        )
        return None if row is None else Run(**row)

    def past_refreshes(self, definition_id: int, limit: int = 20) -> Work[list[PastRefresh]]:
        """Return a view's latest successful refreshes by us, newest first."""
        rows = yield from fetch_all(
            sql.SQL(
                """
                SELECT coalesce(meta->>'strategy', '') AS strategy,
                       -- Without the wait for others, which says nothing about the strategy.
                       coalesce(duration_ms, 0) - coalesce((meta->'response'->>'waited_ms')::bigint, 0) AS duration_ms,
                       (meta->>'row_count_after')::bigint AS rows,
                       (meta->'response'->>'rows_inserted')::bigint AS rows_inserted,
                       (meta->'response'->>'rows_deleted')::bigint AS rows_deleted,
                       (meta->'response'->>'heap_bytes')::bigint AS heap_bytes
                FROM {} WHERE mat_view_definition_id = %s AND status = %s AND operation = %s
                  -- Others do not tell what they found.
                  AND NOT meta ? 'imported_from'
                ORDER BY created_at DESC, id DESC LIMIT %s
                """
            ).format(self.table("mat_view_runs")),
            (definition_id, RunStatus.SUCCESS, Operation.REFRESH, limit),
            Session.RECORD,
        )
        return [PastRefresh(**row) for row in rows]

    def describe_error(self, error: BaseException, seconds: float) -> dict[str, Any]:
        """Return an error as the record keeps it.

        :param seconds: after how long it came.
        """
        described: dict[str, Any] = self.clean(
            {
                "class": type(error).__name__,
                "message": _message(error, seconds),
                "sqlstate": error.sqlstate if isinstance(error, psycopg.Error) else None,
                "hint": getattr(error, "hint", None) or "\n".join(getattr(error, "__notes__", ())) or None,
                "backtrace": _backtrace(error),
            }
        )
        return described


def _storable(text: str) -> str:
    # jsonb refuses NUL and halves of surrogate pairs; a record with a mark beats no record.
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _message(error: BaseException, seconds: float) -> str:
    if not isinstance(error, Exception):
        # Ctrl-C, a timeout of whatever runs the task: not what happened to the operation, but what ended it.
        by = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else type(error).__name__
        return f"Interrupted after {seconds:.1f} s by {by}{f': {error}' if str(error) else ''}."
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        # Without the excerpt of the statement, which may hold half of a secret that could not be recognised.
        parts = [error.diag.message_primary]
        for word, more in (
            ("DETAIL", error.diag.message_detail),
            ("HINT", error.diag.message_hint),
            ("CONTEXT", error.diag.context),
        ):
            if more:
                parts.append(f"{word}:  {more}")
        return "\n".join(parts)
    return getattr(error, "message", None) or str(error) or type(error).__name__


def _backtrace(error: BaseException) -> list[str]:
    lines = "".join(traceback.format_exception(error)).splitlines()
    # The excerpt again: "LINE 1: ..." and the caret below it.
    return [line for line in lines if not _EXCERPT.match(line)]


def _definition(row: Mapping[str, Any]) -> DefinitionRecord:
    # By name: a newer version of this package may have added columns, and an older one may not have had them yet.
    values = {field.name: row[field.name] for field in fields(DefinitionRecord) if field.name in row}
    values["refresh_strategy"] = _STRATEGIES.get(row["refresh_strategy"], RefreshStrategy.AUTO)
    # Other programs write into this table, too.
    columns = row["unique_index_columns"]
    values["unique_index_columns"] = tuple(columns) if isinstance(columns, list) else ()
    if not isinstance(row.get("declaration", {}), dict):
        values["declaration"] = {}
    return DefinitionRecord(**values)
