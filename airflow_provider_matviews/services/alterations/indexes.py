"""What builds, changes, repairs and drops indexes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping

from psycopg import sql

from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, quote, shorten
from airflow_provider_matviews.services.alterations.base import Relation, comment_on, set_and_reset, short, text
from airflow_provider_matviews.services.instructions import raw
from airflow_provider_matviews.services.picture import IndexPicture, Picture
from airflow_provider_matviews.services.plan_steps import Lock, PlanStep, StepKind
from airflow_provider_matviews.services.target import options_of


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
        statements.append(comment_on(sql.SQL("INDEX {}").format(qualified), after.comment))
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
            if former.clustered and not any(each.clustered for each in after.indexes):
                yield PlanStep(
                    StepKind.ALTER_INDEX,
                    f"index {quote(index.name)}",
                    "nothing declares its CLUSTER mark",
                    cut=(text(relation.alter() + sql.SQL("SET WITHOUT CLUSTER")),),
                    lock=Lock.ACCESS_EXCLUSIVE,
                )
    for former in stands.values():
        under = doomed.get(former.name)
        yield PlanStep(
            StepKind.DROP_INDEX,
            f"index {quote(former.name)}",
            f"it reads the column {', '.join(map(quote, under))}, which goes" if under else "nothing declares it",
            cut=(text(sql.SQL("DROP INDEX {}").format(relation.beside(former.name))),),
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
        return f"it is declared as {short(body_of(index))}, it is {short(body_of(former))}"
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
    if former.clustered and not index.clustered:
        why += "; its CLUSTER mark goes with it"
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
    statements = set_and_reset(alter, options_of(former.anatomy.options), options_of(index.anatomy.options))
    if dressing := statements + dress_index(relation, index.name, former, index):
        identity = index.replica_identity and not former.replica_identity
        yield PlanStep(
            StepKind.ALTER_INDEX,
            f"index {quote(index.name)}",
            "what it has beside its definition is not what is declared",
            cut=dressing,
            lock=Lock.ACCESS_EXCLUSIVE if identity else Lock.SHARE_UPDATE_EXCLUSIVE,
        )
