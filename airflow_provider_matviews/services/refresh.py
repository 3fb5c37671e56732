"""Refresh: bring a view's rows up to date, by one of the strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import psycopg
from psycopg import sql

from airflow_provider_matviews.definition import RefreshStrategy, RowCountStrategy
from airflow_provider_matviews.exceptions import MissingPrivilege, StrategyRefused
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.dependents import reader_hazards
from airflow_provider_matviews.services.instructions import Command, Note, Work
from airflow_provider_matviews.services.locking import DEFAULT_PATIENCE, Patience
from airflow_provider_matviews.services.maintenance import maintenance
from airflow_provider_matviews.services.replacement import obstacles
from airflow_provider_matviews.services.response import Report, ServiceResponse
from airflow_provider_matviews.services.strategies import STRATEGIES, auto
from airflow_provider_matviews.services.strategies.base import Refreshing


def refresh_view(
    view: ResolvedName,
    server: ServerFacts,
    report: Report,
    *,
    strategy: RefreshStrategy = RefreshStrategy.AUTO,
    row_counts: RowCountStrategy = RowCountStrategy.ESTIMATED,
    unique_index_columns: tuple[str, ...] = (),
    patience: Patience = DEFAULT_PATIENCE,
    history: Callable[[], Work[Sequence[auto.PastRefresh]]] | None = None,
    max_bloat: float = 1.5,
    analyze: bool | None = None,
    vacuum: bool = False,
) -> Work[ServiceResponse]:
    """Refresh a view. Runs inside the caller's transaction.

    :param strategy: how; ``auto`` chooses from what stands.
    :param row_counts: how rows are counted before and after.
    :param unique_index_columns: what the definition declares, for the DDL in a refusal.
    :param patience: how long the short cut of a swap waits for its locks.
    :param history: returns its latest successful refreshes, newest first; asked by ``auto`` only.
    :param max_bloat: ``auto`` rebuilds when a row takes so many times the room it took after the last rebuild.
    :param analyze: whether the planner's statistics are renewed; None leaves it to the strategy: ``swap`` does
        it before the cut, ``regular`` after COMMIT, ``concurrent`` leaves it to autovacuum.
    :param vacuum: VACUUM after COMMIT, which lets index-only scans skip the heap.
    :returns: status ``updated``.
    :raises ViewNotFound: when it does not stand.
    :raises NotAMaterializedView: when something else stands under its name.
    :raises MissingPrivilege: when the role may not refresh it.
    :raises StrategyRefused: when a swap could not carry over everything.
    :raises ConcurrentRefreshRefused: when no index allows a concurrent refresh.
    :raises psycopg.Error: what PostgreSQL says of the refresh itself.
    """
    facts = yield from catalog.require_view(view)
    _require_right(view, facts, server)
    indexes: list[catalog.IndexFacts] = []
    if strategy in (RefreshStrategy.AUTO, RefreshStrategy.CONCURRENT):
        indexes = yield from catalog.indexes_of(facts.oid)
    job = Refreshing(view, facts, tuple(indexes), unique_index_columns, server, row_counts, patience, report, analyze)
    if strategy is RefreshStrategy.AUTO:
        past = (yield from history()) if history else []
        situation = yield from situation_of(facts, indexes, server, past, max_bloat)
        yield from _by_choice(situation, job)
    else:
        yield Note(f"Strategy {strategy.value}, as asked for.")
        report.told(strategy=strategy.value, reason="asked for")
        yield from _carry_out(strategy, job)
    if vacuum:
        report.later("vacuum", maintenance("VACUUM", view))
    return report.end("updated")


def situation_of(
    facts: ViewFacts,
    indexes: Sequence[catalog.IndexFacts],
    server: ServerFacts,
    past: Sequence[auto.PastRefresh],
    max_bloat: float = 1.5,
) -> Work[auto.Situation]:
    """Return the facts from which ``auto`` chooses. Only reads.

    :param past: the view's latest successful refreshes, newest first.
    :param max_bloat: as of :func:`refresh_view`.
    """
    swap_obstacles = yield from obstacles(facts, server)
    return auto.Situation(
        populated=facts.populated,
        indexes=indexes,
        swap_obstacles=swap_obstacles + (yield from reader_hazards(facts.oid)),
        heap_bytes=(yield from catalog.heap_size_of(facts.oid)),
        # The planner's estimate lags behind; the last run has counted.
        rows=past[0].rows if past and past[0].rows is not None else facts.estimated_rows,
        history=past,
        max_bloat=max_bloat,
        owner_may_temp=facts.owner_may_temp,
    )


def _by_choice(situation: auto.Situation, job: Refreshing) -> Work[None]:
    """Refresh by the strategy that is chosen; where a swap turns out not to be possible after all, by the next one."""
    strategy, reason = auto.choose(situation)
    yield Note(f"Strategy {strategy.value}, chosen because {reason}.")
    bloat = situation.bloat and round(situation.bloat, 2)
    job.report.told(strategy=strategy.value, reason=reason, bloat=bloat)
    if strategy is not RefreshStrategy.SWAP:
        yield from _carry_out(strategy, job)
        return
    yield Command(sql.SQL("SAVEPOINT choice"))
    try:
        yield from _carry_out(strategy, job)
    except (StrategyRefused, psycopg.ProgrammingError, psycopg.InternalError, psycopg.NotSupportedError) as error:
        if isinstance(error, (psycopg.errors.IdleInTransactionSessionTimeout, psycopg.errors.TransactionTimeout)):
            # Of the same class by its number, and the end of the connection.
            raise
        # Not every reason can be known before it is tried: rights on types, event triggers of others ...
        yield Command(sql.SQL("ROLLBACK TO SAVEPOINT choice"))
        told = error.message if isinstance(error, StrategyRefused) else str(error).splitlines()[0]
        yield Note(f"That was not possible, and has been undone: {told}", warning=True)
        job.report.restart()
        yield from _by_choice(replace(situation, swap_obstacles=[told]), job)


def _carry_out(strategy: RefreshStrategy, job: Refreshing) -> Work[None]:
    try:
        yield from STRATEGIES[strategy](job)
    except psycopg.errors.InsufficientPrivilege as error:
        owner = sql.Identifier(job.facts.owner).as_string(None)
        error.add_note(
            f"The query of {job.view.display} runs with the rights of its owner {owner}. If it is a source that the "
            f"message names, run: GRANT SELECT ON <that> TO {owner}; (and GRANT USAGE ON its schema)."
        )
        raise


def _require_right(view: ResolvedName, facts: ViewFacts, server: ServerFacts) -> None:
    catalog.require_schema_usage(view, facts, server)
    if facts.can_maintain:
        return
    role, owner = (sql.Identifier(name).as_string(None) for name in (server.role, facts.owner))
    hint = catalog.membership(facts.owner, server)
    if server.version >= 170000:
        hint = f"GRANT MAINTAIN ON {view.ddl} TO {role}; or: {hint}"
    raise MissingPrivilege(
        f"The role {role} may not refresh {view.display}, which belongs to {owner}.", hint=f"run: {hint}"
    )
