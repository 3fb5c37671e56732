"""What a view should be, whole: what its definition declares, and of all else what it has.

Both as pictures, so that they can be compared, and built from. Pure data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from airflow_provider_matviews.definition import Column, ExtendedStatistics, Index, MatViewDefinition
from airflow_provider_matviews.names import ViewName, quote
from airflow_provider_matviews.parts import Grant
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts
from airflow_provider_matviews.services.ddl import parameter_text
from airflow_provider_matviews.services.picture import (
    ColumnPicture,
    IndexPicture,
    Label,
    Picture,
    Privilege,
    StatisticsPicture,
)
from airflow_provider_matviews.services.probe import Declared

_REPLICA_IDENTITY = {"default": "d", "nothing": "n", "full": "f"}
_TRUE, _FALSE = {"true", "on", "yes"}, {"false", "off", "no"}
_COLUMN_RIGHTS = frozenset({"SELECT", "INSERT", "UPDATE", "REFERENCES"})


@dataclass(frozen=True)
class Target:
    """A view as it should be.

    :ivar picture: whole.
    :ivar index_names: name of a standing index -> that of the one that it becomes.
    :ivar doomed: names of standing indexes and statistics that cannot stay -> the columns that go from under them.
    """

    picture: Picture
    index_names: Mapping[str, str] = field(default_factory=dict)
    doomed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def target_of(
    view: ResolvedName,
    definition: MatViewDefinition,
    declared: Declared,
    base: Picture | None,
    server: ServerFacts,
    origin: str | None = None,
) -> Target:
    """Put together what a view should be.

    :param base: the view that stands, as it is once its columns have their new names and it has its new owner; None
        where none stands.
    :param origin: the name that the view has, where it is to be renamed.
    """
    exclusive, fresh = definition.exclusive, base is None
    if base is None:
        base = given_to(declared.bare, definition.owner or declared.bare.owner)
    gone = {column.name for column in base.columns} - set(declared.column_names)
    index_names, indexes, doomed = _indexes(view, definition, declared, base, gone, exclusive, origin)
    statistics, doomed_statistics = _statistics(view, definition, declared, base, gone, server, exclusive)
    identity = "d" if exclusive else base.replica_identity
    if definition.replica_identity is not None:
        identity = _REPLICA_IDENTITY[definition.replica_identity]
    toast = {name[6:]: value for name, value in definition.storage_parameters.items() if name.startswith("toast.")}
    bare = declared.bare
    rights = own_rights(server)
    return Target(
        Picture(
            owner=base.owner,
            access_method=base.access_method if definition.access_method is None else bare.access_method,
            tablespace=bare.tablespace if definition.tablespace or exclusive else base.tablespace,
            options=_options(base.options, bare.options, definition.storage_parameters, exclusive),
            toast_options=_options(base.toast_options, bare.toast_options, toast, exclusive),
            comment=definition.comment if definition.comment is not None or exclusive else base.comment,
            replica_identity=identity,
            privileges=_privileges(
                base.privileges, definition.grants, base.owner, rights, exclusive, whole=True, fresh=fresh
            ),
            labels=_labels(base.labels, definition.security_labels, exclusive),
            columns=tuple(_columns(definition, declared, base, exclusive)),
            indexes=tuple(sorted(indexes, key=lambda index: index.name)),
            statistics=tuple(sorted(statistics, key=lambda each: (each.schema, each.name))),
            extensions=_extensions(base.extensions, definition.depends_on_extensions, exclusive),
        ),
        index_names,
        {**doomed, **doomed_statistics},
    )


def impossible_grants(view: ResolvedName, picture: Picture) -> list[str]:
    """Return the privileges that nobody could grant as they are declared, each a sentence.

    The server would only warn, and grant nothing (https://www.postgresql.org/docs/current/sql-grant.html).
    """
    whole = [(each, None) for each in picture.privileges]
    parts = [(each, column.name) for column in picture.columns for each in column.privileges]
    every: list[tuple[Privilege, str | None]] = [*whole, *parts]
    able = {(each.grantee, each.privilege, column) for each, column in every if each.grantable}
    return [
        f"{view.display} cannot have {each.privilege} granted by {quote(each.grantor)}, who may not grant it"
        for each, column in every
        if each.grantor != picture.owner
        and not {(each.grantor, each.privilege, place) for place in (None, column)} & able
    ]


def own_rights(server: ServerFacts) -> frozenset[str]:
    """Return what ALL means on a materialized view of this server."""
    rights = {"SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"}
    return frozenset(rights | {"MAINTAIN"} if server.version >= 170000 else rights)


def same_value(one: str, other: str) -> bool:
    """Return whether two texts of a storage parameter mean the same."""
    one, other = one.strip().lower(), other.strip().lower()
    if one == other or {one, other} <= _TRUE or {one, other} <= _FALSE:
        return True
    try:
        return float(one) == float(other)
    except ValueError:
        return False


def options_of(options: Iterable[str]) -> dict[str, str]:
    """Return ``name=value`` texts as a mapping."""
    return {name: value for name, _, value in (option.partition("=") for option in options)}


def given_to(picture: Picture, owner: str) -> Picture:
    """Return a view's picture once it has another owner, who takes the former one's place in its privileges."""
    former = picture.owner
    if former == owner:
        return picture

    def given(privileges: Sequence[Privilege]) -> tuple[Privilege, ...]:
        passed = [
            replace(
                each,
                grantee=owner if each.grantee == former else each.grantee,
                grantor=owner if each.grantor == former else each.grantor,
            )
            for each in privileges
        ]
        merged: dict[tuple[str | None, str, str], Privilege] = {}
        for each in passed:
            key = _key(each)
            merged[key] = replace(each, grantable=each.grantable or (key in merged and merged[key].grantable))
        return _sorted(merged.values())

    return replace(
        picture,
        owner=owner,
        privileges=given(picture.privileges),
        columns=tuple(replace(column, privileges=given(column.privileges)) for column in picture.columns),
    )


def with_columns_renamed(picture: Picture, names: Mapping[str, str]) -> Picture:
    """Return a view's picture once columns have other names.

    :param names: name -> new name; what an expression says of them says so already.
    """
    if not names:
        return picture

    def renamed(columns: Sequence[str]) -> tuple[str, ...]:
        return tuple(names.get(column, column) for column in columns)

    indexes = []
    for index in picture.indexes:
        anatomy = index.anatomy
        assert anatomy is not None
        keys = tuple(replace(key, column=names.get(key.column or "", key.column)) for key in anatomy.shape.keys)
        shape = replace(anatomy.shape, keys=keys, include=renamed(anatomy.shape.include))
        body = anatomy.body if anatomy.reads == renamed(anatomy.reads) else shape.body(anatomy.options)
        indexes.append(replace(index, anatomy=replace(anatomy, shape=shape, body=body, reads=renamed(anatomy.reads))))
    statistics = []
    for each in picture.statistics:
        assert each.anatomy is not None
        anatomy_of = replace(each.anatomy, columns=renamed(each.anatomy.columns), reads=renamed(each.anatomy.reads))
        if anatomy_of != each.anatomy:
            anatomy_of = replace(anatomy_of, body=anatomy_of.worded())
        statistics.append(replace(each, anatomy=anatomy_of))
    return replace(
        picture,
        columns=tuple(replace(each, name=names.get(each.name, each.name)) for each in picture.columns),
        indexes=tuple(indexes),
        statistics=tuple(statistics),
    )


def _options(base: Sequence[str], declared: Sequence[str], named: Iterable[str], exclusive: bool) -> tuple[str, ...]:
    """Return those that are declared, as the server keeps them, and of all others those that are.

    :param named: the names of those that are declared.
    """
    has, wanted = options_of(base), options_of(declared)
    result = {} if exclusive else dict(has)
    for name in named:
        if name in wanted:
            result[name] = has[name] if name in has and same_value(has[name], wanted[name]) else wanted[name]
    return tuple(f"{name}={value}" for name, value in result.items())


def _privileges(
    base: Sequence[Privilege],
    grants: Mapping[str, Sequence[str]],
    owner: str,
    all_rights: frozenset[str],
    exclusive: bool,
    whole: bool,
    fresh: bool = False,
) -> tuple[Privilege, ...]:
    """Return the privileges that should be.

    :param whole: on the whole view, where its owner has everything unless something else is said.
    :param fresh: on a view that does not stand: whoever is named gets what is named, whatever default privileges give.
    """
    wanted: dict[tuple[str | None, str, str], Privilege] = {}
    for role, texts in grants.items():
        grantee = None if role == "public" else role
        for grant in map(Grant.parse, texts):
            for right in sorted(all_rights) if grant.privilege == "ALL" else [grant.privilege]:
                if right != "NONE":
                    privilege = Privilege(grantee, grant.grantor or owner, right, grant.grantable)
                    wanted[_key(privilege)] = privilege
    result = dict(wanted)
    for each in base:
        named = grants.get(each.grantee or "public")
        if named is not None and (tuple(named) == ("NONE",) or fresh) and _key(each) not in wanted:
            continue
        if _key(each) in wanted:
            # More than was asked is left alone like all that was not asked for.
            if each.grantable and not exclusive and (each.grantee != owner or owner not in grants):
                result[_key(each)] = each
        elif whole and each.grantee == owner:
            if owner not in grants:
                result[_key(each)] = each
        elif not exclusive:
            result[_key(each)] = each
    return _sorted(result.values())


def _key(privilege: Privilege) -> tuple[str | None, str, str]:
    return privilege.grantee, privilege.grantor, privilege.privilege


def _sorted(privileges: Iterable[Privilege]) -> tuple[Privilege, ...]:
    return tuple(sorted(privileges, key=lambda each: (each.grantee or "", each.grantor, each.privilege)))


def _labels(base: Sequence[Label], wanted: Mapping[str, str], exclusive: bool) -> tuple[Label, ...]:
    labels = {} if exclusive else {each.provider: each.label for each in base}
    return tuple(Label(provider, label) for provider, label in sorted({**labels, **wanted}.items()))


def _extensions(base: Sequence[tuple[str, str]], wanted: Sequence[str], exclusive: bool) -> tuple[tuple[str, str], ...]:
    # Belonging to an extension is for the extension's script to say.
    kept = {each for each in base if not exclusive or each[1] != "x"}
    return tuple(sorted(kept | {(extension, "x") for extension in wanted}))


def _columns(
    definition: MatViewDefinition, declared: Declared, base: Picture, exclusive: bool
) -> Iterable[ColumnPicture]:
    has = {column.name: column for column in base.columns}
    says = {column.name: column for column in definition.columns}
    for fresh in declared.bare.columns:
        stands = has.get(fresh.name, fresh)
        said = says.get(fresh.name, Column(name=fresh.name))
        column = fresh if exclusive else replace(stands, type=fresh.type)
        if stands.type != fresh.type:
            # A way of keeping values belongs to their type.
            column = replace(column, storage=None, compression=None)
        yield replace(
            column,
            comment=column.comment if said.comment is None else said.comment,
            # As the server keeps them: what is the type's own way is no setting.
            storage=fresh.storage if said.storage else column.storage,
            compression=fresh.compression if said.compression else column.compression,
            statistics=column.statistics if said.statistics is None else said.statistics,
            options=_options(
                column.options,
                [f"{name}={parameter_text(value)}" for name, value in said.options.items()],
                said.options,
                exclusive,
            ),
            privileges=_privileges(stands.privileges, said.grants, base.owner, _COLUMN_RIGHTS, exclusive, whole=False),
            labels=_labels(column.labels, said.security_labels, exclusive),
        )


def _indexes(
    view: ResolvedName,
    definition: MatViewDefinition,
    declared: Declared,
    base: Picture,
    gone: Collection[str],
    exclusive: bool,
    origin: str | None,
) -> tuple[dict[str, str], list[IndexPicture], dict[str, tuple[str, ...]]]:
    """Return what the standing ones become, those that should be, and which cannot stay."""
    stands = {index.name: index for index in base.indexes}
    wanted = [
        (index, index.name_on(view.name), found)
        for index, found in zip(definition.all_indexes, declared.indexes, strict=True)
    ]
    names = {name: name for _, name, _ in wanted if name in stands}
    result: list[IndexPicture] = []
    for index, name, found in wanted:
        former, final = stands.get(name), name
        if former is None:
            candidates = (each for each in base.indexes if each.name not in names and each.valid)
            former = next((each for each in candidates if declared.same_index(each, found)), None)
            if former is not None:
                # Who gave no name is content with any, but for the one that was made of the view's former name.
                made = origin is not None and former.name == index.name_on(origin)
                final = names[former.name] = former.name if index.name is None and not made else name
        same = former is not None and declared.same_index(former, found)
        result.append(_index(index, final, found, former, same=same, exclusive=exclusive))
    doomed: dict[str, tuple[str, ...]] = {}
    for former in base.indexes:
        if former.name in names or exclusive:
            continue
        if under := _under(former, gone):
            doomed[former.name] = under
        else:
            result.append(former)
    if any(index.clustered for index in definition.indexes):
        marks = [index.clustered for index, _, _ in wanted] + [False] * len(result)
        result = [replace(each, clustered=mark) for each, mark in zip(result, marks, strict=False)]
    return names, result, doomed


def _can_be_clustered(index: IndexPicture) -> bool:
    # The methods of PostgreSQL that CLUSTER takes (pg_indexam_has_property); never a partial index.
    if index.anatomy is None:
        return False
    return index.anatomy.shape.method in ("btree", "gist") and index.anatomy.shape.predicate is None


def _under(thing: IndexPicture | StatisticsPicture, gone: Collection[str]) -> tuple[str, ...]:
    return () if thing.anatomy is None else tuple(column for column in thing.anatomy.reads if column in gone)


def _index(
    index: Index, name: str, found: IndexPicture, former: IndexPicture | None, *, same: bool, exclusive: bool
) -> IndexPicture:
    kept = former if former is not None and not exclusive else found
    said = tuple((n, key.statistics) for n, key in enumerate(index.keys, 1) if key.statistics is not None)
    # Targets belong to the keys by their number.
    targets = dict(kept.statistics) if former is not None and same and not exclusive else {}
    anatomy = found.anatomy
    if former is not None and former.anatomy is not None and anatomy is not None:
        has = former.anatomy.options if former.anatomy.shape.method == anatomy.shape.method else ()
        options = _options(has, anatomy.options, options_of(anatomy.options), exclusive)
        if same:
            anatomy = former.anatomy
        if options != anatomy.options:
            anatomy = replace(anatomy, options=options, body=anatomy.shape.body(options))
    return replace(
        found,
        name=name,
        anatomy=anatomy,
        # The server's default is for what is new.
        tablespace=found.tablespace if index.tablespace or former is None or exclusive else former.tablespace,
        statistics=tuple(sorted({**targets, **dict(said)}.items())),
        comment=index.comment if index.comment is not None else (None if exclusive else kept.comment),
        clustered=index.clustered or (kept.clustered and (same or _can_be_clustered(found))),
        extensions=tuple(sorted({*kept.extensions, *index.depends_on_extensions})),
    )


def _statistics(
    view: ResolvedName,
    definition: MatViewDefinition,
    declared: Declared,
    base: Picture,
    gone: Collection[str],
    server: ServerFacts,
    exclusive: bool,
) -> tuple[list[StatisticsPicture], dict[str, tuple[str, ...]]]:
    """Return those that should be, and which cannot stay."""
    stands = {(each.schema, each.name): each for each in base.statistics}
    result: list[StatisticsPicture] = []
    taken: set[tuple[str, str]] = set()
    for said, found in zip(definition.statistics, declared.statistics, strict=True):
        name = ViewName.parse(said.name)
        key = (name.schema or view.schema, name.name)
        taken.add(key)
        former = stands.get(key)
        result.append(_one_statistics(said, key, declared.kept(former, found), former, server, exclusive))
    doomed: dict[str, tuple[str, ...]] = {}
    for key, former in stands.items():
        if key in taken or exclusive:
            continue
        if under := _under(former, gone):
            doomed[former.name] = under
        else:
            result.append(former)
    return result, doomed


def _one_statistics(
    said: ExtendedStatistics,
    key: tuple[str, str],
    found: StatisticsPicture,
    former: StatisticsPicture | None,
    server: ServerFacts,
    exclusive: bool,
) -> StatisticsPicture:
    kept = found if former is None or exclusive else former
    return replace(
        found,
        schema=key[0],
        name=key[1],
        owner=said.owner or (former.owner if former is not None else server.role),
        target=kept.target if said.target is None else said.target,
        comment=kept.comment if said.comment is None else said.comment,
    )
