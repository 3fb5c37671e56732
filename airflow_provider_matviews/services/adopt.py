"""Adoption: the definitions of views that stand already, read from the catalogs, and the files that keep them.

Changes nothing, needs no right but to connect, and works on a standby. Each view is read in a transaction of its own,
so that none is kept from its refresh while the rest of a large estate is read.
"""

from __future__ import annotations

import os
import re
import secrets
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition, ViewNotFound, WouldBeLost
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.parts import Column, ExtendedStatistics, Grant, Index, IndexKey
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.graph import Graph
from airflow_provider_matviews.services.instructions import Command, Work, fetch_all, fetch_one
from airflow_provider_matviews.services.locking import DEFAULT_PATIENCE, politely
from airflow_provider_matviews.services.picture import (
    ColumnPicture,
    IndexPicture,
    KeyPicture,
    Label,
    Picture,
    Privilege,
    StatisticsPicture,
    speak_plainly,
    take_picture,
)

#: A definition, and what a person should know that it cannot say.
Adopted = tuple[MatViewDefinition, list[str]]

_STORAGE = {"p": "plain", "e": "external", "m": "main", "x": "extended"}
_COMPRESSION = {"p": "pglz", "l": "lz4"}
_REPLICA_IDENTITY = {"n": "nothing", "f": "full"}
#: How often a view may be replaced while it is read.
_COLLISIONS = 5
#: What ALL means on a column (https://www.postgresql.org/docs/current/sql-grant.html).
_ALL_ON_A_COLUMN = frozenset({"SELECT", "INSERT", "UPDATE", "REFERENCES"})
#: What CREATE STATISTICS makes where it is told no kinds
#: (https://www.postgresql.org/docs/current/sql-createstatistics.html).
_ALL_KINDS = frozenset({"ndistinct", "dependencies", "mcv"})
#: What some file system, or a shell, would not have in a name.
_NOT_IN_A_FILE_NAME = re.compile(r"[^\w.-]|^[.-]")


def read_definition(view: ResolvedName) -> Work[Adopted]:
    """Write the definition of a view that stands.

    :raises ViewNotFound: when it does not stand.
    :raises NotAMaterializedView: when something else stands under its name.
    :raises WouldBeLost: when it has what no definition can say.
    """
    return (yield from _read(view, (yield from _graph())))


def read_definitions(schema: str) -> Work[list[Adopted]]:
    """Write the definitions of all materialized views in a schema, each after those that it reads.

    :param schema: its exact name.
    :raises InvalidDefinition: when there is no such schema.
    :raises WouldBeLost: when one of them has what no definition can say.
    """
    rows = yield from fetch_all(
        sql.SQL(
            """
            SELECT quote_ident(n.nspname) AS schema, c.relname::text AS name, quote_ident(c.relname) AS quoted
            FROM pg_catalog.pg_namespace n
            LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relkind = 'm'
            WHERE n.nspname = %s
            """
        ),
        (schema,),
    )
    if not rows:
        raise InvalidDefinition(
            f"The schema {sql.Identifier(schema).as_string(None)} does not exist.",
            hint="give its exact name, and check the connection's database.",
        )
    graph = yield from _graph()
    views: dict[str, ResolvedName] = {}
    for row in rows:
        if row["name"] is not None:
            display = row["quoted"] if schema == "public" else f"{row['schema']}.{row['quoted']}"
            views[str(ViewName(row["name"], schema))] = ResolvedName(schema, row["name"], display)
    adopted: list[Adopted] = []
    for name in graph.order:
        if name in views:
            # One that was dropped since they were listed is not missed.
            with suppress(ViewNotFound):
                adopted.append((yield from _read(views[name], graph)))
    return adopted


def _read(view: ResolvedName, graph: Graph) -> Work[Adopted]:
    # The functions that give definitions wait for who changes the view, and whoever changes it next then for us.
    yield Command(sql.SQL("BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY"))
    try:
        yield Command(sql.SQL("SET LOCAL lock_timeout = {}").format(DEFAULT_PATIENCE.lock_timeout_setting))
        adopted = yield from politely(
            view, DEFAULT_PATIENCE, lambda: _read_at_once(view, graph), collisions=_COLLISIONS
        )
    except Exception:
        yield Command(sql.SQL("ROLLBACK"), undoing=True)
        raise
    # Undoes the settings.
    yield Command(sql.SQL("ROLLBACK"))
    return adopted


def _read_at_once(view: ResolvedName, graph: Graph) -> Work[Adopted]:
    yield from speak_plainly()
    while True:
        facts = yield from catalog.require_view(view)
        picture = yield from take_picture(facts.oid)
        query = yield from catalog.query_of(view)
        server = yield from fetch_one(_SERVER, {"oid": facts.oid})
        # Else it was dropped or, under the same name, replaced just now.
        if picture is not None and query is not None and server is not None:
            break
    notes = [note for condition, note in _NOTES.items() if server[condition]]
    # Else they would be given something when it is made anew.
    shut_out = [row["role"] for row in (yield from fetch_all(_SHUT_OUT, {"oid": facts.oid}))]
    name = ViewName(view.name, view.schema)
    try:
        definition = definition_from(
            name,
            query,
            picture,
            notes,
            depends_on=sorted(graph.needs_in_order.get(str(name), ())),
            privileges=frozenset(server["privileges"]),
            access_method=server["access_method"],
            shut_out=shut_out,
        )
    except InvalidDefinition as error:
        raise WouldBeLost(
            f"{view.display} has what no definition can say: {error.message}", attachments=[error.message]
        ) from error
    notes += [
        f"it and {other} read each other in a circle: {other} is left out of its depends_on"
        for other in sorted(graph.passed_over.get(str(name), ()))
    ]
    return definition, notes


def definition_from(
    name: ViewName,
    query: str,
    picture: Picture,
    notes: list[str],
    *,
    depends_on: Sequence[str],
    privileges: frozenset[str],
    access_method: str,
    shut_out: Sequence[str] = (),
) -> MatViewDefinition:
    """Say in a definition what a picture shows.

    :param query: the view's query, every name qualified.
    :param notes: takes what the definition cannot say.
    :param privileges: all that there are on a relation, which ``ALL`` stands for.
    :param access_method: the server's default, which needs no word.
    :param shut_out: roles that have nothing on the view, and would be given something if it were made anew.
    :raises InvalidDefinition: when something in it cannot be said.
    """
    by_index = any(index.replica_identity for index in picture.indexes)
    if picture.replica_identity == "i" and not by_index:
        notes.append("the index that was its replica identity is gone, which counts as nothing; it is not declared")
    if owners := [extension for extension, kind in picture.extensions if kind == "e"]:
        notes.append(f"it belongs to the extension {owners[0]}: declared with managed=False, it is only refreshed")
    options = [*picture.options, *(f"toast.{option}" for option in picture.toast_options)]
    columns = [_column(column, picture.owner, notes) for column in picture.columns]
    return MatViewDefinition(
        name=str(name),
        sql=query.strip().removesuffix(";").rstrip(),
        owner=picture.owner,
        depends_on=depends_on,
        indexes=[_index(index, notes) for index in picture.indexes],
        columns=[column for column in columns if column != Column(name=column.name)],
        statistics=[_statistics(each, notes) for each in picture.statistics],
        comment=_text(picture.comment, "its comment", notes),
        grants={
            **dict.fromkeys(shut_out, ("NONE",)),
            **_grants(picture.privileges, picture.owner, privileges),
        },
        storage_parameters=_parameters(options),
        tablespace=picture.tablespace,
        access_method=None if picture.access_method == access_method else picture.access_method,
        replica_identity=_REPLICA_IDENTITY.get(picture.replica_identity),
        security_labels=_labels(picture.labels, "its security label", notes),
        depends_on_extensions=[extension for extension, kind in picture.extensions if kind == "x"],
        managed=not owners,
    )


def _column(column: ColumnPicture, owner: str, notes: list[str]) -> Column:
    return Column(
        name=column.name,
        comment=_text(column.comment, f"the comment on column {column.name}", notes),
        storage=_STORAGE[column.storage] if column.storage else None,
        compression=_COMPRESSION[column.compression] if column.compression else None,
        statistics=column.statistics,
        options=_parameters(column.options),
        grants=_grants(column.privileges, owner, _ALL_ON_A_COLUMN, owned=False),
        security_labels=_labels(column.labels, f"the security label of column {column.name}", notes),
    )


def _index(index: IndexPicture, notes: list[str]) -> Index:
    anatomy = index.anatomy
    assert anatomy is not None
    if not index.valid:
        notes.append(
            f"its index {index.name} is INVALID (a build of it failed half-way): declared as it should be, and to be "
            "built anew"
        )
    targets = dict(index.statistics)
    keys = [_key(key, targets.get(number)) for number, key in enumerate(anatomy.shape.keys, 1)]
    return Index(
        # Most keys are mere columns, and read better so.
        columns=[key.column if key.column and key == IndexKey(column=key.column) else key for key in keys],
        name=index.name,
        method=anatomy.shape.method,
        unique=anatomy.shape.unique,
        where=anatomy.shape.predicate,
        include=anatomy.shape.include,
        storage_parameters=_parameters(anatomy.options),
        tablespace=index.tablespace,
        nulls_not_distinct=anatomy.shape.nulls_not_distinct,
        comment=_text(index.comment, f"the comment on index {index.name}", notes),
        clustered=index.clustered,
        depends_on_extensions=index.extensions,
    )


def _key(key: KeyPicture, statistics: int | None) -> IndexKey:
    named = not key.usual_operator_class or key.operator_class_options
    # Methods without an order have both False; where there is one, DESC alone means NULLS FIRST.
    nulls = ("first" if key.nulls_first else "last") if key.nulls_first != key.descending else None
    return IndexKey(
        column=key.column,
        # The server begins some on a new line.
        expression=key.expression and key.expression.strip(),
        order="desc" if key.descending else None,
        nulls=nulls,
        operator_class=key.operator_class if named else None,
        operator_class_options=_parameters(key.operator_class_options),
        collation=None if key.usual_collation else key.collation,
        statistics=statistics,
    )


def _statistics(statistics: StatisticsPicture, notes: list[str]) -> ExtendedStatistics:
    anatomy = statistics.anatomy
    assert anatomy is not None
    name = str(ViewName(statistics.name, statistics.schema))
    return ExtendedStatistics(
        name=name,
        columns=anatomy.columns,
        expressions=anatomy.expressions,
        kinds=() if set(anatomy.kinds) >= _ALL_KINDS else anatomy.kinds,
        target=statistics.target,
        comment=_text(statistics.comment, f"the comment on statistics {name}", notes),
        owner=statistics.owner,
    )


def _grants(
    privileges: Iterable[Privilege], owner: str, everything: frozenset[str], *, owned: bool = True
) -> dict[str, list[str]]:
    """Return what a definition says of an access control list.

    :param everything: what ``ALL`` stands for.
    :param owned: whether an owner has everything by default.
    """
    roles: dict[str, dict[tuple[str, bool], set[str]]] = {}
    for each in privileges:
        kinds = roles.setdefault(each.grantee or "public", defaultdict(set))
        kinds[each.grantor, each.grantable].add(each.privilege)
    grants: dict[str, list[str]] = {}
    for role, kinds in sorted(roles.items()):
        if owned and role == owner and kinds == {(owner, False): everything}:
            continue
        grants[role] = [
            str(Grant(privilege, grantable, None if grantor == owner else grantor))
            for (grantor, grantable), names in sorted(kinds.items())
            for privilege in (["ALL"] if names == everything else sorted(names))
        ]
    if owned and owner not in roles:
        grants[owner] = ["NONE"]
    return grants


def _parameters(options: Iterable[str]) -> dict[str, str | int]:
    parameters: dict[str, str | int] = {}
    for option in options:
        name, _, value = option.partition("=")
        number = int(value) if re.fullmatch(r"0|-?[1-9][0-9]*", value) else None
        parameters[name] = value if number is None else number
    return parameters


def _labels(labels: Iterable[Label], what: str, notes: list[str]) -> dict[str, str]:
    texts = {each.provider: _text(each.label, f"{what} by {each.provider}", notes) for each in labels}
    return {provider: text for provider, text in texts.items() if text is not None}


def _text(text: str | None, what: str, notes: list[str]) -> str | None:
    if text is not None and not text.strip():
        notes.append(f"{what} is nothing but white space, which is not declared")
        return None
    return text


#: What only the server knows, under the words that :data:`_NOTES` goes by.
_SERVER = sql.SQL(
    """
    SELECT current_setting('default_table_access_method') AS access_method,
           ARRAY(SELECT privilege_type FROM aclexplode(acldefault('r', c.relowner))) AS privileges,
           NOT c.relispopulated AS unpopulated,
           t.typacl IS NOT NULL AS type_privileges, obj_description(t.oid, 'pg_type') IS NOT NULL AS type_comment,
           EXISTS (SELECT FROM pg_catalog.pg_seclabel l
                   WHERE l.classoid = 'pg_type'::regclass AND l.objoid = t.oid) AS type_labels
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_type t ON t.oid = c.reltype
    WHERE c.oid = %(oid)s
    """
)
#: To whom ALTER DEFAULT PRIVILEGES gives something on a view that is made anew, and who has nothing on this one; of the
#: roles that might make it.
_SHUT_OUT = sql.SQL(
    """
    SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'public' ELSE pg_get_userbyid(a.grantee)::text END AS role
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_default_acl d ON d.defaclobjtype = 'r' AND d.defaclnamespace IN (0, c.relnamespace)
     AND d.defaclrole IN (c.relowner, current_user::regrole)
    CROSS JOIN LATERAL aclexplode(d.defaclacl) a
    WHERE c.oid = %(oid)s AND a.grantee NOT IN (c.relowner, d.defaclrole)
      AND NOT EXISTS (SELECT FROM aclexplode(c.relacl) has WHERE has.grantee = a.grantee)
    ORDER BY 1
    """
)
_NOTES = {
    "unpopulated": "it has never been filled: it answers no query before its first refresh",
    "type_privileges": "its row type has privileges of its own, which no definition holds",
    "type_comment": "its row type has a comment of its own, which no definition holds",
    "type_labels": "its row type has security labels of its own, which no definition holds",
}


def _graph() -> Work[Graph]:
    """Return which materialized views of the database are built on which: by their queries, types and functions too.

    Of the whole database, so that a circle is broken at the same place whichever of its views are adopted, and when.
    """
    rows = yield from fetch_all(_READS)
    needs: dict[str, frozenset[str]] = {}
    for row in rows:
        view = str(ViewName(row["name"], row["schema"]))
        needed = () if row["needed_name"] is None else (str(ViewName(row["needed_name"], row["needed_schema"])),)
        needs[view] = needs.get(view, frozenset()).union(needed)
    return Graph({}, needs)


# Bounded by UNION, since views may read each other in a circle. Not followed: what is neither a view nor a part of a
# query, such as a table, and the materialized views between.
_READS = sql.SQL(
    """
    WITH RECURSIVE reads (root, class, object, begun) AS (
        SELECT c.oid, 'pg_class'::regclass::oid, c.oid, false FROM pg_catalog.pg_class c WHERE c.relkind = 'm'
        UNION
        SELECT r.root, d.refclassid, d.refobjid, true
        FROM reads r CROSS JOIN LATERAL (
            SELECT d.refclassid, d.refobjid
            FROM pg_catalog.pg_rewrite w JOIN pg_catalog.pg_class c ON c.oid = w.ev_class
            JOIN pg_catalog.pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
            WHERE r.class = 'pg_class'::regclass AND w.ev_class = r.object AND w.rulename = '_RETURN'
              AND (c.relkind = 'v' OR NOT r.begun)
              AND NOT (d.refclassid = 'pg_class'::regclass AND d.refobjid = r.object)
            UNION ALL
            SELECT d.refclassid, d.refobjid FROM pg_catalog.pg_depend d
            WHERE r.class <> 'pg_class'::regclass AND d.classid = r.class AND d.objid = r.object
              AND d.deptype IN ('n', 'i')
        ) d
    ), edges AS (
        SELECT DISTINCT r.root, r.object FROM reads r JOIN pg_catalog.pg_class c ON c.oid = r.object
        WHERE r.begun AND r.class = 'pg_class'::regclass AND c.relkind = 'm'
    )
    SELECT n.nspname::text AS schema, c.relname::text AS name,
           needed_n.nspname::text AS needed_schema, needed.relname::text AS needed_name
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN edges e ON e.root = c.oid LEFT JOIN pg_catalog.pg_class needed ON needed.oid = e.object
    LEFT JOIN pg_catalog.pg_namespace needed_n ON needed_n.oid = needed.relnamespace
    WHERE c.relkind = 'm'
    ORDER BY 1, 2, 3, 4
    """
)


def write_definitions(
    definitions: Iterable[MatViewDefinition], folder: str | Path, *, overwrite: bool = False
) -> list[Path]:
    """Write each definition into a ``.sql`` file of its own, named after its view.

    :param folder: where; made where there is none.
    :param overwrite: whether to replace files of these names. Without it such a file is refused, before any is
        written.
    :returns: the files, in the definitions' order.
    :raises InvalidDefinition: when a file exists already, or another file of the folder declares one of the views.
    :raises OSError: when a file cannot be written.
    """
    folder = Path(folder)
    files = _files(definitions, folder)
    existing = [path for path in files if path.exists()]
    if existing and not overwrite:
        raise InvalidDefinition(
            f"Already there: {', '.join(map(str, existing))}.",
            hint="choose another folder, or say overwrite=True (--overwrite) to replace them.",
        )
    _require_undeclared(files, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path, definition in files.items():
        # Beside it, under a name that nobody takes for a definition: a file is there as a whole or not at all.
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with beside.open("xb") as file:
                # Bytes: a text file's line ends would change what stands in the query's constants.
                file.write(definition.to_sql().encode())
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    return list(files)


def _files(definitions: Iterable[MatViewDefinition], folder: Path) -> dict[Path, MatViewDefinition]:
    definitions = list(definitions)
    taken: dict[str, int] = {}
    paths: dict[int, Path] = {}

    def oddity(position: int) -> tuple[bool, bool, str]:
        name = definitions[position].view.name
        return _NOT_IN_A_FILE_NAME.search(name) is not None, name != name.lower(), name

    # Those that need no other name come first, so that a view keeps its file whatever else comes into the schema.
    for position in sorted(range(len(definitions)), key=oddity):
        stem = _NOT_IN_A_FILE_NAME.sub("_", definitions[position].view.name)
        name, number = stem, 1
        # Some file systems know neither case nor how a character is composed.
        while (key := unicodedata.normalize("NFKC", name).casefold()) in taken:
            number += 1
            name = f"{stem}_{number}"
        taken[key] = position
        paths[position] = folder / f"{name}.sql"
    return {paths[position]: definition for position, definition in enumerate(definitions)}


def _require_undeclared(files: Mapping[Path, MatViewDefinition], folder: Path) -> None:
    # load_definitions() would refuse the whole folder.
    views = {definition.view: path for path, definition in files.items()}
    declared: dict[Path, ViewName] = {}
    for path in sorted(folder.rglob("*.sql")) if folder.is_dir() else ():
        # One that is wrong declares nothing, and is not ours to mend.
        with suppress(InvalidDefinition):
            declared[path] = MatViewDefinition.from_file(path).view
    for path, view in declared.items():
        if path not in files and view in views:
            raise InvalidDefinition(
                f"{view} is declared in {path} already, and would be a second time in {views[view]}.",
                hint="choose another folder, or remove that file.",
            )
