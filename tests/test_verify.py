"""Views compared with their queries: what differs, what that is called, and that nothing else is taken for it."""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from airflow.sdk import DAG
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import (
    InvalidDefinition,
    MissingPrivilege,
    NotAMaterializedView,
    OperationCancelled,
    OperationTimedOut,
    ViewNotFound,
)
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.operators.matview import VerifyMatViewOperator
from airflow_provider_matviews.services import verify
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.comparison import ComparedColumn, Sides, parse_row, read_differences
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Instruction, Pause, Query, Result
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.run import Subject, Terms
from airflow_provider_matviews.services.verification import Scope, Verdict, VerifyMode
from demo.postgres_server import PostgresServer
from tests.airflow_dags import run_dag, set_connection
from tests.conftest import INSTALLATIONS, NEWEST, Database, examples, hook_on
from tests.driving import connecting
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until
from tests.standby import caught_up, standby_of

SETTLING = verify.SETTLING
MODES = ("exact", "sampled", "checksum")
#: 63 bytes: quotes, a placeholder, a brace, a line break, and writing from right to left.
HOSTILE = 'od"d %s {0}\n' + "\u05d0\u202e" + "x" * 46


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's counters are late in these tests, but for one."""
    monkeypatch.setattr(verify, "SETTLING", 0.0)


def _write(database: Database, *statements: LiteralString) -> None:
    """Do something on a connection whose counters have reached everybody when it is done."""
    database.execute(*statements)
    until(database, "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")


def _damage(database: Database, view: str, *statements: LiteralString) -> None:
    """Write to a view behind PostgreSQL's back: for a moment it is a table in the catalogs."""
    with database.connect() as connection:
        for kind, rules in (("r", False), ("m", True)):
            connection.execute(
                "UPDATE pg_class SET relkind = %s, relhasrules = %s WHERE oid = to_regclass(%s)", (kind, rules, view)
            )
            for statement in statements if kind == "r" else ():
                connection.execute(statement)
    until(database, "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")


def _logged(hook: MatViewHook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Have a hook's lines among the captured ones."""
    monkeypatch.setattr(hook, "_log", logging.getLogger("tests.verify"))
    caplog.set_level("INFO")


def _orders(database: Database) -> None:
    _write(
        database,
        "CREATE TABLE orders AS SELECT i AS order_id, i % 5 AS shop, i * 1.25 AS amount FROM generate_series(1, 200) i",
        "CREATE MATERIALIZED VIEW mv AS SELECT amount, order_id, shop FROM orders",
        "CREATE UNIQUE INDEX ON mv (order_id)",
    )
    hook_on(database).refresh("mv")


def test_damage_is_told_from_age_and_named_by_the_views_key(each_db: Database) -> None:
    _orders(each_db)
    hook = hook_on(each_db)
    for mode in MODES:
        found = hook.verify("mv", mode=mode)
        assert (found.verdict, found.view_rows, found.query_rows, found.stale) == ("equal", 200, 200, False)
    _damage(
        each_db,
        "mv",
        "UPDATE mv SET amount = 9 WHERE order_id = 17",
        "DELETE FROM mv WHERE order_id IN (18, 19)",
        "INSERT INTO mv VALUES (NULL, 1000, 1)",
    )
    found = hook.verify("mv")
    assert found.verdict == "corrupt"
    assert (found.view_rows, found.query_rows) == (199, 200)
    assert (found.missing, found.surplus, found.changed) == (3, 2, 1)
    assert found.reason.startswith("1 changed, 2 missing, 1 surplus of 199 rows: its source has not changed since")
    assert [example.line() for example in found.examples] == [
        "order_id=17: amount 9.00 in the view, 21.25 by its query".replace("9.00", "9"),
        "order_id=18, amount=22.50, shop=3: its query has it, the view lacks it",
        "order_id=19, amount=23.75, shop=4: its query has it, the view lacks it",
        "order_id=1000, amount=NULL, shop=1: the view has it, its query does not",
    ]
    # What a sample of all rows of the view can find of it, and a checksum.
    sampled = hook.verify("mv", mode="sampled")
    assert (sampled.verdict, sampled.missing, sampled.surplus, sampled.changed) == ("corrupt", 1, 2, 1)
    checked = hook.verify("mv", mode="checksum")
    assert (checked.verdict, checked.missing, checked.view_rows, checked.query_rows) == ("corrupt", None, 199, 200)
    # The same differences, once a source has changed: of these the view need not be damaged. That is written to the
    # catalogs here, as a refresh of others would be.
    _write(each_db, "UPDATE orders SET amount = amount WHERE order_id = 1")
    assert hook.verify("mv").verdict == "differs"
    hook.refresh("mv", refresh_strategy="regular")
    assert hook.verify("mv").verdict == "equal"


def test_a_view_that_waits_for_its_refresh_is_stale_and_not_damaged(db: Database) -> None:
    _orders(db)
    hook = hook_on(db)
    _write(db, "UPDATE orders SET shop = shop WHERE order_id = 1")
    found = hook.verify("mv")
    assert (found.verdict, found.stale) == ("equal", True)
    assert found.reason == "the same 200 rows, though orders changed since its last refresh"
    _write(db, "INSERT INTO orders VALUES (201, 1, 1)")
    found = hook.verify("mv")
    assert (found.verdict, found.stale, found.missing, found.surplus) == ("stale", True, 1, 0)
    assert "orders changed since its last refresh, and a refresh mends it" in found.reason


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("SELECT id, now() AS at FROM t", "it calls now()"),
        ("SELECT id, random() FROM t", "it calls random()"),
        ("SELECT min(id) AS id, array_agg(a) AS a FROM t", "its query calls array_agg(anynonarray)"),
        ("SELECT id FROM t LIMIT 2", "its query has LIMIT or OFFSET"),
        ("SELECT DISTINCT ON (a) a, id FROM t", "its query has DISTINCT ON"),
        ("SELECT id, row_number() OVER (ORDER BY a) FROM t", "its query calls row_number()"),
        ("SELECT a, round(sum(id::float)::numeric, 9) AS id FROM t GROUP BY a", "calls sum(double precision)"),
        ("SELECT jsonb_build_object('r', corr(id, a)) AS r, 1 AS id FROM t", "calls corr(double precision,double"),
        ("SELECT DISTINCT id::numeric AS id FROM t", "a set operation over numeric, equal values of which"),
        ("SELECT id FROM (SELECT interval '1 mon' AS i UNION SELECT '30 days') i, t", "a set operation over interval"),
        ("SELECT id, rank() OVER (PARTITION BY a::float ORDER BY id) FROM t", "a set operation over double precision"),
        ("SELECT count(DISTINCT ARRAY[a]) AS id FROM t", "a set operation over anyarray"),
        ("SELECT count(*) AS id FROM t GROUP BY a::text::a_type", "a_type, equal values of which"),
        ("SELECT max(id::numeric) AS id FROM t", "its query calls max(numeric)"),
    ],
)
def test_a_result_that_may_move_by_itself_is_not_called_damage(db: Database, query: LiteralString, told: str) -> None:
    _write(db, "CREATE TABLE t AS SELECT i AS id, i % 2 AS a FROM generate_series(1, 4) i")
    if "a_type" in query:
        # As citext is one: of its own operators nobody knows what they call equal.
        db.execute(
            "CREATE TYPE a_type",
            "CREATE FUNCTION a_in(cstring) RETURNS a_type LANGUAGE internal IMMUTABLE STRICT AS 'int4in'",
            "CREATE FUNCTION a_out(a_type) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'int4out'",
            "CREATE TYPE a_type (INPUT = a_in, OUTPUT = a_out, LIKE = integer)",
            "CREATE FUNCTION a_cmp(a_type, a_type) RETURNS integer LANGUAGE internal IMMUTABLE STRICT AS 'btint4cmp'",
            "CREATE FUNCTION a_eq(a_type, a_type) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'int4eq'",
            "CREATE FUNCTION a_lt(a_type, a_type) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'int4lt'",
            "CREATE OPERATOR = (FUNCTION = a_eq, LEFTARG = a_type, RIGHTARG = a_type)",
            "CREATE OPERATOR < (FUNCTION = a_lt, LEFTARG = a_type, RIGHTARG = a_type)",
            "CREATE OPERATOR CLASS a_ops DEFAULT FOR TYPE a_type USING btree AS "
            "OPERATOR 1 <, OPERATOR 3 =, FUNCTION 1 a_cmp(a_type, a_type)",
        )
    db.execute("CREATE MATERIALIZED VIEW mv AS " + query)
    hook_on(db).refresh("mv")
    _damage(db, "mv", "DELETE FROM mv WHERE ctid = '(0,1)'")
    found = hook_on(db).verify("mv")
    assert found.verdict == "differs"
    assert told in found.reason


def test_a_sum_of_floats_that_another_plan_computes_otherwise_is_not_called_damage(db: Database) -> None:
    _write(
        db,
        # From this end it is 98; from the other one the ones come first, and are rounded with 1e17.
        "CREATE TABLE t WITH (parallel_workers = 0) AS "
        "SELECT i, k, CASE i WHEN 0 THEN 1e17 WHEN 1 THEN -1e17 ELSE 1 END::float AS x "
        "FROM generate_series(0, 99) i, generate_series(1, 600) k",
        "CREATE INDEX ON t (k, i DESC)",
        "VACUUM ANALYZE t",
    )
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT k, sum(x)::numeric AS s FROM t GROUP BY k")
    hook = hook_on(db)
    hook.refresh("mv")
    plan = {"enable_hashagg": "off", "enable_seqscan": "off", "enable_bitmapscan": "off", "enable_sort": "off"}
    for mode in ("exact", "checksum"):
        found = hook.verify("mv", mode=mode, session_settings=plan)
        assert (found.verdict, "calls sum(double precision)" in found.reason) == ("differs", True)
    assert hook.verify("mv", session_settings=plan).missing == 600


def test_what_groups_and_sorts_by_plain_values_is_damaged_where_it_differs(db: Database) -> None:
    _write(db, "CREATE TABLE t AS SELECT i AS id, i % 2 AS a, 1.5 AS n FROM generate_series(1, 4) i")
    db.execute(
        "CREATE MATERIALIZED VIEW mv AS SELECT a, sum(id) AS s, sum(n) AS n, max(id) AS m, count(DISTINCT a) AS c "
        "FROM t GROUP BY a ORDER BY n"
    )
    hook_on(db).refresh("mv")
    _damage(db, "mv", "DELETE FROM mv WHERE a = 1")
    assert hook_on(db).verify("mv").verdict == "corrupt"


def test_a_collation_that_takes_different_texts_for_equal_is_seen(each_db: Database) -> None:
    db = each_db
    if not db.value("SELECT EXISTS (SELECT FROM pg_collation WHERE collname = 'en-x-icu')"):
        pytest.skip("This PostgreSQL was built without ICU.")
    _write(
        db,
        "CREATE COLLATION no_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        "CREATE TABLE t (s text COLLATE no_case)",
        "INSERT INTO t VALUES ('a')",
        "CREATE MATERIALIZED VIEW mv AS SELECT DISTINCT s FROM t",
    )
    hook_on(db).refresh("mv")
    _damage(db, "mv", "UPDATE mv SET s = 'A'")
    found = hook_on(db).verify("mv")
    assert (found.verdict, "by the collation no_case" in found.reason) == ("differs", True)


class _Meanwhile(Driver):
    """Calls something instead of pausing, and may change what a sample is read back as."""

    def __init__(self, database: Database, act: Callable[[], None] = lambda: None, *, blind: bool = False) -> None:
        super().__init__(connecting(database))
        self.act, self.blind = act, blind

    def _perform(self, instruction: Instruction) -> Result:
        if isinstance(instruction, Pause):
            self.act()
            return Result()
        result = super()._perform(instruction)
        if self.blind and isinstance(instruction, Query) and "x.ctid = ANY" in instruction.statement.as_string(None):
            return Result([{"r": "(0)"} for _ in result.rows])
        return result


def test_a_query_that_is_loose_is_looked_at_again_as_well(db: Database) -> None:
    _write(db, "CREATE TABLE t AS SELECT 1 AS a")
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT string_agg(a::text, ',') AS s FROM t")
    hook_on(db).refresh("mv")
    db.execute("SET track_counts = off; INSERT INTO t VALUES (2)")
    work = verify.verify_view(Subject(ViewName.parse("mv")), Ledger("matviews"), Terms(), Scope())

    def count() -> None:
        db.execute("UPDATE t SET a = a")
        until(db, "SELECT pg_stat_get_tuples_updated('t'::regclass) > 0")

    with _Meanwhile(db, count) as driver:
        found = driver.run(work)
    assert (found.verdict, found.stale) == ("stale", True)


@pytest.mark.parametrize("sees", [True, False])
def test_what_a_session_at_work_has_committed_is_not_called_damage(db: Database, sees: bool) -> None:
    _orders(db)
    _write(db, GATE)
    db.execute(
        "CREATE PROCEDURE etl() LANGUAGE plpgsql AS "
        "$$BEGIN UPDATE orders SET amount = amount + 1; COMMIT; PERFORM gate(); END$$"
    )
    user = "postgres"
    if not sees:
        user = db.role()
        with db.connect() as connection:
            for grant in (
                "GRANT USAGE ON SCHEMA public, matviews TO {}",
                "GRANT SELECT ON ALL TABLES IN SCHEMA public, matviews TO {}",
            ):
                connection.execute(sql.SQL(grant).format(sql.Identifier(user)))
        hook_on(db).refresh("mv", refresh_strategy="regular")
    with gate_closed(db) as release, beside(partial(db.execute, "CALL etl()"), release):
        until(db, AT_THE_GATE)
        found = hook_on(db, user).verify("mv")
        assert (found.verdict, found.stale, found.changed) == ("differs", None, 200)
        assert "of postgres has been " + ("at work since " if sees else "in a transaction") in found.reason
    until(db, "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")
    assert hook_on(db, user).verify("mv").verdict == "stale"


def test_a_sample_has_rows_without_a_key_too_and_finds_its_keys_whatever_the_settings(db: Database) -> None:
    _write(
        db,
        "CREATE TABLE t AS SELECT nullif(i % 2, 0) * i AS n, i + pi() AS f, interval '-1 day -2:00' * i AS v, "
        "timestamptz '2024-01-01 12:00+00' + i * interval '1 h' AS at, i AS b FROM generate_series(1, 20) i",
    )
    hook = hook_on(db)
    odd = {
        "extra_float_digits": -10,
        "DateStyle": "SQL, DMY",
        "TimeZone": "Asia/Kolkata",
        "IntervalStyle": "sql_standard",
        "bytea_output": "escape",
    }
    for number, key in enumerate(("n", "f", "at", "v", "n, f")):
        name = f"mv{number}"
        with db.connect() as connection:
            connection.execute(f"CREATE MATERIALIZED VIEW {name} AS SELECT * FROM t".encode())
            connection.execute(f"CREATE UNIQUE INDEX ON {name} ({key})".encode())
        same = hook.verify(name, mode="sampled", session_settings=odd)
        assert (same.verdict, same.view_rows) == ("equal", 20), key
    db.execute("UPDATE t SET b = b + 1000")
    for number, (missing, changed) in enumerate(((10, 10), (20, 20), (20, 20), (20, 20), (10, 10))):
        found = hook.verify(f"mv{number}", mode="sampled", session_settings=odd)
        assert (found.missing, found.surplus, found.changed) == (missing, 20, changed), number


def test_a_sample_that_is_not_found_again_is_not_called_equal(db: Database) -> None:
    _orders(db)
    scope = Scope(VerifyMode.SAMPLED)
    work = verify.verify_view(Subject(ViewName.parse("mv")), Ledger("matviews"), Terms(), scope)
    with _Meanwhile(db, blind=True) as driver:
        found = driver.run(work)
    assert (found.verdict, found.view_rows) == ("differs", 0)
    assert "200 of those sampled were not found again by their key" in found.reason


def test_no_more_of_wide_rows_is_read_than_an_event_loop_can_bear(db: Database) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT i, repeat('x', 100000) AS s FROM generate_series(1, 40) i",
        "CREATE MATERIALIZED VIEW mv AS SELECT * FROM t",
        "CREATE UNIQUE INDEX ON mv (i)",
        "UPDATE t SET s = 'y' || s",
    )
    found = hook_on(db).verify("mv", examples=100)
    assert (found.missing, found.surplus, found.changed) == (40, 40, None)
    assert {each.kind for each in found.examples} == {"changed"}
    assert 10 < len(found.examples) < 31


def test_no_value_is_told_where_none_may_be_seen(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT '1'::text AS a", "CREATE MATERIALIZED VIEW mv AS SELECT a::integer FROM t")
    db.execute("UPDATE t SET a = 'card 4111'")
    reasons = [hook_on(db).verify_many(["mv"], examples=number).verifications[0].reason for number in (1, 0)]
    assert "4111" in reasons[0]
    assert "4111" not in reasons[1]
    assert "InvalidTextRepresentation (SQLSTATE 22P02)" in reasons[1]


def test_without_a_refresh_of_ours_a_difference_is_only_that_and_nothing_is_written_anywhere(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a", "CREATE MATERIALIZED VIEW mv AS SELECT a FROM t")
    _damage(db, "mv", "INSERT INTO mv VALUES (2)")
    before = db.value("SELECT pg_current_wal_insert_lsn()")
    found = hook_on(db).verify("mv")
    assert (found.verdict, found.stale, found.surplus, found.changed) == ("differs", None, 1, None)
    assert "its sources looked like at its last refresh is not known" in found.reason
    assert db.value("SELECT to_regnamespace('matviews') IS NULL")
    assert db.value("SELECT count(*) FROM pg_locks WHERE relation = 'mv'::regclass") == 0
    # Not even hint bits were worth a record.
    assert db.value("SELECT pg_current_wal_insert_lsn() - %s::pg_lsn", (before,)) < 10_000


TYPES: tuple[LiteralString, ...] = (
    "CREATE TYPE pair AS (a json, b text)",
    "CREATE TABLE t (j json, x jsonpath, p point, g polygon, f double precision, n numeric, c text, "
    'js json[], pr pair, b bytea, ch character(5), bp bpchar, q "char", i interval, tz timestamptz, e text, '
    '"select" integer, "%s ""{0}""\n" integer)',
    "INSERT INTO t VALUES ('{\"a\": 1}', '$.a', '(1,2)', '((0,0),(1,1),(1,0))', '-0', 1.0, 'a', "
    "ARRAY['{\"a\":1}']::json[], ROW('1', NULL), '\\xff00', 'a', 'a  ', 'x', '1 mon', '2024-10-27 00:30+00', '', 1, 1)",
    "INSERT INTO t (f) VALUES ('NaN'), ('NaN'), (NULL), (NULL), ('Infinity')",
    "INSERT INTO t (e, \"select\") VALUES ('', 1), (NULL, 1), ('NULL', 1), ('a,b\"c\\d(e)\n', 1)",
)
CHANGES: tuple[LiteralString, ...] = (
    "j = '{\"a\":1}'",
    "x = '$.b'",
    "p = '(1,3)'",
    "f = 0",
    "n = 1.00",
    "c = 'A'",
    "js = ARRAY['{\"a\": 1}']::json[]",
    "pr = ROW('1', '')",
    "b = '\\xff'",
    "bp = 'a'",
    "i = '30 days'",
    "e = NULL",
    '"%s ""{0}""\n" = 2',
)


def test_rows_are_the_same_when_they_are_shown_the_same_whatever_their_types(each_db: Database) -> None:
    _write(each_db, *TYPES)
    if each_db.value("SELECT EXISTS (SELECT FROM pg_collation WHERE collname = 'en-x-icu')"):
        each_db.execute(
            "CREATE COLLATION no_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
            "ALTER TABLE t ALTER c TYPE text COLLATE no_case",
        )
    _write(each_db, "CREATE MATERIALIZED VIEW mv AS SELECT * FROM t")
    hook = hook_on(each_db)
    for mode in MODES:
        assert hook.verify("mv", mode=mode).verdict == "equal"
    # None of these is seen by =, where there is one, or by all of them.
    for number, change in enumerate(CHANGES):
        _damage(each_db, "mv", "UPDATE mv SET " + change + " WHERE j IS NOT NULL")
        found = hook.verify("mv")
        assert (found.missing, found.surplus) == (1, 1), change
        if number % 4 == 0:
            assert {hook.verify("mv", mode=mode).verdict for mode in MODES} == {"differs"}, change
        each_db.execute("REFRESH MATERIALIZED VIEW mv")
    _damage(each_db, "mv", "INSERT INTO mv (f) VALUES ('NaN')", "DELETE FROM mv WHERE e = '' AND j IS NULL")
    found = hook.verify("mv")
    assert (found.missing, found.surplus) == (1, 1)


_VALUES = st.tuples(
    st.none() | st.integers(0, 3),
    st.none() | st.sampled_from([0.0, -0.0, 0.1, 1e300, float("nan"), float("inf")]),
    st.none()
    | st.sampled_from(["", " ", "a", "A", '"', "\\", ",", "(", "null", "é\n"])
    | st.text('ab,"\\() ', max_size=4),
)
#: Few different rows, so that some come more than once.
_ROWS = st.lists(_VALUES, min_size=1, max_size=4).flatmap(lambda few: st.lists(st.sampled_from(few), max_size=8))


def test_counts_are_those_of_multisets_whatever_the_rows(db: Database) -> None:
    db.execute(
        "CREATE TABLE t (a integer, f double precision, s text)", "CREATE MATERIALIZED VIEW mv AS SELECT * FROM t"
    )
    db.execute("UPDATE pg_class SET relhasrules = false WHERE relname = 'mv'")
    hook = hook_on(db)

    def shown(row: tuple[Any, ...]) -> tuple[str, ...]:
        return tuple(map(repr, row))

    # Small as they are; to shrink them further would take minutes.
    @settings(max_examples=examples(12), deadline=None, phases=[Phase.explicit, Phase.generate])
    @given(_ROWS, _ROWS, st.data())
    def check(rows: list[Any], others: list[Any], data: st.DataObject) -> None:
        kept = data.draw(st.lists(st.sampled_from(rows), max_size=8) if rows else st.just([]))
        view = data.draw(st.sampled_from([rows, kept + others, list(reversed(rows))]))
        with db.connect() as connection, connection.transaction():
            connection.execute("TRUNCATE t")
            connection.cursor().executemany("INSERT INTO t VALUES (%s, %s, %s)", rows)
            connection.execute("UPDATE pg_class SET relkind = 'r', relhasrules = false WHERE relname = 'mv'")
            connection.execute("DELETE FROM mv")
            connection.cursor().executemany("INSERT INTO mv VALUES (%s, %s, %s)", view)
            connection.execute("UPDATE pg_class SET relkind = 'm', relhasrules = true WHERE relname = 'mv'")
        by_query, in_view = Counter(map(shown, rows)), Counter(map(shown, view))
        missing, surplus = by_query - in_view, in_view - by_query
        found = hook.verify("mv", examples=100)
        assert (found.missing, found.surplus) == (missing.total(), surplus.total())
        assert (found.view_rows, found.query_rows) == (len(view), len(rows))
        assert (found.verdict == "equal") is (by_query == in_view)
        for kind, model in (("missing", missing), ("surplus", surplus)):
            told: Counter[tuple[str, ...]] = Counter()
            for example in found.examples:
                if example.kind == kind:
                    a, f, s = example.row.values()
                    row = (a and int(a), f and float(f), s)
                    told[shown(row)] += example.times
            assert told == model
        assert hook.verify("mv", mode="checksum").verdict == found.verdict

    check()


def test_a_hostile_name_is_only_a_name_and_cannot_break_the_log(
    db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(HOSTILE.encode()) <= 63
    name = sql.Identifier(HOSTILE, HOSTILE)
    with db.connect() as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(HOSTILE)))
        below = sql.Identifier(HOSTILE, "below")
        connection.execute(
            sql.SQL("CREATE MATERIALIZED VIEW {} AS SELECT 1 AS {}, E'::endgroup::\\n\u202e' AS v -- of %s").format(
                below, sql.Identifier(HOSTILE)
            )
        )
        connection.execute(sql.SQL("CREATE MATERIALIZED VIEW {} AS TABLE {}").format(name, below))
        connection.execute(sql.SQL("CREATE UNIQUE INDEX ON {} ({})").format(name, sql.Identifier(HOSTILE)))
        connection.execute(sql.SQL("REFRESH MATERIALIZED VIEW {} WITH NO DATA").format(below))
        connection.execute(sql.SQL("REFRESH MATERIALIZED VIEW {}").format(below))
        connection.execute(
            "UPDATE pg_class SET relkind = 'r', relhasrules = false WHERE relname = %s AND relkind = 'm'", (HOSTILE,)
        )
        connection.execute(sql.SQL("UPDATE {} SET v = 'other'").format(name))
        connection.execute(
            "UPDATE pg_class SET relkind = 'm', relhasrules = true WHERE relname = %s AND relkind = 'r'", (HOSTILE,)
        )
    hook = hook_on(db)
    text = str(ViewName(HOSTILE, HOSTILE))
    for mode in ("exact", "sampled"):
        found = hook.verify(text, mode=mode)
        assert (found.view, found.verdict, found.changed) == (text, "differs", 1)
        (line,) = [example.line() for example in found.examples]
        assert line.isprintable()
        assert line.endswith("=1: v other in the view, '::endgroup::\\n\\u202e' by its query")
    _logged(hook, monkeypatch, caplog)
    report = hook.verify_many([text, "*.*"], rounds=1)
    assert "::group::What came of each view" in caplog.messages
    assert [each.verdict.value for each in report.verifications] == ["equal", "differs"]
    assert not [record for record in caplog.messages if record.startswith("::endgroup::") and record != "::endgroup::"]


def test_a_view_that_was_never_filled_is_said_to_be_so_and_others_are_errors(db: Database) -> None:
    db.execute("CREATE MATERIALIZED VIEW empty AS SELECT 1 AS a WITH NO DATA", "CREATE TABLE t ()")
    db.execute("CREATE MATERIALIZED VIEW bare AS SELECT FROM t", "INSERT INTO t DEFAULT VALUES")
    hook = hook_on(db)
    assert hook.verify("empty").verdict == "unpopulated"
    assert hook.compare_timings(["empty"])[0].reason == "it has never been filled (WITH NO DATA)"
    bare = hook.verify("bare")
    assert (bare.verdict, bare.missing) == ("differs", 1)
    assert bare.examples[0].line() == "a row without columns: its query has it, the view lacks it"
    with pytest.raises(ViewNotFound):
        hook.verify("absent")
    with pytest.raises(NotAMaterializedView):
        hook.verify("t")


class _Interrupted(Driver):
    """Calls something once, after the snapshot is taken and before anything is locked."""

    def __init__(self, database: Database, act: Callable[[], None]) -> None:
        super().__init__(connecting(database))
        self.act: Callable[[], None] | None = act

    def _perform(self, instruction: Instruction) -> Result:
        if isinstance(instruction, Query) and self.act is not None:
            text = instruction.statement.as_string(None)
            if "pg_get_viewdef" in text:
                act, self.act = self.act, None
                act()
        return super()._perform(instruction)


@pytest.mark.parametrize(
    "meanwhile",
    [
        ("INSERT INTO orders VALUES (500, 5, 5)", "REFRESH MATERIALIZED VIEW mv"),
        ("TRUNCATE orders", "REFRESH MATERIALIZED VIEW CONCURRENTLY mv"),
        ("ALTER TABLE orders ALTER amount TYPE text", "REFRESH MATERIALIZED VIEW mv"),
        (
            "ALTER MATERIALIZED VIEW mv RENAME TO former",
            "CREATE MATERIALIZED VIEW mv AS SELECT order_id FROM orders WHERE order_id < 9",
        ),
    ],
    ids=["refreshed", "truncated", "altered", "replaced"],
)
def test_what_is_refreshed_or_replaced_in_that_very_moment_is_no_difference(
    db: Database, meanwhile: tuple[LiteralString, ...]
) -> None:
    _orders(db)
    if "ALTER amount" in meanwhile[0]:
        db.execute("DROP MATERIALIZED VIEW mv", "CREATE MATERIALIZED VIEW mv AS SELECT order_id, shop FROM orders")
    work = verify.verify_view(Subject(ViewName.parse("mv")), Ledger("matviews"), Terms(), Scope())
    driver = _Interrupted(db, lambda: db.execute(*meanwhile))
    with driver:
        found = driver.run(work)
    assert driver.act is None
    assert (found.verdict, found.view_rows) == ("equal", db.value("SELECT count(*) FROM mv"))


def test_a_view_dropped_in_that_very_moment_is_not_found(db: Database) -> None:
    _orders(db)
    work = verify.verify_view(Subject(ViewName.parse("mv")), Ledger("matviews"), Terms(), Scope())
    with (
        _Interrupted(db, lambda: db.execute("DROP MATERIALIZED VIEW mv")) as driver,
        pytest.raises(ViewNotFound, match="mv does not exist"),
    ):
        driver.run(work)


def test_it_waits_for_who_refreshes_the_view_and_no_longer_than_it_may(
    db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hook = hook_on(db)
    _logged(hook, monkeypatch, caplog)
    _orders(db)
    with db.connect() as connection, ExitStack() as stack:
        with connection.transaction():
            connection.execute("INSERT INTO orders VALUES (500, 5, 5)")
            connection.execute("REFRESH MATERIALIZED VIEW mv")
            verifying = stack.enter_context(beside(partial(hook.verify, "mv", lock_timeout=0.05)))
            with pytest.raises(psycopg.errors.LockNotAvailable) as caught:
                hook_on(db).verify("mv", lock_timeout=0.05, max_wait=0.2)
            assert "verify at a quieter hour" in caught.value.__notes__[0]
            assert not verifying.done()
        found = verifying.result(timeout=10)
    assert (found.verdict, found.view_rows) == ("equal", 201)
    assert "is locked" in caplog.text
    assert "REFRESH MATERIALIZED VIEW mv" in caplog.text


def test_it_is_stopped_on_the_server_when_cancelled_and_when_time_is_up(db: Database) -> None:
    db.execute(
        GATE, "CREATE MATERIALIZED VIEW mv AS SELECT gate() AS a", "CREATE MATERIALIZED VIEW two AS SELECT 2 AS a"
    )
    hook = hook_on(db)
    with gate_closed(db) as release, beside(partial(hook.verify, "mv"), release) as verifying:
        until(db, AT_THE_GATE)
        assert hook.cancel("somebody said so")
        with pytest.raises(OperationCancelled, match="somebody said so"):
            verifying.result(timeout=10)
        until(db, sql.SQL("SELECT NOT ({})").format(sql.SQL(AT_THE_GATE)))
        with pytest.raises(OperationTimedOut):
            hook_on(db).verify("mv", timeout=0.3)
        report = hook_on(db).verify_many(["mv", "two"], timeout=0.5)
        assert {each.view: each.verdict.value for each in report.verifications} == {"mv": "failed", "two": "equal"}
        late = hook_on(db, longest=0.5).verify_many(["mv", "two"])
        assert "mv" in [each.view for each in late.verifications if each.verdict is Verdict.FAILED]
    with gate_closed(db) as release, beside(partial(hook.verify_many, ["mv", "two"]), release) as several:
        until(db, AT_THE_GATE)
        assert hook.cancel("and again")
        with pytest.raises(OperationCancelled, match="and again"):
            several.result(timeout=10)


def test_a_missing_right_is_told_with_the_grant_that_mends_it_and_the_query_runs_as_the_owner(db: Database) -> None:
    owner, reader = db.role(), db.role()
    with db.connect() as connection:
        connection.execute(
            "CREATE SCHEMA deep; CREATE TABLE deep.t AS SELECT 1 AS a; GRANT USAGE ON SCHEMA public TO PUBLIC"
        )
        connection.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(owner)))
        connection.execute(
            sql.SQL(
                "GRANT USAGE ON SCHEMA deep TO {0}; GRANT SELECT ON deep.t TO {0}; ALTER TABLE deep.t OWNER TO postgres"
            ).format(sql.Identifier(owner))
        )
        connection.execute("CREATE MATERIALIZED VIEW mv AS SELECT a FROM deep.t")
        connection.execute(sql.SQL("ALTER MATERIALIZED VIEW mv OWNER TO {}").format(sql.Identifier(owner)))
        # Of the table's rows everybody sees those of their own.
        connection.execute("ALTER TABLE deep.t ENABLE ROW LEVEL SECURITY")
        connection.execute(sql.SQL("CREATE POLICY p ON deep.t TO {} USING (true)").format(sql.Identifier(owner)))
    with pytest.raises(MissingPrivilege, match=f"{reader} may not read deep.t, public.mv") as caught:
        hook_on(db, reader).verify("mv")
    grants = str(caught.value.hint).removeprefix("run: ").split(" (or")[0]
    with db.connect() as connection:
        connection.execute(grants)
    found = hook_on(db, reader).verify("mv")
    assert (found.verdict, found.role, found.surplus) == ("differs", reader, 1)
    assert found.stale is None
    assert f"is run by {reader}, and not by its owner {owner}" in found.notes[0]
    # As REFRESH does: the superuser passes over row security, and the owner is who counts.
    with db.connect() as connection:
        connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(owner), sql.Identifier(reader)))
        connection.execute(sql.SQL("ALTER ROLE {} NOINHERIT").format(sql.Identifier(reader)))
    for user in (reader, "postgres"):
        found = hook_on(db, user).verify("mv")
        assert (found.verdict, found.role, found.notes) == ("equal", owner, ())
    with db.connect() as connection:
        connection.execute(sql.SQL("REVOKE SELECT ON deep.t FROM {}").format(sql.Identifier(owner)))
    with pytest.raises(MissingPrivilege, match=f"{owner}, its owner, may not read deep.t") as caught:
        hook_on(db).verify("mv")
    assert f'GRANT SELECT ON deep.t TO "{owner}";' in str(caught.value.hint)


def test_a_sample_asks_only_for_its_keys_and_is_the_same_for_the_same_seed(db: Database) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT i AS id, i % 100 AS grp FROM generate_series(1, 5000) i",
        "CREATE MATERIALIZED VIEW mv AS SELECT grp, id / 1000 AS part, sum(1 / (id - 7000)) AS s, "
        "'x' || grp AS name FROM t GROUP BY 1, 2",
        "CREATE UNIQUE INDEX ON mv (part, grp)",
        # Divides by zero where anybody computes its row.
        "INSERT INTO t VALUES (7000, 1000)",
        "ANALYZE mv",
    )
    hook = hook_on(db)
    with pytest.raises(psycopg.errors.DivisionByZero):
        hook.verify("mv")
    assert hook.verify("mv", mode="sampled", sample=50).verdict == "equal"
    _write(
        db,
        "CREATE UNIQUE INDEX ON t (id)",
        "CREATE MATERIALIZED VIEW plain AS SELECT id, count(*) FROM t GROUP BY id",
        "CREATE UNIQUE INDEX ON plain (id)",
        "ANALYZE plain, t",
    )
    read = "SELECT coalesce(seq_tup_read, 0) FROM pg_stat_user_tables WHERE relname = 't'"
    before = db.value(read)
    assert hook.verify("plain", mode="sampled", sample=20).view_rows == 20
    until(db, "SELECT idx_scan > 0 FROM pg_stat_user_tables WHERE relname = 't'")
    assert db.value(read) == before
    db.execute(
        "CREATE MATERIALIZED VIEW odd AS SELECT k, date '2024-02-29' AS d "
        "FROM (VALUES ('a\"b\\c,{}'), (''), ('NULL'), (E'\u00e9\n')) v (k)",
        "CREATE UNIQUE INDEX ON odd (d, k)",
    )
    odd = hook.verify("odd", mode="sampled")
    assert (odd.verdict, odd.view_rows, odd.query_rows) == ("equal", 4, 4)
    _damage(db, "mv", "UPDATE mv SET name = name || '!'")
    found = [
        {example.line() for example in hook.verify("mv", mode="sampled", sample=20, seed=seed, examples=20).examples}
        for seed in (1, 1, 2)
    ]
    assert len(found[0]) == 20
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("factor", "verdict"), [("1.000000000001", "rounding"), ("1.0001", "corrupt")])
def test_last_digits_of_floats_are_told_from_damage(db: Database, factor: LiteralString, verdict: str) -> None:
    _write(
        db,
        "CREATE TABLE t AS SELECT i AS id, i / 3.0::double precision AS f FROM generate_series(1, 20) i",
        "CREATE MATERIALIZED VIEW mv AS SELECT id, f, 'text' AS s FROM t",
        "CREATE UNIQUE INDEX ON mv (id)",
    )
    hook_on(db).refresh("mv")
    _damage(
        db,
        "mv",
        "UPDATE mv SET f = f * 1.000000000001 WHERE id < 5",
        "UPDATE mv SET f = f * " + factor + " WHERE id = 7",
    )
    found = hook_on(db).verify("mv")
    assert (found.verdict, found.changed) == (verdict, 5)
    _damage(db, "mv", "UPDATE mv SET s = 'test' WHERE id = 9")
    assert hook_on(db).verify("mv").verdict == "corrupt"


def test_pairs_are_told_right_though_there_are_more_than_are_looked_at(db: Database) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT i AS id, 0 AS a FROM generate_series(1, 3000) i",
        "CREATE MATERIALIZED VIEW mv AS SELECT a, id FROM t WHERE id > 100",
        "CREATE UNIQUE INDEX ON mv (id)",
        "UPDATE t SET a = 1, id = CASE WHEN id % 3 = 0 THEN id + 100000 ELSE id END",
    )
    found = hook_on(db).verify("mv", examples=50)
    assert (found.missing, found.surplus, found.changed) == (2933, 2900, None)
    ids = {
        kind: [int(e.row["id"] or 0) for e in found.examples if e.kind == kind]
        for kind in ("changed", "missing", "surplus")
    }
    assert all(ids.values())
    assert all(each > 100 and each % 3 for each in ids["changed"])
    assert all(each > 100000 for each in ids["missing"])
    assert all(each % 3 == 0 for each in ids["surplus"])


def test_rows_that_cannot_be_read_are_damage_and_so_told(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a", "CREATE MATERIALIZED VIEW mv AS SELECT a FROM t")
    db.execute("CREATE MATERIALIZED VIEW fine AS SELECT a FROM t")
    db.execute("UPDATE pg_class SET relfilenode = 4242424 WHERE relname = 'mv'")
    found = hook_on(db).verify("mv")
    assert found.verdict == "corrupt"
    assert "its rows cannot be read: could not open file" in found.reason
    db.execute("UPDATE pg_class SET relfilenode = 4242424 WHERE relname = 't'")
    with pytest.raises(psycopg.errors.UndefinedFile) as caught:
        hook_on(db).verify("fine")
    assert "fine itself can be read" in caught.value.__notes__[0]


def test_a_definition_says_besides_whether_the_view_is_what_it_declares(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a, timestamptz '2024-01-01 00:00+00' AS at")
    definition = MatViewDefinition(
        name="mv", sql="SELECT a, at::text FROM t", session_settings={"TimeZone": "Asia/Tokyo"}
    )
    hook = hook_on(db)
    hook.create(definition)
    found = hook.verify(definition)
    # Under the settings of the definition: elsewhere it is another text.
    assert (found.verdict, found.drift) == ("equal", "")
    other = MatViewDefinition(name="mv", sql="SELECT a + 1 AS a, at::text FROM t")
    found = hook.verify_many(definitions=[other]).verifications[0]
    assert (found.drift or "").startswith("change query")
    assert "not the declared one" in found.notes[0]


def test_a_comparison_that_takes_too_much_room_says_what_to_do(db: Database) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT i, md5(i::text) AS m FROM generate_series(1, 30000) i",
        "CREATE MATERIALIZED VIEW mv AS SELECT * FROM t",
    )
    hook = hook_on(db)
    settings = {"work_mem": "64kB", "temp_file_limit": "64kB"}
    with pytest.raises(psycopg.errors.ConfigurationLimitExceeded) as caught:
        hook.verify("mv", session_settings=settings)
    assert "mode='checksum'" in caught.value.__notes__[0]
    assert hook.verify("mv", mode="checksum", session_settings=settings).verdict == "equal"


def test_bad_input_is_refused_before_anything_is_asked(db: Database) -> None:
    hook = hook_on(db)
    for arguments in (
        {"mode": "quick"},
        {"sample": 0},
        {"sample": True},
        {"seed": -1},
        {"examples": "5"},
        {"timeout": 0},
        {"session_settings": {"role": "postgres"}},
    ):
        with pytest.raises(InvalidDefinition):
            hook.verify("mv", **arguments)
    with pytest.raises(InvalidDefinition):
        hook.compare_timings(["mv"], rounds=0)
    for call in (hook.verify_many, hook.compare_timings):
        with pytest.raises(InvalidDefinition, match="views is a list or tuple, not 'm\\*'"):
            call("m*")
    with pytest.raises(InvalidDefinition):
        hook.verify_many()
    with pytest.raises(ViewNotFound):
        hook.verify_many(["absent"])


@pytest.mark.parametrize("deferrable", [False, True])
def test_the_task_fails_on_what_it_was_told_to_and_tells_it_all_the_same(
    db: Database, deferrable: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    password = "s3cret/pass word"
    set_connection(monkeypatch, db, password=password)
    _orders(db)
    db.execute(
        "CREATE SCHEMA a",
        "CREATE MATERIALIZED VIEW a.good AS SELECT 1 AS a",
        "CREATE MATERIALIZED VIEW a.e AS SELECT 1 / order_id AS a FROM orders",
    )
    with db.connect() as connection:
        connection.execute("CREATE MATERIALIZED VIEW a.bad AS SELECT 'none'::text AS told, 1 AS id")
        connection.execute("UPDATE pg_class SET relkind = 'r', relhasrules = false WHERE relname = 'bad'")
        connection.execute("UPDATE a.bad SET told = 'it is ' || repeat('x', 50) || %s", (password,))
        connection.execute("UPDATE pg_class SET relkind = 'm', relhasrules = true WHERE relname = 'bad'")
    db.execute("INSERT INTO orders VALUES (0, 0, 0)")
    path = tmp_path / "timings.csv"
    common: dict[str, Any] = {"deferrable": deferrable}
    with DAG(f"verify_{deferrable}", schedule=None) as dag:
        VerifyMatViewOperator(task_id="all", views=["*.*"], timing_rounds=1, csv_path=str(path), **common)
        VerifyMatViewOperator(
            task_id="good", schemas=["a"], exclude=["a.bad", "a.e"], mode="{{ 'checksum' }}", **common
        )
        VerifyMatViewOperator(task_id="tolerated", view="a.bad", fail_on=["corrupt"], examples=0, **common)
        VerifyMatViewOperator(task_id="none", views=["nothing.*"], **common)
        VerifyMatViewOperator(task_id="typo", view="a.bad", fail_on=["corupt"], **common)
        VerifyMatViewOperator(task_id="lonely", view="a.bad", csv_path="x.csv", **common)
    run = run_dag(dag)
    assert run.states == {
        "all": "failed",
        "good": "success",
        "tolerated": "success",
        "none": "skipped",
        "typo": "failed",
        "lonely": "failed",
    }
    told = run.xcom("all")
    json.dumps(told)
    verdicts = {each["view"]: each["verdict"] for each in told["views"]}
    assert verdicts == {"mv": "stale", "a.good": "equal", "a.bad": "differs", "a.e": "failed"}
    assert run.xcom("tolerated")["views"][0]["examples"] == []
    assert "2 of 4 views did not pass" in run.log
    assert "a.e could not be verified: division by zero" in run.log
    assert "view    verdict  rows  missing  surplus  seconds  reason" in run.log.replace("\r", "")
    assert "its query has it, the view lacks it" in run.log
    # Not even the part of it that is left of a value that is cut.
    for text in (run.log, json.dumps(told)):
        assert password[:4] not in text.replace(str(tmp_path), "")
    with path.open(newline="") as file:
        rows = {row["view"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"mv", "a.good", "a.bad"}
    assert rows["mv"]["rows"] == "200"
    assert float(rows["mv"]["speed_up"]) == pytest.approx(
        float(rows["mv"]["query_ms"]) / float(rows["mv"]["view_ms"]), rel=0.05
    )


def test_a_file_that_cannot_be_written_costs_no_comparison(
    db: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_connection(monkeypatch, db)
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
    with DAG("verify_csv", schedule=None) as dag:
        VerifyMatViewOperator(task_id="astray", view="mv", timing_rounds=1, csv_path=str(tmp_path / "none" / "x.csv"))
        # Where it can be opened, and nothing fits in.
        VerifyMatViewOperator(task_id="full", view="mv", timing_rounds=1, csv_path="/dev/full")
        VerifyMatViewOperator(task_id="letters", views="{{ 'ev*' }}", schemas=["public"])
    run = run_dag(dag)
    assert set(run.states.values()) == {"failed"}
    assert run.xcom("astray") is None
    assert "there is no folder" in run.log
    assert run.xcom("full")["views"][0]["verdict"] == "equal"
    assert "views is a list or tuple, not 'ev*'" in run.log


@pytest.mark.e2e
def test_a_change_that_is_counted_late_is_not_called_damage(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SETTLING", SETTLING)
    _orders(db)
    with db.connect() as connection:
        # The first is counted at once; the second within a second of that, and so up to 10 s late.
        connection.execute("UPDATE orders SET amount = amount WHERE false")
        connection.execute("CREATE TABLE other AS SELECT 1")
        connection.execute("INSERT INTO orders VALUES (201, 1, 1)")
        found = hook_on(db).verify("mv")
    assert found.verdict == "stale"


@pytest.mark.e2e
def test_a_standby_will_do(tmp_path: Path) -> None:
    with PostgresServer(INSTALLATIONS[NEWEST]) as primary:
        database = Database(primary, "postgres")
        _orders(database)
        with standby_of(primary, tmp_path) as server:
            standby = Database(server, "postgres")
            caught_up(database, standby)
            found = hook_on(standby).verify("mv")
            assert (found.verdict, found.view_rows) == ("equal", 200)
            definition = MatViewDefinition(name="mv", sql="SELECT 1 AS a")
            found = hook_on(standby).verify(definition)
            assert (found.drift, "is a standby" in found.notes[0]) == (None, True)
            _damage(database, "mv", "DELETE FROM mv WHERE order_id = 3")
            caught_up(database, standby)
            # Its counters are its own.
            assert hook_on(standby).verify("mv").verdict == "differs"


@given(st.lists(st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6), min_size=1))
def test_a_rows_text_is_read_as_it_was_meant(values: list[str | None]) -> None:
    # As record_out() writes it.
    def field(value: str | None) -> str:
        if value is None:
            return ""
        if value and not set(value) & set('"\\(), \t\n\r\v\f'):
            return value
        return '"' + value.replace("\\", "\\\\").replace('"', '""') + '"'

    text = f"({','.join(map(field, values))})"
    assert parse_row(text) == values
    # Cut off, what is whole of it is right.
    cut = parse_row(text[: len(text) // 2])
    assert cut[:-1] == values[: len(cut) - 1]


def test_a_row_whose_other_half_may_be_among_those_not_seen_is_not_told_as_if_it_had_none() -> None:
    columns = (ComparedColumn("k", "integer"), ComparedColumn("a", "text"))
    sides = Sides(ResolvedName("public", "mv", "mv"), "SELECT", columns, (0,))
    totals = {"missing": 9, "surplus": 9, "missing_groups": 2, "surplus_groups": 9, "view_rows": 9}
    rows = [{"r": text, "n": n, **totals} for text, n in (("(1,b)", 1), ("(2,b)", 1), ("(1,a)", -1), ("(2,a)", -1))]
    found = read_differences(sides, rows, 5)
    assert [(each.kind, each.row) for each in found.examples] == [("changed", {"k": "1"})]
    assert (found.changed, found.rounding) == (None, False)


def test_a_key_that_is_twice_on_a_side_is_not_paired() -> None:
    sides = Sides(
        ResolvedName("public", "mv", "mv"),
        "SELECT",
        (ComparedColumn("a", "text"), ComparedColumn("k", "integer")),
        (1,),
    )
    totals = {"missing": 2, "surplus": 1, "missing_groups": 2, "surplus_groups": 1, "view_rows": 5}
    rows = [{"r": "(1,x)", "n": 1, **totals}, {"r": "(1,y)", "n": 1, **totals}, {"r": "(1,z)", "n": -1, **totals}]
    found = read_differences(sides, rows, 5)
    assert found.changed == 0
    assert [(each.kind, each.row) for each in found.examples] == [
        ("missing", {"k": "1", "a": "x"}),
        ("missing", {"k": "1", "a": "y"}),
        ("surplus", {"k": "1", "a": "z"}),
    ]
