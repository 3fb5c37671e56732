"""Keeping an eye on views: what a watcher sees of them at one moment, and when it is time to say so.

The truth is in the database and is read again each time: a view is stale or it is not. So nothing is lost with an event
that nobody heard, with a connection, or with the process that watches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import TypeVar

from psycopg import sql

from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import catalog, change_log
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.change_log import LoggedTable
from airflow_provider_matviews.services.instructions import Command, Session, Work, fetch_all
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.locking import lock_is_held, lock_name
from airflow_provider_matviews.services.staleness import Baseline, Judgement, Look, judge, look_at

#: How many times as long as the first time a watcher waits at the most before it says the same again.
_MOST_PATIENCE = 32


class Truth(StrEnum):
    """What tells that a source has changed."""

    FINGERPRINTS = "fingerprints"
    CHANGE_LOG = "change_log"


@dataclass(frozen=True)
class Sight:
    """What a watcher sees at one moment.

    :ivar looks: the views that stand and are watched.
    :ivar baselines: what is kept of their last refreshes.
    :ivar at_work: those that are being refreshed, or made or dropped.
    :ivar tables: what they read, by name; nothing where the change log is not asked for.
    :ivar unseen: tables (OID) with changes that a snapshot does not see, and when the latest was made.
    :ivar names: where those stand that were asked for by name.
    :ivar on_record: those that the record knows.
    """

    looks: Mapping[ResolvedName, Look]
    baselines: Mapping[ResolvedName, Baseline]
    at_work: frozenset[ResolvedName] = frozenset()
    tables: Mapping[str, LoggedTable] = field(default_factory=dict)
    unseen: Mapping[tuple[int, str], datetime] = field(default_factory=dict)
    names: Mapping[ViewName, ResolvedName] = field(default_factory=dict)
    on_record: frozenset[ResolvedName] = frozenset()

    def judge(self, view: ResolvedName, truth: Truth, max_staleness: float | None) -> Judgement:
        """Say whether a view is older than what it reads, as :func:`staleness.judge` does.

        :param truth: the change log is asked of the tables that are logged, the fingerprints of all others.
        """
        # Who is writing just now is no reason yet: what comes of it is told when it is committed.
        look, baseline = replace(self.looks[view], writing=()), self.baselines.get(view)
        if truth is Truth.FINGERPRINTS:
            return judge(look, baseline, max_staleness=max_staleness)
        logged = {name: lineage for name in look.sources if (lineage := self.logged(name))}
        masked = _without_counters(look, logged)
        judgement = judge(masked, baseline and _without_counters(baseline, logged), max_staleness=max_staleness)
        latest = sorted({(table.oid, table.latest) for lineage in logged.values() for table in lineage})
        judgement = replace(judgement, digest=f"{judgement.digest} {latest}")
        changes = self._changes(view)
        if not changes or not look.populated:
            return judgement
        names = sorted(changes)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        reason = f"{', '.join(names[:3])}{more} changed at {max(changes.values()):%Y-%m-%d %H:%M:%S %Z}"
        return replace(judgement, stale=True, reason=reason)

    def quiet(self, view: ResolvedName) -> float:
        """Return for how many seconds no source has changed, as far as the log tells; 0 where it tells nothing."""
        changes = self._changes(view)
        return max(0.0, (self.looks[view].at - max(changes.values())).total_seconds()) if changes else 0.0

    def _changes(self, view: ResolvedName) -> dict[str, datetime]:
        """Return the tables with changes that the view's last refresh did not see, and when the latest was made."""
        baseline = self.baselines.get(view)
        if baseline is None:
            return {}
        return {
            table.name.display: at
            for name in self.looks[view].sources
            for table in self.logged(name)
            if (at := self.unseen.get((table.oid, baseline.snapshot))) is not None
        }

    def logged(self, name: str) -> tuple[LoggedTable, ...]:
        """Return a table and all that it is a partition or a child of, where each change of it is logged."""
        return self._logged.get(name, ())

    @cached_property
    def _logged(self) -> dict[str, tuple[LoggedTable, ...]]:
        lineages = {name: self._lineage(name) for name in self.tables}
        return {name: lineage for name, lineage in lineages.items() if all(table.gap is None for table in lineage)}

    def gaps(self, view: ResolvedName) -> dict[str, str]:
        """Return what is not logged of what a view reads, and why."""
        return {
            table.name.display: table.gap
            for name in self.looks[view].sources
            for table in self._lineage(name)
            # A materialized view needs no log: its refreshes are told by its file and its row.
            if table.gap is not None and table.relkind != "m"
        }

    @cached_property
    def _by_oid(self) -> dict[int, LoggedTable]:
        return {table.oid: table for table in self.tables.values()}

    def _lineage(self, name: str) -> tuple[LoggedTable, ...]:
        lineage: dict[int, LoggedTable] = {}
        ahead = [self.tables[name]] if name in self.tables else []
        while ahead:
            table = ahead.pop()
            if table.oid not in lineage:
                lineage[table.oid] = table
                ahead += [self._by_oid[oid] for oid in table.parents if oid in self._by_oid]
        return tuple(lineage.values())


_S = TypeVar("_S", Look, Baseline)


def _without_counters(state: _S, logged: Collection[str]) -> _S:
    """Return what is known of the sources without the counters of those that are logged."""
    sources = {name: _file(value) if name in logged else value for name, value in state.sources.items()}
    if any(_is_counted(value) for value in sources.values()):
        return replace(state, sources=sources)
    # It is nothing to the others when the server begins to count anew.
    return replace(state, sources=sources, server="")


def _file(source: str) -> str:
    """Return what is known of a table but for its counters: its OID, its file and its columns."""
    oid, file, *_, columns = source.split(":")
    return f"{oid}:{file}:{columns}"


def _is_counted(source: str) -> bool:
    # OID, file, three counters and columns. A materialized view has its row's version in place of the counters.
    return source.count(":") == 5


def see(
    ledger: Ledger, names: Collection[ViewName], former: Sight | None = None, *, everything: bool, with_log: bool
) -> Work[Sight]:
    """See how views stand, all in a few statements. Changes nothing.

    :param names: the views that are watched by name. Those that do not stand are left out.
    :param former: what was seen before, which tells where they stand.
    :param everything: whether all that are on record are watched, too.
    :param with_log: whether the change log is read, too.
    """
    resolved = {}
    for name in names:
        known = former.names.get(name) if former is not None else None
        resolved[name] = known or (yield from catalog.resolve(name, session=Session.RECORD))
    views = None if everything else list(resolved.values())
    # Before the look: what is older than it can only make a view stale for a moment.
    kept = yield from ledger.source_states(views)
    looks = yield from look_at(views)
    on_record = frozenset(view for view in looks if (view.schema, view.name) in kept)
    looks = {view: look for view, look in looks.items() if view in on_record or view in resolved.values()}
    baselines = {}
    for view in looks:
        if (baseline := Baseline.of(kept.get((view.schema, view.name)))) is not None:
            baselines[view] = baseline
    sight = Sight(
        looks,
        baselines,
        (yield from _at_work(looks)),
        # Asked again of what does not stand: it may be made elsewhere on the search path.
        names={name: view for name, view in resolved.items() if view in looks},
        on_record=on_record,
    )
    if not with_log:
        return sight
    tables = yield from change_log.tables_of(ledger.tracking_schema, [look.oid for look in looks.values()])
    sight = replace(sight, tables={table.name.display: table for table in tables})
    asked = {
        (table.oid, baseline.snapshot)
        for view, baseline in baselines.items()
        for name in looks[view].sources
        for table in sight.logged(name)
    }
    return replace(sight, unseen=(yield from change_log.unseen(ledger.tracking_schema, asked)))


def listen() -> Work[None]:
    """Have the bell heard on the record's connection."""
    yield Command(sql.SQL("LISTEN {}").format(sql.Identifier(change_log.CHANNEL)), Session.RECORD)


def _at_work(views: Iterable[ResolvedName]) -> Work[frozenset[ResolvedName]]:
    by_lock = {lock_name(view): view for view in views}
    held = lock_is_held(sql.SQL("n.lock"))
    rows = yield from fetch_all(
        sql.SQL("SELECT n.lock FROM unnest(%s::text[]) AS n (lock) WHERE {}").format(held),
        (list(by_lock),),
        Session.RECORD,
    )
    return frozenset(by_lock[row["lock"]] for row in rows)


@dataclass(frozen=True)
class Rhythm:
    """When a watcher says that a view is stale. All in seconds.

    :ivar debounce: how long its sources have to be quiet.
    :ivar max_wait: after which it is said though they are not.
    :ivar again_after: after which it is said again where no refresh has come of it; each time twice as long.
    """

    debounce: float
    max_wait: float
    again_after: float


@dataclass
class Watched:
    """A view that is watched: from when on it has been stale, and what was said of it.

    :ivar due_at: when it is to be looked at again at the latest; None where there is nothing to wait for.
    """

    rhythm: Rhythm
    due_at: float | None = None
    _stale_since: float | None = None
    _moved_at: float = 0.0
    _looked_at: float | None = None
    _digest: str = ""
    _refreshed_at: datetime | None = None
    _said: int = 0

    def is_due(self, judgement: Judgement, now: float, *, quiet: float = 0.0, at_work: bool) -> bool:
        """Take note of how the view stands, and return whether it is time to say so.

        :param now: the moment, on any clock that only goes forward.
        :param quiet: seconds since the latest change, where that is known; what others could not see at the last look
            has been committed after it, whenever it was made.
        :param at_work: whether it is being refreshed: how it stands after that is what counts.
        """
        moved_at = now - quiet if self._looked_at is None else max(now - quiet, self._looked_at)
        self._looked_at = now
        if not judgement.stale:
            self._stale_since = self.due_at = None
            return False
        if self._stale_since is None or judgement.refreshed_at != self._refreshed_at:
            # Newly so, or again although it has been refreshed.
            self._stale_since, self._moved_at = now, moved_at
            self._said = 0
        elif judgement.digest != self._digest:
            self._moved_at = moved_at
        self._digest, self._refreshed_at = judgement.digest, judgement.refreshed_at
        if not self._said:
            self.due_at = min(self._moved_at + self.rhythm.debounce, self._stale_since + self.rhythm.max_wait)
        assert self.due_at is not None
        if now < self.due_at or at_work:
            return False
        self.due_at = now + self.rhythm.again_after * min(2**self._said, _MOST_PATIENCE)
        self._said += 1
        return True
