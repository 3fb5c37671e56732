"""A group of views: its edges, its tasks in real DAG runs, and what it says where the server knows of more edges."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from airflow.sdk import DAG, task, task_group
from airflow.serialization.serialized_objects import DagSerialization
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlglot.dialects.postgres import Postgres

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.operators.matview import CreateMatViewOperator, RefreshMatViewOperator
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.graph import Graph
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.task_groups.differences import differences
from airflow_provider_matviews.task_groups.edges import Edges
from airflow_provider_matviews.task_groups.matview import MatViewTaskGroup, task_id_of
from tests.airflow_dags import DagRun, run_dag, set_connection
from tests.conftest import Database, examples, hook_on

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What queries read is remembered for one test only."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def warehouse(db: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    set_connection(monkeypatch, db)
    db.execute("CREATE TABLE t AS SELECT 1 AS id", "CREATE SCHEMA s")
    return db


def _view(name: str, sql: str = "SELECT 1 AS id", **more: Any) -> MatViewDefinition:
    return MatViewDefinition(name=name, sql=sql, **more)


def _edges(*definitions: MatViewDefinition) -> dict[str, list[str]]:
    needs = Edges.of(definitions, "test").needs
    return {str(view): sorted(map(str, needs[view])) for view in needs}


def _recorded(db: Database) -> list[tuple[str, str, str]]:
    """Every run in its order: operation, view and status."""
    return [(run.operation, run.view, run.status) for run in reversed(hook_on(db).runs(limit=100))]


#: In an order in which they could not be made.
_FLEET = [
    _view("top", "SELECT m.id FROM s.middle AS m JOIN base USING (id)"),
    _view("alone", "SELECT id FROM t"),
    _view("S.middle", "WITH base AS (SELECT id FROM public.base) SELECT id FROM base"),
    _view("base", "SELECT id FROM t"),
]
_FLEET_NEEDS = {"top": ["base", "s.middle"], "alone": [], "s.middle": ["base"], "base": []}


def test_edges_are_what_is_declared_and_what_is_read() -> None:
    assert _edges(*_FLEET) == _FLEET_NEEDS
    assert _edges(
        _view("a", "SELECT * FROM c", depends_on=["b", "elsewhere"]), _view("b"), _view("c", depends_on=["PUBLIC.B"])
    ) == {"a": ["b", "c"], "b": [], "c": ["b"]}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a", "a"),  # of two that it could be, the one that says as little
        ("public.a", "public.a"),
        ("s.a", "s.a"),
        ("S.A", "s.a"),
        ("b", "public.b"),
        ("public.c", "c"),
        ("d", "s.d"),  # the schema of what reads it
        ("e", None),  # the schema of something else
        ("public.d", None),
        ("other.a", None),
        ('"A"', None),
        ("postgres.s.a", "s.a"),
        ("x", None),  # itself: what it reads has the same name, and stands elsewhere
    ],
)
def test_a_name_without_a_schema_means_what_it_most_likely_means(written: str, meant: str | None) -> None:
    others = [_view(name) for name in ("a", "public.a", "s.a", "public.b", "c", "s.d", "r.e")]
    assert _edges(_view("s.x", f"SELECT * FROM {written}"), *others)["s.x"] == ([meant] if meant else [])


_IDENTIFIERS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=examples(20), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=_IDENTIFIERS, schema=_IDENTIFIERS, place=st.sampled_from(["{}", "(SELECT 1 FROM {}) q", "x, ONLY {} q"]))
@example(name="0", schema="then", place="{}")
def test_no_name_is_overlooked_however_odd(
    caplog: pytest.LogCaptureFixture, name: str, schema: str, place: str
) -> None:
    read = ViewName(name, schema)
    keyword = not Postgres.Tokenizer.KEYWORDS.keys().isdisjoint({name.upper(), schema.upper()})
    if read == ViewName("reader"):
        return
    for written in {str(read), f'"{schema.replace(chr(34), 2 * chr(34))}" . "{name.replace(chr(34), 2 * chr(34))}"'}:
        reader = _view("reader", f"SELECT * FROM {place.format(written)}")
        caplog.clear()
        edges = Edges.of([reader, MatViewDefinition(name=str(read), sql="SELECT 1")], "test")
        if keyword and written == str(read) and not edges.needs[reader.view]:
            # Without quotes it is none, to the server mostly neither; but that is told.
            assert f"It mentions {read}: write depends_on" in caplog.text, written
        else:
            assert edges.needs[reader.view] == {read}, written


def test_a_plain_name_is_found_in_any_case_and_where_the_server_cuts_it_off() -> None:
    long = "x" * 63
    assert _edges(_view("r", f"SELECT * FROM VIEW1, {long}XYZ"), _view("view1"), _view(long))["r"] == ["view1", long]


def test_a_query_that_cannot_be_read_is_told_with_what_to_declare(caplog: pytest.LogCaptureFixture) -> None:
    unread = "SELECT * FROM ??? JOIN s.b USING (id) JOIN declared USING (id)"
    others = [_view("s.b"), _view("s.declared"), _view("absent"), _view('s."B"')]
    with caplog.at_level(logging.WARNING, logger="airflow_provider_matviews"):
        edges = _edges(_view("s.a", unread, depends_on=["declared"]), *others)
        (line,) = caplog.messages
        assert line.startswith("The query of s.a cannot be read without the server")
        assert 'It mentions s."B", s.b: write depends_on = ["declared", \'s."B"\', "s.b"] into its definition' in line
        assert edges["s.a"] == ["s.declared"]
        # What is written in escapes is not found, and may be any of them.
        caplog.clear()
        _edges(_view("a", 'SELECT * FROM s.u&"\\0062"'), *others)
        (line,) = caplog.messages
        assert line.endswith("It holds names in escapes: write depends_on = [...] into its definition.")
        # Nothing to tell where everything is declared, or nothing is mentioned.
        caplog.clear()
        _edges(_view("a", 'SELECT * FROM s.u&"\\0062"', depends_on=["s.b"]), *others)
        _edges(_view("a", unread, depends_on=["s.b", "s.declared", 's."B"']), *others)
        _edges(_view("a", "SELECT ???"), *others)
        assert caplog.messages == []


@pytest.mark.parametrize(
    ("definitions", "message"),
    [
        ([_view("a", "TABLE b"), _view("b", "TABLE c"), _view("c", "TABLE a")], "a reads b, b reads c, c reads a"),
        ([_view("a", depends_on=["b"]), _view("b", depends_on=["a"])], "a depends on b, b depends on a"),
        ([_view("a", depends_on=["a"])], "a depends on a"),
        ([_view("s.a", depends_on=["b"]), _view("b", "TABLE s.a")], "b reads s.a, s.a depends on b"),
        ([_view("a"), _view("A")], "a is declared twice in one group"),
    ],
)
def test_what_cannot_be_put_in_order_is_refused_by_name(definitions: list[MatViewDefinition], message: str) -> None:
    with pytest.raises(InvalidDefinition) as refusal:
        Edges.of(definitions, "test")
    # A circle has no first one.
    steps = message.split(", ")
    assert any(", ".join(steps[i:] + steps[:i]) in str(refusal.value) for i in range(len(steps))), refusal.value


@pytest.mark.parametrize(
    ("view", "task_id"),
    [
        (ViewName("daily"), "daily"),
        (ViewName("daily", "analytics"), "analytics.daily"),
        (ViewName("Größe_日"), "Gr__e__-"),
        (ViewName("a.b"), "a.b-"),
        (ViewName("Odd Name", "a b"), "a_b.Odd_Name-"),
        (ViewName("😀/?#"), "____-"),
        (ViewName("-"), "_-"),
    ],
)
def test_a_tasks_id_is_the_views_name_as_far_as_it_can_be(view: ViewName, task_id: str) -> None:
    found = task_id_of(view)
    assert found == task_id if not task_id.endswith("-") else (found[:-8] in (task_id, task_id.replace("a.b-", "a_b-")))
    assert len(task_id_of(ViewName("x" * 63, "y" * 63), 40)) == 40


@given(st.lists(st.builds(ViewName, _IDENTIFIERS, st.none() | _IDENTIFIERS), unique=True, max_size=5))
def test_every_view_has_a_task_id_of_its_own_that_airflow_takes(views: list[ViewName]) -> None:
    with DAG("ids", schedule=None):
        for view in views:
            RefreshMatViewOperator(task_id=task_id_of(view), view=str(view))


def test_a_group_is_run_in_the_order_of_its_edges(warehouse: Database) -> None:
    with DAG("ordered", schedule=None) as dag:
        create = MatViewTaskGroup("create", _FLEET, operation="create")
        refresh = MatViewTaskGroup("refresh", {each.name: each for each in _FLEET}, refresh_strategy="regular")

        @task
        def done() -> None: ...

        create >> refresh
        refresh.task("PUBLIC.alone") >> done()
    run = run_dag(dag)
    assert run.state == "success"
    assert set(run.states) == {f"{group}.{view}" for group in ("create", "refresh") for view in _FLEET_NEEDS} | {"done"}
    assert all(isinstance(refresh.task(view), RefreshMatViewOperator) for view in _FLEET_NEEDS)
    assert isinstance(create.task("base"), CreateMatViewOperator)
    recorded = _recorded(warehouse)
    assert {status for _, _, status in recorded} == {"success"}
    assert [operation for operation, _, _ in recorded] == ["create"] * 4 + ["refresh"] * 4
    for operation in ("create", "refresh"):
        order = [view for each, view, _ in recorded if each == operation]
        assert all(order.index(need) < order.index(view) for view in order for need in _FLEET_NEEDS[view])
    assert "depends_on" not in run.log
    assert {each.meta["task_id"] for each in hook_on(warehouse).runs(view="top")} == {"create.top", "refresh.top"}


def test_a_view_that_fails_stops_what_reads_it_and_nothing_else(warehouse: Database) -> None:
    warehouse.execute(
        "CREATE MATERIALIZED VIEW base AS SELECT 1 / id AS id FROM t",
        "CREATE MATERIALIZED VIEW s.middle AS SELECT id FROM base",
        "CREATE MATERIALIZED VIEW top AS SELECT id FROM s.middle",
        "CREATE MATERIALIZED VIEW alone AS SELECT id FROM t",
        "UPDATE t SET id = 0",
    )
    with DAG("failing", schedule=None) as dag:
        MatViewTaskGroup("views", _FLEET)
    run = run_dag(dag)
    assert run.states == {
        "views.base": "failed",
        "views.s.middle": "upstream_failed",
        "views.top": "upstream_failed",
        "views.alone": "success",
    }
    assert sorted(_recorded(warehouse)) == [("refresh", "alone", "success"), ("refresh", "base", "failed")]


def test_what_reads_a_view_that_was_skipped_is_refreshed(warehouse: Database) -> None:
    warehouse.execute(
        "CREATE MATERIALIZED VIEW base AS SELECT id FROM t",
        "CREATE MATERIALIZED VIEW s.middle AS SELECT base.id FROM base, t",
    )
    with DAG("skipping", schedule=None) as dag:
        MatViewTaskGroup("views", _FLEET[2:], if_locked="skip")
    with warehouse.connect() as other, other.transaction():
        lock = lock_key(ResolvedName("public", "base", "base")).as_string(None)
        other.execute(f"SELECT pg_advisory_xact_lock({lock})")
        run = run_dag(dag)
    assert run.states == {"views.base": "skipped", "views.s.middle": "success"}


def _through_a_plain_view(db: Database) -> list[MatViewDefinition]:
    """Definitions whose SQL does not show that `reader` and `declared` read `s.hidden`."""
    db.execute(
        "CREATE MATERIALIZED VIEW s.hidden AS SELECT id FROM t",
        "CREATE VIEW plain AS SELECT id FROM s.hidden",
    )
    return [
        _view("s.hidden", "SELECT id FROM t"),
        _view("reader", "SELECT id FROM plain JOIN t USING (id)", depends_on=["elsewhere"]),
        _view("declared", "SELECT id FROM plain", depends_on=["s.hidden"]),
    ]


def _told(run: DagRun) -> list[str]:
    return [line for line in run.log.splitlines() if "depends_on" in line]


def test_an_edge_that_only_the_server_knows_is_told_with_what_to_declare(warehouse: Database) -> None:
    definitions = _through_a_plain_view(warehouse)
    with DAG("telling", schedule=None) as dag:
        create = MatViewTaskGroup("create", definitions, operation="create", on_drift="ignore")
        create >> MatViewTaskGroup("refresh", definitions) >> MatViewTaskGroup("later", definitions, deferrable=True)
    run = run_dag(dag)
    assert run.state == "success"
    told = _told(run)
    assert len(told) == 3
    for line in told:
        assert "reader reads s.hidden by ways that its query does not show, and does not wait for it" in line
        assert 'write depends_on = ["elsewhere", "s.hidden"] into its definition.' in line


def test_a_server_that_does_not_tell_of_edges_fails_no_task(
    warehouse: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def graph(hook: MatViewHook) -> Graph:
        raise psycopg.OperationalError("no answer to s3cret/password")

    monkeypatch.setattr(MatViewHook, "graph", graph)
    set_connection(monkeypatch, warehouse, password="s3cret/password")
    with DAG("untold", schedule=None) as dag:
        create = MatViewTaskGroup("create", [_FLEET[1]], operation="create")
        create >> MatViewTaskGroup("refresh", [_FLEET[1]])
    run = run_dag(dag)
    assert run.state == "success"
    assert run.log.count("What alone reads could not be looked up: no answer to ***") == 2


def _graph(needs: Mapping[str, Iterable[str]]) -> Graph:
    names = {name: ViewName.parse(name) for name in needs}
    views = {name: ResolvedName(view.schema or "public", view.name, name) for name, view in names.items()}
    return Graph(views, {name: frozenset(each) for name, each in needs.items()})


def test_differences_are_those_that_matter() -> None:
    edges = Edges.of([_view("a"), _view("s.b", depends_on=["a"]), _view("c", depends_on=["s.b"]), _view("d")], "test")

    def told(view: str, needs: Mapping[str, Iterable[str]]) -> list[str]:
        return differences(ViewName.parse(view), edges, _graph(needs))

    # By way of others it waits already; what is not in the group, or does not stand, is not its business.
    assert told("c", {"c": ["s.b", "a", "x"], "s.b": [], "a": [], "x": []}) == []
    assert told("s.b", {"s.b": []}) == []
    assert told("d", {"a": []}) == []
    # A view without a schema stands in another one than public.
    (line,) = told("d", {"r.d": ["s.c"], "s.c": []})
    assert "d reads c by ways that its query does not show" in line
    assert 'depends_on = ["c"]' in line
    # What is declared the wrong way round.
    (line,) = told("a", {"a": ["c"], "c": []})
    assert line.endswith('write depends_on = ["c"] into its definition, and let c no longer depend on a.')
    # A circle that the server allows: the group follows it one way, and one way only can be followed.
    assert told("a", {"a": ["s.b"], "s.b": ["a"]}) == told("s.b", {"a": ["s.b"], "s.b": ["a"]}) == []


def test_odd_names_work_throughout(warehouse: Database) -> None:
    warehouse.execute('CREATE SCHEMA "a.b"')
    odd = [
        _view('"a.b"."Top ""of"" it"', 'SELECT id FROM "a.b"."Größe/日"'),
        _view('"a.b"."Größe/日"', 'SELECT id FROM "user"'),
        _view('"user"', "SELECT id FROM t"),
    ]
    with DAG("odd", schedule=None) as dag:
        group = MatViewTaskGroup("views", odd, operation="create", task_overrides={'"user"': {"task_id": "mine"}})
    run = run_dag(dag)
    assert run.state == "success"
    assert [view for _, view, _ in _recorded(warehouse)] == ['"user"', '"a.b"."Größe/日"', '"a.b"."Top ""of"" it"']
    assert "depends_on" not in run.log
    assert group.task('"user"').task_id == "views.mine"
    assert group.task('"a.b"."Größe/日"').task_display_name == '"a.b"."Größe/日"'


def test_arguments_go_to_the_group_to_all_tasks_or_to_one() -> None:
    with DAG("arguments", schedule=None, default_args={"retries": 1, "owner": "dag"}) as dag:
        group = MatViewTaskGroup(
            "views",
            _FLEET,
            default_args={"owner": "group", "conn_id": "warehouse"},
            tooltip="all of them",
            pool="views",
            deferrable=True,
            refresh_strategy="swap",
            task_overrides={
                "top": {"pool": "heavy", "retries": 5, "execution_timeout": timedelta(hours=2)},
                "public.alone": {"refresh_strategy": "regular", "trigger_rule": "all_done"},
            },
        )
        quiet = MatViewTaskGroup("quiet", _FLEET, default_args={"trigger_rule": "all_success"}, prefix_group_id=False)
    top, base, alone = (group.task(view) for view in ("top", "base", "alone"))
    assert (group.tooltip, base.owner, base.conn_id, base.pool, base.retries) == (
        "all of them", "group", "warehouse", "views", 1,
    )  # fmt: skip
    assert (top.pool, top.retries, top.execution_timeout) == ("heavy", 5, timedelta(hours=2))
    assert isinstance(alone, RefreshMatViewOperator)
    assert (alone.refresh_strategy, alone.trigger_rule, base.trigger_rule) == ("regular", "all_done", "none_failed")
    assert (quiet.task("top").trigger_rule, quiet.task("top").task_id) == ("all_success", "top")
    assert top.upstream_task_ids == {"views.base", "views.s.middle"}

    # As Airflow keeps it, and as it clears a part of it.
    kept = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    assert kept.get_task("views.top").upstream_task_ids == {"views.base", "views.s.middle"}
    assert kept.get_task("views.top").operator_name == "RefreshMatViewOperator"
    assert set(kept.task_group.get_task_group_dict()["views"].children) == {f"views.{view}" for view in _FLEET_NEEDS}
    part = dag.partial_subset(["views.s.middle"], include_upstream=True)
    assert set(part.task_dict) == {"views.s.middle", "views.base"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operation": "drop"}, "operation='drop'"),
        ({"task_overrides": {"s.top": {}}}, "task_overrides names s.top, which is not in the group"),
        ({"task_overrides": {"top": {"definition": None}}}, "definition of a task is what its group says"),
        ({"view": "top"}, "view of a task is what its group says"),
        ({"definitions": ["top"]}, "'top', which is no MatViewDefinition"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with DAG("wrong", schedule=None), pytest.raises(InvalidDefinition, match=message):
        MatViewTaskGroup("views", **{"definitions": _FLEET, **arguments})


def test_a_view_of_somebody_else_is_refreshed_and_not_created() -> None:
    views = [_view("ours", "TABLE theirs"), _view("theirs", managed=False)]
    with DAG("managed", schedule=None):
        assert list(MatViewTaskGroup("create", views, operation="create").children) == ["create.ours"]
        refresh = MatViewTaskGroup("refresh", views)
        assert refresh.task("ours").upstream_task_ids == {"refresh.theirs"}
        with pytest.raises(InvalidDefinition, match="nothing is not in the group refresh"):
            refresh.task("nothing")


def test_a_folder_is_taken_from_where_the_dag_file_is(tmp_path: Path) -> None:
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "top.sql").write_text("SELECT * FROM base")
    (tmp_path / "views" / "base.sql").write_text("SELECT 1")
    code = """
from airflow.sdk import DAG
from airflow_provider_matviews.task_groups.matview import MatViewTaskGroup
with DAG("folder", schedule=None) as dag:
    MatViewTaskGroup("views", "views")
"""
    (tmp_path / "dag.py").write_text(code)
    names: dict[str, Any] = {"__file__": str(tmp_path / "dag.py")}
    exec(compile(code, tmp_path / "dag.py", "exec"), names)
    assert names["dag"].get_task("views.top").upstream_task_ids == {"views.base"}
    with DAG("absent", schedule=None), pytest.raises(NotADirectoryError):
        MatViewTaskGroup("views", tmp_path / "absent")


def test_one_group_is_mapped_over_databases(warehouse: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    set_connection(monkeypatch, warehouse, conn_id="eu")
    set_connection(monkeypatch, warehouse, conn_id="us")
    warehouse.execute(
        "CREATE MATERIALIZED VIEW base AS SELECT id FROM t", "CREATE MATERIALIZED VIEW s.middle AS TABLE base"
    )
    with DAG("mapped", schedule=None) as dag:

        @task_group
        def database(conn_id: str) -> None:
            MatViewTaskGroup("views", _FLEET[2:], conn_id=conn_id)

        database.expand(conn_id=["eu", "us"])
    run = run_dag(dag)
    assert run.state == "success"
    assert sorted(run.states) == sorted(f"database.views.{v}[{i}]" for v in ("base", "s.middle") for i in (0, 1))
    assert len(_recorded(warehouse)) == 4


_FIVE_HUNDRED = """
import sys
from airflow.sdk import DAG
from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.task_groups.matview import MatViewTaskGroup
query = "SELECT * FROM s.v{} JOIN s.v{} USING (id)"
views = [MatViewDefinition(name=f"s.v{i}", sql=query.format(i // 2, i // 3)) for i in range(1, 501)]
with DAG("fleet", schedule=None) as dag:
    MatViewTaskGroup("views", views)
print(sum(len(task.upstream_task_ids) for task in dag.tasks), "sqlglot" in sys.modules)
"""


def test_five_hundred_definitions_that_were_seen_before_are_not_parsed(tmp_path: Path) -> None:
    exec(_FIVE_HUNDRED, {})
    done = subprocess.run(
        [sys.executable, "-c", _FIVE_HUNDRED],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-2:] == ["996", "False"], done.stderr
