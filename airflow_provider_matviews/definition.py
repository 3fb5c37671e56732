"""What a materialized view should be: pure data, from code or from a ``.sql`` file.

Knows neither Airflow nor a database. What a definition means on a server is the services' business;
what can be seen to be wrong without a server is refused here, when it is built.
"""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum, StrEnum
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, TypeVar

from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, ViewName, check_identifier, shorten
from airflow_provider_matviews.timeouts import Timeouts

#: What can be granted on a materialized view (https://www.postgresql.org/docs/current/sql-grant.html).
PRIVILEGES = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER", "MAINTAIN", "ALL"})

#: Comments before the header, such as a licence, are passed over.
_HEADER = re.compile(r"\A(?:\s|--[^\n]*(?:\n|\Z)|/\*(?!\s*matview\b).*?\*/)*/\*\s*matview\b(?P<toml>.*?)\*/", re.DOTALL)
_ALMOST_HEADER = re.compile(r"\A(?:\s|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*?/\*+[+!]?\s*matview\b", re.DOTALL | re.IGNORECASE)
_PARAMETER = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)?\Z")
_METHOD = re.compile(r"[a-z_][a-z0-9_]*\Z")

#: Settings that an operation sets itself, or that decide who it is: with what to use instead.
_RESERVED_SETTINGS: dict[str, str | None] = {
    "lock_timeout": "use the argument lock_timeout=... (seconds).",
    "idle_in_transaction_session_timeout": None,
    "client_connection_check_interval": None,
    "role": "use another connection.",
    "session_authorization": "use another connection.",
    "client_encoding": None,
    "standard_conforming_strings": None,
    "track_counts": None,
}

ParameterValue = str | int | float | bool
_C = TypeVar("_C", bound=Enum)


class RefreshStrategy(StrEnum):
    """How a view is refreshed.

    ``regular``: REFRESH MATERIALIZED VIEW; readers wait while it runs.
    ``concurrent``: REFRESH ... CONCURRENTLY; readers go on, a unique index is needed.
    ``swap``: build beside the live view, then one short cut.
    ``auto``: whichever costs readers least, chosen from facts at each refresh.
    """

    REGULAR = "regular"
    CONCURRENT = "concurrent"
    SWAP = "swap"
    AUTO = "auto"


class RowCountStrategy(StrEnum):
    """How rows are counted before and after: ``none``, ``estimated`` (never a scan) or ``exact``."""

    NONE = "none"
    ESTIMATED = "estimated"
    EXACT = "exact"


class IfLocked(StrEnum):
    """What to do while another operation on the same view runs: ``wait`` for it, ``skip``, or ``fail``."""

    WAIT = "wait"
    SKIP = "skip"
    FAIL = "fail"


def choice(kind: type[_C], value: object, argument: str) -> _C:
    """Return the member of ``kind`` that ``value`` names.

    :raises InvalidDefinition: when there is none; the message lists what there is.
    """
    try:
        return kind(value)
    except ValueError:
        options = ", ".join(repr(member.value) for member in kind)
        raise InvalidDefinition(f"{argument}={value!r} does not exist. Choose one of {options}.") from None


@dataclass(frozen=True, kw_only=True)
class IndexKey:
    """One key of an index: a column or an expression, with what PostgreSQL lets one say about it.

    :param column: a column's exact name (not quoted).
    :param expression: an SQL expression over the view's columns, instead of a column.
    :param order: ``asc`` or ``desc``; None for the method's default.
    :param nulls: ``first`` or ``last``.
    :param operator_class: its name, perhaps with its schema.
    :param collation: its name, perhaps with its schema.
    :raises InvalidDefinition: when neither or both of column and expression are given.
    """

    column: str | None = None
    expression: str | None = None
    order: str | None = None
    nulls: str | None = None
    operator_class: str | None = None
    collation: str | None = None

    def __post_init__(self) -> None:
        if (self.column is None) == (self.expression is None):
            raise InvalidDefinition("An index key is either a column or an expression: give exactly one.")
        if self.column is not None:
            check_identifier(self.column, "index column")
        if self.expression is not None:
            _check_text(self.expression, "index expression")
        for value, argument, options in (
            (self.order, "order", ("asc", "desc")),
            (self.nulls, "nulls", ("first", "last")),
        ):
            if value is not None and value not in options:
                raise InvalidDefinition(f"{argument}={value!r} of an index key is not one of {options}.")
        for value in (self.operator_class, self.collation):
            if value is not None:
                ViewName.parse(value)


@dataclass(frozen=True, kw_only=True)
class Index:
    """An index that a view should have (https://www.postgresql.org/docs/current/sql-createindex.html).

    :param columns: its keys in order: exact column names, or :class:`IndexKey` for anything more.
    :param name: its exact name; None for one made of the view's and the keys' names.
    :param method: the access method.
    :param unique: whether it is unique. Only a unique index over plain columns, without ``where``,
        lets the view be refreshed concurrently.
    :param where: the predicate of a partial index.
    :param include: columns it carries along.
    :param storage_parameters: what goes into its WITH clause, such as ``{"fillfactor": 90}``.
    :param tablespace: where it is kept; None for the default.
    :param nulls_not_distinct: for a unique index, whether NULLs count as equal (PostgreSQL 15 or newer).
    :raises InvalidDefinition: when it cannot be an index.
    """

    columns: Sequence[str | IndexKey]
    name: str | None = None
    method: str = "btree"
    unique: bool = False
    where: str | None = None
    include: Sequence[str] = ()
    storage_parameters: Mapping[str, ParameterValue] = field(default_factory=dict, hash=False)
    tablespace: str | None = None
    nulls_not_distinct: bool = False

    def __post_init__(self) -> None:
        _set(self, "columns", _tuple(self.columns, "columns of an index", (str, IndexKey)))
        _set(self, "include", _tuple(self.include, "include of an index", (str,)))
        if not self.columns:
            raise InvalidDefinition("An index needs at least one column or expression.")
        for column in (*self.columns, *self.include):
            if isinstance(column, str):
                check_identifier(column, "index column")
        if self.name is not None:
            check_identifier(self.name, "index name")
        if not isinstance(self.method, str) or not _METHOD.match(self.method):
            raise InvalidDefinition(f"method={self.method!r} is not the name of an index access method.")
        if self.where is not None:
            _check_text(self.where, "predicate of an index")
        if self.tablespace is not None:
            check_identifier(self.tablespace, "tablespace name")
        check_flag(self.unique, "unique of an index")
        check_flag(self.nulls_not_distinct, "nulls_not_distinct of an index")
        _set(self, "storage_parameters", _parameters(self.storage_parameters))

    @property
    def keys(self) -> tuple[IndexKey, ...]:
        """Its keys, plain column names included, as :class:`IndexKey`."""
        return tuple(key if isinstance(key, IndexKey) else IndexKey(column=key) for key in self.columns)

    @property
    def plain_columns(self) -> tuple[str, ...]:
        """The names of the columns it reads directly, keys and include."""
        return (*(key.column for key in self.keys if key.column is not None), *self.include)

    @property
    def allows_concurrent_refresh(self) -> bool:
        """Whether it is what REFRESH ... CONCURRENTLY asks for."""
        return self.unique and self.where is None and all(key.column is not None for key in self.keys)

    def name_on(self, view: str) -> str:
        """Return its name on a view: its own, or one made as PostgreSQL makes them, at most 63 bytes long."""
        if self.name is not None:
            return self.name
        middle = "_".join(key.column or "expr" for key in self.keys)
        full = f"{view}_{middle}_{'key' if self.unique else 'idx'}"
        if len(full.encode()) <= MAX_IDENTIFIER_BYTES:
            return full
        digest = hashlib.sha256(full.encode()).hexdigest()[:8]
        return f"{shorten(full, MAX_IDENTIFIER_BYTES - len(digest) - 1)}_{digest}"


@dataclass(frozen=True, kw_only=True)
class MatViewDefinition:
    """What a materialized view should be.

    :param name: ``view`` or ``schema.view``, as one would type it in SQL. Without a schema the connection's
        search path decides.
    :param sql: the query: one SELECT, WITH, VALUES or TABLE statement.
    :param refresh_strategy: one of :class:`RefreshStrategy`; the default ``auto`` chooses at each refresh.
    :param unique_index_columns: exact names of columns that together are unique; an index over them is
        made and lets the view be refreshed concurrently.
    :param indexes: further indexes.
    :param comment: what COMMENT ON says of the view.
    :param grants: role -> privileges, such as ``{"reporting": ["SELECT"]}``. The role ``public`` is everybody.
    :param storage_parameters: what goes into the view's WITH clause, such as ``{"fillfactor": 90}``.
    :param tablespace: where it is kept; None for the default.
    :param depends_on: names of the views that have to be refreshed first.
    :param description: for the people who read this definition; not sent to the server.
    :param managed: False for a view that somebody else owns: it may be refreshed and tracked, is never
        created or altered, and dropped only by force.
    :param session_settings: PostgreSQL settings for every operation on it, such as ``{"work_mem": "256MB"}``;
        set for its transaction only.
    :param timeouts: limits in seconds for every operation on it, by the names that the operators give them:
        ``lock_timeout``, ``max_wait``, ``statement_timeout``, ``timeout``. Those of a call go before them.
    :raises InvalidDefinition: when it can be seen, without a server, that this can never be a view.
    """

    name: str
    sql: str
    refresh_strategy: RefreshStrategy | str = RefreshStrategy.AUTO
    unique_index_columns: Sequence[str] = ()
    indexes: Sequence[Index] = ()
    comment: str | None = None
    grants: Mapping[str, Sequence[str]] = field(default_factory=dict, hash=False)
    storage_parameters: Mapping[str, ParameterValue] = field(default_factory=dict, hash=False)
    tablespace: str | None = None
    depends_on: Sequence[str] = ()
    description: str | None = None
    managed: bool = True
    session_settings: Mapping[str, ParameterValue] = field(default_factory=dict, hash=False)
    timeouts: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        view = ViewName.parse(self.name)
        _check_text(self.sql, f"SQL of {view}")
        _set(self, "refresh_strategy", choice(RefreshStrategy, self.refresh_strategy, "refresh_strategy"))
        _set(self, "unique_index_columns", _tuple(self.unique_index_columns, "unique_index_columns", (str,)))
        _set(self, "indexes", _tuple(self.indexes, "indexes", (Index,)))
        _set(self, "depends_on", _tuple(self.depends_on, "depends_on", (str,)))
        _set(self, "grants", _grants(self.grants))
        _set(self, "storage_parameters", _parameters(self.storage_parameters))
        _set(self, "session_settings", check_session_settings(self.session_settings))
        _set(self, "timeouts", Timeouts.of(self.timeouts).said())
        for column in self.unique_index_columns:
            check_identifier(column, "column name in unique_index_columns")
        for other in self.depends_on:
            ViewName.parse(other)
        if self.tablespace is not None:
            check_identifier(self.tablespace, "tablespace name")
        for text, what in ((self.comment, "comment"), (self.description, "description")):
            if text is not None:
                _check_text(text, f"{what} of {view}")
        check_flag(self.managed, "managed")
        names = [index.name_on(view.name) for index in self.all_indexes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidDefinition(
                f"Two indexes of {view} would be named {', '.join(twice)}: give them names (Index(name=...))."
            )
        if (
            self.managed
            and self.refresh_strategy is RefreshStrategy.CONCURRENT
            and not any(index.allows_concurrent_refresh for index in self.all_indexes)
        ):
            raise InvalidDefinition(
                f"{view} asks for refresh_strategy='concurrent' but declares no unique index over plain columns, "
                "which PostgreSQL needs for it.",
                hint="declare unique_index_columns=(...), or choose refresh_strategy='auto'.",
            )

    @property
    def view(self) -> ViewName:
        """The name, parsed."""
        return ViewName.parse(self.name)

    @property
    def all_indexes(self) -> tuple[Index, ...]:
        """Every index it declares, the one over ``unique_index_columns`` first."""
        if not self.unique_index_columns:
            return tuple(self.indexes)
        return (Index(columns=self.unique_index_columns, unique=True), *self.indexes)

    @classmethod
    def from_dict(cls, declaration: Mapping[str, Any]) -> MatViewDefinition:
        """Build a definition from plain data, as JSON or a file's header holds it.

        :raises InvalidDefinition: when a key is unknown or a value cannot be what it should be.
        """
        values = _known(cls, declaration, "a view's definition")
        indexes = values.get("indexes", ())
        if isinstance(indexes, (str, Mapping)) or not isinstance(indexes, Iterable):
            raise InvalidDefinition("indexes is a list of tables: [[indexes]] in a file, dicts in code.")
        values["indexes"] = tuple(_index(index) for index in indexes)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the definition as plain data that JSON can hold; :meth:`from_dict` reads it."""
        declaration = _plain(self)
        declaration["indexes"] = [
            {
                **_plain(index),
                "columns": [key if isinstance(key, str) else _plain(key) for key in index.columns],
            }
            for index in self.indexes
        ]
        return declaration

    @classmethod
    def from_sql(cls, text: str, *, name: str | None = None, **defaults: Any) -> MatViewDefinition:
        """Read a definition from SQL text, with a header or without.

        What there is to say beside the query stands in TOML in a block comment at the head that begins with the
        word ``matview``; its keys are this class's arguments.

        :param name: the view's name where the header gives none.
        :param defaults: further arguments where the header gives none.
        :raises InvalidDefinition: when the header or the definition is wrong, or there is no name.
        """
        _check_text(text, "SQL of a view")
        header = _HEADER.match(text)
        if header is None and _ALMOST_HEADER.match(text):
            raise InvalidDefinition(
                "The SQL begins with what looks like a matview header and is none.",
                hint="begin it with `/* matview`, go on in TOML, and end it with `*/`.",
            )
        try:
            declaration = tomllib.loads(header["toml"]) if header else {}
        except tomllib.TOMLDecodeError as error:
            raise InvalidDefinition(f"The matview header is not TOML: {error}.") from error
        if "sql" in declaration:
            raise InvalidDefinition("The header has a key `sql`, but the SQL is what follows it: remove it.")
        given = {"name": name, **defaults}
        declaration = {**{key: value for key, value in given.items() if value is not None}, **declaration}
        if "name" not in declaration:
            raise InvalidDefinition("The definition has no name.", hint='write name = "schema.view" in its header.')
        declaration["sql"] = (text[header.end() :] if header else text).strip()
        return cls.from_dict(declaration)

    @classmethod
    def from_file(cls, path: str | Path) -> MatViewDefinition:
        """Read a definition from a ``.sql`` file, as :meth:`from_sql` does.

        Without a ``name`` in its header the view is named after the file.

        :raises InvalidDefinition: when the header or the definition is wrong; the message names the file.
        :raises OSError: when the file cannot be read.
        """
        path = Path(path)
        try:
            return cls.from_sql(path.read_text(encoding="utf-8-sig"), name=path.stem)
        except InvalidDefinition as error:
            raise type(error)(f"{path}: {error.message}", hint=error.hint) from error
        except UnicodeDecodeError as error:
            raise InvalidDefinition(f"{path} is not UTF-8 text: {error}.") from error


def load_definitions(folder: str | Path) -> dict[str, MatViewDefinition]:
    """Read every ``*.sql`` file below ``folder``.

    :returns: name -> definition, each after those that it depends on (``depends_on``).
    :raises InvalidDefinition: when a file is wrong, two declare the same view, or views depend on each
        other in a circle; the message names them.
    :raises NotADirectoryError: when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder with .sql files.")
    definitions: dict[str, MatViewDefinition] = {}
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.sql")):
        definition = MatViewDefinition.from_file(path)
        key = str(definition.view)
        if key in definitions:
            raise InvalidDefinition(f"{key} is declared twice: in {files[key]} and in {path}.")
        definitions[key], files[key] = definition, path
    needs = {
        key: [str(ViewName.parse(other)) for other in definition.depends_on] for key, definition in definitions.items()
    }
    try:
        order = TopologicalSorter(needs).static_order()
        return {definitions[key].name: definitions[key] for key in order if key in definitions}
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise InvalidDefinition(f"Views depend on each other in a circle: {circle}.") from None


def check_session_settings(settings: object) -> dict[str, ParameterValue]:
    """Return settings as given.

    :raises InvalidDefinition: when they are no mapping, hold what is no name of a setting, or one that the
        operation itself relies on.
    """
    if not isinstance(settings, Mapping):
        raise InvalidDefinition(f"session_settings maps names to values, not {settings!r}.")
    for name, value in settings.items():
        if not isinstance(name, str) or not _PARAMETER.match(name.lower()):
            raise InvalidDefinition(f"{name!r} is not the name of a PostgreSQL setting.")
        if name.lower() in _RESERVED_SETTINGS or name.lower().startswith("transaction_"):
            raise InvalidDefinition(
                f"session_settings cannot hold {name}: the operation itself relies on it.",
                hint=_RESERVED_SETTINGS.get(name.lower()),
            )
        if not _is_value(value):
            raise InvalidDefinition(f"The setting {name} is a number, text or true/false, not {value!r}.")
    return dict(settings)


def _set(instance: object, name: str, value: object) -> None:
    object.__setattr__(instance, name, value)


def _plain(instance: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for each in fields(instance):
        value = getattr(instance, each.name)
        if isinstance(value, Enum):
            value = value.value
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
        plain[each.name] = value
    return plain


def _known(kind: type, declaration: object, what: str) -> dict[str, Any]:
    if not isinstance(declaration, Mapping):
        raise InvalidDefinition(f"{what} is a table of arguments, not {declaration!r}.")
    known = [each.name for each in fields(kind)]
    if unknown := sorted(map(str, set(declaration) - set(known))):
        raise InvalidDefinition(
            f"{', '.join(map(repr, unknown))} is no argument of {what}. There are: {', '.join(known)}."
        )
    required = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
    if missing := [name for name in required if name not in declaration]:
        raise InvalidDefinition(f"{what} lacks {', '.join(map(repr, missing))}.")
    return dict(declaration)


def _index(declaration: object) -> Index:
    if isinstance(declaration, Index):
        return declaration
    values = _known(Index, declaration, "an index")
    columns = values.get("columns", ())
    if isinstance(columns, str) or not isinstance(columns, Iterable):
        raise InvalidDefinition(f"columns of an index is a list, not {columns!r}.")
    values["columns"] = tuple(
        IndexKey(**_known(IndexKey, key, "an index key")) if isinstance(key, Mapping) else key for key in columns
    )
    return Index(**values)


def _check_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise InvalidDefinition(f"The {what} is text, not {type(text).__name__}.")
    if not text.strip():
        raise InvalidDefinition(f"The {what} is empty.")
    if "\0" in text:
        raise InvalidDefinition(f"The {what} holds a NUL character, which PostgreSQL refuses.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidDefinition(f"The {what} is not valid Unicode text.") from None


def check_flag(value: object, argument: str) -> None:
    """Refuse what is not a bool: the word "false", from a file or a template, would count as true.

    :raises InvalidDefinition: when it is anything else than True or False.
    """
    if not isinstance(value, bool):
        raise InvalidDefinition(f"{argument} is true or false, not {value!r}.")


def _tuple(values: object, argument: str, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidDefinition(f"{argument} is a list or tuple, not {values!r}.")
    for value in values:
        if not isinstance(value, kinds):
            raise InvalidDefinition(f"{argument} holds {value!r}, which is not {kinds[-1].__name__}.")
    return tuple(values)


def _grants(grants: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(grants, Mapping):
        raise InvalidDefinition(f"grants maps roles to lists of privileges, not {grants!r}.")
    checked: dict[str, tuple[str, ...]] = {}
    for role, privileges in grants.items():
        check_identifier(role, "role name in grants")
        checked[role] = tuple(str(privilege).upper() for privilege in _tuple(privileges, f"grants[{role!r}]", (str,)))
        if not checked[role]:
            raise InvalidDefinition(f"grants[{role!r}] is empty: name a privilege, or leave the role out.")
        if unknown := sorted(set(checked[role]) - PRIVILEGES):
            raise InvalidDefinition(
                f"grants[{role!r}] holds {', '.join(unknown)}; there are {', '.join(sorted(PRIVILEGES))}."
            )
    return checked


def _is_value(value: object) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, (str, int, float)) and "\0" not in str(value)


def _parameters(parameters: object) -> dict[str, ParameterValue]:
    if not isinstance(parameters, Mapping):
        raise InvalidDefinition(f"storage_parameters maps names to values, not {parameters!r}.")
    for name, value in parameters.items():
        if not isinstance(name, str) or not _PARAMETER.match(name):
            raise InvalidDefinition(f"{name!r} is not the name of a storage parameter.")
        if not _is_value(value):
            raise InvalidDefinition(f"The storage parameter {name} is a number, text or true/false, not {value!r}.")
    return dict(parameters)
