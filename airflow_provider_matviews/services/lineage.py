"""What a view is made of, as the catalogs say: relations with their columns, through plain views and CTEs.

PostgreSQL records of a stored query which relations and which of their columns it refers to (``pg_depend``,
https://www.postgresql.org/docs/current/catalog-pg-depend.html), so nothing is parsed for these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from airflow_provider_matviews.exceptions import MatViewError
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.graph import WALK
from airflow_provider_matviews.services.instructions import Command, Session, Work, fetch_all

#: What reading it may cost: nobody waits for it, and no lock is waited for. Without a search path, so that
#: ``pg_get_viewdef`` writes every name with its schema.
_LIMITS = sql.SQL(
    "SELECT set_config('statement_timeout', '5s', true), set_config('lock_timeout', '100ms', true), "
    "set_config('search_path', '', true)"
)

#: Reads the catalogs alone, which locks nothing that anybody could hold for long.
_RELATIONS = sql.SQL(
    """
    WITH RECURSIVE roots AS (
        SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'm' AND n.nspname = %(schema)s AND c.relname = %(name)s
    ), {walk}, relations AS (
        SELECT DISTINCT r.object AS oid, r.object = r.root AS is_view FROM reads r
        WHERE r.class = 'pg_class'::regclass
    ), referred AS (
        -- Also of what is only read in a subquery; a whole row, and a relation no column of which is read, say 0.
        SELECT d.refobjid AS oid, d.refobjsubid AS attnum
        FROM relations v JOIN pg_catalog.pg_class c ON c.oid = v.oid AND (c.relkind = 'v' OR v.is_view)
        JOIN pg_catalog.pg_rewrite w ON w.ev_class = v.oid AND w.rulename = '_RETURN'
        JOIN pg_catalog.pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
         AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> w.ev_class
    )
    SELECT n.nspname::text AS schema, c.relname::text AS name, v.is_view, c.relkind::text AS kind,
           current_database()::text AS database,
           ARRAY(SELECT ARRAY[a.attname::text, format_type(a.atttypid, a.atttypmod)]
                 FROM pg_catalog.pg_attribute a
                 WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum) AS columns,
           ARRAY(SELECT DISTINCT a.attname::text
                 FROM referred f JOIN pg_catalog.pg_attribute a ON a.attrelid = f.oid
                 WHERE f.oid = c.oid AND f.attnum IN (0, a.attnum) AND a.attnum > 0 AND NOT a.attisdropped
                 ORDER BY 1) AS referred
    FROM relations v JOIN pg_catalog.pg_class c ON c.oid = v.oid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'f', 'm', 'v')
      -- A partition is told by the table that it belongs to, unless the query names it.
      AND (v.is_view OR NOT c.relispartition OR EXISTS (SELECT FROM referred f WHERE f.oid = c.oid))
    ORDER BY 1, 2
    """
).format(walk=WALK)

#: Locks, for as long as it takes, what the queries read.
_TEXTS = sql.SQL(
    """
    SELECT n.nspname::text AS schema, c.relname::text AS name, pg_get_viewdef(c.oid) AS query,
           CASE WHEN c.relkind = 'm' THEN pg_total_relation_size(c.oid) END AS size
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('m', 'v') AND (n.nspname::text, c.relname::text) IN
          (SELECT * FROM unnest(%(schemas)s::text[], %(names)s::text[]))
    """
)


@dataclass(frozen=True)
class Relation:
    """A relation that a view reads, or the view itself.

    :ivar columns: names and types, in order.
    :ivar referred: names of the columns that are read, be it only in a condition.
    :ivar query: of a view; None for others, and where it could not be read without waiting.
    :ivar plain_view: whether it is one, which holds no data of its own.
    """

    schema: str
    name: str
    columns: tuple[tuple[str, str], ...] = ()
    referred: tuple[str, ...] = ()
    query: str | None = None
    plain_view: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "schema": self.schema,
            "name": self.name,
            "columns": [list(column) for column in self.columns],
            "referred": list(self.referred),
            "query": self.query,
            "plain_view": self.plain_view,
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Relation:
        """Read what :meth:`as_dict` wrote."""
        columns = tuple((name, type_) for name, type_ in told["columns"])
        return cls(**{**told, "columns": columns, "referred": tuple(told["referred"])})


@dataclass(frozen=True)
class ViewLineage:
    """A materialized view, what it reads, and how large it is.

    :ivar database: its name, as the server has it.
    :ivar reads: every relation that it reads, near and far, with the plain views in between; it ends at other
        materialized views.
    :ivar size_bytes: with its indexes; None where it could not be read without waiting.
    """

    database: str
    view: Relation
    reads: tuple[Relation, ...] = field(default=())
    size_bytes: int | None = None

    @property
    def inputs(self) -> tuple[Relation, ...]:
        """The relations that hold the data."""
        return tuple(relation for relation in self.reads if not relation.plain_view)


def read(view: ResolvedName) -> Work[ViewLineage | None]:
    """Read what a view reads, as it is committed now; None where no materialized view stands under this name.

    :raises psycopg.Error: what PostgreSQL says; queries that cannot be read at once are left out instead.
    """
    rows = yield from _limited(_RELATIONS, {"schema": view.schema, "name": view.name})
    if not any(row["is_view"] for row in rows):
        return None
    of_queries = [row for row in rows if row["is_view"] or row["kind"] == "v"]
    texts: dict[tuple[str, str], dict[str, Any]] = {}
    try:
        named = {"schemas": [row["schema"] for row in of_queries], "names": [row["name"] for row in of_queries]}
        texts = {(row["schema"], row["name"]): row for row in (yield from _limited(_TEXTS, named))}
    except psycopg.Error as error:
        # Somebody alters what it reads just now, or the role may not look at a schema: all else is known.
        if isinstance(error, MatViewError):
            raise
    relations = {}
    for row in rows:
        text = texts.get((row["schema"], row["name"]), {})
        relation = Relation(
            row["schema"],
            row["name"],
            tuple((name, type_) for name, type_ in row["columns"]),
            tuple(row["referred"]),
            text.get("query"),
            row["kind"] == "v",
        )
        relations[relation] = row["is_view"]
    (itself,) = (relation for relation, is_view in relations.items() if is_view)
    others = tuple(relation for relation, is_view in relations.items() if not is_view)
    return ViewLineage(rows[0]["database"], itself, others, texts.get((itself.schema, itself.name), {}).get("size"))


def _limited(statement: sql.Composable, parameters: Mapping[str, Any]) -> Work[list[dict[str, Any]]]:
    yield Command(sql.SQL("BEGIN ISOLATION LEVEL READ COMMITTED"), Session.RECORD)
    try:
        yield from fetch_all(_LIMITS, session=Session.RECORD)
        rows = yield from fetch_all(statement, parameters, Session.RECORD)
    except psycopg.Error:
        yield Command(sql.SQL("ROLLBACK"), Session.RECORD, undoing=True)
        raise
    yield Command(sql.SQL("COMMIT"), Session.RECORD)
    return rows


def pack(lineages: Iterable[ViewLineage]) -> dict[str, Any]:
    """Return several as plain data, in which each relation is told once."""
    relations: dict[Relation, int] = {}
    views = [
        {
            "database": each.database,
            "view": relations.setdefault(each.view, len(relations)),
            "reads": [relations.setdefault(relation, len(relations)) for relation in each.reads],
            "size_bytes": each.size_bytes,
        }
        for each in lineages
    ]
    return {"relations": [relation.as_dict() for relation in relations], "views": views}


def unpack(packed: Mapping[str, Any]) -> list[ViewLineage]:
    """Read what :func:`pack` wrote."""
    relations = [Relation.from_dict(told) for told in packed["relations"]]
    return [
        ViewLineage(
            told["database"],
            relations[told["view"]],
            tuple(relations[place] for place in told["reads"]),
            told["size_bytes"],
        )
        for told in packed["views"]
    ]
