"""The notifier in real DAG runs, with what really receives it: a mail server and functions."""

from __future__ import annotations

import email
import email.policy
import json
import socketserver
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from airflow.providers.smtp.notifications.smtp import SmtpNotifier
from airflow.sdk import DAG, task

from airflow_provider_matviews.exceptions import FleetFailed, InvalidDefinition
from airflow_provider_matviews.notifications.matview import MatViewNotifier
from airflow_provider_matviews.operators.matview import (
    CreateMatViewOperator,
    RefreshMatViewOperator,
    RefreshMatViewsOperator,
)
from airflow_provider_matviews.sensors.matview import MatViewMetricsSensor
from tests.airflow_dags import run_dag, set_connection
from tests.conftest import Database, hook_on

SECRET = "s3cret-word"


class Mailbox:
    """A mail server on loopback that keeps what it is sent."""

    def __init__(self) -> None:
        self.mails: list[Any] = []
        mails = self.mails

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(b"220 here\r\n")
                while line := self.rfile.readline():
                    word = line.split()[0].upper() if line.split() else b""
                    if word == b"DATA":
                        self.wfile.write(b"354 go on\r\n")
                        lines = []
                        while (line := self.rfile.readline()) != b".\r\n":
                            lines.append(line)
                        mails.append(email.message_from_bytes(b"".join(lines), policy=email.policy.default))
                    self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 fine\r\n")
                    if word == b"QUIT":
                        return

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mailbox]:
    box = Mailbox()
    extra = {"disable_ssl": True, "disable_tls": True}
    connection = {"conn_type": "smtp", "host": "127.0.0.1", "port": box.port, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", json.dumps(connection))
    yield box
    box.close()


@pytest.fixture(autouse=True)
def _connection(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    set_connection(monkeypatch, db, password=SECRET)


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_mail_says_what_broke_since_when_and_what_to_do(db: Database, mailbox: Mailbox, deferrable: bool) -> None:
    db.execute(
        'CREATE SCHEMA "100%"',
        "CREATE TABLE t AS SELECT 1 AS id",
        f"""CREATE MATERIALIZED VIEW "100%"."it's" AS SELECT id, '{SECRET}' AS word FROM t""",  # type: ignore[arg-type]
    )
    hook = hook_on(db)
    hook.refresh('"100%"."it\'s"')
    for _ in range(2):
        with pytest.raises(Exception, match="unique index"):
            hook.refresh('"100%"."it\'s"', refresh_strategy="concurrent")
    hook.refresh('"100%"."it\'s"', skip_unchanged=True)
    mail = SmtpNotifier(
        from_email="a@example.org",
        to="b@example.org",
        subject="{{ matview.subject }}",
        html_content="{{ matview.html }}",
    )
    told: list[dict[str, Any]] = []
    notifier = MatViewNotifier([mail, lambda context: told.append(context["matview"])])
    with DAG(f"notified_{deferrable}", schedule=None) as dag:
        RefreshMatViewOperator(
            task_id="refresh",
            view='"100%"."it\'s"',
            refresh_strategy="concurrent",
            deferrable=deferrable,
            on_failure_callback=notifier,
        )
    run = run_dag(dag)
    assert run.states == {"refresh": "failed"}
    (message,) = mailbox.mails
    assert message["Subject"] == 'Refresh of "100%"."it\'s" failed'
    body = message.get_body(("html",)).get_content().replace("&#x27;", "'").replace("&quot;", '"')
    last = hook.last_run('"100%"."it\'s"')
    assert last is not None
    assert 'What broke: ConcurrentRefreshRefused: "100%"."it\'s" cannot be refreshed concurrently' in body
    assert "What to do: CREATE UNIQUE INDEX CONCURRENTLY" in body
    assert "3 failures in a row" in body
    assert f"WHERE id IN ({last.id});" in body
    assert f"/dags/notified_{deferrable}/runs/" in body
    (facts,) = told
    failures = [each for each in hook.runs(limit=10) if each.status == "failed"]
    (view,) = facts["views"]
    assert view["failing_since"] == failures[-1].created_at
    assert view["consecutive_failures"] == len(failures) == 3
    assert facts["text"] in run.log
    # The statement that it names gives the run.
    assert db.rows(facts["sql"])[0][0] == last.id


def test_a_failure_of_the_server_itself_is_told_without_secrets_and_templates_of_ones_own_are_used(
    db: Database,
) -> None:
    db.execute(
        f"CREATE FUNCTION fails() RETURNS int LANGUAGE plpgsql AS "  # type: ignore[arg-type]
        f"$$BEGIN RAISE '{{{{ ti.task_id }}}} %', '{SECRET}' USING HINT = 'mend {SECRET}'; END$$",
        "CREATE MATERIALIZED VIEW mv AS SELECT fails() WITH NO DATA",
    )
    told: list[dict[str, Any]] = []
    with DAG("own_template", schedule=None) as dag:
        RefreshMatViewOperator(
            task_id="refresh",
            view="mv",
            retries=1,
            retry_delay=timedelta(0),
            on_retry_callback=MatViewNotifier(lambda context: told.append(context["matview"])),
            on_failure_callback=MatViewNotifier(
                lambda context: told.append(context["matview"]),
                subject="{{ matview.views[0].name }} {{ ti.task_id }}",
                text="{{ matview.message }} {{ no.such.thing }}",
            ),
        )
    assert run_dag(dag).states == {"refresh": "failed"}
    first, facts = told
    assert first["text"].count("RaiseException") == 1
    assert first["subject"] == "Refresh of mv failed and will be tried again"
    assert "What to do: mend ***" in first["text"]
    assert SECRET not in json.dumps(facts, default=str)
    assert facts["subject"] == "mv refresh"
    # A template that cannot be rendered costs its words, not the message; what an error says is no template.
    assert "What broke: RaiseException: {{ ti.task_id }} ***" in facts["text"]


def test_nothing_that_goes_wrong_in_it_hides_the_error_or_keeps_others_from_being_told(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    def breaks(context: Any) -> None:
        raise RuntimeError("the pager is off")

    notifier = MatViewNotifier([breaks, lambda context: told.append(context["matview"])])
    set_connection(monkeypatch, db, "gone", port=1, password=SECRET)
    with DAG("unreachable", schedule=None) as dag:
        # The server cannot be asked, neither by the task nor by the notifier.
        gone = RefreshMatViewOperator(task_id="gone", conn_id="gone", view="mv", on_failure_callback=notifier)

        @task(on_failure_callback=notifier, trigger_rule="all_done")
        def other() -> None:
            raise ValueError(f"nothing to do with views, and a word of the connection: {SECRET}")

        gone >> other()
    run = run_dag(dag)
    assert run.states == {"gone": "failed", "other": "failed"}
    assert "breaks could not be told: RuntimeError: the pager is off" in run.log
    by_task = {facts["task_id"]: facts for facts in told}
    assert by_task["gone"]["headline"] == "Refresh of mv failed"
    assert by_task["gone"]["error"] == "OperationalError"
    assert "The record could not be read: OperationalError." in by_task["gone"]["text"]
    assert by_task["other"]["headline"] == "Task other failed"
    assert by_task["other"]["message"] == "nothing to do with views, and a word of the connection: ***"


def test_a_fleet_names_those_that_failed_and_a_sensor_its_breaches_and_success_is_told_too(db: Database) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT 1 AS id",
        "CREATE MATERIALIZED VIEW bad AS SELECT 1 / id AS id FROM t",
        "CREATE MATERIALIZED VIEW reads_bad AS SELECT id FROM bad",
        "CREATE MATERIALIZED VIEW good AS SELECT id FROM t",
        "UPDATE t SET id = 0",
    )
    told: list[dict[str, Any]] = []
    notifier = MatViewNotifier(lambda context: told.append(context["matview"]))
    both: Any = {"on_failure_callback": notifier, "on_success_callback": notifier, "on_skipped_callback": notifier}
    with DAG("fleet_told", schedule=None, default_args={"trigger_rule": "all_done", **both}) as dag:
        (
            RefreshMatViewsOperator(task_id="fleet", views=["*"])
            >> MatViewMetricsSensor(task_id="sensor", views=["bad", "good"])
            >> RefreshMatViewOperator(task_id="fine", view="good", row_count_strategy="exact")
            >> RefreshMatViewOperator(task_id="spared", view="good", skip_unchanged=True, trigger_rule="all_done")
            >> CreateMatViewOperator(task_id="create", view="fresh", sql="SELECT 1 AS id")
        )
    run = run_dag(dag)
    assert run.states["sensor"] == "failed"
    by_task = {facts["task_id"]: facts for facts in told}
    fleet = by_task["fleet"]
    assert fleet["headline"] == "Refresh of bad, reads_bad failed"
    assert fleet["error"] == FleetFailed.__name__
    assert [view["name"] for view in fleet["views"]] == ["bad", "reads_bad"]
    assert "bad: 1 failure in a row" in fleet["text"]
    assert "DivisionByZero: division by zero" in fleet["text"]
    sensor = by_task["sensor"]
    assert sensor["headline"] == "Task sensor found 1 breach"
    assert [breach["view"] for breach in sensor["breaches"]] == ["bad"]
    assert f"bad: {sensor['breaches'][0]['message']}" in sensor["text"]
    assert f"What to do: {sensor['breaches'][0]['what_to_do']}" in sensor["text"]
    assert by_task["fine"]["headline"] == "Refresh of good succeeded"
    assert by_task["fine"]["error"] is None
    assert ", 1 rows" in by_task["fine"]["text"]
    assert by_task["create"]["headline"] == "Creation of fresh succeeded"
    assert by_task["spared"]["headline"] == "Refresh of good was skipped"
    assert "its source has not changed" in by_task["spared"]["text"]


@pytest.mark.parametrize("arguments", [{"notifiers": "mail"}, {"notifiers": [None]}, {"subject": 7}, {"text": None}])
def test_what_is_no_notifier_is_refused_when_the_dag_is_read(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidDefinition):
        MatViewNotifier(**arguments)
