"""Which materialized view reads which, as the catalogs say: through plain views, partitions and functions too.

PostgreSQL records what a stored query refers to (``pg_depend``), so nothing is parsed. It cannot see into a function
whose body is a string; ``depends_on`` in a definition says what only people know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter

from psycopg import sql

from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.instructions import Session, Work, fetch_all

#: Everything that the materialized views in ``roots`` (oid) read, with what is read in between: the classes and oids of
#: relations, functions and operators, and by way of which relation. It ends at tables and at other materialized views.
#: UNION bounds it, since views may read each other in a circle. To be followed by a query over
#: ``reads (root, class, object)``, in which each root is itself.
WALK = sql.SQL(
    """
    reads (root, class, object) AS (
        SELECT oid, 'pg_class'::regclass::oid, oid FROM roots
        UNION
        SELECT r.root, d.class, d.object
        FROM reads r CROSS JOIN LATERAL (
            SELECT d.refclassid AS class, d.refobjid AS object
            FROM pg_catalog.pg_rewrite w JOIN pg_catalog.pg_class c ON c.oid = w.ev_class
            JOIN pg_catalog.pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
            WHERE r.class = 'pg_class'::regclass AND w.ev_class = r.object AND w.rulename = '_RETURN'
              AND (c.relkind = 'v' OR c.oid = r.root)
              AND d.refclassid IN ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_operator'::regclass)
              AND NOT (d.refclassid = 'pg_class'::regclass AND d.refobjid = w.ev_class)
            UNION ALL
            SELECT d.refclassid, d.refobjid FROM pg_catalog.pg_depend d
            WHERE r.class <> 'pg_class'::regclass AND d.classid = r.class AND d.objid = r.object AND d.deptype = 'n'
              AND d.refclassid IN ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_operator'::regclass)
            UNION ALL
            SELECT 'pg_class'::regclass, i.inhrelid FROM pg_catalog.pg_inherits i
            WHERE r.class = 'pg_class'::regclass AND i.inhparent = r.object
              -- What DETACH ... CONCURRENTLY was stopped in the middle of is not read any more.
              AND NOT i.inhdetachpending
        ) d
    )
    """
)

#: The name of a relation ``c`` in a schema ``n`` as one would type it.
DISPLAY = sql.SQL(
    "CASE WHEN n.nspname = 'public' THEN quote_ident(c.relname) "
    "ELSE quote_ident(n.nspname) || '.' || quote_ident(c.relname) END"
)

_GRAPH = sql.SQL(
    """
    WITH RECURSIVE roots AS (
        SELECT oid FROM pg_catalog.pg_class WHERE relkind = 'm'
    ), {walk}
    SELECT v.schema, v.name, v.display, ends.needs, ends.sources
    FROM (SELECT c.oid, n.nspname::text AS schema, c.relname::text AS name, {display} AS display
          FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
          WHERE c.relkind = 'm') v
    JOIN LATERAL (
        SELECT coalesce(array_agg({display}) FILTER (WHERE c.relkind = 'm'), '{{}}') AS needs,
               -- A partition is told by the table that it belongs to.
               coalesce(array_agg({display}) FILTER (WHERE c.relkind IN ('r', 'p', 'f') AND NOT c.relispartition),
                        '{{}}') AS sources
        FROM reads r JOIN pg_catalog.pg_class c ON c.oid = r.object
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE r.root = v.oid AND r.class = 'pg_class'::regclass AND r.object <> v.oid
    ) ends ON true
    ORDER BY 1, 2
    """
).format(walk=WALK, display=DISPLAY)


@dataclass(frozen=True)
class Graph:
    """The materialized views of a database and what they read. Names are as one would type them.

    :ivar views: where each stands, by name.
    :ivar needs: of each view, those that it reads; through plain views, functions and inheritance.
    :ivar sources: of each view, the tables and foreign tables that it reads in the same ways.
    :ivar declared: of each view, what is among :attr:`needs` only because people have said so.
    """

    views: Mapping[str, ResolvedName]
    needs: Mapping[str, frozenset[str]]
    sources: Mapping[str, frozenset[str]] = field(default_factory=dict)
    declared: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @cached_property
    def _sorted(self) -> tuple[tuple[str, ...], dict[str, frozenset[str]]]:
        # Lists: a set's order is another one in each process.
        needs = {view: sorted(needed) for view, needed in self.needs.items()}
        while True:
            try:
                order = tuple(TopologicalSorter(needs).static_order())
            except CycleError as error:
                circle: list[str] = error.args[1]
                # Each is needed by the one that follows it. What people say goes before what the server knows, and
                # else always the same one, so that people can see it.
                edges = sorted(zip(circle[1:], circle[:-1], strict=True))
                said = [(needer, needed) for needer, needed in edges if needed in self.declared.get(needer, ())]
                needer, needed = (said or edges)[0]
                needs[needer].remove(needed)
            else:
                return order, {view: frozenset(needed) for view, needed in needs.items()}

    @property
    def order(self) -> tuple[str, ...]:
        """All views, each after those that it reads; a circle is broken, see :attr:`passed_over`."""
        return self._sorted[0]

    @property
    def needs_in_order(self) -> Mapping[str, frozenset[str]]:
        """:attr:`needs` without what is :attr:`passed_over`, and so without circles."""
        return self._sorted[1]

    @property
    def passed_over(self) -> dict[str, frozenset[str]]:
        """Of views that read each other in a circle, the readings that the order cannot follow."""
        kept = self.needs_in_order
        return {view: needed - kept[view] for view, needed in self.needs.items() if needed - kept[view]}

    @property
    def levels(self) -> list[tuple[str, ...]]:
        """The views by level: the first read no other view, each further level reads only those before it."""
        depth: dict[str, int] = {}
        for view in self.order:
            depth[view] = 1 + max((depth[needed] for needed in self.needs_in_order[view]), default=-1)
        levels: list[list[str]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
        for view in self.needs:
            levels[depth[view]].append(view)
        return [tuple(level) for level in levels]

    def needed_by(self, views: Iterable[str]) -> frozenset[str]:
        """Return everything that views read, near and far; without themselves unless they read each other."""
        return _reached(views, self.needs)

    def fed_by(self, views: Iterable[str]) -> frozenset[str]:
        """Return everything that reads views, near and far; without themselves unless they read each other."""
        feeds: dict[str, set[str]] = {view: set() for view in self.needs}
        for view, needed in self.needs.items():
            for each in needed:
                feeds[each].add(view)
        return _reached(views, feeds)

    def mermaid(self, *, sources: bool = False) -> str:
        """Draw it, as text for Mermaid (https://mermaid.js.org/syntax/flowchart.html).

        What the order passes over is dotted.

        :param sources: whether the tables are drawn too.
        """
        names = list(self.needs)
        if sources:
            names += sorted({table for tables in self.sources.values() for table in tables} - set(names))
        numbers = {name: f"n{number}" for number, name in enumerate(names)}
        lines = ["flowchart LR"]
        for name, number in numbers.items():
            shape = '["{}"]' if name in self.needs else '[("{}")]'
            lines.append(f"    {number}{shape.format(_escaped(name))}")
        for view in self.needs:
            if sources:
                lines += [f"    {numbers[table]} --> {numbers[view]}" for table in sorted(self.sources.get(view, ()))]
            for needed in sorted(self.needs[view]):
                arrow = "-->" if needed in self.needs_in_order[view] else "-.->"
                lines.append(f"    {numbers[needed]} {arrow} {numbers[view]}")
        return "\n".join(lines) + "\n"


def read_graph(session: Session = Session.WORK) -> Work[Graph]:
    """Read which materialized views of the database read which, and which tables."""
    rows = yield from fetch_all(_GRAPH, None, session)
    return Graph(
        {row["display"]: ResolvedName(row["schema"], row["name"], row["display"]) for row in rows},
        {row["display"]: frozenset(row["needs"]) for row in rows},
        {row["display"]: frozenset(row["sources"]) for row in rows},
    )


def _reached(begin: Iterable[str], edges: Mapping[str, Iterable[str]]) -> frozenset[str]:
    reached: set[str] = set()
    waiting = list(begin)
    while waiting:
        for following in edges.get(waiting.pop(), ()):
            if following not in reached:
                reached.add(following)
                waiting.append(following)
    return frozenset(reached)


def _escaped(name: str) -> str:
    # Mermaid takes HTML entities without their ampersand: https://mermaid.js.org/syntax/flowchart.html#entity-codes.
    return "".join(
        character if character.isalnum() or character in "_. -" else f"#{ord(character)};" for character in name
    )
