"""The whole demo: a real Airflow with its scheduler over a real PostgreSQL, and nothing left when it ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 300.0
VIEWS = {f"analytics.{path.stem}" for path in (ROOT / "example_dags" / "views").glob("*.sql")}


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for whatever the demo leaves in temporary ones; short, and open to the server's user."""
    folder = Path(tempfile.mkdtemp(prefix="e2e-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def _processes_of(folder: Path) -> dict[int, str]:
    """Find what runs in a folder, or was told of it: servers overwrite their command line or their environment."""
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            command = (entry / "cmdline").read_bytes()
            traces = [os.fsencode((entry / "cwd").readlink()), command, (entry / "environ").read_bytes()]
        except OSError:  # It has ended, or belongs to somebody else.
            continue
        if state != "Z" and any(os.fsencode(folder) in trace for trace in traces):
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    return found


@contextmanager
def _demo(temporary: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start the demo as a terminal would, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-B", "-m", "demo", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    guard = threading.Timer(TIMEOUT_SECONDS, process.kill)
    guard.start()
    try:
        with process:
            yield process
            process.kill()
    finally:
        guard.cancel()


def _assert_nothing_is_left(temporary: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := (_processes_of(temporary), list(temporary.iterdir()))) != ({}, []):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_the_demo_runs_every_dag_once_and_leaves_nothing(temporary: Path) -> None:
    with _demo(temporary, "--once") as demo:
        output, _ = demo.communicate()
    assert demo.returncode == 0, output
    rows = [
        re.split(r"  +", line.strip()) for line in output.splitlines() if re.match(r" *\d+  \d\d:\d\d:\d\d  ", line)
    ]
    runs = Counter((row[2], row[3]) for row in rows)
    assert set(runs) == {(operation, view) for operation in ("create", "refresh", "drop") for view in VIEWS}
    # The refreshes follow a schedule: a minute may have passed and brought more of them.
    assert {count for (operation, _), count in runs.items() if operation == "drop"} == {1}
    # Made, then what was changed by hand put back, and then nothing differs.
    creations = {view: [row for row in rows if row[2:4] == ["create", view]] for view in VIEWS}
    assert {view: sum("success" in row for row in each) for view, each in creations.items()} == {
        view: 2 if view in ("analytics.account_retention", "analytics.daily_events") else 1 for view in VIEWS
    }
    # One of them once more, as a click on the page asks for it.
    assert {view: len(each) for view, each in creations.items()} == {
        view: 4 if view == "analytics.daily_events" else 3 for view in VIEWS
    }
    assert not any({"failed", "running"} & set(row) for row in rows), output
    assert f"{len(rows)} runs recorded" in output
    _assert_nothing_is_left(temporary, seconds=0)


def _interrupt(demo: subprocess.Popen[str]) -> None:
    os.killpg(demo.pid, signal.SIGINT)


def _kill(demo: subprocess.Popen[str]) -> None:
    demo.kill()


@pytest.mark.parametrize(("end", "status", "seconds"), [(_interrupt, 0, 0), (_kill, -signal.SIGKILL, 30)])
def test_a_demo_that_is_ended_takes_everything_with_it(
    temporary: Path, end: Callable[[subprocess.Popen[str]], None], status: int, seconds: float
) -> None:
    with _demo(temporary) as demo:
        assert demo.stdout is not None
        printed = ""
        for line in demo.stdout:
            printed += line
            if address := re.match(r"Airflow: +(http://127\.0\.0\.1:\d+)", line):
                break
        assert address, printed
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address[1]) as page:
            assert page.status == 200
        commands = list(_processes_of(temporary).values())
        # What is to be gone is there, and is seen.
        for part in ("bin/postgres", "checkpointer", "api-server", "scheduler", "dag-processor", "triggerer"):
            assert any(part in command for command in commands), (part, commands)
        end(demo)
        printed += demo.stdout.read()
        assert demo.wait(TIMEOUT_SECONDS) == status, printed
    if status == 0:
        assert "everything has been removed" in printed
    _assert_nothing_is_left(temporary, seconds)
