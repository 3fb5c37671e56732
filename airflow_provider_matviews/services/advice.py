"""What mends an error of PostgreSQL that does not say it itself."""

from __future__ import annotations

import psycopg
from psycopg import sql

from airflow_provider_matviews.exceptions import MatViewError
from airflow_provider_matviews.services.catalog import ResolvedName


def advise(error: BaseException, view: ResolvedName | None = None, role: str | None = None) -> None:
    """Add a note to an error that has none, where there is something to say.

    :param view: what the operation was about, where that is known.
    :param role: whose operation it was, where that is known.
    """
    if getattr(error, "__notes__", None) or isinstance(error, MatViewError):
        return
    advice = _of_the_server(error)
    if advice is None and view is not None and role is not None:
        advice = _of_the_view(error, view, role)
    if advice is not None:
        error.add_note(advice)


def _of_the_server(error: BaseException) -> str | None:
    match error:
        case psycopg.errors.AdminShutdown():
            return (
                "Somebody ended the server's process (pg_terminate_backend), or the server was being shut down. What "
                "was begun is undone; run it again once the server is there."
            )
        case psycopg.errors.QueryCanceled():
            return (
                "Either statement_timeout ran out (that of the call, the view, the role or the database), or somebody "
                "on the server called pg_cancel_backend()."
            )
        case psycopg.errors.ProtocolViolation() if "query_wait_timeout" in str(error):
            return (
                "The pooler had no server connection to give: an operation needs two for moments. Let fewer operations "
                "run at once than the pooler has connections (by an Airflow pool), or raise its pool size."
            )
        case psycopg.errors.TransactionTimeout():
            return (
                "The server's transaction_timeout ran out: raise it for the role, or in session_settings of the view."
            )
        case psycopg.errors.IdleInTransactionSessionTimeout():
            return "The process that ran this hung for so long that the server took its locks away. Run it again."
        case psycopg.OperationalError() if error.sqlstate is None and "FATAL:" in str(error):
            # A refused connection has no SQLSTATE here, and its words may be in any language.
            return (
                "The server refused the connection. Where it has too many: let fewer operations run at once (by an "
                "Airflow pool), raise max_connections or the role's CONNECTION LIMIT, or put a pooler between. Else "
                "check the role, its password, the database, and pg_hba.conf."
            )
        case psycopg.OperationalError() if error.sqlstate is None:
            return (
                "The server cannot be reached, or the connection to it was lost: it was restarted or failed over, or "
                "the network was cut. What was begun is undone; run it again once the server is there."
            )
    return None


def _of_the_view(error: BaseException, view: ResolvedName, role: str) -> str | None:
    quoted = sql.Identifier(role).as_string(None)
    match error:
        case psycopg.errors.InsufficientPrivilege():
            return (
                f"{view.display}: the role {quoted} lacks a right. If it is one on a source that the message names, "
                f"run: GRANT SELECT ON <that> TO {quoted}; (and GRANT USAGE ON its schema)."
            )
        case psycopg.errors.UndefinedObject():
            return (
                f"{view.display}: roles, tablespaces, operator classes and collations that a definition names have to "
                "exist: create it, or take it out of the definition."
            )
    return None
