"""Which column of a view is made of which columns, worked out of its stored query.

PostgreSQL records which columns a query refers to, but not what it makes of them. So its query, in PostgreSQL's own
wording, is read here, with those of the plain views in it put in their places; and what comes of that is believed only
where the catalog says the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlglot import exp, parse_one
from sqlglot.lineage import lineage as sources_of
from sqlglot.optimizer.pushdown_projections import pushdown_projections
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import build_scope, traverse_scope
from sqlglot.schema import MappingSchema

from airflow_provider_matviews.services.lineage import Relation, ViewLineage

_log = logging.getLogger(__name__)
#: What would be followed to other columns than it comes of, or to none (seen with sqlglot 30): what a LATERAL subquery
#: gives. So would be a whole row, which PostgreSQL writes as ``t.*`` where it means one, and else never.
_NOT_FOLLOWED = (exp.Lateral,)
#: So many places of tables, with the plain views put in, may there be: five views, each of which reads the one before
#: three times, come to 243.
_MOST_TABLES = 200
#: So many columns times places of tables; 2,400 take a second and a half (measured), and nobody waits for longer.
_MOST_STEPS = 3000


@dataclass(frozen=True)
class ColumnLineage:
    """What a view's columns come of.

    :ivar made_of: of each column, which columns of the view's inputs its value is made of.
    :ivar elsewhere: the columns that are in no column's value and decide about its rows all the same: in conditions,
        joins, groups.
    """

    made_of: dict[str, list[tuple[Relation, str]]]
    elsewhere: list[tuple[Relation, str]]


def columns_of(lineage: ViewLineage) -> ColumnLineage | None:
    """Return which columns of its inputs a view's columns come of; None where that is not sure.

    Not sure is what cannot be parsed, and what does not agree with the catalog: a column found that the catalog does
    not say is read, or one of the view that is not found.
    """
    try:
        found = _columns_of(lineage)
    except Exception as error:
        # Whatever a parser makes of what it does not know.
        _log.debug("No lineage of the columns of %s: %s", lineage.view.name, type(error).__name__)
        return None
    if found is None:
        return None
    made_of, query = found
    direct = {each for sources in made_of.values() for each in sources}
    if any(column not in relation.referred for relation, column in direct):
        return None
    read = [(relation, column) for relation in lineage.inputs for column in relation.referred]
    if any(relation.plain_view for relation in lineage.reads):
        # The catalog tells also of what a plain view selects and nobody takes from it.
        used = _used(query)
        read = [(relation, column) for relation, column in read if (relation.schema, relation.name, column) in used]
    return ColumnLineage(made_of, [each for each in read if each not in direct])


def _used(query: Any) -> set[tuple[str, str, str]]:
    """Return the columns of tables, with schema and table, that a query still reads without what nobody takes of it.

    :param query: qualified; nothing of what is in it stays as it was.
    """
    try:
        scopes = traverse_scope(pushdown_projections(query))
    except Exception as error:
        _log.debug("No lineage of conditions: %s", type(error).__name__)
        return set()
    found = set()
    for scope in scopes:
        for column in scope.columns:
            # A subquery reads columns of what is around it, too.
            at: Any = scope
            while at is not None and column.table not in at.sources:
                at = at.parent
            table = None if at is None else at.sources[column.table]
            if isinstance(table, exp.Table):
                found.add((table.db, table.name, column.name))
    return found


def _columns_of(lineage: ViewLineage) -> tuple[dict[str, list[tuple[Relation, str]]], Any] | None:
    if lineage.view.query is None:
        return None
    relations = {(relation.schema, relation.name): relation for relation in lineage.reads}
    names = [name for name, _ in lineage.view.columns]
    query = _expanded(lineage.view.query, relations, min(_MOST_TABLES, _MOST_STEPS // max(1, len(names))), {})
    if query is None:
        return None
    tables: dict[str, Any] = {}
    for relation in lineage.inputs:
        columns = tables.setdefault(relation.schema, {}).setdefault(relation.name, {})
        # Of which type they are plays no part in where they come from.
        columns.update({name: "text" for name, _ in relation.columns})
    # The catalog's names are exact; and what is not quoted in a stored query is lower case already.
    schema = MappingSchema(tables, dialect="postgres", normalize=False)
    query = qualify(query, schema=schema, dialect="postgres")
    scope = build_scope(query)
    if scope is None or [select.alias_or_name for select in query.selects] != names:
        return None
    found: dict[str, list[tuple[Relation, str]]] = {}
    for name in names:
        column = exp.column(exp.to_identifier(name, quoted=True))
        root = sources_of(column, query, schema, dialect="postgres", scope=scope, trim_selects=False, copy=False)
        sources = set()
        for node in root.walk():
            if isinstance(node.source, exp.Table):
                read = exp.to_column(node.name, dialect="postgres").name
                if read != "*":
                    sources.add((relations[node.source.db, node.source.name], read))
        found[name] = sorted(sources, key=lambda each: (each[0].schema, each[0].name, each[1]))
    return found, query


def _expanded(text: str, relations: Mapping[tuple[str, str], Relation], most: int, done: dict[Relation, Any]) -> Any:
    """Parse a query and put, for each plain view in it, that view's query; None where that cannot be followed.

    :param most: places of tables that it may come to.
    :param done: plain views whose queries have been parsed.
    """
    query = parse_one(text, dialect="postgres")
    if query.find(*_NOT_FOLLOWED) or any(isinstance(column.this, exp.Star) for column in query.find_all(exp.Column)):
        return None
    for table in list(query.find_all(exp.Table)):
        relation = relations.get((table.db, table.name))
        if relation is None or not relation.plain_view:
            continue
        if relation not in done:
            done[relation] = None  # Views may read each other in a circle.
            if relation.query is not None:
                done[relation] = _expanded(relation.query, relations, most, done)
        if done[relation] is None:
            return None
        alias = table.args.get("alias") or exp.TableAlias(this=exp.to_identifier(table.name, quoted=True))
        inside = exp.Subquery(this=done[relation].copy(), alias=alias.copy(), joins=table.args.get("joins"))
        table.replace(inside)
        if sum(1 for _ in query.find_all(exp.Table)) > most:
            return None
    return query
