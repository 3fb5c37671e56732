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
class KeyPicture:
    """One key of an index.

    :ivar column: None for an expression.
    :ivar expression: None for a column.
    :ivar usual_operator_class: whether it is the one that is taken where none is named.
    :ivar usual_collation: likewise.
    """

    column: str | None
    expression: str | None
    operator_class: str
    usual_operator_class: bool
    operator_class_options: tuple[str, ...]
    collation: str | None
    usual_collation: bool
    descending: bool
    nulls_first: bool

    @property
    def text(self) -> str:
        """What stands for it in a definition."""
        text = f"({self.expression})" if self.column is None else _quoted(self.column)
        if self.collation is not None:
            text += f" COLLATE {self.collation}"
        text += f" {self.operator_class}"
        if options := _settings(self.operator_class_options):
            text += f" ({options})"
        # Only methods that can order have either; what is said is said in full.
        if self.descending:
            text += " DESC" if self.nulls_first else " DESC NULLS LAST"
        elif self.nulls_first:
            text += " NULLS FIRST"
        return text


@dataclass(frozen=True)
class IndexShape:
    """What makes an index the index it is; all else about it can be altered."""

    method: str
    unique: bool
    nulls_not_distinct: bool
    keys: tuple[KeyPicture, ...]
    include: tuple[str, ...]
    predicate: str | None

    def body(self, options: Iterable[str]) -> str:
        """Return the definition from the method on, for an index with these options."""
        text = f"{_quoted(self.method)} ({', '.join(key.text for key in self.keys)})"
        if self.include:
            text += f" INCLUDE ({', '.join(map(_quoted, self.include))})"
        if self.nulls_not_distinct:
            text += " NULLS NOT DISTINCT"
        if with_ := _settings(options):
            text += f" WITH ({with_})"
        return text if self.predicate is None else f"{text} WHERE {self.predicate}"


@dataclass(frozen=True)
class IndexAnatomy:
    """What can be told of an index only while its view may be locked.

    :ivar body: its definition from the method on, without its name and the view's; None where not understood.
    :ivar reads: the view's columns that it reads.
    """

    definition: str
    body: str | None
    shape: IndexShape
    options: tuple[str, ...]
    reads: tuple[str, ...]


@dataclass(frozen=True)
class StatisticsAnatomy:
    """What can be told of extended statistics only while their view may be locked; see :class:`IndexAnatomy`.

    :ivar body: the definition without their name and the view's: ``(kinds) ON a, b``.
    """

    definition: str
    body: str | None
    columns: tuple[str, ...]
    expressions: tuple[str, ...]
    kinds: tuple[str, ...]
    reads: tuple[str, ...]

    def worded(self) -> str:
        """Return the definition without their name and the view's, made of its parts."""
        kinds = f"({', '.join(self.kinds)}) " if self.kinds else ""
        subjects = [*map(_quoted, self.columns), *(f"({expression})" for expression in self.expressions)]
        return f"{kinds}ON {', '.join(subjects)}"


@dataclass(frozen=True)
class IndexPicture:
    """An index.

    :ivar anatomy: None where no lock could be waited for.
    :ivar fingerprint: the same as the catalog holds it, which can be read without a lock.
    """

    name: str
    anatomy: IndexAnatomy | None
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
    owner: str
    anatomy: StatisticsAnatomy | None
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
            indexes=tuple(replace(index, anatomy=None) for index in self.indexes),
            statistics=tuple(replace(each, anatomy=None) for each in self.statistics),
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


def _quoted(name: str) -> str:
    return sql.Identifier(name).as_string(None)


def _settings(options: Iterable[str]) -> str:
    pairs = (option.partition("=") for option in options)
    return ", ".join(f"{_quoted(name)} = {sql.Literal(value).as_string(None)}" for name, _, value in pairs)


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
    relation = data.pop("relation")
    indexes = tuple(
        IndexPicture(
            **{
                **index,
                "anatomy": _index_anatomy(index["anatomy"], relation),
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
            "statistics": tuple(
                StatisticsPicture(**{**each, "anatomy": _statistics_anatomy(each["anatomy"], relation)})
                for each in data["statistics"]
            ),
            "extensions": tuple((name, kind) for name, kind in data["extensions"]),
        }
    )


def _index_anatomy(data: dict[str, Any] | None, relation: str) -> IndexAnatomy | None:
    if data is None:
        return None
    shape = data["shape"]
    keys = tuple(
        KeyPicture(
            **{
                **key,
                "expression": _without_parentheses(key["expression"]),
                "operator_class_options": tuple(key["operator_class_options"]),
            }
        )
        for key in shape["keys"]
    )
    kind = "CREATE UNIQUE INDEX" if shape["unique"] else "CREATE INDEX"
    return IndexAnatomy(
        definition=data["definition"],
        body=_between(data["definition"], f"{kind} {data['quoted']} ON {relation} USING ", ""),
        shape=IndexShape(**{**shape, "keys": keys, "include": tuple(shape["include"])}),
        options=tuple(data["options"]),
        reads=tuple(data["reads"]),
    )


def _statistics_anatomy(data: dict[str, Any] | None, relation: str) -> StatisticsAnatomy | None:
    if data is None:
        return None
    return StatisticsAnatomy(
        definition=data["definition"],
        body=_between(data["definition"], f"CREATE STATISTICS {data['quoted']} ", f" FROM {relation}"),
        columns=tuple(data["columns"]),
        expressions=tuple(data["expressions"]),
        kinds=tuple(data["kinds"]),
        reads=tuple(data["reads"]),
    )


def _between(definition: str, prefix: str, suffix: str) -> str | None:
    """Return a definition without the names in it.

    The server's text begins with names that it quotes itself; what is not exactly as expected is not guessed at.
    """
    if not (definition.startswith(prefix) and definition.endswith(suffix)):
        return None
    return definition[len(prefix) : len(definition) - len(suffix)]


def _without_parentheses(expression: str | None) -> str | None:
    # The server puts them around whatever is no mere function call, and around nothing else.
    if expression is not None and expression.startswith("("):
        return expression[1:-1]
    return expression


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


_PICTURE = _query(_INDEX_ANATOMY, _STATISTICS_ANATOMY)
_PICTURE_WITHOUT_DEFINITIONS = _query("NULL", "NULL")
