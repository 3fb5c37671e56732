"""Takes an existing estate under management in one command: one ``.sql`` file for each materialized view of a schema.

python -m airflow_provider_matviews.adopt --conn-id warehouse --schema public --to dags/views
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import psycopg
from airflow.providers.common.compat.sdk import AirflowException

from airflow_provider_matviews.cli.process import with_connections_of_airflow
from airflow_provider_matviews.exceptions import MatViewError
from airflow_provider_matviews.hooks.matview import MatViewHook


def main(arguments: Sequence[str] | None = None) -> int:
    """Adopt a schema, and say on stdout what was written.

    :param arguments: the command line; None for that of the process.
    :returns: the exit code: 1 where it could not be done, which stderr tells.
    """
    parser = argparse.ArgumentParser(
        prog="python -m airflow_provider_matviews.adopt",
        description="Write a .sql file for each materialized view of a schema.",
    )
    parser.add_argument("--conn-id", default="postgres_default", help="the Airflow connection (%(default)s)")
    parser.add_argument("--schema", default="public", help="its exact name (%(default)s)")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="where the .sql files go; made if need be")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    given = parser.parse_args(arguments)
    try:
        with with_connections_of_airflow():
            hook = MatViewHook(postgres_conn_id=given.conn_id)
            hook.adopt(given.schema, folder=given.to, overwrite=given.overwrite)
    except (MatViewError, AirflowException, psycopg.Error, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
