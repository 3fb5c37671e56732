"""The hook that the benchmarks measure. Imported once the environment is set, which Airflow reads when it loads."""

from __future__ import annotations

from airflow.sdk import Connection

from airflow_provider_matviews.hooks.matview import MatViewHook
from demo.postgres_server import PostgresServer


def hook_on(server: PostgresServer) -> MatViewHook:
    """Return a hook on a server's own database, as its superuser."""
    return MatViewHook(
        connection=Connection(
            conn_id="views",
            conn_type="postgres",
            host="127.0.0.1",
            port=server.port,
            login="postgres",
            schema="postgres",
        )
    )
