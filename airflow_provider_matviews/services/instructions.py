"""What a service asks of whoever runs it.

Services are generators: they yield the instructions below and receive a :class:`Result` for each, so that one
piece of logic serves a blocking connection, an asynchronous one and a dry run. ``execute.py`` holds the
drivers. An error of an instruction is thrown into the service at its ``yield``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from psycopg import sql


class Session(Enum):
    """Which connection an instruction is for."""

    #: The operation's own transaction. Losing this connection undoes the operation.
    WORK = "work"
    #: Autocommit, so that what is written here stays whatever becomes of the operation.
    RECORD = "record"


@dataclass(frozen=True, slots=True)
class Query:
    """A statement of ours that answers with rows.

    :param statement: composed of our own text and identifiers.
    :param parameters: its parameters; None when it has no placeholder.
    """

    statement: sql.Composable
    parameters: Mapping[str, Any] | Sequence[Any] | None = None
    session: Session = Session.WORK


@dataclass(frozen=True, slots=True)
class Command:
    """One statement without an answer. May hold untrusted text.

    It is sent through the extended protocol, which takes exactly one statement: the server refuses a second
    one smuggled in (42601, measured). See
    https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-EXT-QUERY.

    :param undoing: to be sent only where the connection stands: what is lost has been undone by the server.
    """

    statement: sql.Composable
    session: Session = Session.WORK
    undoing: bool = False

    @property
    def text(self) -> str:
        """The statement as the server reads it."""
        return self.statement.as_string(None)

    @property
    def begins(self) -> bool:
        """Whether it begins a transaction, so that nothing is lost with a connection that was."""
        return self.text.startswith("BEGIN")


@dataclass(frozen=True, slots=True)
class Alone:
    """A command outside of any transaction, such as VACUUM.

    What a transaction would have been told to mind, the session is told, where it is ours alone: behind a pooler it
    would stay there for others.

    :param settings: expressions that make the settings.
    """

    command: Command
    settings: sql.Composable


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait without holding up anybody.

    :param seconds: how long.
    """

    seconds: float


@dataclass(frozen=True, slots=True)
class Note:
    """A line of the story for the task log.

    :param message: the line.
    :param warning: whether somebody should look at it.
    """

    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Deadline:
    """From when on whatever runs is to be stopped.

    :param at: the moment, by ``time.monotonic()``.
    :param seconds: how long the operation was given in all, for the story.
    """

    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Watch:
    """Have somebody look at the operation now and then while a statement of it takes long.

    :param look: makes the work of one look, which returns a line for the task log, or None. It runs on a connection
        of its own, and whatever goes wrong in it is nothing to the operation. None: nobody looks any more.
    """

    look: Callable[[], Work[str | None]] | None


@dataclass(frozen=True, slots=True)
class Result:
    """What came of an instruction: the rows of a query, each a dict."""

    rows: list[dict[str, Any]] = field(default_factory=list)


Instruction = Query | Command | Alone | Pause | Note | Deadline | Watch
_T = TypeVar("_T")
#: A service, or a part of one, that ends with a ``_T``.
Work = Generator[Instruction, Result, _T]


def fetch_all(
    statement: sql.Composable,
    parameters: Mapping[str, Any] | Sequence[Any] | None = None,
    session: Session = Session.WORK,
) -> Work[list[dict[str, Any]]]:
    """Run a query and return its rows."""
    result = yield Query(statement, parameters, session)
    return result.rows


def fetch_one(
    statement: sql.Composable,
    parameters: Mapping[str, Any] | Sequence[Any] | None = None,
    session: Session = Session.WORK,
) -> Work[dict[str, Any] | None]:
    """Run a query and return its first row, or None."""
    rows = yield from fetch_all(statement, parameters, session)
    return rows[0] if rows else None


def raw(text: str) -> sql.SQL:
    """Return text as a part of a statement, as it stands.

    For definitions and expressions, which are SQL by nature. Only a :class:`Command` may hold what a person
    wrote; see there for why that is safe.
    """
    return sql.SQL(text)
