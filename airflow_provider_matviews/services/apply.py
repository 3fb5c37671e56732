"""Carries out a plan on a view that stands: in place where that is enough, else built anew beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg
from psycopg import sql

from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.dependents import set_deadline
from airflow_provider_matviews.services.instructions import Command, Work, raw
from airflow_provider_matviews.services.locking import Patience, politely
from airflow_provider_matviews.services.plan import Draft
from airflow_provider_matviews.services.plan_steps import Lock, PlanStep, StepKind
from airflow_provider_matviews.services.replacement import (
    COLLISIONS,
    Changed,
    Replacement,
    locking,
    replace_view,
    require_unchanged,
    time_to_lock,
)
from airflow_provider_matviews.services.response import Report
from airflow_provider_matviews.services.row_counts import Outcome


def apply_plan(
    draft: Draft,
    origin: ResolvedName,
    facts: ViewFacts,
    server: ServerFacts,
    patience: Patience,
    report: Report,
    *,
    count: bool,
) -> Work[Outcome | None]:
    """Make a view that stands what a plan says, in the caller's transaction.

    :param origin: the name that it has.
    :param count: whether the rows of a view that is built anew are counted by reading them where the server does
        not count.
    :returns: what a view that was built anew is; None where it was changed in place.
    :raises MatViewError: why the plan cannot be applied.
    :raises Changed: when the view is no longer what the plan was made for.
    :raises psycopg.errors.LockNotAvailable: when a lock is not had within ``max_wait``.
    """
    if draft.errors:
        raise draft.errors[0]
    assert draft.standing is not None
    if draft.rebuilds:
        return (
            yield from replace_view(
                Replacement(
                    view=draft.view,
                    beside=draft.beside,
                    facts=facts,
                    standing=draft.standing,
                    picture=draft.target.picture,
                    query=draft.declared.query,
                    server=server,
                    patience=patience,
                    report=report,
                    fill=draft.fills,
                    count=count,
                    rehearse=draft.columns_change,
                    way_out="apply it when nobody builds on the view; what cannot be pointed at a new one has to be "
                    "dropped first, and made again after.",
                )
            )
        )
    yield from _in_place(draft, origin, facts, patience, report)
    return None


def _in_place(draft: Draft, origin: ResolvedName, facts: ViewFacts, patience: Patience, report: Report) -> Work[None]:
    assert draft.standing is not None
    # The server's default must not stand in for what is not declared.
    yield Command(sql.SQL("SET LOCAL default_tablespace = ''"))
    if any(step.build for step in draft.plan.steps) and not report.dry_run:
        yield from _rehearse(draft, origin, facts, patience, report)
    for step, statement in _statements(draft, cut=False):
        # SHARE lets readers go on; who holds it up is a refresh or an autovacuum.
        yield from politely(origin, patience, lambda step=step, statement=statement: _run(report, step, statement))  # type: ignore[misc]
    mark = report.so_far()
    try:
        yield from politely(origin, patience, lambda: _cut(draft, origin, facts, report, mark), collisions=COLLISIONS)
    except psycopg.errors.InternalError_ as error:
        # "tuple concurrently updated": somebody granted or altered it just now.
        raise Changed([str(error.diag.message_primary)]) from error
    except (psycopg.errors.UndefinedObject, psycopg.errors.UndefinedTable):
        # Perhaps what the plan was made for; else what the definition names.
        yield from require_unchanged(facts.oid, draft.standing)
        raise


def _rehearse(draft: Draft, origin: ResolvedName, facts: ViewFacts, patience: Patience, report: Report) -> Work[None]:
    """Try what needs no index that is still to be built, and undo it: what speaks against it shows before they are."""
    mark = report.so_far()
    yield Command(sql.SQL("SAVEPOINT rehearsal"))
    yield from politely(
        origin,
        patience,
        lambda: _cut(draft, origin, facts, report, mark, rehearsal=True),
        collisions=COLLISIONS,
    )
    # Lets go of the locks that it took.
    yield Command(sql.SQL("ROLLBACK TO SAVEPOINT rehearsal"))
    yield Command(sql.SQL("RELEASE SAVEPOINT rehearsal"))
    report.forget_since(mark)


def _cut(
    draft: Draft, origin: ResolvedName, facts: ViewFacts, report: Report, mark: int, *, rehearsal: bool = False
) -> Work[None]:
    assert draft.standing is not None
    report.forget_since(mark)
    statements = [
        (step, statement) for step, statement in _statements(draft, cut=True) if not (rehearsal and step.build)
    ]
    if not statements:
        return
    if not report.dry_run:
        yield from set_deadline(time.monotonic() + (yield from time_to_lock()))
    if any(step.lock is Lock.ACCESS_EXCLUSIVE for step, _ in statements):
        # First of all, so that none is waited for with others in hand.
        yield from report.run("lock", locking(origin, draft.standing.owner), lock=Lock.ACCESS_EXCLUSIVE)
    for step, statement in statements:
        yield from _run(report, step, statement)
    if not report.dry_run and not rehearsal:
        yield from require_unchanged(facts.oid, draft.standing)


def _statements(draft: Draft, *, cut: bool) -> Iterator[tuple[PlanStep, str]]:
    for step in draft.plan.steps:
        for statement in step.cut if cut else step.build:
            yield step, statement


def _run(report: Report, step: PlanStep, statement: str) -> Work[None]:
    # As the steps that build an index are called everywhere: their progress is told by that.
    builds = statement in step.build and step.kind in (
        StepKind.BUILD_INDEX,
        StepKind.CHANGE_INDEX,
        StepKind.REPAIR_INDEX,
    )
    name = step.subject if builds else f"{step.kind} {step.subject}"
    yield from report.run(name, Command(raw(statement)), lock=Lock.SHARE if builds else step.lock)
