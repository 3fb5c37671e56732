"""Builds a view beside the one that stands, and puts it in its place in one short cut.

Readers go on until then, and dependents are pointed at the new one; all of it happens in one
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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import psycopg
from psycopg import sql

from airflow_provider_matviews.exceptions import DependentsExist, StrategyRefused
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import catalog, row_counts
from airflow_provider_matviews.services.catalog import ResolvedName, ServerFacts, ViewFacts
from airflow_provider_matviews.services.dependents import (
    Dependent,
    blocking_dependents,
    bound_by_position,
    lock_dependents,
    read_dependents,
    repoint,
    set_deadline,
)
from airflow_provider_matviews.services.instructions import Command, Note, Session, Work, fetch_one
from airflow_provider_matviews.services.locking import Patience, politely
from airflow_provider_matviews.services.picture import Picture, restore_settings, speak_plainly, take_picture
from airflow_provider_matviews.services.plan_steps import Lock
from airflow_provider_matviews.services.rebuild import Beside, build, build_indexes, take_names
from airflow_provider_matviews.services.response import Report
from airflow_provider_matviews.services.row_counts import Outcome

#: How often a view that others keep changing is built anew before giving up.
_ATTEMPTS = 3
#: How often a cut is tried again after meeting somebody else's change of the same rows of the catalog.
COLLISIONS = 20


class Changed(Exception):
    """The live view is not what was worked from; carries what differs."""

    def __init__(self, what: Sequence[str]) -> None:
        super().__init__(what)
        self.what = what


@dataclass(frozen=True)
class Replacement:
    """A view that is to be replaced by another one.

    :ivar view: the name that the new one has in the end.
    :ivar beside: its names until then; ``beside.view`` is the name that the standing one has. What is built on that is
        defined again under it, and follows the new one when it is renamed.
    :ivar standing: what it was when the work began.
    :ivar picture: what the new one is to be.
    :ivar query: its query, with every name qualified.
    :ivar fill: whether it gets its rows.
    :ivar analyze: whether the planner's statistics are made before the cut.
    :ivar count: whether its rows are counted by reading them where the server does not count.
    :ivar rehearse: whether the cut is tried once on the empty new view: what is built on it may not take to it.
    """

    view: ResolvedName
    beside: Beside
    facts: ViewFacts
    standing: Picture
    picture: Picture
    query: str
    server: ServerFacts
    patience: Patience
    report: Report
    fill: bool = True
    analyze: bool = True
    count: bool = False
    rehearse: bool = False
    way_out: str = "use refresh_strategy='concurrent' or 'regular' from now on, or 'auto', which sees it."


def while_unchanged(view: ResolvedName, report: Report, attempt: Callable[[], Work[None]], hint: str) -> Work[int]:
    """Do something that works from a picture of the view, again from the beginning where others changed it meanwhile.

    :param hint: what to do where they change it all the time.
    :returns: how often it was done.
    :raises StrategyRefused: when it was changed every time.
    """
    mark = report.so_far()
    for number in range(1, _ATTEMPTS + 1):
        yield Command(sql.SQL("SAVEPOINT swap"))
        try:
            yield from attempt()
        except Changed as changed:
            yield Command(sql.SQL("ROLLBACK TO SAVEPOINT swap"))
            what = ", ".join(changed.what)
            if number == _ATTEMPTS:
                raise StrategyRefused(
                    f"{view.display} was changed ({what}) while it was being rebuilt, {_ATTEMPTS} times in a row.",
                    hint=hint,
                ) from None
            yield Note(f"{view.display} was changed meanwhile ({what}): building it again, with that.", True)
            report.forget_since(mark)
            continue
        yield Command(sql.SQL("RELEASE SAVEPOINT swap"))
        return number
    raise AssertionError


def replace_view(job: Replacement) -> Work[Outcome | None]:
    """Build the new view and put it in the old one's place.

    :returns: what the new one is; None in a dry run.
    :raises Changed: when the old one is no longer what it was.
    :raises DependentsExist: when something that is built on it does not take to the new one.
    :raises psycopg.errors.LockNotAvailable: when the cut's locks are not had within ``max_wait``.
    """
    report, beside = job.report, job.beside
    settings = yield from speak_plainly()
    yield from build(beside, job.picture, job.query, job.server, report)
    yield from restore_settings(settings)
    if job.rehearse and not report.dry_run:
        yield from _rehearse(job)
    if report.dry_run:
        outcome = None
        yield from _fill(job)
    else:
        built = yield from catalog.require_view(beside.new)
        yield from _fill(job)
        outcome = yield from row_counts.outcome(built, job.server)
        if outcome.inserted is None and job.count:
            # Before the cut: it reads every row.
            outcome = replace(outcome, inserted=(yield from row_counts.counted(beside.new)))
    # Undone at once: reading their definitions locks whatever they read, and would until COMMIT.
    dependents = yield from peek(job.facts.oid)
    if report.dry_run:
        yield from _tell_cut(job, dependents)
        return None
    yield from _flush_wal()
    # Most changes show here already, without a lock; and it warms that connection's caches for the time under it.
    yield from require_unchanged(job.facts.oid, job.standing)
    yield from _cut_politely(job, dependents)
    return outcome


def _fill(job: Replacement) -> Work[None]:
    report, beside = job.report, job.beside
    if job.fill:
        yield from report.run("fill", Command(sql.SQL("REFRESH MATERIALIZED VIEW {}").format(beside.new.identifier)))
    yield from build_indexes(beside, job.picture, report)
    if job.fill and job.analyze:
        # Before the cut, so that no reader ever meets it without statistics.
        yield from report.run("analyze", Command(sql.SQL("ANALYZE {}").format(beside.new.identifier)))


def _cut_politely(job: Replacement, dependents: Sequence[Dependent], *, rehearsal: bool = False) -> Work[None]:
    relations = [each.relation for each in dependents if each.relation is not None]
    mark = job.report.so_far()
    try:
        yield from politely(
            job.beside.view, job.patience, lambda: _cut(job, mark, rehearsal=rehearsal), relations, COLLISIONS
        )
    except psycopg.errors.UndefinedTable as error:
        # It has been renamed or dropped.
        raise Changed([str(error.diag.message_primary)]) from error
    except psycopg.errors.InternalError_ as error:
        # "tuple concurrently updated", "could not open relation with OID ...": others changed or dropped it just now.
        raise Changed([str(error.diag.message_primary)]) from error


def _rehearse(job: Replacement) -> Work[None]:
    """Try the cut on the empty new view, and undo it, so that what speaks against it shows before the query runs."""
    dependents = yield from peek(job.facts.oid)
    if not dependents:
        return
    mark = job.report.so_far()
    yield Command(sql.SQL("SAVEPOINT rehearsal"))
    try:
        yield from _cut_politely(job, dependents, rehearsal=True)
    except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled, psycopg.OperationalError):
        raise
    except (psycopg.ProgrammingError, psycopg.NotSupportedError, psycopg.DataError, psycopg.IntegrityError) as error:
        described = [each.description for each in dependents]
        reason = (error.diag.message_primary or str(error)).splitlines()[0]
        raise DependentsExist(
            f"{job.beside.view.display} cannot be replaced as it is declared: what is built on it "
            f"({', '.join(described)}) does not take to the new one: {reason}.",
            dependents=described,
            hint="keep what they use in the query, or change them first (or drop them, and make them again after).",
        ) from error
    # Lets go of the locks that it took.
    yield Command(sql.SQL("ROLLBACK TO SAVEPOINT rehearsal"))
    yield Command(sql.SQL("RELEASE SAVEPOINT rehearsal"))
    job.report.forget_since(mark)


def obstacles(facts: ViewFacts, server: ServerFacts, mended: Collection[str] = ()) -> Work[list[str]]:
    """Return why a view cannot be built anew beside itself, each a clause for a person; an empty list when it can.

    :param mended: names of indexes that may be INVALID, since the new view gets others in their place or none.
    """
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
                         WHERE a.grantor <> c.relowner AND NOT pg_has_role(a.grantor, {become})) AS grantors,
                   pg_get_userbyid(c.relowner) <> current_user AND NOT pg_has_role(c.relowner, {become}) AS not_owner,
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
        ).format(
            # Older servers refuse the word even in a branch not taken, when it is a constant.
            become=sql.SQL(
                "CASE WHEN current_setting('server_version_num')::integer >= 160000 THEN 'SET' ELSE 'MEMBER' END"
            )
        ),
        (facts.oid,),
    )
    assert rows is not None
    if facts.can_own and rows["not_owner"]:
        found.append(f"the role {server.role} may not SET ROLE to its owner (GRANT ... WITH SET TRUE)")
    schema = sql.Identifier(rows["schema"]).as_string(None)
    for may, role in ((rows["role_may"], server.role), (rows["owner_may"], rows["owner"])):
        if not may:
            found.append(f"the role {role} lacks CREATE on the schema {schema}, where the new one is built")
    if invalid := [name for name in rows["invalid"] if name not in mended]:
        found.append(
            f"its index {', '.join(invalid)} is INVALID, which cannot be built on purpose "
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


def peek(oid: int) -> Work[list[Dependent]]:
    """Return what will be locked with the view and pointed at the new one, without keeping it locked."""
    yield Command(sql.SQL("SAVEPOINT peek"))
    dependents: list[Dependent] = []
    try:
        yield from speak_plainly()
        dependents = yield from read_dependents(oid)
    except (psycopg.errors.InternalError_, psycopg.errors.LockNotAvailable):
        # Another swap is cutting something that a dependent reads; it only costs names in a log.
        dependents = []
    yield Command(sql.SQL("ROLLBACK TO SAVEPOINT peek"))
    yield Command(sql.SQL("RELEASE SAVEPOINT peek"))
    return dependents


def _cut(job: Replacement, mark: int, *, rehearsal: bool) -> Work[None]:
    facts, report, beside = job.facts, job.report, job.beside
    report.forget_since(mark)
    settings = yield from speak_plainly()
    seconds = yield from time_to_lock()
    deadline = time.monotonic() + seconds
    yield from lock_dependents((yield from read_dependents(facts.oid)), report, deadline)
    yield from set_deadline(deadline)
    # Changes nothing, and takes the lock that the cut needs, while the view still has its name.
    yield from report.run("lock", locking(job.beside.view, job.standing.owner), lock=Lock.ACCESS_EXCLUSIVE)
    if blocking := (yield from blocking_dependents(facts.oid)):
        raise StrategyRefused(
            f"{beside.view.display} was not swapped: while it was being rebuilt, {', '.join(blocking)} was built on "
            "it.",
            hint=job.way_out,
        )
    # Read again now that nobody can change them or add one.
    dependents = yield from read_dependents(facts.oid)
    require_same_columns_read(job.beside.view, dependents, job.standing, job.picture)
    for command in trading_places(beside, job.standing):
        yield from report.run("cut", command)
    yield from repoint(dependents, report)
    yield from report.run("cut", dropping(beside))
    if rehearsal:
        return
    yield from take_names(beside, job.picture, report)
    for command in (*joining(beside, job.picture), *renaming(beside.view, job.view)):
        yield from report.run("cut", command)
    yield from require_unchanged(facts.oid, job.standing)
    yield from restore_settings(settings)


def require_same_columns_read(
    view: ResolvedName, dependents: Sequence[Dependent], standing: Picture, picture: Picture
) -> None:
    """Refuse where what is built on the view would go on, and read other columns than before.

    :raises DependentsExist: naming what would.
    """
    before, after = ([column.name for column in each.columns] for each in (standing, picture))
    if bound := bound_by_position(dependents, ViewName(view.name, view.schema), before, after):
        raise DependentsExist(
            f"{view.display} cannot have its columns in another order or number: {', '.join(bound)} "
            f"name{'s' if len(bound) == 1 else ''} them by position (a list of column aliases), and would read others.",
            dependents=bound,
            hint="leave the columns that there are in their order and put new ones last; or define what is named again "
            "without a list of column aliases (of a join: without any).",
        )


def _tell_cut(job: Replacement, dependents: Sequence[Dependent]) -> Work[None]:
    """Say what the cut would do, and do nothing."""
    report, strongest = job.report, Lock.ACCESS_EXCLUSIVE
    yield from lock_dependents(dependents, report)
    yield from report.run("lock", locking(job.beside.view, job.standing.owner), lock=strongest)
    for command in trading_places(job.beside, job.standing):
        yield from report.run("cut", command, lock=strongest)
    yield from repoint(dependents, report)
    yield from report.run("cut", dropping(job.beside), lock=strongest)
    yield from take_names(job.beside, job.picture, report)
    for command in (*joining(job.beside, job.picture), *renaming(job.beside.view, job.view)):
        yield from report.run("cut", command, lock=strongest)


def locking(view: ResolvedName, owner: str) -> Command:
    """Return the one command that takes ACCESS EXCLUSIVE on a materialized view and changes nothing."""
    return Command(sql.SQL("ALTER MATERIALIZED VIEW {} OWNER TO {}").format(view.identifier, sql.Identifier(owner)))


def renaming(origin: ResolvedName, view: ResolvedName) -> list[Command]:
    """Return what gives a view its new name, and nothing where it has that name."""
    commands: list[Command] = []
    schema, name = origin.schema, origin.name

    def rename(to: str) -> None:
        nonlocal name
        statement = sql.SQL("ALTER MATERIALIZED VIEW {} RENAME TO {}")
        commands.append(Command(statement.format(sql.Identifier(schema, name), sql.Identifier(to))))
        name = to

    if schema != view.schema:
        if name != view.name:
            # Neither has the new name to be free in the old schema, nor the old one in the new.
            rename(Beside.of(view).new.name)
        move = sql.SQL("ALTER MATERIALIZED VIEW {} SET SCHEMA {}")
        commands.append(Command(move.format(sql.Identifier(schema, name), sql.Identifier(view.schema))))
        schema = view.schema
    if name != view.name:
        rename(view.name)
    return commands


def trading_places(beside: Beside, standing: Picture) -> list[Command]:
    """Return what gives the new view the name of the one that stands."""
    rename = sql.SQL("ALTER MATERIALIZED VIEW {} RENAME TO {}")
    return [
        *(
            Command(_membership(extension, "DROP", beside.view))
            for extension, kind in standing.extensions
            if kind == "e"
        ),
        Command(rename.format(beside.view.identifier, sql.Identifier(beside.old.name))),
        Command(rename.format(beside.new.identifier, sql.Identifier(beside.view.name))),
    ]


def dropping(beside: Beside) -> Command:
    """Return what drops the old view. RESTRICT: what was not re-pointed is an error, never a loss."""
    return Command(sql.SQL("DROP MATERIALIZED VIEW {} RESTRICT").format(beside.old.identifier))


def joining(beside: Beside, picture: Picture) -> list[Command]:
    """Return what makes the new view a member of the extensions that the old one was one of."""
    return [
        Command(_membership(extension, "ADD", beside.view)) for extension, kind in picture.extensions if kind == "e"
    ]


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


def time_to_lock() -> Work[float]:
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


def require_unchanged(oid: int, picture: Picture) -> Work[None]:
    """See from outside the transaction whether a view is still what its picture shows.

    :raises Changed: when it is not.
    """
    now = yield from take_picture(oid, Session.RECORD, definitions=False)
    if now is None:
        raise Changed(["it was dropped"])
    if changed := picture.without_definitions().differences(now):
        raise Changed(changed)
