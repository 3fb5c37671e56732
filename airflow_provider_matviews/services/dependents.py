"""What is built on a view and can be pointed at another one in its place; and what cannot.

A plain view, a rule, a policy and an SQL-standard function keep their OID, and with it grants, owner and comment,
when they are defined again; so they follow a view that was rebuilt. A materialized view on top, or anything
that is tied to the view's row type, cannot follow.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from psycopg import sql

from airflow_provider_matviews.names import ViewName, quote
from airflow_provider_matviews.services.instructions import Command, Work, fetch_all, raw
from airflow_provider_matviews.services.plan_steps import Lock
from airflow_provider_matviews.services.response import Report


@dataclass(frozen=True)
class Dependent:
    """Something that reads the view directly.

    :ivar relation: the relation to lock before the view is cut: itself, or the table of a rule or policy.
    :ivar locked: the description of that relation.
    :ivar statement: what defines it again, as read while the view still has its name.
    :ivar extensions: extensions that it goes with, which being defined again would forget.
    """

    kind: Literal["view", "rule", "policy", "function"]
    description: str
    relation: int | None
    locked: str | None
    lock: str | None
    statement: str
    extensions: tuple[str, ...]

    @property
    def on(self) -> tuple[str, ...]:
        """What is locked, for a report."""
        return () if self.locked is None else (self.locked,)


def blocking_dependents(oid: int) -> Work[list[str]]:
    """Return descriptions of what keeps a view from being rebuilt: what cannot follow, or may not be redefined."""
    rows = yield from fetch_all(_BLOCKING, {"oid": oid})
    return [row["description"] for row in rows]


def reader_hazards(oid: int) -> Work[list[str]]:
    """Return what would meet an error at a cut while somebody runs it, each a clause for a person.

    An SQL-standard function cannot be locked: who has begun to run it waits for the old view, and finds it gone.
    """
    rows = yield from fetch_all(_FUNCTIONS, {"oid": oid})
    return [f"whoever runs {row['description']} at the moment of the cut would meet an error" for row in rows]


def read_dependents(oid: int) -> Work[list[Dependent]]:
    """Return what has to be pointed at the new view, those read last first.

    Taken under ``search_path = pg_catalog``, so that every name in a statement is qualified.
    """
    rows = yield from fetch_all(_DEPENDENTS, {"oid": oid})
    return [
        Dependent(**{**row, "statement": row["statement"].strip().rstrip(";"), "extensions": tuple(row["extensions"])})
        for row in rows
    ]


def columns_used(oid: int) -> Work[list[tuple[str, str]]]:
    """Return each column of a view that something built on it reads by name, with what that is."""
    rows = yield from fetch_all(_COLUMNS_USED, {"oid": oid})
    return [(row["name"], row["description"]) for row in rows]


def bound_by_position(
    dependents: Sequence[Dependent], view: ViewName, before: Sequence[str], after: Sequence[str]
) -> list[str]:
    """Return descriptions of what would silently read other columns of a view whose columns are others.

    PostgreSQL words a list of column aliases by position (``mv m(x, y)``), so that its text means other columns once
    they stand in another order; that of a join (``(mv JOIN t ...) j(x, y)``) also when there are more or fewer.

    :param view: the view, with its schema.
    :param before: names of its columns, in order.
    :param after: what they are to be.
    """
    if list(before) == list(after):
        return []
    moved = list(after[: len(before)]) != list(before)
    name = r"\.".join(
        f"(?:{re.escape(quote(part))}|{_quoted_in_a_pattern(part)})" for part in (view.schema or "", view.name)
    )
    listed = re.compile(rf"(?<![\w.\"]){name} {_IDENTIFIER}\(")
    return [
        each.description
        for each in dependents
        if (moved and listed.search(each.statement)) or _JOIN_WITH_A_LIST.search(each.statement)
    ]


def _quoted_in_a_pattern(name: str) -> str:
    return re.escape('"' + name.replace('"', '""') + '"')


_IDENTIFIER = r'(?:"(?:[^"]|"")+"|[^\W\d][\w$]*)'
#: Also a subquery with such a list, which need not read the view: rather refused than read wrongly.
_JOIN_WITH_A_LIST = re.compile(rf"\) {_IDENTIFIER}\(")


def set_deadline(deadline: float) -> Work[None]:
    """Let the next lock wait no longer than until ``deadline`` (monotonic seconds)."""
    left = max(1, round((deadline - time.monotonic()) * 1000))
    yield from fetch_all(sql.SQL("SELECT set_config('lock_timeout', {}, true)").format(sql.Literal(f"{left}ms")))


def lock_dependents(dependents: Sequence[Dependent], report: Report, deadline: float | None = None) -> Work[None]:
    """Lock them as redefining them will, before the view itself: in the order in which readers lock.

    Setting the owner that is there already is the one statement that takes ACCESS EXCLUSIVE on a view and
    changes nothing; LOCK TABLE would lock every table beneath it too.

    :param deadline: when to give up, for all of them together: readers queue behind those that are had already.
    """
    locks = {each.lock: each.on for each in dependents if each.lock is not None}
    for statement, on in locks.items():
        if deadline is not None:
            yield from set_deadline(deadline)
        yield from report.run("lock", Command(raw(statement)), lock=Lock.ACCESS_EXCLUSIVE, on=on)


def repoint(dependents: Sequence[Dependent], report: Report) -> Work[None]:
    """Define them again, now that the view's name means the new one."""
    for dependent in dependents:
        step = f"re-point {dependent.description}"
        # A function is replaced without a lock.
        lock = Lock.ACCESS_EXCLUSIVE if dependent.on else Lock.NONE
        yield from report.run(step, Command(raw(dependent.statement)), lock=lock, on=dependent.on)
        for extension in dependent.extensions:
            yield from report.run(step, Command(raw(extension)))


# Who depends on the view: on the relation itself, or on its row type and the array of that.
_DIRECT = """
    WITH target AS (
        SELECT c.oid, c.reltype, t.typarray FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_type t ON t.oid = c.reltype WHERE c.oid = %(oid)s
    ), direct AS (
        SELECT DISTINCT d.classid, d.objid, d.objsubid, v.by_type
        -- One look-up in pg_depend's index each: joined with OR the planner reads all of it (40 ms, measured).
        FROM (SELECT oid, 'pg_class'::regclass AS refclassid, oid AS refobjid, false AS by_type FROM target
              UNION ALL SELECT oid, 'pg_type'::regclass, reltype, true FROM target
              UNION ALL SELECT oid, 'pg_type'::regclass, typarray, true FROM target) v
        JOIN pg_catalog.pg_depend d ON d.refclassid = v.refclassid AND d.refobjid = v.refobjid
        WHERE d.deptype IN ('n', 'a')
          AND NOT (d.classid = 'pg_rewrite'::regclass
                   AND EXISTS (SELECT 1 FROM pg_catalog.pg_rewrite w WHERE w.oid = d.objid AND w.ev_class = v.oid))
          AND NOT (d.classid = 'pg_class'::regclass
                   AND EXISTS (SELECT 1 FROM pg_catalog.pg_index x WHERE x.indexrelid = d.objid AND x.indrelid = v.oid))
          AND NOT (d.classid = 'pg_statistic_ext'::regclass)
    )
"""

_BLOCKING = sql.SQL(
    _DIRECT
    + """
    SELECT DISTINCT CASE
        WHEN d.by_type THEN pg_describe_object(d.classid, d.objid, d.objsubid) || ' (tied to its row type)'
        WHEN r.relkind = 'm' THEN 'materialized view ' || r.oid::regclass::text
        WHEN n.nspname LIKE 'pg\\_temp\\_%%' THEN 'temporary view ' || r.relname || ' of an open session'
        WHEN f.oid IS NOT NULL AND f.prosqlbody IS NULL THEN pg_describe_object(d.classid, d.objid, d.objsubid)
        WHEN r.oid IS NULL AND p.oid IS NULL AND f.oid IS NULL
            THEN pg_describe_object(d.classid, d.objid, d.objsubid)
        ELSE pg_describe_object(d.classid, d.objid, d.objsubid) || format(
            ' (the role %%I may not define it again: it belongs to %%I, and needs CREATE on its schema)', current_user,
            pg_get_userbyid(coalesce(r.relowner, p_table.relowner, f.proowner)))
        END AS description
    FROM direct d
    LEFT JOIN pg_catalog.pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid
    LEFT JOIN pg_catalog.pg_class r ON r.oid = w.ev_class
    LEFT JOIN pg_catalog.pg_policy p ON d.classid = 'pg_policy'::regclass AND p.oid = d.objid
    LEFT JOIN pg_catalog.pg_class p_table ON p_table.oid = p.polrelid
    LEFT JOIN pg_catalog.pg_proc f ON d.classid = 'pg_proc'::regclass AND f.oid = d.objid
    LEFT JOIN pg_catalog.pg_namespace n ON n.oid = coalesce(r.relnamespace, f.pronamespace)
    WHERE d.by_type OR r.relkind = 'm' OR n.nspname LIKE 'pg\\_temp\\_%%'
       OR (r.oid IS NULL AND p.oid IS NULL AND f.oid IS NULL)
       OR (f.oid IS NOT NULL AND f.prosqlbody IS NULL)
       OR NOT pg_has_role(coalesce(r.relowner, p_table.relowner, f.proowner), 'USAGE')
       OR (p.oid IS NULL AND (f.oid IS NOT NULL OR w.rulename = '_RETURN')
           AND NOT has_schema_privilege(n.oid, 'CREATE'))
    ORDER BY 1
    """
)

_COLUMNS_USED = sql.SQL(
    """
    SELECT DISTINCT a.attname::text AS name,
           CASE WHEN w.rulename = '_RETURN'
                THEN pg_describe_object('pg_class'::regclass, w.ev_class, 0)
                ELSE pg_describe_object(d.classid, d.objid, 0) END AS description
    FROM pg_catalog.pg_depend d
    JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
    LEFT JOIN pg_catalog.pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid
    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = %(oid)s AND d.refobjsubid > 0
      AND d.deptype IN ('n', 'a') AND coalesce(w.ev_class <> %(oid)s, true)
      AND NOT (d.classid = 'pg_class'::regclass
               AND EXISTS (SELECT FROM pg_catalog.pg_index x WHERE x.indexrelid = d.objid AND x.indrelid = %(oid)s))
      AND d.classid <> 'pg_statistic_ext'::regclass
    ORDER BY 1, 2
    """
)

_FUNCTIONS = sql.SQL(
    _DIRECT
    + """
    SELECT DISTINCT pg_describe_object(d.classid, d.objid, 0) AS description
    FROM direct d JOIN pg_catalog.pg_proc f ON d.classid = 'pg_proc'::regclass AND f.oid = d.objid
    WHERE f.prosqlbody IS NOT NULL ORDER BY 1
    """
)

_DEPENDENTS = sql.SQL(
    _DIRECT
    + """
    SELECT CASE WHEN w.rulename = '_RETURN' THEN 'view' WHEN w.oid IS NOT NULL THEN 'rule'
                WHEN p.oid IS NOT NULL THEN 'policy' ELSE 'function' END AS kind,
           CASE WHEN w.rulename = '_RETURN' THEN 'view ' || r.oid::regclass::text
                ELSE pg_describe_object(d.classid, d.objid, 0) END AS description,
           coalesce(r.oid, t.oid)::bigint AS relation,
           pg_describe_object('pg_class'::regclass, coalesce(r.oid, t.oid), 0) AS locked,
           CASE WHEN r.relkind = 'v'
                THEN format('ALTER VIEW %%s OWNER TO %%I', r.oid::regclass, pg_get_userbyid(r.relowner))
                WHEN r.oid IS NOT NULL OR t.oid IS NOT NULL
                THEN format('ALTER TABLE %%s OWNER TO %%I', coalesce(r.oid, t.oid)::regclass,
                            pg_get_userbyid(coalesce(r.relowner, t.relowner))) END AS lock,
           CASE WHEN w.rulename = '_RETURN' THEN
                    format('CREATE OR REPLACE VIEW %%s%%s AS ', r.oid::regclass,
                           (SELECT ' WITH (' || string_agg(
                                format('%%I = %%L', split_part(o, '=', 1), substr(o, strpos(o, '=') + 1)), ', ') || ')'
                            FROM unnest(r.reloptions) o))
                    || pg_get_viewdef(r.oid)
                WHEN w.oid IS NOT NULL
                THEN regexp_replace(pg_get_ruledef(w.oid), '^CREATE RULE', 'CREATE OR REPLACE RULE')
                WHEN p.oid IS NOT NULL THEN
                    format('ALTER POLICY %%I ON %%s', p.polname, t.oid::regclass)
                    || coalesce(' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')', '')
                    || coalesce(' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')', '')
                ELSE pg_get_functiondef(f.oid) END AS statement,
           ARRAY(SELECT format('ALTER ROUTINE %%s DEPENDS ON EXTENSION %%I', f.oid::regprocedure, e.extname)
                 FROM pg_catalog.pg_depend x JOIN pg_catalog.pg_extension e ON e.oid = x.refobjid
                 WHERE f.oid IS NOT NULL AND x.classid = 'pg_proc'::regclass AND x.objid = f.oid
                   AND x.refclassid = 'pg_extension'::regclass AND x.deptype = 'x') AS extensions
    FROM (SELECT DISTINCT classid, objid FROM direct) d
    LEFT JOIN pg_catalog.pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid
    LEFT JOIN pg_catalog.pg_class r ON r.oid = w.ev_class
    LEFT JOIN pg_catalog.pg_policy p ON d.classid = 'pg_policy'::regclass AND p.oid = d.objid
    LEFT JOIN pg_catalog.pg_class t ON t.oid = p.polrelid
    LEFT JOIN pg_catalog.pg_proc f ON d.classid = 'pg_proc'::regclass AND f.oid = d.objid
    -- What was made later may read what was made before: readers lock it first.
    ORDER BY coalesce(r.oid, t.oid, f.oid) DESC, d.objid
    """
)
