"""Which view reads which: what the catalogs say of it, in which order, and how it is drawn."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.graph import Graph
from tests.conftest import Database, examples, hook_on

NAMES = [f"v{number}" for number in range(8)]


def _graph(needs: dict[str, set[str]]) -> Graph:
    return Graph(
        {name: ResolvedName("public", name, name) for name in needs},
        {name: frozenset(needed) for name, needed in needs.items()},
    )


def test_it_is_read_through_whatever_a_query_can_read_through(each_db: Database) -> None:
    each_db.execute(
        'CREATE SCHEMA "Odd one"',
        "CREATE TABLE plain (a int)",
        "CREATE TABLE parted (a int) PARTITION BY RANGE (a)",
        "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE parent (a int)",
        "CREATE TABLE child () INHERITS (parent)",
        "CREATE MATERIALIZED VIEW base AS SELECT a FROM plain",
        "CREATE VIEW v AS SELECT a FROM base",
        "CREATE VIEW w AS SELECT a FROM v UNION ALL SELECT a FROM parted",
        'CREATE MATERIALIZED VIEW "Odd one"."Through views" AS SELECT a FROM w',
        "CREATE FUNCTION f() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM base; END",
        "CREATE FUNCTION plus_f(int) RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT $1 + f(); END",
        "CREATE OPERATOR @@@ (rightarg = int, function = plus_f)",
        "CREATE MATERIALIZED VIEW through_function AS SELECT f()",
        "CREATE MATERIALIZED VIEW through_operator AS SELECT @@@ 1",
        "CREATE MATERIALIZED VIEW inherited AS SELECT a FROM parent",
        "CREATE MATERIALIZED VIEW in_subquery AS SELECT 1 WHERE EXISTS (WITH x AS (TABLE inherited) SELECT FROM x)",
        "CREATE MATERIALIZED VIEW alone AS SELECT 1",
    )
    graph = hook_on(each_db).graph()
    odd = '"Odd one"."Through views"'
    assert graph.needs == {
        odd: {"base"},
        "alone": set(),
        "base": set(),
        "in_subquery": {"inherited"},
        "inherited": set(),
        "through_function": {"base"},
        "through_operator": {"base"},
    }
    # A partition goes by the name of its table; a child has one of its own.
    assert graph.sources[odd] == {"parted"}
    assert graph.sources["inherited"] == {"parent", "child"}
    assert (graph.sources["base"], graph.sources["alone"]) == ({"plain"}, set())
    assert [set(level) for level in graph.levels] == [
        {"alone", "base", "inherited"},
        {odd, "in_subquery", "through_function", "through_operator"},
    ]
    assert graph.fed_by(["base"]) == {odd, "through_function", "through_operator"}
    assert graph.needed_by([odd]) == {"base"}
    assert graph.passed_over == {}


def test_a_circle_is_legal_and_broken_where_one_can_see_it(db: Database) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT 1 AS a",
        "CREATE VIEW v AS SELECT a FROM t",
        "CREATE MATERIALIZED VIEW one AS SELECT a FROM v",
        "CREATE MATERIALIZED VIEW two AS SELECT a FROM one",
        "CREATE OR REPLACE VIEW v AS SELECT a FROM two",
        "CREATE MATERIALIZED VIEW three AS SELECT a FROM two",
    )
    graph = hook_on(db).graph()
    assert graph.needs == {"one": {"two"}, "two": {"one"}, "three": {"two"}}
    assert graph.passed_over == {"one": {"two"}}
    assert graph.order == ("one", "two", "three")
    assert graph.levels == [("one",), ("two",), ("three",)]
    assert graph.fed_by(["one"]) == {"one", "two", "three"}
    assert [line.strip() for line in graph.mermaid().splitlines()] == [
        "flowchart LR",
        'n0["one"]',
        'n1["three"]',
        'n2["two"]',
        "n2 -.-> n0",
        "n2 --> n1",
        "n0 --> n2",
    ]
    result = hook_on(db).refresh_many(["*"], at_once=2)
    assert [outcome.view for outcome in result.outcomes] == ["one", "two", "three"]


def test_in_a_circle_the_server_is_believed_before_people() -> None:
    needs = {"a_top": frozenset({"z_base"}), "z_base": frozenset({"a_top"})}
    views = {name: ResolvedName("public", name, name) for name in needs}
    assert Graph(views, needs, {}, {"z_base": frozenset({"a_top"})}).order == ("z_base", "a_top")
    assert Graph(views, needs, {}, {"a_top": frozenset({"z_base"})}).order == ("a_top", "z_base")


@settings(max_examples=examples(40), deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.sets(st.sampled_from(NAMES)), min_size=len(NAMES)))
def test_whatever_reads_whatever_there_is_an_order(needs: dict[str, set[str]]) -> None:
    graph = _graph({name: needs.get(name, set()) - {name} for name in NAMES})
    assert sorted(graph.order) == NAMES
    place = {view: number for number, view in enumerate(graph.order)}
    level = {view: number for number, views in enumerate(graph.levels) for view in views}
    for view in NAMES:
        for needed in graph.needs_in_order[view]:
            assert place[needed] < place[view]
            assert level[needed] < level[view]
        # Nothing is passed over but what closes a circle.
        for needed in graph.passed_over.get(view, ()):
            assert view in graph.needed_by([needed]) | {needed}
    assert Graph(graph.views, graph.needs).order == graph.order


@given(st.text(min_size=1))
def test_no_name_says_anything_to_a_drawing_but_itself(name: str) -> None:
    drawn = _graph({name: set(), "reads": {name}}).mermaid()
    first, *rest = [line for line in drawn.split("\n") if line.strip()]
    assert first == "flowchart LR"
    labels = [line for line in rest if "[" in line]
    assert len(labels) == len({name, "reads"})
    assert all(line.count('"') == 2 and "<" not in line and "&" not in line for line in labels)


def test_tables_are_drawn_where_they_are_asked_for(db: Database) -> None:
    db.execute('CREATE TABLE "<b>" (a int)', 'CREATE MATERIALIZED VIEW mv AS SELECT a FROM "<b>"')
    graph = hook_on(db).graph()
    assert "60" not in graph.mermaid()
    assert '[("#34;#60;b#62;#34;")]' in graph.mermaid(sources=True)
    assert "n1 --> n0" in graph.mermaid(sources=True)
