"""What a person at a terminal sees while a command works; nothing of it goes to stdout."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import psycopg
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from airflow_provider_matviews.exceptions import MatViewError
from airflow_provider_matviews.hooks.matview import MatViewHook

_console = Console(stderr=True)


class _Teller(logging.Handler):
    """Writes lines above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        message = record.getMessage()
        if message.startswith("::"):
            return
        style = "yellow" if record.levelno >= logging.WARNING else None
        _console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


@cache
def story() -> logging.Logger:
    """Return where the story of an operation is told."""
    logger = logging.getLogger("airflow_provider_matviews.cli")
    logger.handlers = [_Teller()]
    logger.propagate = False
    logger.setLevel(logging.INFO)
    return logger


@contextmanager
def working(hook: MatViewHook, view: str) -> Iterator[None]:
    """Show how far an operation may be: the time that it has taken, beside what it took before.

    :param hook: on the database; asked for what it took before.
    """
    if not _console.is_terminal:
        yield
        return
    total = _usual_seconds(hook, view)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console, transient=True) as progress:
        task = progress.add_task(view, total=total)
        ended = threading.Event()
        begun = time.monotonic()

        def move() -> None:
            while not ended.wait(0.2):
                # Never full before it is: nobody knows how long it takes this time.
                so_far = time.monotonic() - begun
                progress.update(task, completed=so_far if total is None else min(so_far, 0.95 * total))

        mover = threading.Thread(target=move, daemon=True)
        mover.start()
        try:
            yield
        finally:
            ended.set()
            mover.join()


def confirm(question: str) -> None:
    """Ask, and go on only where the answer is yes.

    :raises MatViewError: where it is not, or nobody is there to answer.
    """
    if not sys.stdin.isatty():
        raise MatViewError(f"{question}: nobody is there to say yes.", hint="give --yes, or --dry-run to see first.")
    _console.print(f"{question}? [y/N] ", end="", markup=False)
    if input().strip().lower() not in ("y", "yes"):
        raise MatViewError("Nothing was done.")


def _usual_seconds(hook: MatViewHook, view: str) -> float | None:
    try:
        (metrics,) = hook.metrics([view])
    except (MatViewError, psycopg.Error, ValueError):
        return None
    return metrics.average_ms / 1000 if metrics.average_ms else None
