"""Create: make a view as its definition says, with indexes, comment and grants, in one transaction.

Everything is built and checked on an empty view first, so that a misspelt column or a role that does not exist
is found in milliseconds and not after the query has run for an hour; the rows come last.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psycopg
from psycopg import sql

from airflow_provider_matviews.definition import (
    Index,
    IndexKey,
    MatViewDefinition,
    ParameterValue,
    RowCountStrategy,
)
from airflow_provider_matviews.exceptions import (
    DependentsExist,
    InvalidDefinition,
    MissingPrivilege,
    ViewNotManaged,
    WouldBeLost,
)
from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, ViewName, shorten
from airflow_provider_matviews.services import catalog, row_counts
from airflow_provider_matviews.services.attachments import Attachment, attachments_of
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.instructions import Command, Note, Session, Work, fetch_one, raw
from airflow_provider_matviews.services.rebuild import give_to, take_default_privileges_back
from airflow_provider_matviews.services.response import Report, ServiceResponse

#: Runs the short last part of a replacement under ``lock_timeout``; see ``locking.politely``.
Politely = Callable[[Callable[[], Work[None]]], Work[None]]


@dataclass(frozen=True)
class _Query:
    """A definition's query as the server reads it."""

    text: str
    columns: tuple[str, ...]


def create_view(
    view: ResolvedName,
    definition: MatViewDefinition,
    server: ServerFacts,
    report: Report,
    *,
    politely: Politely,
    force: bool = False,
    with_data: bool = True,
    row_counts: RowCountStrategy = RowCountStrategy.ESTIMATED,
) -> Work[ServiceResponse]:
    """Create a view. Runs inside the caller's transaction.

    :param force: replace a view that stands: the new one is built beside it and takes its place in one short
        cut, so readers go on meanwhile.
    :param with_data: False makes it without rows; it answers no query before its first refresh.
    :returns: status ``created``; ``updated`` where a view was replaced; ``skipped`` where it stands already.
    :raises ViewNotManaged: when the definition says ``managed=False``.
    :raises InvalidDefinition: when the SQL is not one query, or a column that an index names does not exist.
    :raises NotAMaterializedView: when something else stands under its name.
    :raises MissingPrivilege: when the role may not.
    :raises DependentsExist: when a view to be replaced has others built on it.
    :raises WouldBeLost: when a view to be replaced has what the definition does not mention.
    :raises psycopg.Error: what PostgreSQL says of the query or an index.
    """
    if not definition.managed:
        raise ViewNotManaged(
            f"{view.display} is declared with managed=False: somebody else makes it; it is only refreshed here.",
            hint="declare it with managed=True if it is to be created from this definition.",
        )
    standing = yield from catalog.find_view(view)
    may_make = yield from _may_make(view)
    if standing is not None and not force and not may_make:
        report.told(reason="it stands already", drift=None)
        yield Note(
            f"{view.display} stands already and is left as it is. Whether its query is the definition's cannot "
            "be told: the role lacks CREATE on its schema."
        )
        return report.end("skipped")
    if not may_make:
        raise _lacks_schema(view, server)
    query = yield from _read_query(view, definition.sql)
    _require_columns(view, definition, query)
    if standing is None:
        yield from _build(view, view, definition, query, report)
        yield from _fill(view, server, with_data, row_counts, report)
        return report.end("created")
    if not force:
        yield from _leave_standing(view, standing, query, row_counts, report)
        return report.end("skipped")
    yield from _require_replaceable(view, standing, definition, server)
    yield from _count_standing(view, standing, row_counts, report)
    beside = _beside(view)
    yield Note(f"{view.display} stands and is replaced: built beside it, then put in its place.")
    yield from _build(beside, view, definition, query, report)
    # Before the rows: the query runs with the rights of the owner.
    yield from give_to(beside, standing.owner, server, report)
    yield from _fill(beside, server, with_data, row_counts, report)
    yield from politely(lambda: _cut(view, beside, definition, standing, report))
    return report.end("updated")


def _may_make(view: ResolvedName) -> Work[bool]:
    row = yield from fetch_one(
        sql.SQL(
            "SELECT has_schema_privilege(oid, 'CREATE') AND has_schema_privilege(oid, 'USAGE') AS may "
            "FROM pg_catalog.pg_namespace WHERE nspname = {}"
        ).format(sql.Literal(view.schema))
    )
    if row is None:
        schema = sql.Identifier(view.schema).as_string(None)
        raise InvalidDefinition(f"The schema {schema} does not exist.", hint=f"run: CREATE SCHEMA {schema};")
    return bool(row["may"])


def _lacks_schema(view: ResolvedName, server: ServerFacts) -> MissingPrivilege:
    schema, role = (sql.Identifier(name).as_string(None) for name in (view.schema, server.role))
    return MissingPrivilege(
        f"The role {role} may not create {view.display}: it lacks CREATE or USAGE on the schema {schema}.",
        hint=f"run: GRANT USAGE, CREATE ON SCHEMA {schema} TO {role};",
    )


def _read_query(view: ResolvedName, text: str) -> Work[_Query]:
    """Have the server read a definition's SQL, as a plain view that is undone at once.

    It refuses whatever is not one query, tells the columns, and gives the text back in its own words, in which
    comments and semicolons at the end are gone. The query itself does not run.
    """
    probe = ResolvedName(view.schema, _token_name("probe"), "")
    yield Command(sql.SQL("SAVEPOINT probe"))
    try:
        yield Command(sql.SQL("CREATE VIEW {} AS ").format(probe.identifier) + raw(text))
    except (
        psycopg.errors.SyntaxError,
        psycopg.errors.FeatureNotSupported,
        psycopg.errors.InvalidTableDefinition,
        psycopg.errors.UndefinedParameter,
        psycopg.errors.IndeterminateDatatype,
    ) as error:
        raise _not_one_query(view, error.diag.message_primary or str(error)) from error
    row = yield from fetch_one(
        sql.SQL(
            "SELECT oid::bigint AS oid, pg_get_viewdef(oid) AS text, reloptions IS NOT NULL AS options "
            "FROM pg_catalog.pg_class WHERE oid = {}::regclass"
        ).format(sql.Literal(probe.ddl))
    )
    assert row is not None
    if row["options"]:
        raise _not_one_query(view, "WITH CHECK OPTION belongs to plain views")
    columns = yield from catalog.columns_of(row["oid"])
    yield Command(sql.SQL("ROLLBACK TO SAVEPOINT probe"))
    yield Command(sql.SQL("RELEASE SAVEPOINT probe"))
    return _Query(row["text"], tuple(name for name, _ in columns))


def _not_one_query(view: ResolvedName, reason: str) -> InvalidDefinition:
    return InvalidDefinition(
        f"The SQL of {view.display} cannot be a materialized view: {reason}.",
        hint="a definition is exactly one SELECT, WITH, VALUES or TABLE statement that only reads, over "
        "tables and views that are not temporary, without parameters.",
    )


def _require_columns(view: ResolvedName, definition: MatViewDefinition, query: _Query) -> None:
    for index in definition.all_indexes:
        if unknown := [column for column in index.plain_columns if column not in query.columns]:
            raise InvalidDefinition(
                f"{view.display} has no column {', '.join(map(repr, unknown))}, which its index "
                f"{index.name_on(view.name)} names. Its columns are: {', '.join(query.columns)}.",
                hint="name columns exactly as the query returns them: lower case unless it quotes them.",
            )


def _leave_standing(
    view: ResolvedName, standing: ViewFacts, query: _Query, counting: RowCountStrategy, report: Report
) -> Work[None]:
    text = yield from catalog.query_of(view)
    drifted = text != query.text
    if drifted:
        # PostgreSQL may word its own wording differently (varchar IN (...) does), and a view made here was made
        # from that wording.
        drifted = text != (yield from _read_query(view, query.text)).text
    report.told(reason="it stands already", drift=drifted)
    yield from _count_standing(view, standing, counting, report)
    if drifted:
        yield Note(
            f"{view.display} stands already and is left as it is, BUT ITS QUERY IS NOT THE DEFINITION'S. "
            "Give force=True to replace it.",
            warning=True,
        )
    else:
        yield Note(f"{view.display} stands already, with the definition's query; left as it is.")


def _count_standing(view: ResolvedName, standing: ViewFacts, counting: RowCountStrategy, report: Report) -> Work[None]:
    report.told(row_count_before=(yield from row_counts.before_refresh(view, standing, counting)))


def _build(
    target: ResolvedName, view: ResolvedName, definition: MatViewDefinition, query: _Query, report: Report
) -> Work[None]:
    """Make the view without rows: what it will be called in the end decides its indexes' names."""
    statement = sql.SQL("CREATE MATERIALIZED VIEW {}{}{} AS\n").format(
        target.identifier, _with(definition.storage_parameters), _tablespace(definition.tablespace)
    )
    yield from report.run("create", Command(statement + raw(query.text.rstrip("; \n") + "\nWITH NO DATA")))
    for position, index in enumerate(definition.all_indexes):
        name = index.name_on(view.name) if target is view else f"{target.name}_{position}"
        yield from report.run(f"index {index.name_on(view.name)}", Command(_create_index(index, name, target)))
    if definition.comment is not None:
        yield from report.run(
            "comment",
            Command(
                sql.SQL("COMMENT ON MATERIALIZED VIEW {} IS {}").format(
                    target.identifier, sql.Literal(definition.comment)
                )
            ),
        )
    if target is not view:
        yield from take_default_privileges_back(target)
    for role, privileges in definition.grants.items():
        grantee = sql.SQL("PUBLIC") if role.lower() == "public" else sql.Identifier(role)
        yield from report.run(
            f"grant to {role}",
            Command(
                sql.SQL("GRANT {} ON {} TO {}").format(
                    sql.SQL(", ").join(raw(privilege) for privilege in privileges), target.identifier, grantee
                )
            ),
        )


def _fill(
    target: ResolvedName,
    server: ServerFacts,
    with_data: bool,
    counting: RowCountStrategy,
    report: Report,
) -> Work[None]:
    if not with_data:
        yield Note("Made without rows, as asked: it answers no query before its first refresh.")
        return
    yield from report.run("fill", Command(sql.SQL("REFRESH MATERIALIZED VIEW {}").format(target.identifier)))
    if counting is RowCountStrategy.NONE:
        return
    filled = yield from catalog.require_view(target)
    if server.track_counts:
        # Made in this transaction: whatever it has inserted is what the view holds.
        report.told(row_count_after=filled.inserted)
    elif counting is RowCountStrategy.EXACT:
        report.told(row_count_after=(yield from row_counts.counted(target)))
    else:
        report.told(row_count_after=filled.estimated_rows)


def _require_replaceable(
    view: ResolvedName, standing: ViewFacts, definition: MatViewDefinition, server: ServerFacts
) -> Work[None]:
    if not standing.can_own:
        role, owner = (sql.Identifier(name).as_string(None) for name in (server.role, standing.owner))
        raise MissingPrivilege(
            f"The role {role} may not replace {view.display}, which belongs to {owner}.",
            hint=f"run: {catalog.membership(standing.owner, server)}",
        )
    dependents = yield from catalog.dependents_of(standing.oid)
    if dependents:
        raise DependentsExist(
            f"{view.display} cannot be replaced: built on it are {', '.join(dependents)}.",
            dependents=dependents,
            hint="drop those first and make them again afterwards.",
        )
    yield from _require_nothing_lost(view, standing, definition)


def _require_nothing_lost(
    view: ResolvedName, standing: ViewFacts, definition: MatViewDefinition, session: Session = Session.WORK
) -> Work[None]:
    attachments = yield from attachments_of(standing.oid, session)
    lost = [each for each in attachments if not _declared(each, view, definition)]
    if lost:
        raise WouldBeLost(
            f"Replacing {view.display} would lose what its definition does not mention: "
            f"{', '.join(each.description for each in lost)}.",
            attachments=[each.description for each in lost],
            hint="declare it in the definition (indexes, grants, comment, storage_parameters, tablespace), or "
            "delete the view and create it anew if all that is to go.",
        )


def _declared(attachment: Attachment, view: ResolvedName, definition: MatViewDefinition) -> bool:
    match attachment.kind:
        case "index":
            return attachment.key in {index.name_on(view.name) for index in definition.all_indexes}
        case "privilege":
            grantee, _, privilege = attachment.key.rpartition(" ")
            return any(
                (role.lower() if role.lower() == "public" else role) == grantee
                and not {privilege, "ALL"}.isdisjoint(privileges)
                for role, privileges in definition.grants.items()
            )
        case "comment":
            return definition.comment is not None
        case "option":
            return attachment.key in definition.storage_parameters
        case "tablespace":
            return definition.tablespace is not None
    return False


def _cut(
    view: ResolvedName,
    beside: ResolvedName,
    definition: MatViewDefinition,
    standing: ViewFacts,
    report: Report,
) -> Work[None]:
    # RESTRICT: what came to depend on the view meanwhile is an error, not a loss.
    yield from report.run("cut", Command(sql.SQL("DROP MATERIALIZED VIEW {} RESTRICT").format(view.identifier)))
    # DROP now holds its locks, so nothing more can be attached; seen from outside this transaction the view
    # still stands, with what it was given while the new one was built.
    yield from _require_nothing_lost(view, standing, definition, Session.RECORD)
    rename = sql.SQL("ALTER {} {} RENAME TO {}")
    for position, index in enumerate(definition.all_indexes):
        made = sql.Identifier(view.schema, f"{beside.name}_{position}")
        yield from report.run(
            "cut",
            Command(rename.format(sql.SQL("INDEX"), made, sql.Identifier(index.name_on(view.name)))),
        )
    kind = sql.SQL("MATERIALIZED VIEW")
    yield from report.run("cut", Command(rename.format(kind, beside.identifier, sql.Identifier(view.name))))


def _beside(view: ResolvedName) -> ResolvedName:
    return ResolvedName(view.schema, _token_name(view.name), view.display)


def _token_name(name: str) -> str:
    # Leaves room for "_12", which numbers the indexes built on it.
    suffix = f"_mv_{secrets.token_hex(4)}"
    return shorten(name, MAX_IDENTIFIER_BYTES - len(suffix) - 4) + suffix


def _create_index(index: Index, name: str, target: ResolvedName) -> sql.Composed:
    parts: list[sql.Composable] = [
        sql.SQL("CREATE UNIQUE INDEX" if index.unique else "CREATE INDEX"),
        sql.Identifier(name),
        sql.SQL("ON {} USING {}").format(target.identifier, sql.Identifier(index.method)),
        sql.SQL("({})").format(sql.SQL(", ").join(map(_key, index.keys))),
    ]
    if index.include:
        parts.append(sql.SQL("INCLUDE ({})").format(sql.SQL(", ").join(map(sql.Identifier, index.include))))
    if index.nulls_not_distinct:
        parts.append(sql.SQL("NULLS NOT DISTINCT"))
    if index.storage_parameters:
        parts.append(_with(index.storage_parameters))
    if index.tablespace:
        parts.append(_tablespace(index.tablespace))
    if index.where is not None:
        parts.append(sql.SQL("WHERE ") + raw(index.where))
    return sql.SQL(" ").join(parts)


def _key(key: IndexKey) -> sql.Composable:
    parts: list[sql.Composable] = []
    if key.column is not None:
        parts.append(sql.Identifier(key.column))
    else:
        # The newline ends a `--` comment at the expression's end, which would swallow the parenthesis.
        parts.append(raw(f"({key.expression}\n)"))
    if key.collation:
        parts.append(sql.SQL("COLLATE {}").format(_qualified(key.collation)))
    if key.operator_class:
        parts.append(_qualified(key.operator_class))
    if key.order:
        parts.append(raw(key.order.upper()))
    if key.nulls:
        parts.append(raw(f"NULLS {key.nulls.upper()}"))
    return sql.SQL(" ").join(parts)


def _qualified(name: str) -> sql.Identifier:
    parsed = ViewName.parse(name)
    return sql.Identifier(parsed.name) if parsed.schema is None else sql.Identifier(parsed.schema, parsed.name)


def _with(parameters: Mapping[str, ParameterValue]) -> sql.Composable:
    if not parameters:
        return sql.SQL("")
    settings = (
        sql.SQL(" = ").join([sql.SQL(".").join(map(sql.Identifier, name.split("."))), sql.Literal(str(value))])
        for name, value in parameters.items()
    )
    return sql.SQL(" WITH ({})").format(sql.SQL(", ").join(settings))


def _tablespace(name: str | None) -> sql.Composable:
    return sql.SQL("") if name is None else sql.SQL(" TABLESPACE {}").format(sql.Identifier(name))
