"""What an operation leaves for Airflow: lines in the log, a summary, and errors that travel as plain data.

Used where it ran, in a worker or in a triggerer, and where it is told on, so that both modes say the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import psycopg

from airflow_provider_matviews.exceptions import MatViewError
from airflow_provider_matviews.services.response import ServiceResponse


def summary(response: ServiceResponse, redact: Callable[[str], str] = str) -> dict[str, Any]:
    """Return what XCom and asset events get.

    :param redact: takes secrets out of text.
    """
    facts = response.response
    # It may be told in the words of the server, which may repeat a view's query.
    reason = facts.get("reason")
    dry_run: dict[str, Any] = {}
    if facts.get("dry_run"):
        dry_run = {"dry_run": True, "locks": facts["locks"]}
        dry_run |= {name: [redact(text) for text in facts[name]] for name in ("sql", "then")}
    return {
        "view": facts["view"],
        "status": "updated" if facts.get("already") else response.status,
        "strategy": facts["strategy"],
        "row_count_before": facts["row_count_before"],
        "row_count_after": facts["row_count_after"],
        "duration_ms": response.duration_ms,
        "reason": redact(reason) if reason else reason,
        "mat_view_run_id": facts.get("already") or response.run_id,
        **({"sources": facts["sources"]} if "sources" in facts else {}),
        # What create found: None where it did not look.
        **({"drift": facts["drift"]} if "drift" in facts else {}),
        **dry_run,
    }


def stood_back(response: ServiceResponse) -> bool:
    """Whether nothing was done: another operation on the view ran, or its turn has not come."""
    return bool(response.response.get("locked") or response.response.get("spared"))


def log_statements(log: logging.Logger | Any, response: ServiceResponse, redact: Callable[[str], str] = str) -> None:
    """Log every statement with its time, as a group that one opens.

    :param redact: takes secrets out of text.
    """
    facts = response.response
    if not facts["sql"]:
        return
    count = len(facts["sql"])
    log.info("::group::The %s statement%s, with the time of each", count, "" if count == 1 else "s")
    for statement, step in zip(facts["sql"], facts["steps"], strict=True):
        # None in a dry run.
        ms = "-" if step["ms"] is None else f"{step['ms']:.1f}"
        log.info("%9s ms  %s", ms, redact(statement))
    log.info("::endgroup::")


def log_error(log: logging.Logger | Any, error: BaseException, redact: Callable[[str], str] = str) -> None:
    """Log an error with what mends it, and the statements so far.

    :param redact: takes secrets out of text.
    """
    log.error("%s", redact("\n".join([str(error), *getattr(error, "__notes__", ())])))
    so_far = getattr(error, "response", None)
    if isinstance(so_far, ServiceResponse):
        log_statements(log, so_far, redact)


def recorded_run_id(error: BaseException) -> int | None:
    """Return the id of the run row that an error is of; None where none was written."""
    response = getattr(error, "response", None)
    return response.run_id if isinstance(response, ServiceResponse) else None


def pack_error(error: BaseException, redact: Callable[[str], str] = str) -> dict[str, Any]:
    """Return an error as plain data; :func:`unpack_error` makes one of the same class of it.

    :param redact: takes secrets out of text.
    """
    return {
        "module": type(error).__module__,
        "class": type(error).__qualname__,
        "message": redact(error.message if isinstance(error, MatViewError) else str(error)),
        "hint": redact(error.hint) if isinstance(error, MatViewError) and error.hint else None,
        "run_id": recorded_run_id(error),
        "notes": [redact(note) for note in getattr(error, "__notes__", ())],
        "more": {
            name: [redact(each) for each in value]
            for name, value in vars(error).items()
            if isinstance(error, MatViewError) and isinstance(value, tuple)
        },
    }


def unpack_error(packed: Mapping[str, Any]) -> Exception:
    """Return the error that was packed: of its own class where that is ours or psycopg's, so that policies match."""
    kind: Any = None
    if packed["module"].partition(".")[0] in (__name__.partition(".")[0], psycopg.__name__):
        # A worker and a triggerer of two versions.
        with suppress(ImportError):
            kind = getattr(import_module(packed["module"]), packed["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        error: Exception = RuntimeError(f"{packed['class']}: {packed['message']}")
    elif issubclass(kind, MatViewError):
        # Not by its own constructor: some take more than was packed.
        error = kind.__new__(kind, packed["message"])
        MatViewError.__init__(error, packed["message"], hint=packed["hint"])
        vars(error).update({name: tuple(value) for name, value in packed.get("more", {}).items()})
    else:
        error = kind(packed["message"])
    for note in packed["notes"]:
        error.add_note(note)
    return error
