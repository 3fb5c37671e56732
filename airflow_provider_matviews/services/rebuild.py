"""Builds a view, whole: beside one that stands and is to make room, or where none stands.

Names that have to be unique in a schema (indexes, statistics) get names of their own while both stand;
:func:`take_names` gives them the right ones once the other is gone.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace

import psycopg
from psycopg import sql

from airflow_provider_matviews.exceptions import StrategyRefused
from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, shorten
from airflow_provider_matviews.services.alterations import (
    Relation,
    bare,
    build_index,
    dress_index,
    make_statistics,
    privileges,
    settings,
)
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts
from airflow_provider_matviews.services.instructions import Command, Work, raw
from airflow_provider_matviews.services.picture import (
    IndexAnatomy,
    Picture,
    StatisticsAnatomy,
    privileges_of,
    restore_settings,
    speak_plainly,
)
from airflow_provider_matviews.services.probe import is_whole_row
from airflow_provider_matviews.services.response import Report


@dataclass(frozen=True)
class Beside:
    """The names of what is built, and of the old view while it makes room.

    :ivar token: what makes them unlike all others; None where no view stands, and the right names are free.
    """

    view: ResolvedName
    token: str | None

    @classmethod
    def of(cls, view: ResolvedName) -> Beside:
        """Choose names that nothing else has."""
        return cls(view, f"_mv_{secrets.token_hex(4)}")

    @classmethod
    def nothing(cls, view: ResolvedName) -> Beside:
        """Take the right names at once."""
        return cls(view, None)

    def _named(self, name: str, suffix: str) -> str:
        ending = f"{self.token}{suffix}"
        return shorten(name, MAX_IDENTIFIER_BYTES - len(ending.encode())) + ending

    @property
    def new(self) -> ResolvedName:
        """The view that is being built."""
        if self.token is None:
            return self.view
        return ResolvedName(self.view.schema, self._named(self.view.name, ""), self.view.display)

    @property
    def old(self) -> ResolvedName:
        """The view that makes room."""
        return ResolvedName(self.view.schema, self._named(self.view.name, "_old"), self.view.display)

    @property
    def relation(self) -> Relation:
        """What is being built, as something to alter."""
        return Relation(self.new.schema, self.new.name)

    def index(self, position: int, picture: Picture) -> str:
        """The name of the n-th index for now."""
        if self.token is None:
            return picture.indexes[position].name
        return self._named(self.view.name, f"_i{position}")

    def statistics(self, position: int, picture: Picture) -> str:
        """The name of the n-th statistics object for now."""
        if self.token is None:
            return picture.statistics[position].name
        return self._named(self.view.name, f"_s{position}")


def build(beside: Beside, picture: Picture, query: str, server: ServerFacts, report: Report) -> Work[None]:
    """Make the new view, empty, with everything the picture shows but its indexes, which are only tried.

    They are built once the rows are there, by :func:`build_indexes`. What speaks against one (a right, a definition
    that is not understood) has to show before the query has run for an hour.

    :param query: the view's query with every name qualified.
    :raises StrategyRefused: when a definition is not understood.
    """
    relation = beside.relation
    # The server's default must not stand in for what the picture does not name.
    yield Command(sql.SQL("SET LOCAL default_tablespace = ''"))
    yield from report.run("create", Command(_create(beside.new, picture, query)), harmless=True)
    for step in settings(relation, bare(picture), picture):
        for statement in step.cut:
            yield from report.run("attach", Command(raw(statement)), harmless=True)
    for position, statistics in enumerate(picture.statistics):
        body = _body_of(beside, statistics.anatomy)
        for statement in make_statistics(relation, statistics, beside.statistics(position, picture), body):
            yield from report.run("statistics", Command(raw(statement)), harmless=True)
    # Before the rows: the query runs with the rights of the owner.
    yield from give_to(beside.new, picture.owner, server, report)
    present = replace(
        picture,
        privileges=(yield from privileges_of(beside.new.ddl)),
        columns=tuple(replace(column, privileges=()) for column in picture.columns),
    )
    # What default privileges gave goes, where the picture does not show it.
    for step in privileges(relation, present, picture):
        for statement in step.cut:
            yield from report.run(step.kind.value, Command(raw(statement)), harmless=True)
    if picture.indexes:
        yield Command(sql.SQL("SAVEPOINT indexes"))
        for position, index in enumerate(picture.indexes):
            try:
                for statement in _index(beside, position, picture):
                    yield Command(raw(statement))
            except psycopg.Error as error:
                if isinstance(error, psycopg.errors.UndefinedTable) and is_whole_row(error):
                    raise StrategyRefused(
                        f"{beside.view.display} cannot be rebuilt beside itself: its index {index.name} names the "
                        f"whole row by the view's name ({error.diag.message_primary}).",
                        hint="build that index over columns, or drop it.",
                    ) from error
                error.add_note(
                    f"That is what the index {index.name} of {beside.view.display} meets on the new view: drop it, or "
                    "declare it as it can be."
                )
                raise
        yield Command(sql.SQL("ROLLBACK TO SAVEPOINT indexes"))
        yield Command(sql.SQL("RELEASE SAVEPOINT indexes"))


def build_indexes(beside: Beside, picture: Picture, report: Report) -> Work[None]:
    """Build the new view's indexes over its rows, each in a statement of its own, whose progress the server tells.

    :raises psycopg.errors.UniqueViolation: when rows are not as unique as an index wants them.
    """
    if not picture.indexes:
        return
    before = yield from speak_plainly()
    # Before PostgreSQL 17 the functions in an index find what they name by this path, as they would in a REFRESH.
    # What the definitions name is in pg_catalog or qualified, so the path behind it changes nothing for them.
    path = ", ".join(filter(None, ("pg_catalog", before["search_path"])))
    yield from restore_settings({"search_path": path})
    for position, index in enumerate(picture.indexes):
        place = (position + 1, len(picture.indexes))
        try:
            for statement in _index(beside, position, picture):
                yield from report.run(f"index {index.name}", Command(raw(statement)), place)
        except psycopg.errors.UniqueViolation as error:
            error.add_note(
                f"That is the index {index.name} of {beside.view.display}: the rows are not as unique as it."
            )
            raise
    yield from restore_settings(before)


def take_names(beside: Beside, picture: Picture, report: Report) -> Work[None]:
    """Give the indexes and statistics the names that they are to have."""
    for statement in naming(beside, picture):
        yield from report.run("cut", Command(raw(statement)))


def naming(beside: Beside, picture: Picture) -> list[str]:
    """Return the statements of :func:`take_names`."""
    rename = sql.SQL("ALTER {} {} RENAME TO {}")
    statements = [
        rename.format(
            sql.SQL("INDEX"),
            sql.Identifier(beside.view.schema, beside.index(position, picture)),
            sql.Identifier(index.name),
        )
        for position, index in enumerate(picture.indexes)
    ]
    statements += [
        rename.format(
            sql.SQL("STATISTICS"),
            sql.Identifier(each.schema, beside.statistics(position, picture)),
            sql.Identifier(each.name),
        )
        for position, each in enumerate(picture.statistics)
    ]
    return [statement.as_string(None) for statement in statements]


def creation(beside: Beside, picture: Picture, query: str) -> str:
    """Return the statement that makes the new view, empty."""
    return _create(beside.new, picture, query).as_string(None)


def _create(new: ResolvedName, picture: Picture, query: str) -> sql.Composed:
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


def _index(beside: Beside, position: int, picture: Picture) -> Iterable[str]:
    index = picture.indexes[position]
    made = beside.index(position, picture)
    yield from build_index(beside.relation, index, made, _body_of(beside, index.anatomy))
    yield from dress_index(beside.relation, made, None, index)


def _body_of(beside: Beside, anatomy: IndexAnatomy | StatisticsAnatomy | None) -> str:
    if anatomy is None or anatomy.body is None:
        raise StrategyRefused(
            f"{beside.view.display} cannot be rebuilt beside itself: this definition is not understood: "
            f"{anatomy and anatomy.definition}",
            hint="use refresh_strategy='concurrent' or 'regular'.",
        )
    return anatomy.body


def give_to(new: ResolvedName, owner: str, server: ServerFacts, report: Report) -> Work[None]:
    """Give a view to its owner, where that is not the role itself."""
    if owner != server.role:
        statement = sql.SQL("ALTER MATERIALIZED VIEW {} OWNER TO {}").format(new.identifier, sql.Identifier(owner))
        yield from report.run("owner", Command(statement), harmless=True)
