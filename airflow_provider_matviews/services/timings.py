"""How much faster a view answers than its query would: both run in full, in turn, in one snapshot."""

from __future__ import annotations

from statistics import median

from psycopg import sql

from airflow_provider_matviews.services.advice import advise
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.instructions import Command, Note, Work, fetch_one, raw
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.run import Subject, Terms
from airflow_provider_matviews.services.standstill import Opening, roll_back
from airflow_provider_matviews.services.verification import Timing

# Every column of every row is computed, and nothing is sent: count(*) over a subquery would leave out the columns that
# it does not need (also behind OFFSET 0), and sending rows would time the network. TIMING OFF: without a look at the
# clock for each row.
_EXPLAIN = sql.SQL("EXPLAIN (ANALYZE, TIMING OFF, BUFFERS OFF, FORMAT JSON) {}")


def time_view(subject: Subject, ledger: Ledger, terms: Terms, rounds: int) -> Work[Timing]:
    """Time a view and its query. Changes and records nothing.

    :param rounds: how often; both in turn, so that neither always finds what the other has read.
    :raises ViewNotFound: when no materialized view of this name stands.
    :raises MissingPrivilege: when the role may not read it, or what its query reads.
    :raises psycopg.Error: what PostgreSQL says.
    """
    opening = Opening(subject, ledger, terms)
    try:
        opened = yield from opening.open()
        if isinstance(opened, ResolvedName):
            yield from roll_back()
            return Timing(opened.display, reason="it has never been filled (WITH NO DATA)")
        of_query, of_view, rows = [], [], 0
        for number in range(1, rounds + 1):
            opening.step = f"timing its query, round {number} of {rounds}"
            of_query.append((yield from _timed(raw(opened.sides.query)))[0])
            opening.step = f"timing the view, round {number} of {rounds}"
            view_ms, rows = yield from _timed(sql.SQL("SELECT * FROM {}").format(opened.view.identifier))
            of_view.append(view_ms)
        yield Command(sql.SQL("COMMIT"))
    except BaseException as error:
        advise(error)
        yield from roll_back()
        raise
    timing = Timing(opened.view.display, rows, median(of_query), median(of_view))
    yield Note(
        f"{timing.view}: its query takes {timing.query_ms:,.1f} ms, the view {timing.view_ms:,.1f} ms (median of "
        f"{rounds}): {timing.speed_up or 0:,.1f} times faster."
    )
    return timing


def _timed(statement: sql.Composable) -> Work[tuple[float, int]]:
    row = yield from fetch_one(_EXPLAIN.format(statement))
    assert row is not None
    plan = row["QUERY PLAN"][0]
    return plan["Planning Time"] + plan["Execution Time"], int(plan["Plan"]["Actual Rows"])
