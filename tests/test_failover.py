"""The primary goes down in the middle of a refresh and a standby takes over: the run failed, the retry works."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest

from airflow_provider_matviews.hooks.matview import MatViewHook
from demo.postgres_server import PostgresServer
from tests.conftest import INSTALLATIONS, NEWEST, Database, hook_on
from tests.proxy import Cut, Filter, hook_through
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until
from tests.standby import caught_up, promote, standby_of

HISTORY: LiteralString = "SELECT status, error_class FROM matviews.mat_view_run_history ORDER BY id"
#: The gate is a lock: the server is not to end the wait for it.
PATIENT: dict[str, Any] = {"lock_timeout": 60, "max_wait": 60}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Database, Database]]:
    """A primary and its standby, both of the test's own, with a view ``mv`` whose refresh can be held up."""
    with PostgresServer(INSTALLATIONS[NEWEST]) as primary, standby_of(primary, tmp_path) as standby:
        pair = Database(primary, "postgres"), Database(standby, "postgres")
        pair[0].execute(
            "CREATE TABLE source AS SELECT 1 AS id",
            GATE,
            "CREATE MATERIALIZED VIEW mv AS SELECT id, gate() FROM source",
            "INSERT INTO source VALUES (2)",
        )
        hook_on(pair[0]).definitions()
        yield pair


def hook_on_any(database: Database, *ports: int) -> MatViewHook:
    """Return a hook whose connection names many hosts and takes the one that can be written to."""
    extra = {"port": ",".join(map(str, ports)), "target_session_attrs": "read-write"}
    hook = hook_on(database, extra=json.dumps(extra))
    hook.connection.host = ",".join("127.0.0.1" for _ in ports)
    return hook


def lose_the_primary(primary: Database, standby: Database, fail_over: Callable[[], None]) -> MatViewHook:
    """Have the primary go down in the middle of a refresh, which raises; return its hook, for the retry."""
    hook = hook_on_any(primary, primary.server.port, standby.server.port)
    with gate_closed(primary), beside(lambda: hook.refresh("mv", **PATIENT), primary.server.stop) as running:
        until(primary, AT_THE_GATE)
        caught_up(primary, standby)
        assert standby.rows(HISTORY) == [("running", None)]
        fail_over()
        error = running.exception()
    assert isinstance(error, psycopg.OperationalError)
    return hook


@pytest.mark.parametrize(
    "at_once",
    [
        pytest.param(True, id="a new primary at once"),
        # The process looks for one for seconds before it gives the record up.
        pytest.param(False, id="too late for the record", marks=pytest.mark.e2e),
    ],
)
def test_a_failover_in_the_middle_of_a_refresh_fails_it_and_the_retry_works(
    pair: tuple[Database, Database], at_once: bool
) -> None:
    primary, standby = pair

    def fail_over() -> None:
        if at_once:
            promote(standby)
        primary.server.stop("immediate")

    hook = lose_the_primary(primary, standby, fail_over)
    # Told by the process itself where there was a server to tell, else found by the next operation.
    if at_once:
        assert standby.rows(HISTORY) == [("failed", "OperationalError")]
    else:
        assert standby.rows(HISTORY) == [("running", None)]
        promote(standby)
    assert standby.rows("SELECT id FROM mv") == [(1,)]
    assert hook.refresh("mv", if_locked="fail").success
    assert standby.rows("SELECT id FROM mv ORDER BY id") == [(1,), (2,)]
    assert standby.rows("SELECT relname FROM pg_class WHERE relname LIKE 'mv%'") == [("mv",)]
    assert standby.rows(HISTORY) == [("failed", "OperationalError" if at_once else "RunLost"), ("success", None)]


def test_while_there_is_no_primary_the_error_says_so_and_nothing_is_recorded(
    pair: tuple[Database, Database],
) -> None:
    primary, standby = pair
    caught_up(primary, standby)
    primary.server.stop("immediate")
    hook = hook_on_any(primary, primary.server.port, standby.server.port)
    with pytest.raises(psycopg.OperationalError, match="session is read-only"):
        hook.refresh("mv")
    assert standby.rows(HISTORY) == []
    promote(standby)
    assert hook.refresh("mv").success


@pytest.mark.parametrize("committed", [True, False], ids=["it did commit", "it did not"])
def test_when_the_answer_to_commit_is_lost_with_the_primary_the_new_one_is_asked(
    pair: tuple[Database, Database], committed: bool
) -> None:
    primary, standby = pair
    first = threading.Lock()

    def fail_over(said: bytes) -> bytes:
        if b"COMMIT\0" in said and first.acquire(blocking=False):
            caught_up(primary, standby)
            promote(standby)
            primary.server.stop("immediate")
            raise Cut
        return said

    # Where it is answered it was done; where it is on its way it is not yet.
    filters: tuple[Filter, Filter] = (bytes, fail_over) if committed else (fail_over, bytes)
    with hook_through(primary, *filters) as through:
        hook = hook_on_any(primary, standby.server.port, through.connection.port or 0)
        if committed:
            assert hook.refresh("mv", refresh_strategy="regular").success
        else:
            with pytest.raises(psycopg.OperationalError):
                hook.refresh("mv", refresh_strategy="regular")
    assert standby.rows("SELECT id FROM mv ORDER BY id") == ([(1,), (2,)] if committed else [(1,)])
    assert standby.rows(HISTORY) == [("success", None) if committed else ("failed", "OperationalError")]
