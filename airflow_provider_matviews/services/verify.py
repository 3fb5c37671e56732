"""Does a view equal its query? Compared in one snapshot, with nothing changed and nothing recorded.

A difference is no news where sources have changed since the last refresh. Where nothing has (``staleness.py``, before
the comparison, and again when even the latest counters must have arrived), and the result does not move by itself, it
is damage.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import psycopg
from psycopg import sql

from airflow_provider_matviews.exceptions import MissingPrivilege, UnsupportedServer
from airflow_provider_matviews.services import staleness
from airflow_provider_matviews.services.advice import advise
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.comparison import Differences, one_line, read_differences
from airflow_provider_matviews.services.graph import WALK
from airflow_provider_matviews.services.instructions import (
    Command,
    Note,
    Pause,
    Session,
    Work,
    fetch_all,
    fetch_one,
)
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.picture import restore_settings
from airflow_provider_matviews.services.plan_steps import Plan, StepKind
from airflow_provider_matviews.services.run import Subject, Terms
from airflow_provider_matviews.services.standstill import OpenedView, Opening, roll_back
from airflow_provider_matviews.services.verification import Scope, Verdict, Verification, VerifyMode

#: Seconds after which a session's counters have reached everybody, once it rests (PGSTAT_IDLE_INTERVAL is 10 s).
SETTLING = 11.0
#: A view up to this size is sampled row by row, which reads all of it; a larger one by pages.
_SMALL = 1024**3

#: Under these a key's text is read back as the same value.
_FAITHFUL = {
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",
}

# Types of which two values can be equal and be shown differently: 1.0 and 1.00, 0 and -0, '1 mon' and '30 days', 'a'
# and 'a ' of char. Of arrays, ranges and rows the stored query does not say of what. (time with time zone is not among
# them: 12:00+00 and 13:00+01 are not equal, measured.)
_MANY_FACED = sql.SQL(
    "'{numeric,float4,float8,interval,bpchar,jsonb,anyarray,anyelement,record,anyrange,anymultirange}'::regtype[]::oid[]"
)
# A name's spaces and parentheses are escaped in a stored query's text, so that none can pass for one of these.
_CLAUSES = sql.SQL("':(?:groupClause|distinctClause|groupClauses|partitionClause|aggdistinct) \\(([^()]*)\\)'")
# What may give another result on the very same rows, by the order in which they come: by function and operator, as the
# stored query has them.
_LOOSE = sql.SQL(
    """
    WITH RECURSIVE roots AS (SELECT {oid}::oid AS oid), {walk}, texts AS (
        SELECT w.ev_action::text AS tree FROM reads r
        JOIN pg_catalog.pg_class c ON c.oid = r.object AND (c.relkind = 'v' OR c.oid = r.root)
        JOIN pg_catalog.pg_rewrite w ON w.ev_class = r.object AND w.rulename = '_RETURN'
        WHERE r.class = 'pg_class'::regclass
        UNION ALL
        SELECT p.prosqlbody::text FROM reads r JOIN pg_catalog.pg_proc p ON p.oid = r.object
        WHERE r.class = 'pg_proc'::regclass AND p.prosqlbody IS NOT NULL
    )
    SELECT 'has LIMIT or OFFSET' AS reason FROM texts WHERE tree ~ ':limit(Count|Offset) \\{{'
    UNION
    SELECT 'has DISTINCT ON' FROM texts WHERE tree ~ ':hasDistinctOn true'
    UNION
    SELECT 'calls ' || p.oid::regprocedure
    FROM texts CROSS JOIN LATERAL regexp_matches(tree, ':(aggfnoid|winfnoid) ([1-9][0-9]*)', 'g') m
    JOIN pg_catalog.pg_proc p ON p.oid = m[2]::oid
    WHERE p.oid >= 16384
       OR p.proname ~ '^(array_agg|string_agg|xmlagg|any_value|mode|jsonb?_(object_)?agg(_unique)?(_strict)?)$'
       OR m[1] = 'winfnoid' AND p.proname !~ '^(rank|dense_rank|percent_rank|cume_dist)$'
       OR p.prokind = 'a' AND p.proname <> 'regr_count'
          AND p.proargtypes::oid[] && '{{float4,float8}}'::regtype[]::oid[]
       OR p.proname ~ '^(min|max|range_agg|range_intersect_agg)$' AND p.proargtypes::oid[] && {many_faced}
    UNION
    SELECT 'has GROUP BY, DISTINCT, PARTITION BY or a set operation over ' || format_type(o.oprleft, NULL)
           || ', equal values of which may be shown differently'
    FROM texts CROSS JOIN LATERAL regexp_matches(tree, {clauses}, 'g') c
    CROSS JOIN LATERAL regexp_matches(c[1], ':eqop ([1-9][0-9]*)', 'g') m
    JOIN pg_catalog.pg_operator o ON o.oid = m[1]::oid
    -- Of people's own types, who knows: citext is one.
    WHERE o.oprleft >= 16384 OR o.oprleft = ANY ({many_faced})
    UNION
    SELECT format('compares by the collation %I, by which equal values may be shown differently', l.collname)
    FROM texts CROSS JOIN LATERAL regexp_matches(tree, ':[a-z]*coll(?:id|Oid) ([1-9][0-9]*)', 'g') m
    JOIN pg_catalog.pg_collation l ON l.oid = m[1]::oid AND NOT l.collisdeterministic
    WHERE tree ~ {clauses} OR tree ~ ':aggfnoid '
    ORDER BY 1
    """
)

# Who has worked without a rest since before a moment: the counters of a session are sent when it rests. Of others'
# sessions a role without pg_read_all_stats sees no more than that they are in a transaction.
_AT_WORK = sql.SQL(
    """
    SELECT a.pid, a.usename::text AS name, to_char(least(a.xact_start, a.query_start), 'HH24:MI:SS TZ') AS since
    FROM pg_catalog.pg_stat_activity a
    WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
      AND coalesce(a.backend_type, '') NOT IN ('autovacuum worker', 'parallel worker', 'walsender')
      AND CASE WHEN coalesce(a.state, 'disabled') = 'disabled'
               THEN EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.locktype = 'virtualxid' AND l.pid = a.pid)
               ELSE a.state <> 'idle' AND least(a.xact_start, a.query_start) < {before} END
    ORDER BY least(a.xact_start, a.query_start), a.pid LIMIT 1
    """
)

_UNREADABLE_BLOCKS = (
    psycopg.errors.DataCorrupted,
    psycopg.errors.IndexCorrupted,
    psycopg.errors.UndefinedFile,
    psycopg.errors.IoError,
)


def verify_view(
    subject: Subject,
    ledger: Ledger,
    terms: Terms,
    scope: Scope,
    plan: Callable[[], Work[Plan]] | None = None,
) -> Work[Verification]:
    """Compare a view with its query. Changes and records nothing.

    :param subject: the view; a definition's session settings go before those on record.
    :param plan: finds out how the view differs from its definition; None for not at all.
    :returns: what came of it, whatever that is.
    :raises ViewNotFound: when no materialized view of this name stands.
    :raises NotAMaterializedView: when something else does.
    :raises MissingPrivilege: when the role may not read it, or what its query reads; the hint is the GRANT.
    :raises InvalidDefinition: when a session setting is not possible.
    :raises psycopg.Error: what PostgreSQL says, of the query too.
    """
    opening = Opening(subject, ledger, terms)
    try:
        drift = None if plan is None else (yield from _drift(plan, opening.notes))
        try:
            found = yield from _verify(opening, scope)
        except _UNREADABLE_BLOCKS as error:
            found = yield from _damaged(opening, scope, error)
        found = replace(found, drift=drift, seconds=time.monotonic() - opening.begun, notes=tuple(opening.notes))
    except BaseException as error:
        if isinstance(error, psycopg.errors.SerializationFailure):
            error.add_note(
                "On a standby, replay ends queries that read what the primary has cleaned up since: raise "
                "max_standby_streaming_delay there, set hot_standby_feedback, or verify on the primary."
            )
        if isinstance(error, psycopg.errors.ConfigurationLimitExceeded):
            error.add_note(
                "The server's temp_file_limit: have it raised, give more work_mem in session_settings, or verify with "
                "mode='checksum' or 'sampled'."
            )
        advise(error)
        yield from roll_back()
        raise
    yield from _tell(found, ledger.redact)
    return found


def _drift(plan: Callable[[], Work[Plan]], notes: list[str]) -> Work[str | None]:
    try:
        found = yield from plan()
    except (UnsupportedServer, MissingPrivilege, psycopg.errors.InsufficientPrivilege) as error:
        notes.append(f"Whether it is what its definition says could not be found out: {str(error).splitlines()[0]}")
        return None
    if any(step.kind in (StepKind.CHANGE_QUERY, StepKind.REBUILD) for step in found.steps):
        notes.append("It is compared with the query that it was made with, which is not the declared one.")
    return found.summary() if found.stands else None


def _verify(opening: Opening, scope: Scope) -> Work[Verification]:
    opened = yield from opening.open()
    if isinstance(opened, ResolvedName):
        yield from roll_back()
        reason = "it has never been filled (WITH NO DATA): there is nothing to compare"
        return Verification(opened.display, Verdict.UNPOPULATED, reason, scope.mode)
    rows = opened.facts.estimated_rows
    yield Note(
        f"Verifying {opened.view.display} ({scope.mode.value})"
        + (f", about {rows:,} rows" if rows is not None else "")
        + f", its query as {opened.role}."
    )
    found = Verification(opened.view.display, Verdict.EQUAL, "", scope.mode, role=opened.role)
    opening.step = "comparing its rows with those of its query"
    rounding, lost = False, 0
    if scope.mode is VerifyMode.CHECKSUM:
        found, differs = yield from _checksum(opened, found)
    else:
        differences, what, lost = yield from _compare(opened, scope)
        differs, rounding = bool(differences.missing or differences.surplus), differences.rounding
        found = replace(
            found,
            reason=what,
            view_rows=differences.view_rows,
            query_rows=differences.query_rows,
            missing=differences.missing,
            surplus=differences.surplus,
            changed=differences.changed if differs else 0,
            examples=differences.examples,
        )
    loose = []
    if differs:
        statement = _LOOSE.format(
            oid=sql.Literal(opened.facts.oid), walk=WALK, many_faced=_MANY_FACED, clauses=_CLAUSES
        )
        loose = yield from fetch_all(statement)
    yield Command(sql.SQL("COMMIT"))
    standing = opened.standing
    if lost and not differs:
        reason = (
            f"{found.reason}, but {lost:,} of those sampled were not found again by their key, and so not compared: "
            "its unique index may be damaged (REINDEX), or its key not be read back as it is shown (mode='exact')"
        )
        return replace(found, verdict=Verdict.DIFFERS, stale=standing.changed, reason=reason)
    if not differs:
        if standing.changed:
            found = replace(found, reason=f"{found.reason}, though {standing.reason} since its last refresh")
        return replace(found, stale=standing.changed)
    if rounding:
        return replace(
            found,
            verdict=Verdict.ROUNDING,
            stale=standing.changed,
            reason=f"{found.reason}, in the last digits of floating-point numbers only: the order in which they are "
            "added up is not always the same",
        )
    verdict, stale, why = yield from _judge(opened, [row["reason"] for row in loose])
    return replace(found, verdict=verdict, stale=stale, reason=f"{found.reason}: {why}" if found.reason else why)


def _compare(opened: OpenedView, scope: Scope) -> Work[tuple[Differences, str, int]]:
    """Return what differs, the same in words, and how many rows were sampled and not compared."""
    sides, condition = opened.sides, None
    of_all, wanted = "", 0
    if scope.mode is VerifyMode.SAMPLED:
        sampled = yield from _sample(opened, scope)
        if not sampled:
            rows = [{"r": None, "n": None, "missing": 0, "surplus": 0, "view_rows": 0}]
            return read_differences(sides, rows, 0), "no row of it was sampled, for it has none", 0
        wanted = len(sampled)
        condition = sides.among(sampled, (yield from _keys(opened, sampled)))
        of_all = " of those sampled"
    rows = yield from fetch_all(sides.differences(condition))
    found = read_differences(sides, rows, scope.examples)
    lost = max(0, wanted - found.view_rows)
    if not found.missing and not found.surplus:
        return found, f"the same {_rows(found.view_rows)}{of_all}", lost
    changed = found.changed or 0
    told = [
        f"{number:,} {what}"
        for number, what in (
            (changed, "changed"),
            (found.missing - changed, "missing"),
            (found.surplus - changed, "surplus"),
        )
        if number
    ]
    return found, f"{', '.join(told)} of {_rows(found.view_rows)}{of_all}", lost


def _keys(opened: OpenedView, sampled: list[dict[str, Any]]) -> Work[list[str]]:
    """Return the keys of the sampled rows, so that they can be read back whatever the settings of the session."""
    places = [row["at"] for row in sampled if row["r"] is not None]
    if not places:
        return []
    former = yield from fetch_one(
        sql.SQL("SELECT {}").format(
            sql.SQL(", ").join(
                sql.SQL("current_setting({}) AS {}").format(sql.Literal(name), sql.Identifier(name))
                for name in _FAITHFUL
            )
        )
    )
    assert former is not None
    yield from restore_settings(_FAITHFUL)
    rows = yield from fetch_all(opened.sides.keys_at(places))
    yield from restore_settings(former)
    return [row["r"] for row in rows]


def _sample(opened: OpenedView, scope: Scope) -> Work[list[dict[str, Any]]]:
    row = yield from fetch_one(
        sql.SQL("SELECT pg_catalog.pg_relation_size({}::oid) AS size").format(sql.Literal(opened.facts.oid))
    )
    by_page = row is not None and (row["size"] or 0) > _SMALL
    rows = opened.facts.estimated_rows
    # Some more than are wanted, since chance gives now more and now less.
    share = 1.0 if not rows else min(1.0, (scope.sample + 10 * scope.sample**0.5 + 100) / rows)
    if by_page:
        # Of ten times as many pages each gives fewer, and so they come from more places.
        share = min(1.0, 10 * share)
    sampled = yield from fetch_all(opened.sides.sample(scope.sample, scope.seed, share=share, by_page=by_page))
    if not sampled and share < 1.0:
        sampled = yield from fetch_all(opened.sides.sample(scope.sample, scope.seed, share=1.0, by_page=False))
    how = (
        "by their key" if opened.sides.key else "by themselves, for which the whole query runs: it has no unique index"
    )
    yield Note(f"Sampled {_rows(len(sampled))} ({how}).")
    return sampled


def _checksum(opened: OpenedView, found: Verification) -> Work[tuple[Verification, bool]]:
    row = yield from fetch_one(opened.sides.checksums)
    assert row is not None
    found = replace(found, view_rows=row["view_rows"], query_rows=row["query_rows"])
    if row["same"] and row["view_rows"] == row["query_rows"]:
        return replace(found, reason=f"the same checksum over {_rows(row['view_rows'])}", missing=0, surplus=0), False
    told = f"another checksum: {_rows(row['view_rows'])} in the view, {row['query_rows']:,} by its query"
    return replace(found, reason=f"{told} (mode='exact' tells which differ)"), True


def _judge(opened: OpenedView, loose: list[str]) -> Work[tuple[Verdict, bool | None, str]]:
    """Say what a difference means."""
    standing = opened.standing
    if standing.changed:
        return Verdict.STALE, True, f"{standing.reason} since its last refresh, and a refresh mends it"
    if standing.changed is None:
        return Verdict.DIFFERS, None, f"whether it is older than what it reads cannot be told: {standing.reason}"
    yield Note(f"It differs though no change is counted yet; looking again in {SETTLING:g} s.")
    yield Pause(SETTLING)
    assert standing.look is not None
    # Before the look: who rests now has sent its counters.
    at_work = yield from fetch_all(
        _AT_WORK.format(before=sql.Literal(standing.look.at + timedelta(seconds=SETTLING))), session=Session.RECORD
    )
    later = (yield from staleness.look_at([opened.view])).get(opened.view)
    if not standing.still(later):
        return Verdict.STALE, True, "what it reads was being changed meanwhile, and a refresh mends it"
    if loose:
        more = f" (and {len(loose) - 1} more)" if len(loose) > 1 else ""
        return (
            Verdict.DIFFERS,
            False,
            f"nothing that it reads has changed, but its query {loose[0]}{more}, and may give another result by the "
            "order in which rows come",
        )
    for each in at_work:
        since = f"at work since {each['since']}" if each["since"] else "in a transaction"
        return (
            Verdict.DIFFERS,
            None,
            f"no change of what it reads is counted, but session {each['pid']} of {one_line(str(each['name']))} has "
            f"been {since}, and what it has committed may not be counted yet",
        )
    return (
        Verdict.CORRUPT,
        False,
        f"{standing.reason}, so its rows or what computed them are damaged, or a function in its query is not what it "
        "is declared to be. A refresh may mend it; find out why first",
    )


def _damaged(opening: Opening, scope: Scope, error: psycopg.Error) -> Work[Verification]:
    """Say which side cannot be read."""
    yield from roll_back()
    opened = opening.opened
    if opened is None:
        raise error
    try:
        yield from fetch_all(sql.SQL("SELECT count({}) AS n FROM {}").format(opened.sides.text(), opened.sides.of_view))
    except _UNREADABLE_BLOCKS as again:
        reason = f"its rows cannot be read: {again.diag.message_primary}. A refresh writes them anew"
        return Verification(opened.view.display, Verdict.CORRUPT, reason, scope.mode, role=opened.role)
    except psycopg.Error:
        raise error from None
    error.add_note(f"{opened.view.display} itself can be read: what its query reads, or an index of that, is damaged.")
    raise error


def _tell(found: Verification, redact: Callable[[str], str]) -> Work[None]:
    alarming = found.verdict not in (Verdict.EQUAL, Verdict.ROUNDING, Verdict.STALE)
    yield Note(f"{found.view}: {found.verdict.value} in {found.seconds:.2f} s: {found.reason}.", warning=alarming)
    for example in found.examples:
        # Before its values are cut, perhaps in the middle of a secret.
        yield Note(f"  {example.line(redact)}", warning=alarming)
    for note in found.notes:
        yield Note(f"  {note}")


def _rows(number: int) -> str:
    return f"{number:,} row{'' if number == 1 else 's'}"
