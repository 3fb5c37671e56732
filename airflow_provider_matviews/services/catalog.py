"""What PostgreSQL says a view is: typed pictures of the system catalogs. Reads, and never changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import sql

from airflow_provider_matviews.exceptions import MissingPrivilege, NotAMaterializedView, ViewNotFound
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.instructions import Session, Work, fetch_all, fetch_one

_NOTHING = sql.SQL("NULL")

#: pg_class.relkind in words (https://www.postgresql.org/docs/current/catalog-pg-class.html).
MATERIALIZED_VIEW = "a materialized view"
_KINDS = {
    "r": "a table",
    "p": "a partitioned table",
    "v": "a plain view",
    "m": MATERIALIZED_VIEW,
    "i": "an index",
    "I": "a partitioned index",
    "S": "a sequence",
    "c": "a composite type",
    "f": "a foreign table",
    "t": "a TOAST table",
}


@dataclass(frozen=True)
class ServerFacts:
    """What an operation has to know of the server and of its own role.

    :ivar pid: the server's process; behind a transaction pooler, as long as the transaction lasts.
    """

    version: int
    pid: int
    role: str
    database: str
    search_path: str
    in_recovery: bool
    read_only: bool
    track_counts: bool


@dataclass(frozen=True)
class ResolvedName:
    """A view's name with its schema.

    :ivar display: as one would type it, without the schema where that is ``public``.
    """

    schema: str
    name: str
    display: str

    @property
    def identifier(self) -> sql.Identifier:
        """For a statement."""
        return sql.Identifier(self.schema, self.name)

    @property
    def ddl(self) -> str:
        """Quoted for a statement that a person copies."""
        return self.identifier.as_string(None)


@dataclass(frozen=True)
class ViewFacts:
    """A materialized view that stands."""

    oid: int
    owner: str
    populated: bool
    reltuples: float
    can_own: bool
    can_maintain: bool
    #: Whether the role may look into the view's schema, and whether it owns that schema.
    can_use_schema: bool
    can_own_schema: bool
    #: Rows that this transaction has already written to it, as the server counts them.
    inserted: int
    deleted: int
    #: Rows that are dead and still take room, as far as the server has counted.
    dead_rows: int
    #: Whether its owner may make temporary tables, which REFRESH ... CONCURRENTLY does.
    owner_may_temp: bool
    #: How far the server has written WAL, or a standby replayed it, in bytes.
    wal_position: int

    @property
    def estimated_rows(self) -> int | None:
        """The planner's estimate; None before the first ANALYZE or index build."""
        return None if self.reltuples < 0 or not self.populated else int(self.reltuples)


@dataclass(frozen=True)
class IndexFacts:
    """An index that stands on a view."""

    name: str
    definition: str
    unique: bool
    valid: bool
    immediate: bool
    partial: bool
    expressions: bool
    columns: tuple[str, ...]

    @property
    def obstacle(self) -> str | None:
        """Why REFRESH ... CONCURRENTLY cannot use it; None when it can."""
        if not self.unique:
            return "is not unique"
        if not self.valid:
            return "is INVALID (a build of it failed half-way)"
        if self.partial:
            return "is partial (it has a WHERE clause)"
        if self.expressions:
            return "is over an expression, not only plain columns"
        if not self.immediate:
            return "is not immediate"
        return None


def resolve(view: ViewName, *, creating: bool = False, session: Session = Session.WORK) -> Work[ResolvedName]:
    """Find the schema of a name as the server would: what stands on the search path, else where it would be made.

    :param creating: resolve as CREATE does, which looks at the first schema of the path alone.
    :raises ViewNotFound: when no schema of the search path exists.
    """
    _, resolved = yield from arrive(view, creating=creating, session=session)
    return resolved


def arrive(
    view: ViewName,
    *,
    creating: bool = False,
    session: Session = Session.WORK,
    settings: sql.Composable = _NOTHING,
) -> Work[tuple[ServerFacts, ResolvedName]]:
    """Ask, in one round trip, where we are and which view a name means there; as :func:`resolve` does.

    :param settings: expressions to evaluate with it, such as ``set_config(...)``.
    """
    row = yield from fetch_one(
        sql.SQL(
            """
            SELECT ARRAY[{settings}]::text[] AS settings,
                   current_setting('server_version_num')::integer AS version, pg_backend_pid() AS pid,
                   current_user::text AS role, current_database()::text AS database,
                   current_setting('search_path') AS search_path,
                   pg_catalog.pg_is_in_recovery() AS in_recovery,
                   current_setting('transaction_read_only')::boolean AS read_only,
                   current_setting('track_counts')::boolean AS track_counts,
                   s.schema, quote_ident(s.schema) AS quoted_schema, quote_ident(%(name)s) AS quoted_name
            FROM (SELECT coalesce(
                %(schema)s::text,
                CASE WHEN NOT %(creating)s THEN (
                    SELECT n.nspname::text FROM pg_catalog.pg_class c
                    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                    WHERE c.oid = to_regclass(quote_ident(%(name)s))
                ) END,
                current_schema()::text) AS schema) s
            """
        ).format(settings=settings),
        {"schema": view.schema, "name": view.name, "creating": creating},
        session,
    )
    assert row is not None
    del row["settings"]
    schema, quoted_schema, display = row.pop("schema"), row.pop("quoted_schema"), row.pop("quoted_name")
    server = ServerFacts(**row)
    if schema is None:
        raise ViewNotFound(
            f"{view} has no schema, and the search path ({server.search_path or 'empty'}) holds none that exists.",
            hint=f"name the schema: schema.{view}",
        )
    return server, ResolvedName(schema, view.name, display if schema == "public" else f"{quoted_schema}.{display}")


def named(views: Sequence[ResolvedName] | None) -> dict[str, list[str] | None]:
    """Return the parameters ``schemas`` and ``names`` of a statement about several views; None of them for all."""
    if views is None:
        return {"schemas": None, "names": None}
    return {"schemas": [view.schema for view in views], "names": [view.name for view in views]}


def former_name(name: str, view: ResolvedName) -> ResolvedName:
    """Return the name that a view has had; without a schema, one in the view's."""
    parsed = ViewName.parse(name)
    former = ViewName(parsed.name, parsed.schema or view.schema)
    display = str(ViewName(former.name)) if former.schema == "public" else str(former)
    return ResolvedName(former.schema or view.schema, former.name, display)


def kinds_of(*views: ResolvedName, session: Session = Session.WORK) -> Work[list[str | None]]:
    """Return what stands under each name, in words such as :data:`MATERIALIZED_VIEW`; None where nothing does."""
    rows = yield from fetch_all(
        sql.SQL(
            "SELECT n.nspname::text AS schema, c.relname::text AS name, c.relkind::text AS kind "
            "FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE (n.nspname, c.relname) IN ({})"
        ).format(
            sql.SQL(", ").join(
                sql.SQL("({}, {})").format(sql.Literal(view.schema), sql.Literal(view.name)) for view in views
            )
        ),
        session=session,
    )
    kinds = {(row["schema"], row["name"]): _kind(row["kind"]) for row in rows}
    return [kinds.get((view.schema, view.name)) for view in views]


def _kind(relkind: str) -> str:
    return _KINDS.get(relkind, "something else")


def find_view(view: ResolvedName) -> Work[ViewFacts | None]:
    """Return the materialized view of this name, or None where nothing stands.

    :raises NotAMaterializedView: when something else does.
    """
    row = yield from fetch_one(
        sql.SQL(
            """
            SELECT c.oid::bigint AS oid, c.relkind::text AS relkind, pg_get_userbyid(c.relowner)::text AS owner,
                   c.relispopulated AS populated, c.reltuples::double precision AS reltuples,
                   pg_stat_get_xact_tuples_inserted(c.oid) AS inserted,
                   pg_stat_get_xact_tuples_deleted(c.oid) AS deleted,
                   pg_stat_get_dead_tuples(c.oid) AS dead_rows,
                   has_database_privilege(c.relowner, current_database(), 'TEMP') AS owner_may_temp,
                   ((CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END)
                    - '0/0'::pg_lsn)::bigint AS wal_position,
                   pg_has_role(c.relowner, 'USAGE') AS can_own,
                   CASE WHEN current_setting('server_version_num')::integer >= 170000
                        THEN has_table_privilege(c.oid, {maintain})
                        ELSE pg_has_role(c.relowner, 'USAGE') END AS can_maintain,
                   has_schema_privilege(n.oid, 'USAGE') AS can_use_schema,
                   pg_has_role(n.nspowner, 'USAGE') AS can_own_schema
            FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = %(schema)s AND c.relname = %(name)s
            """
        ).format(
            # Older servers refuse the word even in a branch not taken, when it is a constant.
            maintain=sql.SQL(
                "CASE WHEN current_setting('server_version_num')::integer >= 170000 THEN 'MAINTAIN' ELSE 'SELECT' END"
            )
        ),
        {"schema": view.schema, "name": view.name},
    )
    if row is None:
        return None
    if (kind := row.pop("relkind")) != "m":
        raise NotAMaterializedView(
            f"{view.display} is {_kind(kind)}, not {MATERIALIZED_VIEW}.",
            hint="choose another name, or drop or rename what stands there.",
        )
    return ViewFacts(**row)


def require_view(view: ResolvedName) -> Work[ViewFacts]:
    """Return the materialized view of this name.

    :raises ViewNotFound: when nothing stands under it.
    :raises NotAMaterializedView: when something else does.
    """
    facts = yield from find_view(view)
    if facts is None:
        raise ViewNotFound(
            f"The materialized view {view.display} does not exist.",
            hint="create it first (CreateMatViewOperator or hook.create()), or check the name, the schema and "
            "the connection's database.",
        )
    return facts


def membership(owner: str, server: ServerFacts) -> str:
    """Return the GRANT that lets the role act as ``owner``; from PostgreSQL 16 on, for a NOINHERIT role too."""
    granted, role = (sql.Identifier(name).as_string(None) for name in (owner, server.role))
    if server.version >= 160000:
        return f"GRANT {granted} TO {role} WITH INHERIT TRUE;"
    return f"GRANT {granted} TO {role};"


def require_schema_usage(view: ResolvedName, facts: ViewFacts, server: ServerFacts) -> None:
    """Refuse what PostgreSQL would refuse, in words that name the view and the GRANT.

    :raises MissingPrivilege: when the role may not look into the view's schema.
    """
    if facts.can_use_schema:
        return
    schema, role = (sql.Identifier(name).as_string(None) for name in (view.schema, server.role))
    raise MissingPrivilege(
        f"The role {role} may not reach {view.display}: it lacks USAGE on the schema {schema}.",
        hint=f"run: GRANT USAGE ON SCHEMA {schema} TO {role};",
    )


def query_of(view: ResolvedName) -> Work[str | None]:
    """Return a view's query as PostgreSQL words it, or None where no materialized view stands."""
    row = yield from fetch_one(
        sql.SQL(
            "SELECT pg_get_viewdef(c.oid) AS query FROM pg_catalog.pg_class c "
            "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND c.relname = %s AND c.relkind = 'm'"
        ),
        (view.schema, view.name),
    )
    return None if row is None else str(row["query"])


def rule_of(view: ResolvedName) -> Work[str | None]:
    """Return what changes with a view's stored query, read without any lock on what the query reads; None for none."""
    row = yield from fetch_one(
        sql.SQL(
            "SELECT w.oid || ':' || w.xmin AS rule FROM pg_catalog.pg_rewrite w "
            "JOIN pg_catalog.pg_class c ON c.oid = w.ev_class JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND c.relname = %s AND w.rulename = '_RETURN'"
        ),
        (view.schema, view.name),
    )
    return None if row is None else str(row["rule"])


def heap_size_of(oid: int) -> Work[int]:
    """Return the bytes that a relation takes with TOAST, without its indexes."""
    row = yield from fetch_one(sql.SQL("SELECT pg_table_size({}::oid) AS size").format(sql.Literal(oid)))
    assert row is not None
    return int(row["size"] or 0)


def columns_of(oid: int) -> Work[list[tuple[str, str]]]:
    """Return the names and types of a relation's columns, in order."""
    rows = yield from fetch_all(
        sql.SQL(
            "SELECT attname::text AS name, format_type(atttypid, atttypmod) AS type "
            "FROM pg_catalog.pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
        ),
        (oid,),
    )
    return [(row["name"], row["type"]) for row in rows]


def indexes_of(oid: int) -> Work[list[IndexFacts]]:
    """Return a view's indexes, by name."""
    rows = yield from fetch_all(
        sql.SQL(
            """
            SELECT c.relname::text AS name, pg_get_indexdef(i.indexrelid) AS definition, i.indisunique AS unique,
                   i.indisvalid AS valid, i.indimmediate AS immediate, i.indpred IS NOT NULL AS partial,
                   i.indexprs IS NOT NULL AS expressions,
                   ARRAY(SELECT a.attname::text FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, n)
                         JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
                         WHERE k.n <= i.indnkeyatts ORDER BY k.n) AS columns
            FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
            WHERE i.indrelid = %s ORDER BY c.relname
            """
        ),
        (oid,),
    )
    return [IndexFacts(**{**row, "columns": tuple(row["columns"])}) for row in rows]


def dependents_of(oid: int, session: Session = Session.WORK) -> Work[list[str]]:
    """Return descriptions of everything that DROP ... CASCADE would take along, through any depth.

    Follows pg_depend (https://www.postgresql.org/docs/current/catalog-pg-depend.html) over the view's row type
    too, so that functions and table columns of that type are found. A view's own rule stands for the view.
    """
    rows = yield from fetch_all(
        sql.SQL(
            """
            WITH RECURSIVE reached (classid, objid, objsubid, own) AS (
                SELECT 'pg_class'::regclass::oid, %(oid)s::oid, 0, true
                UNION
                SELECT target.classid, target.objid, target.objsubid, target.own
                FROM reached r
                JOIN pg_catalog.pg_depend d
                  ON d.refclassid = r.classid AND d.refobjid = r.objid AND d.deptype IN ('n', 'a', 'i')
                 AND (r.objsubid = 0 OR d.refobjsubid IN (0, r.objsubid))
                LEFT JOIN pg_catalog.pg_rewrite w
                  ON d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid AND w.rulename = '_RETURN'
                CROSS JOIN LATERAL (
                    SELECT CASE WHEN w.oid IS NULL THEN d.classid ELSE 'pg_class'::regclass::oid END,
                           CASE WHEN w.oid IS NULL THEN d.objid ELSE w.ev_class END,
                           CASE WHEN w.oid IS NULL THEN d.objsubid ELSE 0 END,
                           r.own AND (d.deptype IN ('a', 'i') OR coalesce(w.ev_class = %(oid)s, false))
                ) AS target (classid, objid, objsubid, own)
            )
            SELECT DISTINCT pg_describe_object(r.classid, r.objid, r.objsubid) AS description
            FROM reached r
            WHERE NOT EXISTS (SELECT 1 FROM reached mine
                              WHERE mine.own AND (mine.classid, mine.objid) = (r.classid, r.objid))
              -- What belongs to another dependent (its row type, its indexes) needs no line of its own.
              AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_depend part
                              WHERE (part.classid, part.objid) = (r.classid, r.objid)
                                AND (part.deptype = 'i' OR (part.deptype = 'a' AND r.classid IN
                                     ('pg_class'::regclass, 'pg_statistic_ext'::regclass)))
                                AND r.objsubid = 0)
            ORDER BY 1
            """
        ),
        {"oid": oid},
        session,
    )
    return [row["description"] for row in rows]


def sources_of(oid: int) -> Work[list[str]]:
    """Return the names of the relations that a view's query reads directly."""
    rows = yield from fetch_all(
        sql.SQL(
            """
            SELECT DISTINCT format('%%I.%%I', n.nspname, c.relname) AS name
            FROM pg_catalog.pg_rewrite w
            JOIN pg_catalog.pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
             AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> w.ev_class
            JOIN pg_catalog.pg_class c ON c.oid = d.refobjid
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE w.ev_class = %(oid)s ORDER BY 1
            """
        ),
        {"oid": oid},
    )
    return [row["name"] for row in rows]


def blockers_of(view: ResolvedName, others: Sequence[int] = ()) -> Work[list[dict[str, Any]]]:
    """Return who is in the way of an operation: pid, user, application, age in seconds, query head, autovacuum.

    Who holds more than a reader's lock on the view goes before mere readers of it; of what the view reads,
    only an exclusive lock is in the way. Asked on the record's connection: pg_stat_activity stands still inside a
    transaction (measured).

    :param others: OIDs of further relations that are to be locked.
    """
    rows = yield from fetch_all(
        sql.SQL(
            """
            WITH view AS (
                SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = %(schema)s AND c.relname = %(name)s
            ), sources AS (
                SELECT DISTINCT d.refobjid FROM view v JOIN pg_catalog.pg_rewrite w ON w.ev_class = v.oid
                JOIN pg_catalog.pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
                 AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> v.oid
            ), held AS (
                SELECT l.pid, bool_or(l.mode <> 'AccessShareLock') AS more FROM pg_catalog.pg_locks l
                WHERE l.granted
                  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
                  AND (l.relation IN (SELECT oid FROM view) OR l.relation = ANY(%(others)s::bigint[]::oid[])
                       OR (l.mode = 'AccessExclusiveLock' AND l.relation IN (SELECT refobjid FROM sources)))
                GROUP BY l.pid
            )
            SELECT a.pid, a.usename::text AS user, a.application_name AS application,
                   round(extract(epoch FROM clock_timestamp() - a.xact_start))::integer AS age,
                   left(regexp_replace(a.query, '\\s+', ' ', 'g'), 80) AS query,
                   coalesce(a.backend_type = 'autovacuum worker' AND a.query NOT LIKE '%%to prevent wraparound%%',
                            a.usename IS NULL AND a.query LIKE 'autovacuum:%%') AS autovacuum, h.more
            FROM held h JOIN pg_catalog.pg_stat_activity a ON a.pid = h.pid
            ORDER BY a.xact_start
            """
        ),
        {"schema": view.schema, "name": view.name, "others": list(others)},
        Session.RECORD,
    )
    strict = [row for row in rows if row.pop("more")]
    return strict or rows
