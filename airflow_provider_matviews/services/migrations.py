"""The tables that hold the record, and how they come to be.

Every migration only adds, so that an older version of this package goes on working beside a newer one while
workers are being upgraded.
"""

from __future__ import annotations

from typing import TypeVar

import psycopg
from psycopg import sql

from airflow_provider_matviews.exceptions import MissingPrivilege
from airflow_provider_matviews.services.instructions import Command, Note, Session, Work, fetch_one

#: version -> the statements that lead to it from the one before. ``{schema}`` is the tracking schema.
MIGRATIONS: dict[int, tuple[sql.SQL, ...]] = {
    1: (
        sql.SQL("""
CREATE TABLE {schema}.mat_view_definitions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    schema_name text NOT NULL,
    view_name text NOT NULL,
    sql text,
    refresh_strategy integer NOT NULL DEFAULT 3 CHECK (refresh_strategy BETWEEN 0 AND 3),
    unique_index_columns jsonb NOT NULL DEFAULT '[]',
    managed boolean NOT NULL DEFAULT true,
    declaration jsonb NOT NULL DEFAULT '{{}}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (schema_name, view_name)
)"""),
        sql.SQL("""
CREATE TABLE {schema}.mat_view_runs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    mat_view_definition_id bigint NOT NULL REFERENCES {schema}.mat_view_definitions (id),
    status integer NOT NULL DEFAULT 1 CHECK (status BETWEEN 1 AND 4),
    operation integer NOT NULL CHECK (operation BETWEEN 0 AND 2),
    started_at timestamptz,
    finished_at timestamptz,
    duration_ms integer,
    error jsonb,
    meta jsonb NOT NULL DEFAULT '{{}}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK ((status = 1) = (finished_at IS NULL)),
    CHECK ((status = 3) = (error IS NOT NULL))
)"""),
        sql.SQL(
            "CREATE INDEX index_mat_view_runs_on_mat_view_definition_id "
            "ON {schema}.mat_view_runs (mat_view_definition_id)"
        ),
        sql.SQL(
            "CREATE INDEX index_mat_view_runs_on_definition_and_created_at "
            "ON {schema}.mat_view_runs (mat_view_definition_id, created_at DESC, id DESC)"
        ),
        # Whoever holds a view's lock looks for orphans first: that must not cost more as history grows.
        sql.SQL(
            "CREATE INDEX index_mat_view_runs_running "
            "ON {schema}.mat_view_runs (mat_view_definition_id) WHERE status = 1"
        ),
        sql.SQL("""
CREATE VIEW {schema}.mat_view_run_history AS
SELECT r.id,
       d.name AS view,
       CASE r.operation WHEN 0 THEN 'create' WHEN 1 THEN 'refresh' WHEN 2 THEN 'drop' END AS operation,
       CASE r.status WHEN 1 THEN 'running' WHEN 2 THEN 'success' WHEN 3 THEN 'failed' WHEN 4 THEN 'skipped' END
           AS status,
       r.started_at,
       r.finished_at,
       r.duration_ms,
       r.meta->>'strategy' AS strategy,
       (r.meta->>'row_count_before')::bigint AS row_count_before,
       (r.meta->>'row_count_after')::bigint AS row_count_after,
       r.error->>'class' AS error_class,
       r.error->>'message' AS error_message,
       r.meta->>'dag_id' AS dag_id,
       r.meta->>'task_id' AS task_id,
       r.meta->>'run_id' AS run_id,
       (r.meta->>'map_index')::integer AS map_index,
       (r.meta->>'try_number')::integer AS try_number,
       r.mat_view_definition_id,
       r.meta,
       r.error,
       r.created_at
FROM {schema}.mat_view_runs r
JOIN {schema}.mat_view_definitions d ON d.id = r.mat_view_definition_id"""),
        sql.SQL("COMMENT ON TABLE {schema}.mat_view_definitions IS 'What each materialized view should be.'"),
        sql.SQL(
            "COMMENT ON TABLE {schema}.mat_view_runs IS 'Every operation on a materialized view. "
            "status: 1 running, 2 success, 3 failed, 4 skipped. operation: 0 create, 1 refresh, 2 drop.'"
        ),
    ),
    # What a second copy of a deferred operation looks for; holds nothing of those that were not deferred.
    2: (
        sql.SQL(
            "CREATE INDEX index_mat_view_runs_on_deferral "
            "ON {schema}.mat_view_runs ((meta->>'deferral')) WHERE meta ? 'deferral'"
        ),
    ),
    # What a view's sources looked like before its last refresh.
    3: (sql.SQL("ALTER TABLE {schema}.mat_view_definitions ADD COLUMN source_state jsonb"),),
    # Runs of pg_cron's jobs, each of which is imported once, and how far each role has read them.
    4: (
        sql.SQL(
            "CREATE UNIQUE INDEX index_mat_view_runs_on_pg_cron "
            "ON {schema}.mat_view_runs ((meta->'pg_cron'->>'identity')) WHERE meta ? 'pg_cron'"
        ),
        sql.SQL("""
CREATE TABLE {schema}.mat_view_cron_imports (
    role text PRIMARY KEY,
    runid bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
)"""),
    ),
    # Which transactions changed which tables, as the triggers write it that `install_change_log` puts there. Its key
    # says each once, is what is looked up, and lets a publication of all tables take the deleting.
    5: (
        sql.SQL("""
CREATE TABLE {schema}.mat_view_changes (
    relation oid NOT NULL,
    transaction_id xid8 NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (relation, transaction_id)
)"""),
        sql.SQL(
            "COMMENT ON TABLE {schema}.mat_view_changes IS 'Which transactions changed the tables that materialized "
            "views read. Written by triggers on those tables, where install_change_log has put them.'"
        ),
    ),
    # For a history of millions of runs (docs/history.md). IF NOT EXISTS: where the table is large already, somebody may
    # have built them CONCURRENTLY before.
    6: (
        # The last so many of a kind of one view: moving averages, ages, what retention keeps.
        sql.SQL(
            "CREATE INDEX IF NOT EXISTS index_mat_view_runs_on_kind ON {schema}.mat_view_runs "
            "(mat_view_definition_id, operation, status, created_at DESC, id DESC) INCLUDE (duration_ms)"
        ),
        # The latest of all views, and all that are older than some age.
        sql.SQL(
            "CREATE INDEX IF NOT EXISTS index_mat_view_runs_on_created_at "
            "ON {schema}.mat_view_runs (created_at DESC, id DESC)"
        ),
        # Failures of the last so many hours.
        sql.SQL(
            "CREATE INDEX IF NOT EXISTS index_mat_view_runs_failed "
            "ON {schema}.mat_view_runs (created_at, mat_view_definition_id) WHERE status = 3"
        ),
        # When nothing had changed, among runs that were skipped for other reasons.
        sql.SQL(
            "CREATE INDEX IF NOT EXISTS index_mat_view_runs_unchanged ON {schema}.mat_view_runs "
            "(mat_view_definition_id, created_at DESC) "
            "WHERE status = 4 AND meta->'response'->>'spared' = 'unchanged'"
        ),
        # By their share of so large a table, dead rows would be left for weeks, and what the visibility map says of new
        # ones as long: index-only scans need it.
        sql.SQL(
            "ALTER TABLE {schema}.mat_view_runs SET (autovacuum_vacuum_scale_factor = 0.02, "
            "autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02)"
        ),
    ),
    # What the last prune has counted, so that the next one need not: one row, and what it is worth no more without.
    7: (
        sql.SQL("""
CREATE TABLE {schema}.mat_view_retention (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    server text NOT NULL,
    filenode bigint NOT NULL,
    deletions bigint NOT NULL,
    counted_at timestamptz NOT NULL,
    definitions bigint[] NOT NULL,
    operations integer[] NOT NULL,
    statuses integer[] NOT NULL,
    runs bigint[] NOT NULL,
    moments timestamptz[] NOT NULL,
    ids bigint[] NOT NULL,
    first_ids bigint[] NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
)"""),
        sql.SQL(
            "COMMENT ON TABLE {schema}.mat_view_retention IS 'How many runs of each kind the last prune left, up to "
            "which one. Believed for a day, while nobody else has deleted any; may be emptied at any time.'"
        ),
    ),
}

LATEST = max(MIGRATIONS)

_T = TypeVar("_T")


def ensure_schema(tracking_schema: str) -> Work[None]:
    """Make the tables of the record, or bring them up to date. Safe when many do so at once.

    :param tracking_schema: the schema that holds them, not quoted.
    :raises MissingPrivilege: when the role may not; the hint is the GRANT.
    """
    version = yield from explained(tracking_schema, _version(tracking_schema))
    if version >= LATEST:
        return
    yield Note(f"Preparing the run tables in schema {tracking_schema} (version {LATEST}).")
    yield from explained(tracking_schema, _migrate(tracking_schema))


def explained(tracking_schema: str, work: Work[_T]) -> Work[_T]:
    """Do something with the run tables; say which GRANT the role lacks where it may not.

    :raises MissingPrivilege: when the role may not; the hint is the GRANT.
    """
    try:
        return (yield from work)
    except psycopg.errors.InsufficientPrivilege as error:
        raise (yield from _explain(tracking_schema, error)) from error


def _version(tracking_schema: str) -> Work[int]:
    try:
        row = yield from fetch_one(
            sql.SQL("SELECT max(version) AS version FROM {}").format(_migrations_table(tracking_schema)),
            session=Session.RECORD,
        )
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return 0
    return int(row["version"] or 0) if row else 0


def _migrate(tracking_schema: str) -> Work[None]:
    schema = sql.Identifier(tracking_schema)
    # Under a stricter isolation level whoever waited below would look at the catalogs as they were before.
    yield Command(sql.SQL("BEGIN ISOLATION LEVEL READ COMMITTED"), Session.RECORD)
    try:
        # Everyone who comes first waits here for the one who came very first. Released by COMMIT.
        yield from fetch_one(
            sql.SQL("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))::text AS locked"),
            (f"airflow_provider_matviews migrations {tracking_schema}",),
            Session.RECORD,
        )
        exists = yield from fetch_one(
            sql.SQL("SELECT 1 AS one FROM pg_catalog.pg_namespace WHERE nspname = %s"),
            (tracking_schema,),
            Session.RECORD,
        )
        if exists is None:
            yield Command(sql.SQL("CREATE SCHEMA {}").format(schema), Session.RECORD)
        table = _migrations_table(tracking_schema)
        # Asked of the catalog: CREATE TABLE IF NOT EXISTS needs the right to create even where it exists.
        stands = yield from fetch_one(
            sql.SQL(
                "SELECT 1 AS one FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n "
                "ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = 'mat_view_migrations'"
            ),
            (tracking_schema,),
            Session.RECORD,
        )
        if stands is None:
            yield Command(
                sql.SQL(
                    "CREATE TABLE {} (version integer PRIMARY KEY, "
                    "applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
                ).format(table),
                Session.RECORD,
            )
        reached = yield from _version(tracking_schema)
        for version, statements in sorted(MIGRATIONS.items()):
            if version <= reached:
                continue
            for statement in statements:
                yield Command(statement.format(schema=schema), Session.RECORD)
            yield Command(
                sql.SQL("INSERT INTO {} (version) VALUES ({})").format(table, sql.Literal(version)),
                Session.RECORD,
            )
        yield Command(sql.SQL("COMMIT"), Session.RECORD)
    except psycopg.Error:
        yield Command(sql.SQL("ROLLBACK"), Session.RECORD, undoing=True)
        raise


def _migrations_table(tracking_schema: str) -> sql.Identifier:
    return sql.Identifier(tracking_schema, "mat_view_migrations")


def _explain(tracking_schema: str, error: psycopg.Error) -> Work[MissingPrivilege]:
    row = yield from fetch_one(
        sql.SQL(
            "SELECT current_user::text AS role, current_database()::text AS database, "
            "EXISTS (SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = %s) AS exists"
        ),
        (tracking_schema,),
        Session.RECORD,
    )
    assert row is not None
    role, database, schema = (
        sql.Identifier(name).as_string(None) for name in (row["role"], row["database"], tracking_schema)
    )
    if row["exists"]:
        return MissingPrivilege(
            f"The role {role} may not use the run tables in schema {schema} of database {database}: "
            f"{error.diag.message_primary}. (To look only, USAGE on the schema and SELECT are enough.)",
            hint=(
                f"as the schema's owner, run: GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}; "
                f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}; "
                "or choose another schema with tracking_schema=..."
            ),
        )
    return MissingPrivilege(
        f"The role {role} may not create the schema {schema} for the run tables in database {database}.",
        hint=(
            f"as the database's owner, run either: GRANT CREATE ON DATABASE {database} TO {role}; "
            f"or: CREATE SCHEMA {schema} AUTHORIZATION {role};"
        ),
    )
