"""The one query that a picture is made of: everything PostgreSQL keeps about a view."""

from __future__ import annotations

from psycopg import sql


def _list(expression: str) -> str:
    return f"coalesce({expression}, '[]'::jsonb)"


def _acl(acl: str) -> str:
    # Each array sorted, so that two pictures can be compared.
    return _list(
        "(SELECT jsonb_agg(jsonb_build_object("
        "'grantee', CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee) END, "
        "'grantor', pg_get_userbyid(a.grantor), 'privilege', a.privilege_type, 'grantable', a.is_grantable) "
        f"ORDER BY a.grantee, a.grantor, a.privilege_type) FROM aclexplode({acl}) a)"
    )


def _seclabels(subid: str) -> str:
    return _list(
        "(SELECT jsonb_agg(jsonb_build_object('provider', l.provider, 'label', l.label) ORDER BY l.provider) "
        "FROM pg_seclabel l WHERE l.classoid = 'pg_class'::regclass AND l.objoid = c.oid "
        f"AND l.objsubid = {subid})"
    )


_RELATION_ACL = _acl("coalesce(c.relacl, acldefault('r', c.relowner))")
#: The privileges on a relation; takes its name.
PRIVILEGES = sql.SQL(f"SELECT {_RELATION_ACL} AS privileges FROM pg_class c WHERE c.oid = %s::regclass")
# Without what the server keeps there itself: pg_attver, since PostgreSQL 15.20, which nobody can set (measured).
_COLUMN_OPTIONS = _list(
    "(SELECT jsonb_agg(option) FROM unnest(a.attoptions) AS option WHERE NOT starts_with(option, 'pg_'))"
)
_COLUMNS = _list(
    f"""(
    SELECT jsonb_agg(jsonb_build_object(
        'name', a.attname, 'type', tn.nspname || '.' || t.typname || ' ' || a.atttypmod || ' ' || a.attcollation,
        'usual_storage', t.typstorage, 'storage', CASE WHEN a.attstorage <> t.typstorage THEN a.attstorage END,
        'compression', nullif(a.attcompression, ''),
        'statistics', CASE WHEN a.attstattarget >= 0 THEN a.attstattarget END,
        'options', {_COLUMN_OPTIONS}, 'comment', col_description(c.oid, a.attnum),
        'privileges', {_acl("a.attacl")}, 'labels', {_seclabels("a.attnum")}) ORDER BY a.attnum)
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)"""
)


def _reads(catalog: str, oid: str) -> str:
    return _list(
        "(SELECT jsonb_agg(DISTINCT a.attname) FROM pg_depend d "
        "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid "
        f"WHERE d.classid = '{catalog}'::regclass AND d.objid = {oid} "
        "AND d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid AND d.refobjsubid > 0)"
    )


_KEYS = """(
    SELECT jsonb_agg(jsonb_build_object(
        'column', a.attname,
        'expression', CASE WHEN a.attname IS NULL THEN pg_get_indexdef(i.oid, k.n, false) END,
        'operator_class', format('%%I.%%I', ocn.nspname, oc.opcname),
        -- Of several that are somebody's default, the one for exactly this type is taken.
        'usual_operator_class', oc.opcdefault AND (oc.opcintype = coalesce(a.atttypid, oc.opcintype) OR NOT EXISTS (
            SELECT FROM pg_opclass other WHERE other.opcmethod = oc.opcmethod AND other.opcdefault
            AND other.opcintype = a.atttypid)),
        'operator_class_options', coalesce(to_jsonb(ia.attoptions), '[]'::jsonb),
        'collation', CASE WHEN co.oid IS NOT NULL THEN format('%%I.%%I', con.nspname, co.collname) END,
        'usual_collation', x.indcollation[k.n - 1] = CASE
            WHEN a.attname IS NOT NULL THEN a.attcollation
            WHEN x.indcollation[k.n - 1] = 0 THEN 0
            -- What an expression has of its own cannot be asked for.
            WHEN EXISTS (SELECT FROM pg_attribute o WHERE o.attrelid = c.oid AND o.attnum > 0
                         AND o.attcollation NOT IN (0, 'pg_catalog."default"'::regcollation)) THEN 0
            ELSE 'pg_catalog."default"'::regcollation END,
        'descending', (x.indoption[k.n - 1] & 1) <> 0, 'nulls_first', (x.indoption[k.n - 1] & 2) <> 0) ORDER BY k.n)
    FROM generate_series(1, x.indnkeyatts) AS k (n)
    JOIN pg_opclass oc ON oc.oid = x.indclass[k.n - 1] JOIN pg_namespace ocn ON ocn.oid = oc.opcnamespace
    JOIN pg_attribute ia ON ia.attrelid = i.oid AND ia.attnum = k.n
    LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = x.indkey[k.n - 1] AND a.attnum <> 0
    LEFT JOIN pg_collation co ON co.oid = x.indcollation[k.n - 1] AND co.oid <> 0
    LEFT JOIN pg_namespace con ON con.oid = co.collnamespace)"""

_INDEX_ANATOMY = f"""jsonb_build_object(
        'quoted', quote_ident(i.relname), 'definition', pg_get_indexdef(i.oid),
        'options', {_list("to_jsonb(i.reloptions)")}, 'reads', {_reads("pg_class", "i.oid")},
        'shape', jsonb_build_object(
            'method', (SELECT am.amname FROM pg_am am WHERE am.oid = i.relam), 'unique', x.indisunique,
            'nulls_not_distinct', coalesce((to_jsonb(x)->>'indnullsnotdistinct')::boolean, false),
            'keys', {_KEYS},
            'include', {
    _list(
        "(SELECT jsonb_agg(a.attname ORDER BY k.n) FROM generate_series(x.indnkeyatts + 1, x.indnatts) AS k (n) "
        "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = x.indkey[k.n - 1])"
    )
},
            'predicate', pg_get_expr(x.indpred, x.indrelid)))"""

_KINDS = _list(
    "(SELECT jsonb_agg(k.word ORDER BY k.word) FROM (VALUES ('d', 'ndistinct'), ('f', 'dependencies'), ('m', 'mcv')) "
    "AS k (code, word) WHERE k.code = ANY (s.stxkind::text[]))"
)

_STATISTICS_ANATOMY = f"""jsonb_build_object(
        'quoted', quote_ident(n.nspname) || '.' || quote_ident(s.stxname),
        'definition', pg_get_statisticsobjdef(s.oid), 'reads', {_reads("pg_statistic_ext", "s.oid")},
        'columns', {
    _list(
        "(SELECT jsonb_agg(a.attname ORDER BY k.n) FROM unnest(s.stxkeys::smallint[]) WITH ORDINALITY AS k (attnum, n) "
        "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum)"
    )
},
        'expressions', coalesce(to_jsonb(pg_get_statisticsobjdef_expressions(s.oid)), '[]'::jsonb),
        'kinds', {_KINDS})"""


def _indexes(anatomy: str) -> str:
    return _list(f"""(
    SELECT jsonb_agg(jsonb_build_object(
        'name', i.relname, 'anatomy', {anatomy}, 'unique', x.indisunique,
        'valid', x.indisvalid, 'tablespace', s.spcname, 'comment', obj_description(i.oid, 'pg_class'),
        'fingerprint', (to_jsonb(x) - ARRAY['indexrelid', 'indrelid', 'indcheckxmin'])::text
                       || i.relam || coalesce(i.reloptions::text, ''),
        'clustered', x.indisclustered, 'replica_identity', x.indisreplident,
        'statistics', {
        _list(
            "(SELECT jsonb_agg(jsonb_build_array(a.attnum, a.attstattarget) ORDER BY a.attnum) FROM pg_attribute a "
            "WHERE a.attrelid = i.oid AND a.attstattarget >= 0)"
        )
    },
        'extensions', {
        _list(
            "(SELECT jsonb_agg(e.extname ORDER BY e.extname) FROM pg_depend d JOIN pg_extension e "
            "ON e.oid = d.refobjid WHERE d.classid = 'pg_class'::regclass AND d.objid = i.oid "
            "AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'x')"
        )
    }) ORDER BY i.relname)
    FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
    LEFT JOIN pg_tablespace s ON s.oid = i.reltablespace
    WHERE x.indrelid = c.oid)""")


def _statistics(anatomy: str) -> str:
    return _list(f"""(
    SELECT jsonb_agg(jsonb_build_object(
        'schema', n.nspname, 'name', s.stxname, 'owner', pg_get_userbyid(s.stxowner), 'anatomy', {anatomy},
        'fingerprint', (to_jsonb(s) - ARRAY['oid', 'stxrelid', 'stxname', 'stxowner'])::text,
        'target', CASE WHEN s.stxstattarget >= 0 THEN s.stxstattarget END,
        'comment', obj_description(s.oid, 'pg_statistic_ext')) ORDER BY n.nspname, s.stxname)
    FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = s.stxnamespace
    WHERE s.stxrelid = c.oid)""")


_EXTENSIONS = _list(
    """(
    SELECT jsonb_agg(jsonb_build_array(e.extname, d.deptype) ORDER BY e.extname, d.deptype)
    FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
    WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_extension'::regclass
      AND d.deptype IN ('e', 'x'))"""
)


def _query(index_anatomy: str, statistics_anatomy: str) -> sql.SQL:
    return sql.SQL(
        f"""
        SELECT jsonb_build_object(
            'relation', (SELECT quote_ident(rn.nspname) || '.' || quote_ident(c.relname)
                         FROM pg_namespace rn WHERE rn.oid = c.relnamespace),
            'owner', pg_get_userbyid(c.relowner), 'access_method', m.amname, 'tablespace', s.spcname,
            'options', {_list("to_jsonb(c.reloptions)")},
            'toast_options', {_list("(SELECT to_jsonb(t.reloptions) FROM pg_class t WHERE t.oid = c.reltoastrelid)")},
            'comment', obj_description(c.oid, 'pg_class'), 'replica_identity', c.relreplident,
            'privileges', {_RELATION_ACL}, 'labels', {_seclabels("0")},
            'columns', {_COLUMNS}, 'indexes', {_indexes(index_anatomy)},
            'statistics', {_statistics(statistics_anatomy)}, 'extensions', {_EXTENSIONS}
        ) AS picture
        FROM pg_class c JOIN pg_am m ON m.oid = c.relam LEFT JOIN pg_tablespace s ON s.oid = c.reltablespace
        WHERE c.oid = %(oid)s
        """
    )


#: All that ``picture.py`` makes a picture of, as one JSON object; takes ``oid``.
PICTURE = _query(_INDEX_ANATOMY, _STATISTICS_ANATOMY)
#: The same but for what could be told only while the view may be locked.
PICTURE_WITHOUT_DEFINITIONS = _query("NULL", "NULL")
