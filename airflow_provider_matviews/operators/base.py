"""What all operators share: a connection, how to behave among others, and how a result becomes log, XCom and events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn
from uuid import uuid4

from airflow.providers.common.compat.sdk import AirflowSkipException, Asset, AssetAlias, BaseOperator, conf

from airflow_provider_matviews import lineage
from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.links.matview import MatViewRunLink
from airflow_provider_matviews.outcome import (
    log_error,
    log_statements,
    recorded_run_id,
    stood_back,
    summary,
    unpack_error,
)
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.timeouts import LONGEST, Timeouts
from airflow_provider_matviews.triggers.matview import MatViewTrigger

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context
    from airflow.providers.openlineage.extractors import OperatorLineage


#: A deferred operation for which no limit is given ends after a day: Airflow itself would leave it for ever.
LONGEST_DEFERRAL = timedelta(days=1).total_seconds()
#: Seconds after deferral before which its trigger does not fire. Airflow 3.3.2 fails a task that is queued again before
#: the scheduler has noted the end of its first half ("the task instance's state attribute is queued"; measured).
SETTLING = 3.0
#: Of execution_timeout, what is left for the server to stop and for the record, before Airflow ends the process.
_SHARE_LEFT, _MOST_LEFT = 0.1, 5.0
#: Seconds after its own deadline when Airflow ends a deferred operation that has not been heard of.
_GRACE = 60.0
_STOPPED = (
    "Airflow stopped the task (it was marked or cleared, its DAG run ended or timed out, or its worker was shut down)"
)


class HookOperator(BaseOperator):
    """What all of them share: over which connection, and how to be stopped."""

    template_fields: Sequence[str] = ("conn_id", "tracking_schema")
    ui_color = "#e6f1f2"

    def __init__(self, *, conn_id: str = "postgres_default", tracking_schema: str = "matviews", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conn_id = conn_id
        self.tracking_schema = tracking_schema
        self._hook: MatViewHook | None = None
        #: The row in ``mat_view_runs`` of what the task has done, for the link to it.
        self.recorded_run_id: int | None = None
        #: What OpenLineage is told when it asks, after the end.
        self._lineage: Mapping[str, Any] | None = None

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002
        """Return what was read and written, as the catalogs say; OpenLineage asks when the task has ended, also badly.

        :param task_instance: of the task.
        """
        return lineage.facets(self._lineage)

    def on_kill(self) -> None:
        """Stop the statements on the server; what they had done is undone there."""
        if self._hook is not None:
            self._hook.refuse(_STOPPED)

    @contextmanager
    def _working(self, context: Context) -> Iterator[MatViewHook]:
        """Yield a hook that is stopped when the task is; what goes wrong with it is told in the log."""
        hook = self._hook = self._make_hook(context)
        try:
            yield hook
        except Exception as error:
            self.recorded_run_id = recorded_run_id(error)
            log_error(self.log, error, hook.redact)
            raise
        finally:
            self._hook = None
            if hook.wants_lineage:
                self._lineage = lineage.told_by(hook)

    def _make_hook(self, context: Context) -> MatViewHook:
        hook = MatViewHook(
            postgres_conn_id=self.conn_id,
            tracking_schema=self.tracking_schema,
            context=whose(context),
            longest=self._longest(),
        )
        hook.wants_lineage = lineage.enabled()
        return hook

    def _longest(self) -> float | None:
        """Return the seconds after which the server is stopped, so that Airflow need not end the process."""
        if self.execution_timeout is None:
            return None
        seconds = self.execution_timeout.total_seconds()
        return min(seconds - min(_SHARE_LEFT * seconds, _MOST_LEFT), LONGEST)


class OperationOperator(HookOperator):
    """What those share that create, refresh or drop views: how to behave among others, and whom to tell of it."""

    def __init__(
        self,
        *,
        if_locked: str = "wait",
        lock_timeout: float | None = None,
        max_wait: float | None = None,
        statement_timeout: float | None = None,
        timeout: float | None = None,
        dry_run: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.if_locked = if_locked
        self.lock_timeout = lock_timeout
        self.max_wait = max_wait
        self.statement_timeout = statement_timeout
        self.timeout = timeout
        # Not `dry_run`: that is a method of BaseOperator.
        self.is_dry_run = dry_run

    def _terms(self) -> dict[str, Any]:
        return {
            "if_locked": self.if_locked,
            "lock_timeout": self.lock_timeout,
            "max_wait": self.max_wait,
            "statement_timeout": self.statement_timeout,
            "timeout": self.timeout,
            "dry_run": self.is_dry_run,
        }

    def _add_alias(self, emit_assets: bool) -> None:
        """Have an outlet by which Airflow is told of views: where one stands is only known when the task runs."""
        alias = AssetAlias(asset_alias(self.conn_id))
        if emit_assets and alias not in self.outlets:
            # Not in place: a list of the DAG's author may serve several tasks.
            self.outlets = [*self.outlets, alias]

    def _tell_of(self, context: Context, hook: MatViewHook, refreshed: Sequence[dict[str, Any]]) -> None:
        """Tell, at each alias among the outlets, of the views that were created or refreshed, as assets."""
        # Airflow tells of these by itself.
        declared = {outlet.uri for outlet in self.outlets if isinstance(outlet, Asset)}
        for told in refreshed:
            asset = Asset(hook.asset_uri(told["view"]))
            if asset.uri in declared:
                continue
            for outlet in self.outlets:
                if isinstance(outlet, AssetAlias):
                    context["outlet_events"][outlet].add(asset, extra=told)

    def _take_in(self, hook: MatViewHook, summaries: Sequence[dict[str, Any]]) -> None:
        """Name what the views read as the task's inlets, for whoever looks at it when it has ended (lineage)."""
        known = {inlet.uri for inlet in self.inlets if isinstance(inlet, Asset)}
        uris = {hook.asset_uri(source) for told in summaries for source in told.get("sources", ())}
        self.inlets = [*self.inlets, *(Asset(uri) for uri in sorted(uris - known))]


def asset_alias(conn_id: str = "postgres_default") -> str:
    """Return the name of the alias under which views of a connection tell that they were created or refreshed.

    A DAG that is scheduled on ``AssetAlias(asset_alias("warehouse"))`` runs whenever any of them was.

    :param conn_id: of the connection; a template stands for any.
    """
    return "matviews" if "{" in str(conn_id) else f"matviews/{conn_id}"


class Deferral:
    """Puts an operation into the triggerer; to be mixed into a :class:`HookOperator`."""

    deferrable: bool
    cancel_on_kill: bool
    recorded_run_id: int | None
    _lineage: Mapping[str, Any] | None

    def _defer_to(
        self,
        context: Context,
        operation: Literal["create", "refresh", "refresh_many", "verify_many"],
        subject: str | MatViewDefinition | None,
        arguments: Mapping[str, Any],
        limits: Timeouts,
    ) -> NoReturn:
        assert isinstance(self, HookOperator)
        given = [each for each in (limits.timeout, self._longest()) if each is not None]
        seconds = min(given, default=LONGEST_DEFERRAL)
        trigger = MatViewTrigger(
            operation=operation,
            subject=subject.to_dict() if isinstance(subject, MatViewDefinition) else subject,
            arguments=arguments,
            conn_id=self.conn_id,
            tracking_schema=self.tracking_schema,
            context=whose(context),
            deferral=str(uuid4()),
            deadline=time.time() + seconds,
            timeout=seconds,
            not_before=time.time() + SETTLING,
            cancel_on_kill=self.cancel_on_kill,
        )
        self.log.info(
            "Deferred: the triggerer carries out the %s, for %g s at the most.",
            {"verify_many": "verification"}.get(operation, operation.removesuffix("_many")),
            seconds,
        )
        self.defer(trigger=trigger, method_name="execute_complete", timeout=timedelta(seconds=seconds + _GRACE))

    def _raise_from(self, event: Mapping[str, Any]) -> None:
        """Raise the error that the trigger tells of, if any; and take what it tells OpenLineage."""
        assert isinstance(self, HookOperator)
        self._lineage = event.get("lineage")
        if "error" in event:
            self.recorded_run_id = event["error"].get("run_id")
            error = unpack_error(event["error"])
            log_error(self.log, error)
            raise error


class ViewOperator(OperationOperator):
    """What those about one view share: which view, and how a response becomes log, XCom and events."""

    template_fields: Sequence[str] = ("conn_id", "tracking_schema", "view", "definition")
    operator_extra_links = (MatViewRunLink(),)
    template_fields_renderers: ClassVar[dict[str, str]] = {"definition": "py"}

    def __init__(
        self,
        *,
        view: str | None = None,
        definition: MatViewDefinition | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.view = view
        self.definition = definition

    def execute(self, context: Context) -> dict[str, Any]:
        """Do it, and return a summary for XCom.

        :raises AirflowSkipException: when another operation on the view ran and ``if_locked="skip"``.
        :raises MatViewError: one of ``exceptions.py``, when it cannot be done as asked.
        :raises psycopg.Error: what PostgreSQL says.
        """
        with self._working(context) as hook:
            response = self._perform(hook)
        if self.is_dry_run:
            # Airflow tells of every asset that a task which succeeds has as its outlet.
            self.outlets = []
            return summary(response, hook.redact)
        log_statements(self.log, response, hook.redact)
        return self._conclude(context, hook, summary(response, hook.redact), stood_back(response))

    def _conclude(
        self, context: Context, hook: MatViewHook, summary: dict[str, Any], stood_back: bool
    ) -> dict[str, Any]:
        self.recorded_run_id = summary["mat_view_run_id"]
        if stood_back:
            raise AirflowSkipException(f"{summary['view']}: {summary['reason']}.")
        self._emit_events(context, hook, summary)
        return summary

    def _perform(self, hook: MatViewHook) -> ServiceResponse:
        raise NotImplementedError

    def _declared(self) -> MatViewDefinition | None:
        if self.definition is None:
            return None
        if self.view is not None:
            raise InvalidDefinition("Give either view=... or definition=..., not both.")
        if isinstance(self.definition, MatViewDefinition):
            return self.definition
        return MatViewDefinition.from_dict(self.definition)

    def _subject(self) -> str | MatViewDefinition:
        subject = self._declared() or self.view
        if subject is None:
            raise InvalidDefinition("Which view? Give view='schema.view' or definition=MatViewDefinition(...).")
        return subject

    def _emit_events(self, context: Context, hook: MatViewHook, summary: dict[str, Any]) -> None:
        if summary["status"] != "skipped":
            self._tell_of(context, hook, [summary])
            self._take_in(hook, [summary])
        for outlet in self.outlets:
            if isinstance(outlet, Asset):
                context["outlet_events"][outlet].extra.update(summary)


class DeferrableViewOperator(Deferral, ViewOperator):
    """What those share that can also run in the triggerer."""

    def __init__(
        self,
        *,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        cancel_on_kill: bool = True,
        emit_assets: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.deferrable = deferrable
        self.cancel_on_kill = cancel_on_kill
        self.emit_assets = emit_assets
        self._add_alias(emit_assets)

    def execute(self, context: Context) -> dict[str, Any]:
        """Do it, here or in the triggerer, and return a summary for XCom.

        :raises AirflowSkipException: when another operation on the view ran and ``if_locked="skip"``.
        :raises TaskDeferred: when the triggerer is to do it.
        :raises MatViewError: one of ``exceptions.py``, when it cannot be done as asked.
        :raises psycopg.Error: what PostgreSQL says.
        """
        if self.deferrable and not self.is_dry_run:
            self._defer(context)
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on where the trigger has ended.

        :raises AirflowSkipException: as of :meth:`execute`.
        :raises MatViewError: as of :meth:`execute`.
        :raises psycopg.Error: as of :meth:`execute`.
        """
        self._raise_from(event)
        return self._conclude(context, self._make_hook(context), event["summary"], event["stood_back"])

    def _deferred(self) -> tuple[Literal["create", "refresh"], str | MatViewDefinition, dict[str, Any]]:
        """Return what the triggerer is to do: the operation, on what, and how."""
        raise NotImplementedError

    def _defer(self, context: Context) -> NoReturn:
        operation, subject, arguments = self._deferred()
        # Refused here and not only in the triggerer.
        limits = Timeouts(**{name: arguments[name] for name in Timeouts.names()})
        if isinstance(subject, MatViewDefinition):
            limits = limits.over(Timeouts.of(subject.timeouts))
        self._defer_to(context, operation, subject, arguments, limits)


def whose(context: Context) -> dict[str, Any]:
    """Return what is recorded of whose task it is."""
    task_instance = context["ti"]
    return {key: getattr(task_instance, key) for key in ("dag_id", "task_id", "run_id", "map_index", "try_number")}
