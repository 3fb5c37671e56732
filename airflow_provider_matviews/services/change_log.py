"""The change log: which transactions changed the tables that views read, as triggers on those tables write it.

One row for a table and a transaction, however much that changed. A view is older than its sources where the log has
a row of one of them that the snapshot of its last refresh does not see: neither a clock nor the order of ids comes
into it, so that a change that was committed while a refresh was running never passes for one that the refresh saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg
from psycopg import sql

from airflow_provider_matviews.exceptions import InvalidDefinition, MissingPrivilege, ViewNotFound
from airflow_provider_matviews.names import ViewName, shorten
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.graph import DISPLAY, WALK
from airflow_provider_matviews.services.instructions import Command, Note, Pause, Session, Work, fetch_all, fetch_one
from airflow_provider_matviews.services.locking import Patience, politely
from airflow_provider_matviews.services.migrations import ensure_schema

#: What the bell is rung on. It says no more than that it is time to look.
CHANNEL = "mat_view_changes"

_FUNCTION = "mat_view_note_change"
#: pg_trigger.tgtype: after INSERT, DELETE, UPDATE or TRUNCATE, for each statement; after the first three, for each row.
_FOR_STATEMENTS, _FOR_ROWS = 4 | 8 | 16 | 32, 1 | 4 | 8 | 16
#: Rows that one statement of a prune deletes at the most.
PRUNED_AT_ONCE = 10_000
_LOOK_AGAIN = 0.2

#: It has the rights of whoever made it, so that writers need none on the log, and finds nothing but what is
#: PostgreSQL's own or stands beside it.
_BODY = """
BEGIN
    INSERT INTO mat_view_changes (relation, transaction_id) VALUES (TG_RELID, pg_current_xact_id())
    ON CONFLICT DO NOTHING;
    IF FOUND AND TG_NARGS > 0 THEN
        PERFORM pg_notify('mat_view_changes', '');
    END IF;
    RETURN NULL;
END
"""

#: pg_class.relkind in words, of what a view's query can end at.
_KINDS = {"r": "a table", "p": "a partitioned table", "f": "a foreign table", "m": "a materialized view"}


@dataclass(frozen=True)
class LoggedTable:
    """A table that views read, and the triggers of the log that it has.

    :ivar name: where it stands; ``name.display`` as one would type it.
    :ivar relkind: as in pg_class.
    :ivar views: the views that read it, of those that were asked for.
    :ivar parents: OIDs of what it is a partition or a child of.
    :ivar trigger: the trigger that fires once for each statement; None where there is none.
    :ivar enabled: when that fires, as in pg_trigger.tgenabled.
    :ivar bell: whether a change of it also rings the bell (NOTIFY).
    :ivar row_trigger: the trigger for what logical replication brings; None where there is none.
    :ivar replicated: whether logical replication writes to it.
    :ivar owned: whether the role may act as its owner.
    :ivar latest: the transaction of its latest change in the log; None where none is.
    :ivar changed_at: when that was made.
    """

    oid: int
    name: ResolvedName
    relkind: str
    views: tuple[str, ...]
    parents: tuple[int, ...]
    trigger: str | None
    enabled: str | None
    bell: bool
    row_trigger: str | None
    row_enabled: str | None
    replicated: bool
    owned: bool
    latest: str | None
    changed_at: datetime | None

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return _KINDS.get(self.relkind, "something else")

    @property
    def can_be_logged(self) -> bool:
        """Whether triggers see all that changes it."""
        return self.relkind in ("r", "p") and self.oid >= _FIRST_OF_USERS

    @property
    def gap(self) -> str | None:
        """What of its changes would not be logged, and what mends it; None where all are."""
        if not self.can_be_logged:
            return f"{'a system catalog' if self.oid < _FIRST_OF_USERS else self.kind} has no triggers that see it all"
        if self.trigger is None:
            return "it has no trigger of the log; install_change_log() makes one"
        if self.enabled not in ("O", "A"):
            return f"its trigger {self.trigger} is disabled; install_change_log() enables it"
        if self.replicated and self.row_enabled not in ("R", "A"):
            return (
                "logical replication writes to it, which fires no trigger of a statement; install_change_log(), as its "
                "owner, makes one for rows"
            )
        return None

    def is_as_wanted(self, bell: bool) -> bool:
        """Whether there is nothing to install."""
        return self.gap is None and self.bell is bell and (self.enabled == "A" or not self.owned)


#: OIDs below are the system's own (access/transam.h, FirstNormalObjectId).
_FIRST_OF_USERS = 16384


@dataclass(frozen=True)
class ChangeLogResponse:
    """What was done to the triggers of the change log, or would be.

    :ivar statements: the statements, in order.
    :ivar tables: the tables whose triggers they change.
    :ivar gaps: of the tables that were asked for, those whose changes are not all logged: name -> why.
    """

    statements: tuple[str, ...]
    tables: tuple[str, ...]
    gaps: dict[str, str]


def install(
    tracking_schema: str, names: Sequence[str], *, bell: bool = False, patience: Patience, dry_run: bool = False
) -> Work[ChangeLogResponse]:
    """Have every change of some tables logged from now on. What is so already is left alone.

    Each table gets its trigger in a transaction of its own, under a short ``lock_timeout``: CREATE TRIGGER waits for
    all who are writing to the table, and whoever wants to write meanwhile waits for it. Views that read the table
    count as older than it until they are refreshed, for nobody knows what had changed it before.

    :param names: views, for all tables they read, or tables; each with its partitions, children and parents.
    :param bell: also NOTIFY whoever listens.
    :raises InvalidDefinition: when there is no name, or one of something that is neither.
    :raises ViewNotFound: when nothing of such a name stands.
    :raises MissingPrivilege: when the role lacks TRIGGER on a table.
    :raises psycopg.errors.LockNotAvailable: when a table was not to be had in time; those before it are done.
    """
    yield from ensure_schema(tracking_schema)
    roots = yield from _roots(names)
    tables = yield from tables_of(tracking_schema, roots)
    wanted = [table for table in tables if table.can_be_logged and not table.is_as_wanted(bell)]
    function = (yield from _function_statements(tracking_schema)) if wanted else []
    done = [*function]
    if function and not dry_run:
        yield from _make_function(tracking_schema, function)
    for table in wanted:
        statements = _install_statements(tracking_schema, table, bell)
        done += statements
        if not dry_run:
            yield from _change(table, statements, patience)
            yield Note(f"Changes of {table.name.display} are logged from now on.")
    if not dry_run:
        tables = yield from tables_of(tracking_schema, roots)
    gaps = {table.name.display: table.gap for table in tables if table.gap is not None}
    if dry_run:
        gaps = {name: gap for name, gap in gaps.items() if name not in {table.name.display for table in wanted}}
    for name, gap in gaps.items():
        yield Note(f"Changes of {name} are not all logged: {gap}.", warning=True)
    return _response(done, wanted, gaps)


def remove(
    tracking_schema: str, names: Sequence[str] | None, *, patience: Patience, dry_run: bool = False
) -> Work[ChangeLogResponse]:
    """Drop the triggers of the change log, and what the log has of their tables.

    DROP TRIGGER locks readers out for the moment that it takes, so it is tried under a short ``lock_timeout``, one
    table after the other.

    :param names: views, for all tables they read, or tables; None for every table that has one.
    :raises ViewNotFound: when nothing of such a name stands.
    :raises MissingPrivilege: when the role does not own a table.
    :raises psycopg.errors.LockNotAvailable: when a table was not to be had in time; those before it are done.
    """
    yield from ensure_schema(tracking_schema)
    roots = (yield from _with_triggers(tracking_schema)) if names is None else (yield from _roots(names))
    tables = [table for table in (yield from tables_of(tracking_schema, roots)) if table.trigger or table.row_trigger]
    done: list[sql.Composed] = []
    for table in tables:
        statements = [
            sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(trigger), table.name.identifier)
            for trigger in (table.trigger, table.row_trigger)
            if trigger is not None
        ]
        statements.append(
            sql.SQL("DELETE FROM {} WHERE relation = {}::bigint::oid").format(
                _log(tracking_schema), sql.Literal(table.oid)
            )
        )
        done += statements
        if not dry_run:
            yield from _change(table, statements, patience)
            yield Note(f"Changes of {table.name.display} are no longer logged.")
    if names is None:
        # Refused, and rightly so, where somebody has put a trigger on another table just now.
        drop = sql.SQL("DROP FUNCTION IF EXISTS {}()").format(sql.Identifier(tracking_schema, _FUNCTION))
        done.append(drop)
        if not dry_run:
            yield Command(drop, Session.RECORD)
    return _response(done, tables, {})


def show(tracking_schema: str, names: Sequence[str] | None = None) -> Work[list[LoggedTable]]:
    """Return the tables that views read, which of them are logged, and what of the others would be missed.

    :param names: views, for all tables they read, or tables; None for every table that has a trigger of the log and
        every one that a view on record reads.
    :raises InvalidDefinition: when there is no name, or one of something that is neither.
    :raises ViewNotFound: when nothing of such a name stands.
    """
    yield from ensure_schema(tracking_schema)
    if names is not None:
        return (yield from tables_of(tracking_schema, (yield from _roots(names))))
    logged = yield from _with_triggers(tracking_schema)
    return (yield from tables_of(tracking_schema, [*logged, *(yield from _on_record(tracking_schema))]))


def unseen(tracking_schema: str, looked_for: Iterable[tuple[int, str]]) -> Work[dict[tuple[int, str], datetime]]:
    """Return which of some tables have changes that a snapshot does not see, and when the latest was made.

    :param looked_for: a table's OID, and a snapshot as text.
    """
    pairs = sorted(set(looked_for))
    rows = yield from fetch_all(
        sql.SQL(
            """
            SELECT w.relation, w.snapshot, l.changed_at
            FROM unnest(%(relations)s::bigint[], %(snapshots)s::text[]) AS w (relation, snapshot)
            JOIN LATERAL (
                SELECT l.changed_at FROM {log} l
                WHERE l.relation = w.relation::oid AND l.transaction_id >= pg_snapshot_xmin(w.snapshot::pg_snapshot)
                  AND NOT pg_visible_in_snapshot(l.transaction_id, w.snapshot::pg_snapshot)
                  -- What was restored from a dump of another server may have numbers that are still to come.
                  AND l.transaction_id < pg_snapshot_xmax(pg_current_snapshot())
                ORDER BY l.transaction_id DESC LIMIT 1
            ) l ON true
            """
        ).format(log=_escaped(_log(tracking_schema))),
        {"relations": [oid for oid, _ in pairs], "snapshots": [snapshot for _, snapshot in pairs]},
        Session.RECORD,
    )
    return {(row["relation"], row["snapshot"]): row["changed_at"] for row in rows}


@dataclass(frozen=True)
class PruneMark:
    """A moment, for :func:`prune` to come back to when all that was under way then has ended.

    :ivar snapshot: what was committed then.
    :ivar transactions: those that were running then, as pg_locks calls them.
    """

    snapshot: str
    transactions: frozenset[str]


def mark() -> Work[PruneMark]:
    """Return a mark for :func:`prune`."""
    row = yield from fetch_one(
        sql.SQL("SELECT pg_current_snapshot()::text AS snapshot, ARRAY({}) AS running").format(_RUNNING),
        session=Session.RECORD,
    )
    assert row is not None
    return PruneMark(row["snapshot"], frozenset(row["running"]))


def prune(tracking_schema: str, mark: PruneMark, limit: int = PRUNED_AT_ONCE) -> Work[int | None]:
    """Delete what says no more than what stays; return how many rows, None where it is too early to tell.

    Of each table the latest row stays, and every earlier one that the last refresh of some view does not see although
    it sees the latest. A refresh that is under way has a snapshot that only it knows. So only what was committed
    before the mark goes, and only when every transaction that was running then has ended: a refresh among them has
    recorded its snapshot by now, and any other sees it all.

    :param limit: how many rows at the most, so that it is a short transaction.
    """
    running = yield from fetch_all(_RUNNING, session=Session.RECORD)
    if mark.transactions & {row["transaction"] for row in running}:
        return None
    row = yield from fetch_one(
        sql.SQL(
            """
            WITH latest AS (
                SELECT relation, max(transaction_id) AS transaction_id FROM {log} GROUP BY relation
            ), needless AS (
                SELECT c.relation, c.transaction_id FROM {log} c JOIN latest l ON l.relation = c.relation
                WHERE pg_visible_in_snapshot(c.transaction_id, %(snapshot)s::pg_snapshot)
                  AND (NOT EXISTS (SELECT FROM pg_catalog.pg_class WHERE oid = c.relation)
                       OR c.transaction_id < l.transaction_id AND NOT EXISTS (
                           SELECT FROM {snapshots} s WHERE pg_visible_in_snapshot(l.transaction_id, s.snapshot)
                             AND NOT pg_visible_in_snapshot(c.transaction_id, s.snapshot)))
                LIMIT %(limit)s
            ), gone AS (
                DELETE FROM {log} c USING needless n
                WHERE c.relation = n.relation AND c.transaction_id = n.transaction_id RETURNING 1
            )
            SELECT count(*) AS rows FROM gone
            """
        ).format(log=_escaped(_log(tracking_schema)), snapshots=_escaped(_snapshots(tracking_schema))),
        {"snapshot": mark.snapshot, "limit": limit},
        Session.RECORD,
    )
    assert row is not None
    return int(row["rows"])


def prune_all(tracking_schema: str, max_wait: float) -> Work[int]:
    """Prune as far as it goes, and return how many rows went.

    :param max_wait: seconds to wait for the transactions that are running now; then it is left to another time.
    """
    yield from ensure_schema(tracking_schema)
    begun = yield from mark()
    waited, rows = 0.0, 0
    while True:
        pruned = yield from prune(tracking_schema, begun)
        if pruned is not None:
            rows += pruned
            if pruned < PRUNED_AT_ONCE:
                return rows
        elif waited >= max_wait:
            yield Note("Transactions that began earlier are still running: the change log can be pruned after them.")
            return rows
        else:
            yield Pause(_LOOK_AGAIN)
            waited += _LOOK_AGAIN


def tables_of(tracking_schema: str, roots: Sequence[int]) -> Work[list[LoggedTable]]:
    """Return the tables that some relations are or read, and what these are partitions or children of, by name.

    Whoever names the parent in a statement changes the children, and fires the parent's triggers alone.

    :param roots: OIDs of tables and materialized views.
    """
    rows = yield from fetch_all(
        _TABLES.format(
            roots=sql.Literal(list(roots)),
            walk=WALK,
            display=DISPLAY,
            function=_function_oid(tracking_schema),
            for_statements=sql.Literal(_FOR_STATEMENTS),
            for_rows=sql.Literal(_FOR_ROWS),
            log=_log(tracking_schema),
        ),
        session=Session.RECORD,
    )
    tables = []
    for row in rows:
        name = ResolvedName(row.pop("schema"), row.pop("name"), row.pop("display"))
        views, parents = tuple(row.pop("views")), tuple(row.pop("parents"))
        tables.append(LoggedTable(name=name, views=views, parents=parents, **row))
    return tables


_TABLES = sql.SQL(
    """
    WITH RECURSIVE roots AS (SELECT unnest({roots}::bigint[])::oid AS oid), {walk}, lineage (root, oid) AS (
        SELECT r.root, r.object FROM reads r JOIN pg_catalog.pg_class c ON c.oid = r.object
        WHERE r.class = 'pg_class'::regclass AND (c.relkind IN ('r', 'p', 'f') OR c.relkind = 'm' AND c.oid <> r.root)
        UNION
        SELECT l.root, i.inhparent FROM lineage l JOIN pg_catalog.pg_inherits i ON i.inhrelid = l.oid
    ), tables AS (
        SELECT oid, array_agg(root) AS roots FROM lineage GROUP BY oid
    )
    SELECT c.oid::bigint AS oid, n.nspname::text AS schema, c.relname::text AS name, {display} AS display,
           c.relkind::text AS relkind,
           ARRAY(SELECT {display} FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE c.oid = ANY(tables.roots) AND c.relkind = 'm' ORDER BY 1) AS views,
           ARRAY(SELECT i.inhparent::bigint FROM pg_catalog.pg_inherits i WHERE i.inhrelid = c.oid) AS parents,
           s.tgname::text AS trigger, s.tgenabled::text AS enabled, coalesce(s.tgnargs > 0, false) AS bell,
           r.tgname::text AS row_trigger, r.tgenabled::text AS row_enabled,
           EXISTS (SELECT FROM pg_catalog.pg_subscription_rel WHERE srrelid = c.oid) AS replicated,
           pg_catalog.pg_has_role(c.relowner, 'USAGE') AS owned,
           latest.transaction_id AS latest, latest.changed_at
    FROM tables JOIN pg_catalog.pg_class c ON c.oid = tables.oid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_catalog.pg_trigger s ON s.tgrelid = c.oid AND s.tgfoid = {function} AND s.tgtype = {for_statements}
    LEFT JOIN pg_catalog.pg_trigger r ON r.tgrelid = c.oid AND r.tgfoid = {function} AND r.tgtype = {for_rows}
    LEFT JOIN LATERAL (
        SELECT l.transaction_id::text AS transaction_id, l.changed_at FROM {log} l WHERE l.relation = c.oid
        ORDER BY l.transaction_id DESC LIMIT 1
    ) latest ON true
    ORDER BY n.nspname, c.relname
    """
)

#: The other transactions that run; every role may ask (https://www.postgresql.org/docs/current/view-pg-locks.html).
_RUNNING = sql.SQL(
    "SELECT l.virtualtransaction AS transaction FROM pg_catalog.pg_locks l "
    "LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid "
    "WHERE l.locktype = 'virtualxid' AND l.granted AND l.pid <> pg_backend_pid() "
    "AND (a.datname IS NULL OR a.datname = current_database())"
)


def _roots(names: Sequence[str]) -> Work[list[int]]:
    if isinstance(names, str) or not names:
        raise InvalidDefinition("No view or table is named.", hint='name them, as in install_change_log("my_view").')
    oids = []
    for text in names:
        name = yield from catalog.resolve(ViewName.parse(text), session=Session.RECORD)
        row = yield from fetch_one(
            sql.SQL(
                "SELECT c.oid::bigint AS oid, c.relkind::text AS relkind FROM pg_catalog.pg_class c "
                "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s"
            ),
            (name.schema, name.name),
            Session.RECORD,
        )
        if row is None:
            raise ViewNotFound(f"There is no view or table {name.display}.", hint="check its schema and spelling.")
        if row["relkind"] not in ("r", "p", "m"):
            raise InvalidDefinition(f"{name.display} is neither a materialized view nor a table.")
        oids.append(int(row["oid"]))
    return oids


def _with_triggers(tracking_schema: str) -> Work[list[int]]:
    rows = yield from fetch_all(
        sql.SQL("SELECT DISTINCT tgrelid::bigint AS oid FROM pg_catalog.pg_trigger WHERE tgfoid = {}").format(
            _function_oid(tracking_schema)
        ),
        session=Session.RECORD,
    )
    return [row["oid"] for row in rows]


def _on_record(tracking_schema: str) -> Work[list[int]]:
    rows = yield from fetch_all(
        sql.SQL(
            "SELECT c.oid::bigint AS oid FROM {} d JOIN pg_catalog.pg_namespace n ON n.nspname = d.schema_name "
            "JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = d.view_name AND c.relkind = 'm'"
        ).format(sql.Identifier(tracking_schema, "mat_view_definitions")),
        session=Session.RECORD,
    )
    return [row["oid"] for row in rows]


def _function_statements(tracking_schema: str) -> Work[list[sql.Composed]]:
    """Return what makes the function what it should be; nothing where it is that."""
    path = f"pg_catalog, {sql.Identifier(tracking_schema).as_string(None)}, pg_temp"
    row = yield from fetch_one(
        sql.SQL(
            "SELECT 1 AS one FROM pg_catalog.pg_proc WHERE oid = {} AND prosrc = {} AND prosecdef "
            "AND proconfig = ARRAY[{}] AND NOT has_function_privilege('public', oid, 'EXECUTE')"
        ).format(_function_oid(tracking_schema), sql.Literal(_BODY), sql.Literal(f"search_path={path}")),
        session=Session.RECORD,
    )
    if row is not None:
        return []
    function = sql.Identifier(tracking_schema, _FUNCTION)
    return [
        sql.SQL(
            "CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER "
            "SET search_path = pg_catalog, {}, pg_temp AS {}"
        ).format(function, sql.Identifier(tracking_schema), sql.Literal(_BODY)),
        # Whoever may call it could put it on tables of their own, and fill the log.
        sql.SQL("REVOKE EXECUTE ON FUNCTION {}() FROM PUBLIC").format(function),
    ]


def _make_function(tracking_schema: str, statements: Sequence[sql.Composed]) -> Work[None]:
    yield Command(sql.SQL("BEGIN ISOLATION LEVEL READ COMMITTED"))
    try:
        # Two who replace it at once would fail ("tuple concurrently updated").
        yield from fetch_one(
            sql.SQL("SELECT pg_advisory_xact_lock(hashtextextended({}, 0))::text AS locked").format(
                sql.Literal(f"airflow_provider_matviews change log {tracking_schema}")
            )
        )
        for statement in statements:
            yield Command(statement)
        yield Command(sql.SQL("COMMIT"))
    except BaseException:
        yield Command(sql.SQL("ROLLBACK"), undoing=True)
        raise


def _install_statements(tracking_schema: str, table: LoggedTable, bell: bool) -> list[sql.Composed]:
    # Another tracking schema may have its own trigger on the table.
    name = table.trigger or shorten(f"mat_view_change_log_{tracking_schema}", 63)
    statements = [_trigger(tracking_schema, table, name, "INSERT OR UPDATE OR DELETE OR TRUNCATE", "STATEMENT", bell)]
    if table.owned:
        # Also for those who load data with session_replication_role = replica.
        statements.append(_enable(table, "ALWAYS", name))
    if table.owned and table.replicated:
        row_name = table.row_trigger or shorten(f"mat_view_change_log_rows_{tracking_schema}", 63)
        statements += [
            _trigger(tracking_schema, table, row_name, "INSERT OR UPDATE OR DELETE", "ROW", bell),
            # For what replication applies alone: other writers do not pay for it.
            _enable(table, "REPLICA", row_name),
        ]
    if table.gap is not None:
        statements.append(
            sql.SQL(
                "INSERT INTO {} (relation, transaction_id) VALUES ({}::bigint::oid, pg_current_xact_id()) "
                "ON CONFLICT DO NOTHING"
            ).format(_log(tracking_schema), sql.Literal(table.oid))
        )
    return statements


def _trigger(tracking_schema: str, table: LoggedTable, name: str, events: str, each: str, bell: bool) -> sql.Composed:
    return sql.SQL("CREATE {} {} AFTER {} ON {} FOR EACH {} EXECUTE FUNCTION {}({})").format(
        # Only our own is ever replaced.
        sql.SQL("OR REPLACE TRIGGER" if name in (table.trigger, table.row_trigger) else "TRIGGER"),
        sql.Identifier(name),
        sql.SQL(events),
        table.name.identifier,
        sql.SQL(each),
        sql.Identifier(tracking_schema, _FUNCTION),
        sql.SQL("'bell'" if bell else ""),
    )


def _enable(table: LoggedTable, when: str, name: str) -> sql.Composed:
    return sql.SQL("ALTER TABLE {} ENABLE {} TRIGGER {}").format(
        table.name.identifier,
        sql.SQL(when),
        sql.Identifier(name),
    )


def _change(table: LoggedTable, statements: Sequence[sql.Composed], patience: Patience) -> Work[None]:
    """Change a table's triggers in one transaction, in which nobody queues behind us for long."""

    def attempt() -> Work[None]:
        for statement in statements:
            yield Command(statement)

    yield Command(sql.SQL("BEGIN ISOLATION LEVEL READ COMMITTED"))
    try:
        yield from fetch_one(
            sql.SQL("SELECT set_config('lock_timeout', {}, true) AS set").format(
                sql.Literal(patience.lock_timeout_setting)
            )
        )
        yield from politely(table.name, patience, attempt)
        yield Command(sql.SQL("COMMIT"))
    except BaseException as error:
        yield Command(sql.SQL("ROLLBACK"), undoing=True)
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            raise (yield from _explained(table, error)) from error
        raise


def _explained(table: LoggedTable, error: psycopg.Error) -> Work[MissingPrivilege]:
    row = yield from fetch_one(sql.SQL("SELECT current_user::text AS role"), session=Session.RECORD)
    assert row is not None
    role = sql.Identifier(row["role"]).as_string(None)
    return MissingPrivilege(
        f"The role {role} may not change the triggers of {table.name.display}: {error.diag.message_primary}.",
        hint=f"to install them: GRANT TRIGGER ON {table.name.ddl} TO {role}; to remove them, run it as its owner. The "
        "function belongs to who made it first: GRANT EXECUTE ON FUNCTION ... as the message says, or use that role.",
    )


def _response(
    statements: Sequence[sql.Composed], tables: Sequence[LoggedTable], gaps: dict[str, str]
) -> ChangeLogResponse:
    return ChangeLogResponse(
        tuple(statement.as_string(None) for statement in statements),
        tuple(table.name.display for table in tables),
        gaps,
    )


def _function_oid(tracking_schema: str) -> sql.Composed:
    name = sql.Identifier(tracking_schema, _FUNCTION).as_string(None)
    return sql.SQL("to_regprocedure({})").format(sql.Literal(f"{name}()"))


def _log(tracking_schema: str) -> sql.Composable:
    return sql.Identifier(tracking_schema, "mat_view_changes")


def _snapshots(tracking_schema: str) -> sql.Composable:
    """Return what the last refresh of every view on record saw, as ``snapshot``."""
    return sql.SQL(
        "(SELECT (source_state->>'snapshot')::pg_snapshot AS snapshot FROM {} WHERE source_state IS NOT NULL)"
    ).format(sql.Identifier(tracking_schema, "mat_view_definitions"))


def _escaped(part: sql.Composable) -> sql.SQL:
    # Where a statement has parameters psycopg would take a % in a name for a placeholder.
    return sql.SQL(part.as_string(None).replace("%", "%%"))
