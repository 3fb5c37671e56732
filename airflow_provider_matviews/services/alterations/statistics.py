"""What makes, changes and drops extended statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from psycopg import sql

from airflow_provider_matviews.names import quote
from airflow_provider_matviews.services.alterations.base import Relation, comment_on, short, text
from airflow_provider_matviews.services.instructions import raw
from airflow_provider_matviews.services.picture import Picture, StatisticsPicture
from airflow_provider_matviews.services.plan_steps import Lock, PlanStep, StepKind


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
        statements.append(comment_on(sql.SQL("STATISTICS {}").format(made), after.comment))
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
        elif former.anatomy and each.anatomy and former.anatomy.made_of != each.anatomy.made_of:
            yield PlanStep(
                StepKind.CHANGE_STATISTICS,
                subject,
                f"they are declared as {short(statistics_body(each))}, they are {short(statistics_body(former))}",
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


def statistics_body(statistics: StatisticsPicture) -> str:
    """Return the definition of statistics without names."""
    anatomy = statistics.anatomy
    assert anatomy is not None
    return anatomy.worded() if anatomy.body is None else anatomy.body
