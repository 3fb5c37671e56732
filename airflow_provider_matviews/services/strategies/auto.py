"""``auto``: the strategy that costs readers least, then the server, chosen from facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from airflow_provider_matviews.definition import RefreshStrategy
from airflow_provider_matviews.services.catalog import IndexFacts
from airflow_provider_matviews.services.strategies.concurrent import usable_indexes

#: Share of rows changed up to which a concurrent refresh is worth its longer time, for the WAL that it spares
#: (measured: with 1 % changed about half of a rebuild's WAL, with 50 % twice as much).
FEW_CHANGES = 0.05
#: Size in bytes up to which either way takes a moment, and the one that leaves the view's OID alone is chosen.
SMALL = 8 * 1024 * 1024
#: Milliseconds up to which nobody notices how much slower one way is.
NOTICEABLE_MS = 1000
#: How often slower a concurrent refresh may be before a rebuild is chosen all the same.
MUCH_SLOWER = 5.0


@dataclass(frozen=True)
class PastRefresh:
    """What is recorded of a refresh that succeeded.

    :ivar heap_bytes: the view without its indexes, after it.
    """

    strategy: str
    duration_ms: int
    rows: int | None
    rows_inserted: int | None
    rows_deleted: int | None
    heap_bytes: int | None

    @property
    def changed_share(self) -> float | None:
        """Which part of the rows it changed; None where that was not counted."""
        if self.rows_inserted is None or self.rows_deleted is None or not self.rows:
            return None
        # A changed row is deleted and inserted.
        return min(1.0, max(self.rows_inserted, self.rows_deleted) / self.rows)


@dataclass(frozen=True)
class Situation:
    """The facts that decide.

    :ivar swap_obstacles: why the view cannot be swapped; empty when it can.
    :ivar heap_bytes: its size without indexes, which come and go for other reasons.
    :ivar rows: about how many rows it has; None where unknown.
    :ivar history: its latest successful refreshes, newest first.
    :ivar owner_may_temp: whether the view's owner may make temporary tables.
    :ivar max_bloat: from which size, relative to that after the last rebuild, it is rebuilt.
    """

    populated: bool
    indexes: Sequence[IndexFacts]
    swap_obstacles: Sequence[str]
    heap_bytes: int
    rows: int | None
    history: Sequence[PastRefresh]
    max_bloat: float
    owner_may_temp: bool = True

    @property
    def bloat(self) -> float | None:
        """Its size a row, relative to that after its last rebuild; None before one is recorded."""
        for past in self.history:
            if past.strategy in ("swap", "regular") and past.heap_bytes and past.rows and self.rows:
                return (self.heap_bytes / self.rows) / (past.heap_bytes / past.rows)
        return None

    def median_ms(self, strategy: RefreshStrategy) -> float | None:
        """How long refreshes by a strategy took; None before the first."""
        durations = [past.duration_ms for past in self.history if past.strategy == strategy.value]
        return median(durations) if durations else None


def choose(situation: Situation) -> tuple[RefreshStrategy, str]:
    """Return the strategy to use on a view now, and why, in one clause."""
    if not situation.populated:
        return RefreshStrategy.REGULAR, "it holds no data yet, so there are no readers to keep waiting"
    # REFRESH ... CONCURRENTLY keeps the new rows in a temporary table of the view's owner.
    usable = usable_indexes(situation.indexes) if situation.owner_may_temp else []
    if situation.swap_obstacles and usable:
        return (
            RefreshStrategy.CONCURRENT,
            f"its unique index {usable[0].name} lets readers go on, and swap is not possible: "
            f"{'; '.join(situation.swap_obstacles)}",
        )
    if situation.swap_obstacles:
        return (
            RefreshStrategy.REGULAR,
            "readers have to wait: it has no unique index for a concurrent refresh, and swap is not possible: "
            f"{'; '.join(situation.swap_obstacles)}",
        )
    if not usable:
        return (
            RefreshStrategy.SWAP,
            "readers go on while it is rebuilt, and it has no unique index for a concurrent one",
        )
    return _between(situation)


def _between(situation: Situation) -> tuple[RefreshStrategy, str]:
    """Choose where both of the ways that let readers go on are possible."""
    swap_ms, concurrent_ms = (situation.median_ms(each) for each in (RefreshStrategy.SWAP, RefreshStrategy.CONCURRENT))
    if swap_ms and concurrent_ms and concurrent_ms > MUCH_SLOWER * swap_ms and concurrent_ms > NOTICEABLE_MS:
        return (
            RefreshStrategy.SWAP,
            f"a concurrent refresh of it took {concurrent_ms / swap_ms:.0f} times as long "
            f"({concurrent_ms:,.0f} against {swap_ms:,.0f} ms)",
        )
    if situation.heap_bytes <= SMALL:
        return RefreshStrategy.CONCURRENT, "it is small, and that leaves everything about it alone"
    bloat = situation.bloat
    if bloat is not None and bloat >= situation.max_bloat:
        return RefreshStrategy.SWAP, f"a row of it takes {bloat:.1f} times the room it took after the last rebuild"
    shares = [past.changed_share for past in situation.history if past.changed_share is not None]
    if not shares:
        return RefreshStrategy.SWAP, "how much of it changes is not known yet, and a rebuild is the faster way"
    share = median(shares)
    if share <= FEW_CHANGES:
        return RefreshStrategy.CONCURRENT, f"recent refreshes changed {share:.1%} of its rows, which spares WAL"
    return RefreshStrategy.SWAP, f"recent refreshes changed {share:.0%} of its rows, more than is worth a comparison"
