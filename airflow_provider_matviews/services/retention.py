"""Retention in SQL: which runs go, found by way of the index, and how they go without being in anybody's way.

Of every kind of run (a view's successful refreshes, its failed creates, ...) a cut is found: what is older goes. The
cut is the oldest run that is kept by its number, or the moment before which runs are too old, whichever is later, and
never later than the last run of the kind.

To know how many runs are too many one has to know how many there are, and an index cannot be asked for that: counting
costs 70 ms for a million (measured), much more than it takes to delete a few. So a prune leaves behind how many it left
of each kind, up to which run (``mat_view_retention``), and the next one counts only what has come since, and finds the
cut from the old end: what it costs follows what came and what goes. That is believed only while the server's own
counter says that nobody else has deleted a run since, that counter has not begun anew, the table is the same file,
every view that was counted is still on record, and of each kind the oldest run is the one that was left as such; and a
few kinds, by chance, are counted all the same before anything of them goes. Else, and after two days, all is counted
again. What the counter cannot tell is in docs/retention.md.

Rows that somebody has locked are passed over, and a lock on the table is waited for briefly; each batch is a
transaction of its own.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from airflow_provider_matviews.checks import check_flag
from airflow_provider_matviews.exceptions import (
    InvalidDefinition,
    MatViewError,
    OperationCancelled,
    OperationTimedOut,
    ViewNotFound,
)
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.retention import RetentionPolicy
from airflow_provider_matviews.services import catalog, change_log
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.graph import Graph
from airflow_provider_matviews.services.instructions import (
    Alone,
    Command,
    Deadline,
    Note,
    Pause,
    Session,
    Work,
    fetch_all,
    fetch_one,
)
from airflow_provider_matviews.services.ledger import DefinitionRecord, Ledger, Operation, RunStatus
from airflow_provider_matviews.services.locking import describe_blocker
from airflow_provider_matviews.services.maintenance import maintenance
from airflow_provider_matviews.services.migrations import ensure_schema, explained
from airflow_provider_matviews.services.reap import reap_runs
from airflow_provider_matviews.services.selection import Selection

#: Runs that the end of one run deletes at the most, for a policy that is declared over a long history.
RETAINED_AT_ONCE = 1000
#: Views that are looked at by one statement, so that it is a short one.
_LOOKED_AT = 250
_NEWS_EVERY = 10.0
#: How long it is believed what was counted once: a prune every night counts all every other time.
_BELIEVED = timedelta(days=2)
#: Kinds that a prune counts all the same, and up to how many runs of each: a count of so many takes 7 ms.
_CHECKED, _CHECKED_RUNS = 3, 100_000
#: How long a statement may stand before a lock on the table, since others queue behind it, and the pauses in between.
_LOCK_TIMEOUT = "1s"
_LOCK_PAUSES = (1.0, 2.0, 4.0)
#: Runs of a kind that something else references, after which a prune leaves the others of it.
_MOST_REFERENCED = 100
#: Seconds between the looks whether VACUUM has been there: before PostgreSQL 15 the counters show it a while after.
_VACUUM_LOOKS = (0.0, 0.1, 0.6, 0.6)
#: Lines of the table in the log, and kinds that XCom is told of.
_MOST_LINES, _MOST_TOLD = 20, 1000
#: From how many runs on, and which share of all of them, it is worth a word about the room that they leave.
_LARGE, _LARGE_SHARE = 10_000, 0.1
_T = TypeVar("_T")
_OPERATIONS = {operation.value: operation.word for operation in Operation}
_STATUSES = {status.value: status.name.lower() for status in RunStatus}

_KIND = sql.SQL(
    "r.mat_view_definition_id = {kind}.definition AND r.operation = {kind}.operation AND r.status = {kind}.status"
)
#: What goes at the end of a run, by number and by age: fewer tables than one question for both, which is half the time.
_SURPLUS = sql.SQL(
    """
    SELECT doomed.id FROM k CROSS JOIN LATERAL (
        SELECT r.created_at, r.id FROM {runs} r WHERE {of_k}
        ORDER BY r.created_at DESC, r.id DESC OFFSET k.keep - 1 LIMIT 1
    ) kept CROSS JOIN LATERAL (
        SELECT r.id FROM {runs} r WHERE {of_k} AND (r.created_at, r.id) < (kept.created_at, kept.id)
        ORDER BY r.created_at, r.id LIMIT %(limit)s FOR UPDATE SKIP LOCKED
    ) doomed WHERE k.keep IS NOT NULL
    """
)
_AGED = sql.SQL(
    """
    SELECT doomed.id FROM k CROSS JOIN LATERAL (
        SELECT r.created_at, r.id FROM {runs} r WHERE {of_k} ORDER BY r.created_at DESC, r.id DESC LIMIT 1
    ) newest CROSS JOIN LATERAL (
        SELECT r.id FROM {runs} r WHERE {of_k} AND (r.created_at, r.id) < (newest.created_at, newest.id)
          AND r.created_at < clock_timestamp() - k.age * interval '1 second'
        ORDER BY r.created_at, r.id LIMIT %(limit)s FOR UPDATE SKIP LOCKED
    ) doomed WHERE k.age IS NOT NULL
    """
)


@dataclass(frozen=True)
class Pruned:
    """What became of one kind of a view's runs.

    :ivar removed: how many were deleted; in a dry run, how many would be.
    :ivar left: how many are left of the kind.
    """

    view: str
    operation: str
    status: str
    removed: int
    left: int


@dataclass(frozen=True)
class PruneResponse:
    """What a prune did.

    :ivar kinds: of which something was removed, the most first.
    :ivar views: how many views were looked at.
    :ivar reaped: ids of runs that were found to have ended without a word.
    :ivar change_log: rows of the change log that were deleted.
    :ivar seconds: that it took.
    """

    dry_run: bool
    kinds: tuple[Pruned, ...] = ()
    views: int = 0
    reaped: tuple[int, ...] = ()
    change_log: int = 0
    seconds: float = 0.0

    @property
    def removed(self) -> int:
        """How many runs were deleted; in a dry run, how many would be."""
        return sum(kind.removed for kind in self.kinds)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data, for XCom; of very many kinds only those with the most."""
        return {
            "dry_run": self.dry_run,
            "removed": self.removed,
            "views": self.views,
            "kinds": [vars(kind) for kind in self.kinds[:_MOST_TOLD]],
            "more_kinds": max(0, len(self.kinds) - _MOST_TOLD),
            "reaped": list(self.reaped[:_MOST_TOLD]),
            "change_log": self.change_log,
            "seconds": round(self.seconds, 3),
        }

    def story(self) -> str:
        """Return it as a sentence."""
        runs = f"{self.removed:,} run{'' if self.removed == 1 else 's'}"
        views = f"{self.views:,} view{'' if self.views == 1 else 's'}"
        if self.dry_run:
            return f"{runs} of {views} would be deleted, found in {self.seconds:.2f} s. Nothing was changed."
        return f"{runs} of {views} deleted in {self.seconds:.2f} s."

    def table(self) -> list[str]:
        """Return the lines of a short table of it."""
        if not self.kinds:
            return []
        rows = [("view", "operation", "status", "would go" if self.dry_run else "removed", "left")]
        rows += [
            (kind.view, kind.operation, kind.status, f"{kind.removed:,}", f"{kind.left:,}")
            for kind in self.kinds[:_MOST_LINES]
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        if (more := len(self.kinds) - _MOST_LINES) > 0:
            removed = sum(kind.removed for kind in self.kinds[_MOST_LINES:])
            lines.append(f"and {more:,} more, with {removed:,} runs")
        return lines


@dataclass(frozen=True)
class Pruning:
    """What a prune is asked to do.

    :param policy: for views whose definition declares none.
    :param selection: of which views on record.
    :param dry_run: only count.
    :param batch_size: runs that one transaction deletes at the most.
    :param pause: seconds between two of them.
    :param vacuum: VACUUM the table after something was deleted.
    :param longest: seconds after which it is stopped; None for never.
    :raises InvalidDefinition: when it is nothing of that.
    """

    policy: RetentionPolicy
    selection: Selection = field(default_factory=lambda: Selection(views=["*.*"]))
    dry_run: bool = False
    batch_size: int = 5000
    pause: float = 0.05
    vacuum: bool = False
    longest: float | None = None

    def __post_init__(self) -> None:
        size, pause = self.batch_size, self.pause
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 1_000_000:
            raise InvalidDefinition(f"batch_size={size!r} is not a number of runs from 1 to 1,000,000.")
        if isinstance(pause, bool) or not isinstance(pause, (int, float)) or not 0 <= pause < math.inf:
            raise InvalidDefinition(f"pause={pause!r} is not a number of seconds.")
        check_flag(self.dry_run, "dry_run")
        check_flag(self.vacuum, "vacuum")


@dataclass
class _Kind:
    """Of one kind, how many runs there are, which of them are older than the cut, and how many of those are gone."""

    definition: int
    operation: int
    status: int
    runs: int
    # Moments are PostgreSQL's own text: Python has no infinity among them, and no year 20000.
    newest_at: str
    newest_id: int
    first_id: int
    created_at: str | None
    id: int | None
    doomed: int
    removed: int = 0
    protected: int = 0
    referenced: int = 0
    ended: bool = False
    #: Up to where it has been gone through.
    done_at: str = "-infinity"
    done_id: int = 0

    @property
    def key(self) -> _KindKey:
        return self.definition, self.operation, self.status

    @property
    def remaining(self) -> int:
        return 0 if self.ended else self.doomed - self.removed - self.protected - self.referenced

    def told(self, view: str, *, dry_run: bool) -> Pruned:
        removed = self.doomed if dry_run else self.removed
        return Pruned(view, _OPERATIONS[self.operation], _STATUSES[self.status], removed, self.runs - removed)


_KindKey = tuple[int, int, int]


@dataclass
class _Memory:
    """What the last prune has counted, as far as it can be believed.

    :ivar now: the server's clock, when this prune began.
    :ivar server: changes when the server's counters begin anew, or are those of another server.
    :ivar filenode: the file of the run table, which is another one after TRUNCATE.
    :ivar deletions: how many runs were ever deleted, as the server counts them; None where it does not.
    :ivar counted_at: when all was counted.
    :ivar kinds: how many there were of each kind, up to and with which run (date and id), and the id of the first.
    """

    now: datetime
    server: str
    filenode: int
    deletions: int | None
    counted_at: datetime
    kinds: dict[_KindKey, tuple[int, str, int, int]]

    def forget(self) -> None:
        self.kinds, self.counted_at = {}, self.now


def prune_runs(ledger: Ledger, pruning: Pruning) -> Work[PruneResponse]:
    """Delete what retention does not keep, of the views that are meant, dropped ones too.

    Marks runs that have ended without a word first (not in a dry run), and prunes the change log where it holds
    anything. Many may do so at once; what one has locked another leaves alone.

    :raises ViewNotFound: when an exact name is of a view that is not on record.
    :raises MissingPrivilege: when the role may not use the run tables.
    :raises MatViewError: when somebody keeps a lock on them; the message says who.
    :raises OperationCancelled: when it was stopped; what was deleted until then stays deleted.
    """
    begun = time.monotonic()
    if pruning.longest is not None:
        yield Deadline(begun + pruning.longest, pruning.longest)
    reaped: list[int] = []
    yield from explained(ledger.tracking_schema, _get_through(ledger, pruning))
    if not pruning.dry_run:
        yield from ensure_schema(ledger.tracking_schema)
        reaped = yield from reap_runs(ledger)
    records = yield from _chosen(ledger, pruning)
    policies, declared = yield from _policies(records, pruning.policy)
    yield Note(
        f"{'Dry run: looking at' if pruning.dry_run else 'Pruning'} the history of {len(policies):,} "
        f"view{'' if len(policies) == 1 else 's'}: {pruning.policy}"
        + (
            f"; {declared:,} of them by what {'its' if declared == 1 else 'their'} definition declares."
            if declared
            else "."
        )
    )
    names = {record.id: record.name for record in records}
    kinds: list[_Kind] = []
    try:
        yield from _prune_all(ledger, pruning, policies, kinds, begun)
    except (psycopg.Error, MatViewError):
        if removed := sum(kind.removed for kind in kinds):
            yield Note(f"Stopped: {removed:,} runs had been deleted by then, and stay deleted.", warning=True)
        raise
    told = [kind.told(names[kind.definition], dry_run=pruning.dry_run) for kind in kinds]
    told = sorted((each for each in told if each.removed), key=lambda each: (-each.removed, each.view))
    logged = 0
    if not pruning.dry_run:
        yield from _tell_kept_back(kinds, names)
        logged = yield from _prune_change_log(ledger)
        yield from _tell_room(ledger, pruning, sum(each.removed for each in told))
    return PruneResponse(pruning.dry_run, tuple(told), len(policies), tuple(reaped), logged, time.monotonic() - begun)


def retain(ledger: Ledger, records: Sequence[DefinitionRecord], *, ended: bool = True) -> Work[None]:
    """Apply to some views what their definitions declare, after a run of theirs has ended.

    One statement, which deletes no more than :data:`RETAINED_AT_ONCE` runs. Whatever goes wrong is a warning: the run
    has ended as it has.

    :param ended: whether there is nothing left to stop; else that it is to be stopped is let through.
    """
    declared = {record.id: record for record in records if record.declaration.get("retention")}
    if not declared:
        return
    try:
        policies = {number: RetentionPolicy.of(each.declaration["retention"]) for number, each in declared.items()}
        kinds = _kinds(policies)
        rules = [
            rule
            for rule, applies in (
                (_SURPLUS, any(keep is not None for _, keep, _ in kinds)),
                (_AGED, any(age is not None for _, _, age in kinds)),
            )
            if applies
        ]
        runs = ledger.table("mat_view_runs")
        statement = sql.SQL(
            """
            WITH k AS MATERIALIZED (
                SELECT * FROM unnest(%(definitions)s::bigint[], %(operations)s::integer[], %(statuses)s::integer[],
                                     %(keeps)s::bigint[], %(ages)s::float8[])
                              AS k (definition, operation, status, keep, age)
            ), gone AS (
                DELETE FROM {runs} WHERE id = ANY (ARRAY(SELECT id FROM ({rules}) doomed LIMIT %(limit)s))
                  AND status <> {running} RETURNING 1
            )
            SELECT count(*) AS removed FROM gone
            """
        ).format(
            runs=runs,
            rules=sql.SQL(" UNION ALL ").join(rule.format(runs=runs, of_k=_of("k")) for rule in rules),
            running=sql.Literal(int(RunStatus.RUNNING)),
        )
        parameters = {
            "definitions": _array(key[0] for key, _, _ in kinds),
            "operations": _array(key[1] for key, _, _ in kinds),
            "statuses": _array(key[2] for key, _, _ in kinds),
            "keeps": _array(keep for _, keep, _ in kinds),
            "ages": _array(age for _, _, age in kinds),
            "limit": RETAINED_AT_ONCE,
        }
        deleting = fetch_one(statement, parameters, Session.RECORD)
        row = yield from explained(ledger.tracking_schema, deleting)
    except (psycopg.Error, MatViewError) as error:
        if not ended and isinstance(error, (OperationCancelled, OperationTimedOut)):
            raise
        what = error.diag.message_primary if isinstance(error, psycopg.Error) else None
        yield Note(
            f"The run has ended as it has; what retention does not keep was left this time: {what or error} The next "
            "run tries again, and so does hook.prune().",
            warning=True,
        )
        return
    if row is not None and row["removed"] >= RETAINED_AT_ONCE:
        yield Note(
            f"Retention has deleted {row['removed']:,} older runs, which is all that the end of one run does; the next "
            "ones go on, and PruneMatViewRunsOperator does it at once."
        )


def _array(values: Iterable[int | float | str | None]) -> str:
    """Return an array as PostgreSQL reads it. A list would be looked at value by value, by Python: 100 ms a prune."""
    return "{" + ",".join("NULL" if value is None else f'"{value}"' for value in values) + "}"


def _of(kind: str) -> sql.Composable:
    return _KIND.format(kind=sql.SQL(kind))


def _kinds(policies: Mapping[int, RetentionPolicy]) -> list[tuple[_KindKey, int | None, float | None]]:
    """Return the kinds of runs that are limited, each with how many are kept, and for how many seconds."""
    return [
        ((definition, operation, int(status)), keep, policy.max_age_seconds)
        for definition, policy in policies.items()
        for operation in _OPERATIONS
        for status, keep in (
            (RunStatus.SUCCESS, policy.keep_successes),
            (RunStatus.FAILED, policy.keep_failures),
            (RunStatus.SKIPPED, policy.skipped_kept),
        )
        if keep is not None or policy.max_age_seconds is not None
    ]


def _chosen(ledger: Ledger, pruning: Pruning) -> Work[list[DefinitionRecord]]:
    """Return what is recorded of the views that are meant, whether they stand or not."""
    try:
        records = yield from explained(ledger.tracking_schema, ledger.definitions())
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        # A dry run makes no tables.
        records = []
    by_name = {(record.schema_name, record.view_name): record.name for record in records}
    meant: dict[str, str | None] = {}
    for name in pruning.selection.exact_names:
        view = yield from catalog.resolve(ViewName.parse(name), session=Session.RECORD)
        meant[name] = by_name.get((view.schema, view.name))
    if unknown := [name for name in pruning.selection.views if name in meant and meant[name] is None]:
        raise ViewNotFound(
            f"Nothing is on record of {', '.join(unknown)}, so there is no history to prune.",
            hint="mend the name; one without a schema means what the search path finds, or its first schema.",
        )
    graph = Graph({each.name: ResolvedName(each.schema_name, each.view_name, each.name) for each in records}, {})
    for note in pruning.selection.without_effect(graph, meant):
        yield Note(note.replace("means no materialized view", "means no view that is on record"), warning=True)
    for schema in sorted(set(pruning.selection.schemas) - {record.schema_name for record in records}):
        yield Note(
            f"schemas={schema!r} means no view that is on record; names are exact, without quotes.", warning=True
        )
    chosen = pruning.selection.of(graph, meant)
    return [record for record in records if record.name in chosen]


def _policies(
    records: Sequence[DefinitionRecord], policy: RetentionPolicy
) -> Work[tuple[dict[int, RetentionPolicy], int]]:
    """Return the policy of each view, and how many of them are their own."""
    policies = {}
    declared = 0
    for record in records:
        own = record.declaration.get("retention")
        try:
            policies[record.id] = RetentionPolicy.of(own) if own else policy
        except InvalidDefinition as error:
            # Written by a newer version, perhaps: better too much is kept than too little.
            yield Note(
                f"{record.name} is left alone: what it declares is not understood. {error.message}", warning=True
            )
        else:
            declared += bool(own)
    return policies, declared


def _prune_all(
    ledger: Ledger,
    pruning: Pruning,
    policies: Mapping[int, RetentionPolicy],
    kinds: list[_Kind],
    begun: float,
) -> Work[None]:
    ids = list(policies)
    if not ids:
        return
    memory = yield from _remember(ledger, pruning)
    told, first = begun, True
    waiting: list[_Kind] = []
    # From which kind on it is sure how many there are.
    sure = 0
    checked = max(1, _CHECKED * _LOOKED_AT // max(len(ids), _LOOKED_AT))
    for start in range(0, len(ids), _LOOKED_AT):
        some = {number: policies[number] for number in ids[start : start + _LOOKED_AT]}
        found, wrong = yield from _patiently(ledger, lambda some=some: _look_twice(ledger, some, memory, checked))  # type: ignore[misc]
        if wrong:
            yield Note("What the last prune has counted is not so any more: everything is counted again.")
            sure = len(kinds)
        kinds += found
        waiting += found
        looked_at = start + len(some)
        while not pruning.dry_run and (batch := list(_batch(waiting, pruning.batch_size))):
            if looked_at < len(ids) and sum(count for _, count in batch) < pruning.batch_size:
                # Those of the next views go with it.
                break
            if not first and pruning.pause:
                yield Pause(pruning.pause)
            first = False
            yield from _delete(ledger, batch)
            waiting = [kind for kind in waiting if kind.remaining]
            told = yield from _tell_progress(kinds, looked_at, len(ids), told)
        told = yield from _tell_progress(kinds, looked_at, len(ids), told)
    if not pruning.dry_run:
        yield from _keep(ledger, memory, kinds, sure)


def _tell_progress(kinds: Sequence[_Kind], looked_at: int, views: int, told: float) -> Work[float]:
    """Say now and then how far it has come; return when that was last said."""
    now = time.monotonic()
    if now - told < _NEWS_EVERY:
        return told
    removed = sum(kind.removed for kind in kinds)
    yield Note(f"{looked_at:,} of {views:,} views looked at; {removed:,} runs deleted so far.")
    return now


def _read_committed(work: Work[_T]) -> Work[_T]:
    """Do something in a short transaction of its own, whatever isolation level is the default here.

    Under a stricter one, what it reads and deletes could make the statements of runs fail (40001), and those of other
    prunes (https://www.postgresql.org/docs/current/transaction-iso.html).
    """
    yield Command(sql.SQL("BEGIN ISOLATION LEVEL READ COMMITTED"), Session.RECORD)
    try:
        yield Command(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(_LOCK_TIMEOUT)), Session.RECORD)
        result = yield from work
        yield Command(sql.SQL("COMMIT"), Session.RECORD)
    except psycopg.Error:
        yield Command(sql.SQL("ROLLBACK"), Session.RECORD, undoing=True)
        raise
    return result


def _patiently(ledger: Ledger, attempt: Callable[[], Work[_T]]) -> Work[_T]:
    """Do something in a short transaction; where somebody has locked the table, step back and try again.

    :raises MatViewError: when the lock was not to be had; it says who has it.
    """
    table = _run_table(ledger)
    begun = time.monotonic()
    for pause in (*_LOCK_PAUSES, None):
        try:
            return (yield from _read_committed(attempt()))
        except psycopg.errors.LockNotAvailable as error:
            rows = yield from catalog.blockers_of(table)
            blockers = "; ".join(map(describe_blocker, rows)) or "nobody any more"
            waited = time.monotonic() - begun
            if pause is None:
                raise MatViewError(
                    f"A lock on {table.display} or what belongs to it was not to be had in {waited:.0f} s. In the way: "
                    f"{blockers}.",
                    hint="prune again when they have ended, or end them; what was deleted until then stays deleted.",
                ) from error
            yield Note(
                f"A lock on {table.display} is not to be had yet ({waited:.0f} s so far); trying again in {pause:g} s "
                f"without making others queue. In the way: {blockers}."
            )
        yield Pause(pause)
    raise AssertionError("the last attempt returns or raises")


def _run_table(ledger: Ledger) -> ResolvedName:
    return ResolvedName(ledger.tracking_schema, "mat_view_runs", f"{ledger.tracking_schema}.mat_view_runs")


def _get_through(ledger: Ledger, pruning: Pruning) -> Work[None]:
    """See to it that nobody keeps the table locked, before anything waits for it without a limit."""
    lock = sql.SQL("LOCK TABLE {} IN {} MODE").format(
        sql.Identifier(ledger.tracking_schema, "mat_view_runs"),
        sql.SQL("ACCESS SHARE" if pruning.dry_run else "ROW EXCLUSIVE"),
    )

    def attempt() -> Work[None]:
        yield Command(lock, Session.RECORD)

    try:
        yield from _patiently(ledger, attempt)
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        # It is made later, or never in a dry run.
        return


def _remember(ledger: Ledger, pruning: Pruning) -> Work[_Memory]:
    """Return what the last prune has counted; nothing where it is not to be believed."""
    table = sql.Literal(sql.Identifier(ledger.tracking_schema, "mat_view_runs").as_string(None))
    definitions = sql.Identifier(ledger.tracking_schema, "mat_view_definitions")
    facts = yield from fetch_one(
        sql.SQL(
            """
            SELECT clock_timestamp() AS now, pg_relation_filenode({table}::regclass)::bigint AS filenode,
                   -- After a crash the counters begin anew, and so do those of the background writer; another server
                   -- has its own, and so has a copy of the database.
                   concat_ws(' ', d.oid, {table}::regclass::oid,
                             extract(epoch FROM pg_catalog.pg_postmaster_start_time()),
                             extract(epoch FROM pg_catalog.pg_stat_get_db_stat_reset_time(d.oid)),
                             extract(epoch FROM pg_catalog.pg_stat_get_bgwriter_stat_reset_time()),
                             CASE WHEN NOT pg_is_in_recovery()
                             THEN left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END,
                             -- Where two views have become one, the runs of one are the other's.
                             pg_stat_get_tuples_deleted({definitions}::regclass)) AS server,
                   CASE WHEN current_setting('track_counts')::boolean AND NOT pg_is_in_recovery()
                   THEN pg_stat_get_tuples_deleted({table}::regclass) END AS deletions
            FROM pg_catalog.pg_database d WHERE d.datname = current_database()
            """
        ).format(table=table, definitions=sql.Literal(definitions.as_string(None))),
        session=Session.RECORD,
    )
    assert facts is not None
    memory = _Memory(**facts, counted_at=facts["now"], kinds={})
    memory.server += yield from _system()
    remembered = sql.Identifier(ledger.tracking_schema, "mat_view_retention")
    # What this prune deletes is not counted, and those who come after it are not to believe that nothing went.
    forgetting = memory.deletions is None and not pruning.dry_run
    try:
        row = yield from _read_committed(
            fetch_one(_memory_query(remembered, definitions, forgetting), session=Session.RECORD)
        )
    except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege, psycopg.errors.LockNotAvailable):
        # A dry run makes no tables; and what may not be read is counted.
        return memory
    if (
        row is not None
        and row["complete"]
        and (row["server"], row["filenode"], row["deletions"]) == (memory.server, memory.filenode, memory.deletions)
        and timedelta(0) <= memory.now - row["counted_at"] < _BELIEVED
    ):
        memory.counted_at = row["counted_at"]
        keys = zip(row["definitions"], row["operations"], row["statuses"], strict=True)
        memory.kinds = dict(
            zip(keys, zip(row["runs"], row["moments"], row["ids"], row["first_ids"], strict=True), strict=True)
        )
    return memory


def _memory_query(remembered: sql.Identifier, definitions: sql.Identifier, forgetting: bool) -> sql.Composable:
    if forgetting:
        return sql.SQL("DELETE FROM {} RETURNING false AS complete").format(remembered)
    return sql.SQL(
        """
        SELECT server, filenode, deletions, counted_at, definitions, operations, statuses, runs, ids, first_ids,
               to_json(moments) AS moments,
               NOT EXISTS (SELECT FROM unnest(m.definitions) known (id)
                           WHERE NOT EXISTS (SELECT FROM {definitions} d WHERE d.id = known.id)) AS complete
        FROM {remembered} m
        """
    ).format(remembered=remembered, definitions=definitions)


def _system() -> Work[str]:
    """Return what tells one cluster from another, where that may be read."""
    try:
        row = yield from fetch_one(
            sql.SQL("SELECT system_identifier::text AS system FROM pg_catalog.pg_control_system()"),
            session=Session.RECORD,
        )
    except psycopg.errors.InsufficientPrivilege:
        return ""
    assert row is not None
    return f" {row['system']}"


def _keep(ledger: Ledger, memory: _Memory, kinds: Sequence[_Kind], sure: int) -> Work[None]:
    """Leave behind, for the next prune, how many there are now of each kind.

    :param sure: the first one of which that is sure.
    """
    if memory.deletions is None:
        return
    # Where somebody had locked some of those that were to go, the first is another one, which is seen next time.
    known = memory.kinds | {
        kind.key: (kind.runs - kind.removed, kind.newest_at, kind.newest_id, kind.first_id) for kind in kinds[sure:]
    }
    values: dict[str, Any] = {
        "server": memory.server,
        "filenode": memory.filenode,
        # Where somebody else has deleted some meanwhile it will be more.
        "deletions": memory.deletions + sum(kind.removed for kind in kinds),
        "counted_at": memory.counted_at,
        "definitions": _array(definition for definition, _, _ in known),
        "operations": _array(operation for _, operation, _ in known),
        "statuses": _array(status for _, _, status in known),
        **{
            name: _array(facts[place] for facts in known.values())
            for place, name in enumerate(("runs", "moments", "ids", "first_ids"))
        },
    }
    columns = sql.SQL(", ").join(map(sql.Identifier, values))
    statement = sql.SQL(
        "INSERT INTO {table} ({columns}) VALUES ({values}) ON CONFLICT (only_row) DO UPDATE "
        "SET ({columns}, updated_at) = ROW ({excluded}, clock_timestamp())"
    ).format(
        table=ledger.table("mat_view_retention"),
        columns=columns,
        values=sql.SQL(", ").join(map(sql.Placeholder, values)),
        excluded=sql.SQL(", ").join(sql.Identifier("excluded", name) for name in values),
    )
    try:
        yield from _read_committed(fetch_all(statement, values, Session.RECORD))
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.LockNotAvailable) as error:
        yield Note(f"What was counted could not be kept, and is counted again next time: {error.diag.message_primary}.")


def _look_twice(
    ledger: Ledger, policies: Mapping[int, RetentionPolicy], memory: _Memory, checked: int
) -> Work[tuple[list[_Kind], bool]]:
    """Return the kinds of runs of some views, and whether what was remembered of them was wrong.

    :param checked: of how many kinds, of which something is to go by what is remembered, that is counted.
    """
    found = yield from _look(ledger, policies, memory)
    believed = [kind for kind in found if kind.doomed and kind.key in memory.kinds]
    # By chance, so that another prune sees what this one does not; it is no secret.
    checks = random.sample(believed, min(checked, len(believed)))
    if not checks or (yield from _are_so_many(ledger, checks)):
        return found, False
    memory.forget()
    found = yield from _look(ledger, policies, memory)
    return found, True


def _are_so_many(ledger: Ledger, kinds: Sequence[_Kind]) -> Work[bool]:
    """Count what is to be left of a few kinds, and say whether it is what was reckoned."""
    rows = yield from fetch_all(
        sql.SQL(
            """
            SELECT (SELECT count(*) FROM (
                        SELECT FROM {runs} r WHERE {of_k} AND (r.created_at, r.id) >= (k.created_at, k.id)
                        AND (r.created_at, r.id) <= (k.newest_at, k.newest_id) LIMIT {most}
                    ) each) = least(k.runs, {most}) AS agrees
            FROM unnest(%(definitions)s::bigint[], %(operations)s::integer[], %(statuses)s::integer[],
                        %(moments)s::timestamptz[], %(ids)s::bigint[], %(newest_at)s::timestamptz[],
                        %(newest_ids)s::bigint[], %(runs)s::bigint[])
                 AS k (definition, operation, status, created_at, id, newest_at, newest_id, runs)
            """
        ).format(runs=ledger.table("mat_view_runs"), of_k=_of("k"), most=sql.Literal(_CHECKED_RUNS)),
        {
            "definitions": _array(kind.definition for kind in kinds),
            "operations": _array(kind.operation for kind in kinds),
            "statuses": _array(kind.status for kind in kinds),
            "moments": _array(kind.created_at for kind in kinds),
            "ids": _array(kind.id for kind in kinds),
            "newest_at": _array(kind.newest_at for kind in kinds),
            "newest_ids": _array(kind.newest_id for kind in kinds),
            "runs": _array(kind.runs - kind.doomed for kind in kinds),
        },
        Session.RECORD,
    )
    return all(row["agrees"] for row in rows)


def _look(ledger: Ledger, policies: Mapping[int, RetentionPolicy], memory: _Memory) -> Work[list[_Kind]]:
    """Return the kinds of runs that there are of some views, and what goes of each."""
    asked = [(key, keep, age, *memory.kinds.get(key, (None, None, None, None))) for key, keep, age in _kinds(policies)]
    rows = yield from fetch_all(
        sql.SQL(
            """
            SELECT k.definition, k.operation, k.status, counted.runs, newest.id AS newest_id, cut.id,
                   -- As ISO 8601 whatever DateStyle says.
                   to_json(newest.created_at) #>> '{{}}' AS newest_at, to_json(cut.created_at) #>> '{{}}' AS created_at,
                   CASE WHEN cut.id IS NULL THEN oldest.id
                        WHEN cut.id = kept.id THEN kept.id
                        ELSE (SELECT r.id FROM {runs} r
                              WHERE {of_k} AND (r.created_at, r.id) >= (cut.created_at, cut.id)
                              ORDER BY r.created_at, r.id LIMIT 1) END AS first_id,
                   CASE WHEN cut.id IS NULL THEN 0
                        WHEN cut.id = kept.id THEN counted.runs - k.keep
                        ELSE (SELECT count(*) FROM {runs} r
                              WHERE {of_k} AND (r.created_at, r.id) < (cut.created_at, cut.id)) END AS doomed
            FROM unnest(%(definitions)s::bigint[], %(operations)s::integer[], %(statuses)s::integer[],
                        %(keeps)s::bigint[], %(ages)s::float8[], %(known)s::bigint[], %(known_at)s::timestamptz[],
                        %(known_ids)s::bigint[], %(first_ids)s::bigint[])
                 AS k (definition, operation, status, keep, age, known, known_at, known_id, first_id)
            CROSS JOIN LATERAL (
                SELECT r.created_at, r.id FROM {runs} r WHERE {of_k} ORDER BY r.created_at DESC, r.id DESC LIMIT 1
            ) newest
            CROSS JOIN LATERAL (
                SELECT r.id, CASE WHEN r.id = k.first_id THEN k.known END AS known
                FROM {runs} r WHERE {of_k} ORDER BY r.created_at, r.id LIMIT 1
            ) oldest
            CROSS JOIN LATERAL (
                SELECT coalesce(oldest.known, 0) + count(*) AS runs FROM {runs} r
                WHERE {of_k} AND (r.created_at, r.id) <= (newest.created_at, newest.id)
                  AND (r.created_at, r.id) > (CASE WHEN oldest.known IS NULL THEN '-infinity' ELSE k.known_at END,
                                              CASE WHEN oldest.known IS NULL THEN 0 ELSE k.known_id END)
            ) counted
            LEFT JOIN LATERAL (
                SELECT r.created_at, r.id FROM {runs} r WHERE {of_k} AND counted.runs > k.keep
                ORDER BY r.created_at, r.id OFFSET greatest(counted.runs - k.keep, 0) LIMIT 1
            ) kept ON true
            LEFT JOIN LATERAL (
                SELECT least.created_at, least.id
                FROM (SELECT later.created_at, later.id
                      FROM (VALUES (kept.created_at, kept.id),
                                   (%(now)s::timestamptz - k.age * interval '1 second', '-9223372036854775808'::bigint))
                           AS later (created_at, id)
                      WHERE later.created_at IS NOT NULL ORDER BY later.created_at DESC, later.id DESC LIMIT 1) later
                CROSS JOIN LATERAL (
                    SELECT each.created_at, each.id
                    FROM (VALUES (later.created_at, later.id), (newest.created_at, newest.id)) AS each (created_at, id)
                    ORDER BY each.created_at, each.id LIMIT 1
                ) least
            ) cut ON true
            """
        ).format(runs=ledger.table("mat_view_runs"), of_k=_of("k")),
        {
            "definitions": _array(key[0] for key, *_ in asked),
            "operations": _array(key[1] for key, *_ in asked),
            "statuses": _array(key[2] for key, *_ in asked),
            **{
                name: _array(row[place] for row in asked)
                for place, name in enumerate(("keeps", "ages", "known", "known_at", "known_ids", "first_ids"), start=1)
            },
            "now": memory.now,
        },
        Session.RECORD,
    )
    return [_Kind(**row) for row in rows]


def _batch(kinds: Sequence[_Kind], size: int) -> Iterator[tuple[_Kind, int]]:
    """Return of which kinds how many go next, ``size`` in all."""
    for kind in kinds:
        if kind.remaining and size:
            some = min(kind.remaining, size)
            size -= some
            yield kind, some


def _delete(ledger: Ledger, batch: Sequence[tuple[_Kind, int]]) -> Work[None]:
    """Delete one batch, in a transaction of its own, and note what went.

    Where something of the user's references a run, PostgreSQL refuses the whole statement: then it is made in parts,
    down to the one run, which is passed over.
    """
    try:
        rows = yield from _patiently(ledger, lambda: _go_through(ledger, batch))
    except psycopg.errors.ForeignKeyViolation as error:
        if len(batch) > 1:
            for part in batch:
                yield from _delete(ledger, [part])
            return
        ((kind, some),) = batch
        if some > 1:
            for many in (some // 2, some - some // 2):
                if not kind.ended:
                    yield from _delete(ledger, [(kind, many)])
            return
        rows = yield from _patiently(ledger, lambda: _go_through(ledger, batch, passing=True))
        _advance(batch, rows)
        kind.protected -= sum(row["taken"] for row in rows)
        kind.referenced += sum(row["taken"] for row in rows)
        if kind.referenced == 1:
            yield Note(f"A run is referenced, and stays: {error.diag.message_primary}.", warning=True)
        kind.ended = kind.ended or kind.referenced >= _MOST_REFERENCED
    else:
        _advance(batch, rows)


def _advance(batch: Sequence[tuple[_Kind, int]], rows: Sequence[Mapping[str, Any]]) -> None:
    taken, removed = (
        {(row["definition"], row["operation"], row["status"]): row for row in rows if (row["done_at"] is None) is went}
        for went in (False, True)
    )
    for kind, some in batch:
        last = taken.get(kind.key)
        if last is not None:
            went = removed[kind.key]["removed"] if kind.key in removed else 0
            kind.removed += went
            # A trigger, or row security, has let them be.
            kind.protected += last["taken"] - went
            kind.done_at, kind.done_id = last["done_at"], last["done_id"]
        # Somebody else has locked or deleted the others.
        kind.ended = last is None or last["taken"] < some


def _go_through(
    ledger: Ledger, batch: Sequence[tuple[_Kind, int]], *, passing: bool = False
) -> Work[list[dict[str, Any]]]:
    """Return of each kind how many were there to delete, how many went, and which was the last one.

    :param passing: delete nothing.
    """
    statement = sql.SQL(
        """
        WITH doomed AS MATERIALIZED (
            SELECT c.definition, c.operation, c.status, doomed.created_at, doomed.id
            FROM unnest(%(definitions)s::bigint[], %(operations)s::integer[], %(statuses)s::integer[],
                        %(moments)s::timestamptz[], %(ids)s::bigint[], %(done_at)s::timestamptz[],
                        %(done_ids)s::bigint[], %(limits)s::bigint[])
                 AS c (definition, operation, status, created_at, id, done_at, done_id, runs)
            CROSS JOIN LATERAL (
                -- What has changed in the meantime is looked at again when it is locked.
                SELECT r.created_at, r.id FROM {runs} r WHERE {of_c} AND (r.created_at, r.id) < (c.created_at, c.id)
                AND (r.created_at, r.id) > (c.done_at, c.done_id)
                ORDER BY r.created_at, r.id LIMIT c.runs FOR UPDATE SKIP LOCKED
            ) doomed
        ), gone AS (
            DELETE FROM {runs} WHERE id = ANY (ARRAY(SELECT id FROM doomed WHERE {going})) AND status <> {running}
            RETURNING mat_view_definition_id AS definition, operation, status
        ), last AS (
            SELECT DISTINCT ON (definition, operation, status) definition, operation, status,
                   count(*) OVER (PARTITION BY definition, operation, status) AS taken, created_at, id
            FROM doomed ORDER BY definition, operation, status, created_at DESC, id DESC
        )
        -- Not joined: of what is not known to be many, PostgreSQL compares each with each.
        SELECT definition, operation, status, taken, 0 AS removed, to_json(created_at) #>> '{{}}' AS done_at,
               id AS done_id
        FROM last
        UNION ALL
        SELECT definition, operation, status, 0, count(*), NULL, NULL FROM gone GROUP BY 1, 2, 3
        """
    ).format(
        runs=ledger.table("mat_view_runs"),
        of_c=_of("c"),
        running=sql.Literal(int(RunStatus.RUNNING)),
        going=sql.Literal(not passing),
    )
    parameters = {
        "definitions": _array(kind.definition for kind, _ in batch),
        "operations": _array(kind.operation for kind, _ in batch),
        "statuses": _array(kind.status for kind, _ in batch),
        "moments": _array(kind.created_at for kind, _ in batch),
        "ids": _array(kind.id for kind, _ in batch),
        "done_at": _array(kind.done_at for kind, _ in batch),
        "done_ids": _array(kind.done_id for kind, _ in batch),
        "limits": _array(some for _, some in batch),
    }
    rows = yield from fetch_all(statement, parameters, Session.RECORD)
    return rows


def _tell_kept_back(kinds: Sequence[_Kind], names: Mapping[int, str]) -> Work[None]:
    """Say what stays although retention does not keep it, since others do."""
    for number, of_views, what in (
        (sum(k.protected for k in kinds), {k.definition for k in kinds if k.protected}, "a trigger or row security"),
        (sum(k.referenced for k in kinds), {k.definition for k in kinds if k.referenced}, "a foreign key on them"),
    ):
        if number:
            told = ", ".join(sorted(names[each] for each in of_views)[:5]) + (", ..." if len(of_views) > 5 else "")
            yield Note(f"{number:,} runs of {told} that were to go stay: {what} protects them.", warning=True)
    if full := [kind for kind in kinds if kind.referenced >= _MOST_REFERENCED]:
        yield Note(
            f"Of {len(full)} kind{'' if len(full) == 1 else 's'} of runs the others were left, after "
            f"{_MOST_REFERENCED} that something references: delete what references them, or let the foreign key say "
            "ON DELETE CASCADE or SET NULL.",
            warning=True,
        )


def _prune_change_log(ledger: Ledger) -> Work[int]:
    """Prune the change log as far as it goes without a wait. What goes wrong there is nothing to the runs."""
    try:
        row = yield from _read_committed(
            fetch_one(
                sql.SQL("SELECT EXISTS (SELECT FROM {}) AS any").format(
                    sql.Identifier(ledger.tracking_schema, "mat_view_changes")
                ),
                session=Session.RECORD,
            )
        )
        if row is None or not row["any"]:
            return 0
        rows = yield from change_log.prune_all(ledger.tracking_schema, 0.0)
    except psycopg.errors.InsufficientPrivilege as error:
        yield Note(
            f"The change log is not pruned: {error.diag.message_primary}. To mend it: GRANT SELECT, DELETE ON "
            f"{sql.Identifier(ledger.tracking_schema, 'mat_view_changes').as_string(None)} TO the role.",
            warning=True,
        )
        return 0
    except psycopg.errors.LockNotAvailable:
        yield Note("The change log is not pruned this time: somebody keeps a lock on it.", warning=True)
        return 0
    if rows:
        yield Note(f"{rows:,} row{'' if rows == 1 else 's'} of the change log deleted.")
    return rows


def _tell_room(ledger: Ledger, pruning: Pruning, removed: int) -> Work[None]:
    """VACUUM where that was asked for; else say, after a large prune, what becomes of the room."""
    table = _run_table(ledger)
    if not removed:
        return
    if pruning.vacuum:
        yield from _vacuum(table)
        return
    if removed < _LARGE:
        return
    row = yield from fetch_one(
        sql.SQL("SELECT reltuples FROM pg_catalog.pg_class WHERE oid = to_regclass({})").format(sql.Literal(table.ddl)),
        session=Session.RECORD,
    )
    if row is not None and removed >= _LARGE_SHARE * max(row["reltuples"], 1):
        yield Note(
            "The room of what was deleted is free for new runs once autovacuum has been there, within minutes; "
            f"vacuum=True, or VACUUM {table.ddl}, does it at once. The file itself does not shrink: that takes VACUUM "
            "FULL, which keeps everybody off the table meanwhile."
        )


def _vacuum(table: ResolvedName) -> Work[None]:
    """VACUUM, and say whether that happened: where it is passed over, PostgreSQL only warns, and goes on."""
    row = yield from fetch_one(
        sql.SQL(
            """
            SELECT c.oid::bigint AS oid, clock_timestamp() AS now, current_setting('track_counts')::boolean AS counted,
                   current_setting('server_version_num')::integer >= 170000 AS grantable, current_user AS role,
                   pg_has_role(c.relowner, 'USAGE') OR pg_has_role(d.datdba, 'USAGE')
                   OR CASE WHEN current_setting('server_version_num')::integer >= 170000
                      THEN has_table_privilege(c.oid, 'MAINTAIN') ELSE false END AS may
            FROM pg_catalog.pg_class c, pg_catalog.pg_database d
            WHERE c.oid = to_regclass({}) AND d.datname = current_database()
            """
        ).format(sql.Literal(table.ddl)),
        session=Session.RECORD,
    )
    if row is None or not row["may"]:
        mend = (
            f"GRANT MAINTAIN ON {table.ddl} TO {sql.Identifier(row['role']).as_string(None)}"
            if row is not None and row["grantable"]
            else "let the table's owner prune"
        )
        yield Note(
            f"The runs are deleted; VACUUM was passed over, since the role may not: {table.display} is not its own. "
            f"Autovacuum does it in time; to mend it: {mend}.",
            warning=True,
        )
        return
    begun = time.monotonic()
    command = maintenance("VACUUM", table)
    try:
        # Nothing to set for it.
        yield Alone(Command(command.statement, Session.RECORD), sql.SQL("1"))
    except psycopg.Error as error:
        yield Note(f"The runs are deleted; VACUUM after it was not: {error.diag.message_primary or error}", True)
        return
    took = time.monotonic() - begun
    if not row["counted"]:
        yield Note(f"Then VACUUM: {took:.2f} s. Whether it was passed over cannot be seen, since track_counts is off.")
        return
    for pause in _VACUUM_LOOKS:
        if pause:
            yield Pause(pause)
        seen = yield from fetch_one(
            sql.SQL("SELECT pg_stat_get_last_vacuum_time({}::oid) >= {}::timestamptz AS done").format(
                sql.Literal(row["oid"]), sql.Literal(row["now"].isoformat())
            ),
            session=Session.RECORD,
        )
        if seen is not None and seen["done"]:
            yield Note(f"Then VACUUM: {took:.2f} s.")
            return
    blockers = yield from catalog.blockers_of(table)
    yield Note(
        "The runs are deleted; VACUUM was passed over, since somebody had locked the table"
        + (f": {'; '.join(map(describe_blocker, blockers))}. " if blockers else ". ")
        + "Autovacuum does it in time.",
        warning=True,
    )
