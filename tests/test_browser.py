"""The page in a real browser, inside a real Airflow: what people see of it, in light and dark, wide and narrow."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote as quote_url
from urllib.parse import urlsplit

import pytest
from psycopg import sql
from psycopg.errors import DivisionByZero

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.names import quote
from benchmarks.long_history import fill, stand_up
from demo.airflow_server import AirflowServer
from demo.dag_runs import wait_for_dags
from demo.postgres_server import PostgresServer
from tests.conftest import NEWEST, Database, hook_on
from tests.conftest import _database as fresh_database
from tests.racing import beside, until

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH (Debian: chromium)"),
]
HOSTILE = [
    "<script>document.title='hit'</script>",
    "\" onmouseover=\"document.title='hit'",
    "x" * 63,
    "מבט חומרי",
    "a/b?c#d%20e",
]


@pytest.fixture(scope="module")
def databases(servers: dict[int, PostgresServer]) -> Iterator[dict[str, Database]]:
    """One that is empty, one with a view of each kind, and one with hundreds of views and a long history."""
    made = {name: fresh_database(servers, NEWEST) for name in ("empty", "some", "many")}
    found = {name: next(each) for name, each in made.items()}
    hook = hook_on(found["some"])
    found["some"].execute("CREATE TABLE t AS SELECT g AS a FROM generate_series(1, 1000) g")
    hook.create(
        MatViewDefinition(
            name="daily", sql="-- all of it\nSELECT a, a * 2 AS b FROM t WHERE a > 0", unique_index_columns=("a",)
        )
    )
    for number in range(6):
        hook.refresh("daily", refresh_strategy=("swap", "concurrent", "regular")[number % 3])
    for name in HOSTILE:
        hook.create(MatViewDefinition(name=quote(name), sql="SELECT 1 AS a", comment="mine"))
    hook.create(MatViewDefinition(name="broken", sql="SELECT 1 / (1001 - count(*)) AS a FROM t"))
    found["some"].execute("INSERT INTO t VALUES (1001)")
    with pytest.raises(DivisionByZero):
        hook.refresh("broken")
    for name in ("many", "empty"):
        hook_on(found[name]).runs()
    with found["many"].connect() as connection:
        fill(connection, runs=100_000, views=500)
        stand_up(connection)
    yield found
    for each in made.values():
        next(each, None)


@pytest.fixture(scope="module")
def address(databases: dict[str, Database], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A whole Airflow that may show them, under a path of its own."""
    connections = {
        name: {
            "conn_type": "postgres",
            "host": "127.0.0.1",
            "port": database.server.port,
            "login": "postgres",
            "schema": database.name,
        }
        for name, database in databases.items()
    }
    # Comes first, and is not there.
    connections = {"down": {**connections["some"], "port": 1}, **connections}
    dags = tmp_path_factory.mktemp("dags")
    shutil.copy(ROOT / "example_dags" / "matviews_actions.py", dags)
    settings = {"AIRFLOW__MATVIEWS__ACTIONS": "matviews_actions"}
    with AirflowServer(dags, connections, settings, base_path="/base/path") as airflow:
        airflow.begin_migration()
        airflow.start()
        wait_for_dags(airflow, ("matviews_actions",))
        airflow.api.set_paused("matviews_actions", False)
        yield airflow.url


class Look:
    """A browser's page, and everything that went wrong in it."""

    def __init__(self, page: object, address: str) -> None:
        self.page: playwright.Page = page
        self.address = address
        self.troubles: list[str] = []
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("console", self._note_message)
        self.page.on("request", self._note_request)

    def _note_message(self, message: playwright.ConsoleMessage) -> None:
        # What does not stand in the database, and a DAG that is gone, the page asks for and does without.
        if message.type == "error" and "404 (Not Found)" not in message.text:
            self.troubles.append(f"{message.text} {message.location.get('url')}")

    def _note_request(self, request: playwright.Request) -> None:
        if urlsplit(request.url).scheme in ("http", "https") and not request.url.startswith(self.address):
            self.troubles.append(f"asked {request.url}")

    def open(self, path: str) -> None:
        """Open a page of ours, without Airflow around it."""
        self.page.goto(f"{self.address}/matviews/{path}")
        self.page.wait_for_selector("#page:not([aria-busy]) h1")


@contextmanager
def _looking(address: str, theme: str = "light", width: int = 1280) -> Iterator[Look]:
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 800})
            page = context.new_page()
            # Everybody is an administrator there, and is so from the first page on.
            page.goto(f"{address}/auth/login/")
            page.wait_for_load_state("networkidle")
            yield Look(page, address)
        finally:
            browser.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_every_page_is_whole_in_every_light_and_width(address: str, theme: str, width: int) -> None:
    with _looking(address, theme, width) as look:
        pages = {
            "#/empty": ["Materialized views"],
            "#/some": ["Materialized views"],
            "#/many": ["Materialized views"],
            "#/some/runs": ["Runs"],
            "#/some/views/public/daily": [
                "daily",
                "Duration",
                "Rows and size",
                "What it reads, and what reads it",
                "Runs",
                "Definition",
                "In the database",
            ],
            "#/some/graph": ["Which view reads which"],
            "#/some/runs/14": ["Run 14: refresh of broken", "Error", "Steps", "What was asked", "What else was found"],
            "#/nowhere": ["Materialized views"],
        }
        for path, headings in pages.items():
            look.open(path)
            look.page.wait_for_load_state("networkidle")
            playwright.expect(look.page.locator("h1, h2")).to_have_text(headings)
            assert look.page.evaluate("document.documentElement.dataset.theme") == theme
            # Tables may scroll in themselves; the page does not.
            assert look.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        assert look.troubles == []


def test_it_stands_in_airflows_menu_and_follows_its_theme(address: str) -> None:
    with _looking(address) as look:
        look.page.goto(f"{address}/plugin/matviews")
        frame = look.page.frame_locator("iframe")
        frame.get_by_role("heading", name="Materialized views").wait_for()
        look.page.evaluate("document.documentElement.classList.add('dark')")
        frame.locator("html[data-theme=dark]").wait_for()
        frame.get_by_label("Connection").select_option("some")
        frame.get_by_role("link", name="daily", exact=True).click()
        frame.get_by_role("heading", name="daily", exact=True).wait_for()


def test_from_a_database_that_is_down_it_goes_on_to_the_others(address: str) -> None:
    with _looking(address) as look:
        for path, message, back in (
            ("", "The database could not be read", "← All views"),
            ("#/down/runs", "The database could not be read", "← All views"),
            ("#/many/graph", "more of them than a drawing could show", "← All views"),
            (f"#/some/runs/{2**63}", "Nothing of this name or number", "← All views"),
            (f"#/some/views/public/{'x' * 64}", "at most 63 characters", "← All views"),
            ("#/some%zz", "There is no such page.", "← Materialized views"),
            ("#/a/b/c/d/e", "There is no such page.", "← Materialized views"),
        ):
            look.page.goto("about:blank")
            look.open(path)
            playwright.expect(look.page.locator(".notice")).to_contain_text(message)
            look.page.get_by_role("link", name=back).wait_for()
            picker = look.page.get_by_label("Connection")
            assert picker.locator("option:enabled").all_inner_texts() == ["down", "empty", "some", "many"]
            picker.select_option("many")
            playwright.expect(look.page.locator("tbody tr")).to_have_count(500)
        assert [each for each in look.troubles if "Failed to load resource" not in each] == []


def test_a_run_that_another_program_wrote_is_shown(address: str, databases: dict[str, Database]) -> None:
    with _looking(address) as look:
        for error, meta in (('"it broke"', "[1, 2]"), ("[1]", '{"response": {"steps": [1, {}], "sql": 7}}')):
            run_id = databases["empty"].value(
                "WITH view AS (INSERT INTO matviews.mat_view_definitions (name, schema_name, view_name, sql) "
                "VALUES ('mv', 'public', 'mv', 'SELECT 1') ON CONFLICT DO NOTHING RETURNING id) "
                "INSERT INTO matviews.mat_view_runs "
                "(mat_view_definition_id, status, operation, error, meta, started_at, finished_at) "
                "SELECT coalesce((SELECT id FROM view), (SELECT id FROM matviews.mat_view_definitions)), 3, 1, "
                "%s::jsonb, %s::jsonb, now(), now() "
                "RETURNING id",
                (error, meta),
            )
            look.open(f"#/empty/runs/{run_id}")
            playwright.expect(look.page.locator("h1")).to_have_text(f"Run {run_id}: refresh of mv")
        assert look.troubles == []


def test_names_are_text_wherever_they_come_from(address: str) -> None:
    with _looking(address) as look:
        for name in HOSTILE:
            look.open("#/some")
            look.page.get_by_role("link", name=str(quote(name)), exact=True).click()
            look.page.wait_for_selector("h2:has-text('In the database')")
            assert look.page.locator("h1").inner_text() == str(quote(name))
            assert look.page.title() != "hit"
        assert look.troubles == []


def _press(look: Look, action: str) -> None:
    look.page.get_by_role("button", name=f"{action} …").click()
    dialog = look.page.get_by_role("dialog")
    playwright.expect(dialog).to_contain_text("Triggers the DAG matviews_actions, on the connection some.")
    dialog.get_by_role("button", name=action, exact=True).click()
    playwright.expect(look.page.locator(".tools .status.success")).to_be_visible(timeout=90_000)


def test_a_click_is_a_run_of_the_dag_and_comes_back_as_one_of_the_record(
    address: str, databases: dict[str, Database]
) -> None:
    hook, database = hook_on(databases["some"]), databases["some"]
    name = str(quote(HOSTILE[0]))
    with _looking(address) as look:
        look.open(f"#/some/views/public/{quote_url(HOSTILE[0], safe='')}")
        button = look.page.get_by_role("button", name="Refresh …")
        button.click()
        # Who thinks better of it, with the keyboard: nothing happens.
        look.page.keyboard.press("Escape")
        playwright.expect(look.page.get_by_role("dialog")).to_have_count(0)
        playwright.expect(button).to_be_focused()
        before = hook.runs(name)
        _press(look, "Refresh")
        (latest, *others) = hook.runs(name)
        assert others == before
        assert (latest.operation, latest.status, latest.meta["dag_id"]) == ("refresh", "success", "matviews_actions")
        playwright.expect(look.page.locator("dl.facts a").first).to_have_text("refresh, success")
        # Changed by hand, seen, and put back.
        database.execute(sql.SQL("COMMENT ON MATERIALIZED VIEW {} IS 'of another'").format(sql.Identifier(HOSTILE[0])))
        look.page.get_by_role("button", name="Compare with the database now").click()
        playwright.expect(look.page.locator(".changes li")).to_have_count(1)
        _press(look, "Apply definition")
        look.page.get_by_role("button", name="Compare with the database now").click()
        playwright.expect(look.page.get_by_text("It is what it was declared to be.")).to_be_visible()
        _press(look, "Verify")
        # From there to Airflow's own page of the run.
        look.page.get_by_role("link", name="Its run in Airflow").click()
        look.page.wait_for_url("**/dags/matviews_actions/runs/**")
        assert look.troubles == []


def test_what_runs_is_followed_to_its_end(address: str, databases: dict[str, Database]) -> None:
    database = databases["some"]
    with _looking(address) as look, database.connect() as changer:
        changer.execute("BEGIN")
        changer.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        with beside(lambda: hook_on(database).refresh("daily", refresh_strategy="regular"), changer.close):
            until(database, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
            look.open("#/some")
            row = look.page.locator("tr", has=look.page.get_by_role("link", name="daily", exact=True))
            playwright.expect(row.locator(".status")).to_have_text("running")
            row.get_by_role("link").focus()
            playwright.expect(row.locator(".said")).to_contain_text("waiting for a lock behind")
            # The row has been drawn anew under whoever stands on it.
            playwright.expect(row.get_by_role("link")).to_be_focused()
            row.get_by_role("link").click()
            playwright.expect(look.page.locator("[role=status]").first).to_contain_text("waiting for a lock behind")
            changer.close()
            # Without a hand: the page notices.
            playwright.expect(look.page.locator(".status").first).to_have_text("fresh", timeout=20_000)
        assert look.troubles == []


def test_hundreds_of_views_are_searched_sorted_and_filtered_by_keyboard(address: str) -> None:
    with _looking(address) as look:
        look.open("#/many")
        rows = look.page.locator("tbody tr")
        assert rows.count() == 500
        look.page.get_by_label("Search views by name").focus()
        look.page.keyboard.type("mv49")
        assert rows.count() == 11
        assert look.page.get_by_role("status").inner_text() == "11 of 500 views"
        look.page.get_by_role("button", name="View", exact=True).focus()
        look.page.keyboard.press("Enter")
        assert rows.first.locator("a").inner_text() == "analytics.mv49"
        look.page.keyboard.press("Enter")
        assert rows.first.locator("a").inner_text() == "analytics.mv499"
        look.page.get_by_label("Only views of this state").select_option("running")
        assert rows.count() == 0
        look.page.goto(f"{address}/matviews/#/many/views/analytics/mv7")
        look.page.wait_for_selector("canvas")
        runs = look.page.locator("section:has(h2:text-is('Runs')) tbody tr")
        runs.first.wait_for()
        assert runs.count() == 20
        look.page.get_by_role("button", name="Older runs").click()
        playwright.expect(runs).to_have_count(40)
        look.page.get_by_label("Only runs of this status").select_option("failed")
        playwright.expect(runs.locator(".status.success")).to_have_count(0)
        assert runs.count() > 0
        assert look.troubles == []


def test_what_is_looked_at_is_kept_for_people(address: str, tmp_path: Path) -> None:
    with _looking(address) as look:
        look.open("#/some/views/public/daily")
        look.page.wait_for_selector("canvas")
        picture = look.page.locator("canvas").first.screenshot(path=tmp_path / "chart.png")
        assert len(picture) > 2000, "something is drawn"
