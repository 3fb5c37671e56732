"""Whether a refresh is spared: outside of the view's windows, too soon after the last one, or with nothing to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from airflow_provider_matviews.definition import check_flag
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.services import staleness
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.instructions import Note, Session, Work
from airflow_provider_matviews.services.ledger import DefinitionRecord, Ledger
from airflow_provider_matviews.services.response import Report
from airflow_provider_matviews.windows import as_windows, why_not_now

#: Of a view's sources, so many are told; a run row and an asset's event are no catalog.
MOST_SOURCES = 100


@dataclass(frozen=True)
class Sparing:
    """What may spare a refresh.

    :param skip_unchanged: whether it is skipped where no source has changed since the last one.
    :param max_staleness: seconds that a view may be old whose result moves by itself; None: it is never skipped.
    :param ignore_windows: whether the view's windows and its minimum interval are passed over.
    :raises InvalidDefinition: when they are none of these.
    """

    skip_unchanged: bool = False
    max_staleness: float | None = None
    ignore_windows: bool = False

    def __post_init__(self) -> None:
        check_flag(self.skip_unchanged, "skip_unchanged")
        check_flag(self.ignore_windows, "ignore_windows")
        given = self.max_staleness
        if given is None:
            return
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < math.inf:
            raise InvalidDefinition(f"max_staleness={given!r} is not a number of seconds.")
        if not self.skip_unchanged:
            raise InvalidDefinition(
                "max_staleness says when an unchanged view is refreshed all the same: it goes with skip_unchanged=True."
            )


def spare(
    view: ResolvedName,
    record: DefinitionRecord,
    ledger: Ledger,
    report: Report,
    sparing: Sparing,
    pid: int,
    given: Mapping[str, Any],
    context: Mapping[str, Any],
) -> Work[bool]:
    """Say whether a view's refresh is spared, with the reason in the report; else note there what it starts from.

    :param pid: the server's process that does the operation's work.
    :param given: the settings under which it would be refreshed.
    :param context: whose task it is. What an earlier try of the same task has refreshed was refreshed by that task.
    :returns: whether it is spared. Never where the view has not been filled yet, or does not stand.
    """
    kept = staleness.Baseline.of(record.source_state)
    # Before the look: whoever is gone by then cannot have changed the view unseen after it.
    settled = sparing.skip_unchanged and kept is not None and (yield from staleness.is_settled(kept, [pid]))
    look = (yield from staleness.look_at([view])).get(view)
    if look is None:
        return False
    report.told(sources=list(look.tables[:MOST_SOURCES]))
    windows, interval = record.declaration.get("refresh_windows") or (), record.declaration.get("min_interval")
    if (windows or interval) and look.populated and not sparing.ignore_windows:
        last = None if interval is None else (yield from ledger.last_filled(record.id))
        reason = why_not_now(look.at, last, as_windows(windows), interval)
        if reason is not None:
            report.told(reason=reason, spared="window")
            return True
    if sparing.skip_unchanged:
        judgement = staleness.judge(look, kept, max_staleness=sparing.max_staleness, given=given)
        if not judgement.stale:
            assert kept is not None
            if settled and kept.open and look.version == kept.version and not report.dry_run:
                yield from ledger.settle_sources({record.id: kept.at})
            earlier = (yield from ledger.done_by(context, [record.id])).get(record.id)
            if earlier is not None:
                report.told(**earlier.facts)
            else:
                report.told(reason=judgement.reason, spared="unchanged")
            return True
        yield Note(f"To be refreshed: {judgement.reason}.")
        report.told(stale=judgement.reason)
    baseline = yield from staleness.baseline_of(look, kept, [pid], given)
    report.source_state = baseline.as_dict()
    return False


def tell_sources(view: ResolvedName, report: Report) -> Work[None]:
    """Note in a report what a view reads that has just been made, in the operation's own transaction."""
    look = (yield from staleness.look_at([view], Session.WORK)).get(view)
    if look is not None:
        report.told(sources=list(look.tables[:MOST_SOURCES]))
