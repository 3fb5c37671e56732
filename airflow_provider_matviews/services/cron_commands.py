"""Reads which materialized views the text of a scheduled command refreshes. Text only: nothing is ever executed.

Knows the lexical rules of SQL and one statement. What a function does that is called cannot be seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, ViewName, shorten

#: https://www.postgresql.org/docs/current/sql-syntax-lexical.html; comments nest, which is counted by hand.
_TOKEN = re.compile(
    r"""
    (?P<space>\s+ | --[^\r\n]*)
  | (?P<comment>/\*)
  | (?P<quoted>"(?:[^"]|"")+")
  | (?P<string>[uU]&"(?:[^"]|"")*" | [eE]'(?:[^'\\]|''|\\.)*' | (?:[bBxXnN]|[uU]&)?'(?:[^']|'')*'
              | \$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$)
  | (?P<word>[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]*)
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_BEGINS, _COMMITS = {"begin", "start"}, {"commit", "end"}
_TRANSACTION = {*_BEGINS, *_COMMITS, "rollback", "abort", "savepoint", "release"}
#: What a statement speaks of that may change which schemas are searched.
_PATH = {"search_path", "schema", "role", "authorization", "all"}


@dataclass(frozen=True)
class _Token:
    #: ``quoted``, ``string``, ``word`` or ``other``.
    kind: str
    text: str

    @property
    def keyword(self) -> str:
        """In small letters, as keywords and plain identifiers count; empty where it can be neither."""
        return "".join(c.lower() if c.isascii() else c for c in self.text) if self.kind == "word" else ""

    @property
    def identifier(self) -> str | None:
        """The name that it is; None where it is none."""
        name = self.text[1:-1].replace('""', '"') if self.kind == "quoted" else self.keyword
        # Longer ones the server cuts off.
        return shorten(name, MAX_IDENTIFIER_BYTES) or None


@dataclass(frozen=True)
class Refreshed:
    """A view that a command refreshes, as the command names it.

    :ivar database: the database, where it names that too.
    """

    view: ViewName
    concurrently: bool
    database: str | None = None


@dataclass(frozen=True)
class CronCommand:
    """What can be seen in the text of a command.

    :ivar refreshed: the views that it brings up to date, each once; none where it is not SQL.
    :ivar alone: whether it does nothing but refresh one view.
    :ivar sets_path: whether it changes which schemas are searched for a name without one.
    :ivar own_transactions: whether it ends transactions itself, so that how it ended as a whole does not tell what of
        it was committed.
    """

    refreshed: tuple[Refreshed, ...]
    alone: bool
    sets_path: bool
    own_transactions: bool


def read_command(text: str) -> CronCommand:
    """Read a command of one statement or of several."""
    statements = list(_statements(list(_tokens(text))))
    # The last word on a view counts: it may be emptied again.
    refreshed: dict[tuple[str | None, ViewName], Refreshed | None] = {}
    for statement in statements:
        if (found := _refresh(statement)) is not None:
            refresh, with_data = found
            refreshed[refresh.database, refresh.view] = refresh if with_data else None
    kept = tuple(refresh for refresh in refreshed.values() if refresh is not None)
    heads = [statement[0].keyword for statement in statements]
    controls = [head for head in heads if head in _TRANSACTION]
    # BEGIN at its head and COMMIT at its end change nothing: all of it is one transaction anyhow.
    wrapped = len(controls) == 2 and heads[0] in _BEGINS and heads[-1] in _COMMITS
    return CronCommand(
        refreshed=kept,
        alone=len(kept) == 1 and len(statements) - (2 if wrapped else 0) == 1,
        sets_path="search_path" in text.lower() or any(map(_touches_path, statements)),
        own_transactions=bool(controls) and not wrapped,
    )


_NO_DATA = ["with", "no", "data"]
_ENDS: tuple[list[str], ...] = ([], ["with", "data"], _NO_DATA)


def _refresh(statement: Sequence[_Token]) -> tuple[Refreshed, bool] | None:
    """Return what a statement refreshes, and whether with data; None where it is no REFRESH."""
    words = [token.keyword for token in statement]
    if words[:3] != ["refresh", "materialized", "view"]:
        return None
    concurrently = words[3:4] == ["concurrently"]
    begin = 4 if concurrently else 3
    end = begin
    names: list[str] = []
    while end < len(statement) and (name := statement[end].identifier) is not None:
        names.append(name)
        end += 1
        if end == len(statement) or statement[end].text != ".":
            break
        end += 1
    rest = words[end:]
    if not 1 <= len(names) <= 3 or end - begin != 2 * len(names) - 1 or rest not in _ENDS:
        return None
    schema = names[-2] if len(names) > 1 else None
    database = names[0] if len(names) == 3 else None
    return Refreshed(ViewName(names[-1], schema), concurrently, database), rest != _NO_DATA


def _touches_path(statement: Sequence[_Token]) -> bool:
    words = {token.keyword for token in statement}
    return statement[0].keyword in {"set", "reset", "discard"} and not words.isdisjoint(_PATH)


def _statements(tokens: Sequence[_Token]) -> Iterator[list[_Token]]:
    if any(token.kind == "other" and token.text in "'\"" for token in tokens):
        # A quote that nothing ends: the server refuses all of it.
        return
    statement: list[_Token] = []
    for token in tokens:
        if token.text == ";":
            if statement:
                yield statement
            statement = []
        else:
            statement.append(token)
    if statement:
        yield statement


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    while match := _TOKEN.match(text, position):
        position = match.end()
        kind = match.lastgroup or ""
        if kind == "comment":
            position = _end_of_comment(text, position)
        elif kind != "space":
            yield _Token(kind, match[0])


def _end_of_comment(text: str, position: int) -> int:
    depth = 1
    while depth and (edge := _COMMENT_EDGE.search(text, position)):
        depth += 1 if edge[0] == "/*" else -1
        position = edge.end()
    # The server refuses one that has no end, and with it all of the command.
    return len(text) if depth else position
