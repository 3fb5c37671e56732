"""What a person at a terminal sees while a command works; nothing of it goes to stdout."""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

import psycopg
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from airflow_provider_matviews.exceptions import MatViewError
from airflow_provider_matviews.hooks.matview import MatViewHook

_console = Console(stderr=True)
#: What moves the cursor, starts a sequence that a terminal obeys, or turns the direction of writing. Not the end of a
#: line, nor a tab: SQL has them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return text that does nothing to a terminal: control characters as escapes, such as ``\\x1b``."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class _Teller(logging.Handler):
    """Writes lines above a progress bar, where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self._in_a_group = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; not of a group, which holds what goes to stdout here."""
        message = record.getMessage()
        if message.startswith("::"):
            self._in_a_group = message.startswith("::group::")
            return
        if self._in_a_group:
            return
        style = "yellow" if record.levelno >= logging.WARNING else None
        _console.print(visible(message), style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


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
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console, transient=True) as progress:
        task = progress.add_task(visible(view), total=total)
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


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: else a process would end at once, and leave its run ``running``."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, frame: FrameType | None) -> None:
        # asyncio puts one of its own there while it runs; and it is ignored in what a shell runs in the background.
        on_ctrl_c = signal.getsignal(signal.SIGINT)
        if callable(on_ctrl_c) and on_ctrl_c is not signal.default_int_handler:
            on_ctrl_c(signal.SIGINT, frame)
        else:
            raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class InterruptedAtQuestion(KeyboardInterrupt):
    """Ctrl-C instead of an answer: nothing ran yet."""


def confirm(question: str) -> None:
    """Ask, and go on only where the answer is yes.

    :raises MatViewError: where it is not, or nobody is there to answer.
    :raises InterruptedAtQuestion: when it was Ctrl-C.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise MatViewError(f"{question}: nobody is there to say yes.", hint="give --yes, or --dry-run to see first.")
    _console.print(visible(f"{question}? [y/N] "), end="", markup=False, emoji=False)
    try:
        answer = input()
    except (EOFError, KeyboardInterrupt) as error:
        _console.print()
        if isinstance(error, KeyboardInterrupt):
            raise InterruptedAtQuestion from None
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise MatViewError("Nothing was done.")


def _usual_seconds(hook: MatViewHook, view: str) -> float | None:
    try:
        (metrics,) = hook.metrics([view])
    except (MatViewError, psycopg.Error, ValueError):
        return None
    return metrics.average_ms / 1000 if metrics.average_ms else None
