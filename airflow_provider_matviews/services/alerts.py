"""What of a view's metrics is worth an alert, in words for whoever is woken by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import fmean
from typing import Any

from airflow_provider_matviews.checks import as_seconds
from airflow_provider_matviews.exceptions import InvalidDefinition, ViewNotFound
from airflow_provider_matviews.rules import AlertRules
from airflow_provider_matviews.services.instructions import Note, Work
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.metrics import RunningRun, ViewMetrics, read_metrics
from airflow_provider_matviews.services.selection import Selection, is_meant

#: Of a smaller view it does not matter how much of its room is free (8 MiB).
SMALLEST_BLOATED = 8 * 1024 * 1024
#: Characters of an error's message that a table has room for.
_LONGEST_EXCERPT = 300
#: Views that a note names.
_MOST_NAMED = 5


@dataclass(frozen=True)
class Breach:
    """A rule that a view breaks.

    :ivar rule: ``failed``, ``unreadable``, ``consecutive_failures``, ``slow``, ``late``, ``running``, ``row_count`` or
        ``bloat``.
    :ivar message: what is so, in one line.
    :ivar what_to_do: where to look, or what mends it.
    :ivar value: what was found, in the unit of the rule: runs, times, seconds.
    :ivar limit: what the rule allows.
    :ivar since: since when, where that is known.
    :ivar run_id: the run that it is about, where it is about one.
    """

    view: str
    rule: str
    message: str
    what_to_do: str
    value: float | None = None
    limit: float | None = None
    since: datetime | None = None
    run_id: int | None = None

    def as_dict(self, redact: Callable[[str], str] = str) -> dict[str, Any]:
        """Return it as plain data, for XCom.

        :param redact: takes secrets out of text.
        """
        return {
            "view": self.view,
            "rule": self.rule,
            "message": redact(self.message),
            "what_to_do": redact(self.what_to_do),
            "value": None if self.value is None else round(self.value, 3),
            "limit": self.limit,
            "since": self.since and self.since.isoformat(),
            "mat_view_run_id": self.run_id,
        }


@dataclass(frozen=True)
class Checkup:
    """What came of looking at views.

    :ivar metrics: of each, by name.
    :ivar breaches: the rules that they break.
    """

    metrics: tuple[ViewMetrics, ...]
    breaches: tuple[Breach, ...]

    @property
    def healthy(self) -> bool:
        """Whether no rule is broken."""
        return not self.breaches

    def as_dict(self, redact: Callable[[str], str] = str) -> dict[str, Any]:
        """Return it as plain data, for XCom.

        :param redact: takes secrets out of text.
        """
        return {
            "healthy": self.healthy,
            "views": len(self.metrics),
            "breaches": [breach.as_dict(redact) for breach in self.breaches],
        }

    def story(self) -> str:
        """Say it in one line."""
        count = len(self.metrics)
        views = f"{count} view{'' if count == 1 else 's'}"
        if self.healthy:
            return f"Looked at {views}: all is well."
        broken = len({breach.view for breach in self.breaches})
        return f"Looked at {views}: {broken} of them break{'s' if broken == 1 else ''} a rule."


def table(breaches: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table.

    :param breaches: as :meth:`Breach.as_dict` returns them.
    """
    columns = ("view", "rule", "message", "what_to_do")
    rows: list[tuple[str, ...]] = [("view", "rule", "what", "what to do")]
    rows += [tuple(" ".join(str(breach[column]).split()) for column in columns) for breach in breaches]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]


@dataclass(frozen=True)
class RuleBook:
    """Which rules hold for which view.

    :param rules: those of every view.
    :param overrides: name or pattern, as in :class:`Selection` -> what is different there; the later go before.
    :raises InvalidName: when a name is none.
    :raises InvalidDefinition: when a rule is none, or a value is not what it should be.
    """

    rules: AlertRules
    overrides: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not isinstance(self.overrides, Mapping) or not all(isinstance(name, str) for name in self.overrides):
            raise InvalidDefinition(
                f"overrides={self.overrides!r} does not map names or patterns to rules.",
                hint='for example overrides={"reports.*": {"max_age": 3600}}',
            )
        for name, changes in self.overrides.items():
            self.rules.with_changes(changes)
            is_meant(name, "public", "")

    def of(self, schema: str, name: str) -> AlertRules:
        """Return the rules of one view."""
        rules = self.rules
        for pattern, changes in self.overrides.items():
            if is_meant(pattern, schema, name):
                rules = rules.with_changes(changes)
        return rules

    @property
    def all(self) -> list[AlertRules]:
        """Every set of rules that may come of it."""
        return [self.rules, *(self.rules.with_changes(changes) for changes in self.overrides.values())]


def check_views(ledger: Ledger, selection: Selection, book: RuleBook) -> Work[Checkup]:
    """Look at views and say which rules they break.

    :raises ViewNotFound: as of :func:`read_metrics`, and when there is none to look at: an alert that looks
        in the wrong place would never be heard.
    """
    metrics = yield from read_metrics(
        ledger,
        selection,
        window=max(rules.window for rules in book.all),
        rows=any(rules.max_row_count_ratio is not None for rules in book.all),
        bloat=any(rules.max_bloat is not None for rules in book.all),
    )
    if not metrics:
        raise ViewNotFound(
            "There is no view to look at: none that is meant is on record in the run tables of schema "
            f"{ledger.tracking_schema} of this database, if there are any.",
            hint="see conn_id, tracking_schema, views and schemas; a view is on record from its first run on.",
        )
    for pattern in book.overrides:
        if not any(is_meant(pattern, each.schema_name, each.view_name) for each in metrics):
            yield Note(f"overrides: {pattern!r} means none of the views that are looked at.", warning=True)
    for note in _unjudged(metrics, book):
        yield Note(note, warning=True)
    breaches: list[Breach] = []
    for each in metrics:
        breaches += breaches_of(each, book.of(each.schema_name, each.view_name))
    return Checkup(tuple(metrics), tuple(breaches))


def _unjudged(metrics: Sequence[ViewMetrics], book: RuleBook) -> Iterator[str]:
    """Say which rules are asked for and say nothing, because what they need is not on record."""
    for rule, fact, why in (
        ("max_bloat", "bloat", "no create or refresh that rebuilt it is on record with its size"),
        ("max_row_count_ratio", "row_count", "its rows are not counted (row_count_strategy)"),
    ):
        views = [
            each.view
            for each in metrics
            if each.last_filled_at is not None
            and getattr(each, fact) is None
            and getattr(book.of(each.schema_name, each.view_name), rule) is not None
        ]
        if views:
            more = f" and {len(views) - _MOST_NAMED} more" if len(views) > _MOST_NAMED else ""
            yield f"{rule} says nothing of {', '.join(views[:_MOST_NAMED])}{more}: {why}."


def breaches_of(metrics: ViewMetrics, rules: AlertRules) -> Iterable[Breach]:
    """Return the rules that a view breaks."""
    if len(metrics.durations_ms) > rules.window + 1:
        # Another view's window is longer.
        size = rules.window + 1
        metrics = replace(metrics, durations_ms=metrics.durations_ms[:size], row_counts=metrics.row_counts[:size])
    return [breach for judge in _JUDGES for breach in judge(metrics, rules)]


def _failed(metrics: ViewMetrics, rules: AlertRules) -> Iterator[Breach]:
    if not rules.failed:
        return
    for run in metrics.running:
        if run.lost:
            yield Breach(
                metrics.view,
                "failed",
                f"its {run.operation} of {_time(run.started_at)} ended without a word: {run.process or 'its process'} "
                "is gone",
                f"the next operation marks run {run.id} as failed, or hook.reap(); see what killed that process",
                since=run.started_at,
                run_id=run.id,
            )
            return
    last = metrics.last_attempt
    if last is None or last.status != "failed":
        return
    error = last.error or {}
    message = _excerpt(str(error.get("message") or ""))
    count = metrics.consecutive_failures
    times = f", the last of {count} in a row" if count > 1 else ""
    yield Breach(
        metrics.view,
        "failed",
        f"its {last.operation} of {_time(last.started_at)} failed{times}: {error.get('class')}: {message}",
        " ".join(str(error.get("hint") or f"see the error of run {last.id} in mat_view_run_history").split()),
        value=count,
        limit=0,
        since=metrics.failing_since,
        run_id=last.id,
    )


def _unreadable(metrics: ViewMetrics, rules: AlertRules) -> Iterator[Breach]:
    # One that never came to be is told by its failed create.
    if not rules.unreadable or metrics.recorded_at is None or (not metrics.stands and metrics.last_filled_at is None):
        return
    if not metrics.stands:
        yield Breach(
            metrics.view,
            "unreadable",
            "no materialized view stands under its name any more: somebody else has dropped or renamed it",
            "create it again; or, where that was meant, hook.delete() it, which ends its history",
        )
    elif not metrics.populated:
        yield Breach(metrics.view, "unreadable", "it holds no data: whoever reads it gets an error", "refresh it once")


def _consecutive_failures(metrics: ViewMetrics, rules: AlertRules) -> Iterator[Breach]:
    limit = rules.consecutive_failures
    if limit is None or metrics.consecutive_failures < limit:
        return
    yield Breach(
        metrics.view,
        "consecutive_failures",
        f"its last {metrics.consecutive_failures} runs failed, since {_time(metrics.failing_since)}",
        "it does not come right by itself: see the errors of its runs",
        value=metrics.consecutive_failures,
        limit=limit,
        since=metrics.failing_since,
        run_id=metrics.last_attempt.id if metrics.last_attempt else None,
    )


def _slow(metrics: ViewMetrics, rules: AlertRules) -> Iterator[Breach]:
    usual = _average(metrics.durations_ms[1:], rules)
    if rules.max_duration_ratio is None or usual is None:
        return
    took = metrics.durations_ms[0]
    if took > rules.max_duration_ratio * usual and took >= 1000 * rules.min_duration:
        yield Breach(
            metrics.view,
            "slow",
            f"its last refresh took {_seconds(took / 1000)}, {_times(took, usual)} the average of "
            f"{_seconds(usual / 1000)} over the {len(metrics.durations_ms) - 1} before",
            "see the steps and waited_ms of that run: a wait for a lock, more rows, or a plan that changed",
            value=took / usual if usual else None,
            limit=rules.max_duration_ratio,
        )


def _late(metrics: ViewMetrics, rules: AlertRules) -> Iterator[Breach]:
    limit = as_seconds(rules.max_age, "max_age")
    if limit is None:
        return
    what = "see whether its DAG is paused, and whether its task is waiting for a slot, a pool or another view"
    if metrics.recorded_at is None:
        yield Breach(metrics.view, "late", "it stands, and no run of it is on record", what, limit=limit)
        return
    never = metrics.age is None
    since = metrics.recorded_at if never else max(filter(None, (metrics.last_filled_at, metrics.unchanged_at)))
    age = (metrics.at - since).total_seconds()
    if age > limit:
        told = (
            f"has been on record for {_seconds(age)} and was never filled"
            if never
            else (f"was last filled, or found unchanged, {_seconds(age)} ago")
        )
        yield Breach(
            metrics.view,
            "late",
            f"it {told}; {_seconds(limit)} are allowed",
            what,
            value=age,
            limit=limit,
            since=since,
        )


def _running(metrics: ViewMetrics, rules: AlertRules) -> Iterator[Breach]:
    usual = _average(metrics.durations_ms, rules)
    for run in metrics.running:
        if run.lost:
            continue
        so_far = (metrics.at - run.started_at).total_seconds()
        absolute = as_seconds(rules.max_running, "max_running")
        if absolute is not None and so_far > absolute:
            yield _too_long(metrics, run, so_far, absolute, f"{_seconds(absolute)} are allowed")
        elif (
            rules.max_duration_ratio is not None
            and usual is not None
            and run.operation == "refresh"
            and so_far > max(rules.max_duration_ratio * usual / 1000, rules.min_duration)
        ):
            limit = rules.max_duration_ratio * usual / 1000
            yield _too_long(metrics, run, so_far, limit, f"the average is {_seconds(usual / 1000)}")


def _too_long(metrics: ViewMetrics, run: RunningRun, so_far: float, limit: float, why: str) -> Breach:
    return Breach(
        metrics.view,
        "running",
        f"its {run.operation} has been running for {_seconds(so_far)}; {why}",
        "its task log tells what it waits for; timeout=... would end it",
        value=so_far,
        limit=limit,
        since=run.started_at,
        run_id=run.id,
    )


def _row_count(metrics: ViewMetrics, rules: AlertRules) -> Iterator[Breach]:
    ratio = rules.max_row_count_ratio
    if ratio is None or not metrics.row_counts or metrics.row_counts[0] is None:
        return
    rows = metrics.row_counts[0]
    usual = _average([count for count in metrics.row_counts[1:] if count is not None], rules)
    # From nothing there is no number of times to anything.
    if not usual or usual / ratio <= rows <= usual * ratio:
        return
    fell = rows < usual
    yield Breach(
        metrics.view,
        "row_count",
        f"it has {rows:,} row{'' if rows == 1 else 's'} after its last refresh, and had {usual:,.0f} on average: "
        + ("they fell" if fell else "they jumped")
        + (f" to 1/{usual / rows:.1f}" if fell and rows else "" if fell else f" to {rows / usual:.1f} times as many"),
        "see whether its sources were loaded " + ("in full" if fell else "twice, or a join of it has become ambiguous"),
        value=rows / usual,
        limit=1 / ratio if fell else ratio,
    )


def _bloat(metrics: ViewMetrics, rules: AlertRules) -> Iterator[Breach]:
    if rules.max_bloat is None or metrics.bloat is None or (metrics.heap_bytes or 0) < SMALLEST_BLOATED:
        return
    if metrics.bloat > rules.max_bloat:
        yield Breach(
            metrics.view,
            "bloat",
            f"a row of it takes {metrics.bloat:.1f} times the room that it took after its last rebuild",
            "refresh it once with refresh_strategy='swap', or let 'auto' choose (max_bloat)",
            value=metrics.bloat,
            limit=rules.max_bloat,
        )


_JUDGES = (_failed, _unreadable, _consecutive_failures, _slow, _late, _running, _row_count, _bloat)


def _average(values: Sequence[float], rules: AlertRules) -> float | None:
    values = values[: rules.window]
    return fmean(values) if len(values) >= min(rules.min_samples, rules.window) else None


def _times(value: float, usual: float) -> str:
    return f"{value / usual:.1f} times" if usual else "far more than"


def _seconds(seconds: float) -> str:
    """Say a length of time as people do."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def _time(at: datetime | None) -> str:
    return "an unknown time" if at is None else f"{at:%Y-%m-%d %H:%M:%S %Z}"


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_EXCERPT else f"{line[: _LONGEST_EXCERPT - 1]}…"
