"""What turns one picture of a view into another, as statements on a relation that stands. Pure: reads no catalog.

A view that is built anew is altered from a bare one; one that stands, from what it is.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from psycopg import sql

from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, quote, shorten
from airflow_provider_matviews.services.instructions import raw
from airflow_provider_matviews.services.picture import (
    ColumnPicture,
    IndexPicture,
    Picture,
    Privilege,
    StatisticsPicture,
)
from airflow_provider_matviews.services.plan_steps import Lock, PlanStep, StepKind
from airflow_provider_matviews.services.target import options_of

STORAGE = {"p": "PLAIN", "e": "EXTERNAL", "m": "MAIN", "x": "EXTENDED"}
COMPRESSION = {"p": "pglz", "l": "lz4"}
_REPLICA_IDENTITY = {"d": "DEFAULT", "n": "NOTHING", "f": "FULL"}


@dataclass(frozen=True)
class Relation:
    """What is altered.

    :ivar schema: where it and its indexes are.
    :ivar name: not quoted.
    """

    schema: str
    name: str

    @property
    def identifier(self) -> sql.Identifier:
        """For a statement."""
        return sql.Identifier(self.schema, self.name)

    def alter(self) -> sql.Composed:
        """Return how a statement begins that alters it."""
        return sql.SQL("ALTER MATERIALIZED VIEW {} ").format(self.identifier)

    def beside(self, name: str) -> sql.Identifier:
        """Return the name of something in its schema."""
        return sql.Identifier(self.schema, name)


def text(statement: sql.Composable) -> str:
    """Return a statement as the server reads it."""
    return statement.as_string(None)


def bare(picture: Picture) -> Picture:
    """Return what such a view is right after CREATE MATERIALIZED VIEW, whose clauses say some of it."""
    return replace(
        picture,
        comment=None,
        replica_identity="d",
        labels=(),
        columns=tuple(
            ColumnPicture(column.name, column.type, None, None, None, (), None, (), ()) for column in picture.columns
        ),
        indexes=(),
        statistics=(),
        extensions=tuple(each for each in picture.extensions if each[1] != "x"),
    )


def settings(relation: Relation, before: Picture, after: Picture) -> Iterator[PlanStep]:
    """Return what sets comments, options, columns' settings, labels, replica identity and ties to extensions."""
    for prefix, has, wanted in (
        ("", before.options, after.options),
        ("toast.", before.toast_options, after.toast_options),
    ):
        yield from _options(relation, prefix, options_of(has), options_of(wanted))
    columns = {column.name: column for column in before.columns}
    for column in after.columns:
        if column.name in columns:
            yield from _column(relation, columns[column.name], column)
    if before.comment != after.comment:
        yield PlanStep(
            StepKind.COMMENT,
            "the view's comment",
            _differs(after.comment, before.comment),
            cut=(_comment(sql.SQL("MATERIALIZED VIEW {}").format(relation.identifier), after.comment),),
            lock=Lock.SHARE_UPDATE_EXCLUSIVE,
        )
    target = sql.SQL("MATERIALIZED VIEW {}").format(relation.identifier)
    yield from _labels("the view", target, before.labels, after.labels)
    if before.replica_identity != after.replica_identity and after.replica_identity in _REPLICA_IDENTITY:
        word = _REPLICA_IDENTITY[after.replica_identity]
        yield PlanStep(
            StepKind.REPLICA_IDENTITY,
            "the view",
            f"it should be {word}",
            cut=(text(relation.alter() + sql.SQL("REPLICA IDENTITY ") + raw(word)),),
            lock=Lock.ACCESS_EXCLUSIVE,
        )
    for verb, extensions in (
        ("NO DEPENDS ON EXTENSION", [each for each in before.extensions if each not in after.extensions]),
        ("DEPENDS ON EXTENSION", [each for each in after.extensions if each not in before.extensions]),
    ):
        for extension, _ in extensions:
            yield PlanStep(
                StepKind.EXTENSION,
                f"extension {quote(extension)}",
                "the view should go with it" if verb.startswith("D") else "nothing declares the tie",
                cut=(text(relation.alter() + sql.SQL("{} {}").format(raw(verb), sql.Identifier(extension))),),
                lock=Lock.ACCESS_EXCLUSIVE,
            )


def _options(relation: Relation, prefix: str, has: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[PlanStep]:
    statements = _set_and_reset(relation.alter(), has, wanted, prefix)
    if not statements:
        return
    changed = {name: value for name, value in wanted.items() if has.get(name) != value}
    gone = [name for name in has if name not in wanted]
    said = [f"{prefix}{name} should be {value}, is {has.get(name, 'not set')}" for name, value in changed.items()]
    said += [f"nothing declares {prefix}{name}" for name in gone]
    yield PlanStep(
        StepKind.STORAGE_PARAMETERS,
        ", ".join(prefix + name for name in [*changed, *gone]),
        "; ".join(said),
        cut=statements,
        lock=Lock.SHARE_UPDATE_EXCLUSIVE,
        cost="readers go on; rows follow at the next rebuild",
    )


def _set_and_reset(
    alter: sql.Composable, has: Mapping[str, str], wanted: Mapping[str, str], prefix: str = ""
) -> tuple[str, ...]:
    name_of = sql.SQL(prefix)
    statements: list[str] = []
    changed = {name: value for name, value in wanted.items() if has.get(name) != value}
    if changed:
        pairs = (name_of + sql.SQL("{} = {}").format(sql.Identifier(n), sql.Literal(v)) for n, v in changed.items())
        statements.append(text(alter + sql.SQL("SET ({})").format(sql.SQL(", ").join(pairs))))
    if gone := [name for name in has if name not in wanted]:
        names = (name_of + sql.Identifier(name) for name in gone)
        statements.append(text(alter + sql.SQL("RESET ({})").format(sql.SQL(", ").join(names))))
    return tuple(statements)


def _column(relation: Relation, before: ColumnPicture, after: ColumnPicture) -> Iterator[PlanStep]:
    name = sql.Identifier(after.name)
    alter = relation.alter() + sql.SQL("ALTER COLUMN {} ").format(name)
    target = sql.SQL("COLUMN {}.{}").format(relation.identifier, name)
    said: list[str] = []
    statements: list[str] = []
    lock = Lock.SHARE_UPDATE_EXCLUSIVE
    if before.storage != after.storage:
        word = STORAGE[after.storage] if after.storage else "DEFAULT"
        said.append(f"storage {word}")
        statements.append(text(alter + sql.SQL("SET STORAGE ") + raw(word)))
        lock = Lock.ACCESS_EXCLUSIVE
    if before.compression != after.compression:
        word = COMPRESSION[after.compression] if after.compression else "default"
        said.append(f"compression {word}")
        statements.append(text(alter + sql.SQL("SET COMPRESSION ") + raw(word)))
        lock = Lock.ACCESS_EXCLUSIVE
    if before.statistics != after.statistics:
        said.append(f"statistics target {'default' if after.statistics is None else after.statistics}")
        value = -1 if after.statistics is None else after.statistics
        statements.append(text(alter + sql.SQL("SET STATISTICS {}").format(sql.Literal(value))))
    if options := _set_and_reset(alter, options_of(before.options), options_of(after.options)):
        said.append(f"options {', '.join(after.options) or 'none'}")
        statements += options
    if before.comment != after.comment:
        said.append("another comment")
        statements.append(_comment(target, after.comment))
    if statements:
        yield PlanStep(
            StepKind.COLUMN_SETTINGS,
            f"column {quote(after.name)}",
            f"it should have {', '.join(said)}",
            cut=tuple(statements),
            lock=lock,
        )
    yield from _labels(f"column {quote(after.name)}", target, before.labels, after.labels)


def _labels(what: str, target: sql.Composable, before: Sequence[object], after: Sequence[object]) -> Iterator[PlanStep]:
    has = {each.provider: each.label for each in before}  # type: ignore[attr-defined]
    wanted = {each.provider: each.label for each in after}  # type: ignore[attr-defined]
    for provider in sorted({*has, *wanted}):
        if has.get(provider) != wanted.get(provider):
            yield PlanStep(
                StepKind.SECURITY_LABEL,
                f"{what}, provider {quote(provider)}",
                _differs(wanted.get(provider), has.get(provider)),
                cut=(
                    text(
                        sql.SQL("SECURITY LABEL FOR {} ON {} IS {}").format(
                            sql.Identifier(provider), target, sql.Literal(wanted.get(provider))
                        )
                    ),
                ),
                lock=Lock.SHARE_UPDATE_EXCLUSIVE,
            )


def _comment(target: sql.Composable, comment: str | None) -> str:
    return text(sql.SQL("COMMENT ON {} IS {}").format(target, sql.Literal(comment)))


def _differs(wanted: str | None, has: str | None) -> str:
    if wanted is None:
        return f"nothing declares it; it is {_short(has)}"
    return f"it should be {_short(wanted)}" + ("" if has is None else f", it is {_short(has)}")


def _short(value: str | None) -> str:
    flat = " ".join((value or "").split())
    return repr(flat if len(flat) <= 60 else f"{flat[:57]}...")


# Indexes


def build_index(relation: Relation, index: IndexPicture, name: str, body: str) -> tuple[str, ...]:
    """Return what builds an index, without what it has beside its definition.

    :param name: what it is to be called for now.
    """
    kind = sql.SQL("CREATE UNIQUE INDEX" if index.unique else "CREATE INDEX")
    create = text(sql.SQL("{} {} ON {} USING {}").format(kind, sql.Identifier(name), relation.identifier, raw(body)))
    # Not ALTER INDEX ... SET TABLESPACE, which would copy what has just been built.
    place = sql.SQL("SET LOCAL default_tablespace = {}")
    if index.tablespace is None:
        return (create,)
    return text(place.format(sql.Literal(index.tablespace))), create, text(place.format(sql.Literal("")))


def dress_index(relation: Relation, name: str, before: IndexPicture | None, after: IndexPicture) -> tuple[str, ...]:
    """Return what gives an index all else that it should have.

    :param name: what it is called now.
    :param before: what it has already; None for nothing.
    """
    qualified = relation.beside(name)
    alter = sql.SQL("ALTER INDEX {} ").format(qualified)
    statements: list[str] = []
    has, wanted = dict(before.statistics if before else ()), dict(after.statistics)
    for number in sorted({*has, *wanted}):
        if has.get(number) != wanted.get(number):
            value = sql.Literal(wanted.get(number, -1))
            number_of = sql.Literal(number)
            statements.append(text(alter + sql.SQL("ALTER COLUMN {} SET STATISTICS {}").format(number_of, value)))
    if (before.comment if before else None) != after.comment:
        statements.append(_comment(sql.SQL("INDEX {}").format(qualified), after.comment))
    if after.clustered and not (before and before.clustered):
        statements.append(text(relation.alter() + sql.SQL("CLUSTER ON {}").format(sql.Identifier(name))))
    if after.replica_identity and not (before and before.replica_identity):
        identity = sql.SQL("REPLICA IDENTITY USING INDEX {}").format(sql.Identifier(name))
        statements.append(text(relation.alter() + identity))
    tied = before.extensions if before else ()
    for verb, extensions in (
        ("NO DEPENDS ON EXTENSION", [each for each in tied if each not in after.extensions]),
        ("DEPENDS ON EXTENSION", [each for each in after.extensions if each not in tied]),
    ):
        statements += [text(alter + sql.SQL("{} {}").format(raw(verb), sql.Identifier(each))) for each in extensions]
    return tuple(statements)


def indexes(
    relation: Relation,
    now: Relation,
    before: Picture,
    after: Picture,
    names: Mapping[str, str],
    doomed: Mapping[str, tuple[str, ...]],
    bodies: Mapping[str, str] | None = None,
) -> Iterator[PlanStep]:
    """Return what makes a standing view's indexes what they should be.

    :param now: what the view is called until the cut.
    :param names: name of a standing one -> that of the one that it becomes.
    :param doomed: name of a standing one that cannot stay -> the columns that go from under it.
    :param bodies: name of one -> what builds it now, where that is not what it will say after the cut.
    """
    bodies = bodies or {}
    stands = {names.get(index.name, index.name): index for index in before.indexes}
    for position, index in enumerate(after.indexes):
        former = stands.pop(index.name, None)
        if former is None:
            yield _new_index(relation, now, index, bodies.get(index.name) or body_of(index))
        elif what := _why_anew(former, index):
            body = bodies.get(index.name) or body_of(index)
            yield _index_anew(relation, now, position, former, index, body, what)
        else:
            yield from _index_altered(relation, former, index)
    for former in stands.values():
        under = doomed.get(former.name)
        yield PlanStep(
            StepKind.DROP_INDEX,
            f"index {quote(former.name)}",
            f"it reads the column {', '.join(map(quote, under))}, which goes" if under else "nothing declares it",
            cut=(text(sql.SQL("DROP INDEX {}").format(relation.beside(former.name))),),
            lock=Lock.ACCESS_EXCLUSIVE,
        )
    if any(index.clustered for index in before.indexes) and not any(index.clustered for index in after.indexes):
        yield PlanStep(
            StepKind.ALTER_INDEX,
            "the CLUSTER mark",
            "nothing declares it",
            cut=(text(relation.alter() + sql.SQL("SET WITHOUT CLUSTER")),),
            lock=Lock.ACCESS_EXCLUSIVE,
        )


def body_of(index: IndexPicture) -> str:
    """Return an index's definition from the method on."""
    anatomy = index.anatomy
    assert anatomy is not None
    return anatomy.shape.body(anatomy.options) if anatomy.body is None else anatomy.body


def _new_index(relation: Relation, now: Relation, index: IndexPicture, body: str) -> PlanStep:
    return PlanStep(
        StepKind.BUILD_INDEX,
        f"index {quote(index.name)}",
        "it is declared and does not stand",
        build=build_index(now, index, index.name, body),
        cut=dress_index(relation, index.name, None, index),
        lock=Lock.SHARE,
    )


def _why_anew(former: IndexPicture, index: IndexPicture) -> str | None:
    assert former.anatomy is not None
    assert index.anatomy is not None
    if former.anatomy.shape != index.anatomy.shape:
        return f"it is declared as {_short(body_of(index))}, it is {_short(body_of(former))}"
    if not former.valid and index.valid:
        return "it is INVALID: a build of it failed half-way, so no query uses it and every refresh pays for it"
    if former.tablespace != index.tablespace:
        return f"it should be in the tablespace {index.tablespace or 'of the database'}"
    return None


def _index_anew(
    relation: Relation, now: Relation, position: int, former: IndexPicture, index: IndexPicture, body: str, why: str
) -> PlanStep:
    ending = f"_mv_{secrets.token_hex(4)}_{position}"
    made = shorten(index.name, MAX_IDENTIFIER_BYTES - len(ending)) + ending
    rename = sql.SQL("ALTER INDEX {} RENAME TO {}").format(relation.beside(made), sql.Identifier(index.name))
    # The old one's mark goes with it.
    return PlanStep(
        StepKind.CHANGE_INDEX if former.valid else StepKind.REPAIR_INDEX,
        f"index {quote(former.name)}",
        why,
        build=build_index(now, index, made, body),
        cut=(
            text(sql.SQL("DROP INDEX {}").format(relation.beside(former.name))),
            text(rename),
            *dress_index(relation, index.name, None, index),
        ),
        lock=Lock.ACCESS_EXCLUSIVE,
        cost="readers go on while it is built, then wait for the moment in which it takes the old one's place",
    )


def _index_altered(relation: Relation, former: IndexPicture, index: IndexPicture) -> Iterator[PlanStep]:
    assert former.anatomy is not None
    assert index.anatomy is not None
    if former.name != index.name:
        rename = sql.SQL("ALTER INDEX {} RENAME TO {}").format(relation.beside(former.name), sql.Identifier(index.name))
        yield PlanStep(
            StepKind.RENAME_INDEX,
            f"index {quote(former.name)}",
            f"it is what is declared as {quote(index.name)}",
            cut=(text(rename),),
            lock=Lock.SHARE_UPDATE_EXCLUSIVE,
        )
    alter = sql.SQL("ALTER INDEX {} ").format(relation.beside(index.name))
    statements = _set_and_reset(alter, options_of(former.anatomy.options), options_of(index.anatomy.options))
    if dressing := statements + dress_index(relation, index.name, former, index):
        identity = index.replica_identity and not former.replica_identity
        yield PlanStep(
            StepKind.ALTER_INDEX,
            f"index {quote(index.name)}",
            "what it has beside its definition is not what is declared",
            cut=dressing,
            lock=Lock.ACCESS_EXCLUSIVE if identity else Lock.SHARE_UPDATE_EXCLUSIVE,
        )


# Extended statistics


def make_statistics(relation: Relation, statistics: StatisticsPicture, name: str, body: str) -> tuple[str, ...]:
    """Return what makes extended statistics with all that they have."""
    made = sql.Identifier(statistics.schema, name)
    create = sql.SQL("CREATE STATISTICS {} {} FROM {}").format(made, raw(body), relation.identifier)
    return (text(create), *_dress_statistics(made, None, statistics))


def _dress_statistics(
    made: sql.Composable, before: StatisticsPicture | None, after: StatisticsPicture
) -> tuple[str, ...]:
    alter = sql.SQL("ALTER STATISTICS {} ").format(made)
    statements: list[str] = []
    if (before.target if before else None) != after.target:
        value = sql.Literal(-1 if after.target is None else after.target)
        statements.append(text(alter + sql.SQL("SET STATISTICS {}").format(value)))
    if (before.comment if before else None) != after.comment:
        statements.append(_comment(sql.SQL("STATISTICS {}").format(made), after.comment))
    if before is None or before.owner != after.owner:
        statements.append(text(alter + sql.SQL("OWNER TO {}").format(sql.Identifier(after.owner))))
    return tuple(statements)


def statistics(
    relation: Relation, before: Picture, after: Picture, doomed: Mapping[str, tuple[str, ...]]
) -> Iterator[PlanStep]:
    """Return what makes a standing view's extended statistics what they should be; see :func:`indexes`."""
    stands = {(each.schema, each.name): each for each in before.statistics}
    for each in after.statistics:
        former = stands.pop((each.schema, each.name), None)
        name = sql.Identifier(each.schema, each.name)
        subject = f"statistics {quote(each.schema)}.{quote(each.name)}"
        make = make_statistics(relation, each, each.name, statistics_body(each))
        if former is None:
            yield PlanStep(
                StepKind.CREATE_STATISTICS,
                subject,
                "they are declared and do not stand",
                cut=make,
                lock=Lock.SHARE_UPDATE_EXCLUSIVE,
                cost="readers go on; ANALYZE fills them",
            )
        elif _made_of(former) != _made_of(each):
            yield PlanStep(
                StepKind.CHANGE_STATISTICS,
                subject,
                f"they are declared as {_short(statistics_body(each))}, they are {_short(statistics_body(former))}",
                cut=(text(sql.SQL("DROP STATISTICS {}").format(name)), *make),
                lock=Lock.SHARE_UPDATE_EXCLUSIVE,
                cost="readers go on; ANALYZE fills them",
            )
        elif dressing := _dress_statistics(name, former, each):
            yield PlanStep(
                StepKind.ALTER_STATISTICS,
                subject,
                "what they have beside their definition is not what is declared",
                cut=dressing,
                lock=Lock.SHARE_UPDATE_EXCLUSIVE,
            )
    for former in stands.values():
        under = doomed.get(former.name)
        yield PlanStep(
            StepKind.DROP_STATISTICS,
            f"statistics {quote(former.schema)}.{quote(former.name)}",
            f"they read the column {', '.join(map(quote, under))}, which goes" if under else "nothing declares them",
            cut=(text(sql.SQL("DROP STATISTICS {}").format(sql.Identifier(former.schema, former.name))),),
            lock=Lock.SHARE_UPDATE_EXCLUSIVE,
        )


def _made_of(statistics: StatisticsPicture) -> tuple[tuple[str, ...], ...]:
    anatomy = statistics.anatomy
    assert anatomy is not None
    return anatomy.columns, anatomy.expressions, anatomy.kinds


def statistics_body(statistics: StatisticsPicture) -> str:
    """Return the definition of statistics without names."""
    anatomy = statistics.anatomy
    assert anatomy is not None
    return anatomy.worded() if anatomy.body is None else anatomy.body


# Privileges


@dataclass(frozen=True)
class _Right:
    """A privilege, on the view or on one of its columns."""

    privilege: Privilege
    column: str | None

    @property
    def key(self) -> tuple[str | None, str, str, str | None]:
        return self.privilege.grantee, self.privilege.grantor, self.privilege.privilege, self.column


def privileges(relation: Relation, before: Picture, after: Picture) -> Iterator[PlanStep]:
    """Return what takes and gives privileges, each by its own grantor.

    :param before: after whatever gave the view to another owner.
    """
    present = {right.key: right for right in _rights(before)}
    wanted = {right.key: right for right in _rights(after)}
    surplus: list[_Right] = []
    optional: list[_Right] = []
    for key in list(present):
        right = present.get(key)
        target = wanted.get(key)
        if right is None:
            continue  # Went with the one that it was granted from.
        if target is None:
            surplus.append(right)
            del present[key]
        elif right.privilege.grantable and not target.privilege.grantable:
            optional.append(right)
            present[key] = target
        else:
            continue
        if right.privilege.grantable:
            _forget_granted_from(right, present)
        if right.column is None:
            # Taken from the whole, it is taken from each column (https://www.postgresql.org/docs/current/sql-revoke.html).
            for other in [other for other in present if other[:3] == key[:3] and other[3] is not None]:
                del present[other]
    for rights in _together(surplus):
        yield _revoked(relation, after.owner, rights, option_only=False)
    for rights in _together(optional):
        yield _revoked(relation, after.owner, rights, option_only=True)
    missing = [right for key, right in wanted.items() if present.get(key) != right]
    for rights in _together(_in_order_of_grantors(missing, present.values(), after.owner)):
        yield _granted(relation, after.owner, rights)


def _together(rights: Iterable[_Right]) -> list[list[_Right]]:
    """Return them in groups that one statement can name."""

    def alike(right: _Right) -> tuple[object, ...]:
        return right.privilege.grantee, right.privilege.grantor, right.privilege.grantable, right.column

    return [list(group) for _, group in groupby(rights, key=alike)]


def _rights(picture: Picture) -> Iterator[_Right]:
    for privilege in picture.privileges:
        yield _Right(privilege, None)
    for column in picture.columns:
        for privilege in column.privileges:
            yield _Right(privilege, column.name)


def _forget_granted_from(source: _Right, present: dict[tuple[str | None, str, str, str | None], _Right]) -> None:
    for key, right in list(present.items()):
        privilege = right.privilege
        if (
            privilege.grantor == source.privilege.grantee
            and privilege.privilege == source.privilege.privilege
            and source.column in (None, right.column)
            and key in present
        ):
            del present[key]
            if privilege.grantable:
                _forget_granted_from(right, present)


def _in_order_of_grantors(missing: Sequence[_Right], present: Iterable[_Right], owner: str) -> list[_Right]:
    able = {_source(right) for right in present if right.privilege.grantable}
    waiting, ordered = list(missing), []
    while waiting:
        ready = [
            right
            for right in waiting
            if right.privilege.grantor == owner
            or {(right.privilege.grantor, right.privilege.privilege, column) for column in (None, right.column)} & able
        ]
        if not ready:
            # A grantor without a grant option. Let the server say what is wrong.
            ready = list(waiting)
        for right in ready:
            waiting.remove(right)
            ordered.append(right)
            if right.privilege.grantable:
                able.add(_source(right))
    return ordered


def _source(right: _Right) -> tuple[str | None, str, str | None]:
    return right.privilege.grantee, right.privilege.privilege, right.column


def _what(rights: Sequence[_Right]) -> sql.Composable:
    column = rights[0].column
    of_column = sql.SQL("") if column is None else sql.SQL(" ({})").format(sql.Identifier(column))
    return sql.SQL(", ").join(raw(right.privilege.privilege) + of_column for right in rights)


def _by(owner: str, grantor: str, statement: sql.Composable) -> tuple[str, ...]:
    if grantor == owner:
        return (text(statement),)
    return (
        text(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(grantor))),
        text(statement),
        "RESET ROLE",
    )


def _revoked(relation: Relation, owner: str, rights: Sequence[_Right], *, option_only: bool) -> PlanStep:
    first = rights[0].privilege
    statement = sql.SQL("REVOKE {}{} ON {} FROM {}{}").format(
        sql.SQL("GRANT OPTION FOR " if option_only else ""),
        _what(rights),
        relation.identifier,
        role(first.grantee),
        sql.SQL(" CASCADE" if first.grantable else ""),
    )
    return PlanStep(
        StepKind.REVOKE,
        _described(rights),
        "nothing declares the right to grant it on" if option_only else "nothing declares it",
        cut=_by(owner, first.grantor, statement),
    )


def _granted(relation: Relation, owner: str, rights: Sequence[_Right]) -> PlanStep:
    first = rights[0].privilege
    statement = sql.SQL("GRANT {} ON {} TO {}{}").format(
        _what(rights),
        relation.identifier,
        role(first.grantee),
        sql.SQL(" WITH GRANT OPTION" if first.grantable else ""),
    )
    return PlanStep(
        StepKind.GRANT,
        _described(rights),
        "it is declared and was not granted",
        cut=_by(owner, first.grantor, statement),
    )


def _described(rights: Sequence[_Right]) -> str:
    first, column = rights[0].privilege, rights[0].column
    return (
        ", ".join(right.privilege.privilege for right in rights)
        + ("" if column is None else f" on column {quote(column)}")
        + f" to {'everybody' if first.grantee is None else quote(first.grantee)}"
        + (" with grant option" if first.grantable else "")
    )


def role(name: str | None) -> sql.Composable:
    """Return a role for a statement; None is everybody."""
    return sql.SQL("PUBLIC") if name is None else sql.Identifier(name)
