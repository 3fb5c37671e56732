"""Builds a view beside another one, with everything that one has.

Names that have to be unique in a schema (indexes, statistics) get names of their own while both stand;
:func:`take_names` gives them the right ones once the other is gone.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from psycopg import sql

from airflow_provider_matviews.exceptions import StrategyRefused
from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, shorten
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts
from airflow_provider_matviews.services.instructions import Command, Work, fetch_all, fetch_one, raw
from airflow_provider_matviews.services.picture import (
    IndexPicture,
    Picture,
    Privilege,
    privileges_of,
    restore_settings,
    speak_plainly,
)
from airflow_provider_matviews.services.response import Report

_STORAGE = {"p": "PLAIN", "e": "EXTERNAL", "m": "MAIN", "x": "EXTENDED"}
_COMPRESSION = {"p": "pglz", "l": "lz4"}
_REPLICA_IDENTITY = {"n": "NOTHING", "f": "FULL"}


@dataclass(frozen=True)
class Beside:
    """The names of what is built beside a view, and of the old view while it makes room."""

    view: ResolvedName
    token: str

    @classmethod
    def of(cls, view: ResolvedName) -> Beside:
        """Choose names that nothing else has."""
        return cls(view, f"_mv_{secrets.token_hex(4)}")

    def _named(self, name: str, suffix: str) -> str:
        ending = f"{self.token}{suffix}"
        return shorten(name, MAX_IDENTIFIER_BYTES - len(ending.encode())) + ending

    @property
    def new(self) -> ResolvedName:
        """The view that is being built."""
        return ResolvedName(self.view.schema, self._named(self.view.name, ""), self.view.display)

    @property
    def old(self) -> ResolvedName:
        """The view that makes room."""
        return ResolvedName(self.view.schema, self._named(self.view.name, "_old"), self.view.display)

    def index(self, position: int) -> str:
        """The name of the n-th index while both views stand."""
        return self._named(self.view.name, f"_i{position}")

    def statistics(self, position: int) -> str:
        """The name of the n-th statistics object while both views stand."""
        return self._named(self.view.name, f"_s{position}")


def build(beside: Beside, picture: Picture, query: str, server: ServerFacts, report: Report) -> Work[None]:
    """Make the new view, empty, with everything the picture shows but its indexes, which are only tried.

    They are built once the rows are there, by :func:`build_indexes`. What speaks against one (a right, a definition
    that is not understood) has to show before the query has run for an hour.

    :param query: the view's query with every name qualified.
    :raises StrategyRefused: when a definition is not understood.
    """
    new = beside.new
    # The server's default must not stand in for what the picture does not name.
    yield Command(sql.SQL("SET LOCAL default_tablespace = ''"))
    yield from report.run("create", Command(_create(new, picture, query)))
    for statement in _settings(new, picture):
        yield from report.run("attach", Command(statement))
    for position in range(len(picture.statistics)):
        for statement in _statistics(beside, position, picture):
            yield from report.run("statistics", Command(statement))
    yield from give_to(new, picture.owner, server, report)
    yield from _grant(new, picture, report)
    if picture.indexes:
        yield Command(sql.SQL("SAVEPOINT indexes"))
        for position in range(len(picture.indexes)):
            for statement in _index(beside, position, picture):
                yield Command(statement)
        yield Command(sql.SQL("ROLLBACK TO SAVEPOINT indexes"))
        yield Command(sql.SQL("RELEASE SAVEPOINT indexes"))


def build_indexes(beside: Beside, picture: Picture, report: Report) -> Work[None]:
    """Build the new view's indexes over its rows, each in a statement of its own, whose progress the server tells.

    :raises psycopg.errors.UniqueViolation: when rows are not as unique as an index wants them.
    """
    if not picture.indexes:
        return
    settings = yield from speak_plainly()
    # Before PostgreSQL 17 the functions in an index find what they name by this path, as they would in a REFRESH.
    # What the definitions name is in pg_catalog or qualified, so the path behind it changes nothing for them.
    path = ", ".join(filter(None, ("pg_catalog", settings["search_path"])))
    yield from restore_settings({"search_path": path})
    for position, index in enumerate(picture.indexes):
        for statement in _index(beside, position, picture):
            yield from report.run(f"index {index.name}", Command(statement), (position + 1, len(picture.indexes)))
    yield from restore_settings(settings)


def take_names(beside: Beside, picture: Picture, report: Report) -> Work[None]:
    """Give the indexes and statistics the names that the old ones had."""
    for position, index in enumerate(picture.indexes):
        yield from report.run(
            "cut",
            Command(
                sql.SQL("ALTER INDEX {} RENAME TO {}").format(
                    sql.Identifier(beside.view.schema, beside.index(position)), sql.Identifier(index.name)
                )
            ),
        )
    for position, statistics in enumerate(picture.statistics):
        yield from report.run(
            "cut",
            Command(
                sql.SQL("ALTER STATISTICS {} RENAME TO {}").format(
                    sql.Identifier(statistics.schema, beside.statistics(position)), sql.Identifier(statistics.name)
                )
            ),
        )


def _create(new: ResolvedName, picture: Picture, query: str) -> sql.Composable:
    options = [_option(option) for option in picture.options]
    options += [sql.SQL("toast.") + _option(option) for option in picture.toast_options]
    columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in picture.columns)
    return sql.SQL("CREATE MATERIALIZED VIEW {}{} USING {}{}{} AS\n{}\nWITH NO DATA").format(
        new.identifier,
        # PostgreSQL has views without columns, but no empty list of them.
        sql.SQL(" ({})").format(columns) if picture.columns else sql.SQL(""),
        sql.Identifier(picture.access_method),
        sql.SQL(" WITH ({})").format(sql.SQL(", ").join(options)) if options else sql.SQL(""),
        sql.SQL(" TABLESPACE {}").format(sql.Identifier(picture.tablespace)) if picture.tablespace else sql.SQL(""),
        raw(query.rstrip("; \n")),
    )


def _option(option: str) -> sql.Composable:
    name, _, value = option.partition("=")
    return sql.SQL("{} = {}").format(sql.Identifier(name), sql.Literal(value))


def _settings(new: ResolvedName, picture: Picture) -> Iterable[sql.Composable]:
    view = new.identifier
    alter = sql.SQL("ALTER MATERIALIZED VIEW {} ").format(view)
    for column in picture.columns:
        name = sql.Identifier(column.name)
        on_column = alter + sql.SQL("ALTER COLUMN {} ").format(name)
        if column.storage:
            yield on_column + sql.SQL("SET STORAGE ") + raw(_STORAGE[column.storage])
        if column.compression:
            yield on_column + sql.SQL("SET COMPRESSION {}").format(sql.Identifier(_COMPRESSION[column.compression]))
        if column.statistics is not None:
            yield on_column + sql.SQL("SET STATISTICS {}").format(sql.Literal(column.statistics))
        if column.options:
            yield on_column + sql.SQL("SET ({})").format(sql.SQL(", ").join(map(_option, column.options)))
        target = sql.SQL("{}.{}").format(view, name)
        if column.comment is not None:
            yield sql.SQL("COMMENT ON COLUMN {} IS {}").format(target, sql.Literal(column.comment))
        for label in column.labels:
            yield sql.SQL("SECURITY LABEL FOR {} ON COLUMN {} IS {}").format(
                sql.Identifier(label.provider), target, sql.Literal(label.label)
            )
    if picture.comment is not None:
        yield sql.SQL("COMMENT ON MATERIALIZED VIEW {} IS {}").format(view, sql.Literal(picture.comment))
    for label in picture.labels:
        yield sql.SQL("SECURITY LABEL FOR {} ON MATERIALIZED VIEW {} IS {}").format(
            sql.Identifier(label.provider), view, sql.Literal(label.label)
        )
    if picture.replica_identity in _REPLICA_IDENTITY:
        yield alter + sql.SQL("REPLICA IDENTITY ") + raw(_REPLICA_IDENTITY[picture.replica_identity])
    for extension, kind in picture.extensions:
        if kind == "x":
            yield alter + sql.SQL("DEPENDS ON EXTENSION {}").format(sql.Identifier(extension))


def _index(beside: Beside, position: int, picture: Picture) -> Iterable[sql.Composable]:
    index = picture.indexes[position]
    made = beside.index(position)
    qualified = sql.Identifier(beside.view.schema, made)
    alter = sql.SQL("ALTER INDEX {} ").format(qualified)
    on_view = sql.SQL("ALTER MATERIALIZED VIEW {} ").format(beside.new.identifier)
    # Not ALTER INDEX ... SET TABLESPACE, which would copy what has just been built.
    in_tablespace = sql.SQL("SET LOCAL default_tablespace = {}")
    if index.tablespace:
        yield in_tablespace.format(sql.Literal(index.tablespace))
    yield raw(_retarget_index(beside, index, made))
    if index.tablespace:
        yield in_tablespace.format(sql.Literal(""))
    for number, target in index.statistics:
        yield alter + sql.SQL("ALTER COLUMN {} SET STATISTICS {}").format(sql.Literal(number), sql.Literal(target))
    if index.comment is not None:
        yield sql.SQL("COMMENT ON INDEX {} IS {}").format(qualified, sql.Literal(index.comment))
    if index.clustered:
        yield on_view + sql.SQL("CLUSTER ON {}").format(sql.Identifier(made))
    if index.replica_identity:
        yield on_view + sql.SQL("REPLICA IDENTITY USING INDEX {}").format(sql.Identifier(made))
    for extension in index.extensions:
        yield alter + sql.SQL("DEPENDS ON EXTENSION {}").format(sql.Identifier(extension))


def _retarget_index(beside: Beside, index: IndexPicture, made: str) -> str:
    """Return an index's definition with another name, on the new view.

    The server's text begins with names that it quotes itself; what is not exactly as expected is refused rather
    than guessed at.
    """
    kind = "CREATE UNIQUE INDEX" if index.unique else "CREATE INDEX"
    prefix = f"{kind} {index.quoted} ON {beside.view.quoted} USING "
    if not index.definition.startswith(prefix):
        raise _not_understood(beside, index.definition)
    keys = index.definition[len(prefix) :]
    return f"{kind} {sql.Identifier(made).as_string(None)} ON {beside.new.ddl} USING {keys}"


def _statistics(beside: Beside, position: int, picture: Picture) -> Iterable[sql.Composable]:
    statistics = picture.statistics[position]
    made = sql.Identifier(statistics.schema, beside.statistics(position))
    prefix, suffix = f"CREATE STATISTICS {statistics.quoted} ", f" FROM {beside.view.quoted}"
    if not (statistics.definition.startswith(prefix) and statistics.definition.endswith(suffix)):
        raise _not_understood(beside, statistics.definition)
    body = statistics.definition[len(prefix) : -len(suffix)]
    yield sql.SQL("CREATE STATISTICS {} {} FROM {}").format(made, raw(body), beside.new.identifier)
    if statistics.target is not None:
        yield sql.SQL("ALTER STATISTICS {} SET STATISTICS {}").format(made, sql.Literal(statistics.target))
    if statistics.comment is not None:
        yield sql.SQL("COMMENT ON STATISTICS {} IS {}").format(made, sql.Literal(statistics.comment))
    yield sql.SQL("ALTER STATISTICS {} OWNER TO {}").format(made, sql.Identifier(statistics.owner))


def _not_understood(beside: Beside, definition: str) -> StrategyRefused:
    return StrategyRefused(
        f"{beside.view.display} cannot be rebuilt beside itself: this definition is not understood: {definition}",
        hint="use refresh_strategy='concurrent' or 'regular'.",
    )


def give_to(new: ResolvedName, owner: str, server: ServerFacts, report: Report) -> Work[None]:
    """Give a view to its owner, where that is not the role itself."""
    if owner != server.role:
        yield from report.run(
            "owner",
            Command(sql.SQL("ALTER MATERIALIZED VIEW {} OWNER TO {}").format(new.identifier, sql.Identifier(owner))),
        )


def take_default_privileges_back(new: ResolvedName) -> Work[None]:
    """Take back what ALTER DEFAULT PRIVILEGES gave others on a view that stands in for one that has its own."""
    row = yield from fetch_one(sql.SQL("SELECT current_user::text AS role"))
    assert row is not None
    present = yield from privileges_of(new.ddl)
    for grantee in dict.fromkeys(each.grantee for each in present if each.grantee != row["role"]):
        yield Command(sql.SQL("REVOKE ALL ON {} FROM {}").format(new.identifier, _role(grantee)))


def _grant(new: ResolvedName, picture: Picture, report: Report) -> Work[None]:
    """Give the view exactly the privileges of the picture, each by its own grantor."""
    present = yield from privileges_of(new.ddl)
    if set(present) == set(picture.privileges) and not any(column.privileges for column in picture.columns):
        return
    for grantee in dict.fromkeys(each.grantee for each in present):
        # What default privileges gave; the owner's own privileges are taken too, and come back below.
        yield Command(sql.SQL("REVOKE ALL ON {} FROM {}").format(new.identifier, _role(grantee)))
    for privilege, column in in_order_of_grantors(picture):
        what: sql.Composable = raw(privilege.privilege)
        if column is not None:
            what = what + sql.SQL(" ({})").format(sql.Identifier(column))
        statement = sql.SQL("GRANT {} ON {} TO {}{}").format(
            what, new.identifier, _role(privilege.grantee), sql.SQL(" WITH GRANT OPTION" if privilege.grantable else "")
        )
        grant = report.run("grant", Command(statement))
        if privilege.grantor == picture.owner:
            yield from grant
        else:
            yield from as_role(privilege.grantor, grant)


def in_order_of_grantors(picture: Picture) -> list[tuple[Privilege, str | None]]:
    """Return every privilege, with its column where it is one on a column, so that each grantor has it before."""
    waiting: list[tuple[Privilege, str | None]] = [(each, None) for each in picture.privileges]
    waiting += [(each, column.name) for column in picture.columns for each in column.privileges]
    ordered: list[tuple[Privilege, str | None]] = []
    able: set[tuple[str, str, str | None]] = set()
    while waiting:
        ready = [
            (each, column)
            for each, column in waiting
            if each.grantor == picture.owner
            or {(each.grantor, each.privilege, None), (each.grantor, each.privilege, column)} & able
        ]
        if not ready:
            # A grantor without a grant option: a superuser edited the catalog. Let the server say what is wrong.
            ready = list(waiting)
        for each, column in ready:
            waiting.remove((each, column))
            ordered.append((each, column))
            if each.grantable and each.grantee is not None:
                able.add((each.grantee, each.privilege, column))
    return ordered


def as_role(role: str, work: Work[None]) -> Work[None]:
    """Do something as another role, within this transaction."""
    row = yield from fetch_one(sql.SQL("SELECT current_setting('role') AS role"))
    assert row is not None
    yield Command(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
    yield from work
    yield from fetch_all(sql.SQL("SELECT set_config('role', {}, true)").format(sql.Literal(row["role"])))


def _role(name: str | None) -> sql.Composable:
    return sql.SQL("PUBLIC") if name is None else sql.Identifier(name)
