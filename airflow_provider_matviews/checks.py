"""Checks of values that need no server: what can never be is refused when a definition is built."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from enum import Enum
from typing import Any, TypeVar

from airflow_provider_matviews.exceptions import InvalidDefinition

_PARAMETER = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)?\Z")

#: Settings that an operation sets itself, or that decide who it is: with what to use instead.
_RESERVED_SETTINGS: dict[str, str | None] = {
    "lock_timeout": "use the argument lock_timeout=... (seconds).",
    "idle_in_transaction_session_timeout": None,
    "client_connection_check_interval": None,
    "role": "use another connection.",
    "session_authorization": "use another connection.",
    "client_encoding": None,
    "standard_conforming_strings": None,
    "track_counts": None,
}

ParameterValue = str | int | float | bool
_C = TypeVar("_C", bound=Enum)


def choice(kind: type[_C], value: object, argument: str) -> _C:
    """Return the member of ``kind`` that ``value`` names.

    :raises InvalidDefinition: when there is none; the message lists what there is.
    """
    try:
        return kind(value)
    except ValueError:
        options = ", ".join(repr(member.value) for member in kind)
        raise InvalidDefinition(f"{argument}={value!r} does not exist. Choose one of {options}.") from None


def set_on(instance: object, name: str, value: object) -> None:
    """Set an attribute of a frozen dataclass while it is being made."""
    object.__setattr__(instance, name, value)


def check_flag(value: object, argument: str) -> None:
    """Refuse what is not a bool: the word "false", from a file or a template, would count as true.

    :raises InvalidDefinition: when it is anything else than True or False.
    """
    if not isinstance(value, bool):
        raise InvalidDefinition(f"{argument} is true or false, not {value!r}.")


def check_text(text: object, what: str) -> None:
    """Refuse what is no text that PostgreSQL could hold.

    :raises InvalidDefinition: when it is no text, is empty, or holds what no database encoding has.
    """
    if not isinstance(text, str):
        raise InvalidDefinition(f"The {what} is text, not {type(text).__name__}.")
    if not text.strip():
        raise InvalidDefinition(f"The {what} is empty.")
    if "\0" in text:
        raise InvalidDefinition(f"The {what} holds a NUL character, which PostgreSQL refuses.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidDefinition(f"The {what} is not valid Unicode text.") from None


def check_one_of(value: object, argument: str, options: Sequence[str]) -> None:
    """Refuse what is neither None nor one of some words.

    :raises InvalidDefinition: when it is anything else.
    """
    if value is not None and value not in options:
        raise InvalidDefinition(f"{argument}={value!r} does not exist. Choose one of {', '.join(map(repr, options))}.")


def check_target(value: object, argument: str) -> None:
    """Refuse what is neither None nor a statistics target.

    :raises InvalidDefinition: when it is anything else than a whole number from 0 to 10000
        (https://www.postgresql.org/docs/current/sql-altertable.html).
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10000):
        raise InvalidDefinition(f"{argument}={value!r} is not a whole number from 0 to 10000.")


def as_seconds(value: object, argument: str) -> float | None:
    """Return a length of time, given as a number of seconds or a timedelta, in seconds; None for none.

    :raises InvalidDefinition: when it is anything else, or not more than nothing.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise InvalidDefinition(f"{argument}={value!r} is not a positive number of seconds, or a timedelta.")
    return seconds


def as_tuple(values: object, argument: str, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """Return a list's values.

    :raises InvalidDefinition: when it is no list or tuple, or holds anything but ``kinds``.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidDefinition(f"{argument} is a list or tuple, not {values!r}.")
    for value in values:
        if not isinstance(value, kinds):
            raise InvalidDefinition(f"{argument} holds {value!r}, which is not {kinds[-1].__name__}.")
    return tuple(values)


def as_parameters(parameters: object, argument: str = "storage_parameters") -> dict[str, ParameterValue]:
    """Return what goes into a WITH clause or its like.

    :raises InvalidDefinition: when it is no mapping, or holds what is no parameter.
    """
    if not isinstance(parameters, Mapping):
        raise InvalidDefinition(f"{argument} maps names to values, not {parameters!r}.")
    what = "storage parameter" if argument == "storage_parameters" else f"parameter in {argument}"
    for name, value in parameters.items():
        if not isinstance(name, str) or not _PARAMETER.match(name):
            raise InvalidDefinition(f"{name!r} is not the name of a {what}.")
        if not _is_value(value):
            raise InvalidDefinition(f"The {what} {name} is a number, text or true/false, not {value!r}.")
    return dict(parameters)


def check_session_settings(settings: object) -> dict[str, ParameterValue]:
    """Return settings as given.

    :raises InvalidDefinition: when they are no mapping, hold what is no name of a setting, or one that the
        operation itself relies on.
    """
    if not isinstance(settings, Mapping):
        raise InvalidDefinition(f"session_settings maps names to values, not {settings!r}.")
    for name, value in settings.items():
        if not isinstance(name, str) or not _PARAMETER.match(name.lower()):
            raise InvalidDefinition(f"{name!r} is not the name of a PostgreSQL setting.")
        if name.lower() in _RESERVED_SETTINGS or name.lower().startswith("transaction_"):
            raise InvalidDefinition(
                f"session_settings cannot hold {name}: the operation itself relies on it.",
                hint=_RESERVED_SETTINGS.get(name.lower()),
            )
        if not _is_value(value):
            raise InvalidDefinition(f"The setting {name} is a number, text or true/false, not {value!r}.")
    return dict(settings)


def _is_value(value: object) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, (str, int, float)) and "\0" not in str(value)
