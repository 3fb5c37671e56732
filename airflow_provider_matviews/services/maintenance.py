"""What keeps a view quick to read and costs nobody a wait: ANALYZE and VACUUM after the operation has committed."""

from __future__ import annotations

from typing import Literal

from psycopg import sql

from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.instructions import Command


def maintenance(verb: Literal["ANALYZE", "VACUUM"], view: ResolvedName) -> Command:
    """Return the command. It is passed over, never waited for, where somebody else holds the view.

    VACUUM cannot run inside a transaction (https://www.postgresql.org/docs/current/sql-vacuum.html), and neither
    blocks readers.
    """
    return Command(
        sql.SQL("VACUUM (SKIP_LOCKED) {}" if verb == "VACUUM" else "ANALYZE (SKIP_LOCKED) {}").format(view.identifier)
    )
