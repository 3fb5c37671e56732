"""A definition against the catalog: what would have to be done, as steps that can be shown, and then applied."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import (
    DependentsExist,
    InvalidDefinition,
    MatViewError,
    MissingPrivilege,
    StrategyRefused,
    ViewNotManaged,
)
from airflow_provider_matviews.names import ViewName, quote
from airflow_provider_matviews.services import alterations, catalog
from airflow_provider_matviews.services.alterations import Relation
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.dependents import Dependent, blocking_dependents, columns_used
from airflow_provider_matviews.services.instructions import Work, fetch_all, fetch_one
from airflow_provider_matviews.services.picture import (
    Picture,
    StatisticsPicture,
    restore_settings,
    speak_plainly,
    take_picture,
)
from airflow_provider_matviews.services.plan_steps import Lock, Plan, PlanStep, StepKind
from airflow_provider_matviews.services.probe import (
    Declared,
    Place,
    lacks_schema,
    read_declared,
    reworded,
    same_query,
    with_expressions_renamed,
)
from airflow_provider_matviews.services.rebuild import Beside, creation, naming
from airflow_provider_matviews.services.replacement import (
    Changed,
    dropping,
    joining,
    locking,
    obstacles,
    peek,
    renaming,
    require_same_columns_read,
    trading_places,
)
from airflow_provider_matviews.services.target import (
    Target,
    given_to,
    impossible_grants,
    target_of,
    with_columns_renamed,
)

_IN_THE_REBUILD = "none of its own: the new view is built with it"


@dataclass(frozen=True)
class Draft:
    """A plan with all that is needed to apply it.

    :ivar view: the name that it is to have.
    :ivar standing: the view as it stands; None where none does.
    :ivar fills: whether a view that is built anew gets its rows.
    :ivar errors: why it cannot be applied, as errors to raise.
    """

    view: ResolvedName
    plan: Plan
    declared: Declared
    target: Target
    standing: Picture | None
    beside: Beside
    fills: bool
    errors: tuple[MatViewError, ...] = ()

    @property
    def rebuilds(self) -> bool:
        """Whether it is to be built anew beside itself."""
        return self.plan.rebuilds

    @property
    def columns_change(self) -> bool:
        """Whether what is built on it meets other columns than before."""
        return self.standing is not None and _columns_change(self.standing, self.target.picture)


def draft_plan(
    view: ResolvedName,
    definition: MatViewDefinition,
    server: ServerFacts,
    place: Place,
    *,
    facts: ViewFacts | None,
    origin: ResolvedName,
    force: bool = False,
    with_data: bool = True,
) -> Work[Draft]:
    """Compare a definition with what stands. Executes no query of a definition, and changes nothing.

    :param view: the name that it is to have.
    :param place: where the definition can be made real for a moment.
    :param facts: the view that stands; None where none does.
    :param origin: the name that it has, which is another one where it is to be renamed.
    :param force: build it anew even where nothing differs.
    :param with_data: whether it is to have rows.
    :raises InvalidDefinition: when the definition cannot be a view.
    :raises Changed: when it was dropped meanwhile.
    :raises psycopg.Error: what PostgreSQL says of the definition.
    """
    if facts is None:
        declared = yield from read_declared(view, definition, place, None)
        draft = _draft_creation(view, definition, declared, server, with_data)
        refused = tuple((yield from _of_the_privileges(view, draft.target.picture, None, server)))
        refusals = tuple(error.message for error in refused)
        return replace(draft, errors=refused, plan=replace(draft.plan, refusals=refusals))
    settings = yield from speak_plainly()
    standing = yield from take_picture(facts.oid)
    stored = yield from catalog.query_of(origin)
    yield from restore_settings(settings)
    if standing is None or stored is None:
        raise Changed(["it was dropped"])
    declared = yield from read_declared(view, definition, place, standing, facts.oid)
    same = yield from same_query(declared, stored, place)
    renamed: dict[str, str] = {}
    if not same:
        renamed = yield from _renamed_columns(standing, stored, declared, place)
    owner = definition.owner or standing.owner
    moving = _moving(view, origin, definition, standing)
    named_anew = (
        (yield from with_expressions_renamed(view, declared, place, standing, renamed)) if renamed else standing
    )
    base = _moved(with_columns_renamed(given_to(named_anew, owner), renamed), moving, view.schema)
    target = target_of(view, definition, declared, base, server, origin.name)
    # Beside the one that stands, under its name: what is built on it reads on by that.
    beside = Beside.of(replace(origin, display=view.display))
    steps = list(_whole_view(base, target.picture, stored, declared, changed=not (same or renamed), force=force))
    rebuilds = bool(steps)
    bodies = yield from _bodies(view, definition, place, standing, renamed)
    mine = list(_in_place(view, origin, standing, base, target, renamed, bodies, owner, moving))
    fills = with_data or (facts.populated and not force)
    dependents: list[Dependent] = []
    if rebuilds:
        dependents = yield from peek(facts.oid)
        script = _script(beside, standing, declared, target, dependents, fills=fills)
        steps = [replace(steps[0], build=script[0], cut=script[1]), *steps[1:]]
        steps += _columns(base, target.picture) if not (same or renamed) else []
        steps += [
            step
            if step.kind is StepKind.RENAME_VIEW
            else replace(step, build=(), cut=(), lock=Lock.NONE, cost=_IN_THE_REBUILD)
            for step in mine
        ]
        steps.sort(key=lambda step: step.kind is StepKind.RENAME_VIEW)
    else:
        steps = mine
    errors: list[MatViewError] = []
    notes: list[str] = []
    if steps and not definition.managed:
        errors.append(not_managed(view))
    if steps:
        errors += yield from _of_the_privileges(view, target.picture, standing, server)
        errors += yield from _errors(view, origin, standing, target, server, facts, place, rebuilds=rebuilds)
    if rebuilds and _columns_change(standing, target.picture):
        more, notes = yield from _of_the_columns(view, origin, standing, target.picture, facts.oid, dependents)
        errors += more
    exclusive = target_of(view, replace(definition, exclusive=True), declared, base, server, origin.name)
    plan = Plan(
        view.display,
        stands=True,
        steps=tuple(steps),
        left_alone=tuple(_left_alone(view, target, exclusive)),
        refusals=tuple(error.message for error in errors),
        notes=tuple(notes),
    )
    return Draft(view, plan, declared, target, standing, beside, fills, tuple(errors))


def _columns_change(standing: Picture, picture: Picture) -> bool:
    return [(each.name, each.type) for each in standing.columns] != [(each.name, each.type) for each in picture.columns]


def _moving(
    view: ResolvedName, origin: ResolvedName, definition: MatViewDefinition, standing: Picture
) -> list[StatisticsPicture]:
    """Return the statistics that go to another schema with the view, as its indexes do by themselves."""
    if origin.schema == view.schema:
        return []
    said = [ViewName.parse(each.name) for each in definition.statistics]
    stay = {each.name for each in said if each.schema == origin.schema}
    return [each for each in standing.statistics if each.schema == origin.schema and each.name not in stay]


def _moved(picture: Picture, moving: Sequence[StatisticsPicture], schema: str) -> Picture:
    names = {(each.schema, each.name) for each in moving}
    return replace(
        picture,
        statistics=tuple(
            replace(each, schema=schema) if (each.schema, each.name) in names else each for each in picture.statistics
        ),
    )


def _statistics_moves(moving: Sequence[StatisticsPicture], schema: str) -> Iterator[str]:
    statement = sql.SQL("ALTER STATISTICS {} SET SCHEMA {}")
    for each in moving:
        yield alterations.text(statement.format(sql.Identifier(each.schema, each.name), sql.Identifier(schema)))


def _draft_creation(
    view: ResolvedName, definition: MatViewDefinition, declared: Declared, server: ServerFacts, with_data: bool
) -> Draft:
    target = target_of(view, definition, declared, None, server)
    picture, relation = target.picture, Relation(view.schema, view.name)
    beside = Beside.nothing(view)
    empty = alterations.bare(picture)
    first = PlanStep(
        StepKind.CREATE_VIEW,
        view.ddl,
        "it is declared and does not stand",
        build=(
            creation(beside, picture, declared.query),
            *((f"REFRESH MATERIALIZED VIEW {view.ddl}",) if with_data else ()),
        ),
        cost="nobody reads it yet",
    )
    default = given_to(replace(declared.bare, columns=empty.columns), picture.owner)
    steps = [first, *_given(relation, server.role, picture.owner), *alterations.settings(relation, empty, picture)]
    steps += alterations.indexes(relation, relation, empty, picture, {}, {})
    steps += alterations.statistics(relation, empty, picture, {})
    steps += alterations.privileges(relation, default, picture)
    quiet = tuple(replace(step, lock=Lock.NONE, cost="nobody reads it yet") for step in steps)
    return Draft(view, Plan(view.display, False, quiet), declared, target, None, beside, with_data)


def _renamed_columns(standing: Picture, stored: str, declared: Declared, place: Place) -> Work[dict[str, str]]:
    """Return name -> new name of the columns, where other names are all that is new in the query."""
    old, new = standing.columns, declared.bare.columns
    if [column.type for column in old] != [column.type for column in new]:
        return {}
    names = {mine.name: theirs.name for mine, theirs in zip(old, new, strict=True) if mine.name != theirs.name}
    # A name that goes on with another meaning: what is built on the view would have to be told by name.
    if {column.name for column in new} & set(names) or {column.name for column in old} & set(names.values()):
        return {}
    before = yield from reworded(declared.query, place, [column.name for column in old])
    if before == stored or before == (yield from reworded(stored, place)):
        return names
    return {}


def _bodies(
    view: ResolvedName, definition: MatViewDefinition, place: Place, standing: Picture, renamed: Mapping[str, str]
) -> Work[dict[str, str]]:
    """Return what builds the declared indexes while the columns still have their former names, by index."""
    if not renamed or not definition.all_indexes:
        return {}
    called = {new: old for old, new in renamed.items()}
    declared = yield from read_declared(view, definition, place, standing, called=called)
    bodies = {index.name: alterations.body_of(index) for index in standing.indexes}
    for index, found in zip(definition.all_indexes, declared.indexes, strict=True):
        bodies[index.name_on(view.name)] = alterations.body_of(found)
    return bodies


def _whole_view(
    base: Picture, picture: Picture, stored: str, declared: Declared, *, changed: bool, force: bool
) -> Iterator[PlanStep]:
    """Return the steps that only a view built anew can take."""
    if changed:
        yield PlanStep(
            StepKind.CHANGE_QUERY,
            "the query",
            "it is not the definition's",
            lock=Lock.ACCESS_EXCLUSIVE,
            cost=_CUT,
            detail=tuple(_difference(stored, declared.query)),
        )
    for kind, name, mine, theirs in (
        (StepKind.TABLESPACE, "tablespace", picture.tablespace, base.tablespace),
        (StepKind.ACCESS_METHOD, "access method", picture.access_method, base.access_method),
    ):
        if mine != theirs:
            why = f"it should be {mine or 'the default'}, is {theirs or 'the default'}"
            yield PlanStep(kind, f"the {name}", why, lock=Lock.ACCESS_EXCLUSIVE, cost=_CUT)
    same = base.tablespace == picture.tablespace and base.access_method == picture.access_method
    if force and not changed and same:
        yield PlanStep(StepKind.REBUILD, "the view", "asked for (force=True)", lock=Lock.ACCESS_EXCLUSIVE, cost=_CUT)


_CUT = "readers go on while the new one is built beside it, then wait for the moment in which it takes its place"


def _difference(stored: str, declared: str) -> Iterator[str]:
    lines = difflib.unified_diff(stored.splitlines(), declared.splitlines(), "stands", "declared", lineterm="", n=2)
    yield from lines


def _columns(base: Picture, picture: Picture) -> list[PlanStep]:
    has = {column.name: column for column in base.columns}
    wanted = {column.name: column for column in picture.columns}
    steps = [
        PlanStep(StepKind.DROP_COLUMN, f"column {quote(name)}", "the query gives it no more", cost=_IN_THE_REBUILD)
        for name in has
        if name not in wanted
    ]
    steps += [
        PlanStep(StepKind.ADD_COLUMN, f"column {quote(name)}", "the query gives it now", cost=_IN_THE_REBUILD)
        for name in wanted
        if name not in has
    ]
    return steps + [
        PlanStep(
            StepKind.CHANGE_COLUMN,
            f"column {quote(name)}",
            f"the query gives it as {_type(column.type)}, it is {_type(has[name].type)}",
            cost=_IN_THE_REBUILD,
        )
        for name, column in wanted.items()
        if name in has and has[name].type != column.type
    ]


def _type(text: str) -> str:
    return text.split(" ")[0].removeprefix("pg_catalog.")


def _in_place(
    view: ResolvedName,
    origin: ResolvedName,
    standing: Picture,
    base: Picture,
    target: Target,
    renamed: Mapping[str, str],
    bodies: Mapping[str, str],
    owner: str,
    moving: Sequence[StatisticsPicture],
) -> Iterator[PlanStep]:
    """Return the steps that a view can take as it stands."""
    relation = Relation(view.schema, view.name)
    if moves := renaming(origin, view):
        yield PlanStep(
            StepKind.RENAME_VIEW,
            origin.ddl,
            f"it is declared as {view.ddl}, renamed from {origin.ddl}",
            cut=(*(command.text for command in moves), *_statistics_moves(moving, view.schema)),
            lock=Lock.ACCESS_EXCLUSIVE,
        )
    for old, new in renamed.items():
        rename = sql.SQL("RENAME COLUMN {} TO {}").format(sql.Identifier(old), sql.Identifier(new))
        yield PlanStep(
            StepKind.RENAME_COLUMN,
            f"column {quote(old)}",
            f"the query gives it as {quote(new)}, and is the same otherwise",
            cut=(alterations.text(relation.alter() + rename),),
            lock=Lock.ACCESS_EXCLUSIVE,
            cost="readers wait for the moment it takes; what is built on the view goes on, with the names it has",
        )
    yield from _given(relation, standing.owner, owner)
    yield from alterations.settings(relation, base, target.picture)
    now = Relation(origin.schema, origin.name)
    yield from alterations.indexes(relation, now, base, target.picture, target.index_names, target.doomed, bodies)
    yield from alterations.statistics(relation, base, target.picture, target.doomed)
    yield from alterations.privileges(relation, base, _with_all_columns(target.picture, base))


def _with_all_columns(picture: Picture, base: Picture) -> Picture:
    # What was granted on a column that goes, goes with it: no statement of its own.
    names = {column.name for column in picture.columns}
    return replace(picture, columns=(*picture.columns, *(each for each in base.columns if each.name not in names)))


def _given(relation: Relation, former: str, owner: str) -> Iterator[PlanStep]:
    if former != owner:
        statement = relation.alter() + sql.SQL("OWNER TO {}").format(sql.Identifier(owner))
        yield PlanStep(
            StepKind.OWNER,
            quote(owner),
            f"it should belong to {quote(owner)}, belongs to {quote(former)}",
            cut=(alterations.text(statement),),
            lock=Lock.ACCESS_EXCLUSIVE,
        )


def _script(
    beside: Beside,
    standing: Picture,
    declared: Declared,
    target: Target,
    dependents: Sequence[Dependent],
    *,
    fills: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the statements of a rebuild: those before the cut, and the cut."""
    picture, relation = target.picture, beside.relation
    empty = alterations.bare(picture)
    build = [creation(beside, picture, declared.query)]
    build += [text for step in alterations.settings(relation, empty, picture) for text in step.sql]
    build += [
        text
        for position, each in enumerate(picture.statistics)
        for text in alterations.make_statistics(
            relation, each, beside.statistics(position, picture), alterations.statistics_body(each)
        )
    ]
    build += [text for step in _given(relation, standing.owner, picture.owner) for text in step.sql]
    default = given_to(replace(declared.bare, columns=empty.columns), picture.owner)
    build += [text for step in alterations.privileges(relation, default, picture) for text in step.sql]
    if fills:
        build.append(f"REFRESH MATERIALIZED VIEW {beside.new.ddl}")
    for position, index in enumerate(picture.indexes):
        made = beside.index(position, picture)
        build += alterations.build_index(relation, index, made, alterations.body_of(index))
        build += alterations.dress_index(relation, made, None, index)
    if fills:
        build.append(f"ANALYZE {beside.new.ddl}")
    locks = dict.fromkeys(each.lock for each in dependents if each.lock is not None)
    cut = [
        *locks,
        locking(beside.view, standing.owner).text,
        *(command.text for command in trading_places(beside, standing)),
        *(text for each in dependents for text in (each.statement, *each.extensions)),
        dropping(beside).text,
        *naming(beside, picture),
        *(command.text for command in joining(beside, picture)),
    ]
    return tuple(build), tuple(cut)


def _errors(
    view: ResolvedName,
    origin: ResolvedName,
    standing: Picture,
    target: Target,
    server: ServerFacts,
    facts: ViewFacts,
    place: Place,
    *,
    rebuilds: bool,
) -> Work[list[MatViewError]]:
    """Return why the steps cannot be taken."""
    if not facts.can_own:
        role, owner = (sql.Identifier(name).as_string(None) for name in (server.role, facts.owner))
        return [
            MissingPrivilege(
                f"The role {role} may not replace or alter {origin.display}, which belongs to {owner}.",
                hint=f"run: {catalog.membership(facts.owner, server)}",
            )
        ]
    if place.temporary:
        return [lacks_schema(view, server)]
    if not rebuilds:
        return []
    errors: list[MatViewError] = []
    if blocking := (yield from blocking_dependents(facts.oid)):
        errors.append(
            DependentsExist(
                f"{view.display} cannot be replaced: what is built on it cannot be pointed at a new one: "
                f"{', '.join(blocking)}.",
                dependents=blocking,
                hint="drop those first and make them again afterwards (a materialized view from its definition).",
            )
        )
    carried = {index.name for index in target.picture.indexes} - set(target.index_names.values())
    mended = {index.name for index in standing.indexes} - carried
    found = yield from obstacles(facts, server, mended)
    if reasons := [each for each in found if not (blocking and each.endswith(", ".join(blocking)))]:
        errors.append(
            StrategyRefused(
                f"{view.display} cannot be built anew beside itself: {'; '.join(reasons)}.",
                hint="mend what is named, or give on_drift='report' to leave the view as it is.",
            )
        )
    errors += yield from _taken_names(view, origin, standing, target.picture)
    return errors


def _taken_names(
    view: ResolvedName, origin: ResolvedName, standing: Picture, picture: Picture
) -> Work[list[MatViewError]]:
    # Else it would only show at the cut, when the rows have been built.
    names = {index.name for index in picture.indexes}
    # It gets them in the schema where it is, and takes them to the one where it is to be.
    fresh = sorted(names - {index.name for index in standing.indexes})
    rows = yield from fetch_all(
        sql.SQL(
            "SELECT n.nspname::text AS schema, c.relname::text AS name FROM pg_catalog.pg_class c "
            "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE (n.nspname = %s AND c.relname = ANY (%s)) "
            "OR (n.nspname = %s AND c.relname = ANY (%s)) ORDER BY 1, 2"
        ),
        (origin.schema, fresh, view.schema, fresh if view.schema == origin.schema else sorted(names)),
    )
    return [
        InvalidDefinition(
            f"The index {quote(row['name'])} of {view.display} cannot be made: something else in the schema "
            f"{quote(row['schema'])} has that name.",
            hint="give it another name (Index(name=...)).",
        )
        for row in rows
    ]


def not_managed(view: ResolvedName) -> ViewNotManaged:
    """Return the refusal to make or alter a view that is somebody else's."""
    return ViewNotManaged(
        f"{view.display} is declared with managed=False: somebody else makes it; it is only refreshed here.",
        hint="declare it with managed=True if it is to be created from this definition.",
    )


def _of_the_privileges(
    view: ResolvedName, picture: Picture, standing: Picture | None, server: ServerFacts
) -> Work[list[MatViewError]]:
    errors: list[MatViewError] = [
        InvalidDefinition(f"{reason}.", hint="declare that one's privilege WITH GRANT OPTION, or leave GRANTED BY out.")
        for reason in impossible_grants(view, picture)
    ]
    if server.version < 170000 or _may_maintain(picture) or (standing is not None and not _may_maintain(standing)):
        return errors
    row = yield from fetch_one(sql.SQL("SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user"))
    if row is None or not row["rolsuper"]:
        errors.append(
            InvalidDefinition(
                f"{view.display} could no longer be refreshed: its grants name its owner {quote(picture.owner)}, "
                "without MAINTAIN.",
                hint="leave the owner out of the grants: it has every right by itself.",
            )
        )
    return errors


def _may_maintain(picture: Picture) -> bool:
    return any(each.grantee == picture.owner and each.privilege == "MAINTAIN" for each in picture.privileges)


def _of_the_columns(
    view: ResolvedName,
    origin: ResolvedName,
    standing: Picture,
    picture: Picture,
    oid: int,
    dependents: Sequence[Dependent],
) -> Work[tuple[list[MatViewError], list[str]]]:
    """Return what speaks against other columns: those that go and are used; and notes on those that change."""
    stays = {column.name: column.type for column in picture.columns}
    gone = [column.name for column in standing.columns if column.name not in stays]
    other = [column.name for column in standing.columns if stays.get(column.name, column.type) != column.type]
    users = yield from columns_used(oid)
    errors: list[MatViewError] = []
    used = {column: sorted(who for name, who in users if name == column) for column in gone}
    if used := {column: who for column, who in used.items() if who}:
        told = "; ".join(f"{quote(column)}, which {_listed(who)} use{_s(who)}" for column, who in used.items())
        errors.append(
            DependentsExist(
                f"{view.display} would lose the column {told}.",
                dependents=sorted({each for who in used.values() for each in who}),
                hint="keep the column in the query, or change those first so that they do without it.",
            )
        )
    try:
        require_same_columns_read(origin, dependents, standing, picture)
    except DependentsExist as error:
        errors.append(error)
    notes = [
        f"the column {quote(column)} changes its type, and {_listed(who)} use{_s(who)} it: whether it takes to that "
        "is tried before anything is built"
        for column in other
        if (who := sorted({user for name, user in users if name == column}))
    ]
    return errors, notes


def _s(who: Sequence[str]) -> str:
    return "s" if len(who) == 1 else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _left_alone(view: ResolvedName, target: Target, exclusive: Target) -> Iterator[str]:
    """Return what the view has and its definition does not mention: what would go if the definition were all."""
    relation = Relation(view.schema, view.name)
    has, said = target.picture, exclusive.picture
    prefixes = {
        StepKind.REVOKE: "privilege ",
        StepKind.STORAGE_PARAMETERS: "storage parameter ",
        StepKind.COLUMN_SETTINGS: "settings of ",
        StepKind.SECURITY_LABEL: "security label of ",
        StepKind.REPLICA_IDENTITY: "replica identity of ",
        StepKind.EXTENSION: "tie to ",
        StepKind.ALTER_INDEX: "settings of ",
    }
    if has.tablespace != said.tablespace:
        yield f"tablespace {quote(str(has.tablespace))}"
    steps = [
        *alterations.settings(relation, has, said),
        *alterations.indexes(relation, relation, has, said, {}, {}),
        *alterations.statistics(relation, has, said, {}),
        *alterations.privileges(relation, has, said),
    ]
    invalid: Collection[str] = {f"index {quote(index.name)}" for index in has.indexes if not index.valid}
    for step in steps:
        note = " (INVALID)" if step.subject in invalid else ""
        yield f"{prefixes.get(step.kind, '')}{step.subject}{note}"
