"""``airflow matviews``: what the commands do. The story goes to stderr, what was asked for to stdout."""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from airflow.cli.simple_table import AirflowConsole, SimpleTable
from airflow.providers.common.compat.sdk import AirflowException
from airflow.utils import yaml
from rich.text import Text
from tabulate import tabulate  # type: ignore[import-untyped]

from airflow_provider_matviews.cli.definition import RULES
from airflow_provider_matviews.cli.process import with_connections_of_airflow
from airflow_provider_matviews.cli.terminal import (
    InterruptedAtQuestion,
    confirm,
    stopped_by_sigterm,
    story,
    visible,
    working,
)
from airflow_provider_matviews.definition import MatViewDefinition, load_definitions
from airflow_provider_matviews.exceptions import FleetFailed, InvalidDefinition, MatViewError, ViewNotFound
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.outcome import summary
from airflow_provider_matviews.services.overview import glance
from airflow_provider_matviews.services.plan_steps import Plan
from airflow_provider_matviews.services.response import ServiceResponse, would_be

#: Something differs, or a rule is broken: no failure, and nothing to pass over in a script.
DIFFERS = 3
INTERRUPTED = 130

_POSITIONAL = ("view", "views", "files")

#: An argument as a hint names it, and perhaps the option beside it: on_drift='apply', overwrite=True (--overwrite).
_ARGUMENT = re.compile(r"""\b(\w+)=(True\b|'[^']*'|"[^"]*"|\.\.\.)(?: \(--[\w-]+\))?""")
_METHOD = re.compile(r"\bhook\.(create|refresh|plan|runs|reap)\(\)")


class _Hook(MatViewHook):
    """Tells its story on the terminal."""

    @property
    def log(self) -> logging.Logger:
        """Where it is told."""
        return story()


def _command(function: Callable[[Namespace], int]) -> Callable[[Namespace], None]:
    """End the process as scripts expect it to end."""

    @functools.wraps(function)
    def run(args: Namespace) -> None:
        try:
            with stopped_by_sigterm(), with_connections_of_airflow():
                code = function(args)
        except InterruptedAtQuestion:
            sys.stderr.write("Interrupted.\n")
            code = INTERRUPTED
        except KeyboardInterrupt:
            sys.stderr.write("Interrupted: what ran was stopped on the server, and is undone there.\n")
            code = INTERRUPTED
        except BrokenPipeError:
            # Whoever reads has seen enough.
            sys.stderr.close()
            code = 0
        except (MatViewError, AirflowException, psycopg.Error, OSError) as error:
            _complain(_told(args, error))
            code = 1
        if code:
            raise SystemExit(code)

    return run


def _told(args: Namespace, error: Exception) -> str:
    if isinstance(error, MatViewError) and error.hint:
        error.hint = _as_typed(args, error.hint)
    told = "\n".join([str(error), *getattr(error, "__notes__", ())])
    try:
        return _hook(args).redact(told)
    except MatViewError:
        # What is wrong is what the hook was asked to be.
        return told


def _as_typed(args: Namespace, hint: str) -> str:
    """Return a hint with the command's options in place of the arguments that it names."""

    def option(found: re.Match[str]) -> str:
        name, value = found[1], found[2].strip("'\"")
        # The only one that is not named as its argument is.
        name = name if name in args else name.removeprefix("refresh_")
        if name not in args or name in _POSITIONAL:
            return found[0]
        return f"--{name.replace('_', '-')}" + ("" if value in ("True", "...") else f" {value}")

    return _METHOD.sub(r"airflow matviews \1", _ARGUMENT.sub(option, hint))


def _hook(args: Namespace) -> MatViewHook:
    return _Hook(postgres_conn_id=args.conn_id, tracking_schema=args.tracking_schema)


def _show(args: Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    plain = [dict(row) for row in rows]
    if args.output == "json":
        # Airflow's own makes text of every number.
        sys.stdout.write(json.dumps(plain, indent=2, default=str, ensure_ascii=False) + "\n")
    elif args.output == "yaml":
        sys.stdout.write(yaml.dump(json.loads(json.dumps(plain, default=str)), sort_keys=False, allow_unicode=True))
    elif not plain:
        sys.stdout.write("No data found\n")
    else:
        cells = [[visible(_text(value)) for value in row.values()] for row in plain]
        if args.output == "plain":
            # A view may be called 007, or 1e5.
            sys.stdout.write(tabulate(cells, headers=list(plain[0]), tablefmt="plain", disable_numparse=True) + "\n")
        else:
            table = SimpleTable(show_header=True)  # type: ignore[no-untyped-call]
            for name in plain[0]:
                table.add_column(name)
            for row in cells:
                # As text, in which rich reads no markup: what is shown is often SQL, which has brackets.
                table.add_row(*map(Text, row))
            AirflowConsole().print(table)


def _complain(text: str) -> None:
    sys.stderr.write(visible(text) + "\n")


def _facts(args: Namespace, facts: Mapping[str, Any]) -> None:
    """Show one thing: its facts one below the other on a terminal, as one object elsewhere."""
    if args.output in ("json", "yaml"):
        _show(args, [facts])
    else:
        _show(args, [{"fact": name, "value": value} for name, value in facts.items() if value not in (None, [])])


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return "\n".join(map(str, value))
    return str(value)


def _definitions(files: Iterable[str]) -> list[tuple[MatViewDefinition, Path]]:
    """Read definitions, each with the file that it is in."""
    found: list[tuple[MatViewDefinition, Path]] = []
    for name in files:
        path = Path(name)
        if path.is_dir():
            written = {MatViewDefinition.from_file(file).name: file for file in path.rglob("*.sql")}
            found += [(each, written.get(each.name, path)) for each in load_definitions(path).values()]
        else:
            found.append((MatViewDefinition.from_file(path), path))
    if not found:
        raise InvalidDefinition(f"There is no .sql file in {', '.join(files)}.")
    return found


class _NotDone(MatViewError):
    """What came of one definition among several; says which and where it is written."""


@contextmanager
def _named(args: Namespace, definition: MatViewDefinition, path: Path) -> Iterator[None]:
    try:
        yield
    except (MatViewError, psycopg.Error) as error:
        raise _NotDone(f"{definition.name} ({path}): {_told(args, error)}") from error


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds / 1000, 2)


def _moment(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone().isoformat(" ", "seconds")


@_command
def list_command(args: Namespace) -> int:
    """List views with their state."""
    rows = []
    for metrics in _hook(args).metrics(args.views):
        seen, last = glance(metrics), metrics.last_attempt
        rows.append(
            {
                "view": metrics.view,
                "state": seen.state.value,
                "last_filled": _moment(metrics.last_filled_at),
                "seconds": _seconds(metrics.durations_ms[0] if metrics.durations_ms else None),
                "rows": metrics.row_count,
                "bytes": metrics.heap_bytes,
                "strategy": last.strategy if last else None,
                "why": seen.reason,
            }
        )
    _show(args, rows)
    return 0


@_command
def show_command(args: Namespace) -> int:
    """Show one view."""
    known = _hook(args).describe(args.view)
    last = known.last_run
    _facts(
        args,
        {
            "view": known.name,
            "owner": known.owner,
            "populated": known.populated,
            "estimated_rows": known.estimated_rows,
            "declared": bool(known.definition and known.definition.declaration),
            "refresh_strategy": known.definition and known.definition.refresh_strategy.value,
            "last_run": last and f"{last.operation} {last.status} at {_moment(last.started_at)} (run {last.id})",
            "columns": [f"{name} {kind}" for name, kind in known.columns],
            "indexes": [index.definition for index in known.indexes],
            "sources": list(known.sources),
            "dependents": list(known.dependents),
            "attachments": [each.description for each in known.attachments],
            "query": known.query,
        },
    )
    return 0


@_command
def plan_command(args: Namespace) -> int:
    """Compare definitions with the database."""
    hook = _hook(args)
    plans: list[Plan] = []
    failures: list[_NotDone] = []
    for definition, path in _definitions(args.files):
        try:
            with _named(args, definition, path):
                plans.append(hook.plan(definition))
        except _NotDone as error:
            failures.append(error)
            if isinstance(error.__cause__, psycopg.OperationalError) and error.__cause__.sqlstate is None:
                # There is no server for the others either.
                break
    if plans:
        _show_plans(args, plans)
    for failure in failures:
        _complain(str(failure))
    if failures:
        return 1
    return DIFFERS if any(plan.steps or plan.refusals for plan in plans) else 0


def _show_plans(args: Namespace, plans: Sequence[Plan]) -> None:
    if args.output in ("json", "yaml"):
        _show(args, [plan.as_dict() for plan in plans])
        return
    rows = []
    for plan in plans:
        rows += [
            {"view": plan.view, "step": step.title, "why": step.why, "lock": f"{step.lock.value}: {step.cost}"}
            for step in plan.steps
        ]
        rows += [{"view": plan.view, "step": "refused", "why": text, "lock": ""} for text in plan.refusals]
        if plan.empty and not plan.refusals:
            rows.append({"view": plan.view, "step": "", "why": "nothing differs", "lock": ""})
    _show(args, rows)


@_command
def create_command(args: Namespace) -> int:
    """Create views, or make them what they should be."""
    hook = _hook(args)
    done: list[ServiceResponse] = []
    try:
        for definition, path in _definitions(args.files):
            with _named(args, definition, path), working(hook, str(definition.view)):
                response = hook.create(
                    definition, force=args.force, on_drift=args.on_drift, dry_run=args.dry_run, **_manners(args)
                )
            done.append(response)
    finally:
        # What stands is told, whatever came after it.
        if done:
            _show(args, [_outcome(args, hook, response) for response in done])
    left = any(response.status == "skipped" and response.response.get("drift") for response in done)
    return DIFFERS if left else 0


@_command
def refresh_command(args: Namespace) -> int:
    """Refresh views."""
    hook = _hook(args)
    arguments = {
        "refresh_strategy": args.strategy,
        "skip_unchanged": args.skip_unchanged,
        "ignore_windows": args.ignore_windows,
        "dry_run": args.dry_run,
        **_manners(args),
    }
    if len(args.views) == 1 and not args.exclude and ('"' in args.views[0] or not set("*?[") & set(args.views[0])):
        with working(hook, args.views[0]):
            response = hook.refresh(args.views[0], **arguments)
        _show(args, [_outcome(args, hook, response)])
        return 0
    code = 0
    try:
        result = hook.refresh_many(args.views, exclude=args.exclude, at_once=args.at_once, **arguments)
    except FleetFailed as error:
        if error.result is None:
            raise
        _complain(_told(args, error))
        result, code = error.result, 1
    found = result.as_dict(hook.redact)["views"]
    _check_any(args, found)
    _show(args, [_row(args, each) for each in found])
    return code


@_command
def drop_command(args: Namespace) -> int:
    """Drop a view."""
    hook = _hook(args)
    ViewName.parse(args.view)
    if not args.dry_run and not args.yes:
        confirm(
            f"Drop the materialized view {args.view} of {args.conn_id}" + (", and what is built on it" * args.cascade)
        )
    response = hook.delete(args.view, cascade=args.cascade, force=args.force, dry_run=args.dry_run, **_manners(args))
    _show(args, [_outcome(args, hook, response)])
    return 0


@_command
def verify_command(args: Namespace) -> int:
    """Compare views with their queries."""
    hook = _hook(args)
    report = hook.verify_many(
        args.views, exclude=args.exclude, mode=args.mode, sample=args.sample, timeout=args.timeout
    )
    found = report.as_dict(hook.redact)["views"]
    _check_any(args, found)
    if args.output in ("json", "yaml"):
        _show(args, found)
    else:
        columns = ("view", "verdict", "view_rows", "missing", "surplus", "seconds", "reason")
        _show(args, [{name: each[name] for name in columns} for each in found])
        for each in found:
            for example in each["examples"]:
                sys.stdout.write(visible(f"{each['view']}: {example['line']}") + "\n")
    if any(each["verdict"] == "failed" for each in found):
        return 1
    return 0 if all(each["verdict"] == "equal" for each in found) else DIFFERS


@_command
def check_command(args: Namespace) -> int:
    """Apply the alert rules."""
    hook = _hook(args)
    # Named as the rules are; what was not given is as the rules have it.
    rules = {name: value for name in RULES if (value := getattr(args, name)) is not None}
    found = hook.check(args.views, exclude=args.exclude, failed=args.failed, unreadable=args.unreadable, **rules)
    story().info("%s", found.story())
    breaches = found.as_dict(hook.redact)["breaches"]
    if breaches or args.output in ("json", "yaml"):
        columns = ("view", "rule", "message", "what_to_do", "mat_view_run_id")
        _show(args, [{name: breach[name] for name in columns} for breach in breaches])
    return 0 if found.healthy else DIFFERS


@_command
def runs_command(args: Namespace) -> int:
    """List runs, or show one."""
    hook = _hook(args)
    if args.run is not None:
        run = hook.recorded_run(args.run)
        if run is None:
            _complain(f"There is no run {args.run} on record.")
            return 1
        _facts(args, {name: value for name, value in vars(run).items() if value is not None})
        return 0
    found = hook.runs(args.view, limit=args.limit)
    if args.view is not None and not found:
        _complain(f"There is no run of {args.view} on record.")
        return 1
    _show(
        args,
        [
            {
                "id": run.id,
                "view": run.view,
                "operation": run.operation,
                "status": run.status,
                "started": _moment(run.started_at),
                "seconds": _seconds(run.duration_ms),
                "strategy": _recorded(run.meta, "strategy"),
                "rows": _recorded(run.meta, "row_count_after"),
                "error": _first_line(run.error),
            }
            for run in found
        ],
    )
    return 0


@_command
def prune_command(args: Namespace) -> int:
    """Delete old runs."""
    hook = _hook(args)
    arguments = {
        "views": args.views,
        "exclude": args.exclude,
        "keep_successes": args.keep_successes,
        "keep_failures": args.keep_failures,
        "max_age": args.max_age,
        **({} if args.keep_skipped is None else {"keep_skipped": args.keep_skipped}),
    }
    if not args.dry_run and not args.yes:
        planned = hook.prune(dry_run=True, **arguments)
        if planned.removed:
            confirm(f"Delete {planned.removed} runs from the record of {args.conn_id}")
    result = hook.prune(dry_run=args.dry_run, **arguments)
    hook.log.info("%s", result.story())
    pruned = result.as_dict()
    if args.output in ("json", "yaml"):
        _show(args, [pruned])
    elif pruned["kinds"]:
        _show(args, pruned["kinds"])
    return 0


@_command
def reap_command(args: Namespace) -> int:
    """Mark lost runs."""
    _show(args, [{"run": run_id} for run_id in _hook(args).reap()])
    return 0


@_command
def graph_command(args: Namespace) -> int:
    """Show which views read which."""
    graph = _hook(args).graph()
    if args.mermaid:
        sys.stdout.write(visible(graph.mermaid()))
        return 0
    levels = {view: level for level, views in enumerate(graph.levels) for view in views}
    _show(
        args,
        [
            {
                "view": view,
                "level": levels[view],
                "reads_views": ", ".join(sorted(graph.needs[view])),
                "reads_tables": ", ".join(sorted(graph.sources.get(view, ()))),
            }
            for view in graph.order
        ],
    )
    return 0


@_command
def adopt_command(args: Namespace) -> int:
    """Write definitions of views that stand."""
    definitions = _hook(args).adopt(args.schema, folder=args.to, overwrite=args.overwrite)
    _show(args, [{"view": name, "folder": args.to} for name in definitions])
    return 0


def _recorded(facts: object, name: str) -> Any:
    # Other programs may have written rows, too.
    return facts.get(name) if isinstance(facts, dict) else None


def _first_line(error: object) -> str | None:
    if error is None:
        return None
    told = f"{error.get('class')}: {error.get('message')}" if isinstance(error, dict) else str(error)
    return next(iter(told.splitlines()), "")


def _check_any(args: Namespace, found: Sequence[object]) -> None:
    if not found:
        raise ViewNotFound(
            f"No materialized view is meant by {' '.join(args.views)}"
            + (f" without {' '.join(args.exclude)}" if args.exclude else "")
            + ".",
            hint="patterns are over schema.name, without a schema over public, and are case-sensitive.",
        )


def _manners(args: Namespace) -> dict[str, Any]:
    return {"if_locked": args.if_locked, "max_wait": args.max_wait, "timeout": args.timeout}


def _outcome(args: Namespace, hook: MatViewHook, response: ServiceResponse) -> dict[str, Any]:
    return _row(args, summary(response, hook.redact))


def _row(args: Namespace, told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "view": told["view"],
        "status": would_be(told["status"]) if args.dry_run else told["status"],
        "strategy": told["strategy"],
        "rows": told["row_count_after"],
        "seconds": _seconds(told["duration_ms"]),
        "run": told["mat_view_run_id"],
        "reason": told["reason"],
        **({"dry_run": True} if args.dry_run and args.output in ("json", "yaml") else {}),
    }
