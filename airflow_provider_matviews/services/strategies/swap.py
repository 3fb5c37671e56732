"""``swap``: build the view anew beside the live one, then put it in its place in one short cut.

Readers go on while it builds, and wait only for the cut (about 20 ms, measured). Everything happens in one
transaction, so that whatever ends the process leaves the live view as it was and nothing beside it.

How nothing is lost that others change meanwhile: DDL that locks the view (CREATE INDEX, COMMENT, ALTER) is either
committed before the cut has the view's lock, or waits for it. GRANT takes no lock; it is either committed before
the old view is dropped, or fails, since it changes the catalog rows that DROP has already deleted. So the
picture of the old view is taken once more after it was dropped, from outside the transaction: it shows
everything that anybody committed until then, and where it is not the picture that was built from, all is undone
and built again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import psycopg
from psycopg import sql

from airflow_provider_matviews.definition import RowCountStrategy
from airflow_provider_matviews.exceptions import StrategyRefused
from airflow_provider_matviews.services import catalog, row_counts
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.dependents import (
    blocking_dependents,
    lock_dependents,
    read_dependents,
    repoint,
    set_deadline,
)
from airflow_provider_matviews.services.instructions import Command, Note, Session, Work, fetch_one
from airflow_provider_matviews.services.locking import politely
from airflow_provider_matviews.services.picture import (
    Picture,
    restore_settings,
    speak_plainly,
    take_picture,
)
from airflow_provider_matviews.services.rebuild import Beside, build, build_indexes, take_names
from airflow_provider_matviews.services.strategies.base import Refreshing

#: How often a view that others keep changing is built anew before giving up.
_ATTEMPTS = 3
#: How often the cut is tried again after meeting another one over the same dependents.
_COLLISIONS = 20


class _Changed(Exception):
    """The live view is not what was built from; carries what differs."""

    def __init__(self, what: Sequence[str]) -> None:
        super().__init__(what)
        self.what = what


def refresh(job: Refreshing) -> Work[None]:
    """Build beside, cut over.

    :raises StrategyRefused: when something could not be carried over, or others change the view all the time.
    :raises psycopg.errors.LockNotAvailable: when the cut's locks are not had within ``max_wait``.
    """
    before = yield from row_counts.before_refresh(job.view, job.facts, job.row_counts)
    mark = job.report.so_far()
    for attempt in range(1, _ATTEMPTS + 1):
        yield Command(sql.SQL("SAVEPOINT swap"))
        try:
            after = yield from _swap(job)
        except _Changed as changed:
            yield Command(sql.SQL("ROLLBACK TO SAVEPOINT swap"))
            what = ", ".join(changed.what)
            if attempt == _ATTEMPTS:
                raise StrategyRefused(
                    f"{job.view.display} was changed ({what}) while it was being rebuilt, {_ATTEMPTS} times in a row.",
                    hint="refresh it when nobody alters it, or use refresh_strategy='concurrent' or 'regular'.",
                ) from None
            yield Note(f"{job.view.display} was changed meanwhile ({what}): building it again, with that.", True)
            job.report.forget_since(mark)
            continue
        yield Command(sql.SQL("RELEASE SAVEPOINT swap"))
        job.report.told(strategy="swap", row_count_before=before, row_count_after=after, rebuilds=attempt)
        return


def obstacles(facts: ViewFacts, server: ServerFacts) -> Work[list[str]]:
    """Return why a view cannot be swapped, each a clause for a person; an empty list when it can."""
    found: list[str] = []
    if not facts.can_own:
        found.append(f"the role {server.role} does not own it")
    if blocking := (yield from blocking_dependents(facts.oid)):
        found.append(f"what is built on it cannot be re-pointed: {', '.join(blocking)}")
    rows = yield from fetch_one(
        sql.SQL(
            """
            SELECT n.nspname::text AS schema, pg_get_userbyid(c.relowner)::text AS owner,
                   has_schema_privilege(n.oid, 'CREATE') AS role_may,
                   has_schema_privilege(c.relowner, n.oid, 'CREATE') OR (
                       SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) AS owner_may,
                   ARRAY(SELECT i.relname::text FROM pg_catalog.pg_index x
                         JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
                         WHERE x.indrelid = c.oid AND NOT (x.indisvalid AND x.indisready) ORDER BY 1) AS invalid,
                   ARRAY(SELECT DISTINCT pg_get_userbyid(a.grantor)::text
                         FROM (SELECT c.relacl AS acl UNION ALL
                               SELECT attacl FROM pg_catalog.pg_attribute WHERE attrelid = c.oid) acls,
                              aclexplode(acls.acl) a
                         WHERE a.grantor <> c.relowner AND NOT pg_has_role(a.grantor, 'MEMBER')) AS grantors,
                   ARRAY(SELECT e.extname::text FROM pg_catalog.pg_depend d
                         JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
                         WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
                           AND NOT pg_has_role(e.extowner, 'USAGE')) AS extensions,
                   c.relacl IS NOT NULL AND EXISTS (
                       SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_class'::regclass
                       AND d.objid = c.oid AND d.deptype = 'e') AS member_with_grants,
                   EXISTS (SELECT FROM pg_catalog.pg_type t WHERE t.oid = c.reltype AND (t.typacl IS NOT NULL
                       OR obj_description(t.oid, 'pg_type') IS NOT NULL)) AS type_of_its_own,
                   ARRAY(SELECT pg_get_userbyid(s.stxowner)::text FROM pg_catalog.pg_statistic_ext s
                         WHERE s.stxrelid = c.oid AND NOT (pg_has_role(s.stxowner, 'USAGE')
                         AND has_schema_privilege(s.stxnamespace, 'CREATE'))) AS statistics,
                   c.reltablespace <> 0 AND NOT has_tablespace_privilege(c.reltablespace, 'CREATE') AS tablespace
            FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s
            """
        ),
        (facts.oid,),
    )
    assert rows is not None
    schema = sql.Identifier(rows["schema"]).as_string(None)
    for may, role in ((rows["role_may"], server.role), (rows["owner_may"], rows["owner"])):
        if not may:
            found.append(f"the role {role} lacks CREATE on the schema {schema}, where the new one is built")
    if rows["invalid"]:
        found.append(
            f"its index {', '.join(rows['invalid'])} is INVALID, which cannot be built on purpose "
            "(REINDEX or drop it, unless it is being built just now)"
        )
    if rows["grantors"]:
        found.append(
            f"privileges on it were granted by {', '.join(rows['grantors'])}, whom {server.role} cannot act for"
        )
    if rows["extensions"]:
        found.append(f"it belongs to the extension {', '.join(rows['extensions'])}, which {server.role} does not own")
    if rows["member_with_grants"]:
        found.append("it belongs to an extension and has privileges of its own, which its rebuilding would mix up")
    if rows["type_of_its_own"]:
        found.append("its row type has privileges or a comment of its own")
    if rows["statistics"]:
        found.append("it has extended statistics of another owner, or in a schema where the role lacks CREATE")
    if rows["tablespace"]:
        found.append(f"the role {server.role} lacks CREATE on its tablespace")
    return list(dict.fromkeys(found))


def _swap(job: Refreshing) -> Work[int | None]:
    view, facts = job.view, job.facts
    if reasons := (yield from obstacles(facts, job.server)):
        raise StrategyRefused(
            f"{view.display} cannot be swapped: {'; '.join(reasons)}.",
            hint="use refresh_strategy='auto', which takes another one where swap is not possible, 'concurrent' "
            "or 'regular'.",
        )
    beside = Beside.of(view)
    settings = yield from speak_plainly()
    picture = yield from take_picture(facts.oid)
    query = yield from catalog.query_of(view)
    if picture is None or query is None:
        raise _Changed(["it was dropped"])
    yield from build(beside, picture, query, job.server, job.report)
    yield from restore_settings(settings)
    built = yield from catalog.require_view(beside.new)
    yield from job.report.run("fill", Command(sql.SQL("REFRESH MATERIALIZED VIEW {}").format(beside.new.identifier)))
    yield from build_indexes(beside, picture, job.report)
    if job.analyze is not False:
        # Before the cut, so that no reader ever meets it without statistics.
        yield from job.report.run("analyze", Command(sql.SQL("ANALYZE {}").format(beside.new.identifier)))
    after = yield from _count(job, built)
    # Undone at once: reading their definitions locks whatever they read, and would until COMMIT.
    relations = yield from _peek(facts.oid)
    yield from _flush_wal()
    # Most changes show here already, without a lock; and it warms that connection's caches for the time under it.
    yield from _require_unchanged(facts.oid, picture)
    mark = job.report.so_far()
    try:
        yield from politely(view, job.patience, lambda: _cut(job, beside, picture, mark), relations, _COLLISIONS)
    except psycopg.errors.InternalError_ as error:
        # "tuple concurrently updated", "could not open relation with OID ...": others changed or dropped it just now.
        raise _Changed([str(error.diag.message_primary)]) from error
    return after


def _peek(oid: int) -> Work[list[int]]:
    """Return the OIDs of what will be locked with the view, for naming who is in the way."""
    yield Command(sql.SQL("SAVEPOINT peek"))
    relations: list[int] = []
    try:
        relations = [each.relation for each in (yield from read_dependents(oid)) if each.relation is not None]
    except (psycopg.errors.InternalError_, psycopg.errors.LockNotAvailable):
        # Another swap is cutting something that a dependent reads; it only costs names in a log.
        relations = []
    yield Command(sql.SQL("ROLLBACK TO SAVEPOINT peek"))
    return relations


def _count(job: Refreshing, built: ViewFacts) -> Work[int | None]:
    outcome = yield from row_counts.outcome(built, job.server)
    job.told(outcome, rebuilt=True)
    if job.row_counts is RowCountStrategy.NONE:
        return None
    if outcome.inserted is None and job.row_counts is RowCountStrategy.EXACT:
        return (yield from row_counts.counted(job.view))
    return outcome.estimated if outcome.inserted is None else outcome.inserted


def _cut(job: Refreshing, beside: Beside, picture: Picture, mark: int) -> Work[None]:
    view, facts, report = job.view, job.facts, job.report
    report.forget_since(mark)
    settings = yield from speak_plainly()
    seconds = yield from _time_to_lock()
    deadline = time.monotonic() + seconds
    yield from lock_dependents((yield from read_dependents(facts.oid)), deadline)
    yield from set_deadline(deadline)
    alter = sql.SQL("ALTER MATERIALIZED VIEW {} ")
    # Changes nothing, and takes the lock that the cut needs, while the view still has its name.
    yield from report.run(
        "lock", Command(alter.format(view.identifier) + sql.SQL("OWNER TO {}").format(sql.Identifier(picture.owner)))
    )
    if blocking := (yield from blocking_dependents(facts.oid)):
        raise StrategyRefused(
            f"{view.display} was not swapped: while it was being rebuilt, {', '.join(blocking)} was built on it.",
            hint="use refresh_strategy='concurrent' or 'regular' from now on, or 'auto', which sees it.",
        )
    # Read again now that nobody can change them or add one.
    dependents = yield from read_dependents(facts.oid)
    for extension, kind in picture.extensions:
        if kind == "e":
            yield from report.run("cut", Command(_membership(extension, "DROP", view)))
    yield from report.run(
        "cut", Command(alter.format(view.identifier) + sql.SQL("RENAME TO {}").format(sql.Identifier(beside.old.name)))
    )
    yield from report.run(
        "cut", Command(alter.format(beside.new.identifier) + sql.SQL("RENAME TO {}").format(sql.Identifier(view.name)))
    )
    yield from repoint(dependents, report)
    # RESTRICT: what was not re-pointed is an error, never a loss.
    yield from report.run("cut", Command(sql.SQL("DROP MATERIALIZED VIEW {} RESTRICT").format(beside.old.identifier)))
    yield from take_names(beside, picture, report)
    for extension, kind in picture.extensions:
        if kind == "e":
            yield from report.run("cut", Command(_membership(extension, "ADD", view)))
    yield from _require_unchanged(facts.oid, picture)
    yield from restore_settings(settings)


def _flush_wal() -> Work[None]:
    """Have the WAL of the build written out now, by another transaction's commit.

    Else the COMMIT of the cut would write it, while readers wait (measured: 90 ms instead of 10 after a build of
    60 MB of WAL).
    """
    emit = sql.SQL("SELECT pg_logical_emit_message(true, 'airflow_provider_matviews', '')::text AS position")
    try:
        yield from fetch_one(emit, session=Session.RECORD)
    except psycopg.errors.InsufficientPrivilege:
        yield Note("The role may not call pg_logical_emit_message(): the cut may hold up readers a little longer.")


def _membership(extension: str, verb: str, view: ResolvedName) -> sql.Composable:
    return sql.SQL("ALTER EXTENSION {} {} MATERIALIZED VIEW {}").format(
        sql.Identifier(extension), sql.SQL("ADD" if verb == "ADD" else "DROP"), view.identifier
    )


def _time_to_lock() -> Work[float]:
    """Return the seconds that all locks of one attempt together may take.

    Below half of the deadlock timeout: of a reader and the cut that wait for each other, the cut gives way. Unless
    this attempt is to outlast an autovacuum worker, see :func:`politely`.
    """
    row = yield from fetch_one(
        sql.SQL(
            "SELECT l.setting::integer AS patience, d.setting::integer AS deadlock FROM pg_catalog.pg_settings l, "
            "pg_catalog.pg_settings d WHERE l.name = 'lock_timeout' AND d.name = 'deadlock_timeout'"
        )
    )
    assert row is not None
    patience, deadlock = row["patience"], row["deadlock"]
    return float(patience if patience > deadlock else max(1, min(patience, deadlock // 2))) / 1000


def _require_unchanged(oid: int, picture: Picture) -> Work[None]:
    now = yield from take_picture(oid, Session.RECORD, definitions=False)
    if now is None:
        raise _Changed(["it was dropped"])
    if changed := picture.without_definitions().differences(now):
        raise _Changed(changed)
