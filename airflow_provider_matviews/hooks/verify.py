"""Views compared with their queries over a hook's connections, one after the other, and one log that tells of all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import psycopg

from airflow_provider_matviews.checks import as_tuple, check_session_settings, choice
from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import MatViewError, OperationCancelled, OperationTimedOut
from airflow_provider_matviews.hooks.server import ServerHook
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import fleet as fleets
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.fleet import Fleet
from airflow_provider_matviews.services.instructions import Work
from airflow_provider_matviews.services.ledger import DefinitionRecord, Ledger
from airflow_provider_matviews.services.plan_steps import Plan
from airflow_provider_matviews.services.run import Subject, Terms
from airflow_provider_matviews.services.selection import Selection
from airflow_provider_matviews.services.sparing import Sparing
from airflow_provider_matviews.services.timings import time_view
from airflow_provider_matviews.services.verification import (
    Scope,
    Timing,
    Verdict,
    Verification,
    VerificationReport,
    VerifyMode,
    check_rounds,
    table,
    timings_table,
)
from airflow_provider_matviews.services.verify import verify_view
from airflow_provider_matviews.timeouts import Timeouts


class VerificationRun:
    """Makes the works of :meth:`MatViewHook.verify` and its like, and carries them out for several views.

    :param limits: lock_timeout, max_wait, statement_timeout and timeout, in seconds, each for one view.
    :raises InvalidDefinition: when an argument is nothing of what it should be.
    """

    def __init__(
        self,
        hook: ServerHook,
        *,
        mode: VerifyMode | str = VerifyMode.EXACT,
        sample: int = 1000,
        seed: int = 0,
        examples: int = 5,
        rounds: int = 0,
        session_settings: Mapping[str, Any] | None = None,
        **limits: float | None,
    ) -> None:
        self._hook = hook
        self._scope = Scope(choice(VerifyMode, mode, "mode"), sample, seed, examples)
        self._rounds = check_rounds(rounds, 0)
        self._settings = check_session_settings(session_settings or {})
        self._timeouts = Timeouts(**limits)
        self._begun = time.monotonic()

    def verifying(self, subject: Subject) -> Work[Verification]:
        """Return the work of verifying one view."""
        definition, hook = subject.definition, self._hook

        def plan() -> Work[Plan]:
            assert definition is not None
            return (yield from hook._operations.plan(definition))

        return verify_view(subject, hook._ledger, self._terms(), self._scope, None if definition is None else plan)

    def timing(self, subject: Subject) -> Work[Timing]:
        """Return the work of timing one view."""
        return time_view(subject, self._hook._ledger, self._terms(), self._rounds)

    async def verify_many(
        self,
        views: Sequence[str],
        *,
        schemas: Sequence[str],
        exclude: Sequence[str],
        definitions: Sequence[MatViewDefinition] = (),
    ) -> VerificationReport:
        """Do as :meth:`MatViewHook.verify_many` says."""
        found: list[Verification] = []
        timings: list[Timing] = []
        for subject in await self._subjects(views, schemas, exclude, definitions):
            found.append(await self._verify(subject))
            if self._rounds and found[-1].verdict not in (Verdict.FAILED, Verdict.UNPOPULATED):
                timings.append(await self._time(subject))
        report = VerificationReport(tuple(found), time.monotonic() - self._begun, tuple(timings))
        self._conclude(report)
        return report

    async def time_many(
        self, views: Sequence[str], *, schemas: Sequence[str], exclude: Sequence[str]
    ) -> tuple[Timing, ...]:
        """Do as :meth:`MatViewHook.compare_timings` says."""
        return tuple([await self._time(subject) for subject in await self._subjects(views, schemas, exclude, ())])

    async def _subjects(
        self,
        views: Sequence[str],
        schemas: Sequence[str],
        exclude: Sequence[str],
        definitions: Sequence[MatViewDefinition],
    ) -> list[Subject]:
        definitions = as_tuple(definitions, "definitions", (MatViewDefinition,))
        selection = Selection(
            (*as_tuple(views, "views", (str,)), *(str(each.view) for each in definitions)), schemas, exclude
        )

        def muster() -> Work[Fleet]:
            return fleets.muster(_Unread("matviews"), selection, Sparing(), self._terms(), dry_run=True)

        fleet = await self._hook._arun(muster)
        subjects = [
            Subject(ViewName(view.name, view.schema), _definition_of(view, definitions))
            for view in map(fleet.views.__getitem__, fleet.needs)
        ]
        self._hook.log.info("%s to be verified.", f"{len(subjects)} view{'' if len(subjects) == 1 else 's'}")
        return subjects

    async def _verify(self, subject: Subject) -> Verification:
        begun = time.monotonic()
        try:
            return await self._hook._arun(lambda: self.verifying(subject))
        except (MatViewError, psycopg.Error, NotBegun) as error:
            reason = self._told(error)
        view = str(subject.name) if subject.name.schema != "public" else str(ViewName(subject.name.name))
        self._hook.log.warning("%s: %s", view, self._hook.redact(reason))
        return Verification(view, Verdict.FAILED, reason, self._scope.mode, seconds=time.monotonic() - begun)

    async def _time(self, subject: Subject) -> Timing:
        try:
            return await self._hook._arun(lambda: self.timing(subject))
        except (MatViewError, psycopg.Error, NotBegun) as error:
            reason = self._told(error)
        view = str(subject.name) if subject.name.schema != "public" else str(ViewName(subject.name.name))
        self._hook.log.warning("%s could not be timed: %s", view, self._hook.redact(reason))
        return Timing(view, reason=reason)

    def _told(self, error: Exception) -> str:
        """Return why a view could not be verified; raise what ends all of it."""
        if isinstance(error, OperationCancelled) and not isinstance(error, OperationTimedOut):
            raise error
        primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
        if primary is not None and isinstance(error, psycopg.Error) and not self._scope.examples:
            # It may hold values: invalid input syntax for type integer: "...".
            primary = f"PostgreSQL: {type(error).__name__} (SQLSTATE {error.sqlstate}); examples=0 keeps its words back"
        message = error.message if isinstance(error, MatViewError) else primary or str(error) or type(error).__name__
        return "\n".join([message, *getattr(error, "__notes__", ()), *_hint(error)])

    def _terms(self) -> Terms:
        longest = self._hook.longest
        if longest is not None:
            longest -= time.monotonic() - self._begun
            if longest < 0.001:
                raise NotBegun(f"not begun, for all the time that was given ({self._hook.longest:.4g} s) was over")
        return Terms(
            timeouts=self._timeouts,
            session_settings=self._settings,
            longest=longest,
            given=self._hook.given or self._hook.longest,
        )

    def _conclude(self, report: VerificationReport) -> None:
        log = self._hook.log
        counts = [f"{report.count(verdict)} {verdict.value}" for verdict in Verdict if report.count(verdict)]
        log.info("%s in %.2f s.", ", ".join(counts) or "Nothing verified", report.seconds)
        if report.verifications:
            log.info("::group::What came of each view")
            told = report.as_dict(self._hook.redact)
            for line in [*table(told), *(timings_table(told["timings"]) if report.timings else ())]:
                log.info("%s", line)
            log.info("::endgroup::")


class _Unread(Ledger):
    """A record of nothing: the order of views is nothing to a comparison, and the role may not read the record."""

    def definitions(self) -> Work[list[DefinitionRecord]]:
        """Return nothing."""
        yield from ()
        return []


class NotBegun(Exception):
    """A view's turn came when time was up; the message says so."""


def _definition_of(view: ResolvedName, definitions: Sequence[MatViewDefinition]) -> MatViewDefinition | None:
    named = [each for each in definitions if each.view.name == view.name and each.view.schema in (None, view.schema)]
    return next(iter(sorted(named, key=lambda each: each.view.schema is None)), None)


def _hint(error: Exception) -> list[str]:
    return [f"To mend it: {error.hint}"] if isinstance(error, MatViewError) and error.hint else []
