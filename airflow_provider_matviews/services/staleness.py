"""Whether a view is older than what it reads.

A refresh keeps, beside the view's definition, what its sources looked like just before it: for every table the file
that holds it and the counters of rows inserted, updated and deleted, for every materialized view its last refresh. A
later look that finds the same can leave the view alone. What was measured for it (150 rounds with writers that
overlapped): with the look taken before the refresh, in a statement of its own, no committed change was missed and some
refreshes were needless; with the look taken after, 46 changes were missed.

A session's counters reach others once it is in no transaction and runs no command: then at once, or, where they have
been sent less than a second ago, within 10 s (PostgreSQL's ``pgstat_report_stat``). So "unchanged" may be that old, and
older where a session goes from COMMIT straight into a long transaction; a look after that sees it. Where such a session
is writing to a source again, which its lock shows, the view does not count as unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any

from psycopg import sql

from airflow_provider_matviews.services.catalog import ResolvedName, named
from airflow_provider_matviews.services.graph import DISPLAY, WALK
from airflow_provider_matviews.services.instructions import Session, Work, fetch_all

#: Moves with the columns of a relation ``c``, which show where a whole row is read, and with the expressions of those
#: that are computed as they are read.
_COLUMNS = sql.SQL(
    "(SELECT coalesce(md5(string_agg(a.attnum || ':' || a.xmin, ' ' ORDER BY a.attnum)), '') "
    "FROM pg_catalog.pg_attribute a "
    "WHERE a.attrelid = c.oid AND a.attnum > 0)"
)

#: Moves with every type and text search configuration of people's own. Of all of the database: which of them a query
#: shows is written in too many places to follow, and they change seldom.
_TYPES = sql.SQL(
    """
    (SELECT md5(concat_ws(' ',
        (SELECT string_agg(e.oid || ':' || e.xmin, ' ' ORDER BY e.oid) FROM pg_catalog.pg_enum e),
        (SELECT string_agg(a.attrelid || ':' || a.attnum || ':' || a.xmin, ' ' ORDER BY a.attrelid, a.attnum)
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid WHERE c.relkind = 'c'),
        (SELECT string_agg(d.oid || ':' || d.xmin, ' ' ORDER BY d.oid)
         FROM pg_catalog.pg_ts_dict d WHERE d.oid >= 16384),
        (SELECT string_agg(m.mapcfg || ':' || m.maptokentype || ':' || m.mapseqno || ':' || m.xmin, ' '
                           ORDER BY m.mapcfg, m.maptokentype, m.mapseqno)
         FROM pg_catalog.pg_ts_config_map m WHERE m.mapcfg >= 16384))))
    """
)

#: Settings that a query's result may depend on: how values are read and shown, and where names are looked up.
_SHOWN = (
    "timezone",
    "datestyle",
    "intervalstyle",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "default_text_search_config",
    "search_path",
    "extra_float_digits",
    "bytea_output",
    "xmloption",
    "xmlbinary",
    "array_nulls",
)
_SETTINGS = sql.SQL("concat_ws(' ', {})").format(
    sql.SQL(", ").join(sql.SQL("current_setting({})").format(sql.Literal(name)) for name in _SHOWN)
)

_LOOK = sql.SQL(
    """
    WITH RECURSIVE types AS MATERIALIZED (
        SELECT {types} AS version
    ), written AS MATERIALIZED (
        SELECT DISTINCT l.relation FROM pg_catalog.pg_locks l
        WHERE l.locktype = 'relation' AND l.granted AND l.mode = 'RowExclusiveLock' AND l.pid <> pg_backend_pid()
          AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
    ), roots AS (
        SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'm' AND (%(schemas)s::text[] IS NULL OR (n.nspname::text, c.relname::text) IN
                                   (SELECT * FROM unnest(%(schemas)s::text[], %(names)s::text[])))
    ), {walk}, shapes AS (
        -- A view, a column or a function that is replaced or renamed gets a new version of its row.
        SELECT r.root, 'rule' AS kind, w.oid, w.xmin::text AS version
        FROM reads r JOIN pg_catalog.pg_class c ON c.oid = r.object AND c.relkind = 'v'
        JOIN pg_catalog.pg_rewrite w ON w.ev_class = r.object AND w.rulename = '_RETURN'
        WHERE r.class = 'pg_class'::regclass
        UNION ALL
        SELECT r.root, 'columns', c.oid, {columns} FROM reads r
        JOIN pg_catalog.pg_class c ON c.oid = r.object AND c.relkind = 'v'
        WHERE r.class = 'pg_class'::regclass
        UNION ALL
        SELECT r.root, 'function', p.oid, p.xmin::text FROM reads r JOIN pg_catalog.pg_proc p ON p.oid = r.object
        WHERE r.class = 'pg_proc'::regclass
        UNION ALL
        SELECT r.root, 'operator', o.oid, o.xmin::text FROM reads r JOIN pg_catalog.pg_operator o ON o.oid = r.object
        WHERE r.class = 'pg_operator'::regclass
    )
    SELECT n.nspname::text AS schema, c.relname::text AS name, {display} AS display,
           c.oid::bigint AS oid, c.xmin::text AS version,
           (SELECT w.oid || ':' || w.xmin FROM pg_catalog.pg_rewrite w
            WHERE w.ev_class = c.oid AND w.rulename = '_RETURN') AS rule,
           c.relispopulated AS populated, clock_timestamp() AS at, pg_catalog.pg_current_snapshot()::text AS snapshot,
           current_setting('track_counts')::boolean AS counted,
           -- After a crash the counters begin anew, and so do those of the background writer.
           concat_ws(' ', extract(epoch FROM pg_catalog.pg_postmaster_start_time()),
                     extract(epoch FROM pg_catalog.pg_stat_get_db_stat_reset_time(
                        (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()))),
                     extract(epoch FROM pg_catalog.pg_stat_get_bgwriter_stat_reset_time())) AS server,
           {settings} AS settings,
           (SELECT md5(concat_ws(' ', (SELECT version FROM types),
                                 string_agg(concat_ws(':', s.kind, s.oid, s.version), ' ' ORDER BY s.kind, s.oid)))
            FROM shapes s WHERE s.root = c.oid) AS shape,
           relations.sources, relations.opaque, relations.tables, relations.writing
    FROM roots JOIN pg_catalog.pg_class c ON c.oid = roots.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN LATERAL (
        SELECT coalesce(jsonb_object_agg({display}, CASE
                   WHEN c.relkind = 'm' THEN concat_ws(':', c.oid, c.relfilenode, c.xmin, {columns})
                   ELSE concat_ws(':', c.oid, c.relfilenode, pg_catalog.pg_stat_get_tuples_inserted(c.oid),
                                  pg_catalog.pg_stat_get_tuples_updated(c.oid),
                                  pg_catalog.pg_stat_get_tuples_deleted(c.oid), {columns}) END)
                   FILTER (WHERE c.relkind IN ('r', 'm')), '{{}}') AS sources,
               -- As people name them: a partition is told by the table that it belongs to.
               coalesce(array_agg({display} ORDER BY {display})
                   FILTER (WHERE c.relkind IN ('r', 'p', 'f', 'm') AND NOT c.relispartition), '{{}}') AS tables,
               coalesce(array_agg({display} ORDER BY {display})
                   FILTER (WHERE c.relkind = 'r' AND c.oid IN (SELECT relation FROM written)), '{{}}') AS writing,
               coalesce(array_agg(CASE
                   WHEN c.relkind = 'f' THEN 'reads the foreign table '
                   WHEN c.relkind = 'S' THEN 'reads the sequence '
                   ELSE 'row security decides what it sees of ' END || {display} ORDER BY {display})
                   FILTER (WHERE c.relkind IN ('f', 'S') OR c.relrowsecurity),
                   '{{}}') AS opaque
        FROM reads r JOIN pg_catalog.pg_class c ON c.oid = r.object
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE r.root = roots.oid AND r.class = 'pg_class'::regclass AND r.object <> roots.oid
    ) relations ON true
    """
).format(walk=WALK, display=DISPLAY, columns=_COLUMNS, types=_TYPES, settings=_SETTINGS)

#: Transactions that were begun already and may hold an older picture of the data than a look that comes before this
#: (``open``), and what tells whether such a picture is left when those have ended: whether a prepared transaction may
#: hold a refresh, since it has lost that name and still its locks, and the oldest picture that anybody holds, since a
#: younger transaction may have taken it over (SET TRANSACTION SNAPSHOT). Ours are not among them: they end with the
#: refresh.
_OPEN = sql.SQL(
    """
    SELECT coalesce(array_agg(virtualxid ORDER BY virtualxid) FILTER (
               WHERE locktype = 'virtualxid' AND granted AND pid <> pg_backend_pid()
                 AND pid <> ALL (%(ours)s::integer[])), '{}') AS open,
           coalesce(bool_or(locktype = 'relation' AND mode = 'AccessExclusiveLock' AND pid IS NULL), false) AS prepared,
           (SELECT min(pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::bigint
                       - pg_catalog.age(a.backend_xmin))
            FROM pg_catalog.pg_stat_get_activity(NULL) a
            WHERE a.pid <> pg_backend_pid() AND a.pid <> ALL (%(ours)s::integer[])) AS oldest
    FROM pg_catalog.pg_locks
    """
)

#: What of a stored query can give another result though no row of its sources has changed. Built-in functions that are
#: STABLE are listed by what may be trusted: they depend on settings, which a view's refreshes share, and on their
#: arguments, not on the clock or on the catalogs.
_TRUSTED = (
    "^(any|text|)(text|array|)(any|any)?cat$|^(concat|concat_ws|format|length|convert|convert_from|convert_to|"
    "array_to_string|array_to_json|row_to_json|to_jsonb?|jsonb?_(strip_nulls|build_array|build_object|populate_record|"
    "populate_recordset|to_record|to_recordset|to_tsvector|agg|agg_strict|object_agg|object_agg_strict|"
    "object_agg_unique|object_agg_unique_strict)|jsonb_path_[a-z_]+_tz|quote_literal|quote_nullable|to_char|to_date|"
    "to_number|to_timestamp|date_part|date_trunc|date_add|date_subtract|extract|generate_series|in_range|"
    "make_timestamptz|overlaps|money|numeric|timezone|date|time|timetz|timestamp|timestamptz|"
    "(date|timestamp|timestamptz)_(cmp|eq|ge|gt|le|lt|ne)_(date|timestamp|timestamptz)|interval_pl_timestamptz|"
    "timestamptz_(mi|pl)_interval|to_tsvector|to_tsquery|plainto_tsquery|phraseto_tsquery|websearch_to_tsquery|"
    "ts_headline|ts_match_t[qt]|enum_first|enum_last|enum_range|pg_typeof)$"
)
_MOVING = sql.SQL(
    """
    WITH RECURSIVE roots AS (
        SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'm' AND n.nspname = %(schema)s AND c.relname = %(name)s
    ), {walk}, texts AS (
        SELECT w.ev_action::text AS tree
        FROM reads r JOIN pg_catalog.pg_class c ON c.oid = r.object AND (c.relkind = 'v' OR c.oid = r.root)
        JOIN pg_catalog.pg_rewrite w ON w.ev_class = r.object AND w.rulename = '_RETURN'
        WHERE r.class = 'pg_class'::regclass
        UNION ALL
        SELECT p.prosqlbody::text FROM reads r JOIN pg_catalog.pg_proc p ON p.oid = r.object
        WHERE r.class = 'pg_proc'::regclass AND p.prosqlbody IS NOT NULL
    ), named AS (
        SELECT DISTINCT m[1] AS kind, m[2]::oid AS oid
        FROM texts CROSS JOIN LATERAL
             regexp_matches(tree, ':(funcid|opfuncid|aggfnoid|winfnoid|opno) ([1-9][0-9]*)', 'g') m
    ), functions AS (
        SELECT oid FROM named WHERE kind <> 'opno'
        UNION SELECT o.oprcode FROM named JOIN pg_catalog.pg_operator o ON o.oid = named.oid WHERE named.kind = 'opno'
        UNION SELECT object FROM reads WHERE class = 'pg_proc'::regclass
    )
    SELECT 'calls ' || p.oid::regprocedure AS reason
    FROM functions JOIN pg_catalog.pg_proc p ON p.oid = functions.oid
    WHERE p.oid < 16384 AND (p.provolatile = 'v' OR p.provolatile = 's' AND p.proname !~ %(trusted)s
                             OR p.proname = 'age' AND p.pronargs = 1
                             -- Where it is summer decides what these mean.
                             OR p.provolatile = 's' AND 'timetz'::regtype = ANY (p.prorettype || p.proargtypes))
    UNION
    SELECT 'calls ' || p.oid::regprocedure || ', which cannot be seen into'
    FROM functions JOIN pg_catalog.pg_proc p ON p.oid = functions.oid
    JOIN pg_catalog.pg_language l ON l.oid = p.prolang
    WHERE p.oid >= 16384 AND p.prosqlbody IS NULL AND p.prokind <> 'a'
      -- What is compiled is what its author says; a text may read tables whatever it is declared as.
      AND NOT (p.provolatile = 'i' AND l.lanname IN ('c', 'internal'))
    UNION
    -- pg_depend says nothing of what belongs to the system itself.
    SELECT 'reads the system catalog ' || c.oid::regclass
    FROM texts CROSS JOIN LATERAL regexp_matches(tree, ':relid ([1-9][0-9]*)', 'g') m
    JOIN pg_catalog.pg_class c ON c.oid = m[1]::oid
    WHERE c.oid < 16384
    UNION
    SELECT CASE m[1] WHEN 'SQLVALUEFUNCTION' THEN 'asks for the time or for who is asking'
                     WHEN 'NEXTVALUEEXPR' THEN 'takes numbers from a sequence'
                     WHEN 'TABLESAMPLECLAUSE' THEN 'takes a random sample (TABLESAMPLE)'
                     ELSE 'reads a constant anew each time (such as ''today''::text::date)' END
    FROM texts CROSS JOIN LATERAL regexp_matches(
        tree, '{{(SQLVALUEFUNCTION|NEXTVALUEEXPR|TABLESAMPLECLAUSE|COERCEVIAIO :arg (?:{{RELABELTYPE :arg )?{{CONST) ',
        'g') m
    UNION
    SELECT 'shows the name of an object, which may be renamed' FROM texts
    WHERE tree ~ ':(vartype|resulttype|funcresulttype|opresulttype) (24|2202|2203|2204|2205|2206|4089|4096|4191) '
    UNION
    -- As a whole constant, or as a part of one that is a list: now, today, tomorrow, yesterday.
    SELECT 'reads a constant anew each time (such as ''today''::text::date)' FROM texts
    WHERE tree ~ ('( 0 0 0|123|44|34) (110 111 119|116 111 100 97 121|116 111 109 111 114 114 111 119|'
                  '121 101 115 116 101 114 100 97 121) (\\]|125|44|34|0 0 0)')
    ORDER BY 1
    """
).format(walk=WALK)


@dataclass(frozen=True)
class Look:
    """What a view and its sources look like at one moment.

    :ivar oid: of the view.
    :ivar version: of the view's row in ``pg_class``, which every refresh, GRANT and ALTER renews.
    :ivar at: when, by the server's clock.
    :ivar snapshot: what was committed then, as ``pg_visible_in_snapshot`` reads it.
    :ivar server: changes when the counters begin anew.
    :ivar counted: whether the server counts rows.
    :ivar rule: changes with its query; a swap makes it anew, too.
    :ivar shape: changes with the views and functions that it reads through.
    :ivar sources: name -> what changes with its rows.
    :ivar opaque: what it reads whose changes cannot be seen.
    :ivar tables: names of the tables, foreign tables and materialized views that it reads.
    :ivar writing: tables among its sources that somebody is writing to. What that session has committed before may not
        be counted yet: it is so only when the session is in no transaction any more.
    :ivar settings: of the session, those that a result may depend on.
    """

    view: ResolvedName
    oid: int
    version: str
    populated: bool
    at: datetime
    snapshot: str
    counted: bool
    server: str
    rule: str
    shape: str
    sources: Mapping[str, str]
    opaque: tuple[str, ...]
    tables: Sequence[str]
    writing: Sequence[str]
    settings: str


@dataclass(frozen=True)
class Baseline:
    """What the sources looked like just before the refresh that a view's rows come from.

    :ivar oid: of the view after it.
    :ivar version: of the view's row after it.
    :ivar rule: of the view's query after it.
    :ivar at: when the look was taken, by the server's clock.
    :ivar snapshot: what was committed then.
    :ivar moving: why the view's result moves though no source changes.
    :ivar open: transactions that had begun before, and might refresh the view from an older picture.
    :ivar settings: under which it was refreshed, those that a result may depend on.
    """

    at: datetime
    snapshot: str
    server: str
    shape: str
    sources: Mapping[str, str]
    moving: tuple[str, ...]
    open: tuple[str, ...]
    settings: str
    oid: int | None = None
    version: str | None = None
    rule: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data, without what is only known when the refresh has ended."""
        return {
            "at": self.at.isoformat(),
            "snapshot": self.snapshot,
            "server": self.server,
            "shape": self.shape,
            "sources": dict(self.sources),
            "moving": list(self.moving),
            "open": list(self.open),
            "settings": self.settings,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> Baseline | None:
        """Read what :meth:`as_dict` wrote, with ``oid``, ``version`` and ``rule`` added.

        :returns: None where there is nothing, or what another version of this package wrote that knew less.
        """
        if state is None or not {each.name for each in fields(cls)} <= state.keys():
            return None
        known = {each.name: state[each.name] for each in fields(cls)}
        known |= {name: tuple(known[name]) for name in ("moving", "open")}
        return cls(**{**known, "at": datetime.fromisoformat(state["at"])})


@dataclass(frozen=True)
class Judgement:
    """Whether a view is older than what it reads.

    :ivar stale: whether it may be; False only where nothing has changed since its last refresh.
    :ivar reason: why, for a person.
    :ivar digest: moves whenever anything about its sources moves.
    :ivar refreshed_at: when the rows it has were true at the earliest, by the server's clock; None where unknown.
    :ivar moving: why its result moves though no source changes.
    :ivar settled_at: of which baseline it has just shown that no older transaction is left; None where that is known
        already, or not so.
    """

    view: ResolvedName
    stale: bool
    reason: str
    digest: str
    refreshed_at: datetime | None = None
    moving: tuple[str, ...] = ()
    settled_at: datetime | None = None


def look_at(views: Sequence[ResolvedName] | None, session: Session = Session.RECORD) -> Work[dict[ResolvedName, Look]]:
    """Look at views and their sources: one statement, whatever their number.

    :param views: those that do not stand are left out; None for all of the database.
    :param session: where; outside of a transaction, or counters may be as old as the transaction.
    """
    rows = yield from fetch_all(_LOOK, named(views), session)
    looks = {}
    for row in rows:
        view = ResolvedName(row.pop("schema"), row.pop("name"), row.pop("display"))
        looks[view] = Look(view, opaque=tuple(row.pop("opaque")), **row)
    return looks


def settings_of(look: Look, given: Mapping[str, Any]) -> str:
    """Return the settings that a result may depend on.

    :param given: what the view's definition and the call set for its refresh.
    """
    shown = {name.lower(): str(value) for name, value in given.items() if name.lower() in _SHOWN}
    return f"{look.settings} {sorted(shown.items())}" if shown else look.settings


def baseline_of(
    look: Look,
    former: Baseline | None,
    ours: Sequence[int],
    given: Mapping[str, Any],
    session: Session = Session.RECORD,
) -> Work[Baseline]:
    """Return what is to be kept of a look that comes before a refresh.

    :param former: the one that is kept so far: where the query is still the same, it has been read already.
    :param ours: the server's processes that work for this operation.
    :param given: the settings under which the view is refreshed.
    """
    moving = look.opaque
    if former is not None and (former.shape, former.rule) == (look.shape, look.rule):
        moving += tuple(reason for reason in former.moving if reason not in look.opaque and not _of_relation(reason))
    else:
        rows = yield from fetch_all(
            _MOVING, {"schema": look.view.schema, "name": look.view.name, "trusted": _TRUSTED}, session
        )
        moving += tuple(row["reason"] for row in rows)
    rows = yield from fetch_all(_OPEN, {"ours": list(ours)}, session)
    return Baseline(
        look.at,
        look.snapshot,
        look.server,
        look.shape,
        look.sources,
        moving,
        tuple(rows[0]["open"]),
        settings_of(look, given),
    )


def is_settled(baseline: Baseline, ours: Sequence[int], session: Session = Session.RECORD) -> Work[bool]:
    """Whether every transaction that is older than a baseline has ended, so that none can bring older rows back."""
    if not baseline.open:
        return True
    rows = yield from fetch_all(_OPEN, {"ours": list(ours)}, session)
    return _settles(baseline, rows[0])


def _settles(baseline: Baseline, now: Mapping[str, Any]) -> bool:
    # A picture that is newer than the baseline's has all in it that had ended then.
    ended_then = int(baseline.snapshot.split(":")[1])
    return (
        not set(baseline.open) & set(now["open"])
        and not now["prepared"]
        and (now["oldest"] is None or now["oldest"] >= ended_then)
    )


def judge(
    look: Look,
    baseline: Baseline | None,
    *,
    max_staleness: float | None = None,
    given: Mapping[str, Any] | None = None,
) -> Judgement:
    """Say whether a view is older than what it reads.

    :param baseline: what is kept of its last refresh; None where nothing is.
    :param max_staleness: seconds that a view may be old whose result moves by itself; None for not at all.
    :param given: the settings under which it would be refreshed; None: they are not compared.
    """
    reason = _why_stale(look, baseline, max_staleness, given)
    digest = f"{look.server} {look.rule} {look.shape} {sorted(look.sources.items())} {look.populated}"
    at = None if baseline is None else baseline.at
    moving = look.opaque if baseline is None else baseline.moving
    if reason is not None:
        return Judgement(look.view, True, reason, digest, at, moving)
    assert baseline is not None
    return Judgement(look.view, False, _why_fresh(look, baseline), digest, at, moving)


def judge_views(
    kept: Mapping[tuple[str, str], Mapping[str, Any] | None],
    views: Sequence[ResolvedName] | None = None,
    *,
    max_staleness: float | None = None,
    given: Mapping[ResolvedName, Mapping[str, Any]] | None = None,
    session: Session = Session.RECORD,
) -> Work[list[Judgement]]:
    """Say of many views whether they are older than what they read, by two statements. Changes nothing.

    :param kept: by schema and name, what is kept of their last refreshes; read before.
    :param views: those that do not stand are left out; None for all of the database.
    :param max_staleness: as of :func:`judge`.
    :param given: of each view, as of :func:`judge`.
    :param session: where; outside of a transaction.
    """
    # Before the look, as in :func:`is_settled`.
    (open_before,) = yield from fetch_all(_OPEN, {"ours": []}, session)
    judgements = []
    for view, look in (yield from look_at(views, session)).items():
        baseline = Baseline.of(kept.get((view.schema, view.name)))
        settings = None if given is None else given.get(view, {})
        judgement = judge(look, baseline, max_staleness=max_staleness, given=settings)
        settles = (
            baseline is not None
            and bool(baseline.open)
            and _settles(baseline, open_before)
            and look.version == baseline.version
        )
        judgements.append(replace(judgement, settled_at=baseline.at if settles and baseline else None))
    return judgements


def _why_stale(
    look: Look, baseline: Baseline | None, max_staleness: float | None, given: Mapping[str, Any] | None
) -> str | None:
    if not look.populated:
        return "it has never been filled"
    if baseline is None:
        return "what its sources looked like at its last refresh is not known"
    if not look.counted:
        return "the server does not count rows (track_counts is off)"
    if look.server != baseline.server:
        return "the server has counted anew since its last refresh (a restart, or its statistics were reset)"
    if (look.shape, look.rule) != (baseline.shape, baseline.rule):
        return "its query, or a view, a function or a type that it reads through, has been changed"
    if given is not None and settings_of(look, given) != baseline.settings:
        return "it was refreshed under other settings (such as TimeZone) than it would be now"
    changed = sorted(
        name for name in {*look.sources, *baseline.sources} if look.sources.get(name) != baseline.sources.get(name)
    )
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"{', '.join(changed[:3])}{more} changed"
    if look.oid != baseline.oid:
        return "it has been made anew since its last refresh"
    if look.writing:
        return f"somebody is writing to {look.writing[0]}, and what is committed of it may not be counted yet"
    if look.version != baseline.version and baseline.open:
        return "somebody else refreshed or altered it, and perhaps from an older picture of its sources"
    if look.version != baseline.version and given is not None and settings_of(look, given) != look.settings:
        return "somebody else refreshed or altered it, and perhaps under other settings than it is declared with"
    moving = (*look.opaque, *(reason for reason in baseline.moving if reason not in look.opaque))
    if moving:
        told = f"it {moving[0]}" + (f" (and {len(moving) - 1} more)" if len(moving) > 1 else "")
        if max_staleness is None:
            return f"{told}, so that its result may move though no table does"
        age = (look.at - baseline.at).total_seconds()
        if age >= max_staleness:
            return f"{told}, and is {age:.0f} s old, with max_staleness={max_staleness:g} s"
    return None


def _why_fresh(look: Look, baseline: Baseline) -> str:
    count = len(look.sources)
    told = {0: "nothing that it reads changed", 1: "its source has not changed"}.get(
        count, f"none of its {count} sources changed"
    )
    told += f" since its refresh at {baseline.at:%Y-%m-%d %H:%M:%S %Z}"
    if look.version != baseline.version:
        told += "; somebody else has refreshed or altered it since"
    if baseline.moving:
        told += f"; it {baseline.moving[0]}, and is not older than max_staleness"
    return told


def _of_relation(reason: str) -> bool:
    return reason.startswith(("reads the foreign table ", "reads the sequence ", "row security "))
