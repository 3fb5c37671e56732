"""Statements in which a definition's words become PostgreSQL's. No connection, no catalog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psycopg import sql

from airflow_provider_matviews.checks import ParameterValue
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.parts import ExtendedStatistics, Index, IndexKey
from airflow_provider_matviews.services.instructions import raw


def create_index(index: Index, name: str, relation: sql.Composable) -> sql.Composed:
    """Return what builds an index.

    :param name: its name, not quoted.
    :param relation: what it is built on.
    """
    parts: list[sql.Composable] = [
        sql.SQL("CREATE UNIQUE INDEX" if index.unique else "CREATE INDEX"),
        sql.Identifier(name),
        sql.SQL("ON {} USING {}").format(relation, sql.Identifier(index.method)),
        sql.SQL("({})").format(sql.SQL(", ").join(map(_key, index.keys))),
    ]
    if index.include:
        parts.append(sql.SQL("INCLUDE ({})").format(sql.SQL(", ").join(map(sql.Identifier, index.include))))
    if index.nulls_not_distinct:
        parts.append(sql.SQL("NULLS NOT DISTINCT"))
    if index.storage_parameters:
        parts.append(with_clause(index.storage_parameters))
    if index.tablespace:
        parts.append(tablespace_clause(index.tablespace))
    if index.where is not None:
        parts.append(sql.SQL("WHERE ") + raw(index.where))
    return sql.SQL(" ").join(parts)


def create_statistics(statistics: ExtendedStatistics, name: sql.Composable, relation: sql.Composable) -> sql.Composed:
    """Return what makes extended statistics; see :func:`create_index`."""
    kinds = sql.SQL(" ({})").format(sql.SQL(", ").join(map(raw, statistics.kinds))) if statistics.kinds else sql.SQL("")
    subjects: list[sql.Composable] = [*map(sql.Identifier, statistics.columns)]
    subjects += [raw(f"({expression}\n)") for expression in statistics.expressions]
    return sql.SQL("CREATE STATISTICS {}{} ON {} FROM {}").format(name, kinds, sql.SQL(", ").join(subjects), relation)


def _key(key: IndexKey) -> sql.Composable:
    parts: list[sql.Composable] = []
    if key.column is not None:
        parts.append(sql.Identifier(key.column))
    else:
        # The newline ends a `--` comment at the expression's end, which would swallow the parenthesis.
        parts.append(raw(f"({key.expression}\n)"))
    if key.collation:
        parts.append(sql.SQL("COLLATE {}").format(_qualified(key.collation)))
    if key.operator_class:
        options = parameters(key.operator_class_options)
        parts.append(
            _qualified(key.operator_class)
            + (sql.SQL(" ({})").format(sql.SQL(", ").join(options)) if options else sql.SQL(""))
        )
    if key.order:
        parts.append(raw(key.order.upper()))
    if key.nulls:
        parts.append(raw(f"NULLS {key.nulls.upper()}"))
    return sql.SQL(" ").join(parts)


def _qualified(name: str) -> sql.Identifier:
    parsed = ViewName.parse(name)
    return sql.Identifier(parsed.name) if parsed.schema is None else sql.Identifier(parsed.schema, parsed.name)


def parameter_text(value: ParameterValue) -> str:
    """Return a parameter's value as the server keeps it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parameters(settings: Mapping[str, ParameterValue]) -> Sequence[sql.Composable]:
    """Return ``name = value`` of each, for a WITH clause or SET (...)."""
    return [
        sql.SQL(" = ").join([parameter_name(name), sql.Literal(parameter_text(value))])
        for name, value in settings.items()
    ]


def parameter_name(name: str) -> sql.Composable:
    """Return the name of a parameter, perhaps one of the TOAST table."""
    return sql.SQL(".").join(map(sql.Identifier, name.split(".")))


def with_clause(settings: Mapping[str, ParameterValue]) -> sql.Composable:
    """Return `` WITH (...)``, or nothing."""
    return sql.SQL(" WITH ({})").format(sql.SQL(", ").join(parameters(settings))) if settings else sql.SQL("")


def tablespace_clause(name: str | None) -> sql.Composable:
    """Return `` TABLESPACE ...``, or nothing."""
    return sql.SQL("") if name is None else sql.SQL(" TABLESPACE {}").format(sql.Identifier(name))
