"""Wait in the triggerer until views break no rule."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from airflow.providers.common.compat.connection import get_async_connection
from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.outcome import pack_error
from airflow_provider_matviews.services.alerts import table


class HealthyMatViewsTrigger(BaseTrigger):
    """Look at views now and then, and fire when they break no rule.

    :param arguments: of :meth:`MatViewHook.check`, plain data.
    :param conn_id: the PostgreSQL connection.
    :param tracking_schema: the schema of the run tables.
    :param context: whose task it is.
    :param poke_interval: seconds between two looks.
    """

    def __init__(
        self,
        *,
        arguments: Mapping[str, Any],
        conn_id: str,
        tracking_schema: str,
        context: Mapping[str, Any],
        poke_interval: float,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arguments = arguments
        self.conn_id = conn_id
        self.tracking_schema = tracking_schema
        self.context = context
        self.poke_interval = poke_interval

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what the triggerer makes the trigger of again."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "arguments": dict(self.arguments),
                "conn_id": self.conn_id,
                "tracking_schema": self.tracking_schema,
                "context": dict(self.context),
                "poke_interval": self.poke_interval,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look until all is well, and fire one event: what was found, or the error."""
        hook: MatViewHook | None = None
        told: list[str] = []
        try:
            while True:
                # The task waited for this interval from when it looked itself.
                await asyncio.sleep(self.poke_interval)
                # Anew each time: what is waited for may take longer than a password of IAM holds.
                hook = MatViewHook(
                    postgres_conn_id=self.conn_id,
                    connection=await get_async_connection(self.conn_id),
                    tracking_schema=self.tracking_schema,
                    context=self.context,
                )
                found = (await hook.acheck(**self.arguments)).as_dict(hook.redact)
                if found["healthy"]:
                    break
                lines = table(found["breaches"])
                if lines != told:
                    told = lines
                    for line in lines:
                        self.log.info("%s", line)
        except Exception as error:
            yield TriggerEvent({"error": pack_error(error, hook.redact if hook else str)})  # type: ignore[no-untyped-call]
        else:
            yield TriggerEvent({"found": found})  # type: ignore[no-untyped-call]
