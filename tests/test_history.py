"""A long history is never read from end to end, whoever asks what of it."""

from __future__ import annotations

import pytest

from airflow_provider_matviews.hooks.matview import MatViewHook
from benchmarks.history import fill, queries
from tests.conftest import Database, hook_on


def _scans(database: Database) -> int:
    """How often the runs have been read from end to end so far, by sessions that have ended."""
    count: int = database.value("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'mat_view_runs'")
    return count


def _ask_everything(hook: MatViewHook, database: Database) -> None:
    hook.check(max_age=3600, consecutive_failures=3, max_row_count_ratio=2, max_bloat=2)
    hook.metrics()
    hook.metrics(["analytics.accounts"])
    hook.runs()
    hook.runs("analytics.accounts")
    hook.reap()


@pytest.fixture
def long_history(db: Database) -> Database:
    hook_on(db).runs()
    with db.connect() as connection:
        fill(connection, runs=100_000, views=200)
    return db


def test_no_question_reads_all_of_it(long_history: Database) -> None:
    before = _scans(long_history)
    _ask_everything(hook_on(long_history), long_history)
    assert _scans(long_history) == before
    asked = queries()
    assert len(asked) >= 6
    for heading, text in asked.items():
        rows = long_history.rows(text)  # type: ignore[arg-type]
        assert rows or heading == "failures in the last 24 hours"
        assert _scans(long_history) == before, f"{heading} reads every run"
    # And it would be noticed.
    long_history.rows("SELECT DISTINCT ON (mat_view_definition_id) id FROM matviews.mat_view_runs WHERE error IS NULL")
    assert _scans(long_history) > before
