"""The operators: what a DAG author says, handed to the hook. Thin, and all of one shape."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn
from uuid import uuid4

from airflow.providers.common.compat.sdk import AirflowSkipException, Asset, AssetAlias, BaseOperator, conf

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.outcome import log_error, log_statements, stood_back, summary, unpack_error
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.timeouts import LONGEST, Timeouts
from airflow_provider_matviews.triggers.matview import MatViewTrigger

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context


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


class _MatViewOperator(BaseOperator):
    """What all of them share: which view, over which connection, and how a response becomes log, XCom and events."""

    template_fields: Sequence[str] = ("conn_id", "tracking_schema", "view", "definition")
    template_fields_renderers: ClassVar[dict[str, str]] = {"definition": "py"}
    ui_color = "#e6f1f2"

    def __init__(
        self,
        *,
        view: str | None = None,
        definition: MatViewDefinition | Mapping[str, Any] | None = None,
        conn_id: str = "postgres_default",
        tracking_schema: str = "matviews",
        if_locked: str = "wait",
        lock_timeout: float | None = None,
        max_wait: float | None = None,
        statement_timeout: float | None = None,
        timeout: float | None = None,
        dry_run: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.view = view
        self.definition = definition
        self.conn_id = conn_id
        self.tracking_schema = tracking_schema
        self.if_locked = if_locked
        self.lock_timeout = lock_timeout
        self.max_wait = max_wait
        self.statement_timeout = statement_timeout
        self.timeout = timeout
        # Not `dry_run`: that is a method of BaseOperator.
        self.is_dry_run = dry_run
        self._hook: MatViewHook | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Do it, and return a summary for XCom.

        :raises AirflowSkipException: when another operation on the view ran and ``if_locked="skip"``.
        :raises MatViewError: one of ``exceptions.py``, when it cannot be done as asked.
        :raises psycopg.Error: what PostgreSQL says.
        """
        hook = self._hook = self._make_hook(context)
        try:
            response = self._perform(hook)
        except Exception as error:
            log_error(self.log, error, hook.redact)
            raise
        finally:
            self._hook = None
        if self.is_dry_run:
            # Airflow tells of every asset that a task which succeeds has as its outlet.
            self.outlets = []
            return summary(response, hook.redact)
        log_statements(self.log, response, hook.redact)
        return self._conclude(context, hook, summary(response, hook.redact), stood_back(response))

    def on_kill(self) -> None:
        """Stop the statement on the server; what it had done is undone there."""
        if self._hook is not None:
            self._hook.refuse(_STOPPED)

    def _make_hook(self, context: Context) -> MatViewHook:
        return MatViewHook(
            postgres_conn_id=self.conn_id,
            tracking_schema=self.tracking_schema,
            context=_whose(context),
            longest=self._longest(),
        )

    def _conclude(
        self, context: Context, hook: MatViewHook, summary: dict[str, Any], stood_back: bool
    ) -> dict[str, Any]:
        if stood_back:
            raise AirflowSkipException(f"{summary['view']}: {summary['reason']}.")
        self._emit_events(context, hook, summary)
        return summary

    def _perform(self, hook: MatViewHook) -> ServiceResponse:
        raise NotImplementedError

    def _terms(self) -> dict[str, Any]:
        return {
            "if_locked": self.if_locked,
            "lock_timeout": self.lock_timeout,
            "max_wait": self.max_wait,
            "statement_timeout": self.statement_timeout,
            "timeout": self.timeout,
            "dry_run": self.is_dry_run,
        }

    def _longest(self) -> float | None:
        """Return the seconds after which the server is stopped, so that Airflow need not end the process."""
        if self.execution_timeout is None:
            return None
        seconds = self.execution_timeout.total_seconds()
        return min(seconds - min(_SHARE_LEFT * seconds, _MOST_LEFT), LONGEST)

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
        for outlet in self.outlets:
            if isinstance(outlet, AssetAlias):
                if summary["status"] != "skipped":
                    context["outlet_events"][outlet].add(Asset(hook.asset_uri(summary["view"])), extra=summary)
            elif isinstance(outlet, Asset):
                context["outlet_events"][outlet].extra.update(summary)


class _DeferrableMatViewOperator(_MatViewOperator):
    """What those share that can also run in the triggerer."""

    def __init__(
        self,
        *,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        cancel_on_kill: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.deferrable = deferrable
        self.cancel_on_kill = cancel_on_kill

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
        if "error" in event:
            error = unpack_error(event["error"])
            log_error(self.log, error)
            raise error
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
        given = [each for each in (limits.timeout, self._longest()) if each is not None]
        seconds = min(given, default=LONGEST_DEFERRAL)
        trigger = MatViewTrigger(
            operation=operation,
            subject=subject if isinstance(subject, str) else subject.to_dict(),
            arguments=arguments,
            conn_id=self.conn_id,
            tracking_schema=self.tracking_schema,
            context=_whose(context),
            deferral=str(uuid4()),
            deadline=time.time() + seconds,
            timeout=seconds,
            not_before=time.time() + SETTLING,
            cancel_on_kill=self.cancel_on_kill,
        )
        self.log.info("Deferred: the triggerer carries out the %s, for %g s at the most.", operation, seconds)
        self.defer(trigger=trigger, method_name="execute_complete", timeout=timedelta(seconds=seconds + _GRACE))


class CreateMatViewOperator(_DeferrableMatViewOperator):
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
    """

    template_fields: Sequence[str] = (*_MatViewOperator.template_fields, "sql", "on_drift")
    template_ext: Sequence[str] = (".sql",)
    template_fields_renderers: ClassVar[dict[str, str]] = {
        **_MatViewOperator.template_fields_renderers,
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


class RefreshMatViewOperator(_DeferrableMatViewOperator):
    """Refresh a materialized view, declared or not.

    :param view: the view's name. (templated)
    :param definition: its definition instead of its name.
    :param refresh_strategy: ``auto``, ``swap``, ``concurrent`` or ``regular``; None for what was declared. (templated)
    :param row_count_strategy: ``none``, ``estimated`` or ``exact``.
    :param max_bloat: ``auto`` rebuilds when a row takes so many times the room it took after the last rebuild.
    :param analyze: whether the planner's statistics are renewed; None leaves it to the strategy.
    :param vacuum: VACUUM after COMMIT, which lets index-only scans skip the heap.
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
    """

    template_fields: Sequence[str] = (*_MatViewOperator.template_fields, "refresh_strategy")

    def __init__(
        self,
        *,
        refresh_strategy: str | None = None,
        row_count_strategy: str = "estimated",
        max_bloat: float = 1.5,
        analyze: bool | None = None,
        vacuum: bool = False,
        session_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.refresh_strategy = refresh_strategy
        self.row_count_strategy = row_count_strategy
        self.max_bloat = max_bloat
        self.analyze = analyze
        self.vacuum = vacuum
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
            "session_settings": self.session_settings,
            **self._terms(),
        }


class DeleteMatViewOperator(_MatViewOperator):
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


def _whose(context: Context) -> dict[str, Any]:
    task_instance = context["ti"]
    return {key: getattr(task_instance, key) for key in ("dag_id", "task_id", "run_id", "map_index", "try_number")}
