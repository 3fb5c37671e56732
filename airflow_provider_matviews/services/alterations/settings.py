"""Comments, options, settings of columns, labels, replica identity and ties to extensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from psycopg import sql

from airflow_provider_matviews.names import quote
from airflow_provider_matviews.services.alterations.base import Relation, comment_on, set_and_reset, text, what_differs
from airflow_provider_matviews.services.instructions import raw
from airflow_provider_matviews.services.picture import ColumnPicture, Label, Picture
from airflow_provider_matviews.services.plan_steps import Lock, PlanStep, StepKind
from airflow_provider_matviews.services.target import options_of

_STORAGE = {"p": "PLAIN", "e": "EXTERNAL", "m": "MAIN", "x": "EXTENDED"}
_COMPRESSION = {"p": "pglz", "l": "lz4"}
_REPLICA_IDENTITY = {"d": "DEFAULT", "n": "NOTHING", "f": "FULL"}


def bare(picture: Picture) -> Picture:
    """Return what such a view is right after CREATE MATERIALIZED VIEW, whose clauses say some of it."""
    return replace(
        picture,
        comment=None,
        replica_identity="d",
        labels=(),
        columns=tuple(
            ColumnPicture(column.name, column.type, column.usual_storage, None, None, None, (), None, (), ())
            for column in picture.columns
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
            what_differs(after.comment, before.comment),
            cut=(comment_on(sql.SQL("MATERIALIZED VIEW {}").format(relation.identifier), after.comment),),
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
    statements = set_and_reset(relation.alter(), has, wanted, prefix)
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


def _column(relation: Relation, before: ColumnPicture, after: ColumnPicture) -> Iterator[PlanStep]:
    name = sql.Identifier(after.name)
    alter = relation.alter() + sql.SQL("ALTER COLUMN {} ").format(name)
    target = sql.SQL("COLUMN {}.{}").format(relation.identifier, name)
    said: list[str] = []
    statements: list[str] = []
    lock = Lock.SHARE_UPDATE_EXCLUSIVE
    if before.storage != after.storage:
        # Not DEFAULT, which PostgreSQL 15 does not know.
        word = _STORAGE[after.storage or after.usual_storage]
        said.append(f"storage {word}")
        statements.append(text(alter + sql.SQL("SET STORAGE ") + raw(word)))
        lock = Lock.ACCESS_EXCLUSIVE
    if before.compression != after.compression:
        word = _COMPRESSION[after.compression] if after.compression else "default"
        said.append(f"compression {word}")
        statements.append(text(alter + sql.SQL("SET COMPRESSION ") + raw(word)))
        lock = Lock.ACCESS_EXCLUSIVE
    if before.statistics != after.statistics:
        said.append(f"statistics target {'default' if after.statistics is None else after.statistics}")
        value = -1 if after.statistics is None else after.statistics
        statements.append(text(alter + sql.SQL("SET STATISTICS {}").format(sql.Literal(value))))
    if options := set_and_reset(alter, options_of(before.options), options_of(after.options)):
        said.append(f"options {', '.join(after.options) or 'none'}")
        statements += options
    if before.comment != after.comment:
        said.append("another comment")
        statements.append(comment_on(target, after.comment))
    if statements:
        yield PlanStep(
            StepKind.COLUMN_SETTINGS,
            f"column {quote(after.name)}",
            f"it should have {', '.join(said)}",
            cut=tuple(statements),
            lock=lock,
        )
    yield from _labels(f"column {quote(after.name)}", target, before.labels, after.labels)


def _labels(what: str, target: sql.Composable, before: Sequence[Label], after: Sequence[Label]) -> Iterator[PlanStep]:
    has = {each.provider: each.label for each in before}
    wanted = {each.provider: each.label for each in after}
    for provider in sorted({*has, *wanted}):
        if has.get(provider) != wanted.get(provider):
            yield PlanStep(
                StepKind.SECURITY_LABEL,
                f"{what}, provider {quote(provider)}",
                what_differs(wanted.get(provider), has.get(provider)),
                cut=(
                    text(
                        sql.SQL("SECURITY LABEL FOR {} ON {} IS {}").format(
                            sql.Identifier(provider), target, sql.Literal(wanted.get(provider))
                        )
                    ),
                ),
                lock=Lock.SHARE_UPDATE_EXCLUSIVE,
            )
