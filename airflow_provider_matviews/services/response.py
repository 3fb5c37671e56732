"""The one shape in which every service answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from airflow_provider_matviews.services.instructions import Command, Work

Status = Literal["created", "updated", "deleted", "skipped"]


@dataclass(frozen=True)
class ServiceResponse:
    """What was asked and what came of it; plain data that JSON can hold.

    :param status: ``created``, ``updated``, ``deleted`` or ``skipped``; None while the operation is unfinished,
        as in the response that an error carries.
    :param request: what was asked.
    :param response: view, sql (the statements, in order), strategy, row_count_before, row_count_after
        (None where unknown), steps with their timings in milliseconds, reason, and what else the operation tells.
    :param run_id: the id of the run row, where one was written.
    :param duration_ms: milliseconds by the monotonic clock, where a run row was written.
    """

    status: Status | None
    request: dict[str, Any] = field(default_factory=dict)
    response: dict[str, Any] = field(default_factory=dict)
    run_id: int | None = None
    duration_ms: int | None = None

    @property
    def success(self) -> bool:
        """Whether the operation ended as it should, which includes having had nothing to do."""
        return self.status is not None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "status": self.status,
            "success": self.success,
            "run_id": self.run_id,
            "duration_ms": self.duration_ms,
            "request": self.request,
            "response": self.response,
        }


@dataclass
class Report:
    """Gathers a response while a service works, so that a failure can tell how far it came."""

    request: dict[str, Any]
    response: dict[str, Any]
    clock: Callable[[], float] = time.monotonic
    follow_up: list[tuple[str, Command]] = field(default_factory=list)

    @classmethod
    def on(cls, view: str, request: dict[str, Any]) -> Report:
        """Begin a response about ``view``."""
        report = cls(request={"view": view, **request}, response={})
        report.restart()
        return report

    def restart(self) -> None:
        """Forget what was undone, before it is tried again."""
        self.response.clear()
        self.follow_up.clear()
        self.told(
            view=self.request["view"],
            sql=[],
            strategy=None,
            row_count_before=None,
            row_count_after=None,
            steps=[],
        )

    def so_far(self) -> int:
        """Return a mark for :meth:`forget_since`."""
        return len(self.response["sql"])

    def forget_since(self, mark: int) -> None:
        """Forget the statements after a mark, which were undone."""
        del self.response["sql"][mark:]
        del self.response["steps"][mark:]

    def run(self, step: str, command: Command) -> Work[None]:
        """Run a command and note its text and how long it took."""
        self.response["sql"].append(command.text)
        begun = self.clock()
        try:
            yield command
        finally:
            self.response["steps"].append({"step": step, "ms": round((self.clock() - begun) * 1000, 3)})

    def later(self, step: str, command: Command) -> None:
        """Ask for a command after the operation has committed; its failure is not the operation's."""
        self.follow_up.append((step, command))

    def told(self, **facts: Any) -> None:
        """Add to the response."""
        self.response.update(facts)

    def end(self, status: Status) -> ServiceResponse:
        """Return the finished response."""
        return ServiceResponse(status, self.request, self.response)

    def unfinished(self) -> ServiceResponse:
        """Return the response so far."""
        return ServiceResponse(None, self.request, self.response)
