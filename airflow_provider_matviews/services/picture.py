"""The whole picture of a view: everything PostgreSQL keeps about it that a rebuilt one must have too.

One round trip, so that it can be taken while a lock is held. Names are resolved as text under
``search_path = pg_catalog``, which makes the server qualify all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from psycopg import sql

from airflow_provider_matviews.services.instructions import Session, Work, fetch_all, fetch_one


@dataclass(frozen=True)
class Privilege:
    """One entry of an access control list. ``grantee`` None is everybody."""

    grantee: str | None
    grantor: str
    privilege: str
    grantable: bool


@dataclass(frozen=True)
class Label:
    """A security label."""

    provider: str
    label: str


@dataclass(frozen=True)
class ColumnPicture:
    """A column with its settings; None for a setting left at its default.

    :ivar type: identifies it whatever the search path, which differs between the connections.
    """

    name: str
    type: str
    storage: str | None
    compression: str | None
    statistics: int | None
    options: tuple[str, ...]
    comment: str | None
    privileges: tuple[Privilege, ...]
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class IndexPicture:
    """An index.

    :ivar definition: what builds it, with its name and the view's as they were.
    :ivar fingerprint: the same as the catalog holds it, which can be read without a lock.
    """

    name: str
    quoted: str
    definition: str
    fingerprint: str
    unique: bool
    valid: bool
    tablespace: str | None
    statistics: tuple[tuple[int, int], ...]
    comment: str | None
    clustered: bool
    replica_identity: bool
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class StatisticsPicture:
    """An extended statistics object; see :class:`IndexPicture`."""

    schema: str
    name: str
    quoted: str
    owner: str
    definition: str
    fingerprint: str
    target: int | None
    comment: str | None


@dataclass(frozen=True)
class Picture:
    """A materialized view with everything attached to it. Two are equal when nothing differs but OIDs."""

    owner: str
    access_method: str
    tablespace: str | None
    options: tuple[str, ...]
    toast_options: tuple[str, ...]
    comment: str | None
    replica_identity: str
    privileges: tuple[Privilege, ...]
    labels: tuple[Label, ...]
    columns: tuple[ColumnPicture, ...]
    indexes: tuple[IndexPicture, ...]
    statistics: tuple[StatisticsPicture, ...]
    #: (extension, pg_depend.deptype): ``e`` belongs to it, ``x`` goes when it goes.
    extensions: tuple[tuple[str, str], ...]

    def without_definitions(self) -> Picture:
        """Return the picture as it is taken without locks."""
        return replace(
            self,
            indexes=tuple(replace(index, definition="") for index in self.indexes),
            statistics=tuple(replace(each, definition="") for each in self.statistics),
        )

    def differences(self, other: Picture) -> list[str]:
        """Return the names of what differs, for a person."""
        different: list[str] = []
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine == theirs:
                continue
            if isinstance(mine, tuple) and name in ("columns", "indexes", "statistics"):
                changed = {each.name for each in set(mine) ^ set(theirs)}
                different.append(f"{name} ({', '.join(sorted(changed))})")
            else:
                different.append(name.replace("_", " "))
        return different


def take_picture(oid: int, session: Session = Session.WORK, *, definitions: bool = True) -> Work[Picture | None]:
    """Return the picture of a view, or None where it is gone.

    :param session: ``Session.RECORD`` sees the view from outside the operation's transaction: as others left it,
        even after the operation has dropped it.
    :param definitions: False leaves them empty. The functions that give them lock the view (ruleutils.c opens
        it); from outside that would wait for the operation, which waits for the answer.
    """
    row = yield from fetch_one(_PICTURE if definitions else _PICTURE_WITHOUT_DEFINITIONS, {"oid": oid}, session)
    return None if row is None else _picture(row["picture"])


def privileges_of(relation: str) -> Work[tuple[Privilege, ...]]:
    """Return the privileges on a relation, those of its owner too.

    :param relation: its name, quoted.
    """
    row = yield from fetch_one(_PRIVILEGES, (relation,))
    assert row is not None
    return _privileges(row["privileges"])


#: Under these the server's text of a definition says all of it, and is read back as the same.
_FAITHFUL = {
    "search_path": "pg_catalog",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "array_nulls": "on",
    "quote_all_identifiers": "off",
}


def speak_plainly() -> Work[dict[str, str]]:
    """Make the server give definitions with every name qualified and every constant exact; return the settings before.

    As pg_dump does: ``extra_float_digits=0`` or another date style would change constants on their way through text.
    """
    row = yield from fetch_one(
        sql.SQL("SELECT {}").format(
            sql.SQL(", ").join(
                sql.SQL("current_setting({}) AS {}").format(sql.Literal(name), sql.Identifier(name))
                for name in _FAITHFUL
            )
        )
    )
    assert row is not None
    yield from restore_settings(_FAITHFUL)
    return dict(row)


def restore_settings(settings: Mapping[str, str]) -> Work[None]:
    """Set them for this transaction: those from before, since the query runs under them."""
    yield from fetch_all(
        sql.SQL("SELECT {}").format(
            sql.SQL(", ").join(
                sql.SQL("set_config({}, {}, true)").format(sql.Literal(name), sql.Literal(value))
                for name, value in settings.items()
            )
        )
    )


def _privileges(rows: Iterable[Mapping[str, Any]]) -> tuple[Privilege, ...]:
    return tuple(Privilege(**row) for row in rows)


def _labels(rows: Iterable[Mapping[str, Any]]) -> tuple[Label, ...]:
    return tuple(Label(**row) for row in rows)


def _picture(data: dict[str, Any]) -> Picture:
    columns = tuple(
        ColumnPicture(
            **{
                **column,
                "options": tuple(column["options"]),
                "privileges": _privileges(column["privileges"]),
                "labels": _labels(column["labels"]),
            }
        )
        for column in data["columns"]
    )
    indexes = tuple(
        IndexPicture(
            **{
                **index,
                "statistics": tuple((number, target) for number, target in index["statistics"]),
                "extensions": tuple(index["extensions"]),
            }
        )
        for index in data["indexes"]
    )
    return Picture(
        **{
            **data,
            "options": tuple(data["options"]),
            "toast_options": tuple(data["toast_options"]),
            "privileges": _privileges(data["privileges"]),
            "labels": _labels(data["labels"]),
            "columns": columns,
            "indexes": indexes,
            "statistics": tuple(StatisticsPicture(**each) for each in data["statistics"]),
            "extensions": tuple((name, kind) for name, kind in data["extensions"]),
        }
    )


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
_PRIVILEGES = sql.SQL(f"SELECT {_RELATION_ACL} AS privileges FROM pg_class c WHERE c.oid = %s::regclass")
# Without what the server keeps there itself: pg_attver, since PostgreSQL 15.20, which nobody can set (measured).
_COLUMN_OPTIONS = _list(
    "(SELECT jsonb_agg(option) FROM unnest(a.attoptions) AS option WHERE NOT starts_with(option, 'pg_'))"
)
_COLUMNS = _list(
    f"""(
    SELECT jsonb_agg(jsonb_build_object(
        'name', a.attname, 'type', tn.nspname || '.' || t.typname || ' ' || a.atttypmod || ' ' || a.attcollation,
        'storage', CASE WHEN a.attstorage <> t.typstorage THEN a.attstorage END,
        'compression', nullif(a.attcompression, ''),
        'statistics', CASE WHEN a.attstattarget >= 0 THEN a.attstattarget END,
        'options', {_COLUMN_OPTIONS}, 'comment', col_description(c.oid, a.attnum),
        'privileges', {_acl("a.attacl")}, 'labels', {_seclabels("a.attnum")}) ORDER BY a.attnum)
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)"""
)


def _indexes(definition: str) -> str:
    return _list(f"""(
    SELECT jsonb_agg(jsonb_build_object(
        'name', i.relname, 'quoted', quote_ident(i.relname), 'definition', {definition}, 'unique', x.indisunique,
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


def _statistics(definition: str) -> str:
    return _list(f"""(
    SELECT jsonb_agg(jsonb_build_object(
        'schema', n.nspname, 'name', s.stxname, 'quoted', quote_ident(n.nspname) || '.' || quote_ident(s.stxname),
        'owner', pg_get_userbyid(s.stxowner),
        'definition', {definition},
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


def _query(index_definition: str, statistics_definition: str) -> sql.SQL:
    return sql.SQL(
        f"""
        SELECT jsonb_build_object(
            'owner', pg_get_userbyid(c.relowner), 'access_method', m.amname, 'tablespace', s.spcname,
            'options', {_list("to_jsonb(c.reloptions)")},
            'toast_options', {_list("(SELECT to_jsonb(t.reloptions) FROM pg_class t WHERE t.oid = c.reltoastrelid)")},
            'comment', obj_description(c.oid, 'pg_class'), 'replica_identity', c.relreplident,
            'privileges', {_RELATION_ACL}, 'labels', {_seclabels("0")},
            'columns', {_COLUMNS}, 'indexes', {_indexes(index_definition)},
            'statistics', {_statistics(statistics_definition)}, 'extensions', {_EXTENSIONS}
        ) AS picture
        FROM pg_class c JOIN pg_am m ON m.oid = c.relam LEFT JOIN pg_tablespace s ON s.oid = c.reltablespace
        WHERE c.oid = %(oid)s
        """
    )


_PICTURE = _query("pg_get_indexdef(i.oid)", "pg_get_statisticsobjdef(s.oid)")
_PICTURE_WITHOUT_DEFINITIONS = _query("''", "''")
