"""Adoption: a view that stands becomes a definition, and a file, from which it can be made again as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from airflow_provider_matviews import adopt as command
from airflow_provider_matviews.definition import (
    Column,
    ExtendedStatistics,
    Index,
    IndexKey,
    MatViewDefinition,
    load_definitions,
)
from airflow_provider_matviews.exceptions import InvalidDefinition, NotAMaterializedView, ViewNotFound, WouldBeLost
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import adopt
from airflow_provider_matviews.services.adopt import Adopted, read_definition, read_definitions, write_definitions
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Work, fetch_all
from airflow_provider_matviews.services.locking import Patience
from airflow_provider_matviews.services.picture import Label, Picture, Privilege
from airflow_provider_matviews.services.plan_steps import StepKind
from tests.conftest import Database, hook_on
from tests.driving import InterruptedDriver, connecting
from tests.racing import until
from tests.test_swap import dump, picture

_ESTATE = Path(__file__).parent / "sql" / "odd_estate.sql"
_SCHEMAS = ("estate", "Other Schema")
#: The server's, which an owner has anyway.
_SOME_PRIVILEGES = frozenset({"SELECT", "INSERT", "UPDATE"})


@dataclass(frozen=True)
class Estate:
    """A database full of odd views, and the roles they were given to."""

    database: Database
    roles: dict[str, str]


@pytest.fixture
def estate(each_db: Database) -> Iterator[Estate]:
    roles = {name: each_db.role() for name in ("owner", "reader", "other", "everyday")}
    # As a person may have named one: not everybody, whom a definition calls so.
    roles["Public"] = "Public"
    with each_db.connect() as connection:
        connection.execute('CREATE ROLE "Public"')
        each_db.roles.append("Public")
        space = sql.Identifier(f"space of {each_db.name}")
        connection.execute("SET allow_in_place_tablespaces = on")
        connection.execute(sql.SQL("CREATE TABLESPACE {} LOCATION ''").format(space))
        text = _ESTATE.read_text()
        for name, role in roles.items():
            text = text.replace(f"<{name}>", f'"{role}"')
        text = text.replace("<tablespace>", space.as_string(None))
        try:
            for statement in text.split(";\n"):
                connection.execute(statement.encode())
            yield Estate(each_db, roles)
        finally:
            connection.execute('DROP SCHEMA IF EXISTS estate, "Other Schema" CASCADE')
            connection.execute(sql.SQL("DROP TABLESPACE {}").format(space))


def adopted(database: Database, view: str) -> Adopted:
    """The definition of one view, and the notes on it."""
    name = ViewName.parse(view)
    resolved = ResolvedName(name.schema or "public", name.name, view)
    with Driver(connecting(database)) as driver:
        return driver.run(read_definition(resolved))


def definition_of(database: Database, view: str = "mv") -> MatViewDefinition:
    """The definition of a view about which there is nothing to note."""
    definition, notes = adopted(database, view)
    assert notes == []
    return definition


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.rglob("*")}


def test_everything_that_a_view_has_is_declared(each_db: Database) -> None:
    owner, reader, other = (each_db.role() for _ in range(3))
    each_db.execute(
        "CREATE TABLE source AS SELECT g AS id, g % 10 AS a, 'x' || g AS b FROM generate_series(1, 9) g",
        'CREATE MATERIALIZED VIEW mv ("Id", a, b) WITH (fillfactor = 80, toast.autovacuum_enabled = off) '
        "AS SELECT id, a, b FROM source",
        'CREATE UNIQUE INDEX "Key" ON mv ("Id")',
        'CREATE INDEX second ON mv (lower(b) COLLATE "C" text_pattern_ops DESC NULLS LAST, a) INCLUDE ("Id") '
        "WITH (fillfactor = 70) WHERE a > 2",
        "ALTER INDEX second ALTER COLUMN 1 SET STATISTICS 9",
        "COMMENT ON INDEX second IS 'about the index'",
        'ALTER MATERIALIZED VIEW mv CLUSTER ON "Key"',
        "ALTER MATERIALIZED VIEW mv REPLICA IDENTITY FULL",
        "ALTER MATERIALIZED VIEW mv DEPENDS ON EXTENSION plpgsql",
        "ALTER MATERIALIZED VIEW mv ALTER a SET STATISTICS 7",
        "ALTER MATERIALIZED VIEW mv ALTER a SET (n_distinct = -0.5, n_distinct_inherited = 2)",
        "ALTER MATERIALIZED VIEW mv ALTER b SET STORAGE MAIN, ALTER b SET COMPRESSION pglz",
        "COMMENT ON COLUMN mv.a IS 'about a'",
        "COMMENT ON MATERIALIZED VIEW mv IS 'about the view'",
        "CREATE STATISTICS stat (mcv) ON a, lower(b) FROM mv",
        "ALTER STATISTICS stat SET STATISTICS 5",
        "COMMENT ON STATISTICS stat IS 'about the statistics'",
        f"ALTER MATERIALIZED VIEW mv OWNER TO {owner}",
        f"GRANT SELECT ON mv TO {reader} WITH GRANT OPTION",
        f"SET ROLE {reader}; GRANT SELECT ON mv TO {other}; RESET ROLE",
        f"GRANT ALL ON mv TO {other}; GRANT SELECT, UPDATE ON mv TO PUBLIC; GRANT SELECT (b) ON mv TO {reader}",
    )
    # Until PostgreSQL 15 the server named the table of a column always.
    table = "source." if each_db.server.major < 16 else ""
    assert definition_of(each_db) == MatViewDefinition(
        name="public.mv",
        sql=f'SELECT {table}id AS "Id",\n    {table}a,\n    {table}b\n   FROM public.source',
        owner=owner,
        comment="about the view",
        storage_parameters={"fillfactor": 80, "toast.autovacuum_enabled": "off"},
        replica_identity="full",
        depends_on_extensions=["plpgsql"],
        grants={
            reader: ["SELECT WITH GRANT OPTION"],
            other: ["ALL", f"SELECT GRANTED BY {reader}"],
            "public": ["SELECT", "UPDATE"],
        },
        columns=[
            Column(
                name="a", comment="about a", statistics=7, options={"n_distinct": "-0.5", "n_distinct_inherited": 2}
            ),
            Column(name="b", storage="main", compression="pglz", grants={reader: ["SELECT"]}),
        ],
        indexes=[
            Index(name="Key", columns=["Id"], unique=True, clustered=True),
            Index(
                name="second",
                columns=[
                    IndexKey(
                        expression="lower(b)",
                        operator_class="pg_catalog.text_pattern_ops",
                        collation='pg_catalog."C"',
                        order="desc",
                        nulls="last",
                        statistics=9,
                    ),
                    "a",
                ],
                include=["Id"],
                where="(a > 2)",
                storage_parameters={"fillfactor": 70},
                comment="about the index",
            ),
        ],
        statistics=[
            ExtendedStatistics(
                name="public.stat",
                columns=["a"],
                expressions=["lower(b)"],
                kinds=["mcv"],
                target=5,
                comment="about the statistics",
                owner="postgres",
            )
        ],
    )


def test_a_plain_view_has_a_short_file(db: Database) -> None:
    db.execute("CREATE TABLE t (id int)", "CREATE MATERIALIZED VIEW mv AS SELECT id FROM t")
    assert definition_of(db).to_sql() == (
        '/* matview\nname = "public.mv"\nowner = "postgres"\n*/\nSELECT id\n   FROM public.t\n'
    )


def test_every_view_of_an_odd_estate_comes_back_from_its_file(estate: Estate, tmp_path: Path) -> None:
    hook, dumped = hook_on(estate.database), dump(estate.database)
    for number, schema in enumerate(_SCHEMAS):
        definitions = hook.adopt(schema, folder=tmp_path / str(number))
        names = [
            row[0]
            for row in estate.database.rows("SELECT matviewname FROM pg_matviews WHERE schemaname = %s", (schema,))
        ]
        assert {definition.view for definition in definitions.values()} == {ViewName(name, schema) for name in names}
        loaded = load_definitions(tmp_path / str(number))
        for name, definition in definitions.items():
            assert loaded[name] == definition == hook.definition_of(name)
            assert definition.managed
        assert len(loaded) == len(definitions) == len(list((tmp_path / str(number)).iterdir()))
        with estate.database.connect() as connection:
            for file in (tmp_path / str(number)).iterdir():
                # For whoever pastes it: the header is a comment to PostgreSQL too.
                connection.execute(file.read_bytes())
        done: set[str] = set()
        for name, definition in definitions.items():
            assert not (set(definition.depends_on) & set(definitions)) - done
            done.add(name)
    # Nor are there run tables.
    assert dump(estate.database) == dumped
    assert estate.database.value("SELECT count(*) FROM pg_namespace WHERE nspname = 'matviews'") == 0


def test_planning_what_was_just_adopted_shows_nothing(estate: Estate, tmp_path: Path) -> None:
    hook, dumped = hook_on(estate.database), dump(estate.database)
    hook.runs()
    for schema in _SCHEMAS:
        hook.adopt(schema, folder=tmp_path / schema)
        definitions = load_definitions(tmp_path / schema)
        steps = {name: hook.plan(definition).steps for name, definition in definitions.items()}
        assert steps == dict.fromkeys(definitions, ())
        assert {hook.create(definition).status for definition in definitions.values()} == {"skipped"}
    assert dump(estate.database) == dumped


def test_an_estate_that_was_dropped_is_made_again_from_its_files(estate: Estate, tmp_path: Path) -> None:
    database, hook = estate.database, hook_on(estate.database)
    # These PostgreSQL words anew when it reads its own words.
    database.execute("DROP MATERIALIZED VIEW estate.q_in, estate.i_in, estate.q_values")
    for schema in _SCHEMAS:
        hook.adopt(schema, folder=tmp_path / schema)
    definitions = load_definitions(tmp_path)
    plain = {
        str(ViewName(name, schema)): text
        for schema, name, text in database.rows(
            "SELECT schemaname, viewname, pg_get_viewdef(format('%I.%I', schemaname, viewname)::regclass) "
            "FROM pg_views WHERE schemaname = 'estate'"
        )
    }
    before, dumped = {name: picture(database, name) for name in definitions}, dump(database)
    function = database.value("SELECT pg_get_functiondef('estate.counted'::regproc)")
    with database.connect() as connection:
        for name in definitions:
            # What stands between them goes with them.
            connection.execute(f"DROP MATERIALIZED VIEW IF EXISTS {_typed(name)} CASCADE".encode())

    for definition in definitions.values():
        assert hook.create(definition).status == "created"
        with database.connect() as connection:
            for view, text in list(plain.items()):
                if _try(connection, f"CREATE VIEW {_typed(view)} AS {text}"):
                    del plain[view]
            _try(connection, function)

    assert {name: picture(database, name) for name in definitions} == before
    assert dump(database) == dumped
    steps = {name: hook.plan(definition).steps for name, definition in definitions.items()}
    assert steps == dict.fromkeys(definitions, ())


@pytest.mark.parametrize("view", ["estate.q_in", "estate.i_in", "estate.q_values"])
def test_what_the_server_words_anew_is_no_drift_when_it_is_made_again(estate: Estate, view: str) -> None:
    hook = hook_on(estate.database)
    definition = hook.definition_of(view)
    hook.delete(definition)
    hook.create(definition)
    assert hook.plan(definition).steps == hook.plan(hook.definition_of(view)).steps == ()


def _typed(name: str) -> str:
    view = ViewName.parse(name)
    return sql.Identifier(*filter(None, (view.schema, view.name))).as_string(None)


def _try(connection: psycopg.Connection[Any], statement: str) -> bool:
    try:
        connection.execute(statement.encode())
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedFunction):
        return False
    return True


def test_what_anybody_who_can_connect_reads_is_what_a_superuser_reads(estate: Estate) -> None:
    stranger = estate.database.role()
    for schema in _SCHEMAS:
        assert hook_on(estate.database, stranger).adopt(schema) == hook_on(estate.database).adopt(schema)


def test_the_settings_of_a_session_change_nothing_of_a_definition_and_stay_as_they_were(estate: Estate) -> None:
    names = ("search_path", "datestyle", "intervalstyle", "extra_float_digits", "array_nulls", "quote_all_identifiers")
    given = {
        "search_path": "estate, public",
        "datestyle": "SQL, DMY",
        "intervalstyle": "sql_standard",
        "extra_float_digits": "-15",
        "quote_all_identifiers": "on",
        "default_transaction_isolation": "serializable",
        "default_transaction_read_only": "on",
        "lock_timeout": "7s",
    }

    def connect() -> psycopg.Connection[Any]:
        options = " ".join(f"-c {name}={value.replace(' ', '')}" for name, value in given.items())
        return psycopg.connect(estate.database.dsn(), options=options)

    def show() -> Work[list[dict[str, Any]]]:
        settings = sql.SQL(", ").join(
            sql.SQL("current_setting({}) AS {}").format(sql.Literal(name), sql.Identifier(name))
            for name in (*names, *given)
        )
        return (yield from fetch_all(sql.SQL("SELECT {}, txid_current_if_assigned() AS id").format(settings)))

    with Driver(connect) as driver:
        before = driver.run(show())
        read = driver.run(read_definitions("estate"))
        assert driver.run(show()) == before
    with Driver(connecting(estate.database)) as driver:
        assert driver.run(read_definitions("estate")) == read


def test_a_view_is_found_as_every_other_operation_finds_it(db: Database) -> None:
    db.execute("CREATE SCHEMA s", "CREATE MATERIALIZED VIEW s.mv AS SELECT 1 AS a", "CREATE TABLE t ()")
    db.execute(f"ALTER DATABASE {db.name} SET search_path = s")
    hook = hook_on(db)
    assert hook.definition_of("MV") == hook.definition_of('s."mv"')
    assert hook.definition_of("mv").name == "s.mv"
    with pytest.raises(ViewNotFound, match="does not exist"):
        hook.definition_of("public.mv")
    with pytest.raises(NotAMaterializedView, match="is a table"):
        hook.definition_of("public.t")
    with pytest.raises(InvalidDefinition, match="does not parse"):
        hook.definition_of("a b")


# -- Notes


@pytest.mark.parametrize(
    ("statements", "note"),
    [
        (["COMMENT ON TYPE mv IS 'x'"], "its row type has a comment of its own, which no definition holds"),
        (["REVOKE USAGE ON TYPE mv FROM PUBLIC"], "its row type has privileges of its own, which no definition holds"),
        (["REFRESH MATERIALIZED VIEW mv WITH NO DATA"], "never been filled: it answers no query before its first"),
        (["COMMENT ON MATERIALIZED VIEW mv IS ' '"], "its comment is nothing but white space"),
        (["COMMENT ON COLUMN mv.a IS E'\n'"], "the comment on column a is nothing but white space"),
        (["CREATE INDEX i ON mv (a)", "COMMENT ON INDEX i IS ' '"], "the comment on index i is nothing but white"),
        (
            ["CREATE STATISTICS s ON (a + 1) FROM mv", "COMMENT ON STATISTICS s IS ' '"],
            "the comment on statistics public.s is nothing but white space",
        ),
        (
            [
                "CREATE UNIQUE INDEX i ON mv (a)",
                "ALTER MATERIALIZED VIEW mv REPLICA IDENTITY FULL",
                "UPDATE pg_class SET relreplident = 'i' WHERE oid = 'mv'::regclass",
            ],
            "the index that was its replica identity is gone",
        ),
    ],
)
def test_what_no_definition_can_say_is_noted(db: Database, statements: list[Any], note: str) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a", *statements)
    definition, notes = adopted(db, "mv")
    assert [note in each for each in notes] == [True]
    # The rest is declared all the same.
    assert {index.name for index in definition.indexes} | {each.name for each in definition.statistics} == {
        name for name in ("i", "public.s") if any(f" {name.split('.')[-1]} ON" in each for each in statements)
    }


def test_an_invalid_index_is_declared_as_it_should_be_and_noted(db: Database) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a UNION ALL SELECT 1")
    with pytest.raises(psycopg.errors.UniqueViolation):
        db.execute("CREATE UNIQUE INDEX CONCURRENTLY i ON mv (a)")
    definition, notes = adopted(db, "mv")
    assert definition.indexes == (Index(name="i", columns=["a"], unique=True),)
    assert notes == [
        "its index i is INVALID (a build of it failed half-way): declared as it should be, and to be built anew"
    ]
    assert [step.kind for step in hook_on(db).plan(definition).steps] == [StepKind.REPAIR_INDEX]


def test_a_view_of_an_extension_is_not_managed(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a", "ALTER EXTENSION plpgsql ADD MATERIALIZED VIEW mv")
    hook = hook_on(db)
    definition = hook.adopt()["public.mv"]
    assert (definition.managed, definition.depends_on_extensions) == (False, ())
    assert MatViewDefinition.from_sql(definition.to_sql()) == definition
    line = (
        "[warning  ] public.mv: it belongs to the extension plpgsql: declared with managed=False, it is only refreshed."
    )
    assert line in capsys.readouterr().out


def test_a_view_that_no_definition_can_hold_is_refused_by_name(db: Database) -> None:
    db.execute(
        'CREATE ACCESS METHOD "Odd" TYPE INDEX HANDLER hashhandler',
        'CREATE OPERATOR CLASS o DEFAULT FOR TYPE integer USING "Odd" AS OPERATOR 1 =, FUNCTION 1 hashint4(integer)',
        "CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a",
        'CREATE INDEX ON mv USING "Odd" (a)',
    )
    with pytest.raises(WouldBeLost, match="mv has what no definition can say: method='Odd' is not the name") as raised:
        hook_on(db).adopt()
    assert len(raised.value.attachments) == 1


def test_security_labels_are_declared() -> None:
    # No provider is at hand to make one.
    column = adopt.ColumnPicture("a", "", "x", None, None, None, (), None, (), (Label("p", "secret"), Label("q", " ")))
    bare = Picture("o", "heap", None, (), (), None, "d", (), (Label("p", "top secret"),), (column,), (), (), ())
    notes: list[str] = []
    definition = adopt.definition_from(
        ViewName("mv", "s"),
        "SELECT 1 AS a;",
        bare,
        notes,
        depends_on=[],
        privileges=_SOME_PRIVILEGES,
        access_method="heap",
    )
    assert definition.security_labels == {"p": "top secret"}
    assert definition.columns == (Column(name="a", security_labels={"p": "secret"}),)
    assert notes == ["the security label of column a by q is nothing but white space, which is not declared"]


# -- Privileges


def _granted(grantee: str | None, privileges: str, *, by: str = "o", option: bool = False) -> list[Privilege]:
    return [Privilege(grantee, by, privilege, option) for privilege in privileges.split()]


@pytest.mark.parametrize(
    ("privileges", "grants"),
    [
        (_granted("o", "INSERT SELECT UPDATE"), {}),
        ([], {"o": ["NONE"]}),
        (_granted("o", "SELECT"), {"o": ["SELECT"]}),
        (_granted("o", "INSERT SELECT UPDATE", option=True), {"o": ["ALL WITH GRANT OPTION"]}),
        (
            [*_granted("o", "INSERT SELECT UPDATE"), *_granted("o", "SELECT", by="r")],
            {"o": ["ALL", "SELECT GRANTED BY r"]},
        ),
        (_granted("o", "INSERT SELECT UPDATE", by="r"), {"o": ["ALL GRANTED BY r"]}),
        (
            [*_granted("o", "INSERT SELECT UPDATE"), *_granted(None, "SELECT"), *_granted("Public", "UPDATE INSERT")],
            {"public": ["SELECT"], "Public": ["INSERT", "UPDATE"]},
        ),
        (
            [
                *_granted("o", "INSERT SELECT UPDATE"),
                *_granted("r", "INSERT UPDATE"),
                *_granted("r", "SELECT", option=True),
                *_granted("r", "SELECT", by='Odd. "R"', option=True),
            ],
            {"r": ['SELECT WITH GRANT OPTION GRANTED BY "Odd. ""R"""', "INSERT", "UPDATE", "SELECT WITH GRANT OPTION"]},
        ),
    ],
)
def test_privileges_are_said_by_role(privileges: list[Privilege], grants: dict[str, list[str]]) -> None:
    said = adopt._grants(privileges, "o", _SOME_PRIVILEGES)
    assert said == grants
    definition = MatViewDefinition(name="mv", sql="SELECT 1", owner="o", grants=said)
    assert MatViewDefinition.from_sql(definition.to_sql()).grants == {role: tuple(each) for role, each in said.items()}


def test_a_column_of_which_nothing_was_granted_says_nothing_of_its_owner() -> None:
    assert adopt._grants([], "o", _SOME_PRIVILEGES, owned=False) == {}
    own = _granted("o", "INSERT SELECT UPDATE")
    assert adopt._grants(own, "o", _SOME_PRIVILEGES, owned=False) == {"o": ["ALL"]}


# -- Which view reads which


def test_a_view_depends_on_those_it_reads_through_views_functions_and_types(db: Database) -> None:
    db.execute(
        "CREATE SCHEMA other",
        "CREATE MATERIALIZED VIEW z AS SELECT 1 AS a",
        "CREATE VIEW v1 AS SELECT a FROM z",
        "CREATE VIEW v2 AS SELECT a FROM v1 WHERE EXISTS (SELECT FROM pg_class)",
        'CREATE MATERIALIZED VIEW other."Y" AS SELECT a FROM v2',
        'CREATE MATERIALIZED VIEW x AS SELECT a FROM other."Y"',
        "CREATE FUNCTION f() RETURNS integer STABLE BEGIN ATOMIC SELECT a FROM x; END",
        "CREATE MATERIALIZED VIEW w AS SELECT f() + (SELECT count(*) FROM v1) AS a",
        "CREATE TABLE t (c z)",
        "CREATE MATERIALIZED VIEW t_only AS SELECT 1 AS a FROM t",
        "CREATE FUNCTION g(z) RETURNS integer IMMUTABLE LANGUAGE sql AS 'SELECT 1'",
        "CREATE MATERIALIZED VIEW u AS SELECT g(NULL) AS a, NULL::x[] AS b",
    )
    definitions = hook_on(db).adopt()
    assert {name: definition.depends_on for name, definition in definitions.items()} == {
        "public.z": (),
        "public.x": ('other."Y"',),
        "public.w": ("public.x", "public.z"),
        "public.t_only": (),
        "public.u": ("public.x", "public.z"),
    }
    assert (
        list(definitions).index("public.z") < list(definitions).index("public.x") < list(definitions).index("public.w")
    )
    assert definition_of(db, 'other."Y"').depends_on == ("public.z",)


def test_views_that_read_each_other_in_a_circle_can_be_loaded(db: Database, tmp_path: Path) -> None:
    db.execute(
        "CREATE VIEW v AS SELECT 1 AS a",
        "CREATE MATERIALIZED VIEW one AS SELECT a FROM v",
        "CREATE VIEW w AS SELECT a FROM one",
        "CREATE MATERIALIZED VIEW two AS SELECT a FROM w",
        "CREATE MATERIALIZED VIEW three AS SELECT a FROM two JOIN v USING (a)",
        "CREATE OR REPLACE VIEW v AS SELECT a FROM three",
        "CREATE VIEW narcissus AS SELECT 1 AS a",
        "CREATE MATERIALIZED VIEW self AS SELECT a FROM narcissus",
        "CREATE OR REPLACE VIEW narcissus AS SELECT a FROM self",
    )
    hook = hook_on(db)
    definitions = hook.adopt(folder=tmp_path)
    assert load_definitions(tmp_path) == definitions
    assert {name: definition.depends_on for name, definition in definitions.items()} == {
        "public.one": (),
        "public.two": ("public.one",),
        "public.three": ("public.two",),
        "public.self": (),
    }
    # The same edge whichever of them is asked for.
    assert {name: hook.definition_of(name) for name in definitions} == definitions
    assert adopted(db, "one")[1] == [
        "it and public.three read each other in a circle: public.three is left out of its depends_on"
    ]
    assert [note.split(":")[0] for note in adopted(db, "self")[1]] == ["it and public.self read each other in a circle"]


def test_a_tangle_of_circles_comes_apart(db: Database, tmp_path: Path) -> None:
    names = [f"mv{number}" for number in range(6)]
    for name in names:
        db.execute(
            f"CREATE VIEW v_{name} AS SELECT 1 AS a", f"CREATE MATERIALIZED VIEW {name} AS SELECT a FROM v_{name}"
        )
    for name in names:
        others = " UNION ALL ".join(f"SELECT a FROM {other}" for other in names)
        db.execute(f"CREATE OR REPLACE VIEW v_{name} AS {others}")
    definitions = hook_on(db).adopt(folder=tmp_path)
    assert load_definitions(tmp_path) == definitions
    # Of each two that read each other, one still waits for the other.
    assert {frozenset((name, other)) for name, each in definitions.items() for other in each.depends_on} == {
        frozenset(pair) for pair in combinations(definitions, 2)
    }


# -- While others are at work


def test_a_view_that_is_locked_is_waited_for(db: Database) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
    with db.connect() as other:
        other.execute("BEGIN; ALTER MATERIALIZED VIEW mv RENAME COLUMN a TO b")
        found: list[MatViewDefinition] = []
        thread = threading.Thread(target=lambda: found.append(hook_on(db).definition_of("mv")))
        thread.start()
        until(db, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND mode = 'AccessShareLock')")
        other.execute("COMMIT")
        thread.join(30)
    assert found[0].sql == "SELECT 1 AS b"


def test_a_view_that_stays_locked_is_given_up_with_a_word_on_who_holds_it(
    db: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adopt, "DEFAULT_PATIENCE", Patience(lock_timeout=0.1, max_wait=0.5))
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a", "CREATE MATERIALIZED VIEW other AS SELECT 1 AS a")
    with db.connect(application_name="nightly") as other:
        other.execute("BEGIN; ALTER MATERIALIZED VIEW mv RENAME COLUMN a TO b")
        with pytest.raises(psycopg.errors.LockNotAvailable) as raised:
            hook_on(db).adopt()
    assert "others kept a lock on mv" in "".join(raised.value.__notes__)
    assert "nightly" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("meanwhile", "names"),
    [
        ("DROP MATERIALIZED VIEW mv", {"public.other"}),
        (
            "BEGIN; DROP MATERIALIZED VIEW mv; CREATE MATERIALIZED VIEW mv AS SELECT 2 AS b; COMMIT",
            {"public.mv", "public.other"},
        ),
    ],
)
def test_a_view_may_go_or_be_replaced_while_a_schema_is_read(db: Database, meanwhile: Any, names: set[str]) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a", "CREATE MATERIALIZED VIEW other AS SELECT 1 AS a")
    done: list[str] = []

    def before(text: str) -> None:
        if text == "SAVEPOINT attempt" and not done:
            done.append(text)
            db.execute(meanwhile)

    with InterruptedDriver(connecting(db), before=before) as driver:
        read = {definition.name: definition for definition, _ in driver.run(read_definitions("public"))}
    assert set(read) == names
    assert all("SELECT 2 AS b" in definition.sql for name, definition in read.items() if name == "public.mv")


def test_a_view_may_be_swapped_between_two_looks_at_it(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a", "CREATE MATERIALIZED VIEW mv AS SELECT a FROM t")
    take, swaps = adopt.take_picture, iter(range(1))

    def interrupted(oid: int) -> Work[Picture | None]:
        # Once: what was looked at after it cannot be swapped until this is over.
        if next(swaps, None) is not None:
            hook_on(db).refresh("mv", refresh_strategy="swap")
        return (yield from take(oid))

    monkeypatch.setattr(adopt, "take_picture", interrupted)
    assert definition_of(db).sql.endswith("FROM public.t")
    assert next(swaps, None) is None


def test_each_view_is_let_go_of_before_the_next_is_read(db: Database) -> None:
    db.execute("CREATE TABLE t (a integer)")
    for number in range(3):
        db.execute(f"CREATE MATERIALIZED VIEW mv{number} AS SELECT a FROM t")
    held: list[int] = []

    def before(text: str) -> None:
        if text == "SAVEPOINT attempt":
            held.append(
                db.value(
                    "SELECT count(*) FROM pg_locks WHERE relation IN (SELECT oid FROM pg_class WHERE relkind = 'm')"
                )
            )

    with InterruptedDriver(connecting(db), before=before) as driver:
        driver.run(read_definitions("public"))
    assert held == [0, 0, 0]


# -- Files


def _view(name: str, text: str = "SELECT 1 AS a", **arguments: Any) -> MatViewDefinition:
    return MatViewDefinition(name=str(ViewName(name, "public")), sql=text, **arguments)


ODD_NAMES = [
    "mv",
    "MV",
    "Mv",
    "mv_2",
    "m v",
    "m_v",
    "m/v",
    "m\\v",
    "m.v",
    "../mv",
    ".mv",
    "-mv",
    "m\nv",
    "m\tv",
    "m\x01v",
    "m*/v",
    "é",
    "e\u0301",
    "m'v",
    'm"v',
    "ß",
    "ss",
    "日本",
    "ü" * 31,
    "Ü" * 31,
    "v" * 63,
    " ",
    ".",
    "..",
    "/",
    "CON",
    "mv.sql",
    "ﬁ",
    "fi",
]


def test_odd_names_make_plain_file_names_and_none_takes_the_place_of_another(tmp_path: Path) -> None:
    definitions = [_view(name) for name in ODD_NAMES]
    files = write_definitions(definitions, tmp_path)
    assert [MatViewDefinition.from_file(file) for file in files] == definitions
    assert load_definitions(tmp_path) == {definition.name: definition for definition in definitions}
    assert {file.parent for file in files} == {tmp_path}
    assert set(tmp_path.iterdir()) == set(files)
    assert all(file.name[0] not in ".-" and not set(file.name) & set(" /\\*'\"\n\t\x01") for file in files)
    assert len({file.name.casefold() for file in files}) == len(ODD_NAMES)
    assert files[ODD_NAMES.index("mv")].name == "mv.sql"
    # Whatever the order they come in.
    assert write_definitions(reversed(definitions), tmp_path, overwrite=True) == files[::-1]


def test_files_that_are_there_are_refused_before_any_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    write_definitions([_view("b"), _view("c")], folder)
    before = files_of(folder)
    with pytest.raises(InvalidDefinition, match=r"Already there: .*b\.sql, .*c\.sql\.\nTo mend it: .*overwrite=True"):
        write_definitions([_view("a"), _view("b", "SELECT 2"), _view("c")], folder)
    assert files_of(folder) == before
    write_definitions([_view("a"), _view("b", "SELECT 2")], folder, overwrite=True)
    assert [definition.sql for definition in load_definitions(folder).values()] == [
        "SELECT 1 AS a",
        "SELECT 2",
        "SELECT 1 AS a",
    ]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_view_that_another_file_declares_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "mart").mkdir()
    (tmp_path / "mart" / "mine.sql").write_text('/* matview\nname = "PUBLIC.b" */ SELECT 3')
    (tmp_path / "broken.sql").write_text("/* matview\nname = */ SELECT 4")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidDefinition, match=r"public\.b is declared in .*mine\.sql already, and would be .*b\.sql"):
        write_definitions([_view("a"), _view("b")], tmp_path, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before
    assert len(write_definitions([_view("a")], tmp_path, overwrite=overwrite)) == 1


def test_a_crash_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_definitions([_view("b")], tmp_path)
    before = files_of(tmp_path)

    def crash(descriptor: int) -> None:
        assert any(path.suffix == ".tmp" for path in tmp_path.iterdir())
        assert load_definitions(tmp_path).keys() <= {"public.b"}
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="No space left"):
        write_definitions([_view("b", "SELECT 2")], tmp_path, overwrite=True)
    assert files_of(tmp_path) == before


def test_line_ends_in_a_query_stay_as_they_are(db: Database, tmp_path: Path) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT E'cr\\r lf\\n crlf\\r\\n' AS a")
    definition = hook_on(db).adopt(folder=tmp_path)["public.mv"]
    assert "'cr\r lf\n crlf\r\n'" in definition.sql
    assert load_definitions(tmp_path)["public.mv"] == definition


# -- The ways in


def test_a_schema_without_views_and_one_that_is_not_there(db: Database, tmp_path: Path) -> None:
    hook = hook_on(db)
    assert hook.adopt(folder=tmp_path / "none") == {}
    with pytest.raises(InvalidDefinition, match='The schema "Nope" does not exist'):
        hook.adopt("Nope")
    with pytest.raises(InvalidDefinition, match="schema name is empty"):
        hook.adopt("")
    with pytest.raises(InvalidDefinition, match="overwrite is true or false"):
        hook.adopt(overwrite="no")  # type: ignore[arg-type]


def test_the_story_says_how_many_and_where(db: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db.execute(
        "CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a WITH NO DATA", 'CREATE MATERIALIZED VIEW "M v" AS SELECT 1 AS a'
    )
    hook_on(db).adopt(folder=tmp_path)
    told = capsys.readouterr().out
    assert "public.mv: it has never been filled" in told
    assert f'public."M v": {tmp_path / "M_v.sql"}' in told
    assert f"Wrote the definitions of 2 materialized views in schema public into {tmp_path}." in told


def _connection(database: Database) -> str:
    parts = {"conn_type": "postgres", "host": "127.0.0.1", "login": "postgres", "schema": database.name}
    return json.dumps({**parts, "port": database.server.port})


def test_a_definition_comes_from_the_database_by_the_connection_s_name(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", _connection(db))
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
    definition = MatViewDefinition.from_database("mv", conn_id="warehouse")
    assert definition == MatViewDefinition(name="public.mv", sql="SELECT 1 AS a", owner="postgres")


def _command(database: Database, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "airflow_provider_matviews.adopt", "--conn-id", "warehouse", *arguments],
        env={**os.environ, "AIRFLOW_CONN_WAREHOUSE": _connection(database)},
        capture_output=True,
        text=True,
    )


@pytest.mark.e2e
def test_one_command_adopts_a_schema(db: Database, tmp_path: Path) -> None:
    db.execute("CREATE SCHEMA s", "CREATE MATERIALIZED VIEW s.mv AS SELECT 1 AS a WITH NO DATA")
    first = _command(db, "--schema", "s", "--to", str(tmp_path / "views"))
    assert (first.returncode, list(load_definitions(tmp_path / "views"))) == (0, ["s.mv"]), first.stderr
    told = first.stdout + first.stderr
    assert "never been filled" in told
    assert "Wrote the definitions of 1 materialized view in schema s" in told
    again = _command(db, "--schema", "s", "--to", str(tmp_path / "views"))
    assert again.returncode == 1
    assert "Already there: " in again.stderr
    assert "Traceback" not in again.stdout + again.stderr
    assert _command(db, "--schema", "s", "--to", str(tmp_path / "views"), "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schema", "nope", "--to", "x"], 'The schema "nope" does not exist'),
        (["--conn-id", "nope", "--to", "x"], "nope"),
        (["--to", "/dev/null/x"], "Not a directory"),
    ],
)
def test_what_goes_wrong_with_the_command_is_told_without_a_traceback(
    db: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIRFLOW_CONN_POSTGRES_DEFAULT", _connection(db))
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
    assert command.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_who_was_shut_out_of_a_view_stays_so_when_it_is_made_anew(each_db: Database) -> None:
    hook, reader, writer = hook_on(each_db), each_db.role(), each_db.role()
    with each_db.connect() as connection:
        for role in (reader, writer):
            connection.execute(
                sql.SQL("ALTER DEFAULT PRIVILEGES GRANT SELECT, INSERT ON TABLES TO {}").format(sql.Identifier(role))
            )
        connection.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
        connection.execute(sql.SQL("REVOKE ALL ON mv FROM {}").format(sql.Identifier(reader)))
        connection.execute(sql.SQL("REVOKE SELECT ON mv FROM {}").format(sql.Identifier(writer)))
    definition = hook.definition_of("mv")
    assert definition.grants == {reader: ("NONE",), writer: ("INSERT",)}
    assert hook.plan(definition).steps == ()
    each_db.execute("DROP MATERIALIZED VIEW mv")
    hook.create(definition)
    assert hook.definition_of("mv") == definition
    assert not each_db.value("SELECT has_table_privilege(%s, 'mv', 'SELECT')", (reader,))
    with each_db.connect() as connection:
        for role in (reader, writer):
            connection.execute(
                sql.SQL("ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM {}").format(sql.Identifier(role))
            )
