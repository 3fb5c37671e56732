"""What can go wrong, told to a person: what happened, on which view, why, and what mends it.

Retry policies and alerts match on these classes, so each cause has its own. Errors of PostgreSQL itself
come through as psycopg's (``psycopg.errors.UniqueViolation`` and so on), not wrapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import psycopg

if TYPE_CHECKING:
    from airflow_provider_matviews.services.fleet import FleetResponse
    from airflow_provider_matviews.services.plan_steps import Plan
    from airflow_provider_matviews.services.response import ServiceResponse


class MatViewError(Exception):
    """Base of every error this package raises itself.

    :param message: what happened, on which view, and why.
    :param hint: the DDL, setting or argument that mends it.
    :ivar response: the response so far, where an operation had begun.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.response: ServiceResponse | None = None

    def __str__(self) -> str:
        return f"{self.message}\nTo mend it: {self.hint}" if self.hint else self.message


class InvalidDefinition(MatViewError, ValueError):
    """A definition, or an argument, that can never work; nothing was touched."""


class InvalidName(InvalidDefinition):
    """A name that PostgreSQL could not hold as it stands."""


class UnsupportedServer(MatViewError):
    """Not PostgreSQL 14 or newer, or a server that takes no writes (a standby, read-only)."""


class MissingPrivilege(MatViewError):
    """The role may not do this; the message says which right is missing, the hint how to grant it."""


class StrategyRefused(MatViewError):
    """A strategy could not carry over everything that the view has; the message names what, the hint what to do."""


class ViewNotFound(MatViewError):
    """No materialized view of this name stands."""


class NotAMaterializedView(MatViewError):
    """Something else stands under this name."""


class ViewNotManaged(MatViewError):
    """The view belongs to somebody else (``managed=False``): not created or altered, dropped only by force."""


class ConcurrentRefreshRefused(MatViewError):
    """REFRESH ... CONCURRENTLY could not work on this view; the hint holds the DDL that lets it."""


class DependentsExist(MatViewError):
    """Other objects are built on the view.

    :ivar dependents: their descriptions, as PostgreSQL words them.
    """

    def __init__(self, message: str, *, dependents: Sequence[str], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.dependents = tuple(dependents)


class WouldBeLost(MatViewError):
    """The view has what the definition does not mention and the operation could not carry over.

    :ivar attachments: their descriptions.
    """

    def __init__(self, message: str, *, attachments: Sequence[str], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.attachments = tuple(attachments)


class DriftFound(MatViewError):
    """The view is not what its definition says (``on_drift="fail"``).

    :ivar plan: what would make it so; None where the error came by way of a triggerer.
    """

    plan: Plan | None = None

    def __init__(self, message: str, *, plan: Plan | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.plan = plan


class ViewLocked(MatViewError):
    """Another operation on the same view is running (``if_locked="fail"``, or the wait was too long)."""


class OperationCancelled(MatViewError, psycopg.errors.QueryCanceled):
    """The operation was stopped on purpose; the message says by whom or what. Everything it did is undone."""


class OperationTimedOut(MatViewError, psycopg.errors.QueryCanceled):
    """The operation took longer than its ``timeout`` in all and was stopped. Everything it did is undone."""


class FleetFailed(MatViewError):
    """Of several views that were to be refreshed some were not; the others were.

    :ivar failed: those whose refresh failed.
    :ivar stopped: those that were left as they are, because they read one of them, near or far, or because time was up.
    :ivar result: what came of each; None where the error came by way of a triggerer.
    """

    result: FleetResponse | None = None

    def __init__(
        self, message: str, *, failed: Sequence[str] = (), stopped: Sequence[str] = (), hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.failed = tuple(failed)
        self.stopped = tuple(stopped)


class VerificationFailed(MatViewError):
    """Views do not equal their queries, in a way that ``fail_on`` names, or could not be verified.

    :ivar views: their names.
    """

    def __init__(self, message: str, *, views: Sequence[str] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.views = tuple(views)


class RunLost(MatViewError):
    """A run whose process died before it could say how it ended; found by the next operation on the view."""
