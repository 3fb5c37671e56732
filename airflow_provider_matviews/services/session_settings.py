"""Settings for one operation: SET LOCAL, so that they end with its transaction and leak to nobody."""

from __future__ import annotations

from collections.abc import Mapping

import psycopg
from psycopg import sql

from airflow_provider_matviews.definition import ParameterValue
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.services.instructions import Work, fetch_all


def apply_settings(settings: Mapping[str, ParameterValue]) -> Work[None]:
    """Set them until the transaction ends.

    :raises InvalidDefinition: when the server does not know one, does not take its value, or the role may not.
    """
    for name, value in settings.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        try:
            yield from fetch_all(
                sql.SQL("SELECT set_config({}, {}, true)").format(sql.Literal(name), sql.Literal(text))
            )
        except (
            psycopg.errors.UndefinedObject,
            psycopg.errors.InvalidParameterValue,
            psycopg.errors.InsufficientPrivilege,
            psycopg.errors.CantChangeRuntimeParam,
        ) as error:
            raise InvalidDefinition(
                f"session_settings: {name} = {text!r} is not possible here: {error.diag.message_primary}.",
                hint="see https://www.postgresql.org/docs/current/runtime-config.html for what a session may set.",
            ) from error
