"""A long history is never read from end to end, whoever asks what of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.services.browsing import RunFilter, run_list, run_page, view_page
from airflow_provider_matviews.services.overview import read_overview
from benchmarks.long_history import fill, queries
from tests.conftest import Database, hook_on


def _read(database: Database) -> int:
    """How many of the runs, or of their entries in indexes, have been read so far, by sessions that have ended."""
    count: int = database.value(
        "SELECT t.seq_tup_read + (SELECT sum(i.idx_tup_read) FROM pg_stat_user_indexes i WHERE i.relid = t.relid) "
        "FROM pg_stat_user_tables t WHERE relname = 'mat_view_runs'"
    )
    return int(count)


def _scans(database: Database) -> int:
    """How often the runs have been read from end to end so far, by sessions that have ended."""
    count: int = database.value("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'mat_view_runs'")
    return count


def _questions(hook: MatViewHook) -> dict[str, Callable[[], object]]:
    name = "analytics.accounts"
    runs = {
        str(wanted): partial(hook.browse, partial(run_list, wanted=wanted, limit=50))
        for wanted in (
            RunFilter(),
            RunFilter(before="1-1"),
            RunFilter("analytics", "accounts"),
            RunFilter("analytics", "accounts", status="failed"),
            *(RunFilter(status=status) for status in ("running", "success", "failed", "skipped")),
            *(RunFilter(operation=operation) for operation in ("create", "refresh", "drop")),
        )
    }
    return {
        "check": partial(hook.check, max_age=3600, consecutive_failures=3, max_row_count_ratio=2, max_bloat=2),
        "metrics": hook.metrics,
        "metrics of one": partial(hook.metrics, [name]),
        "runs": hook.runs,
        "runs of one": partial(hook.runs, name),
        "reap": hook.reap,
        "overview": partial(hook.browse, read_overview),
        "page of a view": partial(hook.browse, lambda ledger: view_page(ledger, "analytics", "accounts")),
        "page of a run": partial(hook.browse, lambda ledger: run_page(ledger, 50_000)),
        **runs,
    }


@pytest.fixture
def long_history(db: Database) -> Database:
    hook_on(db).runs()
    with db.connect() as connection:
        fill(connection, runs=100_000, views=200)
    return db


def test_no_question_reads_all_of_it(long_history: Database) -> None:
    before = _scans(long_history)
    for question, ask in _questions(hook_on(long_history)).items():
        read = _read(long_history)
        ask()
        assert _scans(long_history) == before, f"{question} reads every run"
        # Of 200 views up to 100 each, where a page of 50 of each kind is asked for.
        assert _read(long_history) - read < 35_000, f"{question} reads far more than it needs"
    asked = queries()
    assert len(asked) >= 6
    for heading, text in asked.items():
        rows = long_history.rows(text)  # type: ignore[arg-type]
        assert rows or heading == "failures in the last 24 hours"
        assert _scans(long_history) == before, f"{heading} reads every run"
    # And it would be noticed.
    long_history.rows("SELECT DISTINCT ON (mat_view_definition_id) id FROM matviews.mat_view_runs WHERE error IS NULL")
    assert _scans(long_history) > before
