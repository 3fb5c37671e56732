"""A definition against the database: what a plan says, and that applying it leaves nothing to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from psycopg import sql

from airflow_provider_matviews.definition import (
    Column,
    ExtendedStatistics,
    Index,
    IndexKey,
    MatViewDefinition,
)
from airflow_provider_matviews.exceptions import (
    DependentsExist,
    DriftFound,
    InvalidDefinition,
    MissingPrivilege,
    StrategyRefused,
)
from airflow_provider_matviews.services.plan_steps import Plan
from tests.conftest import Database, examples, hook_on

SOURCE = """
CREATE TABLE source (id integer, name varchar(40), amount numeric(12, 2), day date, tags integer[]);
INSERT INTO source SELECT n, 'name ' || n, n * 1.5, date '2026-01-01' + n, ARRAY[n, n + 1]
FROM generate_series(1, 50) n
"""

#: Names of columns -> expressions that they can stand for, of several types.
_EXPRESSIONS: dict[str, list[str]] = {
    "id": ["id", "id + 1", "id::bigint"],
    "name": ["name", "upper(name)", "left(name, 3)::varchar(10)"],
    "Amount €": ["amount", "round(amount)", "amount::double precision"],
    "day": ["day", "day + 1", "date_trunc('month', day)"],
    "tags": ["tags", "array_append(tags, 0)"],
}
_SOURCES = [
    "FROM source",
    "FROM source WHERE name IN ('name 1', 'name 2') OR id > 10",
    "FROM (SELECT * FROM source ORDER BY id LIMIT 20) AS source",
]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[dict[str, str], str]:
    """Columns with their expressions, and what they are of."""
    names = draw(st.lists(st.sampled_from(list(_EXPRESSIONS)), min_size=2, unique=True))
    return {name: draw(st.sampled_from(_EXPRESSIONS[name])) for name in names}, draw(st.sampled_from(_SOURCES))


@st.composite
def definitions(draw: st.DrawFn, roles: Sequence[str], shape: tuple[dict[str, str], str]) -> MatViewDefinition:
    expressions, source = shape
    # At times a column only has another name.
    called = {name: draw(st.sampled_from([name, name, name, f"{name} too"])) for name in expressions}
    columns = list(called.values())
    quoted = ", ".join(
        f"{expression} AS {sql.Identifier(called[name]).as_string(None)}" for name, expression in expressions.items()
    )
    some = st.lists(st.sampled_from(columns), min_size=1, max_size=2, unique=True)
    plain = [column for column in columns if not column.startswith("tags")]
    indexes = []
    for number in range(draw(st.integers(0, 2))):
        keys: list[str | IndexKey] = []
        for column in draw(some):
            identifier = sql.Identifier(column).as_string(None)
            keys.append(
                draw(
                    st.sampled_from(
                        [
                            column,
                            IndexKey(column=column, order="desc"),
                            IndexKey(
                                expression=f"{identifier} IS NOT NULL", statistics=draw(st.sampled_from([None, 20]))
                            ),
                        ]
                    )
                )
            )
        first = sql.Identifier(columns[0]).as_string(None)
        indexes.append(
            Index(
                columns=keys,
                name=draw(st.sampled_from([None, f"index {number}", f"other {number}"])),
                where=draw(st.sampled_from([None, f"{first} IS NOT NULL"])),
                include=[columns[0]] if draw(st.booleans()) else [],
                storage_parameters=draw(st.sampled_from([{}, {"fillfactor": 70}, {"deduplicate_items": False}])),
                comment=draw(st.sampled_from([None, "an index", "the index"])),
                clustered=False,
            )
        )
    taken: set[str] = set()
    kept = []
    for index in indexes:
        if index.name_on("mv") not in taken:
            taken.add(index.name_on("mv"))
            kept.append(index)
    privileges = st.lists(
        st.sampled_from(["SELECT", "SELECT WITH GRANT OPTION", "INSERT", "REFERENCES"]),
        min_size=1,
        max_size=2,
        unique=True,
    ).map(lambda each: each if len({one.split()[0] for one in each}) == len(each) else each[:1])
    grants: dict[str, Any] = draw(st.dictionaries(st.sampled_from([*roles, "public"]), privileges, max_size=2))
    if "public" in grants:
        grants["public"] = ["SELECT"]
    return MatViewDefinition(
        name="mv",
        sql=f"SELECT {quoted} {source}",
        unique_index_columns=[columns[0]]
        if draw(st.booleans()) and columns[0].startswith("id") and "mv_id_key" not in taken
        else [],
        indexes=kept,
        comment=draw(st.sampled_from([None, "one", "another's"])),
        grants=grants,
        storage_parameters=draw(
            st.sampled_from([{}, {"fillfactor": 80}, {"autovacuum_enabled": False, "toast.autovacuum_enabled": True}])
        ),
        columns=[
            Column(
                name=column,
                comment=draw(st.sampled_from([None, "a column"])),
                statistics=draw(st.sampled_from([None, 50])),
                options=draw(st.sampled_from([{}, {"n_distinct": -0.5}])),
                grants=draw(st.sampled_from([{}, {roles[0]: ["SELECT"]}])),
            )
            for column in draw(st.lists(st.sampled_from(columns), max_size=2, unique=True))
        ],
        statistics=[ExtendedStatistics(name=draw(st.sampled_from(["stats", '"Other Stats"'])), columns=plain[:2])]
        if len(plain) > 1 and draw(st.booleans())
        else [],
        owner=draw(st.sampled_from([None, None, roles[1]])),
        replica_identity=draw(st.sampled_from([None, None, "full", "nothing"])),
        exclusive=draw(st.booleans()),
    )


@st.composite
def changes(draw: st.DrawFn, roles: Sequence[str]) -> tuple[MatViewDefinition, MatViewDefinition]:
    """A definition, and another one of the same view; two times in three of the same query."""
    shape = draw(shapes())
    other = draw(st.sampled_from([shape, shape, None])) or draw(shapes())
    return draw(definitions(roles, shape)), draw(definitions(roles, other))


@pytest.mark.e2e
def test_after_any_definition_was_applied_over_any_other_nothing_is_left_to_do(db: Database) -> None:
    hook, roles = hook_on(db), [db.role(), db.role()]
    db.execute(SOURCE)
    db.execute(
        sql.SQL("GRANT SELECT ON source TO {0}; GRANT USAGE, CREATE ON SCHEMA public TO {0}")  # type: ignore[arg-type]
        .format(sql.Identifier(roles[1]))
        .as_string(None)
    )

    @settings(max_examples=examples(15), deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes(roles))
    def check(change: tuple[MatViewDefinition, MatViewDefinition]) -> None:
        first, second = change
        db.execute("DROP MATERIALIZED VIEW IF EXISTS mv")
        assert hook.create(first).status == "created"
        assert hook.plan(first).steps == ()
        plan = hook.plan(second)
        oid = db.value("SELECT 'mv'::regclass::oid")
        done = hook.create(second)
        event("rebuilt" if plan.rebuilds else "in place" if plan.steps else "nothing to do")
        assert done.status == ("skipped" if plan.empty else "updated")
        # A view that stands goes on with its OID unless the plan says that it is built anew.
        assert (db.value("SELECT 'mv'::regclass::oid") == oid) is not plan.rebuilds
        again = hook.plan(second)
        assert again.steps == (), f"{again}\n--- after\n{plan}"
        assert hook.create(second).status == "skipped"
        rows = db.rows(f"SELECT * FROM mv EXCEPT ALL ({second.sql})")  # type: ignore[arg-type]
        assert rows == []

    check()


def _base(**changes: Any) -> MatViewDefinition:
    declared: dict[str, Any] = {
        "name": "mv",
        "sql": "SELECT id, name, amount FROM source",
        "unique_index_columns": ["id"],
        "indexes": [Index(columns=["name"], name="by_name", comment="For searching.")],
        "comment": "Ours.",
        "storage_parameters": {"fillfactor": 90},
        "columns": [Column(name="amount", comment="In euro.", statistics=200)],
        "statistics": [ExtendedStatistics(name="stats", columns=["id", "name"])],
    }
    return MatViewDefinition(**{**declared, **changes})


#: What is done to the view by hand, or declared anew -> the steps that mend it. None of them touches a row.
_IN_PLACE: list[tuple[str | dict[str, Any], list[str]]] = [
    ("DROP INDEX mv_id_key", ["build index"]),
    ("ALTER INDEX mv_id_key RENAME TO other", []),
    ("ALTER INDEX by_name RENAME TO other", ["rename index"]),
    ("DROP INDEX by_name; CREATE INDEX by_name ON mv (amount)", ["change index"]),
    ("COMMENT ON INDEX by_name IS NULL", ["alter index"]),
    ("ALTER INDEX by_name SET (fillfactor = 50)", []),
    ("COMMENT ON MATERIALIZED VIEW mv IS 'by hand'", ["comment"]),
    ("ALTER MATERIALIZED VIEW mv RESET (fillfactor)", ["storage parameters"]),
    ("ALTER MATERIALIZED VIEW mv SET (autovacuum_enabled = off)", []),
    ("COMMENT ON COLUMN mv.amount IS NULL", ["column settings"]),
    ("ALTER MATERIALIZED VIEW mv ALTER amount SET STATISTICS -1", ["column settings"]),
    ("DROP STATISTICS stats", ["create statistics"]),
    ("DROP STATISTICS stats; CREATE STATISTICS stats (mcv) ON id, name FROM mv", ["change statistics"]),
    ("ALTER MATERIALIZED VIEW mv RENAME amount TO price", ["rename column"]),
    ({"sql": "SELECT id, name, amount AS price FROM source", "columns": []}, ["rename column"]),
    ({"sql": "select source.id,\n NAME /* the same */, amount from ONLY source -- in other words"}, ["change query"]),
    ({"sql": "select source.id,\n NAME /* the same */, amount from public.source -- in other words;\n;"}, []),
    ({"storage_parameters": {"fillfactor": "90.0"}}, []),
    ({"indexes": [Index(columns=["name"]), Index(columns=[IndexKey(expression="lower(name)")])]}, ["build index"]),
    ({"grants": {"public": ["select"]}}, ["grant"]),
    ({"replica_identity": "full"}, ["replica identity"]),
    ({"indexes": [Index(columns=["name"], name="by_name", clustered=True)]}, ["alter index"]),
    ({"comment": None, "storage_parameters": {}, "columns": [], "statistics": [], "indexes": []}, []),
    (
        {"comment": None, "storage_parameters": {}, "columns": [], "statistics": [], "indexes": [], "exclusive": True},
        ["storage parameters", "column settings", "comment", "drop index", "drop statistics"],
    ),
]


@pytest.mark.parametrize(("change", "kinds"), _IN_PLACE, ids=[str(change)[:60] for change, _ in _IN_PLACE])
def test_what_differs_is_told_step_by_step_and_mended(
    db: Database, change: str | dict[str, Any], kinds: list[str]
) -> None:
    hook = hook_on(db)
    db.execute(SOURCE)
    hook.create(_base())
    wanted = _base()
    if isinstance(change, str):
        db.execute(change)  # type: ignore[arg-type]
    else:
        wanted = _base(**change)
    rows = "SELECT relfilenode FROM pg_class WHERE oid = 'mv'::regclass"
    before = db.value(rows)
    plan = hook.plan(wanted)
    assert [step.kind for step in plan.steps] == kinds
    assert plan.refusals == ()
    assert all(step.why and step.subject and step.cost for step in plan.steps)
    done = hook.create(wanted)
    assert done.status == ("updated" if kinds else "skipped")
    # The plan is what was done, and all of it is in the one run.
    assert (db.value(rows) == before) is not plan.rebuilds
    assert _script(done.response["sql"]) == _script(plan.sql)
    run = hook.last_run("mv")
    assert run is not None
    assert run.id == done.run_id
    assert [step["kind"] for step in run.meta["response"]["plan"]["steps"]] == kinds
    assert run.meta["response"]["drift"] is bool(kinds)
    assert hook.plan(wanted).steps == ()
    assert hook.create(wanted).status == "skipped"


def _script(statements: Iterable[str]) -> list[str]:
    """Statements without what differs each time, and without those that only lock the view."""
    plain = [re.sub(r"_mv_[0-9a-f]{8}", "_mv_", text).strip().rstrip(";") for text in statements]
    return [text for text in plain if not re.match("ALTER MATERIALIZED VIEW .* OWNER TO", text)]


def test_what_the_definition_does_not_mention_is_told_and_left_alone(db: Database) -> None:
    hook, reader = hook_on(db), db.role()
    db.execute(SOURCE)
    definition = MatViewDefinition(name="mv", sql="SELECT id, name FROM source")
    hook.create(definition)
    with db.connect() as connection:
        connection.execute(
            sql.SQL(
                "CREATE INDEX by_hand ON mv (name); GRANT SELECT ON mv TO {}; COMMENT ON COLUMN mv.id IS 'by hand'"
            ).format(sql.Identifier(reader))
        )
    plan = hook.plan(definition)
    assert plan.steps == ()
    assert plan.left_alone == ("settings of column id", "index by_hand", f"privilege SELECT to {reader}")
    assert "Left alone" in str(plan)
    assert hook.create(definition).status == "skipped"
    plan = hook.plan(definition, exclusive=True)
    assert [step.kind for step in plan.steps] == ["column settings", "drop index", "revoke"]
    assert plan.left_alone == ()
    assert hook.create(definition, exclusive=True).status == "updated"
    assert hook.plan(definition).left_alone == ()
    assert not db.value("SELECT has_table_privilege(%s, 'mv', 'SELECT')", (reader,))


def test_a_plan_is_plain_data_and_text_for_a_person(db: Database) -> None:
    hook = hook_on(db)
    db.execute(SOURCE)
    hook.create(_base())
    db.execute("CREATE VIEW over AS SELECT id FROM mv")
    plan = hook.plan(_base(sql="SELECT id, name, amount, day FROM source WHERE id > 3"))
    assert [step.kind for step in plan.steps] == ["change query", "add column"]
    data = json.loads(json.dumps(plan.as_dict()))
    assert data == plan.as_dict()
    text = str(plan)
    assert "Plan for mv: 2 steps." in text
    assert "+   FROM public.source" in text.replace("+  FROM", "+   FROM")
    assert "+  WHERE (id > 3);" in text
    assert 'REFRESH MATERIALIZED VIEW "public"."mv_mv_' in text
    assert "CREATE OR REPLACE VIEW public.over" in text
    assert hook.plan(_base()).lines()[0] == "mv is what its definition says."
    # And it is what is done then, to the letter.
    done = hook.create(_base(sql="SELECT id, name, amount, day FROM source WHERE id > 3"))
    assert _script(done.response["sql"]) == _script(plan.sql)


def test_a_plan_for_a_view_that_does_not_stand_tells_how_it_is_made(db: Database) -> None:
    hook = hook_on(db)
    db.execute(SOURCE)
    plan = hook.plan(_base())
    assert (plan.stands, plan.steps[0].kind) == (False, "create view")
    assert {step.kind for step in plan.steps} == {
        "create view",
        "build index",
        "create statistics",
        "comment",
        "column settings",
    }
    assert db.value("SELECT to_regclass('mv')") is None
    assert db.value("SELECT to_regnamespace('matviews')") is None


def test_planning_runs_no_query_and_changes_nothing(db: Database) -> None:
    hook = hook_on(db)
    db.execute(SOURCE, "CREATE SEQUENCE ticks")
    slow = "SELECT nextval('ticks') AS id, pg_sleep(3600)::text AS name, 1.0 AS amount"
    hook.create(_base())
    before = db.rows("SELECT oid, relname, xmin::text FROM pg_class ORDER BY oid")
    plan = hook.plan(_base(sql=slow))
    assert plan.rebuilds
    assert hook.plan(MatViewDefinition(name="new", sql=slow)).stands is False
    assert db.value("SELECT is_called FROM ticks") is False
    assert db.rows("SELECT oid, relname, xmin::text FROM pg_class ORDER BY oid") == before
    assert [run.operation for run in hook.runs()] == ["create"]


@pytest.mark.parametrize("strategy", ["apply", "fail", "report", "ignore"])
def test_drift_is_met_as_asked(db: Database, strategy: str) -> None:
    hook = hook_on(db)
    db.execute(SOURCE)
    hook.create(_base())
    changed = _base(sql="SELECT id, name, amount FROM source WHERE id < 10", comment="Fewer.")
    oid = db.value("SELECT 'mv'::regclass::oid")
    if strategy == "fail":
        with pytest.raises(DriftFound, match="mv is not what its definition says: change query, comment") as raised:
            hook.create(changed, on_drift=strategy)
        assert isinstance(raised.value.plan, Plan)
        assert hook.runs("mv")[0].status == "failed"
    else:
        done = hook.create(changed, on_drift=strategy)
        assert (done.status, done.response["drift"]) == {
            "apply": ("updated", True),
            "report": ("skipped", True),
            "ignore": ("skipped", None),
        }[strategy]
        assert ("plan" in done.response) is (strategy != "ignore")
    assert (db.value("SELECT 'mv'::regclass::oid") == oid) is (strategy != "apply")
    assert db.value("SELECT count(*) FROM mv") == (9 if strategy == "apply" else 50)


def test_a_column_that_something_reads_is_not_taken_away(db: Database) -> None:
    hook = hook_on(db)
    db.execute(
        SOURCE,
        "CREATE VIEW plain AS SELECT id FROM source",
    )
    hook.create(_base())
    db.execute(
        "CREATE VIEW names AS SELECT upper(name) AS n FROM mv",
        'CREATE VIEW "Dear Sums" AS SELECT sum(amount) FROM mv WHERE name IS NOT NULL',
        "CREATE VIEW counts AS SELECT count(*) FROM mv",
    )
    smaller = _base(sql="SELECT id, amount FROM source", indexes=[], statistics=[])
    plan = hook.plan(smaller)
    assert plan.refusals == ('mv would lose the column name, which view "Dear Sums", view names use.',)
    with pytest.raises(DependentsExist, match="mv would lose the column name") as raised:
        hook.create(smaller)
    assert raised.value.dependents == ('view "Dear Sums"', "view names")
    assert db.value("SELECT count(*) FROM names") == 50
    assert hook.plan(_base()).steps == ()
    db.execute('DROP VIEW names, "Dear Sums"')
    plan = hook.plan(smaller)
    # An index of the view's own goes with its column, and the plan says so.
    assert [(step.kind, step.subject) for step in plan.steps] == [
        ("change query", "the query"),
        ("drop column", "column name"),
        ("drop index", "index by_name"),
        ("drop statistics", "statistics public.stats"),
    ]
    assert plan.steps[2].why == "it reads the column name, which goes"
    assert hook.create(smaller).status == "updated"
    assert db.rows("TABLE counts") == [(50,)]
    assert hook.plan(smaller).steps == ()


def test_what_does_not_take_to_a_changed_type_is_found_before_the_query_runs(db: Database) -> None:
    hook = hook_on(db)
    db.execute(SOURCE, "CREATE SEQUENCE ticks")
    hook.create(MatViewDefinition(name="mv", sql="SELECT id, name FROM source"))
    db.execute("CREATE VIEW over AS SELECT id FROM mv", "CREATE VIEW texts AS SELECT id::text AS id FROM mv")
    changed = MatViewDefinition(name="mv", sql="SELECT nextval('ticks') AS id, name FROM source")
    plan = hook.plan(changed)
    assert plan.notes == (
        "the column id changes its type, and view over, view texts use it: whether it takes to that is tried "
        "before anything is built",
    )
    with pytest.raises(DependentsExist, match="cannot change data type of view column"):
        hook.create(changed)
    assert db.value("SELECT is_called FROM ticks") is False
    assert db.value("SELECT count(*) FROM over") == 50
    db.execute("DROP VIEW over")
    assert hook.create(changed).status == "updated"
    assert sorted(db.rows("TABLE texts"))[:1] == [("1",)]


def test_a_role_that_may_make_nothing_in_the_schema_can_plan_by_temporary_objects(each_db: Database) -> None:
    hook, reader = hook_on(each_db), each_db.role()
    each_db.execute(SOURCE, "REVOKE CREATE ON SCHEMA public FROM PUBLIC", "GRANT SELECT ON source TO PUBLIC")
    hook.create(_base())
    theirs = hook_on(each_db, reader)
    assert theirs.plan(_base()).steps == ()
    plan = theirs.plan(_base(sql="SELECT id, name, amount, day FROM source", comment=None))
    assert [step.kind for step in plan.steps] == ["change query", "add column"]
    assert "may not replace or alter mv" in plan.refusals[0]
    with pytest.raises(MissingPrivilege, match="may not create new: it lacks CREATE or USAGE on the schema"):
        theirs.plan(MatViewDefinition(name="new", sql="SELECT 1 AS a"))
    with each_db.connect() as connection:
        connection.execute(sql.SQL("REVOKE TEMP ON DATABASE {} FROM PUBLIC").format(sql.Identifier(each_db.name)))
    with pytest.raises(MissingPrivilege):
        theirs.plan(_base())


@pytest.mark.parametrize(
    ("changes", "error", "explanation"),
    [
        ({"sql": "SELECT 1; DROP TABLE source"}, InvalidDefinition, "cannot be a materialized view"),
        ({"sql": "SELECT nonsense FROM source"}, psycopg.errors.UndefinedColumn, "nonsense"),
        ({"columns": [Column(name="Amount")]}, InvalidDefinition, "no column 'Amount', which its definition names"),
        ({"indexes": [Index(columns=["nam"])]}, InvalidDefinition, "no column 'nam', which its index mv_nam_idx"),
        (
            {"statistics": [ExtendedStatistics(name="s", columns=["id", "nam"])]},
            InvalidDefinition,
            "no column 'nam', which its statistics s names",
        ),
        ({"indexes": [Index(columns=[IndexKey(expression="now()")])]}, psycopg.errors.InvalidObjectDefinition, "IMMUT"),
        ({"storage_parameters": {"fillfactor": 5}}, psycopg.errors.InvalidParameterValue, "fillfactor"),
        ({"tablespace": "nowhere"}, psycopg.errors.UndefinedObject, "nowhere"),
        ({"access_method": "nothing"}, psycopg.errors.UndefinedObject, "nothing"),
    ],
)
def test_a_definition_that_can_never_be_is_refused_as_create_refuses_it(
    db: Database, changes: dict[str, Any], error: type[Exception], explanation: str
) -> None:
    hook = hook_on(db)
    db.execute(SOURCE)
    for standing in (False, True):
        if standing:
            hook.create(_base())
        with pytest.raises(error, match=explanation):
            hook.plan(_base(**changes))
        with pytest.raises(error, match=explanation):
            hook.create(_base(**changes))


def test_an_index_name_that_is_taken_is_told_before_anything_is_built(db: Database) -> None:
    hook = hook_on(db)
    db.execute(SOURCE, "CREATE TABLE by_day (a int)", "CREATE SEQUENCE ticks")
    hook.create(_base())
    changed = _base(
        sql="SELECT id, name, amount, day, nextval('ticks') AS t FROM source",
        indexes=[Index(columns=["day"], name="by_day")],
    )
    with pytest.raises(InvalidDefinition, match="by_day of mv cannot be made: something else"):
        hook.create(changed)
    assert db.value("SELECT is_called FROM ticks") is False


def test_settings_of_the_session_make_no_drift(db: Database) -> None:
    db.execute(
        SOURCE,
        "CREATE SCHEMA other",
        "CREATE TABLE other.source (id integer, name varchar(40), amount numeric, day date, tags integer[])",
    )
    text = "SELECT id, 0.1::float8 AS f, date '2026-02-03' AS d, name FROM source WHERE name IN ('a', 'b') OR id > 0"
    plain = hook_on(db)
    definition = MatViewDefinition(name="public.mv", sql=text, unique_index_columns=["id"])
    plain.create(definition)
    options = "-c search_path=public,other -c extra_float_digits=0 -c datestyle=german -c quote_all_identifiers=on"
    odd = hook_on(db, extra=json.dumps({"options": options}))
    assert odd.plan(definition).steps == ()
    # Another search path makes it another query, as it would on its creation.
    away = hook_on(db, extra=json.dumps({"options": "-c search_path=other"}))
    assert [step.kind for step in away.plan(definition).steps] == ["change query", "change column"][:1]


def test_what_default_privileges_give_goes_where_it_is_not_declared(each_db: Database) -> None:
    hook, reader, writer = hook_on(each_db), each_db.role(), each_db.role()
    with each_db.connect() as connection:
        for privilege, role in (("SELECT", reader), ("INSERT", writer)):
            connection.execute(
                sql.SQL("ALTER DEFAULT PRIVILEGES GRANT {} ON TABLES TO {}").format(
                    sql.SQL(privilege), sql.Identifier(role)
                )
            )

    def may() -> tuple[bool, bool]:
        (row,) = each_db.rows(
            "SELECT has_table_privilege(%s, 'mv', 'SELECT'), has_table_privilege(%s, 'mv', 'INSERT')", (reader, writer)
        )
        return row  # type: ignore[return-value]

    plain = MatViewDefinition(name="mv", sql="SELECT 1 AS a")
    hook.create(plain)
    assert may() == (True, True)
    assert hook.plan(plain).steps == ()
    # One role that is to have nothing; then nobody who is not declared.
    none = MatViewDefinition(name="mv", sql="SELECT 1 AS a", grants={writer: ["NONE"]})
    assert [step.kind for step in hook.plan(none).steps] == ["revoke"]
    hook.create(none)
    assert may() == (True, False)
    for changed in (plain.sql, "SELECT 2 AS a"):
        only = MatViewDefinition(name="mv", sql=changed, grants={writer: ["INSERT"]}, exclusive=True)
        hook.create(only)
        assert may() == (False, True)
        assert hook.plan(only).steps == ()
    each_db.execute("DROP MATERIALIZED VIEW mv")
    assert hook.create(only).status == "created"
    assert may() == (False, True)
    assert hook.plan(only).steps == ()
    with each_db.connect() as connection:
        for role in (reader, writer):
            connection.execute(
                sql.SQL("ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM {}").format(sql.Identifier(role))
            )


def test_a_role_is_named_exactly_and_only_public_is_everybody(db: Database) -> None:
    hook = hook_on(db)
    db.roles.append("Public")
    db.execute('CREATE ROLE "Public"')
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS a", grants={"Public": ["SELECT"]})
    hook.create(definition)
    assert db.value("SELECT has_table_privilege('Public', 'mv', 'SELECT')") is True
    assert db.value("SELECT relacl::text ~ '[{,]=' FROM pg_class WHERE relname = 'mv'") is False
    assert hook.plan(definition).steps == ()


def test_an_index_over_the_whole_row_is_refused_before_the_query_runs(db: Database) -> None:
    hook = hook_on(db)
    db.execute("CREATE SEQUENCE ticks")
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    db.execute("CREATE INDEX whole ON mv ((mv.* IS NOT NULL))")
    with pytest.raises(StrategyRefused, match="its index whole names the whole row by the view's name"):
        hook.create(MatViewDefinition(name="mv", sql="SELECT nextval('ticks') AS a"))
    declared = MatViewDefinition(
        name="mv", sql="SELECT 1 AS a", indexes=[Index(columns=[IndexKey(expression="mv.* IS NOT NULL")], name="whole")]
    )
    with pytest.raises(InvalidDefinition, match="The index whole of mv cannot be declared"):
        hook.plan(declared)
    assert db.value("SELECT is_called FROM ticks") is False


def test_an_expression_that_the_server_words_in_another_way_makes_no_drift(each_db: Database) -> None:
    hook = hook_on(each_db)
    each_db.execute(
        "CREATE TABLE t (v varchar)",
        "CREATE MATERIALIZED VIEW mv AS SELECT v FROM t WHERE v IN ('a', 'b')",
        "CREATE INDEX i ON mv (v) WHERE v IN ('a', 'b')",
        "CREATE STATISTICS s ON (v IN ('a', 'b')) FROM mv",
    )
    by_hand = MatViewDefinition(
        name="mv",
        sql="SELECT v FROM t WHERE v IN ('a', 'b')",
        indexes=[Index(columns=["v"], name="i", where="v IN ('a', 'b')")],
        statistics=[ExtendedStatistics(name="s", expressions=["v IN ('a', 'b')"])],
    )
    for definition in (by_hand, hook.definition_of("mv")):
        assert hook.plan(definition).steps == ()
    other = MatViewDefinition(**{**by_hand.to_dict(), "indexes": [], "statistics": [], "exclusive": True})
    assert [step.kind for step in hook.plan(other).steps] == ["drop index", "drop statistics"]


def test_what_is_a_types_own_way_of_storage_is_no_setting(each_db: Database) -> None:
    hook = hook_on(each_db)
    definition = MatViewDefinition(
        name="mv",
        sql="SELECT 'x'::text AS s, 1.5::numeric AS n, 1 AS i",
        columns=[
            Column(name="s", storage="extended", compression="pglz"),
            Column(name="n", storage="main"),
            Column(name="i", storage="plain"),
        ],
    )
    hook.create(definition)
    assert hook.plan(definition).steps == ()
    each_db.execute("ALTER MATERIALIZED VIEW mv ALTER s SET STORAGE EXTERNAL")
    assert [step.kind for step in hook.plan(definition).steps] == ["column settings"]
    assert hook.create(definition).status == "updated"
    assert hook.plan(definition).steps == ()
    wrong = MatViewDefinition(name="mv", sql=definition.sql, columns=[Column(name="i", storage="external")])
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="integer"):
        hook.plan(wrong)


def test_a_grant_that_nobody_could_give_is_refused(db: Database) -> None:
    hook, clerk, reader = hook_on(db), db.role(), db.role()
    grants = {clerk: ["SELECT"], reader: [f"SELECT GRANTED BY {clerk}"]}
    impossible = MatViewDefinition(name="mv", sql="SELECT 1 AS a", grants=grants)
    for standing in (False, True):
        if standing:
            hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
        (refusal,) = hook.plan(impossible).refusals
        assert refusal == f"mv cannot have SELECT granted by {clerk}, who may not grant it."
        with pytest.raises(InvalidDefinition, match="who may not grant it"):
            hook.create(impossible)


def test_an_owner_is_not_kept_from_refreshing_its_own_view(each_db: Database) -> None:
    superuser, owner = hook_on(each_db), each_db.role()
    with each_db.connect() as connection:
        connection.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(owner)))
        connection.execute(
            sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(sql.Identifier(each_db.name), sql.Identifier(owner))
        )
    hook = hook_on(each_db, owner)
    plain = MatViewDefinition(name="mv", sql="SELECT 1 AS a")
    narrow = MatViewDefinition(name="mv", sql="SELECT 1 AS a", grants={owner: ["SELECT"]})
    if each_db.server.major >= 17:
        for standing in (False, True):
            if standing:
                hook.create(plain)
            with pytest.raises(InvalidDefinition, match="could no longer be refreshed"):
                hook.create(narrow)
    else:
        hook.create(narrow)
        assert hook.plan(narrow).steps == ()
    assert hook.refresh("mv").status == "updated"
    assert superuser.plan(plain).refusals == ()


def test_who_may_not_become_the_owner_is_told_before_anything_is_built(each_db: Database) -> None:
    if each_db.server.major < 16:
        pytest.skip("membership has had options of its own since PostgreSQL 16")
    superuser, owner, role = hook_on(each_db), each_db.role(), each_db.role()
    each_db.execute("CREATE SEQUENCE ticks", "GRANT ALL ON SEQUENCE ticks TO PUBLIC")
    with each_db.connect() as connection:
        for each in (owner, role):
            connection.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(each)))
        connection.execute(
            sql.SQL("GRANT {} TO {} WITH INHERIT TRUE, SET FALSE").format(sql.Identifier(owner), sql.Identifier(role))
        )
        connection.execute(
            sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(sql.Identifier(each_db.name), sql.Identifier(role))
        )
    superuser.create(MatViewDefinition(name="mv", sql="SELECT 1::bigint AS a", owner=owner))
    with each_db.connect() as connection:
        connection.execute(sql.SQL("GRANT USAGE, CREATE ON SCHEMA matviews TO {}").format(sql.Identifier(role)))
    changed = MatViewDefinition(name="mv", sql="SELECT nextval('ticks') AS a")
    theirs = hook_on(each_db, role, tracking_schema="theirs")
    (refusal,) = theirs.plan(changed).refusals
    assert "may not SET ROLE to its owner" in refusal
    with pytest.raises(StrategyRefused, match="may not SET ROLE to its owner"):
        theirs.create(changed)
    assert each_db.value("SELECT is_called FROM ticks") is False


def test_without_create_on_the_schema_all_is_compared_as_well(db: Database) -> None:
    hook, owner = hook_on(db), db.role()
    with db.connect() as connection:
        connection.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(owner)))
    definition = MatViewDefinition(
        name="mv", sql="SELECT 1 AS a", owner=owner, storage_parameters={"fillfactor": 80}, unique_index_columns=["a"]
    )
    hook.create(definition)
    with db.connect() as connection:
        connection.execute(sql.SQL("REVOKE CREATE ON SCHEMA public FROM {}").format(sql.Identifier(owner)))
    theirs = hook_on(db, owner)
    assert theirs.plan(definition, exclusive=True).steps == ()
    other = MatViewDefinition(**{**definition.to_dict(), "indexes": [], "storage_parameters": {"fillfactor": 70}})
    assert [step.kind for step in theirs.plan(other).steps] == ["storage parameters"]
