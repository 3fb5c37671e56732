"""``airflow matviews``: what there is to type. Read at every start of ``airflow``: nothing heavy is imported here."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from airflow.cli.cli_config import ARG_OUTPUT, ARG_YES, ActionCommand, Arg, CLICommand, GroupCommand, lazy_load_command

_COMMANDS = "airflow_provider_matviews.cli.commands"

_CONN_ID = Arg(("--conn-id",), default="postgres_default", help="the Airflow connection to the views' database")
_SCHEMA = Arg(("--tracking-schema",), default="matviews", help="the schema of the run tables")
_VIEW = Arg(("view",), help='the view, as one would type it in SQL: view, schema.view, "Odd Name"')
_VIEWS = Arg(("views",), nargs="+", help="names, or patterns such as 'analytics.*' over schema.name; '*.*' for all")
_SOME_VIEWS = Arg(("views",), nargs="*", default=["*.*"], help="names, or patterns such as 'analytics.*'; without: all")
_EXCLUDE = Arg(("--exclude",), action="append", default=[], metavar="NAME", help="a name or pattern that is not meant")
_FILES = Arg(("files",), nargs="+", help="definitions: .sql files, or folders of them")
_DRY_RUN = Arg(("--dry-run",), action="store_true", help="only say what would be done")
_TIMEOUT = Arg(("--timeout",), type=float, metavar="SECONDS", help="after which it is stopped on the server")
_MAX_WAIT = Arg(("--max-wait",), type=float, metavar="SECONDS", help="after which waiting for locks ends in failure")
_IF_LOCKED = Arg(
    ("--if-locked",), choices=("wait", "skip", "fail"), default="wait", help="while another operation on it runs"
)
_AT_ONCE = Arg(("--at-once",), type=int, default=4, help="how many views at a time")
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
                    Arg(("--sample",), type=int, default=1000, help="rows that `sampled` looks at"),
                    _TIMEOUT,
                    ARG_OUTPUT,
                ),
                _command(
                    "check",
                    "Apply the alert rules to the record",
                    _SOME_VIEWS,
                    _EXCLUDE,
                    Arg(("--max-age",), type=float, metavar="SECONDS", help="within which a view has to be refreshed"),
                    Arg(("--max-duration-ratio",), type=float, default=2.0, help="times the average that is slow"),
                    ARG_OUTPUT,
                ),
                _command(
                    "runs",
                    "List the latest runs, of a view or of all",
                    Arg(("view",), nargs="?", help="of this view; without: of all"),
                    Arg(("--limit",), type=int, default=20, help="how many at the most"),
                    Arg(("--run",), type=int, metavar="ID", help="show everything that is recorded of this one"),
                    ARG_OUTPUT,
                ),
                _command(
                    "prune",
                    "Delete old runs from the record",
                    _SOME_VIEWS,
                    _EXCLUDE,
                    Arg(("--keep-successes",), type=int, default=500, help="of each view and operation"),
                    Arg(("--keep-failures",), type=int, help="likewise; without: all"),
                    Arg(("--keep-skipped",), type=int, help="likewise; without: as many as successes"),
                    Arg(("--max-age",), type=float, metavar="SECONDS", help="and nothing that is older"),
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
