"""What pg_cron's own tables say: its jobs, and the runs of their commands. Reads them, and never writes.

They stand in the one database of a server that ``cron.database_name`` names; jobs may work in another.
https://github.com/citusdata/pg_cron; measured on 1.4.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql

from airflow_provider_matviews.exceptions import MissingPrivilege, UnsupportedServer
from airflow_provider_matviews.names import quote
from airflow_provider_matviews.services.cron_commands import CronCommand, read_command
from airflow_provider_matviews.services.instructions import Note, Pause, Session, Work, fetch_all, fetch_one

#: Seconds after which pg_cron has noted that the process of a job has ended.
SETTLING = 1.0
#: Up to 1.4, with cron.use_background_workers=on, a run's end is noted before it is waited for (measured: 2 ms for
#: 2.5 s). 1.5.0 mended it ("a bug that could limit concurrency for background workers").
_TELLS_TIME = (1, 5)


@dataclass(frozen=True)
class CronJob:
    """An active job.

    :ivar name: None for one that was scheduled without.
    :ivar schedule: as pg_cron reads it.
    :ivar role: whose rights it has.
    """

    id: int
    name: str | None
    schedule: str
    role: str
    command: CronCommand

    def __str__(self) -> str:
        name = "" if self.name is None else f"{self.name!r}, "
        return f"job {self.id} of pg_cron ({name}{self.schedule!r}, role {quote(self.role)})"


@dataclass(frozen=True)
class CronTables:
    """The jobs for a database, and what there is to know of their runs.

    :ivar database: the one that pg_cron's tables are in.
    :ivar last: the latest run that this role can see.
    :ivar anew: whether it counts its runs from the beginning again since they were last read.
    :ivar tells_time: whether it notes when a run ends.
    :ivar looked_at: when the server was asked which processes live.
    :ivar alive: those, each as its number and role.
    """

    database: str
    jobs: list[CronJob]
    last: int
    anew: bool
    tells_time: bool
    looked_at: datetime
    alive: list[str]


def read_tables(database: str, position: int, since: datetime | None) -> Work[CronTables]:
    """Look at the jobs that work in a database, and at how far their runs have come.

    :param database: the one that holds the views.
    :param position: the last run that was dealt with before; 0 for none.
    :param since: when that was.
    :raises UnsupportedServer: when pg_cron is not installed in this database, or is too old to record its runs.
    :raises MissingPrivilege: when the role may not read its tables; the hint is the GRANT.
    """
    facts = yield from _extension()
    try:
        rows = yield from fetch_all(
            sql.SQL(
                "SELECT jobid, jobname::text AS name, schedule, username AS role, command FROM cron.job "
                "WHERE active AND database = %s AND command ILIKE '%%refresh%%' ORDER BY jobid"
            ),
            (database,),
            Session.RECORD,
        )
        jobs = [
            CronJob(row["jobid"], row["name"], row["schedule"], row["role"], read_command(row["command"]))
            for row in rows
        ]
        looked_at, alive = yield from _alive(database)
        if any(job.command.refreshed and not job.command.alone for job in jobs):
            yield Pause(SETTLING)
        row = yield from fetch_one(
            sql.SQL(
                """
                SELECT coalesce(max(runid), 0) AS last, row_security_active('cron.job_run_details') AS only_own,
                       -- The extension was made anew: it has not come as far, or came there later than we did.
                       CASE WHEN has_sequence_privilege('cron.runid_seq', 'SELECT')
                            THEN coalesce(pg_sequence_last_value('cron.runid_seq'), 0) < %(position)s
                            ELSE false END
                       OR coalesce((SELECT start_time > %(since)s::timestamptz FROM cron.job_run_details
                                    WHERE runid <= %(position)s ORDER BY runid DESC LIMIT 1), false) AS anew
                FROM cron.job_run_details
                """
            ),
            {"position": position, "since": since},
            Session.RECORD,
        )
    except psycopg.errors.InsufficientPrivilege as error:
        raise _may_not_read(facts) from error
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
        raise UnsupportedServer(
            f"pg_cron {facts['extension']} in database {quote(facts['database'])} does not record its runs: "
            f"{error.diag.message_primary}.",
            hint="bring it up to 1.3 or newer: ALTER EXTENSION pg_cron UPDATE;",
        ) from error
    assert row is not None
    if row["only_own"]:
        yield Note(
            f"pg_cron shows each role its own jobs: those of {facts['role']} alone are imported. "
            "A superuser, or a role with BYPASSRLS, sees all of them."
        )
    if row["anew"]:
        yield Note("pg_cron counts its runs from the beginning again: all of them are read anew.")
    version = tuple(int(part) for part in re.findall(r"\d+", facts["extension"])[:2])
    return CronTables(
        facts["database"],
        jobs,
        row["last"],
        row["anew"],
        version >= _TELLS_TIME or facts["workers"] == "off",
        looked_at,
        alive,
    )


def read_runs(database: str, theirs: CronTables, after: int, size: int) -> Work[list[dict[str, Any]]]:
    """Return runs in their order, each as a dict of what its columns say, and whether it has ``ended``.

    That is None for one that will never be heard of again. Of a command of several statements pg_cron says that it has
    succeeded after the first of them, and corrects itself where a later one fails. So a run has ended once another one
    of its job has begun (a job runs once at a time), or once its process was seen to be gone, and that some time ago.

    :param database: the one that holds the views.
    :param after: the run after which to begin.
    :param size: how many at the most.
    """
    return (
        yield from fetch_all(
            sql.SQL(
                """
                SELECT d.runid, d.jobid, d.database, d.username AS role, d.command, d.status,
                       d.return_message AS message, d.start_time, d.end_time, j.jobname::text AS name,
                       CASE WHEN d.status IN ('succeeded', 'failed')
                                 AND coalesce(d.start_time < %(looked_at)s, true)
                                 AND coalesce(d.job_pid || ' ' || d.username <> ALL (%(alive)s), true) THEN true
                            WHEN NOT EXISTS (SELECT 1 FROM cron.job_run_details n
                                             WHERE n.jobid = d.jobid AND n.runid > d.runid) THEN false
                            WHEN d.status IN ('succeeded', 'failed') THEN true END AS ended
                FROM cron.job_run_details d LEFT JOIN cron.job j ON j.jobid = d.jobid
                WHERE d.runid > %(after)s AND d.runid <= %(last)s AND d.database = %(database)s
                AND d.command ILIKE '%%refresh%%'
                ORDER BY d.runid LIMIT %(size)s
                """
            ),
            {
                "looked_at": theirs.looked_at,
                "alive": theirs.alive,
                "after": after,
                "last": theirs.last,
                "database": database,
                "size": size,
            },
            Session.RECORD,
        )
    )


def _alive(database: str) -> Work[tuple[datetime, list[str]]]:
    row = yield from fetch_one(
        sql.SQL(
            "SELECT clock_timestamp() AS at, ARRAY(SELECT pid || ' ' || usename "
            "FROM pg_catalog.pg_stat_activity WHERE datname = %s AND usename IS NOT NULL) AS alive"
        ),
        (database,),
        Session.RECORD,
    )
    assert row is not None
    return row["at"], row["alive"]


def _extension() -> Work[dict[str, Any]]:
    facts = yield from fetch_one(
        sql.SQL(
            "SELECT current_database()::text AS database, current_user::text AS role, "
            "(SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'pg_cron') AS extension, "
            # Seen by superusers and members of pg_read_all_settings alone.
            "(SELECT setting FROM pg_catalog.pg_settings WHERE name = 'cron.database_name') AS home, "
            "(SELECT setting FROM pg_catalog.pg_settings WHERE name = 'cron.use_background_workers') AS workers"
        ),
        session=Session.RECORD,
    )
    assert facts is not None
    if facts["extension"] is not None:
        return facts
    here = quote(facts["database"])
    if facts["home"] is not None and facts["home"] != facts["database"]:
        hint = (
            f"pg_cron of this server is at home in another: give cron_database={facts['home']!r}; where it is not "
            "installed there either, run there, as a superuser: CREATE EXTENSION pg_cron;"
        )
    else:
        hint = (
            "as a superuser, with pg_cron in shared_preload_libraries, run in the database that cron.database_name "
            "names: CREATE EXTENSION pg_cron; and give that database as cron_database=... where it is not this one."
        )
    raise UnsupportedServer(f"The extension pg_cron is not installed in database {here}.", hint=hint)


def _may_not_read(facts: Mapping[str, Any]) -> MissingPrivilege:
    role = quote(facts["role"])
    return MissingPrivilege(
        f"The role {role} may not read the tables of pg_cron in database {quote(facts['database'])}.",
        hint=f"run there: GRANT USAGE ON SCHEMA cron TO {role}; "
        f"GRANT SELECT ON cron.job, cron.job_run_details TO {role};",
    )
