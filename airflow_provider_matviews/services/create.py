"""Create: make a view as its definition says; make one that stands what it says, in one transaction.

Everything is built and checked on an empty view first, so that a misspelt column or a role that does not exist
is found in milliseconds and not after the query has run for an hour; the rows come before the indexes.
"""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition, OnDrift, RowCountStrategy
from airflow_provider_matviews.exceptions import DriftFound, MissingPrivilege
from airflow_provider_matviews.names import quote
from airflow_provider_matviews.services import catalog, row_counts
from airflow_provider_matviews.services.apply import apply_plan
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.instructions import Command, Note, Work
from airflow_provider_matviews.services.locking import DEFAULT_PATIENCE, Patience
from airflow_provider_matviews.services.picture import restore_settings, speak_plainly
from airflow_provider_matviews.services.plan import Draft, draft_plan, not_managed
from airflow_provider_matviews.services.plan_steps import Lock, Plan
from airflow_provider_matviews.services.probe import Place, find_place, lacks_schema
from airflow_provider_matviews.services.rebuild import Beside, build, build_indexes
from airflow_provider_matviews.services.replacement import renaming, while_unchanged
from airflow_provider_matviews.services.response import Report, ServiceResponse


@dataclass(frozen=True)
class Creating:
    """One creation under way.

    :ivar origin: the name that the view has, which is another one where it is to be renamed.
    :ivar force: build a view anew that stands, whatever differs.
    :ivar with_data: False makes it without rows.
    """

    view: ResolvedName
    origin: ResolvedName
    definition: MatViewDefinition
    server: ServerFacts
    report: Report
    patience: Patience = DEFAULT_PATIENCE
    force: bool = False
    with_data: bool = True
    row_counts: RowCountStrategy = RowCountStrategy.ESTIMATED
    on_drift: OnDrift = OnDrift.APPLY


def create_view(job: Creating) -> Work[ServiceResponse]:
    """Create a view, or make one that stands what its definition says. Runs inside the caller's transaction.

    :returns: status ``created``; ``updated`` where a view that stands was changed; ``skipped`` where there was
        nothing to do, or nothing was to be done.
    :raises ViewNotManaged: when the definition says ``managed=False``.
    :raises InvalidDefinition: when the SQL is not one query, or a column that the definition names does not exist.
    :raises NotAMaterializedView: when something else stands under its name.
    :raises MissingPrivilege: when the role may not.
    :raises DriftFound: when the view is not what its definition says, with ``on_drift="fail"``.
    :raises DependentsExist: when what is built on the view cannot follow.
    :raises StrategyRefused: when the view cannot be built anew beside itself.
    :raises psycopg.Error: what PostgreSQL says of the query or an index.
    """
    view, report = job.view, job.report
    if not job.definition.managed:
        raise not_managed(view)
    facts = yield from catalog.find_view(job.origin)
    place = yield from find_place(view)
    if facts is None:
        if place is None or place.temporary:
            raise lacks_schema(view, job.server)
        yield from _create(job, place)
        return report.end("created")
    yield from _count_standing(job, facts)
    if job.on_drift is OnDrift.IGNORE and not job.force:
        return (yield from _leave(job, facts, place))
    if place is None:
        return (yield from _cannot_tell(job))
    return (yield from _make_it_so(job, place))


def plan_view(job: Creating) -> Work[Plan]:
    """Return what :func:`create_view` would do, and do nothing. Undo the transaction afterwards.

    :raises MissingPrivilege: when the role can make nothing in which the definition could be read.
    """
    facts = yield from catalog.find_view(job.origin)
    place = yield from find_place(job.view)
    if place is None or (facts is None and place.temporary):
        raise lacks_schema(job.view, job.server)
    return (yield from _draft(job, facts, place)).plan


def _draft(job: Creating, facts: ViewFacts | None, place: Place) -> Work[Draft]:
    return (
        yield from draft_plan(
            job.view,
            job.definition,
            job.server,
            place,
            facts=facts,
            origin=job.origin,
            force=job.force,
            with_data=job.with_data,
        )
    )


def _create(job: Creating, place: Place) -> Work[None]:
    view, report = job.view, job.report
    draft = yield from _draft(job, None, place)
    if draft.errors:
        raise draft.errors[0]
    picture, beside = draft.target.picture, Beside.nothing(view)
    settings = yield from speak_plainly()
    yield from build(beside, picture, draft.declared.query, job.server, report)
    yield from restore_settings(settings)
    if job.with_data:
        yield from report.run("fill", Command(sql.SQL("REFRESH MATERIALIZED VIEW {}").format(view.identifier)))
    else:
        yield Note("Made without rows, as asked: it answers no query before its first refresh.")
    yield from build_indexes(beside, picture, report)
    if job.with_data and not report.dry_run:
        yield from _count_filled(job)


def _count_filled(job: Creating) -> Work[None]:
    filled = yield from catalog.require_view(job.view)
    # What bloat is measured by later.
    job.report.told(heap_bytes=(yield from catalog.heap_size_of(filled.oid)))
    if job.row_counts is RowCountStrategy.NONE:
        return
    if job.server.track_counts:
        # Made in this transaction: whatever it has inserted is what the view holds.
        job.report.told(row_count_after=filled.inserted)
    elif job.row_counts is RowCountStrategy.EXACT:
        job.report.told(row_count_after=(yield from row_counts.counted(job.view)))
    else:
        job.report.told(row_count_after=filled.estimated_rows)


def _count_standing(job: Creating, facts: ViewFacts) -> Work[None]:
    before = yield from row_counts.before_refresh(job.origin, facts, job.row_counts)
    job.report.told(row_count_before=before)


def _leave(job: Creating, facts: ViewFacts, place: Place | None) -> Work[ServiceResponse]:
    report = job.report
    if moves := renaming(job.origin, job.view):
        if not facts.can_own:
            role, owner = quote(job.server.role), quote(facts.owner)
            raise MissingPrivilege(
                f"The role {role} may not rename {job.origin.display}, which belongs to {owner}.",
                hint=f"run: {catalog.membership(facts.owner, job.server)}",
            )
        if place is None or place.temporary:
            raise lacks_schema(job.view, job.server)
        report.told(drift=None)
        for command in moves:
            yield from report.run("rename", command, lock=Lock.ACCESS_EXCLUSIVE)
        yield Note(f"Renamed from {job.origin.display}; whatever else differs is left alone (on_drift='ignore').")
        return report.end("updated")
    report.told(reason="it stands already", drift=None)
    yield Note(f"{job.view.display} stands already; whether it is what its definition says was not asked.")
    return report.end("skipped")


def _cannot_tell(job: Creating) -> Work[ServiceResponse]:
    view, report = job.view, job.report
    if job.force:
        raise lacks_schema(view, job.server)
    if job.on_drift is OnDrift.FAIL:
        refusal = lacks_schema(view, job.server)
        raise MissingPrivilege(
            f"Whether {view.display} is what its definition says cannot be told: {refusal.message}", hint=refusal.hint
        )
    report.told(reason="it stands already", drift=None)
    yield Note(
        f"{view.display} stands already and is left as it is. Whether it is what its definition says cannot "
        "be told: the role lacks CREATE on its schema.",
        warning=True,
    )
    return report.end("skipped")


def _make_it_so(job: Creating, place: Place) -> Work[ServiceResponse]:
    status = "skipped"

    def attempt() -> Work[None]:
        nonlocal status
        status = yield from _attempt(job, place)

    hint = "run it again when nobody alters the view."
    yield from while_unchanged(job.view, job.report, attempt, hint)
    return job.report.end("updated" if status == "updated" else "skipped")


def _attempt(job: Creating, place: Place) -> Work[str]:
    view, report = job.view, job.report
    facts = yield from catalog.require_view(job.origin)
    draft = yield from _draft(job, facts, place)
    plan = draft.plan
    report.told(drift=not plan.empty, plan=plan.as_dict())
    if plan.empty:
        report.told(reason="it stands already")
        yield Note(f"{view.display} stands already and is what its definition says.")
        return "skipped"
    leave = job.on_drift is not OnDrift.APPLY and not job.force
    for line in plan.lines(statements=False):
        yield Note(line, warning=leave)
    if leave and job.on_drift is OnDrift.FAIL:
        raise DriftFound(
            f"{view.display} is not what its definition says: {plan.summary()}.",
            plan=plan,
            hint="apply it with on_drift='apply', or declare what stands (MatViewDefinition.from_database).",
        )
    if leave:
        report.told(reason=f"it differs: {plan.summary()}")
        yield Note("Left as it is (on_drift='report').", warning=True)
        return "skipped"
    outcome = yield from apply_plan(
        draft,
        job.origin,
        facts,
        job.server,
        job.patience,
        report,
        count=job.row_counts is RowCountStrategy.EXACT,
    )
    if outcome is not None and draft.fills and job.row_counts is not RowCountStrategy.NONE:
        report.told(row_count_after=outcome.estimated if outcome.inserted is None else outcome.inserted)
    return "updated"
