"""The operators: what a DAG author says, handed to the hook. Thin, and all of one shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.operators.base import DeferrableViewOperator, ViewOperator
from airflow_provider_matviews.operators.fleet import RefreshMatViewsOperator
from airflow_provider_matviews.operators.retention import PruneMatViewRunsOperator
from airflow_provider_matviews.operators.verify import VerifyMatViewOperator
from airflow_provider_matviews.services.response import ServiceResponse


class CreateMatViewOperator(DeferrableViewOperator):
    """Create a materialized view as its definition says, or make one that stands what it says.

    What a view that stands has and its definition does not mention is left alone. A changed query is applied by
    building a new view beside the one that stands, and one short cut: readers and what is built on it go on.

    :param definition: what the view should be, a :class:`MatViewDefinition` or its ``to_dict()``.
    :param view: the view's name, with ``sql`` instead of a definition. (templated)
    :param sql: the query, or the path of a ``.sql`` file, with a header or without. (templated)
    :param unique_index_columns: with ``sql``: columns that together are unique.
    :param refresh_strategy: with ``sql``; None for ``auto``: ``swap``, ``concurrent`` or ``regular``.
    :param force: build a view that stands anew, even where nothing differs.
    :param with_data: False makes it without rows.
    :param on_drift: where a view stands that is not what its definition says: ``apply`` makes it so, ``fail`` raises,
        ``report`` says what differs and leaves it, ``ignore`` does not look. (templated)
    :param exclusive: whether it should have nothing that is not declared; None for what the definition says.
    :param row_count_strategy: ``none``, ``estimated`` or ``exact``.
    :param session_settings: PostgreSQL settings for this operation, before those of the definition.
    :param conn_id: the PostgreSQL connection. (templated)
    :param tracking_schema: the schema of the run tables. (templated)
    :param if_locked: while another operation on the view runs: ``wait``, ``skip`` or ``fail``.
    :param lock_timeout: seconds for which readers may queue behind one attempt to lock; None for what the definition
        says, which is 1 where it says nothing.
    :param max_wait: seconds after which waiting for locks ends in failure; None likewise, and 600.
    :param statement_timeout: seconds that one statement may take; None likewise, and the server's setting.
    :param timeout: seconds after which the whole operation is stopped on the server; None likewise, and never. Where
        ``execution_timeout`` is given it never takes longer than a little less than that.
    :param dry_run: only log the statements and locks that it would take: nothing is changed, and no run is recorded.
    :param deferrable: whether the triggerer carries it out, without a worker's slot; by
        default ``[operators] default_deferrable``.
    :param cancel_on_kill: deferred only: whether it ends with its task when somebody marks that failed or clears it.
    :param emit_assets: whether Airflow is told of the view as an asset, ``postgres://host:port/database/schema/view``,
        by way of the alias ``matviews/<conn_id>``: DAGs may be scheduled on either.
    """

    template_fields: Sequence[str] = (*ViewOperator.template_fields, "sql", "on_drift")
    template_ext: Sequence[str] = (".sql",)
    template_fields_renderers: ClassVar[dict[str, str]] = {
        **ViewOperator.template_fields_renderers,
        "sql": "sql",
    }

    def __init__(
        self,
        *,
        sql: str | None = None,
        unique_index_columns: Sequence[str] = (),
        refresh_strategy: str | None = None,
        force: bool = False,
        with_data: bool = True,
        on_drift: str = "apply",
        exclusive: bool | None = None,
        row_count_strategy: str = "estimated",
        session_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sql = sql
        self.unique_index_columns = unique_index_columns
        self.refresh_strategy = refresh_strategy
        self.force = force
        self.with_data = with_data
        self.on_drift = on_drift
        self.exclusive = exclusive
        self.row_count_strategy = row_count_strategy
        self.session_settings = session_settings

    def _perform(self, hook: MatViewHook) -> ServiceResponse:
        return hook.create(self._whole_definition(), **self._arguments())

    def _deferred(self) -> tuple[Literal["create", "refresh"], str | MatViewDefinition, dict[str, Any]]:
        return "create", self._whole_definition(), self._arguments()

    def _arguments(self) -> dict[str, Any]:
        return {
            "force": self.force,
            "with_data": self.with_data,
            "on_drift": self.on_drift,
            "exclusive": self.exclusive,
            "row_count_strategy": self.row_count_strategy,
            "session_settings": self.session_settings,
            **self._terms(),
        }

    def _whole_definition(self) -> MatViewDefinition:
        declared = self._declared()
        if declared is not None:
            if self.sql is not None:
                raise InvalidDefinition("Give either sql=... or definition=..., not both.")
            return declared
        if self.sql is None:
            raise InvalidDefinition("What should the view be? Give definition=..., or view=... with sql=....")
        definition = MatViewDefinition.from_sql(
            self.sql,
            name=self.view,
            refresh_strategy=self.refresh_strategy,
            unique_index_columns=self.unique_index_columns or None,
        )
        for said, header in (
            (self.view and ViewName.parse(self.view), definition.view),
            (self.refresh_strategy, definition.refresh_strategy),
            (tuple(self.unique_index_columns), tuple(definition.unique_index_columns)),
        ):
            if said and said != header:
                raise InvalidDefinition(f"The operator says {said!s}, and the header of the SQL says {header!s}.")
        return definition


class RefreshMatViewOperator(DeferrableViewOperator):
    """Refresh a materialized view, declared or not.

    :param view: the view's name. (templated)
    :param definition: its definition instead of its name.
    :param refresh_strategy: ``auto``, ``swap``, ``concurrent`` or ``regular``; None for what was declared. (templated)
    :param row_count_strategy: ``none``, ``estimated`` or ``exact``.
    :param max_bloat: ``auto`` rebuilds when a row takes so many times the room it took after the last rebuild.
    :param analyze: whether the planner's statistics are renewed; None leaves it to the strategy.
    :param vacuum: VACUUM after COMMIT, which lets index-only scans skip the heap.
    :param skip_unchanged: leave it alone, and skip the task, where nothing that it reads has changed since its last
        refresh by us. Views whose result may move by itself (the clock, foreign tables, functions that cannot be seen
        into) are refreshed all the same.
    :param max_staleness: with ``skip_unchanged``: seconds after which such a view is refreshed; until then it is left
        alone, too.
    :param ignore_windows: refresh it also outside of its windows, and sooner than its minimum interval.
    :param session_settings: PostgreSQL settings for this operation, before those of the definition.
    :param conn_id: the PostgreSQL connection. (templated)
    :param tracking_schema: the schema of the run tables. (templated)
    :param if_locked: while another operation on the view runs: ``wait``, ``skip`` (the task is skipped) or ``fail``.
    :param lock_timeout: seconds for which readers may queue behind one attempt to lock; None for what the definition
        says, which is 1 where it says nothing.
    :param max_wait: seconds after which waiting for locks ends in failure; None likewise, and 600.
    :param statement_timeout: seconds that one statement may take; None likewise, and the server's setting.
    :param timeout: seconds after which the whole operation is stopped on the server; None likewise, and never. Where
        ``execution_timeout`` is given it never takes longer than a little less than that.
    :param dry_run: only log the statements and locks that it would take: nothing is changed, and no run is recorded.
    :param deferrable: whether the triggerer carries it out, without a worker's slot; by
        default ``[operators] default_deferrable``.
    :param cancel_on_kill: deferred only: whether it ends with its task when somebody marks that failed or clears it.
    :param emit_assets: whether Airflow is told of the view as an asset, ``postgres://host:port/database/schema/view``,
        by way of the alias ``matviews/<conn_id>``: DAGs may be scheduled on either.
    """

    template_fields: Sequence[str] = (*ViewOperator.template_fields, "refresh_strategy")

    def __init__(
        self,
        *,
        refresh_strategy: str | None = None,
        row_count_strategy: str = "estimated",
        max_bloat: float = 1.5,
        analyze: bool | None = None,
        vacuum: bool = False,
        skip_unchanged: bool = False,
        max_staleness: float | None = None,
        ignore_windows: bool = False,
        session_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.refresh_strategy = refresh_strategy
        self.row_count_strategy = row_count_strategy
        self.max_bloat = max_bloat
        self.analyze = analyze
        self.vacuum = vacuum
        self.skip_unchanged = skip_unchanged
        self.max_staleness = max_staleness
        self.ignore_windows = ignore_windows
        self.session_settings = session_settings

    def _perform(self, hook: MatViewHook) -> ServiceResponse:
        return hook.refresh(self._subject(), **self._arguments())

    def _deferred(self) -> tuple[Literal["create", "refresh"], str | MatViewDefinition, dict[str, Any]]:
        return "refresh", self._subject(), self._arguments()

    def _arguments(self) -> dict[str, Any]:
        return {
            "refresh_strategy": self.refresh_strategy,
            "row_count_strategy": self.row_count_strategy,
            "max_bloat": self.max_bloat,
            "analyze": self.analyze,
            "vacuum": self.vacuum,
            "skip_unchanged": self.skip_unchanged,
            "max_staleness": self.max_staleness,
            "ignore_windows": self.ignore_windows,
            "session_settings": self.session_settings,
            **self._terms(),
        }


class DeleteMatViewOperator(ViewOperator):
    """Drop a materialized view; nothing to do is fine. Its definition row and its history stay.

    :param view: the view's name. (templated)
    :param definition: its definition instead of its name.
    :param cascade: drop what is built on it too; all of it is named in the log first.
    :param force: drop a view that was never declared, or was declared with ``managed=False``.
    :param conn_id: the PostgreSQL connection. (templated)
    :param tracking_schema: the schema of the run tables. (templated)
    :param if_locked: while another operation on the view runs: ``wait``, ``skip`` or ``fail``.
    :param lock_timeout: seconds for which readers may queue behind one attempt to lock; None for what the definition
        says, which is 1 where it says nothing.
    :param max_wait: seconds after which waiting for locks ends in failure; None likewise, and 600.
    :param statement_timeout: seconds that one statement may take; None likewise, and the server's setting.
    :param timeout: seconds after which the whole operation is stopped on the server; None likewise, and never. Where
        ``execution_timeout`` is given it never takes longer than a little less than that.
    :param dry_run: only log the statements and locks that it would take: nothing is changed, and no run is recorded.
    """

    def __init__(self, *, cascade: bool = False, force: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cascade = cascade
        self.force = force

    def _perform(self, hook: MatViewHook) -> ServiceResponse:
        return hook.delete(self._subject(), cascade=self.cascade, force=self.force, **self._terms())


__all__ = [
    "CreateMatViewOperator",
    "DeleteMatViewOperator",
    "PruneMatViewRunsOperator",
    "RefreshMatViewOperator",
    "RefreshMatViewsOperator",
    "VerifyMatViewOperator",
]
