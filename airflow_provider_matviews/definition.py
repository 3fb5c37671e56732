"""What a materialized view should be: pure data, from code or from a ``.sql`` file.

Knows neither Airflow nor a database. What a definition means on a server is the services' business;
what can be seen to be wrong without a server is refused here, when it is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from enum import Enum, StrEnum
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from airflow_provider_matviews import headers
from airflow_provider_matviews.checks import (
    ParameterValue,
    as_parameters,
    as_seconds,
    as_tuple,
    check_flag,
    check_one_of,
    check_session_settings,
    check_text,
    choice,
    set_on,
)
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.names import ViewName, check_identifier
from airflow_provider_matviews.parts import (
    Column,
    ExtendedStatistics,
    Index,
    IndexKey,
    as_grants,
    as_labels,
)
from airflow_provider_matviews.retention import RetentionPolicy
from airflow_provider_matviews.timeouts import Timeouts
from airflow_provider_matviews.windows import MaintenanceWindow, as_windows


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


class OnDrift(StrEnum):
    """What create does where a view stands and is not what its definition says.

    ``apply``: makes it so. ``fail``: raises, and changes nothing. ``report``: says what differs, and leaves it.
    ``ignore``: does not look.
    """

    APPLY = "apply"
    FAIL = "fail"
    IGNORE = "ignore"
    REPORT = "report"


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
    :param grants: role -> privileges, such as ``{"reporting": ["SELECT"]}``, each perhaps ``WITH GRANT OPTION`` or
        ``GRANTED BY`` a role. The role ``public`` is everybody. Where the owner is named, that is all it has;
        ``["NONE"]`` for a role that should have nothing.
    :param storage_parameters: what goes into the view's WITH clause, such as ``{"fillfactor": 90}``.
    :param tablespace: where it is kept; None for the default, and for wherever a standing one is.
    :param owner: whose it is; None for the role that makes it, and for whoever owns a standing one. Its query runs
        with the rights of this role.
    :param access_method: how it is kept; None for the default, and for however a standing one is.
    :param columns: what columns should have beside what the query gives them.
    :param statistics: extended statistics.
    :param replica_identity: ``default``, ``nothing`` or ``full``; None leaves it alone.
    :param security_labels: provider -> label.
    :param depends_on_extensions: extensions that it is dropped with.
    :param exclusive: whether it should have nothing that is not declared here: without it what others have added is
        left alone.
    :param renamed_from: the name that it had: where that one stands and this one does not, it is renamed, with its
        rows, its history and what is built on it.
    :param depends_on: names of the views that have to be refreshed first.
    :param description: for the people who read this definition; not sent to the server.
    :param managed: False for a view that somebody else owns: it may be refreshed and tracked, is never
        created or altered, and dropped only by force.
    :param session_settings: PostgreSQL settings for every operation on it, such as ``{"work_mem": "256MB"}``;
        set for its transaction only.
    :param timeouts: limits in seconds for every operation on it, by the names that the operators give them:
        ``lock_timeout``, ``max_wait``, ``statement_timeout``, ``timeout``. Those of a call go before them.
    :param refresh_windows: when it may be refreshed: windows, or their text, such as
        ``"mon-fri 22:00-06:00 Europe/Berlin"`` (UTC where no zone is named); none for always. Outside of them a
        refresh is skipped, unless the view holds no data yet; create and delete do not mind them.
    :param min_interval: seconds, or a timedelta, that have to pass after a refresh before the next one, which is
        skipped until then; None for none.
    :param retention: how much of its history is kept, a :class:`RetentionPolicy` or a table of its arguments, applied
        as each of its runs ends; None where nothing is declared, and ``prune()`` decides.
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
    owner: str | None = None
    access_method: str | None = None
    columns: Sequence[Column] = ()
    statistics: Sequence[ExtendedStatistics] = ()
    replica_identity: str | None = None
    security_labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    depends_on_extensions: Sequence[str] = ()
    exclusive: bool = False
    renamed_from: str | None = None
    refresh_windows: Sequence[MaintenanceWindow | str] = ()
    min_interval: float | timedelta | None = None
    retention: RetentionPolicy | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        view = ViewName.parse(self.name)
        check_text(self.sql, f"SQL of {view}")
        set_on(self, "refresh_strategy", choice(RefreshStrategy, self.refresh_strategy, "refresh_strategy"))
        set_on(self, "unique_index_columns", as_tuple(self.unique_index_columns, "unique_index_columns", (str,)))
        set_on(self, "indexes", as_tuple(self.indexes, "indexes", (Index,)))
        set_on(self, "depends_on", as_tuple(self.depends_on, "depends_on", (str,)))
        set_on(self, "grants", as_grants(self.grants))
        set_on(self, "storage_parameters", as_parameters(self.storage_parameters))
        set_on(self, "session_settings", check_session_settings(self.session_settings))
        set_on(self, "timeouts", Timeouts.of(self.timeouts).said())
        set_on(self, "refresh_windows", as_windows(self.refresh_windows))
        set_on(self, "min_interval", as_seconds(self.min_interval, "min_interval"))
        if self.retention is not None:
            set_on(self, "retention", RetentionPolicy.of(self.retention))
        for column in self.unique_index_columns:
            check_identifier(column, "column name in unique_index_columns")
        for other in self.depends_on:
            ViewName.parse(other)
        if self.tablespace is not None:
            check_identifier(self.tablespace, "tablespace name")
        for text, what in ((self.comment, "comment"), (self.description, "description")):
            if text is not None:
                check_text(text, f"{what} of {view}")
        check_flag(self.managed, "managed")
        check_flag(self.exclusive, "exclusive")
        self._check_parts(view)
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

    def _check_parts(self, view: ViewName) -> None:
        set_on(self, "columns", as_tuple(self.columns, "columns", (Column,)))
        set_on(self, "statistics", as_tuple(self.statistics, "statistics", (ExtendedStatistics,)))
        set_on(self, "security_labels", as_labels(self.security_labels))
        set_on(self, "depends_on_extensions", as_tuple(self.depends_on_extensions, "depends_on_extensions", (str,)))
        check_one_of(self.replica_identity, "replica_identity", ("default", "nothing", "full"))
        for name, what in ((self.owner, "owner"), (self.access_method, "access method")):
            if name is not None:
                check_identifier(name, f"name of the {what}")
        for names, what in (
            ([column.name for column in self.columns], "columns"),
            ([str(ViewName.parse(each.name)) for each in self.statistics], "statistics"),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise InvalidDefinition(f"{what} of {view} name {', '.join(twice)} twice.")
        if sum(index.clustered for index in self.indexes) > 1:
            raise InvalidDefinition(f"Two indexes of {view} say clustered=True, and only one can be that.")
        if self.renamed_from is not None and ViewName.parse(self.renamed_from) == view:
            raise InvalidDefinition(f"{view} is declared as renamed from itself.")

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
        for name, read in (("indexes", _index), ("columns", _column), ("statistics", _extended_statistics)):
            tables = values.get(name, ())
            if isinstance(tables, (str, Mapping)) or not isinstance(tables, Iterable):
                raise InvalidDefinition(f"{name} is a list of tables: [[{name}]] in a file, dicts in code.")
            values[name] = tuple(map(read, tables))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the definition as plain data that JSON can hold; :meth:`from_dict` reads it."""
        declaration = _plain(self)
        declaration["indexes"] = [
            {**_plain(index), "columns": [key if isinstance(key, str) else _plain(key) for key in index.columns]}
            for index in self.indexes
        ]
        declaration["columns"] = [_plain(column) for column in self.columns]
        declaration["statistics"] = [_plain(each) for each in self.statistics]
        declaration["refresh_windows"] = [str(window) for window in self.refresh_windows]
        if isinstance(self.retention, RetentionPolicy):
            declaration["retention"] = self.retention.said()
        return declaration

    def to_sql(self) -> str:
        """Return the text of a ``.sql`` file with a header that says all but what is left at its default.

        :meth:`from_sql` reads it.
        """
        declaration = _without_defaults(self, self.to_dict())
        declaration["indexes"] = [
            {
                **_without_defaults(index, _plain(index)),
                "columns": [
                    key if isinstance(key, str) else _without_defaults(key, _plain(key)) for key in index.columns
                ],
            }
            for index in self.indexes
        ]
        declaration["columns"] = [_without_defaults(each, _plain(each)) for each in self.columns]
        declaration["statistics"] = [_without_defaults(each, _plain(each)) for each in self.statistics]
        del declaration["sql"]
        return headers.join({key: value for key, value in declaration.items() if value != []}, self.sql)

    @classmethod
    def from_sql(cls, text: str, *, name: str | None = None, **defaults: Any) -> MatViewDefinition:
        """Read a definition from SQL text, with a header or without.

        What there is to say beside the query stands in TOML in a block comment at the head that begins with the
        word ``matview``; its keys are this class's arguments.

        :param name: the view's name where the header gives none.
        :param defaults: further arguments where the header gives none.
        :raises InvalidDefinition: when the header or the definition is wrong, or there is no name.
        """
        check_text(text, "SQL of a view")
        declaration, query = headers.split(text)
        if "sql" in declaration:
            raise InvalidDefinition("The header has a key `sql`, but the SQL is what follows it: remove it.")
        given = {"name": name, **defaults}
        declaration = {**{key: value for key, value in given.items() if value is not None}, **declaration}
        if "name" not in declaration:
            raise InvalidDefinition("The definition has no name.", hint='write name = "schema.view" in its header.')
        declaration["sql"] = query
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
            # Not as text, which would change the ends of lines inside constants.
            return cls.from_sql(path.read_bytes().decode("utf-8-sig"), name=path.stem)
        except InvalidDefinition as error:
            raise type(error)(f"{path}: {error.message}", hint=error.hint) from error
        except UnicodeDecodeError as error:
            raise InvalidDefinition(f"{path} is not UTF-8 text: {error}.") from error

    @classmethod
    def from_database(
        cls, view: str, *, conn_id: str = "postgres_default", tracking_schema: str = "matviews"
    ) -> MatViewDefinition:
        """Write the definition of a view that stands, with everything it has; planning it shows no drift.

        :param view: its name, as one would type it in SQL.
        :param conn_id: the Airflow connection to its database.
        :param tracking_schema: the schema of the run tables.
        :returns: the definition; :meth:`to_sql` writes it into a file. See :meth:`MatViewHook.adopt` for all views of
            a schema at once.
        :raises ViewNotFound: when it does not stand.
        :raises WouldBeLost: when it has what no definition can say.
        """
        # Here alone, and late: a definition itself knows neither Airflow nor a database.
        from airflow_provider_matviews.hooks.matview import MatViewHook

        hook = MatViewHook(postgres_conn_id=conn_id, tracking_schema=tracking_schema)
        definition: MatViewDefinition = hook.definition_of(view)
        return definition


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


def _without_defaults(instance: Any, plain: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for each in fields(instance):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if default is MISSING or getattr(instance, each.name) != default:
            kept[each.name] = plain[each.name]
    return kept


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


def _column(declaration: object) -> Column:
    return declaration if isinstance(declaration, Column) else Column(**_known(Column, declaration, "a column"))


def _extended_statistics(declaration: object) -> ExtendedStatistics:
    if isinstance(declaration, ExtendedStatistics):
        return declaration
    return ExtendedStatistics(**_known(ExtendedStatistics, declaration, "extended statistics"))


__all__ = [
    "Column",
    "ExtendedStatistics",
    "IfLocked",
    "Index",
    "IndexKey",
    "MaintenanceWindow",
    "MatViewDefinition",
    "OnDrift",
    "ParameterValue",
    "RefreshStrategy",
    "RetentionPolicy",
    "RowCountStrategy",
    "check_flag",
    "check_session_settings",
    "choice",
    "load_definitions",
]
