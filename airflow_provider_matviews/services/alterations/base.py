"""What all statements that alter a view have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from psycopg import sql


@dataclass(frozen=True)
class Relation:
    """What is altered.

    :ivar schema: where it and its indexes are.
    :ivar name: not quoted.
    """

    schema: str
    name: str

    @property
    def identifier(self) -> sql.Identifier:
        """For a statement."""
        return sql.Identifier(self.schema, self.name)

    def alter(self) -> sql.Composed:
        """Return how a statement begins that alters it."""
        return sql.SQL("ALTER MATERIALIZED VIEW {} ").format(self.identifier)

    def beside(self, name: str) -> sql.Identifier:
        """Return the name of something in its schema."""
        return sql.Identifier(self.schema, name)


def text(statement: sql.Composable) -> str:
    """Return a statement as the server reads it."""
    return statement.as_string(None)


def set_and_reset(
    alter: sql.Composable, has: Mapping[str, str], wanted: Mapping[str, str], prefix: str = ""
) -> tuple[str, ...]:
    """Return what sets those options that differ, and resets those that are no longer wanted.

    :param alter: how the statement begins.
    :param prefix: of each name, such as ``toast.``.
    """
    name_of = sql.SQL(prefix)
    statements: list[str] = []
    changed = {name: value for name, value in wanted.items() if has.get(name) != value}
    if changed:
        pairs = (name_of + sql.SQL("{} = {}").format(sql.Identifier(n), sql.Literal(v)) for n, v in changed.items())
        statements.append(text(alter + sql.SQL("SET ({})").format(sql.SQL(", ").join(pairs))))
    if gone := [name for name in has if name not in wanted]:
        names = (name_of + sql.Identifier(name) for name in gone)
        statements.append(text(alter + sql.SQL("RESET ({})").format(sql.SQL(", ").join(names))))
    return tuple(statements)


def comment_on(target: sql.Composable, comment: str | None) -> str:
    """Return what makes a comment; None takes it away."""
    return text(sql.SQL("COMMENT ON {} IS {}").format(target, sql.Literal(comment)))


def what_differs(wanted: str | None, has: str | None) -> str:
    """Return in words what a text should be, and what it is."""
    if wanted is None:
        return f"nothing declares it; it is {short(has)}"
    return f"it should be {short(wanted)}" + ("" if has is None else f", it is {short(has)}")


def short(value: str | None) -> str:
    """Return a text on one line, cut off where it is long."""
    flat = " ".join((value or "").split())
    return repr(flat if len(flat) <= 60 else f"{flat[:57]}...")


def role(name: str | None) -> sql.Composable:
    """Return a role for a statement; None is everybody."""
    return sql.SQL("PUBLIC") if name is None else sql.Identifier(name)
