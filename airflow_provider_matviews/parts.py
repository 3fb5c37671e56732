"""The parts of a view that a definition can name beside its query: indexes, columns, statistics, privileges.

Pure data, as ``definition.py`` is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from airflow_provider_matviews.checks import (
    ParameterValue,
    as_parameters,
    as_tuple,
    check_flag,
    check_one_of,
    check_target,
    check_text,
    set_on,
)
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, ViewName, check_identifier, quote, shorten

#: What can be granted on a materialized view (https://www.postgresql.org/docs/current/sql-grant.html).
PRIVILEGES = frozenset(
    {"SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER", "MAINTAIN", "ALL", "NONE"}
)
#: What can be granted on one of its columns.
COLUMN_PRIVILEGES = frozenset({"SELECT", "INSERT", "UPDATE", "REFERENCES", "ALL"})

_METHOD = re.compile(r"[a-z_][a-z0-9_]*\Z")
_GRANT = re.compile(
    r"\s*(?P<privilege>[a-z]+)(?P<option>\s+with\s+grant\s+option)?(?:\s+granted\s+by\s+(?P<grantor>.+?))?\s*\Z",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Grant:
    """One privilege of one role, as a definition says it: ``SELECT WITH GRANT OPTION GRANTED BY alice``.

    :ivar privilege: in capitals.
    :ivar grantable: whether the role may grant it to others.
    :ivar grantor: the role that grants it, exactly; None for the view's owner.
    """

    privilege: str
    grantable: bool = False
    grantor: str | None = None

    @classmethod
    def parse(cls, text: str) -> Grant:
        """Read one.

        :raises InvalidDefinition: when it is none.
        """
        match = _GRANT.match(text)
        if match is None:
            raise InvalidDefinition(f"{text!r} is no privilege.")
        grantor = match["grantor"]
        if grantor is not None:
            name = ViewName.parse(grantor)
            if name.schema is not None:
                raise InvalidDefinition(f"{grantor!r} is not the name of a role.")
            grantor = name.name
        return cls(match["privilege"].upper(), match["option"] is not None, grantor)

    def __str__(self) -> str:
        option = " WITH GRANT OPTION" if self.grantable else ""
        grantor = "" if self.grantor is None else f" GRANTED BY {quote(self.grantor)}"
        return f"{self.privilege}{option}{grantor}"


def as_grants(
    grants: object, argument: str = "grants", known: frozenset[str] = PRIVILEGES
) -> dict[str, tuple[str, ...]]:
    """Return role -> privileges, each as :class:`Grant` writes it.

    :raises InvalidDefinition: when it is no mapping of roles to lists of privileges.
    """
    if not isinstance(grants, Mapping):
        raise InvalidDefinition(f"{argument} maps roles to lists of privileges, not {grants!r}.")
    checked: dict[str, tuple[str, ...]] = {}
    for role, privileges in grants.items():
        check_identifier(role, f"role name in {argument}")
        texts = as_tuple(privileges, f"{argument}[{role!r}]", (str,))
        if not texts:
            raise InvalidDefinition(f"{argument}[{role!r}] is empty: name a privilege, or leave the role out.")
        read = []
        for text in texts:
            match = _GRANT.match(text)
            said = text.strip().upper() if match is None else match["privilege"].upper()
            if said not in known:
                raise InvalidDefinition(
                    f"{argument}[{role!r}] holds {said}; there are {', '.join(sorted(known))}, each perhaps "
                    "WITH GRANT OPTION or GRANTED BY a role."
                )
            read.append(str(Grant.parse(text)))
        if "NONE" in read and len(read) > 1:
            raise InvalidDefinition(f"{argument}[{role!r}] says NONE and more.")
        checked[role] = tuple(read)
    return checked


def as_labels(labels: object) -> dict[str, str]:
    """Return provider -> security label.

    :raises InvalidDefinition: when it is no mapping of providers to labels.
    """
    if not isinstance(labels, Mapping):
        raise InvalidDefinition(f"security_labels maps providers to labels, not {labels!r}.")
    for provider, label in labels.items():
        check_identifier(provider, "provider in security_labels")
        check_text(label, f"security label of {provider}")
    return dict(labels)


@dataclass(frozen=True, kw_only=True)
class IndexKey:
    """One key of an index: a column or an expression, with what PostgreSQL lets one say about it.

    :param column: a column's exact name (not quoted).
    :param expression: an SQL expression over the view's columns, instead of a column.
    :param order: ``asc`` or ``desc``; None for the method's default.
    :param nulls: ``first`` or ``last``.
    :param operator_class: its name as one types it in SQL, perhaps with its schema.
    :param operator_class_options: such as ``{"siglen": 32}``.
    :param collation: its name as one types it in SQL, perhaps with its schema: ``'"C"'``, ``'"de_DE"'``.
    :param statistics: how much ANALYZE keeps about an expression, from 0 to 10000; None leaves it alone.
    :raises InvalidDefinition: when neither or both of column and expression are given.
    """

    column: str | None = None
    expression: str | None = None
    order: str | None = None
    nulls: str | None = None
    operator_class: str | None = None
    operator_class_options: Mapping[str, ParameterValue] = field(default_factory=dict, hash=False)
    collation: str | None = None
    statistics: int | None = None

    def __post_init__(self) -> None:
        if (self.column is None) == (self.expression is None):
            raise InvalidDefinition("An index key is either a column or an expression: give exactly one.")
        if self.column is not None:
            check_identifier(self.column, "index column")
        if self.expression is not None:
            check_text(self.expression, "index expression")
        check_one_of(self.order, "order", ("asc", "desc"))
        check_one_of(self.nulls, "nulls", ("first", "last"))
        for value in (self.operator_class, self.collation):
            if value is not None:
                ViewName.parse(value)
        options = as_parameters(self.operator_class_options, "operator_class_options")
        set_on(self, "operator_class_options", options)
        if options and self.operator_class is None:
            raise InvalidDefinition("operator_class_options need an operator_class that they belong to.")
        check_target(self.statistics, "statistics")
        if self.statistics is not None and self.expression is None:
            raise InvalidDefinition(
                "statistics of an index key are those of its expression.",
                hint="a column has its own: columns=[Column(name=..., statistics=...)].",
            )


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
    :param tablespace: where it is kept; None for the default, and for wherever a standing one is.
    :param nulls_not_distinct: for a unique index, whether NULLs count as equal (PostgreSQL 15 or newer).
    :param comment: what COMMENT ON says of it.
    :param clustered: whether it is the one that CLUSTER takes.
    :param depends_on_extensions: extensions that it is dropped with.
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
    comment: str | None = None
    clustered: bool = False
    depends_on_extensions: Sequence[str] = ()

    def __post_init__(self) -> None:
        set_on(self, "columns", as_tuple(self.columns, "columns of an index", (str, IndexKey)))
        set_on(self, "include", as_tuple(self.include, "include of an index", (str,)))
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
            check_text(self.where, "predicate of an index")
        if self.tablespace is not None:
            check_identifier(self.tablespace, "tablespace name")
        check_flag(self.unique, "unique of an index")
        check_flag(self.nulls_not_distinct, "nulls_not_distinct of an index")
        check_flag(self.clustered, "clustered of an index")
        if self.comment is not None:
            check_text(self.comment, "comment on an index")
        set_on(self, "depends_on_extensions", as_tuple(self.depends_on_extensions, "depends_on_extensions", (str,)))
        set_on(self, "storage_parameters", as_parameters(self.storage_parameters))

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
class Column:
    """What a column of a view should have beside what the query gives it; None and empty leave it alone.

    See https://www.postgresql.org/docs/current/sql-altermaterializedview.html.

    :param name: its exact name.
    :param comment: what COMMENT ON says of it.
    :param storage: ``plain``, ``external``, ``main`` or ``extended``.
    :param compression: ``pglz`` or ``lz4``.
    :param statistics: how much ANALYZE keeps about it, from 0 to 10000.
    :param options: ``n_distinct`` and the like.
    :param grants: role -> privileges on this column alone.
    :param security_labels: provider -> label.
    :raises InvalidDefinition: when it cannot be so.
    """

    name: str
    comment: str | None = None
    storage: str | None = None
    compression: str | None = None
    statistics: int | None = None
    options: Mapping[str, ParameterValue] = field(default_factory=dict, hash=False)
    grants: Mapping[str, Sequence[str]] = field(default_factory=dict, hash=False)
    security_labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_identifier(self.name, "column name")
        if self.comment is not None:
            check_text(self.comment, f"comment on column {self.name}")
        check_one_of(self.storage, "storage of a column", ("plain", "external", "main", "extended"))
        check_one_of(self.compression, "compression of a column", ("pglz", "lz4"))
        check_target(self.statistics, "statistics of a column")
        set_on(self, "options", as_parameters(self.options, "options"))
        set_on(self, "grants", as_grants(self.grants, "grants of a column", COLUMN_PRIVILEGES))
        set_on(self, "security_labels", as_labels(self.security_labels))


@dataclass(frozen=True, kw_only=True)
class ExtendedStatistics:
    """Statistics over several columns or expressions (https://www.postgresql.org/docs/current/sql-createstatistics.html).

    :param name: ``name`` or ``schema.name``, as one would type it; without a schema they are made in the view's.
    :param columns: exact names of columns.
    :param expressions: SQL expressions over the view's columns.
    :param kinds: of ``ndistinct``, ``dependencies`` and ``mcv``; empty for all.
    :param target: how much ANALYZE keeps, from 0 to 10000; None leaves it alone.
    :param comment: what COMMENT ON says of them.
    :param owner: whose they are; None for whoever makes them.
    :raises InvalidDefinition: when they cannot be so.
    """

    name: str
    columns: Sequence[str] = ()
    expressions: Sequence[str] = ()
    kinds: Sequence[str] = ()
    target: int | None = None
    comment: str | None = None
    owner: str | None = None

    def __post_init__(self) -> None:
        ViewName.parse(self.name)
        set_on(self, "columns", as_tuple(self.columns, "columns of statistics", (str,)))
        set_on(self, "expressions", as_tuple(self.expressions, "expressions of statistics", (str,)))
        set_on(self, "kinds", as_tuple(self.kinds, "kinds of statistics", (str,)))
        for column in self.columns:
            check_identifier(column, "column name")
        for expression in self.expressions:
            check_text(expression, "expression of statistics")
        for kind in self.kinds:
            check_one_of(kind, "kinds of statistics", ("ndistinct", "dependencies", "mcv"))
        if len(self.columns) + len(self.expressions) < (1 if self.expressions else 2):
            raise InvalidDefinition(f"The statistics {self.name} need two columns, or an expression.")
        check_target(self.target, "target of statistics")
        if self.comment is not None:
            check_text(self.comment, f"comment on statistics {self.name}")
        if self.owner is not None:
            check_identifier(self.owner, "owner of statistics")
