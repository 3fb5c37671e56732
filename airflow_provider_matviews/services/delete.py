"""Delete: drop a view, and say first what would go with it."""

from __future__ import annotations

from psycopg import sql

from airflow_provider_matviews.exceptions import DependentsExist, MissingPrivilege, ViewNotManaged
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.instructions import Command, Note, Session, Work
from airflow_provider_matviews.services.plan_steps import Lock
from airflow_provider_matviews.services.response import Report, ServiceResponse


def delete_view(
    view: ResolvedName,
    server: ServerFacts,
    report: Report,
    *,
    managed: bool,
    cascade: bool = False,
    force: bool = False,
) -> Work[ServiceResponse]:
    """Drop a view. Runs inside the caller's transaction.

    :param managed: whether the definition says that the view is ours.
    :param cascade: drop what is built on it too; everything that goes is named in the log and the response.
    :param force: drop a view that is not managed.
    :returns: status ``deleted``, or ``skipped`` when nothing stands.
    :raises NotAMaterializedView: when something else stands under its name.
    :raises ViewNotManaged: when it is not managed and ``force`` is not given.
    :raises MissingPrivilege: when the role does not own it.
    :raises DependentsExist: when something is built on it and ``cascade`` is not given.
    """
    facts = yield from catalog.find_view(view)
    if facts is None:
        report.told(reason="it does not exist")
        yield Note(f"Nothing to drop: {view.display} does not exist.")
        return report.end("skipped")
    if not managed and not force:
        raise ViewNotManaged(
            f"{view.display} stands, but no definition with managed=True says that it is ours to drop.",
            hint="give force=True if it is to go, or declare it with managed=True.",
        )
    _require_owner(view, facts, server)
    report.told(row_count_before=facts.estimated_rows)
    dependents = yield from catalog.dependents_of(facts.oid)
    if dependents and not cascade:
        raise DependentsExist(
            f"{view.display} cannot be dropped: built on it are {_listed(dependents)}.",
            dependents=dependents,
            hint="drop those first, or give cascade=True to drop them all together.",
        )
    if dependents:
        yield Note(f"With {view.display} go {len(dependents)} more: {_listed(dependents)}.", warning=True)
    report.told(dropped_with_it=dependents)
    on = (view.display, *dependents) if dependents else ()
    yield from report.run("drop", _drop(view, cascade), lock=Lock.ACCESS_EXCLUSIVE, on=on)
    if cascade:
        yield from _require_nothing_unannounced(view, facts, dependents)
    return report.end("deleted")


def _drop(view: ResolvedName, cascade: bool) -> Command:
    return Command(
        sql.SQL("DROP MATERIALIZED VIEW {} {}").format(view.identifier, sql.SQL("CASCADE" if cascade else "RESTRICT"))
    )


def _require_nothing_unannounced(view: ResolvedName, facts: ViewFacts, announced: list[str]) -> Work[None]:
    # DROP now holds its locks, so nothing more can be built on the view; seen from outside this transaction
    # everything that goes still stands. What came between the list and the lock shows as a difference.
    standing = yield from catalog.dependents_of(facts.oid, Session.RECORD)
    if unannounced := sorted(set(standing) - set(announced)):
        raise DependentsExist(
            f"{view.display} was not dropped: while it was being dropped, {_listed(unannounced)} "
            "was built on it, which nobody was told would go.",
            dependents=unannounced,
            hint="run it again; it will be listed then.",
        )


def _require_owner(view: ResolvedName, facts: ViewFacts, server: ServerFacts) -> None:
    catalog.require_schema_usage(view, facts, server)
    if facts.can_own or facts.can_own_schema:
        return
    role, owner = (sql.Identifier(name).as_string(None) for name in (server.role, facts.owner))
    raise MissingPrivilege(
        f"The role {role} may not drop {view.display}, which belongs to {owner}.",
        hint=f"run: {catalog.membership(facts.owner, server)}",
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names)
