"""What a query reads is what PostgreSQL says it reads; and it is found out once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import sql

from airflow_provider_matviews import references as module
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.references import read_all, references
from tests.conftest import Database, examples

ROOT = Path(__file__).resolve().parent.parent

#: Tables of one column ``c``, as a person might type them.
_TABLES = [
    'a', "A", '"A"', "b", "s.a", "S . a", 's."B b"', '"x""y"', '"a.b"', "Ünï", '"table"', "public.b", "s.date", "t$1",
]  # fmt: skip
#: What a WITH clause calls its queries: names that hide tables, and one that needs quotes.
_LOCAL = ["a", "b", "B", '"A"', '"x""y"']

_IDENTIFIERS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=15)

_CREATED = """
CREATE SCHEMA s;
CREATE TABLE a (c int); CREATE TABLE "A" (c int); CREATE TABLE b (c int); CREATE TABLE s.a (c int);
CREATE TABLE s."B b" (c int); CREATE TABLE "x""y" (c int); CREATE TABLE "a.b" (c int); CREATE TABLE Ünï (c int);
CREATE TABLE "table" (c int); CREATE TABLE s.date (c int); CREATE TABLE t$1 (c int);
"""
_READ_BY_SERVER = """
SELECT DISTINCT n.nspname, c.relname
FROM pg_rewrite w
JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
JOIN pg_class c ON d.refclassid = 'pg_class'::regclass AND c.oid = d.refobjid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE w.ev_class = 'probe'::regclass AND c.oid <> w.ev_class
"""


def _queries() -> st.SearchStrategy[str]:
    """Queries of one column ``c``, nested in all the ways in which a query can hold another."""
    tables = st.sampled_from(_TABLES)
    leaves = st.one_of(
        tables.map(lambda table: f"SELECT c FROM {table}"),
        tables.map(lambda table: f"SELECT q.c FROM ONLY {table} AS q /* FROM b */ -- , a\n"),
        tables.map(lambda table: f"TABLE {table}"),
        st.just("SELECT c FROM generate_series(1, 2) AS a(c)"),
        st.just("SELECT 1 AS c WHERE 'FROM b' <> $$ FROM a $$ AND E'\\' FROM a' <> ''"),
    )

    def nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        local = st.sampled_from(_LOCAL)
        return st.one_of(
            st.tuples(inner, st.sampled_from(["UNION", "UNION ALL", "EXCEPT", "INTERSECT"]), inner).map(
                lambda parts: f"({parts[0]}) {parts[1]} ({parts[2]})"
            ),
            inner.map(lambda query: f"SELECT q.c FROM ({query}) AS q"),
            st.tuples(tables, inner).map(
                lambda x: f"SELECT c FROM {x[0]} WHERE c IN ({x[1]}) ORDER BY ({x[1]} LIMIT 1)"
            ),
            st.tuples(tables, inner).map(lambda x: f"SELECT q.c FROM {x[0]} AS q, LATERAL ({x[1]}) AS r(d)"),
            st.tuples(tables, inner).map(
                lambda x: f"SELECT q.c FROM ({x[0]} AS q LEFT JOIN ({x[1]}) r ON EXISTS ({x[1]}))"
            ),
            inner.map(lambda query: f"SELECT column1 AS c FROM (VALUES ((SELECT max(q.c) FROM ({query}) AS q))) AS v"),
            inner.map(lambda query: f"SELECT c FROM unnest(ARRAY({query})) AS q(c)"),
            st.tuples(local, inner, inner).map(lambda x: f"WITH {x[0]}(c) AS ({x[1]}) {x[2]}"),
            st.tuples(inner, inner, inner).map(
                lambda x: f"WITH a(c) AS ({x[0]}), b(c) AS MATERIALIZED ({x[1]}) {x[2]}"
            ),
            # Only with RECURSIVE does `a` see `b`.
            st.tuples(inner, inner).map(lambda x: f"WITH RECURSIVE a(c) AS (SELECT c FROM b), b(c) AS ({x[0]}) {x[1]}"),
            st.tuples(inner, inner).map(
                lambda x: f"WITH RECURSIVE a(c) AS (({x[0]}) UNION ALL SELECT c FROM A WHERE c < 0) {x[1]}"
            ),
        )

    return st.recursive(leaves, nested, max_leaves=5)


def _read_by_server(connection: psycopg.Connection[Any], query: str) -> frozenset[ViewName] | None:
    """Return what the server notes that a view of this query reads; None where it is no query."""
    with connection.transaction(force_rollback=True):
        try:
            connection.execute(f"CREATE VIEW probe(c) AS {query}")  # type: ignore[arg-type]
        except psycopg.errors.Error:
            return None
        return frozenset(ViewName(name, schema) for schema, name in connection.execute(_READ_BY_SERVER))


def test_a_query_reads_what_the_server_says_it_reads(db: Database) -> None:
    seen = 0
    with db.connect() as connection:
        connection.execute(_CREATED)

        @given(_queries())
        @settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
        @example("WITH a AS (SELECT * FROM a) SELECT * FROM a")
        @example("WITH a AS (SELECT * FROM b), b AS (SELECT * FROM s.a) SELECT * FROM b, a")
        @example("SELECT * FROM a WHERE c = (WITH a AS (TABLE b) SELECT max(c) FROM a)")
        @example("VALUES (1), ((SELECT max(c) FROM a))")
        @example(f"SELECT c FROM {connection.info.dbname}.s.a")
        @example("SELECT extract(year FROM now()) FROM a -- b\n;")
        @example("SELECT c FROM " + '"x""y" AS b')
        def agree(query: str) -> None:
            nonlocal seen
            expected = _read_by_server(connection, query)
            if expected is None:
                return
            seen += 1
            found = references(query)
            assert found is not None
            assert {ViewName(name.name, name.schema or "public") for name in found} == expected

        agree()
    assert seen > 30


@given(_IDENTIFIERS, _IDENTIFIERS)
def test_any_name_is_read_as_it_is_quoted(schema: str, name: str) -> None:
    query = sql.SQL("SELECT * FROM {}").format(sql.Identifier(schema, name)).as_string()
    assert references(query) == {ViewName(name, schema)}


def test_a_name_that_the_server_would_cut_off_is_cut_off(db: Database) -> None:
    db.execute(f"CREATE TABLE {'x' * 70} ()")  # type: ignore[arg-type]
    assert references(f"SELECT FROM {'X' * 70}") == {
        ViewName(db.value("SELECT relname FROM pg_class WHERE relname ~ '^xx'"))
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not a query at all",
        "SELECT 1; SELECT 2",
        "SELECT * FROM {{ params.source }}",
        "SELECT * FROM U&\"d!0061ta\" UESCAPE '!'",
        "DELETE FROM a",
        # What a query may be, but sqlglot does not know.
        "WITH a AS (SELECT 1) VALUES (1)",
        "SELECT " + "(" * 3000 + "1" + ")" * 3000,
        "SELECT 'a",
        "\ud800",
    ],
)
def test_what_cannot_be_read_is_told_and_breaks_nothing(text: str) -> None:
    assert references(text) is None


def test_a_thousand_unions_are_read() -> None:
    assert references(" UNION ALL ".join(f"SELECT * FROM t{i}" for i in range(1500))) == {
        ViewName(f"t{i}") for i in range(1500)
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what was found is kept; it is not there yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"airflow-provider-matviews-{os.getuid()}"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queries that were not remembered."""
    parsed: list[str] = []

    def tell(query: str) -> Any:
        parsed.append(query)
        return references(query)

    monkeypatch.setattr(module, "references", tell)
    return parsed


def test_a_query_is_parsed_once(folder: Path, parsed: list[str]) -> None:
    queries = {
        'SELECT * FROM a, s."B b"': frozenset({ViewName("a"), ViewName("B b", "s")}),
        "SELECT 1": frozenset(),
        "no": None,
    }
    for _ in range(2):
        assert read_all(queries, "fleet") == queries
    assert parsed == list(queries)
    # One more, and one less: only the new one is parsed, and the old one is forgotten.
    read_all(["SELECT 1", "SELECT 2"], "fleet")
    read_all(["no"], "fleet")
    assert parsed == [*queries, "SELECT 2", "no"]
    assert read_all([], "fleet") == {}


def test_another_version_of_the_parser_parses_again(
    folder: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2", "2"):
        monkeypatch.setattr(module, "version", lambda name, version=version: version)
        read_all(["SELECT 1"], "fleet")
    assert len(parsed) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"%s": 1}',
        b'{"%s": [["a"]]}',
        b'{"%s": [[1, 2]]}',
        b'{"%s": "ab"}',
        b"[" * 100_000,
    ],
)
def test_a_file_that_is_damaged_is_written_anew(folder: Path, parsed: list[str], content: bytes) -> None:
    expected = read_all(["SELECT * FROM a"], "fleet")
    (file,) = folder.iterdir()
    (key,) = json.loads(file.read_text())
    file.write_bytes(content.replace(b"%s", key.encode()))
    assert read_all(["SELECT * FROM a"], "fleet") == expected
    assert read_all(["SELECT * FROM a"], "fleet") == expected
    assert len(parsed) == 2
    assert list(folder.iterdir()) == [file]


def test_nobody_else_can_put_anything_there(folder: Path, parsed: list[str], tmp_path: Path) -> None:
    read_all(["SELECT * FROM a"], "fleet")
    assert folder.stat().st_mode & 0o777 == 0o700
    # Left open, or a link to somewhere else: then it is neither read nor written.
    folder.chmod(0o777)
    (file,) = folder.iterdir()
    before = file.read_bytes()
    for query in ("SELECT * FROM a", "SELECT * FROM b"):
        read_all([query], "fleet")
    assert file.read_bytes() == before
    folder.chmod(0o700)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    read_all(["SELECT * FROM a"], "fleet")
    assert len(parsed) == 4


def test_what_cannot_be_written_is_found_all_the_same(folder: Path, parsed: list[str]) -> None:
    folder.write_text("a file stands in the way")
    for _ in range(2):
        assert read_all(["SELECT * FROM a"], "fleet") == {"SELECT * FROM a": {ViewName("a")}}
    assert len(parsed) == 2


def test_it_imports_neither_airflow_nor_the_parser_before_it_needs_it() -> None:
    code = """
import sys
import airflow_provider_matviews.references, airflow_provider_matviews.task_groups.edges
print(sorted({name.partition(".")[0] for name in sys.modules} & {"airflow", "sqlglot"}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
