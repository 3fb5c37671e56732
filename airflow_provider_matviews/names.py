"""Names of views: what a person types, and the two identifiers that PostgreSQL reads in it.

Knows the lexical rules of PostgreSQL identifiers and nothing else: no server, no Airflow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from airflow_provider_matviews.exceptions import InvalidName

#: NAMEDATALEN - 1. The server cuts longer names off in silence, so they are refused here
#: (https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS).
MAX_IDENTIFIER_BYTES = 63

_SPACE = r"[ \t\r\n\f\v]*"
_PART = re.compile(
    _SPACE
    + r'(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<plain>[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]*))'
    + _SPACE
)
_PLAIN = re.compile(r"[a-z_][a-z0-9_$]*\Z")


def check_identifier(identifier: str, what: str = "identifier") -> str:
    """Return ``identifier`` when PostgreSQL can hold it as it stands.

    :param identifier: the name itself, not quoted.
    :param what: what it names, for the error.
    :raises InvalidName: when it is empty, longer than 63 bytes, or holds a NUL or half a character.
    """
    if not isinstance(identifier, str) or not identifier:
        raise InvalidName(f"The {what} is empty: give the name of one.")
    try:
        size = len(identifier.encode())
    except UnicodeEncodeError:
        raise InvalidName(f"The {what} {identifier!r} is not valid Unicode text.") from None
    if "\0" in identifier:
        raise InvalidName(f"The {what} {identifier!r} holds a NUL character, which PostgreSQL refuses.")
    if size > MAX_IDENTIFIER_BYTES:
        raise InvalidName(
            f"The {what} {identifier!r} is {size} bytes long; PostgreSQL keeps {MAX_IDENTIFIER_BYTES} "
            "and would cut the rest off in silence. Shorten it."
        )
    return identifier


def quote(identifier: str) -> str:
    """Return ``identifier`` as a person would type it, quoted only where it has to be."""
    if _PLAIN.match(identifier):
        return identifier
    return '"' + identifier.replace('"', '""') + '"'


def shorten(identifier: str, max_bytes: int) -> str:
    """Return the longest start of ``identifier`` that fits in ``max_bytes`` bytes of UTF-8."""
    return identifier.encode()[:max_bytes].decode(errors="ignore")


@dataclass(frozen=True, slots=True)
class ViewName:
    """A view's name, perhaps without its schema.

    :param name: the identifier itself, not quoted.
    :param schema: the schema's identifier, or None where the search path decides.
    """

    name: str
    schema: str | None = None

    @classmethod
    def parse(cls, text: str) -> ViewName:
        """Read a name as one would type it in SQL: ``mv``, ``schema.mv``, ``"Odd Name".mv``.

        What is not quoted is folded to lower case, ASCII letters only, as the server does.

        :raises InvalidName: when it is no such name; the message says what is wrong.
        """
        if not isinstance(text, str):
            raise InvalidName(f"A view name is text, not {type(text).__name__}: {text!r}.")
        parts: list[str] = []
        position = 0
        while True:
            match = _PART.match(text, position)
            if match is None:
                raise InvalidName(_explain(text, position))
            parts.append(_identifier(match))
            position = match.end()
            if position == len(text):
                break
            if text[position] != ".":
                raise InvalidName(_explain(text, position))
            position += 1
        if len(parts) > 2:
            raise InvalidName(
                f"The view name {text!r} has {len(parts)} parts. Name a view as `view` or `schema.view`; "
                "the connection decides the database. A dot inside a name needs double quotes."
            )
        for part, what in zip(reversed(parts), ("view name", "schema name"), strict=False):
            check_identifier(part, what)
        return cls(parts[-1], parts[0] if len(parts) == 2 else None)

    def __str__(self) -> str:
        if self.schema is None:
            return quote(self.name)
        return f"{quote(self.schema)}.{quote(self.name)}"


def _identifier(match: re.Match[str]) -> str:
    quoted = match["quoted"]
    if quoted is not None:
        return quoted.replace('""', '"')
    return "".join(c.lower() if c.isascii() else c for c in match["plain"])


def _explain(text: str, position: int) -> str:
    if not text.strip():
        return "The view name is empty: give one as `view` or `schema.view`."
    if position >= len(text):
        return f"The view name {text!r} ends where another name was expected."
    return (
        f"The view name {text!r} does not parse at {text[position:]!r}. "
        'Write it as in SQL: `view`, `schema.view`, or with double quotes for anything unusual: `"Odd Name".view`.'
    )
