"""What an operation that takes long is doing, in one line for the task log.

A look is one statement, over what the server holds in memory (locks, progress reports) and a few rows of its
catalogs. Nothing in it waits for the operation: it opens no relation that the operation may have locked. In
particular not by ``pg_relation_size()``, which waits for the lock of the heap that REFRESH writes (measured); the size
of a file is read beside all locks.

How a REFRESH looks from outside (measured on PostgreSQL 15, 16 and 18): the new heap is in nobody else's pg_class,
but pg_locks has its OID, which is also the name of its file until the refresh has swapped the two. The modes of the
locks tell the phases apart. No progress view covers a REFRESH, not even while it rebuilds indexes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from psycopg import sql

from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.instructions import Work, fetch_one
from airflow_provider_matviews.services.ledger import Operation
from airflow_provider_matviews.services.locking import describe_blocker
from airflow_provider_matviews.services.response import Report, Step
from airflow_provider_matviews.services.strategies.auto import PastRefresh

#: How much longer than the median is worth a word.
_LONGER = 1.2
#: How many of those in the way are named.
_BLOCKERS_NAMED = 3

_DOING = {Operation.CREATE: "Creating", Operation.REFRESH: "Refreshing", Operation.DROP: "Dropping"}
_STEPS = {
    "analyze": "collecting statistics",
    "vacuum": "vacuuming",
    "lock": "putting the new view in place",
    "cut": "putting the new view in place",
}
#: pg_stat_progress_create_index.phase of a btree in words, and what of it is counted
#: (https://www.postgresql.org/docs/current/progress-reporting.html#CREATE-INDEX-PROGRESS-REPORTING).
_INDEX_PHASES = {
    "building index: scanning table": ("reading rows", "blocks"),
    "building index: sorting live tuples": ("sorting", None),
    "building index: loading tuples in tree": ("writing", "tuples"),
}

# The locks of one backend, which every role may see. Then whoever it waits for: pg_blocking_pids() stops the whole lock
# manager for a moment, so it is asked only of a backend that does wait. `extend` is waited for by microseconds.
_LOOK = sql.SQL(
    """
    WITH RECURSIVE mine AS MATERIALIZED (
        SELECT l.locktype, l.relation, l.mode, l.granted, l.virtualtransaction
        FROM pg_catalog.pg_locks l WHERE l.pid = %(pid)s
    ) {parts}
    SELECT EXISTS (SELECT FROM mine) AS present,
           CASE WHEN EXISTS (SELECT FROM mine WHERE NOT granted AND locktype <> 'extend') THEN (
               SELECT jsonb_agg(jsonb_build_object(
                          'pid', b.pid, 'user', a.usename, 'application', a.application_name,
                          'age', round(extract(epoch FROM clock_timestamp() - a.xact_start)),
                          'query', left(regexp_replace(nullif(a.query, '<insufficient privilege>'), '\\s+', ' ', 'g'),
                                        80)) ORDER BY a.xact_start, b.pid)
               FROM (SELECT DISTINCT pid FROM unnest(pg_catalog.pg_blocking_pids(%(pid)s)) AS pid) b
               LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = b.pid
           ) END AS blockers, {columns}
    """
)

# Relations that the backend has locked and that nobody else can see are its own, not yet committed.
_REFRESH_PARTS = sql.SQL(
    """
    , held AS (
        SELECT m.relation AS oid, array_agg(m.mode) AS modes FROM mine m
        WHERE m.locktype = 'relation' AND m.granted GROUP BY m.relation
    ), fresh AS (
        SELECT h.oid, h.modes FROM held h WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = h.oid)
    ), live AS (
        SELECT c.oid, h.modes FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN held h ON h.oid = c.oid
        WHERE n.nspname = %(schema)s AND c.relname = %(name)s AND c.relkind = 'm'
    ), indexes AS (
        SELECT count(*) AS n, count(h.oid) AS reached,
               (array_agg(c.relname::text ORDER BY h.oid DESC NULLS LAST))[1] AS name
        FROM live JOIN pg_catalog.pg_index i ON i.indrelid = live.oid
        JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
        LEFT JOIN held h ON h.oid = i.indexrelid AND 'AccessExclusiveLock' = ANY (h.modes)
    ) {files}
    """
)
# A REFRESH takes SHARE on the view to rebuild its indexes, by their OIDs. CONCURRENTLY has the new rows analyzed before
# it compares them, and takes ROW EXCLUSIVE on the view to apply what differs.
_REFRESH_COLUMNS = sql.SQL(
    """
           EXISTS (SELECT FROM live WHERE 'ShareLock' = ANY (modes)) AS indexing,
           EXISTS (SELECT FROM live WHERE 'RowExclusiveLock' = ANY (modes)) AS applying,
           EXISTS (SELECT FROM fresh WHERE 'ShareUpdateExclusiveLock' = ANY (modes)) AS comparing,
           indexes.n, indexes.reached, indexes.name, {size}::bigint AS size
    FROM indexes
    """
)
# The new heap with its TOAST table and that one's index, wherever they are (temporary ones are named after their
# backend), and all their segments.
_FILES = sql.SQL(
    """
    , segments AS (
        SELECT d.path || f.name AS path, 0 AS number, (pg_catalog.pg_stat_file(d.path || f.name, true)).size AS bytes
        FROM (SELECT CASE WHEN t.spcname = 'pg_default' THEN 'base' ELSE format(
                         'pg_tblspc/%%s/PG_%%s_%%s', t.oid,
                         current_setting('server_version_num')::integer / 10000, s.catalog_version_no)
                     END || '/' || b.oid || '/' AS path
              FROM pg_catalog.pg_tablespace t, pg_catalog.pg_database b, pg_catalog.pg_control_system() s
              WHERE t.spcname <> 'pg_global' AND b.datname = current_database()) d,
             (SELECT unnest(ARRAY[fresh.oid::text, format('t%%s_%%s', v.backend, fresh.oid)]) AS name
              FROM fresh, (SELECT split_part(virtualtransaction, '/', 1) AS backend FROM mine LIMIT 1) v) f
        UNION ALL
        SELECT s.path, s.number + 1, (pg_catalog.pg_stat_file(s.path || '.' || s.number + 1, true)).size
        FROM segments s WHERE s.bytes >= pg_size_bytes(current_setting('segment_size'))
    )
    """
)
_NOTHING = sql.SQL("")
_WITHOUT_SIZE = _LOOK.format(
    parts=_REFRESH_PARTS.format(files=_NOTHING), columns=_REFRESH_COLUMNS.format(size=sql.SQL("NULL"))
)
# An index without entries takes up to four blocks. Taken off, what has not been written yet is 0.
_SIZE = sql.SQL("(SELECT sum(CASE number WHEN 0 THEN greatest(bytes - 32768, 0) ELSE bytes END) FROM segments)")
_WITH_SIZE = _LOOK.format(parts=_REFRESH_PARTS.format(files=_FILES), columns=_REFRESH_COLUMNS.format(size=_SIZE))
# A function that the role may not call is refused even in a branch not taken.
_MAY_STAT = sql.SQL(
    "SELECT has_function_privilege('pg_catalog.pg_stat_file(text, boolean)', 'EXECUTE') "
    "AND has_function_privilege('pg_catalog.pg_control_system()', 'EXECUTE') AS may"
)


def _reported(view: str, columns: str) -> sql.Composable:
    return _LOOK.format(
        parts=_NOTHING,
        columns=sql.SQL(
            "p.* FROM (SELECT) one LEFT JOIN (SELECT {} FROM pg_catalog.{} WHERE pid = %(pid)s) p ON true"
        ).format(sql.SQL(columns), sql.Identifier(view)),
    )


_INDEX = _reported("pg_stat_progress_create_index", "phase, blocks_done, blocks_total, tuples_done, tuples_total")
_ANALYZE = _reported(
    "pg_stat_progress_analyze",
    "CASE phase WHEN 'acquiring sample rows' THEN sample_blks_scanned END AS blocks_done, "
    "sample_blks_total AS blocks_total",
)
_VACUUM = _reported(
    "pg_stat_progress_vacuum",
    "CASE phase WHEN 'scanning heap' THEN heap_blks_scanned END AS blocks_done, heap_blks_total AS blocks_total",
)
_OTHER = _LOOK.format(parts=_NOTHING, columns=sql.SQL("NULL AS phase"))


@dataclass
class Progress:
    """Tells how far one operation is, while it runs.

    :param view: what it is about.
    :param pid: of the server process that does the work.
    :param report: of the operation; says which step runs now.
    :param begun: when it began, by the report's clock.
    :param history: returns the view's latest successful refreshes, newest first. Asked once.
    :param since: from when on its time is compared with theirs; None for from now on.
    """

    view: ResolvedName
    operation: Operation
    pid: int
    report: Report
    begun: float
    history: Callable[[], Work[Sequence[PastRefresh]]]
    since: float | None = None
    _since: float = field(init=False)
    _past: Sequence[PastRefresh] | None = field(init=False, default=None)
    _sizes: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # What went before, a wait for another operation on the view, says nothing about how long this one takes.
        self._since = self.report.clock() if self.since is None else self.since

    def line(self) -> Work[str | None]:
        """Have one look and return what there is to tell; None where the operation's process is gone.

        Takes one round trip, and the first time up to three. What fails once is not asked for again.

        :raises psycopg.Error: when the look failed, which is nothing to the operation.
        """
        step = self.report.current
        if self._past is None:
            self._past = ()
            if self.operation is Operation.REFRESH:
                self._past = yield from self.history()
        seen = yield from self._look(step)
        if seen is None or not seen["present"]:
            return None
        told = f"{_DOING[self.operation]} {self.view.display} for {duration_text(self.report.clock() - self.begun)}"
        if seen["blockers"]:
            told += f": waiting for a lock behind {_those_in_the_way(seen['blockers'])}"
        else:
            if doing := self._doing(step, seen):
                told += f": {doing}"
            if rest := self._rest():
                told += f"; {rest}"
        # One line, whatever names and queries of others hold.
        return f"{' '.join(told.split())}."

    def _look(self, step: Step | None) -> Work[dict[str, Any] | None]:
        parameters = {"pid": self.pid, "schema": self.view.schema, "name": self.view.name}
        if not _rewrites(step):
            return (yield from fetch_one(_statement(step), parameters))
        if self._sizes is None:
            self._sizes = False
            row = yield from fetch_one(_MAY_STAT)
            self._sizes = row is not None and row["may"]
        if not self._sizes:
            return (yield from fetch_one(_WITHOUT_SIZE, parameters))
        self._sizes = False
        seen = yield from fetch_one(_WITH_SIZE, parameters)
        self._sizes = True
        return seen

    def _doing(self, step: Step | None, seen: dict[str, Any]) -> str:
        if step is None:
            return ""
        if _rewrites(step):
            return self._refreshing(step, seen)
        if step.name.startswith("index "):
            return _building(step, seen)
        words = _STEPS.get(step.name, step.name)
        share = _share(seen.get("blocks_done"), seen.get("blocks_total"))
        return f"{words}, {share}" if share else words

    def _refreshing(self, step: Step, seen: dict[str, Any]) -> str:
        if seen["indexing"]:
            if seen["reached"]:
                return f"building index {seen['reached']} of {seen['n']} ({seen['name']})"
            return "the rows are written"
        if seen["applying"]:
            return "applying what has changed"
        # In a swap somebody's settings may have been carried over under the lock that ANALYZE takes.
        if seen["comparing"] and step.name == "refresh":
            return "comparing the new rows with the old ones"
        if seen["size"] is None:
            return "running the query and writing its rows"
        if seen["size"] == 0:
            return "running the query"
        last = next((past.heap_bytes for past in self._past or () if past.heap_bytes), None)
        before = f" ({size_text(last)} last time)" if last else ""
        return f"writing rows, {size_text(seen['size'])} so far{before}"

    def _rest(self) -> str:
        strategy = self.report.response.get("strategy")
        durations = [past.duration_ms / 1000 for past in self._past or () if past.strategy == strategy]
        if not durations:
            return ""
        usual, spent = median(durations), self.report.clock() - self._since
        if spent > _LONGER * usual:
            return f"longer than usual ({duration_text(usual)})"
        return f"about {duration_text(_roughly(usual - spent))} left" if usual - spent >= 1 else ""


def _rewrites(step: Step | None) -> bool:
    return step is not None and step.name in ("refresh", "fill")


def _statement(step: Step | None) -> sql.Composable:
    if step is None:
        return _OTHER
    if step.name.startswith("index "):
        return _INDEX
    return {"analyze": _ANALYZE, "vacuum": _VACUUM}.get(step.name, _OTHER)


def _building(step: Step, seen: dict[str, Any]) -> str:
    place = f" {step.place[0]} of {step.place[1]}" if step.place else ""
    told = f"building index{place} ({step.name.removeprefix('index ')})"
    words, counted = _INDEX_PHASES.get(seen["phase"] or "", ("", "blocks"))
    share = _share(seen[f"{counted}_done"], seen[f"{counted}_total"]) if counted else ""
    more = " ".join(filter(None, (words, share)))
    return f"{told}, {more}" if more else told


def _share(done: int | None, total: int | None) -> str:
    if done is None or not total:
        return ""
    return f"{max(0, min(100, done * 100 // total))} %"


def _those_in_the_way(blockers: Sequence[dict[str, Any]]) -> str:
    named = [
        describe_blocker(each) if each["pid"] else "a prepared transaction (see pg_prepared_xacts)"
        for each in blockers[:_BLOCKERS_NAMED]
    ]
    more = len(blockers) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more else "")


def duration_text(seconds: float) -> str:
    """Return a duration for a person: its two largest units at most.

    :param seconds: not negative.
    """
    if seconds < 1:
        return "less than 1 s"
    for unit, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        # Rounded to what is shown first, so that 59.7 s is a minute and not 60 s.
        rounded = round(seconds / smaller)
        whole, rest = divmod(rounded, unit // smaller)
        if whole:
            return f"{whole} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{round(seconds)} s"


def size_text(size: int) -> str:
    """Return a size for a person, in units of 1024 as PostgreSQL has them: ``0 bytes``, ``1.5 MB``, ``480 MB``.

    :param size: bytes, not negative.
    """
    if size < 1024:
        return f"{size} bytes"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        value /= 1024
        text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
        # What rounds up to 1024 is one of the next unit.
        if float(text) < 1024 or unit == "PB":
            return f"{text} {unit}"
    raise AssertionError(size)


def _roughly(seconds: float) -> float:
    """Round what is only estimated: a second more or less is not known."""
    step = next((step for limit, step in ((20, 1), (60, 5), (600, 10), (7200, 60)) if seconds < limit), 600)
    return max(1, round(seconds / step) * step)
