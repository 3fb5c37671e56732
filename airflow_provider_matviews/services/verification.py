"""What a verification finds, as plain data: verdicts, for one view and for several."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from airflow_provider_matviews.checks import as_tuple
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.services.comparison import Example, one_line

#: More of a view's rows at once would make a statement that takes longer to plan than to run.
_MOST_SAMPLED = 100_000
_MOST_EXAMPLES = 100
_MOST_ROUNDS = 100


class VerifyMode(StrEnum):
    """How closely a view is compared with its query."""

    EXACT = "exact"
    SAMPLED = "sampled"
    CHECKSUM = "checksum"


class Verdict(StrEnum):
    """What a view is, compared with its query.

    ``equal``: the same rows, as far as was looked. ``rounding``: but for the last digits of floating-point numbers.
    ``stale``: it differs, and what it reads has changed since its last refresh, which a refresh mends. ``corrupt``: it
    differs though nothing that it reads has changed. ``differs``: it differs, and which of these cannot be told.
    ``unpopulated``: it has never been filled. ``failed``: it could not be verified.
    """

    EQUAL = "equal"
    ROUNDING = "rounding"
    STALE = "stale"
    CORRUPT = "corrupt"
    DIFFERS = "differs"
    UNPOPULATED = "unpopulated"
    FAILED = "failed"


#: Those that somebody has to look at, first.
_URGENCY = (
    Verdict.CORRUPT,
    Verdict.DIFFERS,
    Verdict.FAILED,
    Verdict.UNPOPULATED,
    Verdict.STALE,
    Verdict.ROUNDING,
    Verdict.EQUAL,
)
#: A stale view is what a refresh is for, and an unpopulated one says so itself.
FAIL_ON = (Verdict.CORRUPT.value, Verdict.DIFFERS.value)


@dataclass(frozen=True)
class Scope:
    """How much is compared, and how much of what differs is told.

    :param mode: ``exact``, ``sampled`` or ``checksum``.
    :param sample: how many rows ``sampled`` looks at.
    :param seed: which ones: the same seed picks the same rows of the same view.
    :param examples: how many differing rows of each kind are told; 0 tells no value at all.
    :raises InvalidDefinition: when it is nothing of that.
    """

    mode: VerifyMode = VerifyMode.EXACT
    sample: int = 1000
    seed: int = 0
    examples: int = 5

    def __post_init__(self) -> None:
        _check_number(self.sample, "sample", 1, _MOST_SAMPLED)
        _check_number(self.seed, "seed", 0, 2**31 - 1)
        _check_number(self.examples, "examples", 0, _MOST_EXAMPLES)


def _check_number(value: object, argument: str, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidDefinition(f"{argument}={value!r} is not a whole number from {least} to {most:,}.")


def check_fail_on(fail_on: object) -> frozenset[Verdict]:
    """Return the verdicts that fail a task.

    :raises InvalidDefinition: when it is no list of verdicts.
    """
    allowed = [verdict.value for verdict in Verdict if verdict not in (Verdict.EQUAL, Verdict.FAILED)]
    names = as_tuple(fail_on, "fail_on", (str,))
    for name in names:
        if name not in allowed:
            raise InvalidDefinition(
                f"fail_on holds {name!r}. Choose among {', '.join(map(repr, allowed))}; a view that could not be "
                "verified fails the task always."
            )
    return frozenset(map(Verdict, names))


@dataclass(frozen=True)
class Verification:
    """What came of comparing one view with its query.

    :ivar view: its name, as one would type it.
    :ivar verdict: see :class:`Verdict`.
    :ivar reason: why, for a person.
    :ivar mode: how closely it was compared.
    :ivar view_rows: how many rows of the view were compared; None where none were.
    :ivar query_rows: how many its query has, of those that were compared.
    :ivar missing: rows that its query has and the view lacks; None where that is not known.
    :ivar surplus: rows that the view has and its query does not; likewise.
    :ivar changed: how many of these are one row of the same key with another value; likewise.
    :ivar examples: of what differs.
    :ivar stale: whether what it reads has changed since its last refresh; None where that is not known.
    :ivar drift: how the view differs from its definition, in a few words; None where none was given, or where that
        could not be found out.
    :ivar role: as whom its query was run.
    :ivar seconds: that it took.
    :ivar notes: what else there is to know.
    """

    view: str
    verdict: Verdict
    reason: str
    mode: VerifyMode
    view_rows: int | None = None
    query_rows: int | None = None
    missing: int | None = None
    surplus: int | None = None
    changed: int | None = None
    examples: tuple[Example, ...] = ()
    stale: bool | None = None
    drift: str | None = None
    role: str | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether it equals its query, as far as was looked."""
        return self.verdict is Verdict.EQUAL

    def as_dict(self, redact: Callable[[str], str] = str) -> dict[str, Any]:
        """Return it as plain data, for XCom.

        :param redact: takes secrets out of text.
        """
        return {
            "view": self.view,
            "verdict": self.verdict.value,
            "reason": redact(self.reason),
            "mode": self.mode.value,
            "view_rows": self.view_rows,
            "query_rows": self.query_rows,
            "missing": self.missing,
            "surplus": self.surplus,
            "changed": self.changed,
            "stale": self.stale,
            "drift": self.drift,
            "role": self.role,
            "seconds": round(self.seconds, 3),
            "examples": [example.as_dict(redact) for example in self.examples],
            "notes": [redact(note) for note in self.notes],
        }


@dataclass(frozen=True)
class Timing:
    """How long a view and its query take, read in full. Medians over the rounds, planning included.

    :ivar rows: of the view; None where it could not be timed.
    :ivar query_ms: milliseconds of its query.
    :ivar view_ms: milliseconds of the view.
    :ivar reason: why it could not be timed.
    """

    view: str
    rows: int | None = None
    query_ms: float | None = None
    view_ms: float | None = None
    reason: str | None = None

    @property
    def speed_up(self) -> float | None:
        """How many times as long its query takes."""
        return self.query_ms / self.view_ms if self.query_ms is not None and self.view_ms else None

    def as_dict(self, redact: Callable[[str], str] = str) -> dict[str, Any]:
        """Return it as plain data.

        :param redact: takes secrets out of text.
        """
        return {
            "view": self.view,
            "rows": self.rows,
            "query_ms": None if self.query_ms is None else round(self.query_ms, 3),
            "view_ms": None if self.view_ms is None else round(self.view_ms, 3),
            "speed_up": None if self.speed_up is None else round(self.speed_up, 2),
            "reason": redact(self.reason) if self.reason else None,
        }


@dataclass(frozen=True)
class VerificationReport:
    """What came of verifying several views.

    :ivar verifications: of each, those first that others read.
    :ivar seconds: that all of it took.
    :ivar timings: how fast each is against its query; none where that was not asked for.
    """

    verifications: tuple[Verification, ...]
    seconds: float
    timings: tuple[Timing, ...] = ()

    def count(self, verdict: Verdict | str) -> int:
        """Return how many have this verdict."""
        return sum(each.verdict == verdict for each in self.verifications)

    def as_dict(self, redact: Callable[[str], str] = str) -> dict[str, Any]:
        """Return it as plain data, for XCom.

        :param redact: takes secrets out of text.
        """
        return {
            **{verdict.value: self.count(verdict) for verdict in Verdict},
            "seconds": round(self.seconds, 3),
            "views": [each.as_dict(redact) for each in self.verifications],
            **({"timings": [each.as_dict(redact) for each in self.timings]} if self.timings else {}),
        }


def report_lines(summary: dict[str, Any]) -> list[str]:
    """Return the tables of a report, with the examples of what differs.

    :param summary: as of :meth:`VerificationReport.as_dict`.
    """
    lines = table(summary)
    for each in summary["views"]:
        lines += [f"{one_line(each['view'])}: {example['line']}" for example in each["examples"]]
        lines += [f"{one_line(each['view'])}: {note}" for note in each["notes"]]
    return lines + (timings_table(summary["timings"]) if "timings" in summary else [])


def table(summary: dict[str, Any]) -> list[str]:
    """Return the lines of a table of a report, those first that somebody has to look at.

    :param summary: as of :meth:`VerificationReport.as_dict`.
    """
    urgency = {verdict.value: place for place, verdict in enumerate(_URGENCY)}
    rows = [
        [
            one_line(each["view"]),
            each["verdict"],
            *("" if each[name] is None else f"{each[name]:,}" for name in ("view_rows", "missing", "surplus")),
            f"{each['seconds']:.2f}",
            each["reason"].splitlines()[0] if each["reason"] else "",
        ]
        for each in sorted(summary["views"], key=lambda each: urgency[each["verdict"]])
    ]
    return aligned(("view", "verdict", "rows", "missing", "surplus", "seconds", "reason"), rows, right=range(2, 6))


def check_rounds(rounds: object, least: int = 1) -> int:
    """Return how often to time.

    :raises InvalidDefinition: when it is no whole number from ``least`` to 100.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not least <= rounds <= _MOST_ROUNDS:
        raise InvalidDefinition(f"rounds={rounds!r} is not a whole number from {least} to {_MOST_ROUNDS}.")
    return rounds


_HEADING = ("view", "rows", "query_ms", "view_ms", "speed_up")


def timings_table(timings: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of timings, those first that gain least.

    :param timings: each as of :meth:`Timing.as_dict`.
    """
    rows = [
        [
            one_line(each["view"]),
            *("" if each[name] is None else f"{each[name]:,}" for name in _HEADING[1:]),
            each["reason"] or "",
        ]
        for each in sorted(timings, key=lambda each: each["speed_up"] or 0)
    ]
    return aligned((*_HEADING, "reason"), rows, right=range(1, 5))


def timings_csv(timings: Sequence[dict[str, Any]]) -> str:
    """Return timings as CSV (RFC 4180), with a heading.

    :param timings: each as of :meth:`Timing.as_dict`.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _HEADING, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(timings)
    return text.getvalue()


def aligned(heading: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Return the lines of a table.

    :param right: the places of columns that are numbers.
    """
    every = [heading, *rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(heading))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    ]
