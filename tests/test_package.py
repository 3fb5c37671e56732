"""The package as Airflow, a packager and a DAG file see it: described truly, whole, and quiet while it is imported."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.resources
import json
import os
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from airflow.providers_manager import ProvidersManager

import airflow_provider_matviews
from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.get_provider_info import get_provider_info
from airflow_provider_matviews.operators import matview as operators

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(airflow_provider_matviews.__file__).parent
NAME = "airflow-provider-matviews"
#: Where SQL is written; nowhere else.
SERVICES = PACKAGE / "services"

MODULES = sorted(PACKAGE.rglob("*.py"))
OPERATORS = [getattr(operators, name) for name in operators.__all__]


def _python(code: str, *arguments: str, **environment: str) -> str:
    """Run code in a new interpreter; return what it prints."""
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def _module_ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _dotted_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _dotted_paths(item)
    elif isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)+", value) and not value[0].isdigit():
        yield value


def _imported(path: str) -> object:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, attribute = path.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def test_provider_info_is_what_airflow_expects() -> None:
    schema = json.loads(importlib.resources.files("airflow").joinpath("provider_info.schema.json").read_text())
    info = get_provider_info()
    jsonschema.validate(info, schema)
    # Airflow's schema lets unknown keys pass, and Airflow then ignores them.
    assert set(info) <= set(schema["properties"]) | {"package-name", "versions"}
    assert info["versions"] == [importlib.metadata.version(NAME)]


def test_every_dotted_path_in_provider_info_can_be_imported() -> None:
    paths = list(_dotted_paths(get_provider_info()))
    assert {f"airflow_provider_matviews.{room}.matview" for room in ("hooks", "operators", "triggers")} <= set(paths)
    for path in paths:
        assert _imported(path)


def test_every_integration_that_is_used_is_declared() -> None:
    info = get_provider_info()
    declared = {integration["integration-name"] for integration in info["integrations"]}
    assert {part["integration-name"] for part in (*info["hooks"], *info["operators"], *info["triggers"])} == declared


def test_the_distribution_is_named_as_the_provider() -> None:
    assert get_provider_info()["package-name"] == importlib.metadata.metadata(NAME)["Name"] == NAME


def test_airflow_lists_the_provider() -> None:
    provider = ProvidersManager().providers[NAME]
    assert provider.version == airflow_provider_matviews.__version__
    assert provider.data["name"] == "Materialized Views"


_IMPORTS = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for each in pkgutil.walk_packages(getattr(module, "__path__", ()), name + "."):
        importlib.import_module(each.name)
print(sorted(name for name in sys.modules if name.partition(".")[0] == "airflow"))
print(*sorted(name for name in sys.modules if name.startswith("airflow_provider_matviews")))
"""


def test_what_airflow_imports_while_it_loads_does_not_import_airflow() -> None:
    code = _IMPORTS.replace('getattr(module, "__path__", ())', "()")
    airflow, ours = _python(code, "airflow_provider_matviews", "airflow_provider_matviews.get_provider_info").split(
        "\n"
    )[:2]
    assert airflow == "[]"
    assert ours.split() == ["airflow_provider_matviews", "airflow_provider_matviews.get_provider_info"]


def test_services_and_definitions_know_nothing_of_airflow() -> None:
    names = [f"airflow_provider_matviews.{name}" for name in ("services", "definition", "names", "exceptions")]
    airflow, ours = _python(_IMPORTS, *names).split("\n")[:2]
    assert airflow == "[]"
    files = {*SERVICES.rglob("*.py"), *(PACKAGE / f"{name}.py" for name in ("definition", "names", "exceptions"))}
    wanted = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    assert wanted <= set(ours.split())


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = tmp_path.iterdir()
    info = f"airflow_provider_matviews-{airflow_provider_matviews.__version__}.dist-info"
    with zipfile.ZipFile(path) as wheel:
        files = set(wheel.namelist())
        metadata = wheel.read(f"{info}/METADATA").decode()
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
        assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    package = {
        str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert "airflow_provider_matviews/py.typed" in package
    described = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert files == package | described
    assert re.search(rf"^Name: {NAME}$", metadata, re.MULTILINE)
    assert re.search(r"^License-Expression: Apache-2.0$", metadata, re.MULTILINE)
    assert "[apache_airflow_provider]\nprovider_info = airflow_provider_matviews.get_provider_info:" in entry_points


_DAG = """
from airflow.sdk import DAG, Asset, AssetAlias
from airflow_provider_matviews.definition import MatViewDefinition, load_definitions
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.operators.matview import *
from airflow_provider_matviews.operators import matview
from airflow_provider_matviews.notifications.matview import MatViewNotifier
from airflow_provider_matviews.sensors.matview import MatViewMetricsSensor

with DAG("quiet", schedule="@daily", template_searchpath=[FOLDER]) as dag:
    declared = MatViewDefinition.from_file(FOLDER + "/declared.sql")
    matview.CreateMatViewOperator(task_id="c1", definition=declared, outlets=[AssetAlias("views")])
    matview.CreateMatViewOperator(task_id="c2", view="mv", sql="undeclared.sql")
    matview.CreateMatViewOperator.partial(task_id="c3").expand(definition=[declared.to_dict()])
    matview.RefreshMatViewOperator(task_id="r1", view="{{ params.view }}", refresh_strategy="{{ params.how }}")
    matview.RefreshMatViewOperator(task_id="r2", definition=declared, outlets=[Asset("x-views://declared")])
    matview.RefreshMatViewOperator.partial(task_id="r3").expand(view=["a", "b"])
    matview.DeleteMatViewOperator(task_id="d1", view="mv")
    matview.DeleteMatViewOperator(task_id="d2", definition=declared, cascade=True)
    matview.RefreshMatViewsOperator(task_id="all", views=["*.*"], skip_unchanged=True)
    matview.PruneMatViewRunsOperator(task_id="prune", keep_successes=100)
    matview.VerifyMatViewOperator(task_id="verify", views=["*.*"])
    MatViewMetricsSensor(task_id="check", max_age=3600, on_failure_callback=MatViewNotifier())
    MatViewHook(postgres_conn_id="postgres_default")
used = {type(task).__name__ for task in dag.tasks}
assert set(matview.__all__) <= used, used
"""

_WATCHED = f"""
import sys
FOLDER = sys.argv[1]
code = compile({_DAG!r}, FOLDER + "/dag.py", "exec")
# What Airflow itself reads when it loads is not ours.
import airflow.providers.common.compat.sdk, airflow.providers.postgres.hooks.postgres
from airflow.sdk import DAG
with DAG("warm", schedule="@daily"):
    airflow.providers.common.compat.sdk.BaseOperator(task_id="up")

seen = []
def watch(event, arguments):
    if event == "open":
        seen.append(("open", str(arguments[0])))
    elif event.partition(".")[0] in ("socket", "sqlite3", "subprocess", "urllib", "http") or event == "os.system":
        seen.append((event, repr(arguments)))
sys.addaudithook(watch)
exec(code, {{"FOLDER": FOLDER}})
result = list(seen)
import json
print(json.dumps(result))
"""


def test_a_dag_file_connects_nowhere_and_reads_only_the_declared_definition(tmp_path: Path) -> None:
    for name in ("declared", "undeclared"):
        (tmp_path / f"{name}.sql").write_text("SELECT 1 AS one")
    # A listener, because what libpq does, being C, raises no audit event.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        connection = {"conn_type": "postgres", "host": "127.0.0.1", "port": port, "extra": {"connect_timeout": 2}}
        output = _python(
            _WATCHED,
            str(tmp_path),
            AIRFLOW_CONN_POSTGRES_DEFAULT=json.dumps(connection),
            PGHOST="127.0.0.1",
            PGPORT=str(port),
        )
        with pytest.raises(BlockingIOError):
            listener.accept()
    events = json.loads(output.splitlines()[-1])
    unexpected = [
        (event, what)
        for event, what in events
        if event != "open" or not what.endswith((".py", ".pyc", ".so", "METADATA", "entry_points.txt"))
    ]
    assert unexpected == [("open", str(tmp_path / "declared.sql"))]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_template_fields_are_kept_as_they_were_given(operator: type[Any]) -> None:
    for value in ("{{ not.rendered }}", MatViewDefinition(name="mv", sql="SELECT 1 AS one"), {"name": "mv"}, object()):
        for field in operator.template_fields:
            assert getattr(operator(task_id="task", **{field: value}), field) is value


def _public(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield what a reader of the documentation looks up: public classes, functions and methods."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from _public(child, f"{child.name}.")


@pytest.mark.parametrize("path", MODULES, ids=_module_ids)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    bare = [name for name, node in _public(tree) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    # An empty `__init__.py` has nothing to say.
    assert ast.get_docstring(tree) or not tree.body
    assert bare == []


_STATEMENT = re.compile(
    r"\s*(SELECT|WITH|TABLE|VALUES|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|REFRESH|GRANT|REVOKE|COMMENT|SET|BEGIN|"
    r"COMMIT|ROLLBACK|SAVEPOINT|LOCK|ANALYZE|REINDEX|NOTIFY|LISTEN)\b[\s(*]+\S"
)


@pytest.mark.parametrize("path", [path for path in MODULES if SERVICES not in path.parents], ids=_module_ids)
def test_no_sql_is_written_outside_the_services(path: Path) -> None:
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    # A part of how a definition says a privilege, not of a statement.
    strings = [text for text in strings if text != " WITH GRANT OPTION"]
    assert [text for text in strings if text not in docstrings and _STATEMENT.match(text)] == []
    imports = [
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import) for alias in node.names
    ]
    assert "sql" not in imports
    assert "psycopg.sql" not in imports
