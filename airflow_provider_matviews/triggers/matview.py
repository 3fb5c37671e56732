"""Create and refresh views inside the triggerer: hundreds at once, on asynchronous connections, with no thread each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Literal

from airflow.providers.common.compat.connection import get_async_connection
from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_matviews import lineage
from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import OperationTimedOut
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.outcome import log_statements, pack_error, stood_back, summary
from airflow_provider_matviews.services.fleet import FleetResponse
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.services.verification import VerificationReport, report_lines

#: What the triggerer says when somebody acted on the task; it says nothing when it is shutting down itself.
_USER_ACTION = "__airflow_user_action__"
_STOPPED = "Airflow stopped the deferred task (it was marked or cleared, or its DAG run ended or timed out)"
_SHUT_DOWN = "its triggerer was shut down, and the next one begins anew"
#: Seconds below which there is no use in beginning.
_SHORTEST = 0.001
#: The loop holds tasks by weak references only.
_let_run: set[asyncio.Task[Any]] = set()


class MatViewTrigger(BaseTrigger):
    """Carry out one operation and fire when it has ended, well or not.

    It owns its connections. The triggerer may run it twice, one copy after another or, when a triggerer was taken for
    dead, beside each other: the database lets one at a time do it, and the next one finds what it left.

    :param operation: ``create``, ``refresh``, ``refresh_many`` or ``verify_many``.
    :param subject: the view's name, or its definition as plain data; None for those of many views.
    :param arguments: of the hook's method of that name, plain data.
    :param conn_id: the PostgreSQL connection.
    :param tracking_schema: the schema of the run tables.
    :param context: whose task it is.
    :param deferral: what all copies of this trigger have in common, and no other trigger.
    :param deadline: when it has to be over, in seconds since the epoch.
    :param timeout: how many seconds it was given in all, for the story.
    :param not_before: when it may fire at the earliest, in seconds since the epoch.
    :param cancel_on_kill: whether it ends with its task when somebody marks that failed or clears it; False lets it run
        to its end.
    """

    def __init__(
        self,
        *,
        operation: Literal["create", "refresh", "refresh_many", "verify_many"],
        subject: str | Mapping[str, Any] | None,
        arguments: Mapping[str, Any],
        conn_id: str,
        tracking_schema: str,
        context: Mapping[str, Any],
        deferral: str,
        deadline: float,
        timeout: float,
        not_before: float = 0.0,
        cancel_on_kill: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operation = operation
        self.subject = subject
        self.arguments = arguments
        self.conn_id = conn_id
        self.tracking_schema = tracking_schema
        self.context = context
        self.deferral = deferral
        self.deadline = deadline
        self.timeout = timeout
        self.not_before = not_before
        self.cancel_on_kill = cancel_on_kill

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what the triggerer makes the trigger of again."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "operation": self.operation,
                "subject": self.subject,
                "arguments": dict(self.arguments),
                "conn_id": self.conn_id,
                "tracking_schema": self.tracking_schema,
                "context": dict(self.context),
                "deferral": self.deferral,
                "deadline": self.deadline,
                "timeout": self.timeout,
                "not_before": self.not_before,
                "cancel_on_kill": self.cancel_on_kill,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Do it, and fire one event: the summary of the response, or the error."""
        hook: MatViewHook | None = None
        try:
            # Looked up here, without blocking the loop that all triggers share.
            connection = await get_async_connection(self.conn_id)
            hook = MatViewHook(
                postgres_conn_id=self.conn_id,
                connection=connection,
                tracking_schema=self.tracking_schema,
                context=self.context,
                longest=self._remaining(),
                given=self.timeout,
            )
            hook.wants_lineage = lineage.enabled()
            response = await self._carry_out(hook)
        except Exception as error:
            so_far = getattr(error, "response", None)
            if isinstance(so_far, ServiceResponse):
                log_statements(self.log, so_far, hook.redact if hook else str)
            payload: dict[str, Any] = {"error": pack_error(error, hook.redact if hook else str)}
            result = getattr(error, "result", None)
            if isinstance(result, FleetResponse) and hook is not None:
                payload["table"] = [hook.redact(line) for line in result.table()]
        else:
            if isinstance(response, VerificationReport):
                told = response.as_dict(hook.redact)
                payload = {"summary": told, "table": report_lines(told)}
            elif isinstance(response, FleetResponse):
                # What the table tells in the triggerer's log belongs into the task's, too.
                payload = {
                    "summary": response.as_dict(hook.redact),
                    "table": [hook.redact(line) for line in response.table()],
                }
            else:
                log_statements(self.log, response, hook.redact)
                payload = {"summary": summary(response, hook.redact), "stood_back": stood_back(response)}
        if hook is not None and hook.wants_lineage:
            payload["lineage"] = lineage.told_by(hook)
        await asyncio.sleep(max(0.0, self.not_before - time.time()))
        yield TriggerEvent(payload)  # type: ignore[no-untyped-call]

    def _remaining(self) -> float:
        remaining = self.deadline - time.time()
        if remaining < _SHORTEST:
            raise OperationTimedOut(
                f"Timed out after {self.timeout:.4g} s, before a triggerer took it up.",
                hint="see whether a triggerer runs and has capacity ([triggerer] capacity), or give it more time.",
            )
        return remaining

    def _work(self, hook: MatViewHook) -> Coroutine[Any, Any, ServiceResponse | FleetResponse | VerificationReport]:
        if self.operation == "verify_many":
            # Nothing of it lasts, so that another copy need not know of it.
            definitions = [MatViewDefinition.from_dict(each) for each in self.arguments["definitions"]]
            return hook.averify_many(**{**self.arguments, "definitions": definitions})
        arguments = {**self.arguments, "deferral": self.deferral}
        if self.operation == "refresh_many":
            return hook.arefresh_many(**arguments)
        assert self.subject is not None
        if self.operation == "create":
            assert not isinstance(self.subject, str)
            return hook.acreate(MatViewDefinition.from_dict(self.subject), **arguments)
        subject = self.subject if isinstance(self.subject, str) else MatViewDefinition.from_dict(self.subject)
        return hook.arefresh(subject, **arguments)

    async def _carry_out(self, hook: MatViewHook) -> ServiceResponse | FleetResponse | VerificationReport:
        task = asyncio.create_task(self._work(hook))
        try:
            # A task of its own: being cancelled is then news that can be told to it with its reason, and once.
            return await asyncio.shield(task)
        except asyncio.CancelledError as cancelled:
            by_user = cancelled.args[:1] == (_USER_ACTION,)
            if by_user and not self.cancel_on_kill:
                self.log.info("The task was stopped, but the %s goes on (cancel_on_kill=False).", self.operation)
                _let_run.add(task)
                task.add_done_callback(_let_run.discard)
                raise
            if not hook.refuse(_STOPPED if by_user else _SHUT_DOWN):
                task.cancel()
            with suppress(Exception):
                await asyncio.shield(task)
            raise
