"""pg_cron beside Airflow: what its jobs did to known views goes into the record, and who refreshes twice is told.

Reads pg_cron's tables (``cron_tables.py``) and writes ours; never theirs, and never runs what a job would run. They
stand in one database of a server, and jobs may work in another: so there are two sides here, each with somebody who
runs work on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from psycopg import sql
from psycopg.types.json import Jsonb

from airflow_provider_matviews.names import quote
from airflow_provider_matviews.services import catalog
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.cron_commands import CronCommand, Refreshed, read_command
from airflow_provider_matviews.services.cron_tables import CronJob, CronTables, read_runs, read_tables
from airflow_provider_matviews.services.instructions import Note, Session, Work, fetch_all, fetch_one
from airflow_provider_matviews.services.ledger import Ledger, Operation, RunStatus
from airflow_provider_matviews.services.migrations import ensure_schema, explained

#: Rows of pg_cron's that are read and written at a time.
BATCH = 2000
#: Days after which a view that Airflow refreshed is nobody's but the job's.
_AIRFLOW_DAYS = 30
_LONGEST_MS = 2**31 - 1
_DEFAULT_PATH = '"$user", public'
_PATH_PART = re.compile(r'\s*(?:"((?:[^"]|"")*)"|([^",\s]+))\s*(?:,|\Z)')
#: The line that an error points into, and the caret below it: half a command, which may hold half a secret.
_EXCERPT = re.compile(r"LINE \d+:|\s*\^\Z")

_T = TypeVar("_T")


class Runner(Protocol):
    """Runs work on a connection, as a driver does."""

    def __call__(self, work: Work[_T], /) -> _T:
        """Return what the work returns."""
        ...


@dataclass(frozen=True)
class CronImport:
    """What came of an import.

    :ivar imported: view -> how many runs of it were written; without those that were there already.
    :ivar warnings: what somebody should look at, such as views that are scheduled twice.
    :ivar more: whether ``limit`` left some for next time.
    """

    imported: dict[str, int]
    warnings: tuple[str, ...] = ()
    more: bool = False


@dataclass(frozen=True)
class _Known:
    """Our side: the views, and where names without a schema lead.

    :ivar views: those that stand or are recorded.
    :ivar ids: their rows in ``mat_view_definitions``, where they have one.
    :ivar owners: who in Airflow refreshes a view too.
    :ivar paths: role -> its search path; of the empty name, that of everybody else.
    """

    database: str
    views: dict[tuple[str, str], ResolvedName]
    ids: dict[ResolvedName, int]
    owners: dict[ResolvedName, str]
    paths: dict[str, str]


@dataclass
class _Reading:
    """How far an import has come.

    :ivar position: every run up to here has been dealt with.
    :ivar open: the first run that had not ended; what comes after it is looked at again next time.
    :ivar clock: the latest time that any run has told of, for those that tell none.
    """

    position: int
    open: int | None = None
    clock: datetime | None = None
    read: int = 0
    imported: dict[str, int] = field(default_factory=dict)


def import_runs(ledger: Ledger, here: Runner, there: Runner, *, limit: int | None = None) -> CronImport:
    """Write the ended runs of jobs that refresh known views into the record, each once.

    :param here: runs work in the database of the views and of the record.
    :param there: runs work in the database of pg_cron's tables.
    :param limit: how many of pg_cron's rows to read at the most; None for all that are new.
    :raises UnsupportedServer: when there is no pg_cron that records its runs.
    :raises MissingPrivilege: when the role may not read its tables or write ours; the hint is the GRANT.
    """
    known = here(explained(ledger.tracking_schema, _known(ledger)))
    position, since = here(explained(ledger.tracking_schema, _position(ledger)))
    theirs = there(read_tables(known.database, position, since))
    warnings = tuple(_warnings(known, theirs))
    for warning in warnings:
        here(_tell(warning))
    reading = _Reading(0 if theirs.anew else position)
    while reading.position < theirs.last and (limit is None or reading.read < limit):
        size = BATCH if limit is None else min(BATCH, limit - reading.read)
        rows = there(read_runs(known.database, theirs, reading.position, size))
        here(explained(ledger.tracking_schema, _write(ledger, known, theirs, reading, rows)))
        reading.read += len(rows)
        reading.position = rows[-1]["runid"] if len(rows) == size else theirs.last
    reached = reading.position if reading.open is None else min(reading.position, reading.open - 1)
    here(explained(ledger.tracking_schema, _reached(ledger, reached)))
    return CronImport(reading.imported, warnings, more=reading.position < theirs.last)


def _tell(warning: str) -> Work[None]:
    yield Note(warning, warning=True)


def _known(ledger: Ledger) -> Work[_Known]:
    yield from ensure_schema(ledger.tracking_schema)
    rows = yield from fetch_all(
        sql.SQL(
            """
            SELECT d.id, coalesce(d.schema_name, m.schema) AS schema, coalesce(d.view_name, m.name) AS name,
                   coalesce(d.name, m.display) AS display, d.managed AND d.declaration <> '{{}}' AS declared
            FROM (SELECT n.nspname::text AS schema, c.relname::text AS name,
                         CASE WHEN n.nspname <> 'public' THEN quote_ident(n.nspname) || '.' ELSE '' END
                         || quote_ident(c.relname) AS display
                  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                  WHERE c.relkind = 'm') m
            FULL JOIN {} d ON d.schema_name = m.schema AND d.view_name = m.name
            """
        ).format(ledger.table("mat_view_definitions")),
        (),
        Session.RECORD,
    )
    names = {(row["schema"], row["name"]): ResolvedName(row["schema"], row["name"], row["display"]) for row in rows}
    ids = {names[row["schema"], row["name"]]: row["id"] for row in rows if row["id"] is not None}
    owners = {names[row["schema"], row["name"]]: "where it is declared" for row in rows if row["declared"]}
    owners |= yield from _refreshed_by_airflow(ledger, {definition: name for name, definition in ids.items()})
    database, paths = yield from _search_paths()
    return _Known(database, names, ids, owners, paths)


def _refreshed_by_airflow(ledger: Ledger, names: Mapping[int, ResolvedName]) -> Work[dict[ResolvedName, str]]:
    rows = yield from fetch_all(
        sql.SQL(
            """
            SELECT d.id, r.dag_id, r.task_id FROM {} d CROSS JOIN LATERAL (
                SELECT meta->>'dag_id' AS dag_id, meta->>'task_id' AS task_id FROM {}
                WHERE mat_view_definition_id = d.id AND operation = %s AND meta->>'dag_id' IS NOT NULL
                AND created_at > clock_timestamp() - %s * interval '1 day'
                ORDER BY created_at DESC, id DESC LIMIT 1) r
            """
        ).format(ledger.table("mat_view_definitions"), ledger.table("mat_view_runs")),
        (Operation.REFRESH, _AIRFLOW_DAYS),
        Session.RECORD,
    )
    return {names[row["id"]]: f"DAG {row['dag_id']}, task {row['task_id']}" for row in rows if row["id"] in names}


def _search_paths() -> Work[tuple[str, dict[str, str]]]:
    """Return the database's name, and role -> search path, as a new connection of that role has it."""
    rows = yield from fetch_all(
        sql.SQL(
            """
            SELECT current_database()::text AS database, '' AS role, 0 AS weight, s.reset_val AS path
            FROM pg_catalog.pg_settings s WHERE s.name = 'search_path'
            AND s.source IN ('default', 'configuration file')
            UNION ALL
            SELECT current_database()::text, coalesce(r.rolname::text, ''),
                   CASE WHEN s.setrole <> 0 THEN 2 ELSE 0 END + CASE WHEN s.setdatabase <> 0 THEN 1 ELSE 0 END,
                   substr(c.setting, length('search_path=') + 1)
            FROM pg_catalog.pg_db_role_setting s LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole,
                 LATERAL unnest(s.setconfig) AS c (setting)
            WHERE c.setting LIKE 'search\\_path=%'
            AND s.setdatabase IN (0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()))
            UNION ALL SELECT current_database()::text, '', -1, {}
            ORDER BY weight
            """
        ).format(sql.Literal(_DEFAULT_PATH)),
        session=Session.RECORD,
    )
    return rows[0]["database"], {row["role"]: row["path"] for row in rows}


def _position(ledger: Ledger) -> Work[tuple[int, datetime | None]]:
    """Return up to which run this role has dealt with them, and when it did."""
    row = yield from fetch_one(
        sql.SQL("SELECT runid, updated_at FROM {} WHERE role = current_user").format(
            ledger.table("mat_view_cron_imports")
        ),
        (),
        Session.RECORD,
    )
    return (0, None) if row is None else (row["runid"], row["updated_at"])


def _reached(ledger: Ledger, runid: int) -> Work[None]:
    yield from fetch_all(
        sql.SQL(
            "INSERT INTO {} (role, runid) VALUES (current_user, %s) "
            "ON CONFLICT (role) DO UPDATE SET runid = excluded.runid, updated_at = clock_timestamp()"
        ).format(ledger.table("mat_view_cron_imports")),
        (runid,),
        Session.RECORD,
    )


def _write(
    ledger: Ledger, known: _Known, theirs: CronTables, reading: _Reading, rows: Sequence[Mapping[str, Any]]
) -> Work[None]:
    commands = {row["command"]: read_command(row["command"]) for row in rows}
    written: list[dict[str, Any]] = []
    for row in rows:
        reading.clock = row["end_time"] or row["start_time"] or reading.clock
        command = commands[row["command"]]
        views = _views(command, row["role"], known)
        if not views or command.own_transactions:
            continue
        if row["ended"] is False and reading.open is None:
            reading.open = row["runid"]
        if row["ended"]:
            for view, refreshed in views.items():
                definition = yield from _definition(ledger, known, view)
                timed = theirs.tells_time and command.alone
                run = _run(row, reading.clock or datetime.now(UTC), view, refreshed, timed=timed)
                written.append({"mat_view_definition_id": definition, **ledger.clean(run)})
    names = {definition: view.display for view, definition in known.ids.items()}
    for definition in (yield from _insert(ledger, written)):
        reading.imported[names[definition]] = reading.imported.get(names[definition], 0) + 1


def _definition(ledger: Ledger, known: _Known, view: ResolvedName) -> Work[int]:
    if view not in known.ids:
        query = yield from catalog.query_of(view)
        known.ids[view] = (yield from ledger.adopt(view, None, query)).id
    return known.ids[view]


def _run(
    row: Mapping[str, Any], clock: datetime, view: ResolvedName, refreshed: Refreshed, *, timed: bool
) -> dict[str, Any]:
    """Return a row of ``mat_view_runs`` as plain data.

    :param clock: what stands for the time of a run that never began.
    :param timed: whether the time that the command took is the time that the refresh took.
    """
    succeeded = row["status"] == "succeeded"
    start, end = row["start_time"], row["end_time"]
    milliseconds = round((end - start).total_seconds() * 1000) if timed and start and end else -1
    identity = [str(row["runid"]), "" if start is None else start.astimezone(UTC).isoformat(), view.ddl]
    return {
        "status": int(RunStatus.SUCCESS if succeeded else RunStatus.FAILED),
        "operation": int(Operation.REFRESH),
        "started_at": None if start is None else start.isoformat(),
        "finished_at": (end or start or clock).isoformat(),
        "duration_ms": milliseconds if 0 <= milliseconds <= _LONGEST_MS else None,
        "error": None if succeeded else _error(row["message"]),
        "meta": {
            "imported_from": "pg_cron",
            "strategy": "concurrent" if refreshed.concurrently else "regular",
            "row_count_before": None,
            "row_count_after": None,
            "pg_cron": {
                "jobid": row["jobid"],
                "runid": row["runid"],
                "jobname": row["name"],
                "username": row["role"],
                "database": row["database"],
                "identity": " ".join(identity),
            },
        },
        "created_at": (start or end or clock).isoformat(),
    }


def _error(message: str | None) -> dict[str, Any]:
    lines = [line for line in (message or "").splitlines() if not _EXCERPT.match(line)]
    return {
        "class": "PgCronFailure",
        "message": "\n".join(lines).strip() or "pg_cron does not say why it failed.",
        "sqlstate": None,
        "hint": None,
        "backtrace": [],
    }


def _insert(ledger: Ledger, runs: Sequence[Mapping[str, Any]]) -> Work[list[int]]:
    """Write runs that are not there yet; return of each that was written the definition."""
    if not runs:
        return []
    rows = yield from fetch_all(
        sql.SQL(
            """
            INSERT INTO {} (mat_view_definition_id, status, operation, started_at, finished_at, duration_ms, error,
                            meta, created_at, updated_at)
            SELECT mat_view_definition_id, status, operation, started_at, finished_at, duration_ms, error, meta,
                   created_at, clock_timestamp()
            FROM jsonb_to_recordset(%s) AS r (
                mat_view_definition_id bigint, status integer, operation integer, started_at timestamptz,
                finished_at timestamptz, duration_ms integer, error jsonb, meta jsonb, created_at timestamptz)
            ON CONFLICT DO NOTHING RETURNING mat_view_definition_id
            """
        ).format(ledger.table("mat_view_runs")),
        (Jsonb(list(runs)),),
        Session.RECORD,
    )
    return [row["mat_view_definition_id"] for row in rows]


def _views(command: CronCommand, role: str, known: _Known) -> dict[ResolvedName, Refreshed]:
    """Return the known views that a command refreshes when a role gives it."""
    found = ((_resolved(each, command, role, known), each) for each in command.refreshed)
    return {view: each for view, each in found if view is not None}


def _resolved(refreshed: Refreshed, command: CronCommand, role: str, known: _Known) -> ResolvedName | None:
    name = refreshed.view
    if refreshed.database is not None and refreshed.database != known.database:
        return None
    if name.schema is not None:
        return known.views.get((name.schema, name.name))
    if command.sets_path:
        return None
    path = known.paths.get(role, known.paths[""])
    return next(
        (known.views[each, name.name] for each in _schemas(path, role) if (each, name.name) in known.views), None
    )


def _schemas(path: str, role: str) -> Iterator[str]:
    for quoted, plain in _PATH_PART.findall(path):
        schema = quoted.replace('""', '"') if quoted else plain.lower()
        yield role if schema == "$user" else schema


def _warnings(known: _Known, theirs: CronTables) -> Iterator[str]:
    jobs: dict[ResolvedName, list[CronJob]] = {}
    for job in theirs.jobs:
        yield from _unclear(job, known)
        for view in _views(job.command, job.role, known):
            jobs.setdefault(view, []).append(job)
    where = f"in database {quote(theirs.database)}"
    for view, its_jobs in jobs.items():
        for job in its_jobs if view in known.owners else ():
            yield (
                f"{view.display} is refreshed twice: by {job}, and by Airflow ({known.owners[view]}). "
                f"To leave it to Airflow, run {where}: SELECT cron.unschedule({job.id});"
            )
        if len(its_jobs) > 1:
            ends = " or ".join(f"SELECT cron.unschedule({job.id});" for job in its_jobs)
            yield (
                f"{view.display} is refreshed by {len(its_jobs)} jobs: {' and '.join(map(str, its_jobs))}. "
                f"To leave it to one, run {where}: {ends}"
            )


def _unclear(job: CronJob, known: _Known) -> Iterator[str]:
    names = [each.view for each in job.command.refreshed]
    if job.command.own_transactions and _views(job.command, job.role, known):
        yield (
            f"Runs of {job} are not imported: its command ends transactions itself, so that how it ended does not "
            "tell whether a refresh was committed. Leave BEGIN, COMMIT and ROLLBACK out of it."
        )
    unnamed = [name for name in names if name.schema is None] if job.command.sets_path else []
    if any(name.name == view for name in unnamed for _, view in known.views):
        yield (
            f"Runs of {job} are not imported for {', '.join(map(str, unnamed))}: its command changes the search path, "
            "so that which view that is cannot be told. Write the name with its schema."
        )
