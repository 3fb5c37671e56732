"""Swap: a view is built anew and put in place of the old one, and nothing that it had is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from airflow_provider_matviews.definition import RefreshStrategy
from airflow_provider_matviews.exceptions import StrategyRefused
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Command, Work
from airflow_provider_matviews.services.locking import Patience
from airflow_provider_matviews.services.picture import Picture, speak_plainly, take_picture
from tests.conftest import INSTALLATIONS, Database, examples, hook_on
from tests.driving import InterruptedDriver, connecting, refreshing
from tests.racing import until

SOURCE = "CREATE TABLE source AS SELECT g AS id, g % 10 AS a, 'x' || g AS b FROM generate_series(1, 500) g"
LONG = "ü" * 31 + "v"  # 63 bytes


def picture(database: Database, view: str) -> Picture:
    """The catalog's picture of a view, without what holds OIDs or positions in a text."""
    with database.connect() as connection:
        row = connection.execute("SELECT %s::regclass::oid::bigint", (view,)).fetchone()
    assert row is not None

    def taken() -> Work[Picture | None]:
        yield Command(sql.SQL("BEGIN"))
        yield from speak_plainly()
        return (yield from take_picture(row[0]))

    with Driver(connecting(database)) as driver:
        found = driver.run(taken())
    assert found is not None
    return replace(
        found,
        indexes=tuple(replace(each, fingerprint="") for each in found.indexes),
        statistics=tuple(replace(each, fingerprint="") for each in found.statistics),
    )


def dump(database: Database) -> list[str]:
    """What pg_dump says of the database: a witness that shares no code with what is tested."""
    program = INSTALLATIONS[database.server.major] / "pg_dump"
    command = [str(program), "--schema-only", "--exclude-schema=matviews", database.dsn()]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    # Newer releases write a random word into every dump.
    return sorted(line for line in lines if not line.startswith(("\\restrict", "\\unrestrict")))


def oid(database: Database, relation: str) -> int:
    return int(database.value("SELECT %s::regclass::oid::bigint", (relation,)))


def everything(database: Database, view: str) -> dict[str, str]:
    """Make a view with everything a view can have; return the roles used."""
    roles = {name: database.role() for name in ("owner", "reader", "other", "everyday")}
    database.execute(SOURCE, "CREATE EXTENSION IF NOT EXISTS plpgsql")
    name = ViewName.parse(view)
    words = {key: sql.Identifier(role) for key, role in roles.items()}
    words |= {
        "view": sql.Identifier("public", name.name),
        "unique": sql.Identifier(name.name[:12] + " key"),
        "public": sql.Identifier(database.name),
    }
    statements = """
        GRANT CREATE, USAGE ON SCHEMA public TO {owner}
        GRANT SELECT ON source TO {owner}
        ALTER DEFAULT PRIVILEGES GRANT INSERT, DELETE ON TABLES TO {everyday}
        CREATE MATERIALIZED VIEW {view} ("Id", a, "B b") WITH (fillfactor = 80, toast.autovacuum_enabled = false)
            AS SELECT id, a, b FROM source
        ALTER MATERIALIZED VIEW {view} OWNER TO {owner}
        CREATE UNIQUE INDEX {unique} ON {view} ("Id")
        CREATE INDEX "expr ix" ON {view} (lower("B b") COLLATE "C" text_pattern_ops DESC NULLS LAST, a)
            INCLUDE ("Id") WITH (fillfactor = 70) WHERE a > 2
        CREATE INDEX brin_ix ON {view} USING brin (a) WITH (pages_per_range = 16)
        ALTER INDEX "expr ix" ALTER COLUMN 1 SET STATISTICS 500
        ALTER INDEX brin_ix DEPENDS ON EXTENSION plpgsql
        COMMENT ON INDEX "expr ix" IS 'about the index'
        ALTER MATERIALIZED VIEW {view} ALTER COLUMN a SET STATISTICS 77
        ALTER MATERIALIZED VIEW {view} ALTER COLUMN "B b" SET STORAGE EXTERNAL
        ALTER MATERIALIZED VIEW {view} ALTER COLUMN "B b" SET COMPRESSION pglz
        ALTER MATERIALIZED VIEW {view} ALTER COLUMN a SET (n_distinct = 5)
        COMMENT ON COLUMN {view}.a IS 'it''s "a"'
        COMMENT ON MATERIALIZED VIEW {view} IS 'about % the view'
        ALTER MATERIALIZED VIEW {view} CLUSTER ON {unique}
        ALTER MATERIALIZED VIEW {view} DEPENDS ON EXTENSION plpgsql
        CREATE STATISTICS "stat S" (ndistinct, dependencies) ON a, "B b" FROM {view}
        CREATE STATISTICS stat_expr ON (a + 1), lower("B b") FROM {view}
        COMMENT ON STATISTICS "stat S" IS 'about the statistics'
        ALTER STATISTICS "stat S" SET STATISTICS 33
        ALTER STATISTICS stat_expr OWNER TO {owner}
        REVOKE TRIGGER ON {view} FROM {owner}
        REVOKE INSERT, DELETE ON {view} FROM {everyday}
        GRANT SELECT ON {view} TO {reader} WITH GRANT OPTION
        SET ROLE {reader}
        GRANT SELECT ON {view} TO {other}
        RESET ROLE
        GRANT UPDATE (a), REFERENCES ("Id") ON {view} TO {other} WITH GRANT OPTION
        GRANT SELECT ON {view} TO PUBLIC
        """
    with database.connect() as connection:
        for statement in statements.replace("\n            ", " ").splitlines():
            if statement.strip():
                connection.execute(sql.SQL(statement).format(**words))
        connection.execute("CREATE EXTENSION IF NOT EXISTS plpgsql")
    return roles


@pytest.mark.parametrize("view", ["plain", 'public."Odd ""Näme.x"', f'"{LONG}"'])
def test_a_swapped_view_differs_in_nothing_but_its_oid(each_db: Database, view: str) -> None:
    everything(each_db, view)
    before, old_oid = picture(each_db, view), oid(each_db, view)
    each_db.execute("INSERT INTO source VALUES (1000, 3, 'late')")

    hook, dumped = hook_on(each_db), dump(each_db)
    hook.runs()
    relations = each_db.rows("SELECT relname FROM pg_class WHERE relnamespace <> 'pg_toast'::regnamespace ORDER BY 1")
    response = hook.refresh(view, refresh_strategy="swap", row_count_strategy="exact")

    assert oid(each_db, view) != old_oid
    assert picture(each_db, view) == before
    assert dump(each_db) == dumped
    assert (
        each_db.rows("SELECT relname FROM pg_class WHERE relnamespace <> 'pg_toast'::regnamespace ORDER BY 1")
        == relations
    )
    assert (response.response["row_count_before"], response.response["row_count_after"]) == (500, 501)


DEPENDENTS = """
    CREATE VIEW direct WITH (security_barrier) AS SELECT a, b FROM mv
    ALTER VIEW direct RENAME COLUMN b TO "B renamed"
    ALTER VIEW direct ALTER COLUMN a SET DEFAULT 7
    COMMENT ON VIEW direct IS 'about direct'
    CREATE VIEW second AS SELECT d.a, m.id FROM direct d JOIN mv m USING (a)
    CREATE VIEW through AS SELECT count(*) AS n FROM second
    CREATE MATERIALIZED VIEW through_a_view AS SELECT * FROM through
    CREATE TABLE log (x integer)
    CREATE RULE watching AS ON INSERT TO log DO ALSO SELECT count(*) FROM mv
    ALTER TABLE log DISABLE RULE watching
    ALTER TABLE log ENABLE ROW LEVEL SECURITY
    CREATE POLICY known ON log FOR UPDATE USING (x IN (SELECT id FROM mv)) WITH CHECK (EXISTS (SELECT FROM mv))
    CREATE FUNCTION counted() RETURNS bigint STABLE BEGIN ATOMIC SELECT count(*) FROM mv; END
    COMMENT ON FUNCTION counted IS 'about counted'
"""


def dependents_picture(database: Database) -> list[tuple[Any, ...]]:
    return database.rows(
        """
        SELECT oid::bigint, relname::text, relowner::bigint, relacl::text, reloptions::text, pg_get_viewdef(oid),
               obj_description(oid) FROM pg_class WHERE relname IN ('direct', 'second', 'through')
        UNION ALL SELECT oid, proname, proowner, proacl::text, provolatile::text, pg_get_functiondef(oid),
               obj_description(oid) FROM pg_proc WHERE proname = 'counted'
        UNION ALL SELECT oid, rulename, ev_class, ev_enabled::text, NULL, pg_get_ruledef(oid), NULL
               FROM pg_rewrite WHERE rulename = 'watching'
        UNION ALL SELECT oid, polname, polrelid, polcmd::text, pg_get_expr(polwithcheck, polrelid),
               pg_get_expr(polqual, polrelid), NULL FROM pg_policy
        UNION ALL SELECT adrelid, 'default', adnum, NULL, NULL, pg_get_expr(adbin, adrelid), NULL FROM pg_attrdef
               WHERE adrelid = 'direct'::regclass
        ORDER BY 1, 2
        """
    )


def test_what_is_built_on_a_swapped_view_keeps_its_oid_and_reads_the_new_rows(each_db: Database) -> None:
    reader = each_db.role()
    each_db.execute(SOURCE, "CREATE MATERIALIZED VIEW mv AS SELECT * FROM source")
    with each_db.connect() as connection:
        for statement in DEPENDENTS.strip().splitlines():
            connection.execute(statement.strip())
        connection.execute(sql.SQL("GRANT SELECT ON direct, through TO {}").format(sql.Identifier(reader)))
    before, dumped = dependents_picture(each_db), dump(each_db)
    each_db.execute("INSERT INTO source VALUES (1000, 3, 'late')")

    hook_on(each_db).refresh("mv", refresh_strategy="swap")

    assert dependents_picture(each_db) == before
    assert dump(each_db) == dumped
    assert each_db.value("SELECT counted()") == 501
    assert each_db.value("SELECT count(*) FROM direct WHERE \"B renamed\" = 'late'") == 1
    with each_db.connect(user=reader) as connection:
        assert connection.execute("SELECT n > 0 FROM through").fetchone() == (True,)


ATTRIBUTES = [
    "CREATE UNIQUE INDEX ON {v} (id)",
    "CREATE INDEX ON {v} USING hash (b)",
    "CREATE INDEX ON {v} (a DESC NULLS LAST, lower(b)) WHERE a > 1",
    "CREATE INDEX ON {v} (a) INCLUDE (id) WITH (fillfactor = 60)",
    "CREATE STATISTICS ON a, b FROM {v}",
    "CREATE STATISTICS ON (a * 2) FROM {v}",
    "COMMENT ON MATERIALIZED VIEW {v} IS 'c'",
    "COMMENT ON COLUMN {v}.b IS 'cb'",
    "ALTER MATERIALIZED VIEW {v} ALTER COLUMN b SET STORAGE MAIN",
    "ALTER MATERIALIZED VIEW {v} ALTER COLUMN a SET STATISTICS 0",
    "ALTER MATERIALIZED VIEW {v} ALTER COLUMN id SET (n_distinct = -0.5, n_distinct_inherited = -0.5)",
    "ALTER MATERIALIZED VIEW {v} SET (autovacuum_enabled = false, fillfactor = 50)",
    "ALTER MATERIALIZED VIEW {v} SET (toast.autovacuum_vacuum_threshold = 9)",
    "ALTER MATERIALIZED VIEW {v} REPLICA IDENTITY FULL",
    'ALTER MATERIALIZED VIEW {v} RENAME COLUMN b TO "b b"',
    "GRANT SELECT, TRIGGER ON {v} TO PUBLIC",
    "GRANT SELECT (a), UPDATE (id) ON {v} TO {r} WITH GRANT OPTION",
    "GRANT ALL ON {v} TO {r}",
    "ALTER MATERIALIZED VIEW {v} OWNER TO {r}",
    "CREATE VIEW {d} AS SELECT * FROM {v}",
]
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=63).filter(
    lambda text: len(text.encode()) <= 63
)


@pytest.mark.e2e
def test_any_mixture_of_attributes_survives_a_swap(db: Database) -> None:
    role = db.role()
    db.execute(SOURCE, f"GRANT CREATE, USAGE ON SCHEMA public TO {role}", f"GRANT SELECT ON source TO {role}")
    numbers = iter(range(1000))

    @settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(name=NAMES, chosen=st.lists(st.sampled_from(ATTRIBUTES), unique=True, max_size=len(ATTRIBUTES)))
    def survives(name: str, chosen: list[str]) -> None:
        schema = f"s{next(numbers)}"
        view = sql.Identifier(schema, name)
        words = {"v": view, "r": sql.Identifier(role), "d": sql.Identifier(schema, "dependent " + schema)}
        with db.connect() as connection:
            connection.execute(f"CREATE SCHEMA {schema}")
            connection.execute(f"GRANT CREATE, USAGE ON SCHEMA {schema} TO {role}")
            connection.execute(
                sql.SQL("CREATE MATERIALIZED VIEW {} AS SELECT id, a, b FROM public.source").format(view)
            )
            # The column of the others is renamed last.
            for statement in sorted(chosen, key=lambda text: "RENAME" in text):
                connection.execute(sql.SQL(statement).format(**words))
        typed = view.as_string(None)
        before = picture(db, typed)

        hook_on(db).refresh(typed, refresh_strategy="swap")

        assert picture(db, typed) == before

    survives()


def during(database: Database, moment: str, action: str) -> Callable[[str], None]:
    """Return a callback that runs a statement on another connection once, when a command is about to run."""
    done: list[str] = []

    def act(text: str) -> None:
        if text.startswith(moment) and not done:
            done.append(text)
            with database.connect() as connection:
                connection.execute(action)

    return act


@pytest.mark.parametrize(
    ("action", "remains"),
    [
        ("GRANT SELECT ON mv TO PUBLIC", "SELECT has_table_privilege('public', 'mv', 'SELECT')"),
        ("GRANT SELECT (a) ON mv TO PUBLIC", "SELECT attacl IS NOT NULL FROM pg_attribute WHERE attname = 'a' "
         "AND attrelid = 'mv'::regclass"),
        ("CREATE INDEX new_ix ON mv (a)", "SELECT 'new_ix'::regclass::oid IN (SELECT indexrelid FROM pg_index "
         "WHERE indrelid = 'mv'::regclass)"),
        ("COMMENT ON MATERIALIZED VIEW mv IS 'new'", "SELECT obj_description('mv'::regclass) = 'new'"),
        ("COMMENT ON INDEX mv_ix IS 'new'", "SELECT obj_description('mv_ix'::regclass) = 'new'"),
        ("ALTER MATERIALIZED VIEW mv SET (fillfactor = 42)",
         "SELECT reloptions::text LIKE '%42%' FROM pg_class WHERE relname = 'mv'"),
        ("CREATE VIEW newcomer AS SELECT * FROM mv", "SELECT count(*) = 501 FROM newcomer"),
        ("CREATE STATISTICS new_stat ON a, b FROM mv",
         "SELECT stxrelid = 'mv'::regclass FROM pg_statistic_ext WHERE stxname = 'new_stat'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("moment", ["REFRESH", 'ALTER MATERIALIZED VIEW "public"."mv" OWNER'])
def test_a_change_made_while_a_view_is_rebuilt_is_not_lost(
    db: Database, action: str, remains: str, moment: str
) -> None:
    db.execute(SOURCE, "CREATE MATERIALIZED VIEW mv AS SELECT * FROM source", "CREATE INDEX mv_ix ON mv (id)")
    db.execute("INSERT INTO source VALUES (1000, 3, 'late')")
    with InterruptedDriver(connecting(db), before=during(db, moment, action)) as driver:
        response = driver.run(refreshing("mv", RefreshStrategy.SWAP))
    assert response.response["strategy"] == "swap"
    assert db.value(remains) is True
    assert db.value("SELECT count(*) FROM mv") == 501


@pytest.mark.parametrize("grant", ["GRANT SELECT ON mv TO PUBLIC", "GRANT SELECT (a) ON mv TO PUBLIC"])
def test_a_grant_made_in_the_cut_itself_is_carried_or_fails_but_is_never_lost(db: Database, grant: str) -> None:
    db.execute(SOURCE, "CREATE MATERIALIZED VIEW mv AS SELECT * FROM source")
    ended: list[BaseException | None] = []

    def granting() -> None:
        try:
            db.execute(grant)
            ended.append(None)
        except psycopg.Error as error:
            ended.append(error)

    thread = threading.Thread(target=granting)

    def after_the_drop(text: str) -> None:
        if text.startswith("DROP MATERIALIZED VIEW") and not thread.ident:
            thread.start()
            # It waits for the row that DROP has deleted, or has read the old name already.
            thread.join(0.3)

    with InterruptedDriver(connecting(db), after=after_the_drop) as driver:
        driver.run(refreshing("mv", RefreshStrategy.SWAP))
    thread.join()
    granted = db.value(
        "SELECT relacl IS NOT NULL OR EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attacl IS NOT NULL) "
        "FROM pg_class c WHERE relname = 'mv'"
    )
    assert granted == (ended == [None])


def test_a_view_that_is_changed_all_the_time_is_left_alone(db: Database) -> None:
    db.execute(SOURCE, "CREATE MATERIALIZED VIEW mv AS SELECT * FROM source")
    numbers = iter(range(100))

    def change(text: str) -> None:
        if text.startswith("REFRESH"):
            db.execute(f"COMMENT ON MATERIALIZED VIEW mv IS '{next(numbers)}'")

    with InterruptedDriver(connecting(db), before=change) as driver, pytest.raises(StrategyRefused, match="changed"):
        driver.run(refreshing("mv", RefreshStrategy.SWAP))
    assert db.value("SELECT obj_description('mv'::regclass)") == "2"
    assert db.value("SELECT count(*) FROM pg_class WHERE relname LIKE 'mv%'") == 1


def test_a_materialized_view_made_on_top_meanwhile_stops_the_swap(db: Database) -> None:
    db.execute(SOURCE, "CREATE MATERIALIZED VIEW mv AS SELECT * FROM source")
    before = during(db, "REFRESH", "CREATE MATERIALIZED VIEW top AS SELECT * FROM mv")
    with (
        InterruptedDriver(connecting(db), before=before) as driver,
        pytest.raises(StrategyRefused, match=r"public\.top"),
    ):
        driver.run(refreshing("mv", RefreshStrategy.SWAP))
    assert db.value("SELECT count(*) FROM top") == 500


@pytest.mark.parametrize(
    ("tie", "name"),
    [
        ("CREATE MATERIALIZED VIEW top AS SELECT * FROM mv", "materialized view top"),
        ("CREATE TABLE holder (one mv)", "column one of table holder"),
        ("CREATE TABLE holder (many mv[])", "column many of table holder"),
        ("CREATE FUNCTION giver() RETURNS SETOF mv LANGUAGE sql AS 'SELECT * FROM mv'", "function giver()"),
        ("CREATE FUNCTION taker(mv) RETURNS integer LANGUAGE sql AS 'SELECT 1'", "function taker(mv)"),
        ("CREATE VIEW whole AS SELECT mv FROM mv", "view whole"),
    ],
)
def test_what_cannot_follow_refuses_swap_by_name_and_auto_takes_another_way(
    each_db: Database, tie: str, name: str
) -> None:
    each_db.execute(SOURCE, "CREATE MATERIALIZED VIEW mv AS SELECT * FROM source", tie)
    hook = hook_on(each_db)
    old = oid(each_db, "mv")
    with pytest.raises(StrategyRefused) as refused:
        hook.refresh("mv", refresh_strategy="swap")
    assert name in str(refused.value)
    response = hook.refresh("mv")
    assert response.response["strategy"] == "regular"
    assert name in response.response["reason"]
    assert oid(each_db, "mv") == old


def test_a_view_without_columns_is_swapped(each_db: Database) -> None:
    each_db.execute(SOURCE, "CREATE MATERIALIZED VIEW mv AS SELECT FROM source")
    assert hook_on(each_db).refresh("mv", refresh_strategy="swap").response["row_count_after"] == 500


def test_a_role_that_may_not_flush_the_wal_swaps_all_the_same(db: Database) -> None:
    owner = db.role()
    db.execute(
        f"GRANT CREATE ON DATABASE {db.name} TO {owner}",
        f"GRANT CREATE, USAGE ON SCHEMA public TO {owner}",
        "REVOKE EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, text, boolean) FROM PUBLIC",
    )
    with db.connect(user=owner) as connection:
        connection.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
    assert hook_on(db, user=owner).refresh("mv", refresh_strategy="swap").status == "updated"


def test_an_invalid_index_refuses_swap(each_db: Database) -> None:
    each_db.execute(SOURCE, "CREATE MATERIALIZED VIEW mv AS SELECT * FROM source")
    with each_db.connect() as connection, pytest.raises(psycopg.errors.UniqueViolation):
        connection.execute("CREATE UNIQUE INDEX CONCURRENTLY broken ON mv (a)")
    with pytest.raises(StrategyRefused, match="broken is INVALID"):
        hook_on(each_db).refresh("mv", refresh_strategy="swap")


def test_a_plain_owner_swaps_a_view_with_grants_of_others_only_where_it_can_act_for_them(each_db: Database) -> None:
    owner, reader, other = each_db.role(), each_db.role(), each_db.role()
    words = {name: sql.Identifier(role) for name, role in (("o", owner), ("r", reader), ("x", other))}
    each_db.execute(SOURCE)
    with each_db.connect() as connection:
        for statement in (
            "GRANT CREATE ON DATABASE " + each_db.name + " TO {o}",
            "GRANT CREATE, USAGE ON SCHEMA public TO {o}",
            "GRANT SELECT ON source TO {o}",
            "SET ROLE {o}",
            "CREATE MATERIALIZED VIEW mv AS SELECT * FROM source",
            "GRANT SELECT ON mv TO {r} WITH GRANT OPTION",
        ):
            connection.execute(sql.SQL(statement).format(**words))
    hook = hook_on(each_db, user=owner)
    before = picture(each_db, "mv")
    assert hook.refresh("mv", refresh_strategy="swap").status == "updated"
    assert picture(each_db, "mv") == before

    with each_db.connect(user=reader) as connection:
        connection.execute(sql.SQL("GRANT SELECT ON mv TO {x}").format(**words))
    with pytest.raises(StrategyRefused, match=f"granted by {reader}"):
        hook.refresh("mv", refresh_strategy="swap")
    each_db.execute(f"GRANT {reader} TO {owner}")
    before = picture(each_db, "mv")
    assert hook.refresh("mv", refresh_strategy="swap").status == "updated"
    assert picture(each_db, "mv") == before


def test_newcomers_read_on_while_a_swap_cannot_have_its_lock(db: Database) -> None:
    db.execute(SOURCE, "CREATE MATERIALIZED VIEW mv AS SELECT * FROM source", "CREATE VIEW dep AS SELECT * FROM mv")
    passed: list[int] = []
    notes: list[str] = []

    class Watching(InterruptedDriver):
        def _perform(self, instruction: Any) -> Any:
            if type(instruction).__name__ == "Note":
                notes.append(instruction.message)
            if type(instruction).__name__ == "Pause" and len(passed) < 3:
                # It steps back now: whoever comes gets through at once.
                with db.connect(options="-c lock_timeout=100ms") as newcomer:
                    passed.append(newcomer.execute("SELECT count(*) FROM dep").fetchone()[0])  # type: ignore[index]
                if len(passed) == 3:
                    reader.rollback()
            return super()._perform(instruction)

    with psycopg.connect(db.dsn(), application_name="dashboard") as reader:
        reader.execute("SELECT count(*) FROM mv")
        pid = str(reader.info.backend_pid)
        with Watching(connecting(db)) as driver:
            response = driver.run(refreshing("mv", RefreshStrategy.SWAP, Patience(0.05, 20)))
    assert response.response["strategy"] == "swap"
    assert response.response["rebuilds"] == 1
    assert passed == [500, 500, 500]
    assert any("dashboard" in note and pid in note for note in notes)


class KilledDriver(InterruptedDriver):
    """Kills its own process, as the out-of-memory killer does, before its n-th instruction."""

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]], steps: int) -> None:
        super().__init__(connect)
        self.steps = steps

    def _perform(self, instruction: Any) -> Any:
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps -= 1
        return super()._perform(instruction)


def swap_killed_after(database: Database, steps: int) -> bool:
    """Run a swap in a process of its own that is killed; return whether it was, or had ended before."""
    child = os.fork()
    if child == 0:
        try:
            with KilledDriver(lambda: psycopg.connect(database.dsn(), application_name="killed"), steps) as driver:
                driver.run(refreshing("mv", RefreshStrategy.SWAP))
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.e2e
def test_a_swap_killed_at_any_step_leaves_the_old_view_and_nothing_beside_it(db: Database) -> None:
    db.execute(SOURCE, "CREATE MATERIALIZED VIEW mv AS SELECT * FROM source", "CREATE UNIQUE INDEX mv_key ON mv (id)")
    db.execute("CREATE STATISTICS mv_stat ON a, b FROM mv", "CREATE VIEW dep AS SELECT * FROM mv")
    hook = hook_on(db)
    hook.runs()
    names = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    before, standing = picture(db, "mv"), db.rows(names)
    db.execute("INSERT INTO source VALUES (1000, 3, 'late')")
    steps = 0
    while swap_killed_after(db, steps):
        until(db, "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'killed'")
        success = db.value("SELECT count(*) FROM matviews.mat_view_runs WHERE status = 2") == 1
        assert db.value("SELECT count(*) FROM dep") == (501 if success else 500), steps
        assert db.rows(names) == standing, steps
        if success:
            break
        steps += 1
    assert steps > 40
    assert picture(db, "mv") == before
    assert hook.refresh("mv", refresh_strategy="swap").response["row_count_after"] == 501
    lost = db.value("SELECT count(*) FROM matviews.mat_view_runs WHERE status = 3 AND error->>'class' = 'RunLost'")
    assert lost > 30
    assert db.value("SELECT count(*) FROM matviews.mat_view_runs WHERE status = 1") == 0


def test_columns_of_types_on_the_search_path_are_swapped(each_db: Database) -> None:
    each_db.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok')",
        "CREATE DOMAIN positive AS integer CHECK (VALUE > 0)",
        "CREATE MATERIALIZED VIEW mv AS SELECT 'ok'::mood AS m, 1::positive AS p",
    )
    response = hook_on(each_db).refresh("mv", refresh_strategy="swap").response
    assert (response["rebuilds"], each_db.rows("SELECT m::text, p FROM mv")) == (1, [("ok", 1)])


def test_constants_in_queries_survive_settings_that_shorten_them(each_db: Database) -> None:
    each_db.execute(
        "CREATE MATERIALIZED VIEW mv AS SELECT '0.30000000000000004'::float8 AS f, '{1,NULL}'::integer[] AS a",
        "CREATE VIEW dep AS SELECT '0.30000000000000004'::float8 AS g FROM mv",
        f"ALTER DATABASE {each_db.name} SET extra_float_digits = 0",
        f"ALTER DATABASE {each_db.name} SET array_nulls = off",
        f"ALTER DATABASE {each_db.name} SET datestyle = 'SQL, DMY'",
    )
    dumped = dump(each_db)
    hook_on(each_db).refresh("mv", refresh_strategy="swap")
    assert dump(each_db) == dumped


def test_two_swaps_of_views_with_a_dependent_in_common_both_succeed(each_db: Database) -> None:
    each_db.execute(
        "CREATE MATERIALIZED VIEW one AS SELECT 1 AS id",
        "CREATE MATERIALIZED VIEW two AS SELECT 1 AS id",
        "CREATE VIEW dep AS SELECT one.id FROM one JOIN two USING (id)",
    )
    hook_on(each_db).runs()
    start = threading.Barrier(2)

    def swapping(view: str) -> list[Any]:
        strategies = []
        for _ in range(4):
            start.wait(30)
            strategies.append(hook_on(each_db).refresh(view, refresh_strategy="swap", max_wait=30).status)
        return strategies

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(swapping, ["one", "two"])) == [["updated"] * 4] * 2
    assert each_db.rows("SELECT id FROM dep") == [(1,)]


def test_auto_leaves_a_view_alone_that_an_sql_standard_function_reads(each_db: Database) -> None:
    each_db.execute(
        SOURCE,
        "CREATE MATERIALIZED VIEW mv AS SELECT * FROM source",
        "CREATE FUNCTION counted() RETURNS bigint BEGIN ATOMIC SELECT count(*) FROM mv; END",
    )
    response = hook_on(each_db).refresh("mv").response
    assert response["strategy"] == "regular"
    assert "whoever runs function counted()" in response["reason"]


def test_auto_takes_another_way_where_a_swap_turns_out_not_to_be_possible(db: Database) -> None:
    owner = db.role()
    db.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok')",
        f"GRANT CREATE ON DATABASE {db.name} TO {owner}",
        f"GRANT CREATE, USAGE ON SCHEMA public TO {owner}",
        "CREATE MATERIALIZED VIEW mv AS SELECT 'ok'::mood AS m",
        f"ALTER MATERIALIZED VIEW mv OWNER TO {owner}",
        "REVOKE USAGE ON TYPE mood FROM PUBLIC",
    )
    response = hook_on(db, user=owner).refresh("mv").response
    assert response["strategy"] == "regular"
    assert "permission denied for type" in response["reason"]


def test_auto_does_not_refresh_concurrently_for_an_owner_without_temporary_tables(db: Database) -> None:
    owner = db.role()
    db.execute(
        f"REVOKE TEMP ON DATABASE {db.name} FROM PUBLIC",
        f"GRANT CREATE ON DATABASE {db.name} TO {owner}",
        f"GRANT CREATE, USAGE ON SCHEMA public TO {owner}",
        "CREATE MATERIALIZED VIEW mv AS SELECT 1 AS id",
        "CREATE UNIQUE INDEX ON mv (id)",
        f"ALTER MATERIALIZED VIEW mv OWNER TO {owner}",
    )
    assert hook_on(db, user=owner).refresh("mv").response["strategy"] == "swap"


@pytest.mark.parametrize("strategy", ["swap", "regular", "concurrent"])
def test_a_refresh_outlasts_an_autovacuum_worker(db: Database, strategy: str) -> None:
    db.execute(
        "ALTER SYSTEM SET autovacuum = on",
        "ALTER SYSTEM SET autovacuum_naptime = 1",
        "SELECT pg_reload_conf()",
        "CREATE MATERIALIZED VIEW mv AS SELECT g AS id, repeat('x', 200) AS b FROM generate_series(1, 60000) g",
        "CREATE UNIQUE INDEX ON mv (id)",
        "ALTER MATERIALIZED VIEW mv SET (autovacuum_vacuum_insert_threshold = 10, autovacuum_vacuum_cost_delay = 100, "
        "autovacuum_vacuum_cost_limit = 1)",
    )
    hook = hook_on(db)
    hook.runs()
    until(
        db,
        "SELECT EXISTS (SELECT FROM pg_stat_progress_vacuum p WHERE p.relid = 'mv'::regclass)",
        seconds=60,
    )
    status = hook.refresh("mv", refresh_strategy=strategy, lock_timeout=0.05, max_wait=30).status
    db.execute("ALTER SYSTEM RESET ALL", "SELECT pg_reload_conf()")
    assert status == "updated"


def test_a_build_may_outlast_the_idle_timeout_of_the_records_connection(db: Database) -> None:
    role = db.role("LOGIN SUPERUSER")
    db.execute(
        f"ALTER ROLE {role} SET idle_session_timeout = '300ms'",
        "CREATE MATERIALIZED VIEW mv AS SELECT pg_sleep(1)::text AS slept, 1 AS a",
    )
    assert hook_on(db, user=role).refresh("mv", refresh_strategy="swap").status == "updated"
