"""A fleet on its connections: so many drivers as views are refreshed at a time, and one log that tells of all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from airflow_provider_matviews.exceptions import FleetFailed, InvalidDefinition, MatViewError
from airflow_provider_matviews.hooks.server import ServerHook
from airflow_provider_matviews.services import fleet as fleets
from airflow_provider_matviews.services.execute_async import AsyncDriver
from airflow_provider_matviews.services.fleet import Fleet, FleetResponse, NotBegun, Outcome
from airflow_provider_matviews.services.graph import Graph
from airflow_provider_matviews.services.instructions import Work
from airflow_provider_matviews.services.migrations import ensure_schema, explained
from airflow_provider_matviews.services.response import ServiceResponse, would_be
from airflow_provider_matviews.services.run import Terms
from airflow_provider_matviews.services.selection import Selection
from airflow_provider_matviews.services.sparing import Sparing
from airflow_provider_matviews.timeouts import Timeouts

#: More connections at a time would be a server's trouble rather than a fleet's gain.
_MOST_AT_ONCE = 100
_WORKERS = "max_parallel_workers_per_gather"


class _Log:
    """Says before each line which view it is about."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self.view = ""

    def info(self, message: str, *arguments: Any) -> None:
        self._log.info("%s: " + message, self.view, *arguments)

    def warning(self, message: str, *arguments: Any) -> None:
        self._log.warning("%s: " + message, self.view, *arguments)

    def debug(self, message: str, *arguments: Any) -> None:
        self._log.debug("%s: " + message, self.view, *arguments)


@dataclass
class _Slot:
    driver: AsyncDriver
    log: _Log


class FleetRun:
    """Refreshes several views over a hook's connections; see :meth:`MatViewHook.refresh_many`."""

    def __init__(self, hook: ServerHook, log: Any) -> None:
        self._hook = hook
        self._log = log
        self._slots: list[_Slot] = []
        self._begun = time.monotonic()

    async def run(
        self,
        views: Sequence[str] = (),
        *,
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        feeds: bool = False,
        needs: bool = False,
        stale: bool = False,
        at_once: int = 4,
        skip_unchanged: bool = False,
        max_staleness: float | None = None,
        ignore_windows: bool = False,
        deferral: str | None = None,
        dry_run: bool = False,
        **arguments: Any,
    ) -> FleetResponse:
        """Do it; the arguments are those of :meth:`MatViewHook.refresh_many` and :meth:`MatViewHook.refresh`."""
        if isinstance(at_once, bool) or not isinstance(at_once, int) or not 1 <= at_once <= _MOST_AT_ONCE:
            raise InvalidDefinition(f"at_once={at_once!r} is not a number of views from 1 to {_MOST_AT_ONCE}.")
        selection = Selection(views, schemas, exclude, feeds, needs, stale)
        # Which are stale is asked once, here.
        sparing = Sparing(skip_unchanged or stale, max_staleness, ignore_windows)
        limits = {name: arguments.pop(name) for name in Timeouts.names() if name in arguments}
        arguments |= {
            "skip_unchanged": skip_unchanged,
            "max_staleness": max_staleness if skip_unchanged else None,
            "ignore_windows": ignore_windows,
            "dry_run": dry_run,
            "timeouts": Timeouts(**limits),
        }
        # Refused here, once, and not by every view.
        (await self._hook._aside(lambda: self._hook._operations_for(None).refresh("checked", **arguments))).close()
        terms = Terms(
            request={"skip_unchanged": skip_unchanged, "max_staleness": max_staleness},
            context=self._hook.context,
            session_settings=dict(arguments.get("session_settings") or {}),
        )
        try:
            fleet = await self._alone(lambda: self._muster(selection, sparing, terms, dry_run))
            self._tell_plan(fleet, at_once)
            at_once = min(at_once, max(1, len(fleet.needs) - len(fleet.outcomes)))

            async def refresh(view: str) -> ServiceResponse:
                return await self._refresh(fleet, view, deferral, at_once, arguments)

            await fleets.carry_out(
                fleet, refresh, at_once=at_once, tell=lambda outcome: self._tell(fleet, outcome, dry_run)
            )
            if not dry_run and fleet.with_status("stopped"):
                try:
                    await self._alone(lambda: fleets.record_stopped(self._hook._ledger, fleet, terms))
                except psycopg.OperationalError as error:
                    self._log.warning("What was not begun could not be recorded: %s", type(error).__name__)
        finally:
            for slot in self._slots:
                await slot.driver.close()
        return self._conclude(fleet, dry_run)

    def _muster(self, selection: Selection, sparing: Sparing, terms: Terms, dry_run: bool) -> Work[Fleet]:
        ledger = self._hook._ledger
        if not dry_run:
            yield from ensure_schema(ledger.tracking_schema)
        mustering = fleets.muster(ledger, selection, sparing, terms, dry_run=dry_run)
        return (yield from explained(ledger.tracking_schema, mustering))

    async def _alone(self, make: Any) -> Any:
        slot = self._slot("fleet")
        with self._hook._known(slot.driver):
            result = await slot.driver.run(await self._hook._aside(make))
        self._slots.append(slot)
        return result

    def _slot(self, view: str) -> _Slot:
        """Return a driver that nobody uses, with the connections that it has by now."""
        if self._slots:
            slot = self._slots.pop()
        else:
            log = _Log(self._log)
            slot = _Slot(AsyncDriver(self._hook._aopen, log, redact=self._hook.redact), log)
        slot.log.view = view
        return slot

    async def _refresh(
        self, fleet: Fleet, view: str, deferral: str | None, at_once: int, arguments: dict[str, Any]
    ) -> ServiceResponse:
        settings = dict(arguments.get("session_settings") or {})
        known = fleet.definitions.get(view)
        if at_once > 1 and not (known is not None and _WORKERS in known.session_settings):
            settings.setdefault(_WORKERS, 0)
        manners = {**arguments, "session_settings": settings}
        if deferral is not None:
            manners["deferral"] = f"{deferral} {view}"
        remaining = self._remaining()
        work = self._hook._operations_for(remaining).refresh(view, **manners)
        slot = self._slot(view)
        try:
            with self._hook._known(slot.driver):
                response = await slot.driver.run(work)
        except (Exception, asyncio.CancelledError) as error:
            # It may have been stopped, which it remembers.
            await slot.driver.close()
            if isinstance(error, Exception) and had_no_room(error):
                raise fleets.NoRoom(f"no connection to the server could be opened for it ({error})") from error
            raise
        self._slots.append(slot)
        return response

    def _remaining(self) -> float | None:
        if self._hook.longest is None:
            return None
        remaining = self._hook.longest - (time.monotonic() - self._begun)
        if remaining < 0.001:
            given = self._hook.given or self._hook.longest
            raise NotBegun(f"all the time that was given ({given:.4g} s) was over")
        return remaining

    def _tell_plan(self, fleet: Fleet, at_once: int) -> None:
        left = len(fleet.outcomes)
        count = len(fleet.needs) - left
        if left:
            self._log.info("%s unchanged, and left alone.", _views(left, "is", "are"))
        if not fleet.needs:
            self._log.info("No view is to be refreshed.")
        if count:
            levels = len(_levels(fleet))
            self._log.info(
                "%s to be refreshed, on %s level%s, %s at a time.",
                _views(count, "is", "are"),
                levels,
                "" if levels == 1 else "s",
                at_once,
            )

    def _tell(self, fleet: Fleet, outcome: Outcome, dry_run: bool) -> None:
        place = f"[{len(fleet.outcomes)}/{len(fleet.needs)}]"
        reason = self._hook.redact(outcome.reason or "")
        if outcome.status in ("failed", "stopped"):
            self._log.warning("%s %s %s: %s", place, outcome.view, outcome.status, reason)
        else:
            status = would_be(outcome.status) if dry_run else outcome.status
            self._log.info("%s %s %s", place, outcome.view, status)

    def _conclude(self, fleet: Fleet, dry_run: bool) -> FleetResponse:
        outcomes = tuple(fleet.outcomes[view] for view in fleet.needs)
        result = FleetResponse(outcomes, time.monotonic() - self._begun, dry_run)
        self._log.info("%s", result.story())
        if result.outcomes:
            self._log.info("::group::What came of each view")
            for line in result.table():
                self._log.info("%s", self._hook.redact(line))
            self._log.info("::endgroup::")
        if fleet.with_status("failed", "stopped"):
            raise self._failure(fleet, result)
        return result

    def _failure(self, fleet: Fleet, result: FleetResponse) -> FleetFailed:
        failed, stopped = fleet.with_status("failed"), fleet.with_status("stopped")
        told = [f"{view}: {fleet.outcomes[view].headline}" for view in (failed or stopped)[:5]]
        if len(failed or stopped) > 5:
            told.append(f"and {len(failed or stopped) - 5} more")
        left = f"{len(stopped)} more were" if failed else f"{len(stopped)} of {_views(len(fleet.needs))} were"
        parts = [f"{len(failed)} of {_views(len(fleet.needs))} could not be refreshed"] if failed else []
        parts += [f"{left} left as they are"] if stopped else []
        error = FleetFailed(
            self._hook.redact(f"{', and '.join(parts)}. {'; '.join(told)}"),
            failed=failed,
            stopped=stopped,
            hint="see the table in the log, and the run rows; run again: skip_unchanged=True spares the others.",
        )
        error.result = result
        return error


def had_no_room(error: Exception) -> bool:
    """Whether a view was not begun because the server had no connection left for it."""
    # A connection that was refused has no SQLSTATE (53300), and the words are the server's own; but nothing had begun.
    return (
        isinstance(error, psycopg.OperationalError)
        and not isinstance(error, MatViewError)
        and getattr(error, "response", None) is None
        and error.sqlstate is None
    )


def _levels(fleet: Fleet) -> list[tuple[str, ...]]:
    waiting = {view: needs - fleet.outcomes.keys() for view, needs in fleet.needs.items() if view not in fleet.outcomes}
    return Graph({}, waiting).levels


def _views(count: int, singular: str = "", plural: str = "") -> str:
    verb = singular if count == 1 else plural
    return f"{count} view{'' if count == 1 else 's'}{f' {verb}' if verb else ''}"
