"""What the demo prints."""

from __future__ import annotations

import time
from collections.abc import Sequence

_STARTED = time.monotonic()


def say(text: str) -> None:
    """Print one line of progress, with the seconds since the demo began."""
    print(f"{time.monotonic() - _STARTED:6.1f} s  {text}", flush=True)


def print_block(title: str, text: str) -> None:
    """Print several lines under a title, such as the end of a log."""
    print(f"\n--- {title}\n{text.rstrip()}\n---", flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[str]) -> None:
    """Print rows in columns.

    :param header: the columns' names.
    :param rows: one text for each column.
    :param right: the names of the columns that are aligned to the right.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        )
        return "  ".join(cells).rstrip()

    print(line(header))
    print("  ".join("-" * width for width in widths))
    for row in rows:
        print(line(row), flush=True)
