"""One recorded operation: what wraps a service so that the record never lies.

In one transaction: take the view's lock, insert the run as ``running`` on a second connection, do the
operation, and set the run to ``success``; all of that commits together. Whatever ends the process in between
leaves the view as it was and a ``running`` row whose lock is free, which the next operation marks as failed.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import sql

from airflow_provider_matviews.definition import IfLocked, MatViewDefinition, ParameterValue, RefreshStrategy
from airflow_provider_matviews.exceptions import InvalidDefinition, MatViewError, UnsupportedServer, ViewLocked
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.advice import advise
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts
from airflow_provider_matviews.services.instructions import (
    Alone,
    Command,
    Deadline,
    Note,
    Pause,
    Session,
    Watch,
    Work,
    fetch_all,
)
from airflow_provider_matviews.services.ledger import DefinitionRecord, Ledger, Operation, RunStatus
from airflow_provider_matviews.services.locking import Patience, politely, take_view_lock
from airflow_provider_matviews.services.migrations import explained
from airflow_provider_matviews.services.plan_steps import Lock
from airflow_provider_matviews.services.progress import Progress
from airflow_provider_matviews.services.response import Report, ServiceResponse, would_be
from airflow_provider_matviews.services.retention import retain
from airflow_provider_matviews.services.session_settings import apply_settings
from airflow_provider_matviews.timeouts import Timeouts

MINIMUM_VERSION = 140000

#: Generous: what waits here has done its work already and would lose it.
_RECORD_LOCK_TIMEOUT = sql.Literal("30s")

#: Seconds before each attempt to record a failure: a server that crashed or failed over is back after some.
_AGAIN_AFTER = (0.0, 0.0, 0.5, 1.0, 2.0, 4.0)
#: Seconds after which no further attempt is made: connecting to what does not answer takes its own time.
_LONGEST_RECORDING = 15.0

#: How soon the server notices that the client's whole machine is gone, which closes no connection.
KEEPALIVES = sql.SQL(
    "set_config('tcp_keepalives_idle', '30', true), set_config('tcp_keepalives_interval', '10', true), "
    "set_config('tcp_keepalives_count', '3', true)"
)

#: How soon the server notices that the client is gone. Without it a killed worker's REFRESH runs on to its
#: end, holding its locks (measured). Takes effect from PostgreSQL 14, and where the server's system can tell.
CONNECTION_CHECK = sql.SQL(
    "set_config('client_connection_check_interval', CASE WHEN version() ~* 'linux' OR (version() !~* "
    "'mingw|visual c|msvc' AND current_setting('server_version_num')::integer >= 150000) THEN '2s' ELSE '0' END, {})"
)
#: How long a client that hangs (a virtual machine that is paused) may keep its locks between two statements. Longer
#: than any wait of the record's connection for which the work has to stand still.
_IDLE_IN_TRANSACTION = sql.SQL("set_config('idle_in_transaction_session_timeout', '2min', true)")


@dataclass(frozen=True)
class Subject:
    """What an operation is about: a view by its name, and its definition where one is at hand."""

    name: ViewName
    definition: MatViewDefinition | None = None


@dataclass(frozen=True)
class Prepared:
    """What a service is given when its turn has come.

    :ivar origin: the name that the view has, which is another one where it is to be renamed.
    """

    view: ResolvedName
    origin: ResolvedName
    server: ServerFacts
    record: DefinitionRecord
    report: Report
    patience: Patience


@dataclass(frozen=True)
class Terms:
    """How an operation is to be run.

    :ivar request: what was asked, for the record.
    :ivar context: whose task it is (dag_id, task_id, ...), for the record.
    :ivar session_settings: go before those of the definition.
    :ivar timeouts: go before those of the definition.
    :ivar longest: seconds that it may take in all, whatever the timeouts say.
    :ivar given: seconds of which ``longest`` is what is left, for the story.
    :ivar deferral: what all copies of one deferred operation have in common: where one has ended well, the next
        takes its result, and where one still runs, the next waits for it whatever ``if_locked`` says.
    """

    if_locked: IfLocked = IfLocked.WAIT
    timeouts: Timeouts = field(default_factory=Timeouts)
    request: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    session_settings: Mapping[str, ParameterValue] = field(default_factory=dict)
    longest: float | None = None
    deferral: str | None = None
    given: float | None = None

    @property
    def time_limit(self) -> float | None:
        """Seconds that it may take in all."""
        return min((each for each in (self.timeouts.timeout, self.longest) if each is not None), default=None)

    @property
    def patience(self) -> Patience:
        """How long it waits for locks."""
        return Patience.of(self.timeouts)


def record_run(
    operation: Operation,
    subject: Subject,
    ledger: Ledger,
    terms: Terms,
    service: Callable[[Prepared], Work[ServiceResponse]],
) -> Work[ServiceResponse]:
    """Run a service as one recorded operation.

    :returns: the service's response, with the id of its run row; ``skipped`` where another operation on the
        view was running and ``if_locked="skip"``.
    :raises UnsupportedServer: when the server cannot take this operation; nothing is recorded then.
    :raises MissingPrivilege: when the role may not use the run tables; nothing is recorded then.
    :raises ViewLocked: when another operation on the view was running, for as long as the terms allow.
    :raises BaseException: what the service raised, once the run row says so.
    """
    begun = time.monotonic()
    yield from _set_deadline(terms, begun)
    try:
        view, server = yield from _begin(operation, subject, terms)
        known = yield from explained(ledger.tracking_schema, ledger.definition(view))
        terms = yield from _with_timeouts_of(subject, known, terms, begun)
        report = Report.on(view.display, dict(terms.request))

        def begin_again() -> Work[None]:
            nonlocal server
            # Behind a pooler perhaps in another session.
            _, server = yield from _begin(operation, subject, terms)

        former = _former_name(operation, subject, view)
        waited = yield from take_view_lock(view, terms.if_locked, terms.patience, begin_again, terms.deferral, former)
        if terms.deferral is not None and (earlier := (yield from _earlier_copy(terms.deferral, view, ledger))):
            yield from _roll_back()
            return earlier
        if waited is None:
            standing_back = _stand_back(operation, view, former, known, ledger, terms, report, begun)
            return (yield from explained(ledger.tracking_schema, standing_back))
        report.waited_ms = round(waited * 1000)
        # Whoever went before may have declared it, dropped it, or given its row to a view of another name.
        known = yield from ledger.definition(view)
        origin = yield from _origin(view, former)
        renamed = None if origin is view else (yield from ledger.definition(origin))
        starting = _start(operation, view, renamed or known, subject, ledger, terms, meta_of(report, terms))
        record, run_id = yield from explained(ledger.tracking_schema, starting)
        prepared = Prepared(view, origin, server, _in_force(record, subject), report, terms.patience)
        watched = Progress(view, operation, server.pid, report, begun, lambda: ledger.past_refreshes(record.id))
        yield Watch(watched.line)

        def declared(status: RunStatus) -> Work[None]:
            if origin is not view and status is not RunStatus.SUCCESS:
                return  # It still has its former name.
            if renamed is not None:
                yield from explained(ledger.tracking_schema, ledger.rename(renamed, view))
            # Only now: a definition that was refused is not what the view should be.
            if subject.definition is not None:
                yield from ledger.declare(view, subject.definition, record if origin is view else None)

        return (yield from _carry_out(service, declared, prepared, record, run_id, ledger, terms, begun))
    except BaseException as error:
        advise(error)
        yield from _roll_back()
        raise


def _former_name(operation: Operation, subject: Subject, view: ResolvedName) -> ResolvedName | None:
    if operation is not Operation.CREATE or subject.definition is None or subject.definition.renamed_from is None:
        return None
    former = catalog.former_name(subject.definition.renamed_from, view)
    if (former.schema, former.name) == (view.schema, view.name):
        raise InvalidDefinition(
            f"{view.display} is declared as renamed from itself: renamed_from={subject.definition.renamed_from!r} "
            f"means {former.ddl} here.",
            hint="name the schema that it was in; without one, renamed_from means the schema that it is to be in.",
        )
    return former


def _origin(view: ResolvedName, former: ResolvedName | None) -> Work[ResolvedName]:
    """Return the name that a view has: the former one where that stands and the new one does not."""
    if former is None:
        return view
    new, old = yield from catalog.kinds_of(view, former)
    if old == catalog.MATERIALIZED_VIEW:
        if new is None:
            return former
        yield Note(
            f"renamed_from is passed over: {former.display} stands, and so does {view.display} already.", warning=True
        )
    elif old is not None and new is None:
        # Not refused: whoever made it may have done so long after the rename.
        yield Note(f"renamed_from is passed over: {former.display} is {old}, which is left alone.", warning=True)
    return view


def rehearse_run(
    operation: Operation,
    subject: Subject,
    ledger: Ledger,
    terms: Terms,
    service: Callable[[Prepared], Work[ServiceResponse]],
    *,
    quiet: bool = False,
) -> Work[ServiceResponse]:
    """Find out what a recorded operation would do, statement by statement, and do nothing.

    What takes no time and touches nothing that stands is carried out and rolled back, so that what the server would
    refuse shows. Nothing is recorded. Neither another operation nor a reader is waited for, only who keeps even readers
    off something that has to be read.

    :param quiet: does not tell the statements.
    :returns: the response that there would be, as far as it can be told; ``sql`` and ``locks`` go together.
    :raises UnsupportedServer: when the server cannot take this operation.
    :raises MatViewError: what the operation would be refused for.
    :raises psycopg.Error: what PostgreSQL says.
    """
    begun = time.monotonic()
    yield from _set_deadline(terms, begun)
    try:
        view, server = yield from _begin(operation, subject, terms)
        known = yield from _glance(view, subject, ledger)
        terms = yield from _with_timeouts_of(subject, known, terms, begun)
        origin = yield from _origin(view, _former_name(operation, subject, view))
        report = Report.on(view.display, dict(terms.request), dry_run=True)
        record = _in_force(known or _unknown(view), subject)
        prepared = Prepared(view, origin, server, record, report, terms.patience)
        try:
            response = yield from politely(origin, terms.patience, lambda: _attempt(service, prepared, terms))
        except BaseException as error:
            advise(error, view, server.role)
            _attach(error, report.unfinished())
            raise
    except BaseException as error:
        advise(error)
        yield from _roll_back()
        raise
    yield from _roll_back()
    if not quiet:
        yield from _tell_rehearsal(response)
    return response


def _glance(view: ResolvedName, subject: Subject, ledger: Ledger) -> Work[DefinitionRecord | None]:
    if subject.definition is None:
        # How it is refreshed and whether it is ours to drop is only recorded.
        return (yield from explained(ledger.tracking_schema, ledger.glance(view)))
    try:
        return (yield from ledger.glance(view))
    except psycopg.errors.InsufficientPrivilege as error:
        yield Note(f"The record cannot be read, and is not needed for this: {error.diag.message_primary}.")
        return None


def _unknown(view: ResolvedName) -> DefinitionRecord:
    now = datetime.now(UTC)
    return DefinitionRecord(
        0, view.display, view.schema, view.name, None, RefreshStrategy.AUTO, (), False, {}, now, now
    )


def _tell_rehearsal(response: ServiceResponse) -> Work[None]:
    facts = response.response
    if response.status == "skipped" or response.status is None:
        yield Note(f"Dry run: nothing would be done ({facts.get('reason', 'nothing to do')}).")
        return
    count = len(facts["sql"])
    yield Note(
        f"Dry run: {facts['view']} {would_be(response.status)} by {count} statement{'' if count == 1 else 's'}, "
        "in one transaction. Nothing was changed."
    )
    for statement, lock in zip(facts["sql"], facts["locks"], strict=True):
        yield Note(f"  [lock: {lock}] {statement};")
    for statement in facts["then"]:
        # VACUUM and ANALYZE take the same one (https://www.postgresql.org/docs/current/explicit-locking.html).
        yield Note(f"  [after COMMIT, lock: {Lock.SHARE_UPDATE_EXCLUSIVE}] {statement};")


def _set_deadline(terms: Terms, begun: float) -> Work[None]:
    if (seconds := terms.time_limit) is not None:
        given = terms.given if terms.given is not None and seconds == terms.longest else seconds
        yield Deadline(begun + seconds, given)


def _with_timeouts_of(subject: Subject, known: DefinitionRecord | None, terms: Terms, begun: float) -> Work[Terms]:
    """Return the terms with the limits of the view's definition where the call says nothing."""
    if subject.definition is not None:
        declared = Timeouts.of(subject.definition.timeouts)
    else:
        declared = Timeouts.of(known.timeouts) if known else Timeouts()
    timeouts = terms.timeouts.over(declared)
    if timeouts == terms.timeouts:
        return terms
    terms = replace(terms, timeouts=timeouts)
    yield from _set_deadline(terms, begun)
    yield from fetch_all(sql.SQL("SELECT {}").format(limits_of(terms)))
    return terms


def _earlier_copy(deferral: str, view: ResolvedName, ledger: Ledger) -> Work[ServiceResponse | None]:
    """Return the result of another copy of this deferred operation, where one has ended well."""
    ended = yield from ledger.ended_well(deferral)
    if ended is None:
        return None
    run_id, duration, meta = ended
    # The name as it is, and not without what looks like a secret in it.
    response = {**meta["response"], "view": view.display}
    status = response.pop("status")
    yield Note(
        f"Run {run_id}, begun by this very task before its triggerer was lost, has ended well: {status} "
        f"{view.display} in {duration / 1000:.2f} s. Nothing is done twice."
    )
    return ServiceResponse(status, meta["request"], response, run_id, duration)


def limits_of(terms: Terms) -> sql.Composable:
    """Return the expressions that set the limits of an operation's transaction."""
    lock_timeout = sql.Literal(f"{round(terms.patience.lock_timeout * 1000)}ms")
    limits = sql.SQL("set_config('lock_timeout', {}, true)").format(lock_timeout)
    said = terms.timeouts.statement_timeout
    # The server's own clock, too: it counts where the client hangs. A second later, for the client says why.
    longest = [each for each in (said, terms.time_limit and terms.time_limit + 1) if each is not None]
    if not longest:
        return limits
    value: sql.Composable = sql.Literal(f"{max(1, round(min(longest) * 1000))}")
    if said is None:
        # What is set for the role, the database or the connection stands where it is shorter.
        value = sql.SQL(
            "(SELECT least(nullif(setting::bigint, 0), {}::bigint)::text FROM pg_catalog.pg_settings "
            "WHERE name = 'statement_timeout')"
        ).format(value)
    return sql.SQL("{}, set_config('statement_timeout', {}, true)").format(limits, value)


def _begin(operation: Operation, subject: Subject, terms: Terms) -> Work[tuple[ResolvedName, ServerFacts]]:
    yield Command(sql.SQL("BEGIN ISOLATION LEVEL READ COMMITTED"))
    settings = sql.SQL(", ").join(
        [limits_of(terms), _IDLE_IN_TRANSACTION, CONNECTION_CHECK.format(sql.SQL("true")), KEEPALIVES]
    )
    server, view = yield from catalog.arrive(subject.name, creating=operation is Operation.CREATE, settings=settings)
    if server.in_recovery or server.read_only:
        what = "is a standby: it takes no writes" if server.in_recovery else "is set to read-only transactions"
        raise UnsupportedServer(
            f"The server of database {server.database} {what}, so nothing can be created, refreshed or dropped there.",
            hint="point the connection at the primary (target_session_attrs=read-write among several hosts)."
            if server.in_recovery
            else "unset default_transaction_read_only for this role, database or connection.",
        )
    return view, server


def _start(
    operation: Operation,
    view: ResolvedName,
    known: DefinitionRecord | None,
    subject: Subject,
    ledger: Ledger,
    terms: Terms,
    meta: dict[str, Any],
) -> Work[tuple[DefinitionRecord, int]]:
    record = yield from _record_of(view, known, subject, ledger, terms.patience)
    run_id, orphans = yield from ledger.start(record.id, operation, meta)
    for lost in orphans:
        yield Note(f"Run {lost} of {view.display} had ended without a word: marked as failed (RunLost).", True)
    return record, run_id


def _record_of(
    view: ResolvedName, known: DefinitionRecord | None, subject: Subject, ledger: Ledger, patience: Patience
) -> Work[DefinitionRecord]:
    if known is not None and (known.declaration or subject.definition is not None):
        return known
    if known is not None and known.source_state:
        rule = yield from catalog.rule_of(view)
        if rule is not None and rule == known.source_state.get("rule"):
            # What was read of it then is what it still says.
            return known
    # Reading a view's query locks it for a moment, which somebody else's REFRESH may keep from us.
    query = yield from politely(view, patience, lambda: catalog.query_of(view))
    return (yield from ledger.adopt(view, known, query))


def _in_force(record: DefinitionRecord, subject: Subject) -> DefinitionRecord:
    """Return what is recorded of a view, with what the definition at hand says before it."""
    definition = subject.definition
    if definition is None:
        return record
    return replace(
        record,
        sql=definition.sql,
        refresh_strategy=RefreshStrategy(definition.refresh_strategy),
        unique_index_columns=tuple(definition.unique_index_columns),
        managed=definition.managed,
        declaration=definition.to_dict(),
    )


def _stand_back(
    operation: Operation,
    view: ResolvedName,
    former: ResolvedName | None,
    known: DefinitionRecord | None,
    ledger: Ledger,
    terms: Terms,
    report: Report,
    begun: float,
) -> Work[ServiceResponse]:
    reason = "another operation on the view is running"
    report.told(reason=reason, locked=True)
    duration = _milliseconds(begun)
    status = "skipped" if terms.if_locked is IfLocked.SKIP else None
    meta = meta_of(report, terms, status)
    try:
        record = yield from ledger.adopt(view, known, None)
        (run_id,) = yield from ledger.skip(operation, [(record.id, meta)], duration)
    except psycopg.errors.ForeignKeyViolation:
        # The other one has just given its runs to the row of a view that now has this name.
        record = yield from ledger.adopt(view, (yield from ledger.definition(view)), None)
        (run_id,) = yield from ledger.skip(operation, [(record.id, meta)], duration)
    yield from retain(ledger, [record])
    if status is not None:
        yield Note(f"Skipped: {reason}.")
        yield from _roll_back()
        return replace(report.end("skipped"), run_id=run_id, duration_ms=duration)
    error = ViewLocked(
        view.display
        + (f" (renamed from {former.display})" if former else "")
        + " is being worked on by another operation"
        + (f", for longer than max_wait={terms.patience.max_wait:g} s." if terms.if_locked is IfLocked.WAIT else "."),
        hint="see hook.runs() for the one that is running; if_locked='wait' waits for it, 'skip' lets it be.",
    )
    error.response = replace(report.unfinished(), run_id=run_id)
    raise error


def _carry_out(
    service: Callable[[Prepared], Work[ServiceResponse]],
    declared: Callable[[RunStatus], Work[None]],
    prepared: Prepared,
    known: DefinitionRecord,
    run_id: int,
    ledger: Ledger,
    terms: Terms,
    begun: float,
) -> Work[ServiceResponse]:
    response: ServiceResponse | None = None

    try:
        # The savepoint inside keeps the view's lock through an error, until that error is on record.
        response = yield from politely(prepared.origin, prepared.patience, lambda: _attempt(service, prepared, terms))
        status = RunStatus.SKIPPED if response.status == "skipped" else RunStatus.SUCCESS
        yield from fetch_all(sql.SQL("SELECT set_config('lock_timeout', {}, true)").format(_RECORD_LOCK_TIMEOUT))
        meta = meta_of(prepared.report, terms, response.status)
        yield from declared(status)
        if prepared.report.source_state is not None:
            keeping = ledger.keep_sources(prepared.record.id, prepared.view, prepared.report.source_state)
            yield from explained(ledger.tracking_schema, keeping)
        duration = _milliseconds(begun)
        yield from ledger.finish(run_id, status, duration, meta)
        yield Command(sql.SQL("COMMIT"))
    except BaseException as error:
        advise(error, prepared.view, prepared.server.role)
        # Whatever was counted has been undone.
        prepared.report.told(row_count_after=None)
        if response is not None:
            # The run row is locked by this transaction; the record's connection would wait for it for ever.
            yield from _roll_back()
        ended = yield from _record_failure(run_id, error, ledger, meta_of(prepared.report, terms), begun)
        if ended is RunStatus.FAILED and isinstance(error, Exception):
            # By what is on record: what failed may be the very definition that says otherwise.
            yield from retain(ledger, [known])
        if response is None or ended not in (RunStatus.SUCCESS, RunStatus.SKIPPED):
            _attach(error, replace(prepared.report.unfinished(), run_id=run_id))
            raise
        yield Note("The answer to COMMIT was lost, but the server did commit.", warning=True)
        if not isinstance(error, psycopg.Error):
            raise
    yield Note(_story(response, time.monotonic() - begun))
    yield from retain(ledger, [prepared.record])
    yield from _follow_up(prepared, terms)
    return replace(response, run_id=run_id, duration_ms=duration)


def _attempt(
    service: Callable[[Prepared], Work[ServiceResponse]], prepared: Prepared, terms: Terms
) -> Work[ServiceResponse]:
    prepared.report.restart()
    # Inside the savepoint: what is undone for another attempt is set again.
    settings = {**prepared.record.session_settings, **terms.session_settings}
    if terms.timeouts.statement_timeout is not None:
        settings.pop("statement_timeout", None)
    yield from apply_settings(settings)
    return (yield from service(prepared))


def _follow_up(prepared: Prepared, terms: Terms) -> Work[None]:
    settings = CONNECTION_CHECK.format(sql.SQL("false"))
    if (seconds := terms.timeouts.statement_timeout) is not None:
        settings += sql.SQL(", set_config('statement_timeout', {}, false)").format(sql.Literal(f"{seconds}s"))
    for step, command in prepared.report.follow_up:
        begun = time.monotonic()
        try:
            with prepared.report.running(step):
                yield Alone(command, settings)
        except psycopg.Error as error:
            yield Note(f"The run is a success; {step} after it was not: {str(error).splitlines()[0]}", True)
        else:
            yield Note(f"Then {step}: {time.monotonic() - begun:.2f} s.")


_DONE = {"created": "Created", "updated": "Updated", "deleted": "Dropped"}


def _story(response: ServiceResponse, seconds: float) -> str:
    facts = response.response
    if response.status == "skipped":
        return f"Done in {seconds:.2f} s, with nothing to do."
    told = f"{_DONE[response.status or 'updated']} {facts['view']} in {seconds:.2f} s"
    before, after = facts["row_count_before"], facts["row_count_after"]
    if after is not None:
        told += f": {after:,} row{'' if after == 1 else 's'}" + ("" if before is None else f" (before: {before:,})")
    if "rows_inserted" in facts:
        told += f"; {facts['rows_inserted']:,} inserted, {facts['rows_deleted']:,} deleted"
    return f"{told}."


def _record_failure(
    run_id: int, error: BaseException, ledger: Ledger, meta: dict[str, Any], begun: float
) -> Work[RunStatus | None]:
    trouble: psycopg.Error | None = None
    # Twice at once, because the first statement on a connection that was idle for long may find it gone, and because
    # cancel() may come now; and some times more where the server itself is gone, which comes back after a restart.
    tried = time.monotonic()
    for attempt, pause in enumerate(_AGAIN_AFTER):
        try:
            if pause:
                yield Pause(pause)
            # A transaction only for its lock_timeout: a server that has not noticed yet that the operation's
            # connection is gone still holds the row.
            yield Command(sql.SQL("BEGIN ISOLATION LEVEL READ COMMITTED"), Session.RECORD)
            yield Command(sql.SQL("SET LOCAL lock_timeout = {}").format(_RECORD_LOCK_TIMEOUT), Session.RECORD)
            status = yield from ledger.fail(run_id, error, _milliseconds(begun), meta)
            yield Command(sql.SQL("COMMIT"), Session.RECORD)
            return status
        except psycopg.Error as raised:
            trouble = raised
            if isinstance(raised, psycopg.errors.LockNotAvailable):
                break
            if attempt and (
                not isinstance(raised, psycopg.OperationalError) or time.monotonic() - tried > _LONGEST_RECORDING
            ):
                break
            if raised.sqlstate:  # It came from the server, whose transaction stands.
                yield from _roll_back(Session.RECORD)
    yield Note(
        f"The run {run_id} could not be marked as failed ({type(trouble).__name__}); it says `running` until "
        "the next operation on the view finds it.",
        warning=True,
    )
    return None


def _roll_back(session: Session = Session.WORK) -> Work[None]:
    try:
        yield Command(sql.SQL("ROLLBACK"), session, undoing=True)
    except psycopg.Error as error:
        # A connection that is gone has been rolled back by the server.
        yield Note(f"The connection is gone ({type(error).__name__}); the server rolls back by itself.", True)


def _attach(error: BaseException, response: ServiceResponse) -> None:
    if isinstance(error, (MatViewError, psycopg.Error)):
        error.response = response  # type: ignore[union-attr]


def _milliseconds(begun: float) -> int:
    return round((time.monotonic() - begun) * 1000)


def meta_of(report: Report, terms: Terms, status: str | None = None) -> dict[str, Any]:
    """Return what a run's row says beside its columns."""
    response = report.response
    return {
        "row_count_before": response["row_count_before"],
        "row_count_after": response["row_count_after"],
        "strategy": response["strategy"],
        "request": dict(report.request),
        "response": {"status": status, **response},
        **terms.context,
        # Where to look for what became of it.
        "process": f"{os.getpid()} on {platform.node()}",
        **({"deferral": terms.deferral} if terms.deferral else {}),
    }
