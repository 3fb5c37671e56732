"""Two multisets of rows compared as they are shown: what differs, by example, and whether it is but rounding.

Two rows are the same when every value in them is shown the same, as PostgreSQL's output functions show it. That is at
least as strict as ``=`` and close to what REFRESH ... CONCURRENTLY goes by (``*=``, the record image): numeric 1.0 and
1.00, or 'a' and 'A' of citext, are not the same though they are equal; a float's NaN is the same as a NaN, and NULL as
NULL. It holds for types without any equality (json, xml, point), and a difference that nobody can see is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from psycopg import sql

from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.instructions import raw

#: Of the differing rows of either side, so many are looked at.
MOST_SEEN = 500
#: Characters of a row that are looked at. What is left out of a wider one is not compared any closer.
_WIDEST = 65536
#: Characters of either side that are looked at in all: an event loop stands still while they are read.
_MOST_READ = 2_000_000
#: Characters that are told of one value, and of one row.
_VALUE, _ROW = 60, 300
#: Relative differences of floating-point numbers that the order of their addition explains.
_ROUNDING = {"double precision": 1e-9, "real": 1e-5}

#: As much as there is of a value, between quotation marks and without them.
_INSIDE, _OUTSIDE = re.compile(r'(?:[^"\\]+|""|\\\\)+'), re.compile(r'[^",)]+')

Kind = Literal["changed", "missing", "surplus"]


@dataclass(frozen=True)
class ComparedColumn:
    """A column of a view.

    :ivar type: as ``format_type`` says it, without modifiers.
    :ivar equality: where it is a key's: the operator by which its index finds it, for a statement; None for arrays,
        which cannot be looked for several at once.
    """

    name: str
    type: str
    equality: str | None = None


@dataclass(frozen=True)
class Sides:
    """A view and its query, put so that their rows can be compared.

    :ivar query: as PostgreSQL words it, without a semicolon.
    :ivar columns: of the view, in order.
    :ivar key: places in ``columns`` of those that a unique index is over; empty where there is none.
    """

    view: ResolvedName
    query: str
    columns: tuple[ComparedColumn, ...]
    key: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """The places of the columns in a row's text: those of the key first, so that texts sort by it."""
        return (*self.key, *(place for place in range(len(self.columns)) if place not in self.key))

    def text(self, places: Sequence[int] | None = None) -> sql.Composable:
        """Return the expression of a row's text.

        An anonymous row, and not one of the view's own type, for which people can make a cast to text of their own.

        :param places: only of these columns.
        """
        parts = [sql.SQL("x.") + _column(place) for place in (self.order if places is None else places)]
        return sql.SQL('ROW({})::text COLLATE "C"').format(sql.SQL(", ").join(parts))

    @property
    def of_query(self) -> sql.Composable:
        """The query as an item of FROM. Its columns are numbered: names in it may be anything, and the same twice."""
        # On lines of its own: a comment in it ends there.
        return sql.SQL("(\n{}\n) AS x{}").format(raw(self.query), self._columns)

    @property
    def of_view(self) -> sql.Composable:
        """The view as an item of FROM."""
        return sql.SQL("{} AS x{}").format(self.view.identifier, self._columns)

    @property
    def _columns(self) -> sql.Composable:
        if not self.columns:
            return sql.SQL("")
        return sql.SQL(" ({})").format(sql.SQL(", ").join(map(_column, range(len(self.columns)))))

    def both(self, condition: sql.Composable | None = None) -> sql.Composable:
        """Return the rows of both sides as texts ``r``, with 1 for the query's and -1 for the view's as ``s``.

        :param condition: which rows; None for all.
        """
        where = sql.SQL("") if condition is None else sql.SQL(" WHERE {}").format(condition)
        return sql.SQL(
            "SELECT {row} AS r, 1 AS s FROM {query}{where} UNION ALL SELECT {row}, -1 FROM {view}{where}"
        ).format(row=self.text(), query=self.of_query, view=self.of_view, where=where)

    def differences(self, condition: sql.Composable | None = None) -> sql.Composable:
        """Return the statement that compares both sides as multisets, in one pass, and tells what differs.

        What EXCEPT ALL both ways means, by one sort of both sides, which spills to temporary files beyond ``work_mem``.
        Left to choose, the planner hashes, since it takes 200 for the number of different texts; that spills too, and
        took twice as long (measured with 4 million texts: 13 s, the sort 7 s). EXCEPT ALL twice over the same texts
        took half as long again, and runs the query twice. A FULL JOIN over the unique index takes a third to a half
        of the time, but takes for granted that no key is twice on either side, and an equality of every type does not
        tell 1.0 from 1.00.
        """
        return sql.SQL(
            """
            WITH difference AS MATERIALIZED (
                SELECT t.r, sum(t.s) AS n FROM ({both} ORDER BY 1) t GROUP BY t.r HAVING sum(t.s) <> 0
            ), seen AS (
                (SELECT left(r, {widest}) AS r, n FROM difference WHERE n > 0 ORDER BY difference.r LIMIT {most})
                UNION ALL
                (SELECT left(r, {widest}), n FROM difference WHERE n < 0 ORDER BY difference.r LIMIT {most})
            ), bounded AS (
                SELECT r, n, sum(length(r)) OVER (PARTITION BY n > 0 ORDER BY r ROWS UNBOUNDED PRECEDING) AS read
                FROM seen
            )
            SELECT seen.r, seen.n::bigint AS n, totals.* FROM (
                SELECT coalesce(sum(n) FILTER (WHERE n > 0), 0)::bigint AS missing,
                       coalesce(-sum(n) FILTER (WHERE n < 0), 0)::bigint AS surplus,
                       count(*) FILTER (WHERE n > 0) AS missing_groups,
                       count(*) FILTER (WHERE n < 0) AS surplus_groups,
                       (SELECT count(*) FROM {view}) AS view_rows
                FROM difference) totals LEFT JOIN bounded seen ON seen.read <= {read}
            """
        ).format(
            both=self.both(condition),
            widest=sql.Literal(_WIDEST),
            most=sql.Literal(MOST_SEEN),
            read=sql.Literal(_MOST_READ),
            view=self.of_view if condition is None else sql.SQL("{} WHERE {}").format(self.of_view, condition),
        )

    @property
    def checksums(self) -> sql.Composable:
        """The statement that counts the rows of both sides and adds up a 64-bit hash of each."""
        side = sql.SQL("SELECT count(*) AS n, sum(pg_catalog.hashtextextended({}, 0)) AS sum FROM {}")
        return sql.SQL(
            "SELECT q.n AS query_rows, v.n AS view_rows, q.sum IS NOT DISTINCT FROM v.sum AS same FROM ({}) q, ({}) v"
        ).format(side.format(self.text(), self.of_query), side.format(self.text(), self.of_view))

    def sample(self, rows: int, seed: int, *, share: float, by_page: bool) -> sql.Composable:
        """Return the statement that picks rows of the view at random.

        Each is told by the text ``r`` of its key, or, where it has none or NULL in it, by a hash ``h`` of all of it;
        and by its place ``at``.

        :param rows: how many at the most.
        :param seed: the same one picks the same rows of the same view.
        :param share: of all its rows, from 0 to 1, among which to pick.
        :param by_page: whether whole pages are read or left out, and not single rows.
        """
        return sql.SQL(
            """
            SELECT t.at::text AS at, CASE WHEN t.keyed THEN t.r END AS r,
                   CASE WHEN NOT t.keyed THEN pg_catalog.hashtextextended(t.r, 0) END AS h
            FROM (SELECT x.ctid AS at, {keyed} AS keyed, CASE WHEN {keyed} THEN {key} ELSE {row} END AS r
                  FROM {view} TABLESAMPLE {method} ({percent}) REPEATABLE ({seed})) t
            ORDER BY pg_catalog.hashtextextended(t.r, {seed}), t.r LIMIT {rows}
            """
        ).format(
            keyed=sql.SQL("NOT ({})").format(self._keyless),
            key=self.text(self.key or None),
            row=self.text(),
            view=self.of_view,
            method=sql.SQL("SYSTEM" if by_page else "BERNOULLI"),
            percent=sql.Literal(round(100 * share, 6)),
            seed=sql.Literal(seed),
            rows=sql.Literal(rows),
        )

    @property
    def _keyless(self) -> sql.Composable:
        """The condition that a row cannot be told by its key."""
        nulls: list[sql.Composable] = [sql.SQL("x.{} IS NULL").format(_column(place)) for place in self.key]
        return sql.SQL(" OR ").join(nulls or [sql.SQL("true")])

    def keys_at(self, places: Sequence[str]) -> sql.Composable:
        """Return the statement that reads the keys, as texts ``r``, of the rows at some places (``ctid``)."""
        return sql.SQL("SELECT {} AS r FROM {} WHERE x.ctid = ANY ({}::tid[])").format(
            self.text(self.key), self.of_view, _array(places)
        )

    def among(self, sampled: Sequence[Mapping[str, Any]], constants: Sequence[str]) -> sql.Composable:
        """Return the condition that a row is among those that were sampled.

        :param constants: the keys of those that have one, as texts that can be read back as they are.

        By the key's own operators first, each with constants: the planner passes these on into the query, down to the
        indexes of what it reads and through GROUP BY over the key (to be seen in EXPLAIN).
        """
        ways: list[sql.Composable] = []
        hashes = [row["h"] for row in sampled if row["h"] is not None]
        if hashes:
            ways.append(
                sql.SQL("({}) AND pg_catalog.hashtextextended({}, 0) = ANY ({}::bigint[])").format(
                    self._keyless, self.text(), sql.Literal(hashes)
                )
            )
        keys = [row["r"] for row in sampled if row["r"] is not None]
        if keys:
            ways.append(self._by_key(keys, [parse_row(each) for each in constants]))
        return sql.SQL(" OR ").join(sql.SQL("({})").format(way) for way in ways)

    def _by_key(self, keys: Sequence[str], values: Sequence[Sequence[str | None]]) -> sql.Composable:
        parts = []
        for number, place in enumerate(self.key):
            column = self.columns[place]
            if column.equality is None:
                continue
            constants = sorted({str(each[number]) for each in values})
            parts.append(
                sql.SQL("x.{} {} ANY ({}::{}[])").format(
                    _column(place), raw(column.equality), _array(constants), raw(column.type)
                )
            )
        parts.append(sql.SQL("{} = ANY ({}::text[])").format(self.text(self.key), _array(keys)))
        return sql.SQL(" AND ").join(parts)


def _array(values: Sequence[str]) -> sql.Composable:
    """Return an array as one literal, which the server reads once: a cast of text to dates it would make for each row.

    See https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO.
    """
    quoted = ('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values)
    return sql.Literal(f"{{{','.join(quoted)}}}")


def _column(place: int) -> sql.Identifier:
    return sql.Identifier(f"c{place + 1}")


@dataclass(frozen=True)
class Example:
    """A row, or two of one key, in which a view and its query differ.

    :ivar kind: ``missing`` (the query has it, the view lacks it), ``surplus`` (the other way round) or ``changed``.
    :ivar row: column -> value as it is shown, None for NULL; of a changed one only its key.
    :ivar values: of a changed one, of every column that differs, its value in the view and by the query.
    :ivar times: how many of it are missing or surplus.
    :ivar rounding: whether they differ by no more than the order of additions explains.
    """

    kind: Kind
    row: Mapping[str, str | None]
    values: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    times: int = 1
    rounding: bool = False

    def line(self, redact: Callable[[str], str] = str) -> str:
        """Return it in one line for a person.

        :param redact: takes secrets out of text.
        """
        row = ", ".join(f"{one_line(name)}={_shown(value, redact)}" for name, value in self.row.items())
        if self.kind == "changed":
            told = ", ".join(
                f"{one_line(name)} {_shown(view, redact)} in the view, {_shown(query, redact)} by its query"
                for name, (view, query) in self.values.items()
            )
            return _cut(f"{row}: {told}", 2 * _ROW)
        where = (
            "its query has it, the view lacks it" if self.kind == "missing" else "the view has it, its query does not"
        )
        times = f" ({self.times} times)" if self.times > 1 else ""
        return f"{_cut(row, _ROW) or 'a row without columns'}: {where}{times}"

    def as_dict(self, redact: Callable[[str], str] = str) -> dict[str, Any]:
        """Return it as plain data, its values cut to a sane length.

        :param redact: takes secrets out of text.
        """

        def told(value: str | None) -> str | None:
            return None if value is None else _cut(redact(value), _VALUE)

        row = {name: told(value) for name, value in list(self.row.items())[:50]}
        result: dict[str, Any] = {"kind": self.kind, "row": row, "times": self.times, "line": self.line(redact)}
        if self.kind == "changed":
            result["values"] = {
                name: {"view": told(view), "query": told(query)}
                for name, (view, query) in list(self.values.items())[:50]
            }
        return result


@dataclass(frozen=True)
class Differences:
    """What differs between a view and its query.

    :ivar missing: rows that the query has and the view lacks, as multisets.
    :ivar surplus: rows that the view has and the query does not.
    :ivar changed: how many of these are one row of the same key; None where that is not known, since there is no unique
        index, or since there are more than are looked at.
    :ivar rounding: whether all of it is but rounding; False where not all of it was looked at.
    """

    missing: int
    surplus: int
    view_rows: int
    changed: int | None = None
    rounding: bool = False
    examples: tuple[Example, ...] = ()

    @property
    def query_rows(self) -> int:
        """How many rows the query has."""
        return self.view_rows + self.missing - self.surplus


def read_differences(sides: Sides, rows: Sequence[Mapping[str, Any]], examples: int) -> Differences:
    """Make sense of what :meth:`Sides.differences` answers.

    :param examples: how many to tell at the most, of each kind.
    """
    totals = rows[0]
    found = Differences(totals["missing"], totals["surplus"], totals["view_rows"])
    if not found.missing and not found.surplus:
        return found
    missing = [(parse_row(row["r"]), row["n"], row["r"]) for row in rows if row["n"] > 0]
    surplus = [(parse_row(row["r"]), -row["n"], row["r"]) for row in rows if row["n"] < 0]
    whole = len(missing) == totals["missing_groups"] and len(surplus) == totals["surplus_groups"]
    if not whole:
        # What comes after the last one of the shorter list may have its other half among those that were not seen.
        last = [
            max(row[2] for row in each)
            for each, groups in ((missing, totals["missing_groups"]), (surplus, totals["surplus_groups"]))
            if len(each) < groups
        ]
        missing, surplus = _up_to(min(last), len(sides.key), missing, surplus)
    told = list(_pair(sides, missing, surplus))
    changed = sum(each.kind == "changed" for each in told) if sides.key and whole else None
    few = tuple(
        each for kind in ("changed", "missing", "surplus") for each in [e for e in told if e.kind == kind][:examples]
    )
    rounding = whole and bool(told) and all(each.rounding for each in told)
    return replace(found, changed=changed, rounding=rounding, examples=few)


_Row = tuple[list[str | None], int, str]


def _up_to(last: str, size: int, *sides: Sequence[_Row]) -> list[list[_Row]]:
    """Return the rows of the keys before that of a row's text, which are all there; all rows where that leaves none."""
    key = parse_row(last)[:size]
    kept = [[row for row in side if row[2] <= last and (not size or row[0][:size] != key)] for side in sides]
    return kept if any(kept) else [list(side) for side in sides]


def _pair(sides: Sides, missing: Sequence[_Row], surplus: Sequence[_Row]) -> Iterator[Example]:
    """Put together the missing and the surplus row of each key, where it has exactly one of each."""
    size = len(sides.key)
    halves: dict[tuple[str | None, ...], tuple[list[_Row], list[_Row]]] = {}
    for side, rows in enumerate((missing, surplus)):
        for row in rows:
            halves.setdefault(tuple(row[0][:size]) if size else (str(side), row[2]), ([], []))[side].append(row)
    names = [sides.columns[place].name for place in sides.order]
    types = [sides.columns[place].type for place in sides.order]
    for lacking, having in halves.values():
        if size and len(lacking) == len(having) == 1 and lacking[0][1] == having[0][1] == 1:
            by_query, in_view = lacking[0][0], having[0][0]
            differing = [
                place for place, (one, other) in enumerate(zip(in_view, by_query, strict=False)) if one != other
            ]
            yield Example(
                "changed",
                dict(zip(names[:size], by_query, strict=False)),
                {names[place]: (in_view[place], by_query[place]) for place in differing},
                rounding=bool(differing)
                and all(_is_rounding(types[place], in_view[place], by_query[place]) for place in differing),
            )
            continue
        for kind, rows in (("missing", lacking), ("surplus", having)):
            for values, times, _ in rows:
                yield Example(kind, dict(zip(names, values, strict=False)), times=times)  # type: ignore[arg-type]


def _is_rounding(kind: str, one: str | None, other: str | None) -> bool:
    tolerance = _ROUNDING.get(kind)
    if tolerance is None or one is None or other is None:
        return False
    first, second = float(one), float(other)
    return math.isfinite(first) and math.isfinite(second) and math.isclose(first, second, rel_tol=tolerance)


def parse_row(text: str) -> list[str | None]:
    """Return the values of a row as PostgreSQL shows it: ``(17,"two words",)``; None for NULL.

    See https://www.postgresql.org/docs/current/rowtypes.html#ROWTYPES-IO-SYNTAX. A text that was cut off gives the
    values as far as they go. ``()`` is a row of one NULL, or of no column at all.
    """
    values: list[str | None] = []
    place, end = 1, len(text)
    while True:
        value: list[str] = []
        quoted = inside = False
        while place < end:
            # Sign by sign it took an event loop a second for what it now takes milliseconds.
            stride = (_INSIDE if inside else _OUTSIDE).match(text, place)
            if stride:
                part = stride.group()
                value.append(part.replace('""', '"').replace("\\\\", "\\") if inside else part)
                place = stride.end()
                continue
            sign = text[place]
            if sign == '"':
                inside = not inside
                quoted = True
            elif inside:
                value.append(sign)
            else:
                break
            place += 1
        values.append("".join(value) if value or quoted else None)
        if place >= end or text[place] == ")":
            return values
        place += 1


def one_line(text: str) -> str:
    """Return text as it is where it can be printed in one line, else with its odd characters escaped."""
    return text if text.isprintable() else repr(text)


def _shown(value: str | None, redact: Callable[[str], str]) -> str:
    if value is None:
        return "NULL"
    told = one_line(_cut(redact(value), _VALUE))
    return told if told and told == told.strip() else f"'{told}'"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"
