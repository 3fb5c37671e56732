"""What a definition means, in the server's own words: made real for a moment, empty, and undone.

The query does not run. So formatting, aliases and the search path make no difference, and whatever the server would
refuse it refuses here.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import psycopg
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition, ParameterValue
from airflow_provider_matviews.exceptions import InvalidDefinition, MissingPrivilege
from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, shorten
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts
from airflow_provider_matviews.services.ddl import create_index, create_statistics, tablespace_clause, with_clause
from airflow_provider_matviews.services.instructions import Command, Work, fetch_one, raw
from airflow_provider_matviews.services.picture import (
    IndexAnatomy,
    IndexPicture,
    IndexShape,
    Picture,
    StatisticsAnatomy,
    StatisticsPicture,
    restore_settings,
    speak_plainly,
    take_picture,
)

#: Rounds through the server after which its wording of a query stands still: varchar IN (...) needs two.
_ROUNDS = 2


@dataclass(frozen=True)
class Declared:
    """A definition as the server reads it.

    :ivar texts: its query in the server's words, every name qualified; and in its words of those words.
    :ivar bare: an empty view of it, without the definition's indexes and statistics, with what default privileges give.
    :ivar indexes: those of the definition, in its order.
    :ivar statistics: likewise.
    :ivar reworded_indexes: those that stand and hold an expression, as the server words its own words: it may not be
        the same (``varchar IN (...)`` is not).
    :ivar reworded_statistics: likewise.
    """

    texts: tuple[str, ...]
    bare: Picture
    indexes: tuple[IndexPicture, ...]
    statistics: tuple[StatisticsPicture, ...]
    reworded_indexes: Mapping[str, IndexShape] = field(default_factory=dict)
    reworded_statistics: Mapping[str, StatisticsAnatomy] = field(default_factory=dict)

    def same_index(self, standing: IndexPicture, found: IndexPicture) -> bool:
        """Return whether an index that stands is one that is declared."""
        if standing.anatomy is None or found.anatomy is None:
            return False
        shape = found.anatomy.shape
        return shape in (standing.anatomy.shape, self.reworded_indexes.get(standing.name))

    def kept(self, standing: StatisticsPicture | None, found: StatisticsPicture) -> StatisticsPicture:
        """Return what is declared, in the words of what stands where that is the same."""
        if standing is None or standing.anatomy is None or found.anatomy is None:
            return found
        again = self.reworded_statistics.get(standing.name)
        if again is not None and again.made_of == found.anatomy.made_of:
            return replace(found, anatomy=standing.anatomy)
        return found

    @property
    def query(self) -> str:
        """What a view is to be made of."""
        return self.texts[0]

    @property
    def column_names(self) -> tuple[str, ...]:
        """The columns that the query gives."""
        return tuple(column.name for column in self.bare.columns)


@dataclass(frozen=True)
class Place:
    """Where a probe can be made.

    :ivar temporary: in the session's own schema, for a role that may not create anything in the view's.
    """

    schema: str
    temporary: bool = False

    def named(self, name: str) -> sql.Identifier:
        """Return a qualified name."""
        return sql.Identifier(self.schema, name)


def find_place(view: ResolvedName) -> Work[Place | None]:
    """Return where to make a probe, or None where the role may make none.

    :raises InvalidDefinition: when the view's schema does not exist.
    """
    row = yield from fetch_one(
        sql.SQL(
            "SELECT has_schema_privilege(oid, 'CREATE') AND has_schema_privilege(oid, 'USAGE') AS may, "
            "has_database_privilege(current_database(), 'TEMP') AS may_temp "
            "FROM pg_catalog.pg_namespace WHERE nspname = {}"
        ).format(sql.Literal(view.schema))
    )
    if row is None:
        schema = sql.Identifier(view.schema).as_string(None)
        raise InvalidDefinition(f"The schema {schema} does not exist.", hint=f"run: CREATE SCHEMA {schema};")
    if row["may"]:
        return Place(view.schema)
    return Place("pg_temp", temporary=True) if row["may_temp"] else None


def lacks_schema(view: ResolvedName, server: ServerFacts) -> MissingPrivilege:
    """Return the refusal of a role that may not make a view."""
    schema, role = (sql.Identifier(name).as_string(None) for name in (view.schema, server.role))
    return MissingPrivilege(
        f"The role {role} may not create {view.display}: it lacks CREATE or USAGE on the schema {schema}.",
        hint=f"run: GRANT USAGE, CREATE ON SCHEMA {schema} TO {role};",
    )


def read_declared(
    view: ResolvedName,
    definition: MatViewDefinition,
    place: Place,
    standing: Picture | None,
    oid: int | None = None,
    called: Mapping[str, str] | None = None,
) -> Work[Declared]:
    """Have the server read a definition.

    :param standing: the view that stands, if any: what its indexes have beside what is declared of them is kept.
    :param oid: its OID.
    :param called: column -> what it is called for the indexes and statistics that are returned.
    :raises InvalidDefinition: when the SQL is not one query, or a column that the definition names does not exist.
    :raises psycopg.Error: what PostgreSQL says of the query, an index, statistics or a parameter.
    """
    yield Command(sql.SQL("SAVEPOINT probe"))
    # Under the session's own settings: that is how a person's names are found.
    probe = yield from _make_view(view, definition, place)
    if oid is not None:
        yield from _require_no_circle(view, probe, oid)
    settings = yield from speak_plainly()
    text = yield from _read_view(view, definition, probe)
    relation = place.named(_token_name(view.name))
    yield Command(_empty_copy(relation, definition, place) + raw(text.rstrip("; \n") + "\nWITH NO DATA"))
    copy = yield from _oid_of(relation)
    texts = [text]
    if not place.temporary:
        texts.append((yield from _text_of(relation)))
    yield from _set_columns(definition, relation)
    bare = yield from take_picture(copy)
    assert bare is not None
    declared = Declared(tuple(texts), bare, (), ())
    if definition.all_indexes or definition.statistics:
        # Expressions name things as the query does.
        yield from restore_settings(settings)
        indexes = yield from _make_indexes(view, definition, relation, standing)
        statistics = yield from _make_statistics(definition, relation, place)
        yield from speak_plainly()
        again = yield from _reword(standing, relation, place, view)
        for name, other in (called or {}).items():
            rename = sql.SQL("ALTER TABLE {} RENAME COLUMN {} TO {}")
            yield Command(rename.format(relation, sql.Identifier(name), sql.Identifier(other)))
        whole = yield from take_picture(copy)
        assert whole is not None
        declared = replace(
            declared,
            indexes=tuple(next(each for each in whole.indexes if each.name == name) for name in indexes),
            statistics=tuple(next(each for each in whole.statistics if each.name == name) for name in statistics),
            reworded_indexes={
                again[each.name]: each.anatomy.shape for each in whole.indexes if each.name in again and each.anatomy
            },
            reworded_statistics={
                again[each.name]: each.anatomy for each in whole.statistics if each.name in again and each.anatomy
            },
        )
    yield Command(sql.SQL("ROLLBACK TO SAVEPOINT probe"))
    yield Command(sql.SQL("RELEASE SAVEPOINT probe"))
    return declared


def with_expressions_renamed(
    view: ResolvedName, declared: Declared, place: Place, standing: Picture, names: Mapping[str, str]
) -> Work[Picture]:
    """Return a view's picture with what its indexes and statistics will say once columns have other names.

    Only the server can tell how an expression reads then: they are built on an empty copy, whose columns are renamed.

    :param names: name -> new name.
    """
    yield Command(sql.SQL("SAVEPOINT probe"))
    yield from speak_plainly()
    relation = place.named(_token_name(view.name))
    kind = sql.SQL("CREATE {} {} ({}) AS\n").format(
        sql.SQL("TABLE" if place.temporary else "MATERIALIZED VIEW"),
        relation,
        sql.SQL(", ").join(sql.Identifier(column.name) for column in standing.columns),
    )
    yield Command(kind + raw(declared.query.rstrip("; \n") + "\nWITH NO DATA"))
    made = yield from _reword(standing, relation, place, view)
    for name, other in names.items():
        rename = sql.SQL("ALTER TABLE {} RENAME COLUMN {} TO {}")
        yield Command(rename.format(relation, sql.Identifier(name), sql.Identifier(other)))
    copy = yield from _oid_of(relation)
    whole = yield from take_picture(copy)
    assert whole is not None
    # What is declared, in the server's second words too: only those can be compared with what came of its own.
    said = replace(whole, indexes=declared.indexes, statistics=declared.statistics)
    again = yield from _reword(said, relation, place, view)
    both = yield from take_picture(copy)
    assert both is not None
    yield Command(sql.SQL("ROLLBACK TO SAVEPOINT probe"))
    yield Command(sql.SQL("RELEASE SAVEPOINT probe"))
    first_words = {index.name: index.anatomy for index in declared.indexes}
    second_words = {
        each.anatomy.shape: first_words[again[each.name]]
        for each in both.indexes
        if each.name in again and each.anatomy is not None
    }
    first_stats = {each.name: each.anatomy for each in declared.statistics}
    second_stats = {
        each.anatomy.made_of: first_stats[again[each.name]]
        for each in both.statistics
        if each.name in again and each.anatomy is not None
    }
    indexes: dict[str, IndexAnatomy | None] = {}
    for index in whole.indexes:
        if index.name in made and index.anatomy is not None:
            words = second_words.get(index.anatomy.shape)
            # The words of the definition, and all else as it is.
            shape = index.anatomy.shape if words is None else words.shape
            indexes[made[index.name]] = replace(index.anatomy, shape=shape)
    statistics = {
        made[each.name]: second_stats.get(each.anatomy.made_of) or each.anatomy
        for each in whole.statistics
        if each.name in made and each.anatomy is not None
    }
    return replace(
        standing,
        indexes=tuple(replace(each, anatomy=indexes.get(each.name, each.anatomy)) for each in standing.indexes),
        statistics=tuple(
            replace(each, anatomy=statistics.get(each.name, each.anatomy)) for each in standing.statistics
        ),
    )


def same_query(declared: Declared, standing: str, place: Place) -> Work[bool]:
    """Return whether a view's query, every name qualified, is the declared one.

    PostgreSQL may word its own wording differently (``varchar IN (...)`` does), so both are read until the words meet.
    """
    if standing in declared.texts:
        return True
    texts = {standing}
    text = standing
    for _ in range(_ROUNDS):
        text = yield from reworded(text, place)
        if text in declared.texts:
            return True
        if text in texts:
            break
        texts.add(text)
    return False


def reworded(text: str, place: Place, columns: Sequence[str] = ()) -> Work[str]:
    """Return a query, every name of which is qualified, as the server words it.

    :param columns: names for its columns, instead of its own.
    """
    probe = place.named(_token_name("probe"))
    names = sql.SQL(" ({})").format(sql.SQL(", ").join(map(sql.Identifier, columns))) if columns else sql.SQL("")
    yield Command(sql.SQL("SAVEPOINT probe"))
    yield from speak_plainly()
    yield Command(sql.SQL("CREATE VIEW {}{} AS\n").format(probe, names) + raw(text))
    worded = yield from _text_of(probe)
    yield Command(sql.SQL("ROLLBACK TO SAVEPOINT probe"))
    yield Command(sql.SQL("RELEASE SAVEPOINT probe"))
    return worded


def _make_view(view: ResolvedName, definition: MatViewDefinition, place: Place) -> Work[sql.Identifier]:
    probe = place.named(_token_name("probe"))
    try:
        yield Command(sql.SQL("CREATE VIEW {} AS ").format(probe) + raw(definition.sql))
    except (
        psycopg.errors.SyntaxError,
        psycopg.errors.FeatureNotSupported,
        psycopg.errors.InvalidTableDefinition,
        psycopg.errors.UndefinedParameter,
        psycopg.errors.IndeterminateDatatype,
    ) as error:
        raise _not_one_query(view, error.diag.message_primary or str(error)) from error
    return probe


def _read_view(view: ResolvedName, definition: MatViewDefinition, probe: sql.Identifier) -> Work[str]:
    """Return the query as the server words it, once it is seen to be one that fits the definition."""
    row = yield from fetch_one(
        sql.SQL(
            "SELECT pg_get_viewdef(c.oid) AS text, c.reloptions IS NOT NULL AS options, "
            "ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 "
            "ORDER BY a.attnum) AS columns FROM pg_class c WHERE c.oid = {}::regclass"
        ).format(sql.Literal(probe.as_string(None)))
    )
    assert row is not None
    if row["options"]:
        raise _not_one_query(view, "WITH CHECK OPTION belongs to plain views")
    _require_columns(view, definition, row["columns"])
    return str(row["text"])


def _text_of(relation: sql.Identifier) -> Work[str]:
    row = yield from fetch_one(
        sql.SQL("SELECT pg_get_viewdef({}::regclass) AS text").format(sql.Literal(relation.as_string(None)))
    )
    assert row is not None
    return str(row["text"])


def _oid_of(relation: sql.Identifier) -> Work[int]:
    row = yield from fetch_one(
        sql.SQL("SELECT {}::regclass::oid::bigint AS oid").format(sql.Literal(relation.as_string(None)))
    )
    assert row is not None
    return int(row["oid"])


def _empty_copy(relation: sql.Identifier, definition: MatViewDefinition, place: Place) -> sql.Composable:
    return sql.SQL("CREATE {} {}{}{}{} AS\n").format(
        sql.SQL("TABLE" if place.temporary else "MATERIALIZED VIEW"),
        relation,
        sql.SQL(" USING {}").format(sql.Identifier(definition.access_method))
        if definition.access_method
        else sql.SQL(""),
        with_clause(definition.storage_parameters),
        tablespace_clause(definition.tablespace),
    )


def _set_columns(definition: MatViewDefinition, relation: sql.Identifier) -> Work[None]:
    for column in definition.columns:
        for verb, word in (("STORAGE", column.storage), ("COMPRESSION", column.compression)):
            if word is not None:
                alter = sql.SQL("ALTER TABLE {} ALTER COLUMN {} SET ").format(relation, sql.Identifier(column.name))
                yield Command(alter + raw(f"{verb} {word}"))


def _require_no_circle(view: ResolvedName, probe: sql.Identifier, oid: int) -> Work[None]:
    """Refuse a query that reads the view that it is to be the query of, through plain views and functions too."""
    row = yield from fetch_one(_READS_ITSELF, {"probe": probe.as_string(None), "oid": oid})
    if row is not None and row["found"]:
        raise InvalidDefinition(
            f"{view.display} would read itself: what its query reads is built on it.",
            hint="name the tables, or another materialized view; a view cannot be made of its own rows.",
        )


# Through plain views, SQL-standard functions and row types; not through materialized views, which hold their own rows.
_READS_ITSELF = sql.SQL(
    """
    WITH RECURSIVE reads (classid, objid) AS (
        SELECT 'pg_class'::regclass::oid, %(probe)s::regclass::oid
        UNION
        SELECT d.refclassid, d.refobjid
        FROM reads r CROSS JOIN LATERAL (
            SELECT 'pg_rewrite'::regclass::oid AS classid, w.oid AS objid
            FROM pg_catalog.pg_class c JOIN pg_catalog.pg_rewrite w ON w.ev_class = c.oid
            WHERE r.classid = 'pg_class'::regclass AND c.oid = r.objid AND c.relkind = 'v'
            UNION ALL
            SELECT r.classid, r.objid WHERE r.classid = 'pg_proc'::regclass
        ) AS step JOIN pg_catalog.pg_depend d ON d.classid = step.classid AND d.objid = step.objid
        WHERE d.refclassid IN ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass)
    )
    SELECT EXISTS (
        SELECT FROM reads LEFT JOIN pg_catalog.pg_type t ON reads.classid = 'pg_type'::regclass AND t.oid = reads.objid
        LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem
        WHERE (reads.classid = 'pg_class'::regclass AND reads.objid = %(oid)s) OR %(oid)s IN (t.typrelid, e.typrelid)
    ) AS found
    """
)


def _make_indexes(
    view: ResolvedName, definition: MatViewDefinition, relation: sql.Identifier, standing: Picture | None
) -> Work[list[str]]:
    stands = {} if standing is None else {index.name: index for index in standing.indexes}
    names: list[str] = []
    for said in definition.all_indexes:
        name = _token_name(view.name)
        names.append(name)
        index, kept = said, stands.get(said.name_on(view.name))
        if kept is not None and kept.anatomy is not None and not definition.exclusive:
            has = kept.anatomy.options if kept.anatomy.shape.method == said.method else ()
            options: Mapping[str, ParameterValue] = {
                **dict(option.split("=", 1) for option in has),
                **index.storage_parameters,
            }
            index = replace(index, storage_parameters=options, tablespace=index.tablespace or kept.tablespace)
        try:
            yield Command(create_index(index, name, relation))
        except psycopg.errors.UndefinedTable as error:
            if not is_whole_row(error):
                raise
            raise InvalidDefinition(
                f"The index {said.name_on(view.name)} of {view.display} cannot be declared: "
                f"{error.diag.message_primary}.",
                hint="an expression that names the whole row by the view's name works for one view only; name columns.",
            ) from error
    return names


def is_whole_row(error: psycopg.errors.UndefinedTable) -> bool:
    """Return whether an index was refused because it names the whole row by the name of another view."""
    return error.diag.context is None and error.diag.statement_position is not None


def _reword(
    standing: Picture | None, relation: sql.Identifier, place: Place, view: ResolvedName
) -> Work[dict[str, str]]:
    """Build what stands and holds an expression once more, from the server's words; return its names by those here."""
    names: dict[str, str] = {}
    if standing is None:
        return names
    create: list[tuple[str, str, sql.Composable]] = []
    for index in standing.indexes:
        anatomy = index.anatomy
        if anatomy is not None and anatomy.body is not None and anatomy.has_expression:
            kind = sql.SQL("CREATE UNIQUE INDEX" if index.unique else "CREATE INDEX")
            name = _token_name(view.name)
            body = sql.SQL(" {} ON {} USING {}").format(sql.Identifier(name), relation, raw(anatomy.body))
            create.append((name, index.name, kind + body))
    for each in standing.statistics:
        if each.anatomy is not None and each.anatomy.body is not None and each.anatomy.expressions:
            name = _token_name("probe")
            body = sql.SQL("CREATE STATISTICS {} {} FROM {}").format(
                place.named(name), raw(each.anatomy.body), relation
            )
            create.append((name, each.name, body))
    for name, known, statement in create:
        yield Command(sql.SQL("SAVEPOINT reword"))
        try:
            yield Command(statement)
        except psycopg.ProgrammingError:
            # It reads a column that is no more, or of another type: then it is not what is declared.
            yield Command(sql.SQL("ROLLBACK TO SAVEPOINT reword"))
        else:
            names[name] = known
        yield Command(sql.SQL("RELEASE SAVEPOINT reword"))
    return names


def _make_statistics(definition: MatViewDefinition, relation: sql.Identifier, place: Place) -> Work[list[str]]:
    names: list[str] = []
    for statistics in definition.statistics:
        name = _token_name("probe")
        names.append(name)
        yield Command(create_statistics(statistics, place.named(name), relation))
    return names


def _require_columns(view: ResolvedName, definition: MatViewDefinition, columns: Sequence[str]) -> None:
    named = [
        *(
            (each, f"its index {index.name_on(view.name)}")
            for index in definition.all_indexes
            for each in index.plain_columns
        ),
        *((column.name, "its definition") for column in definition.columns),
        *(
            (each, f"its statistics {statistics.name}")
            for statistics in definition.statistics
            for each in statistics.columns
        ),
    ]
    for what in dict.fromkeys(what for _, what in named):
        if unknown := [column for column, namer in named if namer == what and column not in columns]:
            raise InvalidDefinition(
                f"{view.display} has no column {', '.join(map(repr, unknown))}, which {what} names. "
                f"Its columns are: {', '.join(columns)}.",
                hint="name columns exactly as the query returns them: lower case unless it quotes them.",
            )


def _not_one_query(view: ResolvedName, reason: str) -> InvalidDefinition:
    return InvalidDefinition(
        f"The SQL of {view.display} cannot be a materialized view: {reason}.",
        hint="a definition is exactly one SELECT, WITH, VALUES or TABLE statement that only reads, over "
        "tables and views that are not temporary, without parameters.",
    )


def _token_name(name: str) -> str:
    suffix = f"_mv_{secrets.token_hex(4)}"
    return shorten(name, MAX_IDENTIFIER_BYTES - len(suffix)) + suffix
