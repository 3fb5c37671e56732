"""OpenLineage: the events that a real receiver gets of real DAG runs, held against the catalog."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from airflow_provider_matviews import lineage
from airflow_provider_matviews.exceptions import ViewNotFound
from airflow_provider_matviews.operators.matview import (
    CreateMatViewOperator,
    DeleteMatViewOperator,
    RefreshMatViewOperator,
    RefreshMatViewsOperator,
)
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.column_lineage import columns_of
from airflow_provider_matviews.services.lineage import ViewLineage, pack, read, unpack
from tests.conftest import Database, hook_on

ROOT = Path(__file__).resolve().parent.parent
SECRET = "s3cret-word"
QUERY = f"""
WITH sums AS (SELECT "Odd col" AS odd, sum(amount) AS amount FROM "Odd Schema".payments WHERE paid GROUP BY 1)
SELECT sums.odd, sums.amount * 2 AS "Twice %", recent.day, base.total, '{SECRET}' AS word
FROM sums JOIN recent ON recent.odd = sums.odd JOIN base USING (account)
"""
SET_UP = (
    'CREATE SCHEMA "Odd Schema"',
    'CREATE TABLE "Odd Schema".payments ("Odd col" int, amount numeric(10,2), paid boolean, unused text)',
    "CREATE TABLE events (odd int, account int, at timestamptz) PARTITION BY RANGE (odd)",
    "CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (0) TO (10)",
    "CREATE VIEW inner_view AS SELECT odd, account, at FROM events WHERE account > 0",
    "CREATE VIEW recent AS SELECT odd, account, date_trunc('day', at) AS day FROM inner_view",
    """INSERT INTO "Odd Schema".payments VALUES (1, 10, true, '')""",
    "INSERT INTO events VALUES (1, 7, '2026-01-01 10:00+00')",
    "CREATE MATERIALIZED VIEW base AS SELECT account, count(*) AS total FROM events GROUP BY 1",
)


def run_in_a_process_of_its_own() -> None:
    """The DAG run: Airflow decides when its plugins load whether there is an OpenLineage to tell."""
    from airflow.sdk import DAG

    from airflow_provider_matviews.operators import base
    from tests.airflow_dags import run_dag

    base.SETTLING = 0.0
    with DAG("lineage", schedule=None) as dag:
        (
            CreateMatViewOperator(task_id="create", view="mart.mv", sql=QUERY)
            >> RefreshMatViewOperator(task_id="refresh", view="mart.mv", refresh_strategy="swap")
            >> RefreshMatViewOperator(task_id="spared", view="mart.mv", skip_unchanged=True)
            >> RefreshMatViewOperator(task_id="deferred", view="mart.mv", deferrable=True, trigger_rule="all_done")
            >> RefreshMatViewsOperator(task_id="fleet", views=["base", "mart.mv"])
            >> RefreshMatViewOperator(task_id="fails", view="mart.mv", refresh_strategy="concurrent")
            >> DeleteMatViewOperator(task_id="delete", view="mart.mv", trigger_rule="all_done")
        )
    sys.stdout.write(f"\nStates: {json.dumps(run_dag(dag).states)}\n")


class Receiver:
    """An HTTP endpoint that keeps what OpenLineage's client posts."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        events = self.events

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(201)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def ended(self, task: str) -> dict[str, Any]:
        """The one event of a task's end."""
        (event,) = (
            each
            for each in self.events
            if each["job"]["name"].endswith(f".{task}") and each["eventType"] in ("COMPLETE", "FAIL")
        )
        return event


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def transport(receiver: Receiver) -> str:
    return json.dumps({"type": "http", "url": receiver.url, "endpoint": "api/v1/lineage"})


def _columns(db: Database, relation: str) -> list[tuple[str, str]]:
    rows = db.rows(
        "SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute "
        "WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum",
        (relation,),
    )
    return [(name, type_) for name, type_ in rows]


def _told_columns(dataset: dict[str, Any]) -> list[tuple[str, str]]:
    return [(field["name"], field["type"]) for field in dataset["facets"]["schema"]["fields"]]


def test_what_a_receiver_is_told_is_what_the_catalog_says(db: Database, receiver: Receiver) -> None:
    db.execute(*SET_UP, "CREATE SCHEMA mart", "CREATE TABLE standing AS SELECT 1 AS one")
    connection = {
        "conn_type": "postgres",
        "host": "127.0.0.1",
        "port": db.server.port,
        "login": "postgres",
        "password": SECRET,
        "schema": db.name,
    }
    ran = subprocess.run(
        [sys.executable, "-c", "from tests.test_lineage import *; run_in_a_process_of_its_own()"],
        cwd=ROOT,
        env={
            **os.environ,
            "AIRFLOW_CONN_POSTGRES_DEFAULT": json.dumps(connection),
            "AIRFLOW__OPENLINEAGE__TRANSPORT": transport(receiver),
        },
        stdout=subprocess.PIPE,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0
    (states,) = (line for line in ran.stdout.splitlines() if line.startswith("States:"))
    assert json.loads(states.removeprefix("States:")) == {
        "create": "success",
        "refresh": "success",
        "spared": "skipped",
        "deferred": "success",
        "fleet": "success",
        "fails": "failed",
        "delete": "success",
    }
    assert SECRET not in json.dumps([receiver.ended(task) for task in ("create", "refresh", "deferred", "fleet")])
    namespace = f"postgres://127.0.0.1:{db.server.port}"
    hook = hook_on(db)
    # It is gone by now; what stood is made once more.
    db.execute("CREATE SCHEMA again")
    with db.connect() as here:
        here.execute(sql.SQL("CREATE MATERIALIZED VIEW again.mv AS {}").format(sql.SQL(QUERY)))  # type: ignore[arg-type]
    columns = _columns(db, "again.mv")
    names = {'"Odd Schema".payments': "Odd Schema.payments", "events": "public.events", "base": "public.base"}

    for task, operation, change in (
        ("create", "create", "CREATE"),
        ("refresh", "refresh", "OVERWRITE"),
        ("deferred", "refresh", "OVERWRITE"),
    ):
        event = receiver.ended(task)
        assert {each["namespace"] for each in event["inputs"] + event["outputs"]} == {namespace}
        # Through the CTE and the two plain views; neither these nor a partition hold anything of their own.
        assert {each["name"]: _told_columns(each) for each in event["inputs"]} == {
            f"{db.name}.{name}": _columns(db, relation) for relation, name in names.items()
        }
        (output,) = event["outputs"]
        assert output["name"] == f"{db.name}.mart.mv"
        assert _told_columns(output) == columns
        assert output["facets"]["lifecycleStateChange"]["lifecycleStateChange"] == change
        statistics = output["outputFacets"]["outputStatistics"]
        (run,) = (
            each
            for each in hook.runs("mart.mv", limit=20)
            if (each.operation, each.meta["task_id"]) == (operation, task)
        )
        assert statistics["rowCount"] == run.row_count_after == 1
        assert statistics["size"] == run.meta["response"].get("size_bytes", statistics["size"]) > 0
        assert event["job"]["facets"]["sql"]["query"] == ";\n".join(run.meta["response"]["sql"])
        made_of = output["facets"]["columnLineage"]
        assert {
            name: {(each["name"].removeprefix(f"{db.name}."), each["field"]) for each in field["inputFields"]}
            for name, field in made_of["fields"].items()
        } == {
            "odd": {("Odd Schema.payments", "Odd col")},
            "Twice %": {("Odd Schema.payments", "amount")},
            "day": {("public.events", "at")},
            "total": {("public.base", "total")},
        }
        assert {(each["name"].removeprefix(f"{db.name}."), each["field"]) for each in made_of["dataset"]} == {
            ("Odd Schema.payments", "paid"),
            ("public.base", "account"),
            ("public.events", "account"),
            ("public.events", "odd"),
        }
    fleet = receiver.ended("fleet")
    assert {each["name"] for each in fleet["outputs"]} == {f"{db.name}.public.base", f"{db.name}.mart.mv"}
    assert {each["name"] for each in fleet["inputs"]} == {f"{db.name}.{name}" for name in names.values()}
    failed = receiver.ended("fails")
    assert failed["eventType"] == "FAIL"
    (output,) = failed["outputs"]
    # Nothing happened to it.
    assert "lifecycleStateChange" not in output["facets"]
    assert "outputStatistics" not in output.get("outputFacets", {})
    assert _told_columns(output) == columns
    dropped = receiver.ended("delete")
    assert dropped["inputs"] == []
    (output,) = dropped["outputs"]
    assert output["name"] == f"{db.name}.mart.mv"
    assert output["facets"]["lifecycleStateChange"]["lifecycleStateChange"] == "DROP"
    assert _told_columns(output) == columns


def _read(db: Database, query: str) -> ViewLineage:
    with db.connect() as connection:
        connection.execute("DROP MATERIALIZED VIEW IF EXISTS mv")
        connection.execute(sql.SQL("CREATE MATERIALIZED VIEW mv AS {} WITH NO DATA").format(sql.SQL(query)))  # type: ignore[arg-type]
    found = hook_on(db)._read(read(ResolvedName("public", "mv", "mv")))
    assert found is not None
    assert unpack(json.loads(json.dumps(pack([found])))) == [found]
    return found


def test_columns_are_followed_or_nothing_is_told_of_them(db: Database) -> None:
    db.execute(
        "CREATE TABLE t (id int, n numeric, words text[], j jsonb)",
        "CREATE TABLE p (id int, k int)",
        "CREATE VIEW v (x, y) AS SELECT id, upper(words[1]) FROM t",
    )
    followed = {
        "SELECT p.id, (SELECT max(n) FROM t WHERE t.id = p.id) AS z FROM p": {"id": "p.id", "z": "t.n"},
        "WITH x AS (SELECT id AS a FROM p) SELECT a, (WITH x AS (SELECT n AS a FROM t) SELECT max(a) FROM x) AS b "
        "FROM x": {"a": "p.id", "b": "t.n"},
        "WITH x (a, b) AS (SELECT id, k FROM p UNION ALL SELECT id, 7 FROM t) SELECT b AS a, a AS b FROM x": {
            "a": "p.k",
            "b": "p.id t.id",
        },
        "WITH RECURSIVE r (n, l) AS (SELECT id, 1 FROM p UNION ALL SELECT p.k, l + 1 FROM r JOIN p ON p.id = r.n "
        "WHERE l < 3) SELECT n, l FROM r": {"n": "p.id p.k", "l": ""},
        'SELECT a.y AS "o""x", b.x FROM v a JOIN v b USING (x)': {'o"x': "t.words", "x": "t.id"},
        "SELECT id, k, n FROM p FULL JOIN t USING (id)": {"id": "p.id t.id", "k": "p.k", "n": "t.n"},
        "SELECT count(*) AS c, j ->> 'a' AS j FROM t GROUP BY 2": {"c": "", "j": "t.j"},
        "TABLE p": {"id": "p.id", "k": "p.k"},
    }
    for query, expected in followed.items():
        found = columns_of(_read(db, query))
        assert found is not None, query
        told = {
            name: " ".join(f"{each.name}.{column}" for each, column in made) for name, made in found.made_of.items()
        }
        assert told == expected, query
    # Each reads the one before three times: 243 places of one table.
    db.execute("CREATE VIEW w0 AS SELECT id FROM t")
    with db.connect() as connection:
        for n in range(1, 6):
            query = f"CREATE VIEW w{n} AS SELECT a.id FROM w{n - 1} a, w{n - 1} b, w{n - 1} c"
            connection.execute(sql.SQL(query))  # type: ignore[arg-type]
    # What cannot be followed, or would be followed to the wrong ones: the relations are told all the same.
    for query in (
        "SELECT t, t.id FROM t",
        "SELECT row_to_json(t) AS r FROM t",
        "SELECT p.id, q.z FROM p, LATERAL (SELECT max(n) AS z FROM t WHERE t.id = p.id) q",
        "SELECT a1.one, a1.two FROM t AS a1 (one, two)",
        "SELECT t.id, r.a FROM t, jsonb_to_recordset(j) AS r (a int)",
        "SELECT id FROM w5",
    ):
        found = _read(db, query)
        assert columns_of(found) is None, query
        assert "t" in {each.name for each in found.inputs}


def test_what_a_plain_view_selects_and_nobody_takes_of_it_is_no_source(db: Database) -> None:
    db.execute(
        'CREATE TABLE "Odd.Tab" (a int, "b.c%" text, c int, d int)',
        "CREATE TABLE p (id int, k int)",
        """CREATE VIEW pv AS SELECT a, "b.c%" AS bc, c FROM "Odd.Tab" WHERE a > 0""",
        "CREATE VIEW pw AS SELECT a, bc, c FROM pv WHERE c > 1",
        'CREATE VIEW grouped AS SELECT c, max(d) AS most FROM "Odd.Tab" GROUP BY c',
        'CREATE VIEW once AS SELECT DISTINCT a, d FROM "Odd.Tab"',
        'CREATE VIEW of_both AS SELECT a, d FROM "Odd.Tab" UNION ALL SELECT id, k FROM p',
        'CREATE VIEW apart AS SELECT a, d FROM "Odd.Tab" UNION SELECT id, k FROM p',
    )
    for query, expected in {
        "SELECT a FROM pv": "",
        "SELECT c FROM pv": "Odd.Tab.a",
        "SELECT a FROM pw": "Odd.Tab.c",
        "SELECT k FROM p WHERE EXISTS (SELECT 1 FROM pv)": "Odd.Tab.a",
        "SELECT k FROM p WHERE EXISTS (SELECT 1 FROM pv WHERE pv.c = p.id)": "Odd.Tab.a Odd.Tab.c p.id",
        "SELECT p.k FROM p JOIN pw ON pw.bc = p.id::text": "Odd.Tab.a Odd.Tab.b.c% Odd.Tab.c p.id",
        "SELECT count(*) AS n FROM grouped": "Odd.Tab.c",
        "SELECT most FROM grouped": "Odd.Tab.c",
        "SELECT a FROM once": "Odd.Tab.d",
        "SELECT a FROM of_both": "",
        "SELECT a FROM apart": "Odd.Tab.d p.k",
        "WITH x AS (SELECT a, bc FROM pv ORDER BY c LIMIT 3) SELECT a FROM x": "Odd.Tab.c",
        "SELECT rank() OVER (PARTITION BY c ORDER BY bc) AS r FROM pv": "Odd.Tab.a",
        # Without a plain view it is the catalog's word, also on what a subquery selects in vain.
        'SELECT k FROM p WHERE EXISTS (SELECT d FROM "Odd.Tab")': "Odd.Tab.d",
    }.items():
        found = columns_of(_read(db, query))
        assert found is not None, query
        assert " ".join(sorted(f"{each.name}.{column}" for each, column in found.elsewhere)) == expected, query


def test_somebody_who_alters_a_source_costs_the_columns_and_nothing_else(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS id", "CREATE MATERIALIZED VIEW mv AS SELECT id FROM t")
    hook = hook_on(db)
    hook.wants_lineage = True
    hook.refresh("mv")
    assert columns_of(hook.ended[0].lineage) is not None  # type: ignore[arg-type]
    with db.connect() as other:
        other.execute("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        found = hook._read(read(ResolvedName("public", "mv", "mv")))
    assert found is not None
    assert [each.name for each in found.inputs] == ["t"]
    assert columns_of(found) is None


def test_nothing_is_read_where_nobody_asks_and_a_server_that_is_lost_meanwhile_fails_nothing(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS id", "CREATE MATERIALIZED VIEW mv AS SELECT id FROM t")
    assert not lineage.enabled()  # No transport is configured here.
    execute, asked, lose = psycopg.Cursor.execute, [], False

    def spy(cursor: psycopg.Cursor[Any], query: Any, *arguments: Any, **more: Any) -> Any:
        text = query if isinstance(query, str) else query.as_string(None)
        if "is_view" in text:
            asked.append(text)
            if lose:
                with db.connect() as other:
                    execute(other.cursor(), "SELECT pg_terminate_backend(%s)", (cursor.connection.info.backend_pid,))
        return execute(cursor, query, *arguments, **more)

    monkeypatch.setattr(psycopg.Cursor, "execute", spy)
    hook = hook_on(db)
    assert hook.refresh("mv").status == "updated"
    assert hook.ended == asked == []
    for lose in (False, True):
        hook = hook_on(db)
        hook.wants_lineage = True
        assert hook.refresh("mv").status == "updated"
        assert asked
        assert (hook.ended[0].lineage is None) is lose
        # What is told of it does without.
        assert lineage.facets(lineage.told_by(hook)).outputs[0].name == f"{db.name}.public.mv"
    assert [run.status for run in hook.runs("mv")] == ["success"] * 3
    with pytest.raises(ViewNotFound):
        hook.refresh("absent")
    assert lineage.facets(lineage.told_by(hook)).outputs[1].name == f"{db.name}.public.absent"


def test_a_deferred_fleet_brings_what_it_read_back_to_the_task_and_a_second_copy_does_too(db: Database) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT 1 AS id",
        "CREATE MATERIALIZED VIEW a AS SELECT id FROM t",
        "CREATE MATERIALIZED VIEW b AS SELECT id FROM a",
    )

    async def refresh(view: str) -> Any:
        hook = hook_on(db)
        hook.wants_lineage = True
        await hook.arefresh(view, deferral="one")
        return lineage.told_by(hook)

    first, second = asyncio.run(refresh("b")), asyncio.run(refresh("b"))
    assert len(hook_on(db).runs("b")) == 1
    assert second == first
    hook = hook_on(db)
    hook.wants_lineage = True
    hook.refresh_many(["*"], at_once=2)
    told = lineage.told_by(hook)
    # Each relation once, however many read it.
    assert told is not None
    assert sorted(each["name"] for each in told["lineage"]["relations"]) == ["a", "a", "b", "t"]
    json.dumps(told)
