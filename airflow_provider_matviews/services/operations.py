"""The operations as one calls them: arguments checked, put together as one recorded run each.

What the hook runs on a blocking connection, and triggers in an event loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from airflow_provider_matviews.definition import (
    IfLocked,
    MatViewDefinition,
    ParameterValue,
    RefreshStrategy,
    RowCountStrategy,
    check_flag,
    check_session_settings,
    choice,
)
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.create import create_view
from airflow_provider_matviews.services.delete import delete_view
from airflow_provider_matviews.services.instructions import Work
from airflow_provider_matviews.services.ledger import Ledger, Operation
from airflow_provider_matviews.services.locking import politely
from airflow_provider_matviews.services.refresh import refresh_view
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.services.run import Prepared, Subject, Terms, record_run
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
        check_flag(force, "force")
        check_flag(with_data, "with_data")

        def service(prepared: Prepared) -> Work[ServiceResponse]:
            return create_view(
                prepared.view,
                definition,
                prepared.server,
                prepared.report,
                politely=lambda attempt: politely(prepared.view, prepared.patience, attempt),
                force=force,
                with_data=with_data,
                row_counts=counting,
            )

        request = {"force": force, "with_data": with_data, "row_count_strategy": counting.value}
        return self._recorded(Operation.CREATE, definition, service, request, **manners)

    def refresh(
        self,
        view_or_definition: str | MatViewDefinition,
        *,
        refresh_strategy: RefreshStrategy | str | None = None,
        row_count_strategy: RowCountStrategy | str = RowCountStrategy.ESTIMATED,
        max_bloat: float = 1.5,
        analyze: bool | None = None,
        vacuum: bool = False,
        **manners: Any,
    ) -> Work[ServiceResponse]:
        """Return the work of :meth:`MatViewHook.refresh`."""
        asked = None if refresh_strategy is None else choice(RefreshStrategy, refresh_strategy, "refresh_strategy")
        counting = choice(RowCountStrategy, row_count_strategy, "row_count_strategy")
        if isinstance(max_bloat, bool) or not isinstance(max_bloat, (int, float)) or not 1 < max_bloat < math.inf:
            raise InvalidDefinition(f"max_bloat={max_bloat!r} is not a number above 1 (1e9 for never).")
        check_flag(vacuum, "vacuum")
        if analyze is not None:
            check_flag(analyze, "analyze")

        def service(prepared: Prepared) -> Work[ServiceResponse]:
            return refresh_view(
                prepared.view,
                prepared.server,
                prepared.report,
                strategy=asked or prepared.record.refresh_strategy,
                row_counts=counting,
                unique_index_columns=prepared.record.unique_index_columns,
                patience=prepared.patience,
                history=lambda: self.ledger.past_refreshes(prepared.record.id),
                max_bloat=max_bloat,
                analyze=analyze,
                vacuum=vacuum,
            )

        request = {
            "refresh_strategy": asked and asked.value,
            "row_count_strategy": counting.value,
            "analyze": analyze,
            "vacuum": vacuum,
            "max_bloat": max_bloat,
        }
        return self._recorded(Operation.REFRESH, view_or_definition, service, request, **manners)

    def delete(
        self, view_or_definition: str | MatViewDefinition, *, cascade: bool = False, force: bool = False, **manners: Any
    ) -> Work[ServiceResponse]:
        """Return the work of :meth:`MatViewHook.delete`."""
        check_flag(cascade, "cascade")
        check_flag(force, "force")

        def service(prepared: Prepared) -> Work[ServiceResponse]:
            return delete_view(
                prepared.view,
                prepared.server,
                prepared.report,
                managed=prepared.record.managed,
                cascade=cascade,
                force=force,
            )

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
    ) -> Work[ServiceResponse]:
        locked = choice(IfLocked, if_locked, "if_locked")
        settings = check_session_settings(session_settings or {})
        timeouts = timeouts or Timeouts()
        if isinstance(view_or_definition, MatViewDefinition):
            subject = Subject(view_or_definition.view, view_or_definition)
        else:
            subject = Subject(ViewName.parse(view_or_definition))
        asked = {**request, "if_locked": locked.value, **timeouts.said()}
        if operation is not Operation.DROP:
            asked["session_settings"] = settings
        terms = Terms(locked, timeouts, asked, self.context, settings, self.longest, deferral, self.given)
        return record_run(operation, subject, self.ledger, terms, service)
