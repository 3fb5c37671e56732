"""``airflow matviews``: what there is to type. Read at every start of ``airflow``: nothing heavy is imported here."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

from airflow.cli.cli_config import ARG_OUTPUT, ARG_YES, ActionCommand, Arg, CLICommand, GroupCommand, lazy_load_command

_COMMANDS = "airflow_provider_matviews.cli.commands"

#: The alert rules that have a value, as ``check`` takes them.
RULES = (
    "consecutive_failures",
    "max_duration_ratio",
    "window",
    "min_samples",
    "min_duration",
    "max_age",
    "max_running",
    "max_row_count_ratio",
    "max_bloat",
)


def _whole(most: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = 0
        if not 1 <= number <= most:
            raise ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most:,}.")
        return number

    return whole


def _seconds(most: float, least: float = 0.001) -> Callable[[str], float]:
    def seconds(text: str) -> float:
        number = _number(text)
        if not least <= number < most:
            raise ArgumentTypeError(f"{text!r} is not a number of seconds from {least:g} to {most:,}.")
        return number

    return seconds


def _ratio(text: str) -> float:
    number = _number(text)
    if not 1 < number < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a number above 1.")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


_LONGEST_WAIT = 2_000_000
_HUNDRED_YEARS = 36_600 * 86_400
_MOST_RUNS = 1_000_000_000
_MOST_SAMPLES = 1000
_CONN_ID = Arg(("--conn-id",), default="postgres_default", help="the Airflow connection to the views' database")
_SCHEMA = Arg(("--tracking-schema",), default="matviews", help="the schema of the run tables")
_VIEW = Arg(("view",), help='the view, as one would type it in SQL: view, schema.view, "Odd Name"')
_VIEWS = Arg(("views",), nargs="+", help="names, or patterns such as 'analytics.*' over schema.name; '*.*' for all")
_SOME_VIEWS = Arg(("views",), nargs="*", default=["*.*"], help="names, or patterns such as 'analytics.*'; without: all")
_EXCLUDE = Arg(("--exclude",), action="append", default=[], metavar="NAME", help="a name or pattern that is not meant")
_FILES = Arg(("files",), nargs="+", help="definitions: .sql files, or folders of them")
_DRY_RUN = Arg(("--dry-run",), action="store_true", help="only say what would be done")
_TIMEOUT = Arg(
    ("--timeout",), type=_seconds(_LONGEST_WAIT), metavar="SECONDS", help="after which it is stopped on the server"
)
_MAX_WAIT = Arg(
    ("--max-wait",),
    type=_seconds(_LONGEST_WAIT),
    metavar="SECONDS",
    help="after which waiting for locks ends in failure",
)
_IF_LOCKED = Arg(
    ("--if-locked",), choices=("wait", "skip", "fail"), default="wait", help="while another operation on it runs"
)
_AT_ONCE = Arg(("--at-once",), type=_whole(100), default=4, help="how many views at a time")
_SHARED = (_CONN_ID, _SCHEMA)
_EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 typed wrongly, 3 something differs or a rule is broken, 130 interrupted."


def _command(name: str, help_text: str, *args: Arg) -> ActionCommand:
    function = lazy_load_command(f"{_COMMANDS}.{name.replace('-', '_')}_command")
    return ActionCommand(name=name, help=help_text, func=function, args=(*args, *_SHARED), epilog=_EXIT_CODES)


def get_matviews_commands() -> list[CLICommand]:
    """Return the commands, for Airflow."""
    return [
        GroupCommand(
            name="matviews",
            help="Create, refresh, check and drop PostgreSQL materialized views",
            subcommands=(
                _command("list", "List the views that are on record, with their state", _SOME_VIEWS, ARG_OUTPUT),
                _command("show", "Show what a view is, and what is recorded of it", _VIEW, ARG_OUTPUT),
                _command("plan", "Compare definitions with the database; change nothing", _FILES, ARG_OUTPUT),
                _command(
                    "create",
                    "Create views as their definitions say, or make those that stand what they say",
                    _FILES,
                    Arg(("--force",), action="store_true", help="build those anew that stand"),
                    Arg(
                        ("--on-drift",),
                        choices=("apply", "fail", "report", "ignore"),
                        default="apply",
                        help="where a view stands that differs",
                    ),
                    _DRY_RUN,
                    _IF_LOCKED,
                    _MAX_WAIT,
                    _TIMEOUT,
                    ARG_OUTPUT,
                ),
                _command(
                    "refresh",
                    "Refresh views, each after those that it reads",
                    _VIEWS,
                    _EXCLUDE,
                    Arg(("--strategy",), choices=("auto", "swap", "concurrent", "regular"), help="instead of declared"),
                    Arg(("--skip-unchanged",), action="store_true", help="leave those alone that are up to date"),
                    Arg(("--ignore-windows",), action="store_true", help="also outside of their windows"),
                    _AT_ONCE,
                    _DRY_RUN,
                    _IF_LOCKED,
                    _MAX_WAIT,
                    _TIMEOUT,
                    ARG_OUTPUT,
                ),
                _command(
                    "drop",
                    "Drop a view; its history stays",
                    _VIEW,
                    Arg(("--cascade",), action="store_true", help="and what is built on it"),
                    Arg(("--force",), action="store_true", help="also one that is not managed"),
                    _DRY_RUN,
                    _IF_LOCKED,
                    _MAX_WAIT,
                    _TIMEOUT,
                    ARG_YES,
                    ARG_OUTPUT,
                ),
                _command(
                    "verify",
                    "Compare views with their queries, row by row",
                    _VIEWS,
                    _EXCLUDE,
                    Arg(("--mode",), choices=("exact", "sampled", "checksum"), default="exact", help="how thoroughly"),
                    Arg(("--sample",), type=_whole(100_000), default=1000, help="rows that `sampled` looks at"),
                    _TIMEOUT,
                    ARG_OUTPUT,
                ),
                _command(
                    "check",
                    "Apply the alert rules to the record",
                    _SOME_VIEWS,
                    _EXCLUDE,
                    Arg(
                        ("--no-failed",),
                        dest="failed",
                        action="store_false",
                        help="not those whose latest run failed",
                    ),
                    Arg(
                        ("--no-unreadable",),
                        dest="unreadable",
                        action="store_false",
                        help="not those that are gone, or hold no data",
                    ),
                    Arg(("--consecutive-failures",), type=_whole(_MOST_SAMPLES), help="that so many failed in a row"),
                    Arg(
                        ("--max-age",),
                        type=_seconds(_HUNDRED_YEARS),
                        metavar="SECONDS",
                        help="within which a view has to be refreshed",
                    ),
                    Arg(
                        ("--max-running",),
                        type=_seconds(_HUNDRED_YEARS),
                        metavar="SECONDS",
                        help="that a run may take that is under way",
                    ),
                    Arg(("--max-duration-ratio",), type=_ratio, help="times the average that is slow (2)"),
                    Arg(("--max-row-count-ratio",), type=_ratio, help="times more or fewer rows than on average"),
                    Arg(("--max-bloat",), type=_ratio, help="times the room that a row took after a rebuild"),
                    Arg(("--window",), type=_whole(_MOST_SAMPLES), help="refreshes that an average is over (20)"),
                    Arg(("--min-samples",), type=_whole(_MOST_SAMPLES), help="refreshes that it takes for one (5)"),
                    Arg(
                        ("--min-duration",),
                        type=_seconds(_HUNDRED_YEARS, 0),
                        metavar="SECONDS",
                        help="that are slow at the least (1)",
                    ),
                    ARG_OUTPUT,
                ),
                _command(
                    "runs",
                    "List the latest runs, of a view or of all",
                    Arg(("view",), nargs="?", help="of this view; without: of all"),
                    Arg(("--limit",), type=_whole(1_000_000), default=20, help="how many at the most"),
                    Arg(
                        ("--run",),
                        type=_whole(2**63 - 1),
                        metavar="ID",
                        help="show everything that is recorded of this one",
                    ),
                    ARG_OUTPUT,
                ),
                _command(
                    "prune",
                    "Delete old runs from the record",
                    _SOME_VIEWS,
                    _EXCLUDE,
                    Arg(("--keep-successes",), type=_whole(_MOST_RUNS), default=500, help="of each view and operation"),
                    Arg(("--keep-failures",), type=_whole(_MOST_RUNS), help="likewise; without: all"),
                    Arg(("--keep-skipped",), type=_whole(_MOST_RUNS), help="likewise; without: as many as successes"),
                    Arg(
                        ("--max-age",),
                        type=_seconds(_HUNDRED_YEARS),
                        metavar="SECONDS",
                        help="and nothing that is older",
                    ),
                    _DRY_RUN,
                    ARG_YES,
                    ARG_OUTPUT,
                ),
                _command("reap", "Mark the runs as failed whose process was lost", ARG_OUTPUT),
                _command(
                    "graph",
                    "Show which views read which",
                    Arg(("--mermaid",), action="store_true", help="as text for Mermaid"),
                    ARG_OUTPUT,
                ),
                _command(
                    "adopt",
                    "Write a .sql file for each view of a schema",
                    Arg(("--schema",), default="public", help="its exact name"),
                    Arg(("--to",), required=True, metavar="FOLDER", help="where the files go; made if need be"),
                    Arg(("--overwrite",), action="store_true", help="replace files that are there"),
                    ARG_OUTPUT,
                ),
            ),
        )
    ]
