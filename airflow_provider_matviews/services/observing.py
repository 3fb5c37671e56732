"""Operations that are watched: how each ended, how long it waited for others, how old the view's rows had become.

What is told of it, and to whom, is the business of whoever asks: metrics, lineage. Nothing of what is read here for
them can fail an operation, and nothing is read that nobody wants.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import MatViewError
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import lineage
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.instructions import Pause, Result, Work
from airflow_provider_matviews.services.ledger import Operation
from airflow_provider_matviews.services.lineage import ViewLineage
from airflow_provider_matviews.services.operations import Operations, Service
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.services.run import Prepared

_T = TypeVar("_T")
#: What is waited for here, another holder of a lock ends.
_NOT_HAD = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)


@dataclass
class Ended:
    """How one operation ended.

    :ivar operation: ``create``, ``refresh`` or ``drop``.
    :ivar view: its name as in a response, or as it was given where the operation never came to look.
    :ivar seconds: from beginning to end, by the monotonic clock.
    :ivar waited: seconds of that in which others were waited for: another operation on the view, and attempts to lock
        that were given up, with the pauses between them.
    :ivar lag: seconds since the fill before, when the new rows came; None where nothing was filled, or never before.
    :ivar response: None where it failed before there was one.
    :ivar error: None where it did not fail.
    :ivar lineage: what the view reads; None where nobody asked, or it could not be read.
    :ivar again: whether another copy of the same deferred operation had done it, and told of it where it ran.
    """

    operation: str
    view: str
    seconds: float = 0.0
    waited: float = 0.0
    lag: float | None = None
    response: ServiceResponse | None = None
    error: BaseException | None = None
    lineage: ViewLineage | None = None
    again: bool = False

    @property
    def status(self) -> str:
        """As in a response; ``failed`` where there was an error."""
        if self.error is not None or self.response is None:
            return "failed"
        return self.response.status or "failed"


@dataclass(frozen=True)
class ObservedOperations(Operations):
    """Operations that tell how they ended, each of them once, however it is run.

    :param tell: is told of each that has ended, in the thread or event loop that runs it. Not of a dry run.
    :param wants_lag: whether to ask for the fill before.
    :param wants_lineage: whether to read what the view reads.
    :param passes_over: errors after which the operation is tried again by whoever runs it.
    """

    tell: Callable[[Ended], None] | None = None
    wants_lag: bool = False
    wants_lineage: bool = False
    passes_over: Callable[[Exception], bool] | None = None

    def _recorded(
        self,
        operation: Operation,
        view_or_definition: str | MatViewDefinition,
        service: Service,
        request: Mapping[str, Any],
        **manners: Any,
    ) -> Work[ServiceResponse]:
        if self.tell is None or manners.get("dry_run"):
            return super()._recorded(operation, view_or_definition, service, request, **manners)
        watch = _Watch(self, operation)
        work = super()._recorded(operation, view_or_definition, watch.around(service), request, **manners)
        # Its arguments have been looked at by now.
        name = view_or_definition if isinstance(view_or_definition, str) else view_or_definition.name
        return watch.over(work, str(ViewName.parse(name)))


class _Watch:
    """Watches one operation from the outside (:meth:`over`) and from within (:meth:`around`)."""

    def __init__(self, operations: ObservedOperations, operation: Operation) -> None:
        self._operations = operations
        self._operation = operation
        self._ended = Ended(operation.word, "")
        self._view: ResolvedName | None = None
        self._filled_before: datetime | None = None
        self._waits = True

    def around(self, service: Service) -> Service:
        def watched(prepared: Prepared) -> Work[ServiceResponse]:
            # It may be attempted more than once.
            if self._view is None:
                if self._operations.wants_lag and self._operation is not Operation.DROP and prepared.record.id:
                    self._filled_before = yield from _unless_it_fails(
                        lambda: self._operations.ledger.last_filled(prepared.record.id)
                    )
                if self._operations.wants_lineage and self._operation is Operation.DROP:
                    self._ended.lineage = yield from _unless_it_fails(lambda: lineage.read(prepared.view))
            self._view = prepared.view
            return (yield from service(prepared))

        return watched

    def over(self, work: Work[ServiceResponse], view: str) -> Work[ServiceResponse]:
        ended, begun = self._ended, time.monotonic()
        ended.view = view
        try:
            response = yield from self._timed(work)
        except GeneratorExit:
            raise
        except BaseException as error:
            ended.error = error
            passes_over = self._operations.passes_over
            if passes_over is not None and isinstance(error, Exception) and passes_over(error):
                raise
            so_far = getattr(error, "response", None)
            self._conclude(so_far if isinstance(so_far, ServiceResponse) else None, begun)
            if isinstance(error, Exception) and not isinstance(error, psycopg.OperationalError):
                yield from self._read_lineage()
            self._tell()
            raise
        ended.again = response.status != "skipped" and self._view is None
        self._conclude(response, begun)
        if response.status != "skipped":
            yield from self._read_lineage()
        self._tell()
        return response

    def _conclude(self, response: ServiceResponse | None, begun: float) -> None:
        ended = self._ended
        ended.response, ended.seconds = response, time.monotonic() - begun
        if response is not None:
            ended.view = response.response["view"]
            if response.status == "updated" and self._filled_before is not None:
                ended.lag = max(0.0, (datetime.now(UTC) - self._filled_before).total_seconds())

    def _read_lineage(self) -> Work[None]:
        if not self._operations.wants_lineage or self._operation is Operation.DROP:
            return
        view = self._view
        if view is None and self._ended.again:
            name = ViewName.parse(self._ended.view)
            view = ResolvedName(name.schema or "public", name.name, self._ended.view)
        if view is not None:
            self._ended.lineage = yield from _after_all(lambda: lineage.read(view))

    def _tell(self) -> None:
        assert self._operations.tell is not None
        with suppress(Exception):
            self._operations.tell(self._ended)

    def _timed(self, work: Work[_T]) -> Work[_T]:
        """Carry out a work as it is, and add up what it spends on waiting."""
        result, error = Result(), None
        while True:
            try:
                if error is not None:
                    instruction = work.throw(error)
                elif inspect.getgeneratorstate(work) == inspect.GEN_CREATED:
                    instruction = next(work)
                else:
                    instruction = work.send(result)
            except StopIteration as stop:
                value: _T = stop.value
                return value
            error, asked = None, time.monotonic()
            try:
                result = yield instruction
            except GeneratorExit:
                work.close()
                raise
            except BaseException as raised:
                error = raised
                if isinstance(raised, _NOT_HAD):
                    self._wait_since(asked)
                elif isinstance(raised, psycopg.OperationalError):
                    # What it pauses for now is a server that is gone.
                    self._waits = False
            else:
                if isinstance(instruction, Pause):
                    self._wait_since(asked)

    def _wait_since(self, moment: float) -> None:
        if self._waits:
            self._ended.waited += time.monotonic() - moment


def _unless_it_fails(read: Callable[[], Work[_T | None]]) -> Work[_T | None]:
    """Read something that the operation can do without. That it is to be stopped it has to hear."""
    try:
        return (yield from read())
    except psycopg.Error as error:
        if isinstance(error, MatViewError):
            raise
        return None


def _after_all(read: Callable[[], Work[_T | None]]) -> Work[_T | None]:
    """Read something when the operation has ended, which nothing changes any more, nor that it is to be stopped now."""
    try:
        return (yield from read())
    except psycopg.Error:
        return None


def runs_query(tracking_schema: str, run_ids: Sequence[int]) -> str:
    """Return a statement, for a person, that shows some runs."""
    history = sql.Identifier(tracking_schema, "mat_view_run_history")
    ids = sql.SQL(", ").join(sql.Literal(run_id) for run_id in run_ids)
    return sql.SQL("SELECT * FROM {} WHERE id IN ({});").format(history, ids).as_string(None)
