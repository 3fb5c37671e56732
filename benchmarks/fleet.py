"""What refreshing a hundred views takes: psql, ``dbt run``, and ours. Run it: ``python -m benchmarks.fleet``.

A hundred views on five levels over ten tables, each with a unique index. In turns, round by round, on a server that
keeps its promises (fsync on), and before each turn one row in a hundred of every table has been updated:

- psql, one session, REFRESH MATERIALIZED VIEW in the order in which they depend on each other;
- ``dbt run`` of the same views as models of the kind ``materialized_view``, with 2 and with 4 threads; it is installed
  from PyPI into an environment of its own, which goes with the benchmark (or give one: ``--dbt``);
- ``hook.refresh_many()`` with ``refresh_strategy="regular"`` and, as the others, without ANALYZE, 2 and 4 at a time;
  and 2 at a time with ``"auto"`` and all that goes with it.

Then the whole fleet again with nothing changed (``skip_unchanged=True``), and with one table changed: what is refreshed
then is compared with the graph. Quoted are ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Read when Airflow loads: lines written to a terminal would be timed as well.
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "ERROR"

import psycopg

from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.services.fleet import FleetResponse
from benchmarks.connecting import hook_on
from demo.postgres_server import PostgresServer, find_installations

TABLES = 10
LEVELS = 5
WIDTH = 20
SCHEMA = "bench"
#: From 1.12 on dbt-core fetches a part of itself from elsewhere than PyPI while it is installed.
DBT = ("dbt-core==1.11.*", "dbt-postgres==1.11.*")
AIM = 50.0
PROFILE = """
fleet:
  target: bench
  outputs:
    bench: {{type: postgres, host: 127.0.0.1, port: {port}, user: postgres, pass: none, dbname: postgres,
             schema: bench, threads: 2}}
"""
PROJECT = """
name: fleet
profile: fleet
model-paths: [models]
models:
  +materialized: materialized_view
  +indexes: [{columns: [id], unique: true}]
flags:
  send_anonymous_usage_stats: false
"""


@dataclass(frozen=True)
class Model:
    """A view of the fleet: its query with ``{...}`` around the names of the views that it reads."""

    name: str
    query: str
    reads: tuple[str, ...] = ()

    def sql(self, quote: Callable[[str], str]) -> str:
        """Return its query, the names as they are to be written."""
        return self.query.format(*(quote(name) for name in self.reads))


def _name(level: int, number: int) -> str:
    return f"level_{level}_{number % WIDTH:02}"


def models() -> list[Model]:
    """Return the views, each after those that it reads: what reads one table is a fifth of them."""
    found = []
    for number in range(WIDTH):
        table, group = f"{SCHEMA}.sales_{number // 2}", "account" if number % 2 else "account % 20000"
        found.append(
            Model(
                _name(1, number),
                f"SELECT {group} AS id, count(*) AS n, sum(amount) AS total, max(day) AS last FROM {table} GROUP BY 1",
            )
        )
    for level in range(2, LEVELS + 1):
        for number in range(WIDTH):
            beside = {2: number ^ 1, 3: number + 2, 4: number, 5: number + 4}[level]
            one, other = _name(level - 1, number), _name(level - 1, beside)
            if one == other:
                query = "SELECT id, n, round(total / greatest(n, 1), 2) AS total, last FROM {0} WHERE n > 0"
                found.append(Model(_name(level, number), query, (one,)))
            else:
                query = (
                    "SELECT a.id, a.n + coalesce(b.n, 0) AS n, a.total + coalesce(b.total, 0) AS total, "
                    "greatest(a.last, b.last) AS last FROM {0} a LEFT JOIN {1} b ON b.id = a.id"
                )
                found.append(Model(_name(level, number), query, (one, other)))
    return found


def prepare(connection: psycopg.Connection, rows: int) -> None:
    """Make the tables and the views."""
    connection.execute(f"CREATE SCHEMA {SCHEMA}")
    connection.execute("SELECT setseed(0.5)")
    for number in range(TABLES):
        connection.execute(
            f"CREATE TABLE {SCHEMA}.sales_{number} AS SELECT g AS id, (random() * 60000)::integer AS account, "
            f"g % 365 AS day, (random() * 1000)::numeric(10, 2) AS amount FROM generate_series(1, {rows}) g"
        )
        connection.execute(f"CREATE INDEX ON {SCHEMA}.sales_{number} (id)")
        connection.execute(f"VACUUM ANALYZE {SCHEMA}.sales_{number}")
    for model in models():
        view = f"{SCHEMA}.{model.name}"
        connection.execute(
            f"CREATE MATERIALIZED VIEW {view} AS {model.sql(lambda name: f'{SCHEMA}.{name}')}"  # type: ignore[arg-type]
        )
        connection.execute(f"CREATE UNIQUE INDEX ON {view} (id)")
        connection.execute(f"ANALYZE {view}")


@dataclass
class Dbt:
    """dbt with a project of the fleet's views.

    :param program: dbt's own.
    :param folder: where the project is written.
    """

    program: Path
    folder: Path

    @classmethod
    def install(cls, folder: Path, port: int, given: Path | None) -> Dbt | None:
        """Install it, unless one is given, and write the project; None, with a message, where that is not possible."""
        program = given
        if program is None:
            environment = folder / "environment"
            uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
            commands = (
                [
                    [uv, "venv", "--python", sys.executable, str(environment)],
                    [uv, "pip", "install", "--python", str(environment / "bin" / "python"), *DBT],
                ]
                if uv
                else [
                    [sys.executable, "-m", "venv", str(environment)],
                    [str(environment / "bin" / "python"), "-m", "pip", "install", *DBT],
                ]
            )
            for command in commands:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"dbt is left out, for it could not be installed: {done.stderr.strip()[-500:]}")
                    return None
            program = environment / "bin" / "dbt"
        dbt = cls(program, folder)
        (folder / "models").mkdir()
        (folder / "profiles.yml").write_text(PROFILE.format(port=port))
        (folder / "dbt_project.yml").write_text(PROJECT)
        for model in models():
            text = model.sql(lambda name: f"{{{{ ref('{name}') }}}}")
            (folder / "models" / f"{model.name}.sql").write_text(text + "\n")
        return dbt

    @property
    def version(self) -> str:
        """Which one it is."""
        done = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False)
        return next((line.strip() for line in done.stdout.splitlines() if "installed" in line), "?")

    def run(self, threads: int) -> float:
        """Refresh all views; return the seconds that it took by its own clock, without its start.

        :raises RuntimeError: when it did not refresh every one of them.
        """
        done = subprocess.run(
            [self.program, "--quiet", "run", "--threads", str(threads), "--project-dir", ".", "--profiles-dir", "."],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"dbt run failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        results = json.loads((self.folder / "target" / "run_results.json").read_text())
        refreshed = sum(each["status"] == "success" for each in results["results"])
        if refreshed != LEVELS * WIDTH:
            raise RuntimeError(f"dbt refreshed {refreshed} views: {done.stdout[-2000:]}")
        return float(results["elapsed_time"])


@dataclass
class Bench:
    """The server, the ways, and what each has taken."""

    server: PostgresServer
    hook: MatViewHook
    dbt: Dbt | None
    folder: Path
    walls: dict[str, list[float]] = field(default_factory=dict)

    def psql(self) -> None:
        """Refresh all views, one by one in one session."""
        script = self.folder / "refresh.sql"
        script.write_text("".join(f"REFRESH MATERIALIZED VIEW {SCHEMA}.{model.name};\n" for model in models()))
        subprocess.run(
            [self.server.bin_dir / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", self.server.dsn(), "-f", script],
            check=True,
        )

    def ours(self, at_once: int, *, skip_unchanged: bool = False) -> FleetResponse:
        """Refresh all views by the hook, as psql does it."""
        return self.hook.refresh_many(
            [f"{SCHEMA}.*"],
            at_once=at_once,
            refresh_strategy="regular",
            analyze=False,
            skip_unchanged=skip_unchanged,
        )

    def timed(self, way: str, action: Callable[[], object]) -> None:
        """Time one turn of a way; where it returns seconds of its own, those are kept beside."""
        begun = time.perf_counter()
        own = action()
        self.keep(way, time.perf_counter() - begun)
        if isinstance(own, float):
            self.keep(f"{way}, without its start", own)

    def keep(self, way: str, seconds: float) -> None:
        """Keep what a turn took."""
        self.walls.setdefault(way, []).append(seconds)
        print(f"  {way:36} {seconds:8.3f} s", flush=True)

    def change(self, tables: int = TABLES) -> None:
        """Update one row in a hundred of so many tables, in a session that has ended, and so is counted."""
        with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
            for number in range(tables):
                connection.execute(
                    f"UPDATE {SCHEMA}.sales_{number} SET amount = amount + 1 WHERE id % 100 = "  # type: ignore[arg-type]
                    f"(random() * 99)::integer"
                )
                connection.execute(f"VACUUM {SCHEMA}.sales_{number}")  # type: ignore[arg-type]
            connection.execute("CHECKPOINT")

    def ways(self) -> dict[str, Callable[[], object]]:
        """Return what refreshes all of them."""
        ways: dict[str, Callable[[], object]] = {"psql, one by one": self.psql}
        if (dbt := self.dbt) is not None:
            ways |= {f"dbt run, {threads} threads": lambda threads=threads: dbt.run(threads) for threads in (2, 4)}
        ways |= {f"ours, regular, {number} at once": lambda n=number: self.ours(n) for number in (2, 4)}
        ways["ours, auto, 2 at once"] = lambda: self.hook.refresh_many([f"{SCHEMA}.*"], at_once=2)
        return ways

    def round(self, number: int) -> None:
        """Have each way take its turn, another one first each time; then what is spared."""
        print(f"round {number + 1}:")
        ways = list(self.ways().items())
        for way, action in ways[number % len(ways) :] + ways[: number % len(ways)]:
            self.change()
            self.timed(way, action)
        self.ours(2)
        for _ in range(3):
            self.timed("ours, nothing changed", self._nothing_changed)
        self.change(1)
        self.timed("ours, one table changed", self._one_changed)

    def _nothing_changed(self) -> None:
        response = self.ours(2, skip_unchanged=True)
        if response.count("skipped") != LEVELS * WIDTH:
            raise RuntimeError("\n".join(response.table()))

    def _one_changed(self) -> None:
        response = self.ours(2, skip_unchanged=True)
        graph = self.hook.graph()
        readers = {view for view, sources in graph.sources.items() if f"{SCHEMA}.sales_0" in sources}
        expected = readers | graph.fed_by(readers)
        refreshed = {outcome.view for outcome in response.outcomes if outcome.status == "updated"}
        if refreshed != expected or response.count("skipped") != LEVELS * WIDTH - len(expected):
            raise RuntimeError(f"refreshed {sorted(refreshed)}, and what reads the table is {sorted(expected)}")
        self.refreshed = len(refreshed)

    def tell(self) -> None:
        """Print medians and ratios."""
        medians = {way: statistics.median(each) for way, each in self.walls.items()}
        print("\nMedians:")
        psql = medians["psql, one by one"]
        for way, median in medians.items():
            low, high = min(self.walls[way]), max(self.walls[way])
            print(f"  {way:36} {median:8.3f} s  (from {low:.3f} to {high:.3f}); psql takes {psql / median:.2f} times")
        for threads in (2, 4):
            ours = medians[f"ours, regular, {threads} at once"]
            for way in (f"dbt run, {threads} threads", f"dbt run, {threads} threads, without its start"):
                if way in medians:
                    print(f"  {way}: {medians[way] / ours:.2f} times ours, regular, {threads} at once")
        nothing = medians["ours, nothing changed"]
        best = min(median for way, median in medians.items() if "regular" in way or "auto" in way)
        print(
            f"  nothing changed: 1/{best / nothing:.0f} of our fastest refresh of all (aim: 1/{AIM:.0f} or less), "
            f"1/{psql / nothing:.0f} of psql's"
        )
        print(
            f"  one table changed: {self.refreshed} of {LEVELS * WIDTH} views refreshed, exactly those that read it, "
            f"in 1/{best / medians['ours, one table changed']:.1f} of our fastest refresh of all"
        )

    refreshed = 0


def main() -> None:
    """Start a server, make the fleet, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of each of the ten tables (default 1000000)")
    parser.add_argument("--dbt", type=Path, help="a dbt program with dbt-postgres, instead of installing one")
    arguments = parser.parse_args()
    installations = find_installations()
    with (
        tempfile.TemporaryDirectory(prefix="fleet-") as folder,
        PostgresServer(
            bin_dir=installations[max(installations)], durable=True, settings={"max_wal_size": "4GB"}
        ) as server,
    ):
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            prepare(connection, arguments.rows)
            ((size,),) = connection.execute("SELECT pg_size_pretty(pg_database_size(current_database()))").fetchall()
        hook = hook_on(server)
        hook.runs()
        dbt = Dbt.install(Path(folder), server.port, arguments.dbt)
        print(
            f"PostgreSQL {server.major}, durable, loopback, {os.cpu_count()} cores, {platform.machine()}, "
            f"Python {platform.python_version()}, dbt {dbt.version if dbt else '-'}; "
            f"{LEVELS * WIDTH} views on {len(hook.graph().levels)} levels over {TABLES} tables of {arguments.rows:,} "
            f"rows, {size} in all"
        )
        bench = Bench(server, hook, dbt, Path(folder))
        for number in range(arguments.rounds):
            bench.round(number)
        bench.tell()


if __name__ == "__main__":
    main()
