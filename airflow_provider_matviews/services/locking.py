"""Two kinds of good manners: one operation on a view at a time, and nobody queues behind us."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from airflow_provider_matviews.definition import IfLocked
from airflow_provider_matviews.services.catalog import ResolvedName, blockers_of, kinds_of
from airflow_provider_matviews.services.instructions import Command, Note, Pause, Work, fetch_one
from airflow_provider_matviews.timeouts import Timeouts

_T = TypeVar("_T")

#: Part of what is hashed, so that our keys do not meet those of others.
_NAMESPACE = "airflow_provider_matviews"
#: Says in pg_stat_activity why the session is idle.
_STEP_BACK = sql.SQL("ROLLBACK /* waits for another operation on the view */")
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0
#: Shorter for who waits for another operation: else those who come later, and ask more often, always go first.
_LONGEST_WAIT = 1.0
#: Seconds between two lines about a wait that goes on.
_NEWS_EVERY = 30.0


@dataclass(frozen=True)
class Patience:
    """How long an operation waits for locks.

    :param lock_timeout: seconds that one attempt may stand in the server's lock queue. Readers that come later
        queue behind it, so this is the longest that they wait for us.
    :param max_wait: seconds after which the operation gives up, over all attempts, and for another operation
        on the same view.
    """

    lock_timeout: float = 1.0
    max_wait: float = 600.0

    @classmethod
    def of(cls, timeouts: Timeouts) -> Patience:
        """Return what the limits of an operation say of it."""
        said = timeouts.said()
        return cls(**{name: said[name] for name in ("lock_timeout", "max_wait") if name in said})

    @property
    def lock_timeout_setting(self) -> str:
        """As PostgreSQL's lock_timeout takes it."""
        return f"{round(self.lock_timeout * 1000)}ms"


DEFAULT_PATIENCE = Patience()


def _pauses(longest: float = _LONGEST_PAUSE) -> Callable[[], float]:
    pause = _FIRST_PAUSE

    def following() -> float:
        nonlocal pause
        current, pause = pause, min(pause * 2, longest)
        # Jitter only spreads competitors; it is no secret.
        return current * random.uniform(0.5, 1.0)  # noqa: S311

    return following


def take_view_lock(
    view: ResolvedName,
    if_locked: IfLocked,
    patience: Patience,
    begin_again: Callable[[], Work[None]],
    deferral: str | None = None,
    former: ResolvedName | None = None,
) -> Work[float | None]:
    """Take the view's advisory lock until the transaction ends; return the seconds waited, None if it was not had.

    A transaction's lock, not a session's, so that it works behind a transaction pooler; a 64-bit key, since
    32 bits collide (measured: 2 pairs in 200,000 names). See
    https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS.

    While it waits the transaction is rolled back: behind a transaction pooler those who wait would otherwise keep all
    the server's connections from the one they wait for.

    :param begin_again: begins the transaction anew, as it was.
    :param deferral: what all copies of one deferred operation have in common. They go one after the other, whatever
        ``if_locked`` says of other operations: held with the view's lock or without it, this one is had in the end.
    :param former: the name that it has had, whose lock is taken too, unless a view stands that has its new name:
        others may have made another one of the old name since.
    """
    begun = time.monotonic()
    pause = _pauses(_LONGEST_WAIT)
    told: float | None = None
    while True:
        waited = time.monotonic() - begun
        if deferral is not None and not (yield from _try_lock(_deferral_key(deferral))):
            whose, longest = f"This very task's earlier operation on {view.display}", float("inf")
        elif (held := (yield from _try_locks(view, former))) is not None:
            if if_locked is not IfLocked.WAIT or waited >= patience.max_wait:
                return None
            whose, longest = f"Another operation on {held.display}", patience.max_wait
        elif told is None:
            return 0.0
        else:
            yield Note(f"Had the lock of {view.display} after {waited:.1f} s.")
            return waited
        if told is None or waited - told >= _NEWS_EVERY:
            told = waited
            yield Note(f"{whose} is running; waiting for it ({waited:.0f} s so far).")
        yield Command(_STEP_BACK)
        yield Pause(min(pause(), longest - waited))
        yield from begin_again()


def _try_locks(view: ResolvedName, former: ResolvedName | None) -> Work[ResolvedName | None]:
    """Return the one that somebody else holds; None where all were had."""
    names = [view]
    if former is not None and not (yield from _stands(view)):
        names.append(former)
    # In one order for all: of renames that cross, one gets through.
    for each in sorted(names, key=lock_name):
        if not (yield from _try_lock(lock_key(each))):
            return each
    if former is not None and former not in names and not (yield from _stands(view)):
        # Dropped just now; all over again.
        return view
    return None


def _stands(view: ResolvedName) -> Work[bool]:
    (kind,) = yield from kinds_of(view)
    return kind is not None


def _try_lock(key: sql.Composable) -> Work[bool]:
    row = yield from fetch_one(sql.SQL("SELECT pg_try_advisory_xact_lock({}) AS taken").format(key))
    return row is not None and bool(row["taken"])


def _deferral_key(deferral: str) -> sql.Composed:
    return sql.SQL("hashtextextended({}, 0)").format(sql.Literal(f"{_NAMESPACE} deferral {deferral}"))


def lock_is_held(lock: sql.Composable) -> sql.Composed:
    """Return the expression of whether anybody holds the advisory lock of a name.

    :param lock: the expression of the lock's name.
    """
    return sql.SQL("EXISTS ({})").format(_holders(lock))


def lock_holder(lock: sql.Composable) -> sql.Composed:
    """Return the expression of which server process holds the advisory lock of a name; NULL where none does.

    :param lock: the expression of the lock's name.
    """
    return sql.SQL("({} LIMIT 1)").format(_holders(lock))


def _holders(lock: sql.Composable) -> sql.Composed:
    # A key of 64 bits stands in two columns; every role may ask
    # (https://www.postgresql.org/docs/current/view-pg-locks.html).
    return sql.SQL(
        "SELECT l.pid FROM pg_catalog.pg_locks l, (SELECT hashtextextended({}, 0) AS key) k "
        "WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 "
        "AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) "
        "AND (l.classid::bigint << 32 | l.objid::bigint) = k.key"
    ).format(lock)


def lock_name(view: ResolvedName) -> str:
    """Return what is hashed for a view's advisory lock."""
    return f"{_NAMESPACE} {view.ddl}"


def lock_key(view: ResolvedName) -> sql.Composed:
    """Return the SQL expression of a view's advisory lock key (a bigint)."""
    return sql.SQL("hashtextextended({}, 0)").format(sql.Literal(lock_name(view)))


def politely(
    view: ResolvedName,
    patience: Patience,
    attempt: Callable[[], Work[_T]],
    others: Sequence[int] = (),
    collisions: int = 0,
) -> Work[_T]:
    """Do something that needs a lock readers could queue behind: try briefly, step back, try again.

    The attempt runs inside a savepoint, under the ``lock_timeout`` that the transaction has set at its beginning.
    When the lock is not had in that time everything the attempt did is undone, those in the way are named in the
    log, and after a pause, in which whoever waited passes, it is made again, from its beginning.

    :param others: OIDs of what else it locks, to name who holds those.
    :param collisions: how often an internal error counts as a lock not had: that is how PostgreSQL says that others
        have changed or dropped something while it was being looked up ("could not open relation with OID ...").
    :raises psycopg.errors.LockNotAvailable: when ``max_wait`` is over.
    """
    begun = time.monotonic()
    pause = _pauses()
    told: float | None = None
    outlast_autovacuum = False
    while True:
        yield Command(sql.SQL("SAVEPOINT attempt"))
        if outlast_autovacuum:
            # PostgreSQL cancels an autovacuum worker for whoever has waited for longer than the deadlock timeout.
            yield from fetch_one(
                sql.SQL(
                    "SELECT set_config('lock_timeout', (greatest(setting::integer, {}) + 500)::text || 'ms', true) "
                    "FROM pg_catalog.pg_settings WHERE name = 'deadlock_timeout'"
                ).format(sql.Literal(round(patience.lock_timeout * 1000)))
            )
        try:
            result = yield from attempt()
        except (
            psycopg.errors.LockNotAvailable,
            psycopg.errors.DeadlockDetected,
            psycopg.errors.InternalError_,
        ) as error:
            waited = time.monotonic() - begun
            if isinstance(error, psycopg.errors.InternalError_):
                if collisions == 0:
                    raise
                collisions -= 1
            if waited >= patience.max_wait:
                if getattr(error, "__notes__", None):
                    raise
                error.add_note(
                    f"Gave up after {waited:.0f} s: others kept a lock on {view.display} or what it reads. "
                    "End them, raise max_wait, or refresh at a quieter hour."
                )
                raise
            yield Command(sql.SQL("ROLLBACK TO SAVEPOINT attempt"))
            blockers = yield from _blockers(view, others)
            outlast_autovacuum = bool(blockers) and all(each["autovacuum"] for each in blockers)
            if told is None or waited - told >= _NEWS_EVERY:
                told = waited
                yield from _tell_blockers(view, blockers, waited)
            yield Pause(max(0.0, min(pause(), patience.max_wait - waited)))
        else:
            yield Command(sql.SQL("RELEASE SAVEPOINT attempt"))
            return result


def _blockers(view: ResolvedName, others: Sequence[int]) -> Work[list[dict[str, Any]]]:
    mine = yield from fetch_one(sql.SQL("SELECT pg_backend_pid() AS pid"))
    assert mine is not None
    rows = yield from blockers_of(view, others)
    return [row for row in rows if row["pid"] != mine["pid"]]


def _tell_blockers(view: ResolvedName, blockers: Sequence[dict[str, Any]], waited: float) -> Work[None]:
    yield Note(
        f"The lock on {view.display} or what it reads is not to be had yet ({waited:.0f} s so far); trying again "
        f"without making readers queue. In the way: {'; '.join(map(describe_blocker, blockers)) or 'nobody any more'}."
    )


def describe_blocker(row: Mapping[str, object]) -> str:
    """Return who is in the way, in words.

    :param row: pid, user, application, age (seconds) and query, as :func:`catalog.blockers_of` gives them.
    """
    return (
        f"pid {row['pid']} ({row['user'] or 'user not visible'}, {row['application'] or 'no application name'}, "
        f"transaction of {row['age'] if row['age'] is not None else '?'} s): {row['query'] or 'query not visible'}"
    )
