"""Refresh: bring a view's rows up to date, by one of the strategies."""

from __future__ import annotations

from psycopg import sql

from airflow_provider_matviews.definition import RefreshStrategy, RowCountStrategy
from airflow_provider_matviews.exceptions import MissingPrivilege
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.instructions import Note, Work
from airflow_provider_matviews.services.response import Report, ServiceResponse
from airflow_provider_matviews.services.strategies import auto, strategy_named
from airflow_provider_matviews.services.strategies.base import Refreshing


def refresh_view(
    view: ResolvedName,
    server: ServerFacts,
    report: Report,
    *,
    strategy: RefreshStrategy = RefreshStrategy.AUTO,
    row_counts: RowCountStrategy = RowCountStrategy.ESTIMATED,
    unique_index_columns: tuple[str, ...] = (),
) -> Work[ServiceResponse]:
    """Refresh a view. Runs inside the caller's transaction.

    :param strategy: how; ``auto`` chooses from what stands.
    :param row_counts: how rows are counted before and after.
    :param unique_index_columns: what the definition declares, for the DDL in a refusal.
    :returns: status ``updated``.
    :raises ViewNotFound: when it does not stand.
    :raises NotAMaterializedView: when something else stands under its name.
    :raises MissingPrivilege: when the role may not refresh it.
    :raises StrategyNotAvailable: when this version does not have the strategy.
    :raises ConcurrentRefreshRefused: when no index allows a concurrent refresh.
    :raises psycopg.Error: what PostgreSQL says of the refresh itself.
    """
    facts = yield from catalog.require_view(view)
    _require_right(view, facts, server)
    indexes: list[catalog.IndexFacts] = []
    if strategy is not RefreshStrategy.REGULAR:
        indexes = yield from catalog.indexes_of(facts.oid)
    if strategy is RefreshStrategy.AUTO:
        strategy, reason = auto.choose(facts, indexes)
        yield Note(f"Strategy {strategy.value}, chosen because {reason}.")
    else:
        reason = "asked for"
        yield Note(f"Strategy {strategy.value}, as asked for.")
    report.told(strategy=strategy.value, reason=reason)
    carry_out = strategy_named(strategy)
    yield from carry_out(Refreshing(view, facts, tuple(indexes), unique_index_columns, server, row_counts, report))
    return report.end("updated")


def _require_right(view: ResolvedName, facts: ViewFacts, server: ServerFacts) -> None:
    catalog.require_schema_usage(view, facts, server)
    if facts.can_maintain:
        return
    role, owner = (sql.Identifier(name).as_string(None) for name in (server.role, facts.owner))
    hint = f"GRANT {owner} TO {role};"
    if server.version >= 170000:
        hint = f"GRANT MAINTAIN ON {view.ddl} TO {role}; or: {hint}"
    raise MissingPrivilege(
        f"The role {role} may not refresh {view.display}, which belongs to {owner}.", hint=f"run: {hint}"
    )
