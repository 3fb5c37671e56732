"""Retention in SQL: which runs go, found by way of the index, and how they go without being in anybody's way.

Of every kind of run (a view's successful refreshes, its failed creates, ...) a cut is found: what is older goes. The
cut is the oldest run that is kept by its number, or the moment before which runs are too old, whichever is later, and
never later than the last run of the kind.

To know how many runs are too many one has to know how many there are, and an index cannot be asked for that: counting
costs 70 ms for a million (measured), much more than it takes to delete a few. So a prune leaves behind how many it left
of each kind, up to which run (``mat_view_retention``), and the next one counts only what has come since, and finds the
cut from the old end: what it costs follows what came and what goes. That is believed only while the server's own
counter says that nobody else has deleted a run since, the table is the same file, and of each kind the oldest run is
the one that was left as such; else, and once a week, all is counted again. What this cannot see: a run that was written
with an older date makes it keep one more until then; and what others have deleted from the middle a few seconds ago,
which the counter may not tell before 10 s have passed, counts as kept, this once.

Rows that somebody has locked are passed over, and nothing is waited for; each batch is a transaction of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    Query,
    Session,
    Work,
    fetch_all,
    fetch_one,
)
from airflow_provider_matviews.services.ledger import DefinitionRecord, Ledger, Operation, RunStatus
from airflow_provider_matviews.services.maintenance import maintenance
from airflow_provider_matviews.services.migrations import ensure_schema, explained
from airflow_provider_matviews.services.reap import reap_runs
from airflow_provider_matviews.services.selection import Selection

#: Runs that the end of one run deletes at the most, for a policy that is declared over a long history.
RETAINED_AT_ONCE = 1000
#: Views that are looked at by one statement, so that it is a short one.
_LOOKED_AT = 250
_NEWS_EVERY = 10.0
#: How long it is believed what was counted once.
_BELIEVED = timedelta(days=7)
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
    newest_at: datetime
    newest_id: int
    first_id: int
    created_at: datetime | None
    id: int | None
    doomed: int
    removed: int = 0
    ended: bool = False

    @property
    def remaining(self) -> int:
        return 0 if self.ended else self.doomed - self.removed

    def told(self, view: str, *, dry_run: bool) -> Pruned:
        removed = self.doomed if dry_run else self.removed
        return Pruned(view, _OPERATIONS[self.operation], _STATUSES[self.status], removed, self.runs - removed)


_KindKey = tuple[int, int, int]


@dataclass
class _Memory:
    """What the last prune has counted, as far as it can be believed.

    :ivar now: the server's clock, when this prune began.
    :ivar filenode: the file of the run table, which is another one after TRUNCATE.
    :ivar deletions: how many runs were ever deleted, as the server counts them; None where it does not.
    :ivar counted_at: when all was counted.
    :ivar kinds: how many there were of each kind, up to and with which run (date and id), and the id of the first.
    """

    now: datetime
    filenode: int
    deletions: int | None
    counted_at: datetime
    kinds: dict[_KindKey, tuple[int, datetime, int, int]]


def prune_runs(ledger: Ledger, pruning: Pruning) -> Work[PruneResponse]:
    """Delete what retention does not keep, of the views that are meant, dropped ones too.

    Marks runs that have ended without a word first (not in a dry run), and prunes the change log where it holds
    anything. Many may do so at once; what one has locked another leaves alone.

    :raises ViewNotFound: when an exact name is of a view that is not on record.
    :raises MissingPrivilege: when the role may not use the run tables.
    :raises OperationCancelled: when it was stopped; what was deleted until then stays deleted.
    """
    begun = time.monotonic()
    if pruning.longest is not None:
        yield Deadline(begun + pruning.longest, pruning.longest)
    reaped: list[int] = []
    if not pruning.dry_run:
        yield from ensure_schema(ledger.tracking_schema)
        reaped = yield from reap_runs(ledger)
    records = yield from _chosen(ledger, pruning)
    policies, declared = yield from _policies(records, pruning.policy)
    yield Note(
        f"{'Dry run: looking' if pruning.dry_run else 'Pruning'} the history of {len(policies):,} "
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
    except psycopg.Error:
        if removed := sum(kind.removed for kind in kinds):
            yield Note(f"Stopped: {removed:,} runs had been deleted by then, and stay deleted.", warning=True)
        raise
    told = [kind.told(names[kind.definition], dry_run=pruning.dry_run) for kind in kinds]
    told = sorted((each for each in told if each.removed), key=lambda each: (-each.removed, each.view))
    logged = 0
    if not pruning.dry_run:
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


def _array(values: Iterable[int | float | datetime | None]) -> str:
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
    memory = yield from _remember(ledger)
    told, first = begun, True
    waiting: list[_Kind] = []
    for start in range(0, len(ids), _LOOKED_AT):
        some = {number: policies[number] for number in ids[start : start + _LOOKED_AT]}
        found = yield from _read_committed(_look(ledger, some, memory))
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
        yield from _keep(ledger, memory, kinds)


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
        result = yield from work
        yield Command(sql.SQL("COMMIT"), Session.RECORD)
    except psycopg.Error:
        yield Command(sql.SQL("ROLLBACK"), Session.RECORD, undoing=True)
        raise
    return result


def _remember(ledger: Ledger) -> Work[_Memory]:
    """Return what the last prune has counted; nothing where it is not to be believed."""
    table = sql.Literal(sql.Identifier(ledger.tracking_schema, "mat_view_runs").as_string(None))
    facts = yield from fetch_one(
        sql.SQL(
            "SELECT clock_timestamp() AS now, pg_relation_filenode({table}::regclass)::bigint AS filenode, "
            "CASE WHEN current_setting('track_counts')::boolean "
            "THEN pg_stat_get_tuples_deleted({table}::regclass) END AS deletions"
        ).format(table=table),
        session=Session.RECORD,
    )
    assert facts is not None
    memory = _Memory(**facts, counted_at=facts["now"], kinds={})
    try:
        row = yield from fetch_one(
            sql.SQL("SELECT * FROM {}").format(sql.Identifier(ledger.tracking_schema, "mat_view_retention")),
            session=Session.RECORD,
        )
    except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege):
        # A dry run makes no tables; and what may not be read is counted.
        return memory
    if (
        row is not None
        and (row["filenode"], row["deletions"]) == (memory.filenode, memory.deletions)
        and timedelta(0) <= memory.now - row["counted_at"] < _BELIEVED
    ):
        memory.counted_at = row["counted_at"]
        keys = zip(row["definitions"], row["operations"], row["statuses"], strict=True)
        memory.kinds = dict(
            zip(keys, zip(row["runs"], row["moments"], row["ids"], row["first_ids"], strict=True), strict=True)
        )
    return memory


def _keep(ledger: Ledger, memory: _Memory, kinds: Sequence[_Kind]) -> Work[None]:
    """Leave behind, for the next prune, how many there are now of each kind."""
    if memory.deletions is None:
        return
    # Where somebody had locked some of those that were to go, the first is another one, which is seen next time.
    known = memory.kinds | {
        (kind.definition, kind.operation, kind.status): (
            kind.runs - kind.removed,
            kind.newest_at,
            kind.newest_id,
            kind.first_id,
        )
        for kind in kinds
    }
    values = {
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
        yield Query(statement, values, Session.RECORD)
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.SerializationFailure) as error:
        yield Note(f"What was counted could not be kept, and is counted again next time: {error.diag.message_primary}.")


def _look(ledger: Ledger, policies: Mapping[int, RetentionPolicy], memory: _Memory) -> Work[list[_Kind]]:
    """Return the kinds of runs that there are of some views, and what goes of each."""
    asked = [(key, keep, age, *memory.kinds.get(key, (None, None, None, None))) for key, keep, age in _kinds(policies)]
    rows = yield from fetch_all(
        sql.SQL(
            """
            SELECT k.definition, k.operation, k.status, counted.runs, newest.created_at AS newest_at,
                   newest.id AS newest_id, cut.created_at, cut.id,
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
    """Delete one batch, in a transaction of its own, and note what went."""
    statement = sql.SQL(
        """
        WITH gone AS (
            DELETE FROM {runs} WHERE id = ANY (ARRAY(
                SELECT doomed.id
                FROM unnest(%(definitions)s::bigint[], %(operations)s::integer[], %(statuses)s::integer[],
                            %(moments)s::timestamptz[], %(ids)s::bigint[], %(limits)s::bigint[])
                     AS c (definition, operation, status, created_at, id, runs)
                CROSS JOIN LATERAL (
                    -- What has changed in the meantime is looked at again when it is locked.
                    SELECT r.id FROM {runs} r WHERE {of_c} AND (r.created_at, r.id) < (c.created_at, c.id)
                    ORDER BY r.created_at, r.id LIMIT c.runs FOR UPDATE SKIP LOCKED
                ) doomed
            )) AND status <> {running}
            RETURNING mat_view_definition_id, operation, status
        )
        SELECT mat_view_definition_id AS definition, operation, status, count(*) AS removed FROM gone GROUP BY 1, 2, 3
        """
    ).format(runs=ledger.table("mat_view_runs"), of_c=_of("c"), running=sql.Literal(int(RunStatus.RUNNING)))
    parameters = {
        "definitions": _array(kind.definition for kind, _ in batch),
        "operations": _array(kind.operation for kind, _ in batch),
        "statuses": _array(kind.status for kind, _ in batch),
        "moments": _array(kind.created_at for kind, _ in batch),
        "ids": _array(kind.id for kind, _ in batch),
        "limits": _array(some for _, some in batch),
    }
    rows = yield from _read_committed(fetch_all(statement, parameters, Session.RECORD))
    removed = {(row["definition"], row["operation"], row["status"]): row["removed"] for row in rows}
    for kind, some in batch:
        went = removed.get((kind.definition, kind.operation, kind.status), 0)
        kind.removed += went
        # Somebody else has locked or deleted the others.
        kind.ended = went < some


def _prune_change_log(ledger: Ledger) -> Work[int]:
    """Prune the change log as far as it goes without a wait. What goes wrong there is nothing to the runs."""
    try:
        row = yield from fetch_one(
            sql.SQL("SELECT EXISTS (SELECT FROM {}) AS any").format(
                sql.Identifier(ledger.tracking_schema, "mat_view_changes")
            ),
            session=Session.RECORD,
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
    if rows:
        yield Note(f"{rows:,} row{'' if rows == 1 else 's'} of the change log deleted.")
    return rows


def _tell_room(ledger: Ledger, pruning: Pruning, removed: int) -> Work[None]:
    """VACUUM where that was asked for; else say, after a large prune, what becomes of the room."""
    table = ResolvedName(ledger.tracking_schema, "mat_view_runs", f"{ledger.tracking_schema}.mat_view_runs")
    if not removed:
        return
    if pruning.vacuum:
        begun = time.monotonic()
        command = maintenance("VACUUM", table)
        try:
            # Nothing to set for it.
            yield Alone(Command(command.statement, Session.RECORD), sql.SQL("1"))
        except psycopg.Error as error:
            yield Note(f"The runs are deleted; VACUUM after it was not: {error.diag.message_primary or error}", True)
        else:
            yield Note(f"Then VACUUM: {time.monotonic() - begun:.2f} s.")
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
