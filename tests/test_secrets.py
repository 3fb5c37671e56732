"""Credentials never appear: not in a run row, not in a log, not in what an error leaves on record."""

from __future__ import annotations

import json
import logging
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import MatViewError
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.outcome import log_statements
from tests.conftest import Database, hook_on
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

PASSWORDS = [
    "hunter2-secret",
    "with space/and:signs@",
    "it's quoted",
    "back\\slash",
    'double"quote',
    "pär%00ole",
    "100%s %(x)s",
    "{curly}",
]


def _hook(db: Database, password: str | None, **extra: str) -> MatViewHook:
    return hook_on(db, password=password, extra=json.dumps(extra) if extra else None)


def _everything_recorded(db: Database) -> str:
    """The run rows as text, and as a program reads them."""
    rows = db.rows("SELECT r::text, error, meta FROM matviews.mat_view_runs r")
    assert rows
    return "\n".join([str(row) for row in rows] + [text for _, error, meta in rows for text in _texts([error, meta])])


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(text for item in value.values() for text in _texts(item))]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _definition(secret: str) -> MatViewDefinition:
    """A view that reads another server, its credentials in its SQL; as a connection string and as a URL."""
    literal = sql.Literal(f"host=elsewhere password={secret}").as_string(None)
    url = sql.Literal(f"postgres://me:{quote(secret, safe='')}@elsewhere/db").as_string(None)
    return MatViewDefinition(name="mv", sql=f"SELECT length({literal}) AS a, length({url}) AS b")


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_in_the_sql_of_a_view_is_not_recorded(db: Database, password: str) -> None:
    hook = _hook(db, password)
    assert hook.create(_definition(password)).status == "created"
    assert hook.create(_definition(password), force=True).status == "updated"
    recorded = _everything_recorded(db)
    assert "***" in recorded
    for form in (password, quote(password, safe=""), sql.Literal(password).as_string(None).strip(" E'")):
        assert form not in recorded


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_that_the_server_repeats_in_an_error_is_not_recorded(
    db: Database, password: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = _hook(db, password)
    db.execute("CREATE TABLE words (word text)", "CREATE MATERIALIZED VIEW mv AS SELECT word::integer FROM words")
    with db.connect() as connection:
        connection.execute("INSERT INTO words VALUES (%s)", [f"password={password}"])
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        hook.refresh("mv")
    literal = sql.Literal(f"password={password}").as_string(None)
    with pytest.raises((psycopg.Error, MatViewError)):
        hook.create(MatViewDefinition(name="other", sql=f"SELECT {literal}::integer AS a"))
    recorded, log = _everything_recorded(db), capsys.readouterr().out
    assert "invalid input syntax for type integer" in recorded
    assert "password=***" in recorded
    for form in (password, quote(password, safe=""), sql.Literal(password).as_string(None).strip(" E'")):
        assert form not in recorded
        assert form not in log


@pytest.mark.parametrize("before", [0, 40])
@pytest.mark.parametrize("password", ["hunter2-secret", "back\\slash\\back", "it's q'u'o't'e'd", "long" * 30])
def test_half_a_password_where_the_server_cuts_the_line_off_is_not_recorded(
    db: Database, password: str, before: int
) -> None:
    """An error quotes some sixty characters of the line that it points into."""
    literal = sql.Literal(password).as_string(None)
    for statement in (f"SELECT {' ' * before}{literal}::integer AS a", f"SELECT {literal}{' ' * before}, nothing"):
        with pytest.raises(psycopg.Error, match="LINE 1: "):
            _hook(db, password).create(MatViewDefinition(name="mv", sql=statement))
    recorded = _everything_recorded(db)
    for size in range(4, len(password)):
        assert f"{password[:size]}..." not in recorded
        assert f"...{password[-size:]}" not in recorded
    assert not any(part in recorded for part in ("hunter", "slash", "q'u", "q''u", "longlong"))


@pytest.mark.parametrize("name", ["sslpassword"])
def test_a_secret_among_the_extras_is_treated_like_the_password(db: Database, name: str) -> None:
    hook = _hook(db, None, **{name: "key-to-the-key"})
    hook.create(_definition("key-to-the-key"))
    assert "key-to-the-key" not in _everything_recorded(db)
    assert "***" in _everything_recorded(db)


def test_of_two_secrets_the_one_that_holds_the_other_goes_whole(db: Database) -> None:
    hook = _hook(db, "secret", sslpassword="secret-and-more")
    hook.create(_definition("secret-and-more"))
    recorded = _everything_recorded(db)
    assert "and-more" not in recorded


def test_what_is_known_of_the_task_is_cleaned_too(db: Database) -> None:
    connection = _hook(db, "hunter2").connection
    hook = MatViewHook("views", connection=connection, context={"run_id": "x-hunter2"})
    db.execute(GATE)
    hook.create(MatViewDefinition(name="mv", sql="SELECT gate()"))
    with gate_closed(db) as let_go_on, beside(lambda: hook.refresh("mv", lock_timeout=60), let_go_on):
        until(db, AT_THE_GATE)
        MatViewHook("views", connection=connection, context=hook.context).refresh("mv", if_locked="skip")
        assert db.rows("SELECT status, meta->>'run_id' FROM matviews.mat_view_runs ORDER BY id") == [
            (2, "x-***"),
            (1, "x-***"),
            (4, "x-***"),
        ]


@pytest.mark.parametrize(
    "password", ["a", "e", "class", "message", "row_count", "status", "response", "RunLost", "running", "view", "1"]
)
def test_a_password_that_is_a_word_of_the_record_does_not_spoil_its_structure(db: Database, password: str) -> None:
    plain, hook = hook_on(db), _hook(db, password)
    db.execute("CREATE TABLE source AS SELECT 1 AS id", "CREATE MATERIALIZED VIEW mv AS SELECT 1 / id FROM source")
    for each in (plain, hook):
        each.refresh("mv", row_count_strategy="exact")
    db.execute("UPDATE source SET id = 0")
    for each in (plain, hook):
        with pytest.raises(psycopg.errors.DivisionByZero):
            each.refresh("mv")
    failed, failed_plain, run, run_plain = hook.runs("mv")
    for mine, usual in ((run, run_plain), (failed, failed_plain)):
        assert (mine.operation, mine.status) == (usual.operation, usual.status)
        assert _keys(mine.meta) == _keys(usual.meta)
        assert _keys(mine.error) == _keys(usual.error)
    assert (run.row_count_before, run.row_count_after) == (1, 1)
    # Nor what the next operation makes of an orphan.
    db.execute("UPDATE matviews.mat_view_runs SET status = 1, finished_at = NULL, error = NULL WHERE status = 3")
    hook.delete("mv", force=True)
    assert [each.error["class"] for each in hook.runs("mv") if each.status == "failed" and each.error] == [
        "RunLost",
        "RunLost",
    ]


def _keys(value: Any) -> Any:
    return {key: _keys(item) for key, item in value.items()} if isinstance(value, dict) else None


def test_a_connection_without_secrets_has_nothing_to_hide(db: Database) -> None:
    hook = _hook(db, "", sslpassword="")
    hook.create(_definition("plain"))
    assert "***" not in _everything_recorded(db)
    assert "password=plain" in _everything_recorded(db)


def test_the_error_of_a_refused_connection_holds_no_password(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    hook = _hook(db, "hunter2-secret")
    hook.connection.schema = "no_such_database"
    with pytest.raises(psycopg.OperationalError) as raised:
        hook.refresh("mv")
    assert "no_such_database" in str(raised.value)
    assert "hunter2-secret" not in repr(raised.value) + str(raised.value) + capsys.readouterr().out


def test_a_password_in_the_sql_of_a_view_is_not_in_the_statements_that_the_log_shows(db: Database) -> None:
    class Lines(logging.Handler):
        text = ""

        def emit(self, record: logging.LogRecord) -> None:
            self.text += f"{record.getMessage()}\n"

    # In a literal it is written in another way than Airflow's own masker looks for.
    hook = _hook(db, "it's quoted")
    response = hook.create(_definition("it's quoted"))
    lines = Lines()
    log = logging.Logger("task", logging.INFO)
    log.addHandler(lines)
    log_statements(log, response, hook.redact)
    assert "CREATE MATERIALIZED VIEW" in lines.text
    assert "quoted" not in lines.text
