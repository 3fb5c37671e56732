"""The operator for many views in one task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowSkipException, Asset, conf

from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.operators.base import Deferral, OperationOperator
from airflow_provider_matviews.services.selection import Selection
from airflow_provider_matviews.timeouts import Timeouts

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context


class RefreshMatViewsOperator(Deferral, OperationOperator):
    """Refresh several materialized views in one task, each after those that it reads, so many at a time.

    One that fails stops what reads it, near and far, and nothing else; the task fails when all others have ended. One
    run row each, and a table of all of them in the log. On a retry, ``skip_unchanged=True`` spares those that ended
    well.

    :param views: names as one would type them, or patterns with ``*``, ``?`` and ``[...]`` over ``schema.name``;
        ``*.*`` is all of the database. (templated)
    :param schemas: exact names of schemas, all views of which are meant. (templated)
    :param exclude: names and patterns of views that are not meant after all. (templated)
    :param feeds: whether everything that reads them is meant too, near and far.
    :param needs: whether everything that they read is meant too, near and far.
    :param stale: whether of all these only those are meant that are older than what they read, and what reads those.
        Those that are not leave no run row, which ``skip_unchanged`` gives them.
    :param at_once: how many at a time, on two connections each. Where it is more than one, PostgreSQL's
        ``max_parallel_workers_per_gather`` is 0 unless ``session_settings`` here or in a definition says otherwise.
    :param skip_unchanged: leave those alone of which nothing that they read has changed since their last refresh.
    :param max_staleness: with ``skip_unchanged`` or ``stale``: seconds after which a view is refreshed whose result may
        move by itself; None: always.
    :param ignore_windows: refresh them also outside of their windows, and sooner than their minimum interval.
    :param refresh_strategy: for all of them; None for what each was declared with. (templated)
    :param row_count_strategy: ``none``, ``estimated`` or ``exact``.
    :param session_settings: PostgreSQL settings for each refresh, before those of its definition.
    :param conn_id: the PostgreSQL connection. (templated)
    :param tracking_schema: the schema of the run tables. (templated)
    :param if_locked: while another operation on a view runs: ``wait``, ``skip`` (that view) or ``fail`` (that view).
    :param lock_timeout: seconds for which readers may queue behind one attempt to lock a view; None for what its
        definition says, which is 1 where it says nothing.
    :param max_wait: seconds after which waiting for locks ends in failure of a view; None likewise, and 600.
    :param statement_timeout: seconds that one statement may take; None likewise, and the server's setting.
    :param timeout: seconds after which the refresh of one view is stopped on the server; None likewise, and never.
        ``execution_timeout`` limits all of them together.
    :param dry_run: only log the order, the statements and the locks: nothing is changed, and no run is recorded.
    :param deferrable: whether the triggerer carries it out, without a worker's slot; by
        default ``[operators] default_deferrable``.
    :param cancel_on_kill: deferred only: whether it ends with its task when somebody marks that failed or clears it.
    :param emit_assets: whether Airflow is told of each view as an asset, ``postgres://host:port/database/schema/view``,
        by way of the alias ``matviews/<conn_id>``: DAGs may be scheduled on either.
    """

    template_fields: Sequence[str] = (
        *OperationOperator.template_fields,
        "views",
        "schemas",
        "exclude",
        "refresh_strategy",
    )

    def __init__(
        self,
        *,
        views: Sequence[str] = (),
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        feeds: bool = False,
        needs: bool = False,
        stale: bool = False,
        at_once: int = 4,
        skip_unchanged: bool = False,
        max_staleness: float | None = None,
        ignore_windows: bool = False,
        refresh_strategy: str | None = None,
        row_count_strategy: str = "estimated",
        session_settings: Mapping[str, Any] | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        cancel_on_kill: bool = True,
        emit_assets: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.views = views
        self.schemas = schemas
        self.exclude = exclude
        self.feeds = feeds
        self.needs = needs
        self.stale = stale
        self.at_once = at_once
        self.skip_unchanged = skip_unchanged
        self.max_staleness = max_staleness
        self.ignore_windows = ignore_windows
        self.refresh_strategy = refresh_strategy
        self.row_count_strategy = row_count_strategy
        self.session_settings = session_settings
        self.deferrable = deferrable
        self.cancel_on_kill = cancel_on_kill
        self.emit_assets = emit_assets
        self._add_alias(emit_assets)

    def execute(self, context: Context) -> dict[str, Any]:
        """Refresh them, here or in the triggerer, and return for XCom what came of each.

        :raises AirflowSkipException: when there was none to be refreshed.
        :raises TaskDeferred: when the triggerer is to do it.
        :raises FleetFailed: when some were not refreshed.
        :raises MatViewError: another one of ``exceptions.py``, when it cannot be done as asked.
        """
        # Refused here and not only in the triggerer.
        Selection(self.views, self.schemas, self.exclude, self.feeds, self.needs, self.stale)
        arguments = self._arguments()
        Timeouts(**{name: arguments[name] for name in Timeouts.names()})
        if self.deferrable and not self.is_dry_run:
            self._defer_to(context, "refresh_many", None, arguments, Timeouts())
        with self._working(context) as hook:
            result = hook.refresh_many(**arguments)
        return self._conclude(context, hook, result.as_dict(hook.redact))

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on where the trigger has ended.

        :raises AirflowSkipException: as of :meth:`execute`.
        :raises MatViewError: as of :meth:`execute`.
        """
        for line in event.get("table", ()):
            self.log.info("%s", line)
        self._raise_from(event)
        return self._conclude(context, self._make_hook(context), event["summary"])

    def _conclude(self, context: Context, hook: MatViewHook, summary: dict[str, Any]) -> dict[str, Any]:
        if self.is_dry_run:
            self.outlets = []
            return summary
        refreshed = [view for view in summary["views"] if view["status"] == "updated"]
        if not refreshed:
            raise AirflowSkipException("None of the views was to be refreshed.")
        self._tell_outlets(context, hook, summary)
        self._tell_of(context, hook, refreshed)
        self._take_in(hook, refreshed)
        return summary

    def _tell_outlets(self, context: Context, hook: MatViewHook, summary: dict[str, Any]) -> None:
        """Give assets among the outlets their extra, and have Airflow tell nobody of a view that was skipped."""
        views = {hook.asset_uri(view["view"]): view for view in summary["views"]}
        self.outlets = [
            outlet
            for outlet in self.outlets
            if not isinstance(outlet, Asset) or views.get(outlet.uri, {"status": "updated"})["status"] == "updated"
        ]
        counts = {name: value for name, value in summary.items() if name != "views"}
        for outlet in self.outlets:
            if isinstance(outlet, Asset):
                context["outlet_events"][outlet].extra.update(views.get(outlet.uri, counts))

    def _arguments(self) -> dict[str, Any]:
        return {
            "views": list(self.views),
            "schemas": list(self.schemas),
            "exclude": list(self.exclude),
            "feeds": self.feeds,
            "needs": self.needs,
            "stale": self.stale,
            "at_once": self.at_once,
            "skip_unchanged": self.skip_unchanged,
            "max_staleness": self.max_staleness,
            "ignore_windows": self.ignore_windows,
            "refresh_strategy": self.refresh_strategy,
            "row_count_strategy": self.row_count_strategy,
            "session_settings": self.session_settings,
            **self._terms(),
        }
