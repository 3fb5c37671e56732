"""A view and its query, to be read in one snapshot in which both stand still.

The transaction is REPEATABLE READ and READ ONLY, and takes ACCESS SHARE locks alone. A plain REFRESH and TRUNCATE show
their rows to snapshots that are older than they (measured; see
https://www.postgresql.org/docs/current/mvcc-caveats.html): so everything is locked by an EXPLAIN first, and where
anything of it has got another file since the snapshot was taken, another one is taken.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import psycopg
from psycopg import sql

from airflow_provider_matviews.definition import ParameterValue
from airflow_provider_matviews.exceptions import MatViewError, MissingPrivilege
from airflow_provider_matviews.services import catalog, staleness
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.comparison import ComparedColumn, Sides
from airflow_provider_matviews.services.instructions import (
    Command,
    Deadline,
    Note,
    Pause,
    Session,
    Watch,
    Work,
    fetch_all,
    fetch_one,
)
from airflow_provider_matviews.services.ledger import DefinitionRecord, Ledger
from airflow_provider_matviews.services.locking import describe_blocker
from airflow_provider_matviews.services.progress import duration_text
from airflow_provider_matviews.services.run import CONNECTION_CHECK, KEEPALIVES, Subject, Terms, limits_of
from airflow_provider_matviews.services.session_settings import apply_settings

#: How often it is begun again because something was refreshed or replaced in the very moment.
_MOST_MOVES = 5
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0
#: Seconds between two lines about a wait that goes on.
_NEWS_EVERY = 30.0

_COLUMNS = sql.SQL(
    """
    SELECT a.attname::text AS name, format_type(a.atttypid, -1) AS type, key.place - 1 AS place,
           CASE WHEN t.typcategory <> 'A' THEN (
               SELECT format('OPERATOR(%I.%s)', n.nspname, o.oprname)
               FROM pg_catalog.pg_opclass f
               JOIN pg_catalog.pg_amop m ON m.amopfamily = f.opcfamily AND m.amopstrategy = 3
                AND m.amoplefttype = f.opcintype AND m.amoprighttype = f.opcintype
               JOIN pg_catalog.pg_operator o ON o.oid = m.amopopr
               JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace WHERE f.oid = key.class) END AS equality
    FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
    LEFT JOIN (
        SELECT k.attnum, k.place, i.indclass[k.place - 1] AS class
        FROM (SELECT * FROM pg_catalog.pg_index
              WHERE indrelid = {oid}::oid AND indisunique AND indisvalid AND indimmediate AND indpred IS NULL
                AND indexprs IS NULL
              ORDER BY indnkeyatts, indexrelid LIMIT 1) i
        CROSS JOIN LATERAL unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, place)
        WHERE k.place <= i.indnkeyatts) key ON key.attnum = a.attnum
    WHERE a.attrelid = {oid}::oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
    """
)

# What the locks are on, as they are now, against the same as the snapshot has it. Its own view is among them, but for a
# name that means another one by now.
_MOVED = sql.SQL(
    """
    SELECT to_regclass({name})::oid::bigint IS DISTINCT FROM {oid}
           OR EXISTS (SELECT FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_class c ON c.oid = l.relation
                      WHERE l.locktype = 'relation' AND l.pid = pg_backend_pid() AND l.granted
                        AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
                        AND (c.oid IS NULL OR (c.relfilenode <> 0
                             AND c.relfilenode IS DISTINCT FROM pg_catalog.pg_relation_filenode(c.oid)))) AS moved
    """
)

# Sources that the role may not read: named by us, since the server's own words leave out their schema.
_UNREADABLE = sql.SQL(
    """
    SELECT DISTINCT format('%I.%I', n.nspname, c.relname) AS name, format('%I', n.nspname) AS schema,
           has_schema_privilege(n.oid, 'USAGE') AS usable
    FROM pg_catalog.pg_rewrite w
    JOIN pg_catalog.pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
     AND d.refclassid = 'pg_class'::regclass
    JOIN pg_catalog.pg_class c ON c.oid = d.refobjid AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE w.ev_class = {oid}::oid
      AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_any_column_privilege(c.oid, 'SELECT'))
    ORDER BY 1
    """
)

_WAITS = sql.SQL(
    """
    SELECT EXISTS (SELECT FROM pg_catalog.pg_locks WHERE pid = {pid}) AS present,
           CASE WHEN EXISTS (SELECT FROM pg_catalog.pg_locks WHERE pid = {pid} AND NOT granted) THEN (
               SELECT jsonb_agg(jsonb_build_object(
                          'pid', a.pid, 'user', a.usename, 'application', a.application_name,
                          'age', round(extract(epoch FROM clock_timestamp() - a.xact_start)),
                          'query', left(regexp_replace(nullif(a.query, '<insufficient privilege>'), '\\s+', ' ', 'g'),
                                        80)))
               FROM pg_catalog.pg_stat_activity a
               WHERE a.pid = ANY (pg_catalog.pg_blocking_pids({pid}))) END AS blockers
    """
)


class _Moved(Exception):
    """Something was refreshed, replaced or renamed between the snapshot and the locks."""


#: How the server says that what was looked up has been changed or dropped before it was locked.
_CHANGED = (
    _Moved,
    psycopg.errors.InternalError_,
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.InvalidColumnReference,
    psycopg.errors.DatatypeMismatch,
)


@dataclass(frozen=True)
class Standing:
    """Whether what a view reads has changed since its last refresh.

    :ivar changed: None where that cannot be told.
    """

    changed: bool | None
    reason: str
    look: staleness.Look | None

    def still(self, later: staleness.Look | None) -> bool:
        """Whether nothing has changed until a later look, either."""
        look = self.look
        return (
            look is not None
            and later is not None
            and not later.writing
            and (later.server, later.shape, later.rule, later.settings, dict(later.sources), later.opaque)
            == (look.server, look.shape, look.rule, look.settings, dict(look.sources), look.opaque)
        )


@dataclass
class OpenedView:
    """A view in a transaction in which it and what it reads stand still.

    :ivar role: as whom its query runs.
    """

    view: ResolvedName
    facts: ViewFacts
    sides: Sides
    role: str
    standing: Standing


@dataclass
class Opening:
    """How to open a view for reading it and its query in one snapshot.

    :param subject: the view, with its definition where one is at hand.
    :param terms: settings and limits; ``if_locked`` and ``deferral`` mean nothing here.
    :ivar step: what it is doing, for who looks at it while it takes long.
    :ivar opened: the view as far as it was opened, also where that failed.
    """

    subject: Subject
    ledger: Ledger
    terms: Terms
    begun: float = field(default_factory=time.monotonic)
    step: str = "waiting for its turn"
    pid: int = 0
    notes: list[str] = field(default_factory=list)
    opened: OpenedView | None = None
    _display: str = ""

    def open(self) -> Work[OpenedView | ResolvedName]:
        """Begin the transaction and return the view in it; its bare name where it has never been filled.

        :raises ViewNotFound: when no materialized view of this name stands.
        :raises MissingPrivilege: when the role may not read it, or what its query reads.
        :raises psycopg.errors.LockNotAvailable: when ``max_wait`` was over.
        """
        limit = self.terms.time_limit
        if limit is not None:
            yield Deadline(self.begun + limit, self.terms.given if self.terms.given is not None else limit)
        server, view = yield from catalog.arrive(self.subject.name, session=Session.RECORD)
        self._display = view.display
        record = yield from self._glance(view)
        settings = self._settings(record)
        patience, moves, told = self.terms.patience, 0, None
        for attempt in count():
            standing = yield from self._standing(view, record, settings)
            try:
                return (yield from self._attempt(view, server, settings, standing))
            except _CHANGED as error:
                moves += 1
                if moves == _MOST_MOVES and isinstance(error, _Moved):
                    raise MatViewError(
                        f"{view.display} or what it reads was refreshed or replaced {moves} times in a row just as it "
                        "was to be verified.",
                        hint="verify it while it rests.",
                    ) from error
                if moves == _MOST_MOVES:
                    raise
                yield from roll_back()
                yield Note(f"{view.display} or what it reads was just refreshed or replaced: begun again.")
            except psycopg.errors.LockNotAvailable as error:
                yield from roll_back()
                waited = time.monotonic() - self.begun
                if waited >= patience.max_wait:
                    error.add_note(
                        f"Gave up after {waited:.0f} s: others kept an exclusive lock on {view.display} or what it "
                        "reads, as REFRESH without CONCURRENTLY does. Raise max_wait, or verify at a quieter hour."
                    )
                    raise
                if told is None or waited - told >= _NEWS_EVERY:
                    told = waited
                    blockers = yield from catalog.blockers_of(view)
                    yield Note(
                        f"{view.display} or what it reads is locked ({waited:.0f} s so far); trying again. In the way: "
                        f"{'; '.join(map(describe_blocker, blockers)) or 'nobody any more'}."
                    )
            yield Pause(min(_FIRST_PAUSE * 2 ** min(attempt, 10), _LONGEST_PAUSE))
        raise AssertionError("unreachable")

    def _glance(self, view: ResolvedName) -> Work[DefinitionRecord | None]:
        try:
            return (yield from self.ledger.glance(view))
        except psycopg.errors.InsufficientPrivilege as error:
            yield Note(
                f"The record cannot be read ({error.diag.message_primary}): when {view.display} was refreshed from "
                "what is not known."
            )
            return None

    def _settings(self, record: DefinitionRecord | None) -> dict[str, ParameterValue]:
        declared: Mapping[str, Any] = record.session_settings if record else {}
        if self.subject.definition is not None:
            declared = self.subject.definition.session_settings
        settings = {**declared, **self.terms.session_settings}
        if self.terms.timeouts.statement_timeout is not None:
            settings.pop("statement_timeout", None)
        return settings

    def _standing(
        self, view: ResolvedName, record: DefinitionRecord | None, settings: Mapping[str, ParameterValue]
    ) -> Work[Standing]:
        look = (yield from staleness.look_at([view])).get(view)
        if look is None:
            return Standing(None, "it does not stand", None)
        baseline = staleness.Baseline.of(record.source_state if record else None)
        judgement = staleness.judge(look, baseline, given=settings)
        if not judgement.stale:
            return Standing(False, judgement.reason, look)
        # What is left of a look when all that leaves it open what the view's rows come from has been ruled out.
        comparable = (
            baseline is not None
            and look.populated
            and look.counted
            and (look.server, look.rule, look.oid) == (baseline.server, baseline.rule, baseline.oid)
        )
        if baseline is None or not comparable:
            return Standing(None, judgement.reason, look)
        if look.shape == baseline.shape and dict(look.sources) == dict(baseline.sources):
            return Standing(None, judgement.reason, look)
        if look.version != baseline.version:
            return Standing(None, f"{judgement.reason}, and somebody else refreshed or altered it", look)
        return Standing(True, judgement.reason, look)

    def _attempt(
        self, view: ResolvedName, server: ServerFacts, settings: Mapping[str, ParameterValue], standing: Standing
    ) -> Work[OpenedView | ResolvedName]:
        self.step = "waiting for its locks"
        yield Command(sql.SQL("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        row = yield from fetch_one(
            sql.SQL("SELECT pg_backend_pid() AS pid, {}, {}, {}").format(
                limits_of(self.terms), CONNECTION_CHECK.format(sql.SQL("true")), KEEPALIVES
            )
        )
        assert row is not None
        self.pid = row["pid"]
        yield Watch(self.line)
        facts = yield from catalog.require_view(view)
        if not facts.populated:
            return view
        yield from apply_settings(settings)
        role = yield from self._act_as(facts, server)
        sides = yield from self._sides(view, facts)
        self.opened = OpenedView(view, facts, sides, role, standing)
        # Locks everything that either side reads, and finds out what the role may not read.
        try:
            yield from fetch_all(sql.SQL("EXPLAIN {}").format(sides.both()))
        except psycopg.errors.InsufficientPrivilege as error:
            yield from roll_back()
            raise (yield from self._explained(view, facts, role, error)) from error
        moved = yield from fetch_one(_MOVED.format(name=sql.Literal(view.ddl), oid=sql.Literal(facts.oid)))
        if moved is None or moved["moved"]:
            raise _Moved
        return self.opened

    def _act_as(self, facts: ViewFacts, server: ServerFacts) -> Work[str]:
        """Become the view's owner, as REFRESH does, where that is allowed; return as whom the query runs."""
        role = server.role
        if facts.owner != role:
            right = "SET" if server.version >= 160000 else "MEMBER"
            row = yield from fetch_one(
                sql.SQL("SELECT pg_catalog.pg_has_role({}::name, {}) AS may").format(
                    sql.Literal(facts.owner), sql.Literal(right)
                )
            )
            if row is not None and row["may"]:
                yield Command(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(facts.owner)))
                role = facts.owner
            else:
                note = (
                    f"Its query is run by {role}, and not by its owner {facts.owner} as REFRESH runs it: what they see "
                    "may differ."
                )
                if note not in self.notes:
                    self.notes.append(note)
        if server.version >= 170000:
            # As REFRESH from PostgreSQL 17 on (https://www.postgresql.org/docs/17/release-17.html).
            yield from fetch_all(sql.SQL("SELECT set_config('search_path', 'pg_catalog, pg_temp', true)"))
        return role

    def _sides(self, view: ResolvedName, facts: ViewFacts) -> Work[Sides]:
        rows = yield from fetch_all(_COLUMNS.format(oid=sql.Literal(facts.oid)))
        row = yield from fetch_one(sql.SQL("SELECT pg_get_viewdef({}::oid) AS query").format(sql.Literal(facts.oid)))
        query = row and row["query"]
        if not query:
            raise _Moved
        keyed = sorted((row["place"], number) for number, row in enumerate(rows) if row["place"] is not None)
        columns = tuple(ComparedColumn(row["name"], row["type"], row["equality"]) for row in rows)
        return Sides(view, query.rstrip().rstrip(";"), columns, tuple(number for _, number in keyed))

    def _explained(
        self, view: ResolvedName, facts: ViewFacts, role: str, error: psycopg.errors.InsufficientPrivilege
    ) -> Work[MissingPrivilege]:
        quoted = sql.Identifier(role).as_string(None)
        yield Command(sql.SQL("BEGIN READ ONLY"))
        if role == facts.owner:
            yield Command(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
        rows = yield from fetch_all(_UNREADABLE.format(oid=sql.Literal(facts.oid)))
        yield from roll_back()
        grants = [f"GRANT USAGE ON SCHEMA {row['schema']} TO {quoted};" for row in rows if not row["usable"]]
        grants += [f"GRANT SELECT ON {row['name']} TO {quoted};" for row in rows]
        if role != facts.owner:
            grants.append(
                f"(or, to run it as REFRESH does: GRANT {sql.Identifier(facts.owner).as_string(None)} TO {quoted};)"
            )
        names = ", ".join(row["name"] for row in rows)
        lacking = f"may not read {names}" if names else f"lacks a right: {error.diag.message_primary}"
        return MissingPrivilege(
            f"{view.display} cannot be compared with its query: {role}{', its owner,' if role == facts.owner else ''} "
            f"{lacking}.",
            hint=f"run: {' '.join(dict.fromkeys(grants))}" if grants else f"give {role} that right.",
        )

    def line(self) -> Work[str | None]:
        """Have one look and return what there is to tell of a statement that takes long."""
        seen = yield from fetch_one(_WAITS.format(pid=sql.Literal(self.pid)))
        if seen is None or not seen["present"]:
            return None
        told = f"Verifying {self._display} for {duration_text(time.monotonic() - self.begun)}: {self.step}"
        if seen["blockers"]:
            told += f", behind {'; '.join(map(describe_blocker, seen['blockers'][:3]))}"
        return f"{' '.join(told.split())}."


def roll_back() -> Work[None]:
    """Undo what the transaction holds, where there still is one."""
    try:
        yield Command(sql.SQL("ROLLBACK"), undoing=True)
    except psycopg.Error as error:
        # A connection that is gone has been rolled back by the server.
        yield Note(f"The connection is gone ({type(error).__name__}); the server rolls back by itself.", True)
