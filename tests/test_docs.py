"""Every code block of the documentation does what its page says, and the site that is built of it stands by itself."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from airflow.sdk import DAG
from markdown import markdown
from markdown.extensions.toc import slugify
from playwright.sync_api import sync_playwright

from airflow_provider_matviews import __version__, exceptions
from airflow_provider_matviews.cli.definition import get_matviews_commands
from airflow_provider_matviews.definition import Index, MatViewDefinition
from airflow_provider_matviews.exceptions import ConcurrentRefreshRefused, FleetFailed
from airflow_provider_matviews.get_provider_info import get_provider_info
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.notifications.matview import MatViewNotifier
from airflow_provider_matviews.operators import matview
from airflow_provider_matviews.operators.matview import PruneMatViewRunsOperator, RefreshMatViewOperator
from airflow_provider_matviews.operators.pg_cron import ImportCronRunsOperator
from airflow_provider_matviews.outcome import summary
from airflow_provider_matviews.sensors.matview import MatViewMetricsSensor
from airflow_provider_matviews.services import verify
from airflow_provider_matviews.services.locking import Patience
from airflow_provider_matviews.services.verification import timings_csv
from airflow_provider_matviews.task_groups.matview import MatViewTaskGroup
from airflow_provider_matviews.triggers.changes import StaleMatViewsTrigger
from airflow_provider_matviews.web.app import create_app
from benchmarks.long_history import queries
from tests.airflow_dags import set_connection
from tests.conftest import Database, hook_on
from tests.doc_blocks import FENCE, ROOT, Page, airflow, blocks_of
from tests.histories import define, live_through, steady
from tests.test_pg_cron import _WITH_CRON, cron_server
from tests.test_verify import _damage, _write

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
#: What comments would say on pages that are also read where comments show, by how the block begins.
_MARKS = {
    ("README.md", "from datetime import timedelta"): {"ends": "verify=skipped"},
    ("docs/page.md", "from airflow_provider_matviews.dags.actions import matview_actions"): {
        "ends": "verify=skipped,apply=skipped"
    },
}
BLOCKS = {
    name: [
        replace(block, marks=_MARKS.get((name, block.text.partition("\n")[0]), block.marks))
        for block in blocks_of(name, text)
    ]
    for name, text in PAGES.items()
}
#: Whom the pages grant something.
_ROLES = ("airflow", "grafana", "reporting")
#: What the pages' readers have.
_SHOP = """
CREATE SCHEMA app;
CREATE SCHEMA analytics;
CREATE SCHEMA reports;
CREATE TABLE app.payments AS
SELECT date '2026-01-01' + g % 31 AS day, g % 7 AS account_id, (g % 100)::numeric AS amount
FROM generate_series(1, 1000) g;
"""
_SETUPS: dict[str, Callable[[Page], None]] = {}
_SHOWN: dict[str, Callable[[Page], str]] = {}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_DAILY = "SELECT day, sum(amount) AS revenue FROM app.payments GROUP BY day"


def _before(page: str) -> Callable[[Callable[[Page], None]], Callable[[Page], None]]:
    """Have a function called before the first block of a page."""

    def note(function: Callable[[Page], None]) -> Callable[[Page], None]:
        _SETUPS[page] = function
        return function

    return note


def _shows(name: str) -> Callable[[Callable[[Page], str]], Callable[[Page], str]]:
    """Have a function say what blocks marked with its name show."""

    def note(function: Callable[[Page], str]) -> Callable[[Page], str]:
        _SHOWN[name] = function
        return function

    return note


def _created(page: Page, *names: str, sql: str = _DAILY, **arguments: Any) -> None:
    for name in names:
        page.hook.create(MatViewDefinition(name=name, sql=sql, **arguments))


@_before("README.md")
def _readme(page: Page) -> None:
    (page.folder / "dags" / "views").mkdir(parents=True)
    (page.folder / "dags" / "views" / "daily.sql").write_text(f"/* matview\nname = 'analytics.daily'\n*/\n{_DAILY}")
    # The other one is never up to date before the block that refreshes all.
    _created(page, "analytics.daily", "analytics.other")
    # What is adopted goes to an empty folder.
    (page.folder / "empty").mkdir()
    page.monkeypatch.chdir(page.folder / "empty")


@_before("docs/alerting.md")
def _alerting(page: Page) -> None:
    _created(page, "reports.daily", "reports.archive")


@_shows("a breach")
def _breach(page: Page) -> str:
    page.db.execute("CREATE TABLE app.n AS SELECT 1 AS n")
    _created(page, "reports.daily", sql="SELECT 1 / n AS one FROM app.n")
    page.db.execute("UPDATE app.n SET n = 0")
    for _ in range(3):
        with pytest.raises(psycopg.errors.DivisionByZero):
            page.hook.refresh("reports.daily")
    (breach,) = page.hook.check().as_dict()["breaches"]
    return json.dumps(breach)


@_before("docs/cli.md")
def _cli(page: Page) -> None:
    _created(page, "analytics.daily_revenue")


@_before("docs/definitions.md")
@_before("docs/task_groups.md")
def _definitions(page: Page) -> None:
    (page.folder / "dags" / "views").mkdir(parents=True)
    (page.folder / "dags" / "views" / "daily_revenue.sql").write_text(
        f"/* matview\nname = 'analytics.daily_revenue'\n*/\n{_DAILY}"
    )


@_before("docs/events.md")
def _events(page: Page) -> None:
    _created(page, "analytics.daily", "analytics.weekly")


@_before("docs/fleets.md")
def _fleets(page: Page) -> None:
    _created(page, "analytics.daily")


@_shows("a fleet that fails")
def _failing_fleet(page: Page) -> str:
    page.db.execute(
        "CREATE SCHEMA mart",
        "CREATE TABLE app.n AS SELECT 1 AS n",
        "CREATE TABLE app.many AS SELECT g AS id FROM generate_series(1, 89999) g",
    )
    for name, sql in (
        ("bad", "SELECT 1 / n AS one FROM app.n"),
        ("on_bad", "SELECT one FROM mart.bad"),
        ("daily", "SELECT id FROM app.many"),
        ("weekly", _DAILY),
    ):
        _created(page, f"mart.{name}", sql=sql)
    page.hook.refresh("mart.weekly")
    page.db.execute("UPDATE app.n SET n = 0", "INSERT INTO app.many VALUES (0)")
    with page.listening(), pytest.raises(FleetFailed):
        page.hook.refresh_many(["mart.*"], skip_unchanged=True)
    return page.said


@_before("docs/getting_started.md")
def _getting_started(page: Page) -> None:
    # There is nothing but the database: role, schemas, table and connection are the page's own.
    for name in ("AIRFLOW_CONN_WAREHOUSE", "AIRFLOW_CONN_POSTGRES_DEFAULT", "_AIRFLOW_PROCESS_CONTEXT"):
        page.monkeypatch.delenv(name, raising=False)
    around = page.db
    around.execute("DROP ROLE airflow", "CREATE DATABASE shop")
    page.within.callback(around.execute, "DROP DATABASE shop WITH (FORCE)")
    page.db = replace(around, name="shop", looking=None)
    page.within.callback(airflow, ["connections", "delete", "shop"])


@_before("docs/observability.md")
def _observability(page: Page) -> None:
    _created(page, "analytics.daily")


@_shows("a notification")
def _notification(page: Page) -> str:
    with DAG("nightly", schedule=None, default_args={"on_failure_callback": MatViewNotifier()}) as dag:
        RefreshMatViewOperator(
            task_id="refresh", conn_id="warehouse", view="analytics.daily", refresh_strategy="concurrent"
        )
    for _ in range(2):
        with pytest.raises(ConcurrentRefreshRefused):
            page.hook.refresh("analytics.daily", refresh_strategy="concurrent")
    return page.run(dag, refresh="failed").log


@_before("docs/page.md")
def _page(page: Page) -> None:
    _created(page, "analytics.daily")
    set_connection(page.monkeypatch, page.db, "finance")
    for dag_id, conn_id in (("matviews_actions", "warehouse"), ("finance_actions", "finance")):
        page.params[dag_id] = {"connection_id": conn_id, "view": "analytics.daily"}


@_before("docs/pg_cron.md")
def _pg_cron(page: Page) -> None:
    if not _WITH_CRON:
        pytest.skip("no PostgreSQL with pg_cron here")
    home = page.within.enter_context(cron_server())
    home.execute("CREATE SCHEMA analytics", "CREATE SCHEMA app", "CREATE TABLE app.payments (day date, amount numeric)")
    set_connection(page.monkeypatch, home, "warehouse")


@_before("docs/plan.md")
def _plan(page: Page) -> None:
    grouped = "SELECT day, account_id, sum(amount) AS revenue FROM app.payments {}GROUP BY day, account_id"
    _created(page, "analytics.daily_revenue", sql=grouped.format(""))
    page.db.execute("CREATE INDEX by_hand ON analytics.daily_revenue (account_id)")
    page.names["definition"] = MatViewDefinition(
        name="analytics.daily_revenue",
        sql=grouped.format("WHERE amount > 0 "),
        indexes=[Index(columns=["revenue"])],
        grants={"reporting": ["SELECT"]},
    )


@_before("docs/retention.md")
def _retention(page: Page) -> None:
    _created(page, "analytics.daily")


@_shows("a prune")
def _prune(page: Page) -> str:
    page.db.execute("DROP SCHEMA matviews CASCADE")
    ids = define(page.db, "daily", "gone", "other", "own")
    for each in ids.values():
        live_through(page.db, each, steady(100))
    page.db.execute(
        'UPDATE matviews.mat_view_definitions SET declaration = \'{"retention": {"keep_successes": 60}}\' '
        "WHERE name = 'own'"
    )
    with DAG("prune", schedule=None) as dag:
        PruneMatViewRunsOperator(task_id="prune", conn_id="warehouse", keep_successes=30)
    return page.run(dag).log


@_before("docs/operators.md")
def _operators(page: Page) -> None:
    page.hook.runs()


@_before("docs/runs.md")
def _runs(page: Page) -> None:
    page.db.execute("CREATE TABLE app.n AS SELECT 1 AS n")
    _created(page, "analytics.daily", sql="SELECT 1 / n AS one FROM app.n")
    page.hook.refresh("analytics.daily")
    page.db.execute("UPDATE app.n SET n = 0")
    with pytest.raises(psycopg.errors.DivisionByZero):
        page.hook.refresh("analytics.daily")
    page.db.execute("UPDATE app.n SET n = 1")
    page.hook.refresh("analytics.daily", skip_unchanged=True)


@_shows("an edge that is missing")
def _missing_edge(page: Page) -> str:
    page.db.execute("CREATE VIEW analytics.plain AS SELECT revenue FROM analytics.daily_revenue")
    definitions = [
        page.hook.definition_of("analytics.daily_revenue"),
        MatViewDefinition(name="analytics.summary", sql="SELECT sum(revenue) AS revenue FROM analytics.plain"),
    ]
    with DAG("edges", schedule=None) as dag:
        MatViewTaskGroup("create", definitions, operation="create", conn_id="warehouse")
    return page.run(dag).log.replace("[warning  ] ", "WARNING - ")


@_before("docs/upgrading.md")
def _upgrading(page: Page) -> None:
    page.db.execute(
        "CREATE MATERIALIZED VIEW analytics.daily AS " + _DAILY,  # type: ignore[arg-type]
        "CREATE MATERIALIZED VIEW public.mv_user_activity AS SELECT account_id FROM app.payments",
    )
    with page.db.connect() as connection:
        connection.execute((ROOT / "tests" / "sql" / "rails_tables.sql").read_bytes())


@_before("docs/verification.md")
def _verification(page: Page) -> None:
    page.monkeypatch.setattr(verify, "SETTLING", 0.0)
    _write(
        page.db,
        "CREATE TABLE app.orders AS SELECT g AS order_id, 10.00 AS amount FROM generate_series(1, 400) g",
        "CREATE TABLE app.events AS SELECT date '2026-01-01' + g AS day FROM generate_series(1, 31) g",
    )
    _created(page, "analytics.orders", sql="TABLE app.orders", unique_index_columns=["order_id"])
    _created(page, "analytics.daily", sql="SELECT day, count(*) AS n FROM app.events GROUP BY day")
    _created(page, "analytics.ranking", sql="TABLE app.orders")
    # One after the other: what others did meanwhile would have to be ruled out.
    for name in ("orders", "daily", "ranking"):
        page.hook.refresh(f"analytics.{name}")


@_shows("verified views")
def _verified(page: Page) -> str:
    _damage(page.db, "analytics.orders", "UPDATE analytics.orders SET amount = 9.00 WHERE order_id = 17")
    _write(page.db, "INSERT INTO app.events VALUES ('2025-01-01')")
    with page.listening():
        page.hook.verify_many(["analytics.*"])
    return page.said


@_shows("timings")
def _timings(page: Page) -> str:
    return timings_csv([each.as_dict() for each in page.hook.compare_timings(["analytics.daily"], rounds=1)])


@pytest.fixture
def shop(db: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Database:
    with db.connect() as connection:
        connection.execute(_SHOP.encode())
        for role in _ROLES:
            connection.execute(f"CREATE ROLE {role} LOGIN".encode())
            db.roles.append(role)
    for conn_id in ("warehouse", "postgres_default"):
        set_connection(monkeypatch, db, conn_id)
    monkeypatch.chdir(tmp_path)
    return db


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks])
def test_every_block_of_a_page_does_what_the_page_says(
    name: str, shop: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    within = ExitStack()
    page = Page(name, shop, tmp_path, monkeypatch, _SHOWN, within)
    page.names |= {"hook": MatViewHook(postgres_conn_id="warehouse")}
    with within:
        if name in _SETUPS:
            _SETUPS[name](page)
        for block in BLOCKS[name]:
            if {"not executed", "tested in"} & block.marks.keys():
                continue
            try:
                page.execute(block)
            except BaseException as error:
                error.add_note(f"{block}:\n{block.text}")
                raise


def test_every_block_is_executed_but_for_these() -> None:
    blocks = [block for each in BLOCKS.values() for block in each]
    left_out = [(block.page, block.language) for block in blocks if "not executed" in block.marks]
    assert left_out == [("docs/observability.md", "promql"), ("docs/operations.md", "text")]
    # These are, over a history of 100,000 runs.
    elsewhere = [(block.page, block.marks["tested in"]) for block in blocks if "tested in" in block.marks]
    assert elsewhere == [("docs/history.md", "tests/test_history.py")] * len(queries())
    assert [block.text for block in blocks if "tested in" in block.marks] == list(queries().values())
    shown = {block.marks["output of"] for block in blocks if "output of" in block.marks}
    assert shown == _SHOWN.keys()
    assert _SETUPS.keys() <= PAGES.keys()


def _tables(page: str) -> Iterator[list[list[str]]]:
    """Yield tables, each as its rows of cells, the head first."""
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        head, _, *rows = table.splitlines()
        yield [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *rows)]


def _columns(page: str, heading: str) -> set[str]:
    """Return what the first column of the first table below a heading names."""
    section = re.split(rf"^#+ {re.escape(heading)}\n", page, flags=re.MULTILINE)[1].split("\n## ")[0]
    return {name for row in next(_tables(section))[1:] for name in re.findall("`(.*?)`", row[0])}


def test_all_code_stands_in_fences_that_are_executed() -> None:
    for name, text in PAGES.items():
        prose = FENCE.sub("", text)
        # Neither in a quotation nor by indentation alone, where nobody would look for it.
        assert re.findall(r"^.*(?:```|~~~).*$", prose, re.MULTILINE) == [], name
        assert "<pre>" not in markdown(prose, extensions=["tables"]), name


def test_what_the_readme_links_to_is_there() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGES["README.md"]):
        path, _, anchor = link.partition("#")
        assert link.startswith("https://") or (ROOT / path).is_file(), link
        headings = re.findall(r"^#+ (.*)", PAGES.get(path, ""), re.MULTILINE)
        assert not anchor or anchor in [slugify(heading.replace("`", ""), "-") for heading in headings], link


#: Whose arguments the tables name whose first column is headed so, page by page.
_ARGUMENTS: dict[str, list[type]] = {
    "docs/definitions.md": [MatViewDefinition],
    "docs/events.md": [StaleMatViewsTrigger],
    "docs/operations.md": [RefreshMatViewOperator],
    "docs/operators.md": [matview.CreateMatViewOperator, RefreshMatViewOperator],
    "docs/pg_cron.md": [ImportCronRunsOperator],
    "docs/retention.md": [PruneMatViewRunsOperator],
    "docs/task_groups.md": [MatViewTaskGroup],
}


def _arguments(kind: type) -> dict[str, Any]:
    """Return what it takes, also by way of ``**kwargs``, with the defaults; those that it decides itself are None."""
    taken: dict[str, Any] = {}
    for each in reversed([base for base in kind.__mro__ if "__init__" in vars(base) and base is not object]):
        taken |= {name: each.default for name, each in inspect.signature(each.__init__).parameters.items()}
    return {
        name: vars(Patience)[name] if name in vars(Patience) and not default else default
        for name, default in taken.items()
    }


def test_every_argument_in_a_table_is_one_and_has_that_default() -> None:
    tables = {page: [table for table in _tables(text) if table[0][0] == "argument"] for page, text in PAGES.items()}
    assert {page: len(each) for page, each in tables.items() if each} == {
        page: len(each) for page, each in _ARGUMENTS.items()
    }
    compared = 0
    for page, kinds in _ARGUMENTS.items():
        for kind, (head, *rows) in zip(kinds, tables[page], strict=True):
            taken = _arguments(kind)
            for row in rows:
                names = re.findall("`(.*?)`", row[0])
                assert set(names) <= taken.keys(), f"{page}: {kind.__name__}"
                if head[1].startswith("default") and re.fullmatch(r'`("\w+"|False|True)`|[\d.]+', row[1]):
                    assert [taken[name] for name in names] == [ast.literal_eval(row[1].strip("`"))], f"{page}: {names}"
                    compared += 1
    assert compared >= 10
    sensor = _arguments(MatViewMetricsSensor)
    (rules,) = (table for table in _tables(PAGES["docs/alerting.md"]) if table[0][0] == "rule")
    said = dict(pair for row in rules[1:] for pair in re.findall(r"`(\w+)=(\S+)`", " ".join(row[1:])))
    # A refresh's.
    said.pop("row_count_strategy")
    assert said
    assert said == {name: repr(sensor[name]) for name in said}


def test_the_limits_that_the_pages_say_in_passing_are_the_defaults() -> None:
    said = [
        (name, float(value))
        for text in PAGES.values()
        for name, value in re.findall(r"`(lock_timeout|max_wait)` \(([\d.]+) s\)", text)
    ]
    assert {name for name, _ in said} == {"lock_timeout", "max_wait"}
    assert all(vars(Patience)[name] == value for name, value in said), said


def test_the_guides_name_the_keys_of_xcom_and_the_commands_and_paths_that_there_are(db: Database) -> None:
    hook = hook_on(db)
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS one")
    told = [summary(response) for response in (hook.create(definition), hook.create(definition), hook.refresh("mv"))]
    assert _columns(PAGES["docs/operators.md"], "How to, by operator") == {key for each in told for key in each}

    (group,) = get_matviews_commands()
    commands = {each.name for each in group.subcommands}
    assert {name.split()[0] for name in _columns(PAGES["docs/cli.md"], "The command line")} == commands
    typed = re.findall(r"airflow matviews (\w+)", " ".join(PAGES.values()))
    assert set(typed) <= commands
    assert set(re.findall(r"`(\w+)`", re.search(r"a terminal: (.*?) \|", PAGES["README.md"])[1])) == commands  # type: ignore[index]

    paths = {path.removeprefix("/api/v1/") for path in create_app().openapi()["paths"]}
    assert _columns(PAGES["docs/page.md"], "The API behind it") == paths
    options = get_provider_info()["config"]["matviews"]["options"]
    assert set(re.findall(r"AIRFLOW__MATVIEWS__(\w+)", " ".join(PAGES.values()))) == {name.upper() for name in options}


def test_the_page_about_runs_names_every_column(db: Database) -> None:
    hook_on(db).runs()
    for table in ("mat_view_run_history", "mat_view_definitions"):
        there = db.rows(
            "SELECT column_name FROM information_schema.columns WHERE table_schema = 'matviews' AND table_name = %s",
            (table,),
        )
        assert _columns(PAGES["docs/runs.md"], table) == {name for (name,) in there}


def test_the_guides_name_every_operator_and_only_errors_that_there_are() -> None:
    guide, reference = PAGES["docs/operators.md"], PAGES["docs/reference/operators.md"]
    for name in [*matview.__all__, "ImportCronRunsOperator", "MatViewTaskGroup"]:
        assert f"`{name}`" in guide, name
        assert re.search(rf"^::: .*\.{name}$", reference, re.MULTILINE), name
    arguments = {each.name for each in fields(MatViewDefinition)}
    assert _columns(PAGES["docs/definitions.md"], "What can be said") == arguments
    told = _columns(PAGES["docs/operations.md"], "Failure modes")
    errors = {name for name in told if re.fullmatch("[A-Z][A-Za-z]+", name)}
    ours = {name for name, each in vars(exceptions).items() if isinstance(each, type)} - {"MatViewError"}
    assert errors <= ours | set(dir(psycopg.errors)) | {"OperationalError"}
    # One of them is not an operation's.
    assert ours & {
        name for name in ours if issubclass(getattr(exceptions, name), exceptions.MatViewError)
    } - errors == {
        "VerificationFailed",
        "WouldBeLost",
    }


def test_runs_of_the_rails_gem_are_carried_over_once_and_are_runs_like_any_others(shop: Database) -> None:
    statements = [block.text for block in BLOCKS["docs/upgrading.md"] if block.text.startswith("INSERT")]
    assert len(statements) == 2
    hook = hook_on(shop)
    hook.runs()
    with shop.connect() as connection:
        connection.execute("SET timezone = 'Asia/Tokyo'")
        connection.execute((ROOT / "tests" / "sql" / "rails_tables.sql").read_bytes())
        for _ in range(2):
            for statement in statements:
                connection.execute(statement.encode())
    runs = hook.runs(limit=100)
    assert len(runs) == 45
    assert [run.id for run in runs] == sorted((run.id for run in runs), reverse=True)
    newest, (created, failed, bare, lost, dropped) = runs[0], runs[40:]
    assert newest.started_at == datetime(2026, 1, 31, 11, tzinfo=UTC)
    assert (newest.status, newest.row_count_before, newest.row_count_after) == ("success", 10, 12)
    assert newest.meta["strategy"] == "concurrent"
    assert newest.meta["response"]["sql"] == ["REFRESH"]
    assert [(run.operation, run.status, run.error and run.error["class"]) for run in runs[40:]] == [
        ("create", "success", None),
        ("refresh", "failed", "PG::UniqueViolation"),
        ("refresh", "failed", "Unknown"),
        ("refresh", "failed", "RunLost"),
        ("drop", "success", None),
    ]
    assert created.row_count_after is None
    assert failed.error
    assert failed.error["backtrace"] == ["a", "b"]
    assert (bare.meta["mat_views_run_id"], lost.finished_at, dropped.view) == (43, lost.created_at, "mv_gone")
    assert [hook.definitions()[0].name, hook.definitions()[1].refresh_strategy] == ["mv_gone", "concurrent"]
    # Whoever reads the record reads them.
    shop.execute("CREATE MATERIALIZED VIEW mv_user_activity AS SELECT DISTINCT account_id FROM app.payments")
    assert hook.metrics(["mv_user_activity"])[0].row_count == 12
    hook.check(consecutive_failures=3, max_row_count_ratio=100)
    assert hook.prune(keep_successes=30).removed == 10
    assert hook.refresh("mv_user_activity").status == "updated"


#: What is carried over of tests/sql/rails_odd_rows.sql: id there -> rows before and after, strategy; or the error.
_ODD_RUNS: dict[int, tuple[Any, ...]] = {
    **dict.fromkeys((*range(2000, 2006), 2009, 2010, 2017, 2018, 2019), (None, None, None)),
    2006: (12, None, None),
    2007: (None, 8, "swap"),
    2008: (None, None, "by hand"),
    2011: ("Unknown", "boom", []),
    2012: ("Unknown", "boom", []),
    **dict.fromkeys((2013, 2014, 2015), ("Unknown", "No error was kept", [])),
    2016: ("RunLost", "It said running when it was carried over", []),
}


def test_odd_rows_of_the_rails_gem_are_carried_over_once_or_not_at_all(
    shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements = [block.text for block in BLOCKS["docs/upgrading.md"] if block.text.startswith("INSERT")]
    hook = hook_on(shop)
    hook.runs()
    with shop.connect() as connection:
        for name in ("rails_tables.sql", "rails_odd_rows.sql"):
            connection.execute((ROOT / "tests" / "sql" / name).read_bytes())
        carried = [[connection.execute(each.encode()).rowcount for each in statements] for _ in range(2)]
    assert carried == [[7, 45 + len(_ODD_RUNS)], [0, 0]]
    runs = {run.meta["mat_views_run_id"]: run for run in hook.runs(limit=100)}
    odd = {key: run for key, run in runs.items() if key >= 1000}
    assert {
        key: tuple(run.error[name] for name in ("class", "message", "backtrace"))
        if run.error
        else (run.row_count_before, run.row_count_after, run.meta["strategy"])
        for key, run in odd.items()
    } == _ODD_RUNS
    assert all(isinstance(run.meta["response"], dict) and run.finished_at for run in odd.values())
    tasks = shop.rows("SELECT DISTINCT dag_id, map_index, try_number FROM matviews.mat_view_run_history")
    assert tasks == [(None, None, None)]
    assert odd[2018].view == '"Odd ""name"", with.dot"'
    assert {each.view_name: each.unique_index_columns for each in hook.definitions()} == {
        "mv_user_activity": ("account_id",),
        "mv_gone": (),
        "mv_null_columns": (),
        "mv_text_columns": ("one",),
        "mv_mixed_columns": ("one",),
        "mv_object_columns": (),
        'Odd "name", with.dot': (),
    }
    strategies = {each.view_name: each.refresh_strategy for each in hook.definitions()}
    assert [strategies[f"mv_{name}_columns"] for name in ("null", "text", "mixed", "object")] == [
        "concurrent",
        *["auto"] * 3,
    ]
    # Whoever reads the record reads them.
    set_connection(monkeypatch, shop, "warehouse")
    for words in (
        "prune --dry-run --keep-successes 1 -o json",
        "runs --limit 100 -o json",
        "list",
        "check --no-failed",
    ):
        assert airflow(["matviews", *words.split(), "--conn-id", "warehouse"]) in (0, 3), words
    hook.metrics()
    assert hook.prune(keep_successes=1).removed == 39 + 10


def _references(html: str) -> Iterator[str]:
    """Return what a browser fetches for a page by itself."""
    yield from re.findall(r"<(?:script|img|iframe|source|audio|video|embed)\b[^>]*?\bsrc=[\"']?([^\"'\s>]+)", html)
    for link in re.findall(r"<link\b[^>]*>", html):
        if not re.search(r"rel=[\"']?(canonical|next|prev)\b", link):
            yield from re.findall(r"\bhref=[\"']?([^\"'\s>]+)", link)
    yield from re.findall(r"url\(\s*[\"']?([^\"')]+)", html)
    yield from re.findall(r"@import\s+[\"']([^\"']+)", html)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the site is, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_is_built_without_a_warning_and_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert {str(page.relative_to(site)) for page in pages} >= {
        name.removeprefix("docs/").replace(".md", ".html") for name in PAGES if name != "README.md"
    }
    assert "RefreshMatViewOperator" in (site / "reference" / "operators.html").read_text()
    assert "The first version." in (site / "changelog.html").read_text()
    assert f"airflow-provider-matviews {__version__}" in (site / "index.html").read_text()
    for file in [*pages, *site.rglob("*.css"), *site.rglob("*.svg")]:
        fetched = list(_references(file.read_text()))
        assert fetched or file.suffix != ".html"
        assert [each for each in fetched if re.match("(https?:)?//", each)] == [], file
    # Of its scripts the theme's would fetch one library for diagrams, of which there are none.
    assert not any('class="mermaid"' in page.read_text() for page in pages)


@pytest.mark.e2e
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH (Debian: chromium)")
def test_the_site_works_from_files_and_asks_nobody(site: Path) -> None:
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{site}/index.html")
        page.get_by_role("link", name="Getting started").first.click()
        page.wait_for_url("**/getting_started.html")
        page.locator("[data-md-component=search-query]").click()
        page.keyboard.type("failover")
        page.locator(".md-search-result__item", has_text="Standbys and failover").first.wait_for()
        browser.close()
    assert errors == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
