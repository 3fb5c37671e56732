"""What a view has beside its query and its rows, as a list to read: for refusals that name things, and for people.

``picture.py`` holds the same in a form to build from.
"""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from airflow_provider_matviews.services.instructions import Session, Work, fetch_all


@dataclass(frozen=True)
class Attachment:
    """Something a view has that a rebuild from its definition alone would lose.

    :ivar kind: ``index``, ``privilege``, ``comment``, ``option``, ``statistics`` ...
    :ivar key: what identifies it among its kind.
    :ivar description: for a person.
    """

    kind: str
    key: str
    description: str


def attachments_of(oid: int, session: Session = Session.WORK) -> Work[list[Attachment]]:
    """Return everything a view has beside its query and its rows, as ``postgres`` keeps it in the catalogs."""
    rows = yield from fetch_all(_ATTACHMENTS, {"oid": oid}, session)
    return [Attachment(**row) for row in rows]


_ATTACHMENTS = sql.SQL(
    """
    SELECT 'index' AS kind, i.relname::text AS key, 'index ' || quote_ident(i.relname) AS description
    FROM pg_catalog.pg_index x JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid WHERE x.indrelid = %(oid)s
    UNION ALL
    SELECT 'privilege', g.grantee || ' ' || g.privilege_type,
           format('%%s granted to %%I', g.privilege_type, g.grantee)
    FROM pg_catalog.pg_class c, LATERAL (
        SELECT CASE WHEN a.grantee = 0 THEN 'public' ELSE pg_get_userbyid(a.grantee) END::text AS grantee,
               a.privilege_type
        FROM aclexplode(c.relacl) a WHERE a.grantee <> c.relowner) g
    WHERE c.oid = %(oid)s
    UNION ALL
    SELECT 'grant option', pg_get_userbyid(a.grantee)::text,
           format('the right of %%I to grant %%s to others', pg_get_userbyid(a.grantee), a.privilege_type)
    FROM pg_catalog.pg_class c, aclexplode(c.relacl) a
    WHERE c.oid = %(oid)s AND a.is_grantable AND a.grantee <> c.relowner
    UNION ALL
    SELECT 'column privilege', a.attname::text, 'privileges on column ' || quote_ident(a.attname)
    FROM pg_catalog.pg_attribute a WHERE a.attrelid = %(oid)s AND a.attacl IS NOT NULL
    UNION ALL
    SELECT 'comment', '', 'its comment'
    FROM pg_catalog.pg_description d
    WHERE d.classoid = 'pg_class'::regclass AND d.objoid = %(oid)s AND d.objsubid = 0
    UNION ALL
    SELECT 'column comment', a.attname::text, 'comment on column ' || quote_ident(a.attname)
    FROM pg_catalog.pg_description d
    JOIN pg_catalog.pg_attribute a ON a.attrelid = d.objoid AND a.attnum = d.objsubid
    WHERE d.classoid = 'pg_class'::regclass AND d.objoid = %(oid)s AND d.objsubid > 0
    UNION ALL
    SELECT 'index comment', i.relname::text, 'comment on index ' || quote_ident(i.relname)
    FROM pg_catalog.pg_index x JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
    JOIN pg_catalog.pg_description d ON d.classoid = 'pg_class'::regclass AND d.objoid = i.oid
    WHERE x.indrelid = %(oid)s
    UNION ALL
    SELECT 'option', split_part(option, '=', 1), 'storage parameter ' || option
    FROM pg_catalog.pg_class c, unnest(c.reloptions) AS option WHERE c.oid = %(oid)s
    UNION ALL
    SELECT 'option', 'toast.' || split_part(option, '=', 1), 'storage parameter toast.' || option
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_class t ON t.oid = c.reltoastrelid, unnest(t.reloptions) AS option
    WHERE c.oid = %(oid)s
    UNION ALL
    SELECT 'tablespace', s.spcname::text, 'tablespace ' || quote_ident(s.spcname)
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_tablespace s ON s.oid = c.reltablespace WHERE c.oid = %(oid)s
    UNION ALL
    SELECT 'access method', m.amname::text, 'access method ' || quote_ident(m.amname)
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_am m ON m.oid = c.relam
    WHERE c.oid = %(oid)s AND m.amname <> current_setting('default_table_access_method')
    UNION ALL
    SELECT 'column setting', a.attname::text,
           'storage, compression, statistics or options of column ' || quote_ident(a.attname)
    FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped
      AND (a.attstorage <> t.typstorage OR a.attcompression <> '' OR coalesce(a.attstattarget, -1) >= 0
           -- What the server keeps there itself is nobody's setting: pg_attver, since PostgreSQL 15.20.
           OR EXISTS (SELECT FROM unnest(a.attoptions) AS option WHERE NOT starts_with(option, 'pg_')))
    UNION ALL
    SELECT 'index setting', i.relname::text,
           format('statistics target of column %%s of index %%I', a.attnum, i.relname)
    FROM pg_catalog.pg_index x JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
    JOIN pg_catalog.pg_attribute a ON a.attrelid = i.oid
    WHERE x.indrelid = %(oid)s AND coalesce(a.attstattarget, -1) >= 0
    UNION ALL
    SELECT 'statistics', s.stxname::text, 'extended statistics ' || quote_ident(s.stxname)
    FROM pg_catalog.pg_statistic_ext s WHERE s.stxrelid = %(oid)s
    UNION ALL
    SELECT 'security label', l.provider, 'security label of ' || l.provider
    FROM pg_catalog.pg_seclabel l WHERE l.classoid = 'pg_class'::regclass AND l.objoid = %(oid)s
    UNION ALL
    SELECT 'replica identity', c.relreplident::text, 'a replica identity of its own'
    FROM pg_catalog.pg_class c WHERE c.oid = %(oid)s AND c.relreplident <> 'd'
    UNION ALL
    SELECT 'cluster', i.relname::text, 'CLUSTER mark on index ' || quote_ident(i.relname)
    FROM pg_catalog.pg_index x JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
    WHERE x.indrelid = %(oid)s AND x.indisclustered
    UNION ALL
    SELECT 'extension', e.extname::text, 'a tie to extension ' || quote_ident(e.extname)
    FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
    WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_extension'::regclass AND d.deptype IN ('e', 'x')
      AND (d.objid = %(oid)s
           OR d.objid IN (SELECT x.indexrelid FROM pg_catalog.pg_index x WHERE x.indrelid = %(oid)s))
    ORDER BY 1, 2
    """
)
