"""The code blocks of the documentation, and how each kind of them is executed."""

from __future__ import annotations

import configparser
import io
import json
import logging
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from airflow.cli import cli_parser
from airflow.sdk import DAG
from packaging.requirements import Requirement

from airflow_provider_matviews import adopt
from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.get_provider_info import get_provider_info
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.web.settings import shown_connections
from tests.airflow_dags import DagRun, make_metadata_database, run_dag
from tests.conftest import Database

ROOT = Path(__file__).resolve().parent.parent
#: A fenced block: indentation, fence, language, code.
FENCE = re.compile(r"^( *)(```+|~~~+)[ ]*([^\n`]*)\n(.*?)^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!--\s*([a-z ]+?):\s*((?:(?!-->).)*?)\s*-->\s*\Z", re.DOTALL)
#: What a comment above a block may say of it.
MARKS = ("output of", "ends", "exit code", "save as", "not executed", "tested in")
#: Blocks that are output.
OUTPUT = ("text", "json")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    :ivar line: of its first line of code, from 1.
    :ivar marks: what the comments above it say.
    """

    page: str
    line: int
    language: str
    text: str
    marks: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, markdown: str) -> list[Block]:
    """Return the blocks of a page, in order.

    :raises ValueError: when a comment above one says something that is not known.
    """
    blocks = []
    for match in FENCE.finditer(markdown):
        before, marks = markdown[: match.start()], {}
        while mark := _MARK.search(before):
            if mark[1] not in MARKS:
                raise ValueError(f"{page}: there is no mark {mark[1]!r}; there are {', '.join(MARKS)}")
            marks[mark[1]] = " ".join(mark[2].split())
            before = before[: mark.start()]
        line = markdown[: match.start(4)].count("\n") + 1
        blocks.append(Block(page, line, match[3].strip(), textwrap.dedent(match[4]), marks))
    return blocks


def normalised(text: str) -> str:
    """Return text without what differs from one run to the next: times, sizes, ids."""
    for pattern, name in (
        (r"\x1b\[[0-9;]*m", ""),
        (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?([+-]\d\d(:?\d\d)?|Z)?( UTC| CET)?", "<time>"),
        (r"_mv_[0-9a-f]{8}", "_mv_<hash>"),
        (r"127\.0\.0\.1:\d+/(?:test_\d+|shop)|db\.example\.com:5432/shop", "<database>"),
        (r"(\b[Rr]uns?|\bid IN|mat_view_run_id\":?) \(?\d+", r"\1 <id>"),
        (r"-?\b\d+(\.\d+)? ?(ms|s|min|[kMG]?B|bytes)\b", r"<number> \2"),
        (r"\b\d+\.\d+\b", "<number>"),
        (r"https?://\S+", "<address>"),
        (r"\s+", " "),
    ):
        text = re.sub(pattern, name, text)
    return text.strip()


def check_output(shown: str, said: str) -> None:
    """Assert that lines that are shown were said, in this order; ``...`` stands for whatever was said there."""
    left = normalised(said)
    for line in shown.splitlines():
        for part in filter(None, (each.strip() for each in normalised(line).split("..."))):
            before, found, left = left.partition(part)
            assert found, f"not said (any more): {part!r}\nWhat was said after the lines before it:\n{before[:5000]}"


@dataclass
class Page:
    """Where the blocks of one page are executed, one after the other, as a reader would."""

    name: str
    db: Database
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    shows: Mapping[str, Callable[[Page], str]]
    #: What is left when the page has been read.
    within: ExitStack
    names: dict[str, Any] = field(default_factory=dict)
    #: What somebody who triggers a DAG says: by its id, name -> value.
    params: dict[str, dict[str, str]] = field(default_factory=dict)
    #: What the last block that is code has printed and logged.
    said: str = ""
    executed: int = 0

    @property
    def hook(self) -> MatViewHook:
        """On the connection that the page's blocks name."""
        return MatViewHook(postgres_conn_id="warehouse")

    def execute(self, block: Block) -> None:
        """Execute a block by its language.

        :raises AssertionError: when it does not do what it should.
        """
        how = _LANGUAGES.get(block.language)
        assert how is not None, f"{block}: nothing executes {block.language!r}; there are {', '.join(_LANGUAGES)}"
        how(self, block)
        self.executed += 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note what is printed and logged meanwhile."""
        out = io.StringIO()
        handler = logging.StreamHandler(out)
        loggers = [logging.getLogger(name) for name in ("", "airflow.task", "airflow_provider_matviews")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        try:
            with redirect_stdout(out), redirect_stderr(out):
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)
            self.said = out.getvalue()

    def run(self, dag: DAG, **ends: str) -> DagRun:
        """Run a DAG, every task of which has to succeed, but for those that are said to end otherwise.

        :param ends: the states of these.
        """
        run = run_dag(dag, self.params.get(dag.dag_id))
        wrong = {task: state for task, state in run.states.items() if state != ends.get(task, "success")}
        assert wrong == {}, f"{dag.dag_id}: {wrong}\n{run.log[-6000:]}"
        return run


def _python(page: Page, block: Block) -> None:
    dags: list[DAG] = []
    enter = DAG.__enter__

    def noting(dag: DAG) -> DAG:
        dags.append(dag)
        return enter(dag)

    # At the lines that it has on its page, so that an error says where; DAGs think that they were read from there.
    path = page.folder / "dags" / f"{Path(block.page).stem}_{block.line}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n" * (block.line - 1) + block.text)
    code = compile(path.read_text(), str(path), "exec")
    with page.monkeypatch.context() as patch:
        patch.setattr(DAG, "__enter__", noting)
        with page.listening(), DAG(path.stem, schedule=None) as around:
            around.fileloc = str(path)
            before = {id(value) for value in page.names.values()}
            exec(code, page.names)
    for value in list(page.names.values()):
        # Whether the server would have it.
        if isinstance(value, MatViewDefinition) and id(value) not in before:
            page.hook.plan(value)
    dags = [dag for dag in [*dags[1:], around] if dag.tasks]
    ends = dict(each.strip().split("=") for each in block.marks.get("ends", "").split(",") if each)
    unknown = ends.keys() - {task for dag in dags for task in dag.task_ids}
    assert unknown == set(), f"{block}: there are no tasks {unknown}"
    page.said += "".join(page.run(dag, **ends).log for dag in dags)


def _sql(page: Page, block: Block) -> None:
    if block.text.lstrip().startswith("/* matview"):
        path = page.folder / "dags" / block.marks.get("save as", f"views/{block.line}.sql")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        definition = MatViewDefinition.from_file(path)
        if "save as" not in block.marks:
            page.hook.create(definition)
        return
    told = []
    with page.db.connect() as connection:
        cursor = connection.execute(block.text.encode())
        while True:
            if cursor.description:
                told.append(" | ".join(column.name for column in cursor.description))
                told += [" | ".join("" if value is None else str(value) for value in row) for row in cursor.fetchall()]
            if not cursor.nextset():
                break
    page.said = "\n".join(told)


def _sh(page: Page, block: Block) -> None:
    said = ""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            with page.listening():
                code = _command(page, words)
            said += page.said
            assert code == int(block.marks.get("exit code", 0)), f"{block}: {line} ended with {code}:\n{said}"
    page.said = said


def airflow(arguments: Sequence[str]) -> int:
    """Carry out a command of Airflow's and return its exit code."""
    make_metadata_database()
    try:
        args = cli_parser.get_parser().parse_args(arguments)
        args.func(args)
    except SystemExit as end:
        if isinstance(end.code, str):
            # As the interpreter does.
            sys.stderr.write(f"{end.code}\n")
            return 1
        return end.code or 0
    return 0


def _command(page: Page, words: list[str]) -> int:
    match words:
        case ["airflow", "connections", "add", *arguments]:
            # The server is another one than the page's, and nothing else about it.
            here = {"--conn-host": "127.0.0.1", "--conn-port": str(page.db.server.port)}
            told = [here.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]
            assert here.items() <= set(pairwise(told))
            return airflow(["connections", "add", *told])
        case ["airflow", *arguments]:
            return airflow(arguments)
        case ["python", "-m", "airflow_provider_matviews.adopt", *arguments]:
            return adopt.main(arguments)
        case ["pip", "install", requirement]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            wanted = Requirement(requirement)
            assert wanted.name == project["name"]
            assert wanted.extras <= project["optional-dependencies"].keys()
            return 0
        case ["export", assignment]:
            name, _, value = assignment.partition("=")
            page.monkeypatch.setenv(name, value)
            return 0
        case ["make", *arguments]:
            return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True).returncode
    raise AssertionError(f"nothing executes the command {words}")


def _ini(page: Page, block: Block) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(block.text)
    assert parser.sections() == ["matviews"], "only the section of this provider has a reader here"
    options = get_provider_info()["config"]["matviews"]["options"]
    for option, value in parser["matviews"].items():
        assert option in options
        page.monkeypatch.setenv(f"AIRFLOW__MATVIEWS__{option.upper()}", value)
    assert "warehouse" in shown_connections()


def _output(page: Page, block: Block) -> None:
    said = page.shows[block.marks["output of"]](page) if "output of" in block.marks else page.said
    if block.language == "json":
        _check_json(json.loads(block.text), json.loads(said))
    else:
        check_output(block.text, said)


def _check_json(shown: Any, said: Any) -> None:
    assert type(shown) is type(said), f"{shown!r} is shown, and it is {said!r}"
    if isinstance(shown, Mapping):
        assert shown.keys() == said.keys()
        for name, value in shown.items():
            if not name.endswith(("_id", "_ms", "seconds")):
                _check_json(value, said[name])
    elif isinstance(shown, Sequence) and not isinstance(shown, str):
        assert len(shown) == len(said)
        for each, other in zip(shown, said, strict=True):
            _check_json(each, other)
    else:
        assert normalised(str(shown)) == normalised(str(said))


_LANGUAGES: dict[str, Callable[[Page, Block], None]] = {
    "python": _python,
    "sql": _sql,
    "sh": _sh,
    "ini": _ini,
    "text": _output,
    "json": _output,
}
