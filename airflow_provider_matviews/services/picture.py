"""The whole picture of a view: everything PostgreSQL keeps about it that a rebuilt one must have too.

One round trip, so that it can be taken while a lock is held. Names are resolved as text under
``search_path = pg_catalog``, which makes the server qualify all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from psycopg import sql

from airflow_provider_matviews.services.instructions import Session, Work, fetch_all, fetch_one
from airflow_provider_matviews.services.picture_query import PICTURE, PICTURE_WITHOUT_DEFINITIONS, PRIVILEGES


@dataclass(frozen=True)
class Privilege:
    """One entry of an access control list. ``grantee`` None is everybody."""

    grantee: str | None
    grantor: str
    privilege: str
    grantable: bool


@dataclass(frozen=True)
class Label:
    """A security label."""

    provider: str
    label: str


@dataclass(frozen=True)
class ColumnPicture:
    """A column with its settings; None for a setting left at its default.

    :ivar type: identifies it whatever the search path, which differs between the connections.
    :ivar usual_storage: its type's own.
    """

    name: str
    type: str
    usual_storage: str
    storage: str | None
    compression: str | None
    statistics: int | None
    options: tuple[str, ...]
    comment: str | None
    privileges: tuple[Privilege, ...]
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class KeyPicture:
    """One key of an index.

    :ivar column: None for an expression.
    :ivar expression: None for a column.
    :ivar usual_operator_class: whether it is the one that is taken where none is named.
    :ivar usual_collation: likewise.
    """

    column: str | None
    expression: str | None
    operator_class: str
    usual_operator_class: bool
    operator_class_options: tuple[str, ...]
    collation: str | None
    usual_collation: bool
    descending: bool
    nulls_first: bool

    @property
    def text(self) -> str:
        """What stands for it in a definition."""
        text = f"({self.expression})" if self.column is None else _quoted(self.column)
        if self.collation is not None:
            text += f" COLLATE {self.collation}"
        text += f" {self.operator_class}"
        if options := _settings(self.operator_class_options):
            text += f" ({options})"
        # Only methods that can order have either; what is said is said in full.
        if self.descending:
            text += " DESC" if self.nulls_first else " DESC NULLS LAST"
        elif self.nulls_first:
            text += " NULLS FIRST"
        return text


@dataclass(frozen=True)
class IndexShape:
    """What makes an index the index it is; all else about it can be altered."""

    method: str
    unique: bool
    nulls_not_distinct: bool
    keys: tuple[KeyPicture, ...]
    include: tuple[str, ...]
    predicate: str | None

    def body(self, options: Iterable[str]) -> str:
        """Return the definition from the method on, for an index with these options."""
        text = f"{_quoted(self.method)} ({', '.join(key.text for key in self.keys)})"
        if self.include:
            text += f" INCLUDE ({', '.join(map(_quoted, self.include))})"
        if self.nulls_not_distinct:
            text += " NULLS NOT DISTINCT"
        if with_ := _settings(options):
            text += f" WITH ({with_})"
        return text if self.predicate is None else f"{text} WHERE {self.predicate}"


@dataclass(frozen=True)
class IndexAnatomy:
    """What can be told of an index only while its view may be locked.

    :ivar body: its definition from the method on, without its name and the view's; None where not understood.
    :ivar reads: the view's columns that it reads.
    """

    definition: str
    body: str | None
    shape: IndexShape
    options: tuple[str, ...]
    reads: tuple[str, ...]

    @property
    def has_expression(self) -> bool:
        """Whether anything in it is more than a column."""
        return self.shape.predicate is not None or any(key.column is None for key in self.shape.keys)


@dataclass(frozen=True)
class StatisticsAnatomy:
    """What can be told of extended statistics only while their view may be locked; see :class:`IndexAnatomy`.

    :ivar body: the definition without their name and the view's: ``(kinds) ON a, b``.
    """

    definition: str
    body: str | None
    columns: tuple[str, ...]
    expressions: tuple[str, ...]
    kinds: tuple[str, ...]
    reads: tuple[str, ...]

    @property
    def made_of(self) -> tuple[tuple[str, ...], ...]:
        """What makes them the statistics they are."""
        return self.columns, self.expressions, self.kinds

    def worded(self) -> str:
        """Return the definition without their name and the view's, made of its parts."""
        kinds = f"({', '.join(self.kinds)}) " if self.kinds else ""
        subjects = [*map(_quoted, self.columns), *(f"({expression})" for expression in self.expressions)]
        return f"{kinds}ON {', '.join(subjects)}"


@dataclass(frozen=True)
class IndexPicture:
    """An index.

    :ivar anatomy: None where no lock could be waited for.
    :ivar fingerprint: the same as the catalog holds it, which can be read without a lock.
    """

    name: str
    anatomy: IndexAnatomy | None
    fingerprint: str
    unique: bool
    valid: bool
    tablespace: str | None
    statistics: tuple[tuple[int, int], ...]
    comment: str | None
    clustered: bool
    replica_identity: bool
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class StatisticsPicture:
    """An extended statistics object; see :class:`IndexPicture`."""

    schema: str
    name: str
    owner: str
    anatomy: StatisticsAnatomy | None
    fingerprint: str
    target: int | None
    comment: str | None


@dataclass(frozen=True)
class Picture:
    """A materialized view with everything attached to it. Two are equal when nothing differs but OIDs."""

    owner: str
    access_method: str
    tablespace: str | None
    options: tuple[str, ...]
    toast_options: tuple[str, ...]
    comment: str | None
    replica_identity: str
    privileges: tuple[Privilege, ...]
    labels: tuple[Label, ...]
    columns: tuple[ColumnPicture, ...]
    indexes: tuple[IndexPicture, ...]
    statistics: tuple[StatisticsPicture, ...]
    #: (extension, pg_depend.deptype): ``e`` belongs to it, ``x`` goes when it goes.
    extensions: tuple[tuple[str, str], ...]

    def without_definitions(self) -> Picture:
        """Return the picture as it is taken without locks."""
        return replace(
            self,
            indexes=tuple(replace(index, anatomy=None) for index in self.indexes),
            statistics=tuple(replace(each, anatomy=None) for each in self.statistics),
        )

    def differences(self, other: Picture) -> list[str]:
        """Return the names of what differs, for a person."""
        different: list[str] = []
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine == theirs:
                continue
            if isinstance(mine, tuple) and name in ("columns", "indexes", "statistics"):
                changed = {each.name for each in set(mine) ^ set(theirs)}
                different.append(f"{name} ({', '.join(sorted(changed))})")
            else:
                different.append(name.replace("_", " "))
        return different


def take_picture(oid: int, session: Session = Session.WORK, *, definitions: bool = True) -> Work[Picture | None]:
    """Return the picture of a view, or None where it is gone.

    :param session: ``Session.RECORD`` sees the view from outside the operation's transaction: as others left it,
        even after the operation has dropped it.
    :param definitions: False leaves them empty. The functions that give them lock the view (ruleutils.c opens
        it); from outside that would wait for the operation, which waits for the answer.
    """
    row = yield from fetch_one(PICTURE if definitions else PICTURE_WITHOUT_DEFINITIONS, {"oid": oid}, session)
    return None if row is None else _picture(row["picture"])


def privileges_of(relation: str) -> Work[tuple[Privilege, ...]]:
    """Return the privileges on a relation, those of its owner too.

    :param relation: its name, quoted.
    """
    row = yield from fetch_one(PRIVILEGES, (relation,))
    assert row is not None
    return _privileges(row["privileges"])


#: Under these the server's text of a definition says all of it, and is read back as the same.
_FAITHFUL = {
    "search_path": "pg_catalog",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "array_nulls": "on",
    "standard_conforming_strings": "on",
    "quote_all_identifiers": "off",
}


def speak_plainly() -> Work[dict[str, str]]:
    """Make the server give definitions with every name qualified and every constant exact; return the settings before.

    As pg_dump does: ``extra_float_digits=0`` or another date style would change constants on their way through text.
    """
    row = yield from fetch_one(
        sql.SQL("SELECT {}").format(
            sql.SQL(", ").join(
                sql.SQL("current_setting({}) AS {}").format(sql.Literal(name), sql.Identifier(name))
                for name in _FAITHFUL
            )
        )
    )
    assert row is not None
    yield from restore_settings(_FAITHFUL)
    return dict(row)


def restore_settings(settings: Mapping[str, str]) -> Work[None]:
    """Set them for this transaction: those from before, since the query runs under them."""
    yield from fetch_all(
        sql.SQL("SELECT {}").format(
            sql.SQL(", ").join(
                sql.SQL("set_config({}, {}, true)").format(sql.Literal(name), sql.Literal(value))
                for name, value in settings.items()
            )
        )
    )


def _quoted(name: str) -> str:
    return sql.Identifier(name).as_string(None)


def _settings(options: Iterable[str]) -> str:
    pairs = (option.partition("=") for option in options)
    return ", ".join(f"{_quoted(name)} = {sql.Literal(value).as_string(None)}" for name, _, value in pairs)


def _privileges(rows: Iterable[Mapping[str, Any]]) -> tuple[Privilege, ...]:
    return tuple(Privilege(**row) for row in rows)


def _labels(rows: Iterable[Mapping[str, Any]]) -> tuple[Label, ...]:
    return tuple(Label(**row) for row in rows)


def _picture(data: dict[str, Any]) -> Picture:
    columns = tuple(
        ColumnPicture(
            **{
                **column,
                "options": tuple(column["options"]),
                "privileges": _privileges(column["privileges"]),
                "labels": _labels(column["labels"]),
            }
        )
        for column in data["columns"]
    )
    relation = data.pop("relation")
    indexes = tuple(
        IndexPicture(
            **{
                **index,
                "anatomy": _index_anatomy(index["anatomy"], relation),
                "statistics": tuple((number, target) for number, target in index["statistics"]),
                "extensions": tuple(index["extensions"]),
            }
        )
        for index in data["indexes"]
    )
    return Picture(
        **{
            **data,
            "options": tuple(data["options"]),
            "toast_options": tuple(data["toast_options"]),
            "privileges": _privileges(data["privileges"]),
            "labels": _labels(data["labels"]),
            "columns": columns,
            "indexes": indexes,
            "statistics": tuple(
                StatisticsPicture(**{**each, "anatomy": _statistics_anatomy(each["anatomy"], relation)})
                for each in data["statistics"]
            ),
            "extensions": tuple((name, kind) for name, kind in data["extensions"]),
        }
    )


def _index_anatomy(data: dict[str, Any] | None, relation: str) -> IndexAnatomy | None:
    if data is None:
        return None
    shape = data["shape"]
    keys = tuple(
        KeyPicture(
            **{
                **key,
                "expression": _without_parentheses(key["expression"]),
                "operator_class_options": tuple(key["operator_class_options"]),
            }
        )
        for key in shape["keys"]
    )
    kind = "CREATE UNIQUE INDEX" if shape["unique"] else "CREATE INDEX"
    return IndexAnatomy(
        definition=data["definition"],
        body=_between(data["definition"], f"{kind} {data['quoted']} ON {relation} USING ", ""),
        shape=IndexShape(**{**shape, "keys": keys, "include": tuple(shape["include"])}),
        options=tuple(data["options"]),
        reads=tuple(data["reads"]),
    )


def _statistics_anatomy(data: dict[str, Any] | None, relation: str) -> StatisticsAnatomy | None:
    if data is None:
        return None
    return StatisticsAnatomy(
        definition=data["definition"],
        body=_between(data["definition"], f"CREATE STATISTICS {data['quoted']} ", f" FROM {relation}"),
        columns=tuple(data["columns"]),
        expressions=tuple(data["expressions"]),
        kinds=tuple(data["kinds"]),
        reads=tuple(data["reads"]),
    )


def _between(definition: str, prefix: str, suffix: str) -> str | None:
    """Return a definition without the names in it.

    The server's text begins with names that it quotes itself; what is not exactly as expected is not guessed at.
    """
    if not (definition.startswith(prefix) and definition.endswith(suffix)):
        return None
    return definition[len(prefix) : len(definition) - len(suffix)]


def _without_parentheses(expression: str | None) -> str | None:
    # The server puts them around whatever is no mere function call, and around nothing else.
    if expression is not None and expression.startswith("("):
        return expression[1:-1]
    return expression
