"""The operations as one calls them: arguments checked, put together as one recorded run each.

What the hook runs on a blocking connection, and triggers in an event loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from airflow_provider_matviews.definition import (
    IfLocked,
    MatViewDefinition,
    OnDrift,
    ParameterValue,
    RefreshStrategy,
    RowCountStrategy,
    check_flag,
    check_session_settings,
    choice,
)
from airflow_provider_matviews.exceptions import InvalidDefinition, ViewNotFound
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.create import Creating, create_view, plan_view
from airflow_provider_matviews.services.delete import delete_view
from airflow_provider_matviews.services.instructions import Note, Work
from airflow_provider_matviews.services.ledger import Ledger, Operation
from airflow_provider_matviews.services.plan_steps import Plan
from airflow_provider_matviews.services.refresh import refresh_view
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.services.run import Prepared, Subject, Terms, record_run, rehearse_run
from airflow_provider_matviews.services.sparing import Sparing, spare, tell_sources
from airflow_provider_matviews.timeouts import Timeouts

Service = Callable[[Prepared], Work[ServiceResponse]]


@dataclass(frozen=True)
class Operations:
    """Makes the works of recorded operations. Their arguments are those of :class:`MatViewHook`'s methods.

    :param ledger: where they are recorded.
    :param context: whose task it is, for the record.
    :param longest: seconds that an operation may take in all, whatever the timeouts say.
    :param given: seconds of which ``longest`` is what is left, for the story; None for all.
    """

    ledger: Ledger
    context: Mapping[str, Any] = field(default_factory=dict)
    longest: float | None = None
    given: float | None = None

    def create(
        self,
        definition: MatViewDefinition,
        *,
        force: bool = False,
        with_data: bool = True,
        on_drift: OnDrift | str = OnDrift.APPLY,
        exclusive: bool | None = None,
        row_count_strategy: RowCountStrategy | str = RowCountStrategy.ESTIMATED,
        **manners: Any,
    ) -> Work[ServiceResponse]:
        """Return the work of :meth:`MatViewHook.create`."""
        if not isinstance(definition, MatViewDefinition):
            raise InvalidDefinition(
                f"create() takes a MatViewDefinition, not {definition!r}.",
                hint="MatViewDefinition(name=..., sql=...) or MatViewDefinition.from_file(...)",
            )
        counting = choice(RowCountStrategy, row_count_strategy, "row_count_strategy")
        dry_run = manners.get("dry_run", False)
        drift = choice(OnDrift, on_drift, "on_drift")
        check_flag(force, "force")
        check_flag(with_data, "with_data")
        if force and drift is not OnDrift.APPLY:
            raise InvalidDefinition(
                f"force=True builds a view anew, and on_drift={drift.value!r} says not to: give one of them."
            )
        wanted = _exclusive(definition, exclusive)

        def service(prepared: Prepared) -> Work[ServiceResponse]:
            response = yield from create_view(
                Creating(
                    prepared.view,
                    prepared.origin,
                    wanted,
                    prepared.server,
                    prepared.report,
                    prepared.patience,
                    force=force,
                    with_data=with_data,
                    row_counts=_at_no_cost(counting) if dry_run else counting,
                    on_drift=drift,
                )
            )
            if response.status != "skipped" and not dry_run:
                yield from tell_sources(prepared.view, prepared.report)
            return response

        request = {
            "force": force,
            "with_data": with_data,
            "on_drift": drift.value,
            "exclusive": wanted.exclusive,
            "row_count_strategy": counting.value,
        }
        return self._recorded(Operation.CREATE, definition, service, request, **manners)

    def plan(
        self, definition: MatViewDefinition, *, exclusive: bool | None = None, timeouts: Timeouts | None = None
    ) -> Work[Plan]:
        """Return the work of :meth:`MatViewHook.plan`."""
        if not isinstance(definition, MatViewDefinition):
            raise InvalidDefinition(f"plan() takes a MatViewDefinition, not {definition!r}.")
        wanted = _exclusive(definition, exclusive)
        plan: list[Plan] = []

        def service(prepared: Prepared) -> Work[ServiceResponse]:
            job = Creating(prepared.view, prepared.origin, wanted, prepared.server, prepared.report, prepared.patience)
            plan.append((yield from plan_view(job)))
            return prepared.report.end("skipped")

        def work() -> Work[Plan]:
            settings = Terms(
                timeouts=timeouts or Timeouts(),
                session_settings=dict(definition.session_settings),
                longest=self.longest,
            )
            subject = Subject(definition.view, definition)
            yield from rehearse_run(Operation.CREATE, subject, self.ledger, settings, service, quiet=True)
            return plan[0]

        return work()

    def refresh(
        self,
        view_or_definition: str | MatViewDefinition,
        *,
        refresh_strategy: RefreshStrategy | str | None = None,
        row_count_strategy: RowCountStrategy | str = RowCountStrategy.ESTIMATED,
        max_bloat: float = 1.5,
        analyze: bool | None = None,
        vacuum: bool = False,
        skip_unchanged: bool = False,
        max_staleness: float | None = None,
        ignore_windows: bool = False,
        **manners: Any,
    ) -> Work[ServiceResponse]:
        """Return the work of :meth:`MatViewHook.refresh`."""
        asked = None if refresh_strategy is None else choice(RefreshStrategy, refresh_strategy, "refresh_strategy")
        counting = choice(RowCountStrategy, row_count_strategy, "row_count_strategy")
        dry_run = manners.get("dry_run", False)
        if isinstance(max_bloat, bool) or not isinstance(max_bloat, (int, float)) or not 1 < max_bloat < math.inf:
            raise InvalidDefinition(f"max_bloat={max_bloat!r} is not a number above 1 (1e9 for never).")
        check_flag(vacuum, "vacuum")
        if analyze is not None:
            check_flag(analyze, "analyze")
        sparing = Sparing(skip_unchanged, max_staleness, ignore_windows)

        def service(prepared: Prepared) -> Work[ServiceResponse]:
            spared = yield from spare(
                prepared.view,
                prepared.record,
                self.ledger,
                prepared.report,
                sparing,
                prepared.server.pid,
                {**prepared.record.session_settings, **(manners.get("session_settings") or {})},
                self.context,
            )
            if spared:
                return prepared.report.end("skipped")
            refreshing = refresh_view(
                prepared.view,
                prepared.server,
                prepared.report,
                strategy=asked or prepared.record.refresh_strategy,
                row_counts=_at_no_cost(counting) if dry_run else counting,
                unique_index_columns=prepared.record.unique_index_columns,
                patience=prepared.patience,
                # A dry run may be of a view that nothing is recorded of.
                history=(lambda: self.ledger.past_refreshes(prepared.record.id)) if prepared.record.id else None,
                max_bloat=max_bloat,
                analyze=analyze,
                vacuum=vacuum,
            )
            try:
                return (yield from refreshing)
            except ViewNotFound as error:
                former = yield from _not_yet_renamed(prepared.view, view_or_definition)
                if former is None:
                    raise
                raise ViewNotFound(
                    f"{error.message} {former.display} does, which it is declared as renamed from.",
                    hint="create it first (CreateMatViewOperator or hook.create()), which renames that one.",
                ) from error

        request = {
            "refresh_strategy": asked and asked.value,
            "row_count_strategy": counting.value,
            "analyze": analyze,
            "vacuum": vacuum,
            "max_bloat": max_bloat,
            "skip_unchanged": skip_unchanged,
            "max_staleness": max_staleness,
            "ignore_windows": ignore_windows,
        }
        return self._recorded(Operation.REFRESH, view_or_definition, service, request, **manners)

    def delete(
        self, view_or_definition: str | MatViewDefinition, *, cascade: bool = False, force: bool = False, **manners: Any
    ) -> Work[ServiceResponse]:
        """Return the work of :meth:`MatViewHook.delete`."""
        check_flag(cascade, "cascade")
        check_flag(force, "force")

        def service(prepared: Prepared) -> Work[ServiceResponse]:
            response = yield from delete_view(
                prepared.view,
                prepared.server,
                prepared.report,
                managed=prepared.record.managed,
                cascade=cascade,
                force=force,
            )
            if response.status == "skipped":
                former = yield from _not_yet_renamed(prepared.view, view_or_definition)
                if former is not None:
                    yield Note(
                        f"{former.display}, which it is declared as renamed from, stands and is left alone: drop it by "
                        "that name.",
                        warning=True,
                    )
            return response

        return self._recorded(
            Operation.DROP, view_or_definition, service, {"cascade": cascade, "force": force}, **manners
        )

    def _recorded(
        self,
        operation: Operation,
        view_or_definition: str | MatViewDefinition,
        service: Service,
        request: Mapping[str, Any],
        *,
        session_settings: Mapping[str, ParameterValue] | None = None,
        if_locked: IfLocked | str = IfLocked.WAIT,
        timeouts: Timeouts | None = None,
        deferral: str | None = None,
        dry_run: bool = False,
    ) -> Work[ServiceResponse]:
        locked = choice(IfLocked, if_locked, "if_locked")
        settings = check_session_settings(session_settings or {})
        timeouts = timeouts or Timeouts()
        check_flag(dry_run, "dry_run")
        if isinstance(view_or_definition, MatViewDefinition):
            subject = Subject(view_or_definition.view, view_or_definition)
        else:
            subject = Subject(ViewName.parse(view_or_definition))
        asked = {**request, "if_locked": locked.value, **timeouts.said()}
        if operation is not Operation.DROP:
            asked["session_settings"] = settings
        terms = Terms(locked, timeouts, asked, self.context, settings, self.longest, deferral, self.given)
        if dry_run:
            return rehearse_run(operation, subject, self.ledger, terms, service)
        return record_run(operation, subject, self.ledger, terms, service)


def _at_no_cost(counting: RowCountStrategy) -> RowCountStrategy:
    # To count exactly is to read every row.
    return RowCountStrategy.NONE if counting is RowCountStrategy.EXACT else counting


def _not_yet_renamed(view: ResolvedName, subject: str | MatViewDefinition) -> Work[ResolvedName | None]:
    """Return the name that a view which does not stand still has, where its definition says which one."""
    if isinstance(subject, str) or subject.renamed_from is None:
        return None
    former = catalog.former_name(subject.renamed_from, view)
    (kind,) = yield from catalog.kinds_of(former)
    return former if kind == catalog.MATERIALIZED_VIEW else None


def _exclusive(definition: MatViewDefinition, exclusive: bool | None) -> MatViewDefinition:
    if exclusive is None:
        return definition
    check_flag(exclusive, "exclusive")
    return replace(definition, exclusive=exclusive)
