"""The one shape in which every service answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from airflow_provider_matviews.services.instructions import Command, Work
from airflow_provider_matviews.services.plan_steps import Lock

Status = Literal["created", "updated", "deleted", "skipped"]


def would_be(status: str) -> str:
    """Say of a status that it is what would be; of one that tells of no deed, only itself."""
    if status not in get_args(Status):
        return status
    return f"would be {'dropped' if status == 'deleted' else status}"


@dataclass(frozen=True)
class ServiceResponse:
    """What was asked and what came of it; plain data that JSON can hold.

    :param status: ``created``, ``updated``, ``deleted`` or ``skipped``; None while the operation is unfinished,
        as in the response that an error carries.
    :param request: what was asked.
    :param response: view, sql (the statements, in order), strategy, row_count_before, row_count_after
        (None where unknown), steps (one for each statement, with its timing in milliseconds), reason, and what else
        the operation tells. Of a dry run also ``locks`` (one for each statement) and ``then`` (the statements that
        would follow COMMIT); a step that was not carried out has no timing (None).
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


@dataclass(frozen=True)
class Step:
    """What an operation is doing.

    :ivar name: as among the response's steps.
    :ivar begun: when, by the monotonic clock.
    :ivar place: (i, n) where it is the i-th of n of its kind, counted from 1; else None.
    """

    name: str
    begun: float
    place: tuple[int, int] | None = None


@dataclass
class Report:
    """Gathers a response while a service works, so that a failure can tell how far it came.

    :ivar current: the step that runs now; None between two. Only ever assigned as a whole, since another thread
        may read it.
    """

    request: dict[str, Any]
    response: dict[str, Any]
    clock: Callable[[], float] = time.monotonic
    follow_up: list[tuple[str, Command]] = field(default_factory=list)
    current: Step | None = None
    #: Whether nothing is to be changed.
    dry_run: bool = False
    #: Milliseconds for which another operation on the view had to be waited for.
    waited_ms: int = 0
    #: What the view's sources looked like before it was filled, to be kept when it succeeds.
    source_state: dict[str, Any] | None = None

    @classmethod
    def on(cls, view: str, request: dict[str, Any], *, dry_run: bool = False) -> Report:
        """Begin a response about ``view``."""
        report = cls(request={"view": view, **request}, response={}, dry_run=dry_run)
        report.restart()
        return report

    def restart(self) -> None:
        """Forget what was undone, before it is tried again."""
        self.response.clear()
        self.follow_up.clear()
        self.source_state = None
        self.told(
            view=self.request["view"],
            sql=[],
            strategy=None,
            row_count_before=None,
            row_count_after=None,
            steps=[],
            waited_ms=self.waited_ms,
        )
        if self.dry_run:
            self.told(dry_run=True, locks=[], then=[])

    def so_far(self) -> int:
        """Return a mark for :meth:`forget_since`."""
        return len(self.response["sql"])

    def forget_since(self, mark: int) -> None:
        """Forget the statements after a mark, which were undone."""
        del self.response["sql"][mark:]
        del self.response["steps"][mark:]
        if self.dry_run:
            del self.response["locks"][mark:]

    @contextmanager
    def running(self, name: str, place: tuple[int, int] | None = None) -> Iterator[Step]:
        """Have :attr:`current` say what the block does."""
        step = self.current = Step(name, self.clock(), place)
        try:
            yield step
        finally:
            self.current = None

    def run(
        self,
        step: str,
        command: Command,
        place: tuple[int, int] | None = None,
        lock: Lock = Lock.NONE,
        *,
        on: Sequence[str] = (),
        harmless: bool = False,
    ) -> Work[None]:
        """Run a command and note its text and how long it took. A dry run only notes it.

        :param place: (i, n) where it is the i-th of n steps of its kind.
        :param lock: what it locks of what stands.
        :param on: descriptions of what it locks, where that is not the view alone.
        :param harmless: whether a dry run can carry it out, to see whether the server would refuse it: it takes no
            time and touches nothing but what this operation has made, which is rolled back.
        """
        self.response["sql"].append(command.text)
        if self.dry_run:
            self.response["locks"].append(f"{lock.value} on {', '.join(on)}" if on else lock.value)
            if not harmless:
                self.response["steps"].append({"step": step, "ms": None})
                return
        with self.running(step, place) as current:
            try:
                yield command
            finally:
                ms = round((self.clock() - current.begun) * 1000, 3)
                self.response["steps"].append({"step": step, "ms": ms})

    def later(self, step: str, command: Command) -> None:
        """Ask for a command after the operation has committed; its failure is not the operation's."""
        self.follow_up.append((step, command))
        if self.dry_run:
            self.response["then"].append(command.text)

    def told(self, **facts: Any) -> None:
        """Add to the response."""
        self.response.update(facts)

    def end(self, status: Status) -> ServiceResponse:
        """Return the finished response."""
        return ServiceResponse(status, self.request, self.response)

    def unfinished(self) -> ServiceResponse:
        """Return the response so far."""
        return ServiceResponse(None, self.request, self.response)
