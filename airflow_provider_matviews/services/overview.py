"""All views at a glance: the state of each in a word."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from statistics import median

from airflow_provider_matviews.services.instructions import Work
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.metrics import ViewMetrics, read_metrics
from airflow_provider_matviews.services.selection import Selection

#: How many times the usual time between two refreshes has to pass before one is missed.
_MISSED = 2.0
#: Seconds below which nothing is late: what was refreshed often by hand need not go on like that.
_SOONEST_LATE = 60.0
#: So many intervals have to be known before any is usual.
_FEWEST_INTERVALS = 3
#: So many views are shown at the most, by name: beyond that nobody looks.
MOST_VIEWS = 5000


class ViewState(StrEnum):
    """The state of a view. Whether it is stale is another question, whose answer takes longer."""

    RUNNING = "running"
    FAILING = "failing"
    NEVER_RUN = "never run"
    LATE = "late"
    FRESH = "fresh"
    GONE = "gone"


@dataclass(frozen=True)
class ViewGlance:
    """A view at a glance.

    :ivar state: what to know first.
    :ivar reason: why, for a person.
    :ivar usual_interval: seconds between its latest refreshes, the median; None where too few are known.
    """

    metrics: ViewMetrics
    state: ViewState
    reason: str
    usual_interval: float | None


def read_overview(ledger: Ledger) -> Work[list[ViewGlance]]:
    """Look at every view that is on record.

    :raises psycopg.errors.UndefinedTable: when there are no run tables yet.
    """
    found = yield from read_metrics(ledger, Selection(("*.*",)), times=True, rows=False)
    return [glance(each) for each in found[:MOST_VIEWS]]


def glance(metrics: ViewMetrics) -> ViewGlance:
    """Say how a view is doing."""
    intervals = [(newer - older).total_seconds() for newer, older in pairwise(metrics.begun_at)]
    usual = median(intervals) if len(intervals) >= _FEWEST_INTERVALS else None
    state, reason = _state(metrics, usual)
    return ViewGlance(metrics, state, reason, usual)


def _state(metrics: ViewMetrics, usual: float | None) -> tuple[ViewState, str]:
    lost = [run for run in metrics.running if run.lost]
    running = [run for run in metrics.running if not run.lost]
    last = metrics.last_attempt
    if running:
        return ViewState.RUNNING, f"its {running[0].operation} is under way"
    if not metrics.stands and last is not None and (last.operation, last.status) == ("create", "failed"):
        return ViewState.FAILING, "its creation failed, and it does not stand"
    if not metrics.stands:
        return ViewState.GONE, "no materialized view stands under its name; only the record is left"
    if lost:
        return ViewState.FAILING, f"the process of its {lost[0].operation} is gone"
    if not metrics.populated:
        return ViewState.FAILING, "it holds no data: whoever reads it gets an error"
    if last is not None and last.status == "failed":
        count = metrics.consecutive_failures
        return ViewState.FAILING, f"its last {last.operation} failed" if count < 2 else f"its last {count} runs failed"
    if metrics.age is None:
        return ViewState.NEVER_RUN, "no run of it that ended well is on record"
    if usual is not None and metrics.age > max(_MISSED * usual, _SOONEST_LATE):
        return ViewState.LATE, "it is usually refreshed more than twice in the time since its last refresh"
    return ViewState.FRESH, "its last run ended well"
