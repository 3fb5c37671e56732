"""``airflow matviews`` as people and scripts use it: what it prints, what it returns, what it leaves in the record."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from airflow.cli import cli_parser
from psycopg.errors import DivisionByZero

from airflow_provider_matviews.cli.definition import RULES
from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.rules import AlertRules
from tests.airflow_dags import set_connection
from tests.conftest import Database, hook_on
from tests.histories import FAILED, Past, define, live_through, steady
from tests.racing import AT_THE_GATE, GATE, gate_closed, until

Run = Callable[..., tuple[int, str, str]]
PASSWORD = "s3cret/pass word"


@pytest.fixture
def run(db: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command and return its exit code, what it wrote to stdout, and what to stderr."""
    set_connection(monkeypatch, db, password=PASSWORD)
    parser = cli_parser.get_parser()

    def run(*arguments: str) -> tuple[int, str, str]:
        code: Any = 0
        capsys.readouterr()
        try:
            args = parser.parse_args(["matviews", *arguments])
            args.func(args)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def _json(answer: tuple[int, str, str]) -> Any:
    code, out, err = answer
    assert code in (0, 3), err
    return json.loads(out)


def test_from_an_estate_that_stands_to_its_history(db: Database, run: Run, tmp_path: Path) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT g AS id, g % 3 AS kind FROM generate_series(1, 30) g",
        "CREATE MATERIALIZED VIEW a AS SELECT kind, count(*) AS n FROM t GROUP BY kind",
        "CREATE MATERIALIZED VIEW b AS SELECT sum(n) AS total FROM a",
    )
    folder = str(tmp_path / "views")
    assert {row["view"] for row in _json(run("adopt", "--to", folder, "-o", "json"))} == {"public.a", "public.b"}
    code, out, _ = run("plan", folder)
    assert (code, out.count("nothing differs")) == (0, 2)

    path = tmp_path / "views" / "a.sql"
    path.write_text(path.read_text().replace("count(*)", "count(*) + 1"))
    db.execute("DROP MATERIALIZED VIEW b")
    code, out, _ = run("plan", str(path))
    assert code == 3
    assert "change query" in out
    rehearsed = _json(run("create", folder, "--dry-run", "-o", "json"))
    assert [(row["status"], row["run"], row["dry_run"]) for row in rehearsed] == [
        ("would be updated", None, True),
        ("would be created", None, True),
    ]
    assert db.value("SELECT count(*) FROM a WHERE n = 10") == 3
    assert [row["status"] for row in _json(run("create", folder, "-o", "json"))] == ["updated", "created"]
    assert db.value("SELECT total FROM b") == 33

    db.execute("INSERT INTO t VALUES (31, 0)")
    code, out, err = run("refresh", "*.*", "--dry-run")
    assert (code, out.count("would be updated"), "dry_run" in out) == (0, 2, False)
    assert "b would be updated" in err
    assert re.search(r"Dry run, [\d.]+ s: 2 would be updated\. Nothing was changed\.", err)
    refreshed = _json(run("refresh", "*.*", "-o", "json"))
    assert [(row["view"], row["status"]) for row in refreshed] == [("a", "updated"), ("b", "updated")]
    assert db.value("SELECT total FROM b") == 34
    code, out, _ = run("graph")
    assert (code, "a" in out) == (0, True)
    assert run("graph", "--mermaid")[1].startswith("flowchart LR")
    code, out, _ = run("verify", "*.*")
    assert (code, out.count("equal")) == (0, 2)
    assert {row["view"]: row["state"] for row in _json(run("list", "-o", "json"))} == {"a": "fresh", "b": "fresh"}
    assert "CREATE" in run("show", "a")[1] or "count" in run("show", "a")[1]
    runs = _json(run("runs", "-o", "json"))
    assert [(each["view"], each["operation"], each["status"]) for each in runs] == [
        ("b", "refresh", "success"),
        ("a", "refresh", "success"),
        ("b", "create", "success"),
        ("a", "create", "success"),
    ]
    (one,) = _json(run("runs", "--run", str(runs[0]["id"]), "-o", "json"))
    assert one["meta"] == hook_on(db).runs(limit=1)[0].meta
    assert run("runs", "--run", "4711")[0] == 1


def test_what_is_wrong_is_told_on_stderr_and_by_the_exit_code(db: Database, run: Run) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS a")
    hook = hook_on(db)
    for name in ("good", "bad"):
        hook.create(MatViewDefinition(name=name, sql=f"SELECT 1 / a AS b, '{name}' AS c FROM t"))
    db.execute("UPDATE t SET a = 0")
    code, out, err = run("refresh", "bad", "-o", "json")
    assert (code, out) == (1, "")
    assert "division by zero" in err
    db.execute("UPDATE t SET a = 1; ALTER TABLE t RENAME TO u")
    code, out, err = run("refresh", "*.*", "--exclude", "bad", "-o", "json")
    assert (code, [row["view"] for row in json.loads(out)]) == (0, ["good"])
    assert "good updated" in err
    code, out, _ = run("check", "-o", "json")
    assert code == 3
    assert [breach["rule"] for breach in json.loads(out)] == ["failed"]
    for arguments in (["refresh"], ["refresh", "good", "--strategy", "odd"], ["nothing"]):
        assert run(*arguments)[0] == 2
    for arguments in (["refresh", "a b"], ["show", "none"], ["plan", "/nowhere.sql"], ["list", "--conn-id", "none"]):
        code, out, err = run(*arguments)
        assert (code, out) == (1, ""), arguments
        assert err.strip()
        assert "Traceback" not in err
        assert PASSWORD not in err


def test_what_destroys_is_asked_for_first(db: Database, run: Run) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    for _ in range(3):
        hook.refresh("mv")
    code, _, err = run("drop", "mv")
    assert code == 1
    assert "--yes" in err
    assert run("prune", "--keep-successes", "1")[0] == 1
    assert len(hook.runs()) == 4
    code, out, err = run("prune", "--keep-successes", "1", "--dry-run", "-o", "json")
    assert (code, json.loads(out)[0]["removed"]) == (0, 2)
    assert "Dry run: looking at the history of 1 view" in err
    assert "2 runs of 1 view would be deleted" in err
    assert len(hook.runs()) == 4
    assert _json(run("prune", "--keep-successes", "1", "--yes", "-o", "json"))[0]["removed"] == 2
    assert len(hook.runs()) == 2
    (rehearsed,) = _json(run("drop", "mv", "--dry-run", "-o", "json"))
    assert (rehearsed["status"], rehearsed["run"]) == ("would be dropped", None)
    db.execute("CREATE VIEW reader AS TABLE mv")
    code, _, err = run("drop", "mv", "--yes")
    assert (code, "give --cascade to drop" in err) == (1, True)
    db.execute("DROP VIEW reader")
    assert _json(run("drop", "mv", "--yes", "-o", "json"))[0]["status"] == "deleted"
    assert db.value("SELECT to_regclass('mv') IS NULL")
    assert _json(run("reap", "-o", "json")) == []


def test_what_is_shown_is_text_to_the_terminal(db: Database, run: Run) -> None:
    db.execute(
        "CREATE TABLE t AS SELECT 'x' AS a",
        "CREATE MATERIALIZED VIEW \"a[/b]\" AS SELECT 1 AS a FROM t WHERE a ~ '[a-z]+:heart:'",
        'CREATE MATERIALIZED VIEW "007" AS SELECT 1 AS a',
        'CREATE MATERIALIZED VIEW "c\x1b]0;title\x07" AS SELECT a::int FROM t WITH NO DATA',
    )
    hook = hook_on(db)
    for name in ('"a[/b]"', '"007"'):
        hook.refresh(name)
    with pytest.raises(DivisionByZero):
        hook.create(MatViewDefinition(name='"[/x]"', sql="SELECT 1 / 0 AS a"))
    db.execute(
        "UPDATE matviews.mat_view_runs SET error = jsonb_set(error, '{message}', to_jsonb('[/x] \x1b[31m'::text)) "
        "WHERE status = 3"
    )
    said = {}
    for output in ("table", "plain"):
        for command in (["list"], ["runs"], ["check"], ["show", '"a[/b]"'], ["graph"]):
            code, out, err = run(*command, "-o", output)
            assert code in (0, 3), err
            assert "\x1b" not in out + err
            said[command[0], output] = out
        assert "'[a-z]+:heart:'" in said["show", output]
        assert "a[/b]" in said["list", output]
        assert "[/x] \\x1b[31m" in said["runs", output].replace("\n", "")
    # No number to be made 7 of.
    assert '"007"' in said["list", "plain"]
    assert "\x1b" not in run("graph", "--mermaid")[1]
    code, out, err = run("refresh", '"c\x1b]0;title\x07"')
    assert (code, out) == (1, "")
    assert "\x1b" not in err
    assert "to be refreshed" not in run("refresh", '"a[/b]"')[2], "one name, and no pattern"
    code, _, err = run("refresh", "*")
    assert "\x1b" not in err
    assert "c\\x1b]0;title\\x07" in err
    assert not [line for line in err.splitlines() if line.startswith("view ")], "the table is on stdout"


def test_an_argument_out_of_range_is_typed_wrongly(run: Run) -> None:
    for arguments in (
        *(
            ["refresh", "mv", option, value]
            for option in ("--at-once", "--timeout")
            for value in ("0", "x", "-1", "nan")
        ),
        ["refresh", "mv", "--at-once", "101"],
        ["refresh", "mv", "--max-wait", "inf"],
        ["runs", "--limit", "0"],
        ["runs", "--run", "9223372036854775808"],
        ["verify", "mv", "--sample", "0"],
        ["check", "--max-age", "0"],
        *(["check", f"--max-{rule}", "1"] for rule in ("duration-ratio", "row-count-ratio", "bloat")),
        ["check", "--window", "1001"],
        ["prune", "--keep-successes", "0"],
        ["prune", "--max-age", "99999999999"],
    ):
        code, _, err = run(*arguments)
        assert code == 2, arguments
        assert f"{arguments[-1]!r} is not a" in err


def test_what_selects_nothing_has_not_been_done(db: Database, run: Run) -> None:
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    for command in (
        ["refresh", "zz*"],
        ["refresh", "m*", "--exclude", "mv"],
        ["verify", "zz*"],
        ["check", "zz*"],
        ["check", "nosuch"],
        ["list", "nosuch"],
        ["runs", "nosuch"],
    ):
        code, out, err = run(*command, "-o", "json")
        assert (code, out) == (1, ""), command
        assert command[1] in err
    assert run("list", "zz*")[:2] == (0, "No data found\n")


def test_a_folder_of_which_one_fails_tells_which_and_what_was_done(db: Database, run: Run, tmp_path: Path) -> None:
    for name, query in (("a", "SELECT 1 AS a"), ("b", f"SELECT '{PASSWORD}'::text::int AS b"), ("d", "SELECT 1 AS d")):
        (tmp_path / f"{name}.sql").write_text(query)
    (tmp_path / "c.sql").write_text('/* matview\nname = "nosuch.c"\n*/\nSELECT 1 AS c')
    code, out, err = run("create", str(tmp_path), "-o", "json")
    assert (code, [(row["view"], row["status"]) for row in json.loads(out)]) == (1, [("a", "created")])
    assert f"b ({tmp_path}/b.sql): invalid input syntax for type integer" in err
    assert PASSWORD not in err
    code, out, err = run("plan", str(tmp_path), "-o", "json")
    planned = [(plan["view"], plan["stands"]) for plan in json.loads(out)]
    assert (code, planned) == (1, [("a", True), ("b", False), ("d", False)])
    assert f'nosuch.c ({tmp_path}/c.sql): The schema "nosuch" does not exist.' in err
    assert run("plan", str(tmp_path / "c.sql"))[:2] == (1, "")


def test_a_difference_that_is_left_is_told(db: Database, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mv.sql"
    path.write_text("SELECT 1 AS a")
    assert run("create", str(path))[0] == 0
    path.write_text('/* matview\ncomment = "ours"\nunique_index_columns = ["a"]\n*/\nSELECT 1 AS a')
    code, out, _ = run("create", str(path), "--on-drift", "report", "-o", "json")
    (row,) = json.loads(out)
    assert (code, row["status"], row["reason"]) == (3, "skipped", "it differs: comment, build index")
    code, _, err = run("create", str(path), "--on-drift", "fail")
    assert (code, "apply it with --on-drift apply," in err) == (1, True)


class _Terminal(io.StringIO):
    """Somebody who presses a key at the question."""

    def __init__(self, press: Callable[[], object]) -> None:
        super().__init__()
        self.press = press

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> str:
        self.press()
        return ""


@pytest.mark.parametrize(
    ("stdin", "code", "said"),
    [
        (_Terminal(bool), 1, "[y/N] \nNothing was done.\n"),
        (_Terminal(lambda: signal.raise_signal(signal.SIGINT)), 130, "[y/N] \nInterrupted.\n"),
        (None, 1, "give --yes, or --dry-run to see first.\n"),
    ],
    ids=["Ctrl-D", "Ctrl-C", "no stdin"],
)
def test_no_answer_is_no(
    db: Database, run: Run, monkeypatch: pytest.MonkeyPatch, stdin: _Terminal | None, code: int, said: str
) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
    monkeypatch.setattr(sys, "stdin", stdin)
    answer = run("drop", "mv", "--force")
    assert (answer[0], answer[1]) == (code, "")
    assert answer[2].endswith(said)
    assert db.value("SELECT to_regclass('mv') IS NOT NULL")


def test_hints_name_what_one_would_type(db: Database, run: Run) -> None:
    db.execute(GATE, "CREATE MATERIALIZED VIEW mv AS SELECT gate() AS a WITH NO DATA")
    with gate_closed(db):
        code, _, err = run("refresh", "mv", "--timeout", "1")
    assert (code, "give it more by --timeout (" in err) == (1, True)


def test_every_alert_rule_can_be_asked_for(db: Database, run: Run) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
    live_through(db, define(db, "mv")["mv"], [*steady(), *[Past(minutes, FAILED) for minutes in (9, 6, 3)]])

    def broken(*arguments: str) -> list[str]:
        return sorted(breach["rule"] for breach in _json(run("check", "-o", "json", *arguments)))

    assert broken() == ["failed"]
    assert broken("--no-failed") == []
    db.execute("REFRESH MATERIALIZED VIEW mv WITH NO DATA")
    assert broken("--no-failed") == ["unreadable"]
    assert broken("--no-failed", "--no-unreadable") == []
    db.execute("REFRESH MATERIALIZED VIEW mv")
    assert broken("--consecutive-failures", "3", "--max-age", "1") == ["consecutive_failures", "failed", "late"]
    assert set(RULES) == {each.name for each in fields(AlertRules)} - {"failed", "unreadable"}
    values = [str(2 + place) for place in range(len(RULES))]
    options = [f"--{rule.replace('_', '-')}" for rule in RULES]
    given = cli_parser.get_parser().parse_args(["matviews", "check", *chain(*zip(options, values, strict=True))])
    assert [getattr(given, rule) for rule in RULES] == [float(value) for value in values]


@pytest.mark.parametrize(("number", "views"), [(signal.SIGINT, "mv"), (signal.SIGTERM, "mv"), (signal.SIGTERM, "m*")])
def test_ctrl_c_and_sigterm_stop_it_on_the_server_and_say_so(
    db: Database, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, views: str
) -> None:
    set_connection(monkeypatch, db)
    db.execute(GATE, "CREATE MATERIALIZED VIEW mv AS SELECT gate() AS a")
    with gate_closed(db):
        process = subprocess.Popen(
            [sys.executable, "-m", "airflow", "matviews", "refresh", views],
            env=dict(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(db, AT_THE_GATE, seconds=60)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert not db.value(AT_THE_GATE)
    assert process.returncode == 130
    assert "stopped on the server" in err
    assert out == ""
    (run,) = hook_on(db).runs()
    assert run.status == "failed"
    if views == "mv":
        assert run.error
        assert ("by Ctrl-C" in run.error["message"], "SIGTERM" in run.error["message"]) == (
            True,
            number == signal.SIGTERM,
        )
