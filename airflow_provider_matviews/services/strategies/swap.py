"""``swap``: build the view anew beside itself, then put the new one in its place in one short cut.

It costs what ``regular`` costs, and readers feel what they feel of ``concurrent``. See ``replacement.py`` for how.
"""

from __future__ import annotations

from airflow_provider_matviews.definition import RowCountStrategy
from airflow_provider_matviews.exceptions import StrategyRefused
from airflow_provider_matviews.services import catalog, row_counts
from airflow_provider_matviews.services.instructions import Work
from airflow_provider_matviews.services.picture import restore_settings, speak_plainly, take_picture
from airflow_provider_matviews.services.rebuild import Beside
from airflow_provider_matviews.services.replacement import (
    Changed,
    Replacement,
    obstacles,
    replace_view,
    while_unchanged,
)
from airflow_provider_matviews.services.strategies.base import Refreshing


def refresh(job: Refreshing) -> Work[None]:
    """Build beside, cut over.

    :raises StrategyRefused: when something could not be carried over, or others change the view all the time.
    :raises psycopg.errors.LockNotAvailable: when the cut's locks are not had within ``max_wait``.
    """
    before = yield from row_counts.before_refresh(job.view, job.facts, job.row_counts)
    after: int | None = None

    def attempt() -> Work[None]:
        nonlocal after
        after = yield from _swap(job)

    rebuilds = yield from while_unchanged(
        job.view,
        job.report,
        attempt,
        "refresh it when nobody alters it, or use refresh_strategy='concurrent' or 'regular'.",
    )
    job.report.told(strategy="swap", row_count_before=before, row_count_after=after, rebuilds=rebuilds)


def _swap(job: Refreshing) -> Work[int | None]:
    view, facts = job.view, job.facts
    if reasons := (yield from obstacles(facts, job.server)):
        raise StrategyRefused(
            f"{view.display} cannot be swapped: {'; '.join(reasons)}.",
            hint="use refresh_strategy='auto', which takes another one where swap is not possible, 'concurrent' "
            "or 'regular'.",
        )
    settings = yield from speak_plainly()
    picture = yield from take_picture(facts.oid)
    query = yield from catalog.query_of(view)
    yield from restore_settings(settings)
    if picture is None or query is None:
        raise Changed(["it was dropped"])
    beside = Beside.of(view)
    outcome = yield from replace_view(
        Replacement(
            view=view,
            beside=beside,
            facts=facts,
            standing=picture,
            picture=picture,
            query=query,
            server=job.server,
            patience=job.patience,
            report=job.report,
            analyze=job.analyze is not False,
            count=job.row_counts is RowCountStrategy.EXACT,
        )
    )
    if outcome is None:
        return None
    job.told(outcome, rebuilt=True)
    if job.row_counts is RowCountStrategy.NONE:
        return None
    return outcome.estimated if outcome.inserted is None else outcome.inserted
