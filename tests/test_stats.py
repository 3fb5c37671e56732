"""Metrics as their receivers get them: StatsD over UDP and OpenTelemetry over HTTP, from real runs."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest
from airflow.providers.common.compat.sdk import Stats
from airflow.sdk import DAG
from hypothesis import example, given
from hypothesis import strategies as st

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import FleetFailed, ViewLocked
from airflow_provider_matviews.operators.matview import (
    CreateMatViewOperator,
    DeleteMatViewOperator,
    RefreshMatViewOperator,
)
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.stats import tag
from tests.airflow_dags import run_dag, set_connection
from tests.conftest import Database, hook_on

#: What Airflow lets through with InfluxDB's style of tags (validators.stat_name_default_handler).
_LET_THROUGH = re.compile(r"[A-Za-z0-9_.\-/,=]{1,250}")


class StatsD:
    """A server of StatsD's protocol: a datagram is a metric, ``name:value|type``."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.1)
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()

    def received(self) -> list[tuple[str, dict[str, str], float, str]]:
        """Name, tags, value and type of every metric of ours since the last call."""
        metrics = []
        while True:
            try:
                text = self._socket.recv(4096).decode()
            except TimeoutError:
                return metrics
            what, value, kind = re.fullmatch(r"(.*):([^:|]+)\|(\w+)", text).groups()  # type: ignore[union-attr]
            name, *tags = what.split(",")
            if name.startswith("airflow.matviews."):
                assert _LET_THROUGH.fullmatch(what.removeprefix("airflow."))
                pairs = dict(each.split("=", 1) for each in tags)
                metrics.append((name.removeprefix("airflow.matviews."), pairs, float(value), kind))


@pytest.fixture(autouse=True)
def _stats_as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[Stats.initialize.__module__]
    monkeypatch.setattr(module, "_factory", None)
    monkeypatch.setattr(module, "_backend", None)


@pytest.fixture
def statsd(monkeypatch: pytest.MonkeyPatch) -> Iterator[StatsD]:
    server = StatsD()
    for name, value in {
        "on": "True",
        "host": "127.0.0.1",
        "port": str(server.port),
        "influxdb_enabled": "True",
    }.items():
        monkeypatch.setenv(f"AIRFLOW__METRICS__STATSD_{name.upper()}", value)
    yield server
    server.close()


def _counts(metrics: list[tuple[str, dict[str, str], float, str]]) -> list[str]:
    return sorted(name for name, *_ in metrics)


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_dag_run_sends_every_metric_once_whoever_carries_it_out(
    db: Database, statsd: StatsD, monkeypatch: pytest.MonkeyPatch, deferrable: bool
) -> None:
    set_connection(monkeypatch, db)
    db.execute("CREATE SCHEMA s", "CREATE TABLE s.t AS SELECT generate_series(1, 3) AS id")
    with DAG(f"metrics_{deferrable}", schedule=None) as dag:
        (
            CreateMatViewOperator(task_id="create", view="s.mv", sql="SELECT id FROM s.t", deferrable=deferrable)
            >> RefreshMatViewOperator(task_id="refresh", view="s.mv", refresh_strategy="regular", deferrable=deferrable)
            >> RefreshMatViewOperator(task_id="spared", view="s.mv", skip_unchanged=True, deferrable=deferrable)
        )
        DeleteMatViewOperator(task_id="delete", view="s.mv", trigger_rule="all_done") << dag.get_task("spared")
    run = run_dag(dag)
    assert run.states["refresh"] == run.states["delete"] == "success"
    received = statsd.received()
    assert _counts(received) == sorted(
        [
            *("create.duration", "create.lock_wait", "create.rows"),
            *("refresh.duration", "refresh.lag", "refresh.rows", "refresh.size", "refresh.lock_wait"),
            # Nothing has changed: the third task.
            *("refresh.lock_wait", "refresh.skipped"),
            *("drop.duration", "drop.lock_wait"),
        ]
    )
    by_name = {name: (tags, value, kind) for name, tags, value, kind in received}
    whose = {"view": "s.mv", "conn_id": "postgres_default"}
    tags, value, kind = by_name["refresh.duration"]
    assert tags == {**whose, "strategy": "regular", "status": "updated"}
    assert kind == "ms"
    assert value == pytest.approx(hook_on(db).runs("s.mv", limit=10)[2].duration_ms, abs=50)
    assert by_name["refresh.rows"] == ({**whose, "strategy": "regular"}, 3, "g")
    assert by_name["refresh.size"][1] == hook_on(db).runs("s.mv", limit=10)[2].meta["response"]["size_bytes"]
    assert by_name["refresh.skipped"] == ({**whose, "reason": "unchanged"}, 1, "c")
    assert by_name["create.duration"][0]["status"] == "created"
    assert by_name["drop.duration"][0]["status"] == "deleted"


def test_the_lag_is_the_time_since_the_fill_before(db: Database, statsd: StatsD) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS id")
    hook = hook_on(db)
    hook.refresh("mv")
    assert "refresh.lag" not in _counts(statsd.received())  # Nobody knows what was before.
    db.execute("UPDATE matviews.mat_view_runs SET finished_at = now() - interval '1 hour'")
    hook.refresh("mv")
    (lag,) = [value for name, _, value, _ in statsd.received() if name == "refresh.lag"]
    assert lag == pytest.approx(3_600_000, abs=5_000)


def test_a_failure_tells_its_class_and_how_long_others_were_waited_for(db: Database, statsd: StatsD) -> None:
    db.execute("CREATE TABLE t (id int)", "CREATE MATERIALIZED VIEW mv AS SELECT 1 / id AS id FROM t")
    hook = hook_on(db)
    with db.connect() as other:
        key = lock_key(ResolvedName("public", "mv", "mv"))
        other.execute(psycopg.sql.SQL("SELECT pg_advisory_lock({})").format(key))
        with pytest.raises(ViewLocked):
            hook.refresh("mv", max_wait=0.3)
        assert hook.refresh("mv", if_locked="skip").status == "skipped"
    with db.connect() as reader:
        reader.execute("BEGIN; SELECT * FROM mv")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            hook.refresh("mv", refresh_strategy="regular", lock_timeout=0.1, max_wait=0.2)
    db.execute("INSERT INTO t VALUES (0)")
    with pytest.raises(psycopg.errors.DivisionByZero):
        hook.refresh("mv", refresh_strategy="regular")
    received = statsd.received()
    failures = [tags["error"] for name, tags, _, _ in received if name == "refresh.failures"]
    assert failures == ["ViewLocked", "LockNotAvailable", "DivisionByZero"]
    assert [tags["reason"] for name, tags, _, _ in received if name == "refresh.skipped"] == ["locked"]
    waits = [value for name, _, value, _ in received if name == "refresh.lock_wait"]
    assert waits[0] >= 250
    assert waits[2] >= 150
    assert waits[1] < 10
    assert waits[3] < 10
    # What was skipped did not take its time.
    assert _counts(received).count("refresh.duration") == 3


def test_a_fleet_tells_of_each_view_once_also_of_those_that_were_left(db: Database, statsd: StatsD) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT 1 AS id",
        "CREATE MATERIALIZED VIEW good AS SELECT id FROM t",
        "CREATE MATERIALIZED VIEW idle AS SELECT 1 AS id",
        "CREATE MATERIALIZED VIEW bad AS SELECT 1 / id AS id FROM t",
        "CREATE MATERIALIZED VIEW reads_bad AS SELECT id FROM bad",
    )
    hook = hook_on(db)
    hook.refresh_many(["*"], at_once=2)
    assert _counts(statsd.received()).count("refresh.duration") == 4
    db.execute("UPDATE t SET id = 0")
    with pytest.raises(FleetFailed):
        asyncio.run(hook.arefresh_many(["*"], at_once=2, skip_unchanged=True))
    received = statsd.received()
    assert {tags["view"]: tags["reason"] for name, tags, _, _ in received if name == "refresh.skipped"} == {
        "idle": "unchanged",
        "reads_bad": "stopped",
    }
    ended = [(tags["view"], tags["status"]) for name, tags, _, _ in received if name == "refresh.duration"]
    assert sorted(ended) == [("bad", "failed"), ("good", "updated")]


def test_what_was_tried_again_or_had_been_done_by_another_copy_counts_once(db: Database, statsd: StatsD) -> None:
    db.execute("CREATE MATERIALIZED VIEW a AS SELECT 1 AS id", "CREATE MATERIALIZED VIEW b AS SELECT 1 AS id")
    for _ in range(2):
        asyncio.run(hook_on(db).arefresh("a", deferral="one"))
    assert _counts(statsd.received()).count("refresh.duration") == 1
    # Room for one of the two at a time.
    role = db.role("LOGIN IN ROLE postgres CONNECTION LIMIT 2")
    hook_on(db, role).refresh_many(["*"], at_once=2)
    received = statsd.received()
    assert _counts(received).count("refresh.duration") == 2
    assert {tags["view"] for name, tags, _, _ in received if name == "refresh.duration"} == {"a", "b"}
    assert "refresh.failures" not in _counts(received)


def test_without_tags_the_names_are_the_same_and_a_dry_run_sends_nothing(
    db: Database, statsd: StatsD, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__METRICS__STATSD_INFLUXDB_ENABLED", "False")
    db.execute('CREATE MATERIALIZED VIEW "Odd, =Name|" AS SELECT 1 AS id')
    hook = hook_on(db)
    hook.refresh('"Odd, =Name|"', dry_run=True)
    assert statsd.received() == []
    hook.refresh('"Odd, =Name|"', refresh_strategy="regular")
    received = statsd.received()
    assert _counts(received) == ["refresh.duration", "refresh.lock_wait", "refresh.rows", "refresh.size"]
    assert all(tags == {} for _, tags, _, _ in received)


@pytest.mark.parametrize("name", ["Odd, =Name|", "Ä" * 31, "x" * 63, 'say "%s:1|c"\n', "s3cret-word"])
def test_no_name_of_a_view_loses_a_metric(db: Database, statsd: StatsD, name: str) -> None:
    schema, view = f"s{name[1:]}", psycopg.sql.Identifier(f"s{name[1:]}", name).as_string(None)
    with db.connect() as connection:
        connection.execute(psycopg.sql.SQL("CREATE SCHEMA {}").format(psycopg.sql.Identifier(schema)))
    hook = hook_on(db, password="s3cret-word")
    hook.create(MatViewDefinition(name=view, sql="SELECT 1 AS id"))
    received = statsd.received()
    assert _counts(received) == ["create.duration", "create.lock_wait", "create.rows"]
    assert all(set(tags) >= {"view", "conn_id"} and "s3cret-word" not in tags["view"] for _, tags, _, _ in received)


@given(st.text(), st.text())
@example("a b", "a,b")
@example("x" * 120 + "a", "x" * 120 + "b")
@example('"a"', "a")
def test_tags_are_what_airflow_takes_and_two_views_do_not_become_one(one: str, other: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_.-]{0,100}", tag(one))
    assert (tag(one) == tag(other)) == (one == other)
    assert tag("analytics.daily-2") == "analytics.daily-2"


@pytest.mark.parametrize("where", ["no.such.host.invalid", "127.0.0.1"])
def test_a_receiver_that_is_not_there_fails_nothing(db: Database, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setenv("AIRFLOW__METRICS__STATSD_ON", "True")
    monkeypatch.setenv("AIRFLOW__METRICS__STATSD_HOST", where)
    monkeypatch.setenv("AIRFLOW__METRICS__STATSD_PORT", "1")
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS id")
    assert hook_on(db).refresh("mv").status == "updated"


def test_what_goes_wrong_with_a_metric_is_told_and_fails_nothing(
    db: Database, statsd: StatsD, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A handler of names, as a deployment may give one, that raises.
    monkeypatch.setenv("AIRFLOW__METRICS__STAT_NAME_HANDLER", "math.sqrt")
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS id")
    assert hook_on(db).refresh("mv").status == "updated"
    assert "Its metrics could not be sent: TypeError" in capsys.readouterr().out


def test_opentelemetry_gets_them_with_their_attributes(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AIRFLOW__METRICS__OTEL_ON", "True")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"http://127.0.0.1:{server.server_port}/v1/metrics")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/protobuf")
    set_connection(monkeypatch, db, "views")
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS id")
    # A process of its own, which sends what it has at its end; and one that Airflow has not set up.
    refresh = "MatViewHook(postgres_conn_id='views').refresh('mv', refresh_strategy='regular')"
    try:
        subprocess.run(
            [sys.executable, "-c", f"from airflow_provider_matviews.hooks.matview import MatViewHook; {refresh}"],
            check=True,
            timeout=60,
        )
    finally:
        server.shutdown()
        server.server_close()
    found = {}
    for body in bodies:
        request = ExportMetricsServiceRequest.FromString(body)
        for metric in (m for r in request.resource_metrics for s in r.scope_metrics for m in s.metrics):
            points = getattr(metric, metric.WhichOneof("data")).data_points
            found[metric.name] = {each.key: each.value.string_value for each in points[0].attributes}
    assert found["airflow.matviews.refresh.duration"] == {
        "view": "mv",
        "conn_id": "views",
        "strategy": "regular",
        "status": "updated",
    }
    assert {"airflow.matviews.refresh.rows", "airflow.matviews.refresh.size"} <= found.keys()


_DASHBOARD = json.loads((Path(__file__).parent.parent / "docs" / "grafana" / "matviews.json").read_text())


def _as_grafana_sends_it(query: str, schema: str, views: list[str]) -> str:
    """Put in what Grafana does: variables, quoted where there may be several, and its macros for PostgreSQL."""
    quoted = ",".join("'" + view.replace("'", "''") + "'" for view in views)
    query = query.replace("${schema}", schema).replace("$view", quoted).replace("$__interval", "1h")
    query = re.sub(
        r"\$__timeFilter\(([^)]+)\)", r"\1 BETWEEN now() - interval '6 hours' AND now() + interval '1 minute'", query
    )
    query = re.sub(r"\$__timeGroupAlias\(([^,]+), 1h\)", r'floor(extract(epoch from \1)/3600)*3600 AS "time"', query)
    assert "$" not in query
    return query


def test_every_panel_of_the_dashboard_answers_by_indexes_however_long_the_history_is(db: Database) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT 1 AS id", 'CREATE MATERIALIZED VIEW "it\'s 100%" AS SELECT 1 / id AS id FROM t'
    )
    hook = hook_on(db, tracking_schema="kept")
    hook.create(MatViewDefinition(name="fine", sql="SELECT 1 AS id", unique_index_columns=["id"]))
    # The dashboard's 24 hours beside a history of months, of many views.
    db.execute(
        "INSERT INTO kept.mat_view_definitions (name, schema_name, view_name) "
        "SELECT 'v' || n, 'public', 'v' || n FROM generate_series(1, 200) n",
        "INSERT INTO kept.mat_view_runs (mat_view_definition_id, status, operation, started_at, finished_at, "
        "duration_ms, meta, error, created_at) SELECT d.id, CASE WHEN n % 50 = 0 THEN 3 ELSE 2 END, 1, at, at, 10, "
        "'{}', CASE WHEN n % 50 = 0 THEN '{}'::jsonb END, at FROM kept.mat_view_definitions d, "
        "generate_series(1, 500) n, LATERAL (SELECT now() - n * interval '4 hours' - interval '1 day' AS at) moment "
        "WHERE d.name LIKE 'v%'",
        "VACUUM ANALYZE kept.mat_view_runs, kept.mat_view_definitions",
    )
    hook.refresh("fine", refresh_strategy="concurrent")
    hook.refresh("fine", skip_unchanged=True)
    db.execute("UPDATE t SET id = 0")
    with pytest.raises(psycopg.errors.DivisionByZero):
        hook.refresh('"it\'s 100%"', refresh_strategy="regular")
    with db.connect() as connection:
        (variable,) = (each for each in _DASHBOARD["templating"]["list"] if each["type"] == "query")
        query: Any = _as_grafana_sends_it(variable["query"], "kept", [])
        views = [name for (name,) in connection.execute(query)]
        assert len(views) == 202
        answers = {}
        for panel in _DASHBOARD["panels"]:
            for target in panel.get("targets", ()):
                query = _as_grafana_sends_it(target["rawSql"], "kept", views)
                answers[panel["title"]] = connection.execute(query).fetchall()
                plan = "\n".join(line for (line,) in connection.execute("EXPLAIN " + query))
                assert "Seq Scan on mat_view_runs" not in plan, f"{panel['title']}: {plan}"
    assert answers["Views whose last run failed"] == [(1,)]
    assert answers["Failures"][0][1:4] == ('"it\'s 100%"', "refresh", "DivisionByZero")
    assert {(status, count) for _, status, count in answers["Runs"]} == {("success", 2), ("skipped", 1), ("failed", 1)}
    assert [(view, ms > 0) for _, view, ms in answers["Duration of refreshes"]] == [("fine", True)]
    assert answers["Why refreshes were skipped"][0][:3] == ("fine", answers["Why refreshes were skipped"][0][1], 1)
    assert answers["Every view"][0][0] == '"it\'s 100%"'
    assert len(answers["Every view"]) == 202
    # Every panel has something to show.
    assert [title for title, rows in answers.items() if not rows] == []


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    panels = _DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {each["name"] for each in _DASHBOARD["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] in {"row", "stat", "table", "timeseries"}
        for target in panel.get("targets", ()):
            assert target["datasource"] == panel["datasource"]
            assert target["format"] == ("time_series" if panel["type"] == "timeseries" else "table")
            used = set(re.findall(r"\$\{?(?!__)(\w+)", target["rawSql"] + target["datasource"]["uid"]))
            assert used <= variables
