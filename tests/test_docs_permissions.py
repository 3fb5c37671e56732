"""The rights that docs/permissions.md lists are enough for each operation, and each of them is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import psycopg
import pytest

from airflow_provider_matviews.definition import Index, MatViewDefinition
from airflow_provider_matviews.exceptions import DependentsExist, DriftFound, MissingPrivilege, StrategyRefused
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.services.response import ServiceResponse
from tests.conftest import Database, hook_on
from tests.doc_blocks import ROOT

_QUERY = "SELECT day, sum(amount) AS revenue FROM app.payments GROUP BY 1"
_DAILY = MatViewDefinition(name="analytics.daily", sql=_QUERY, unique_index_columns=["day"])
_INDEXED = MatViewDefinition(
    name="analytics.daily", sql=_QUERY, unique_index_columns=["day"], indexes=[Index(columns=["revenue"])], comment="d"
)
_CHANGED = MatViewDefinition(name="analytics.daily", sql=_QUERY.replace(" AS", " + 1 AS"), unique_index_columns=["day"])


def _reading(hook: MatViewHook) -> None:
    hook.describe("analytics.daily")
    hook.metrics()


#: What the table names -> the operation; whether it is on a view that stands; and whether one stands on that.
_OPERATIONS: dict[str, Callable[[MatViewHook], Any]] = {
    "create": lambda hook: hook.create(_DAILY),
    "apply a changed query": lambda hook: hook.create(_CHANGED),
    "apply an index or a comment": lambda hook: hook.create(_INDEXED),
    "plan": lambda hook: hook.plan(_CHANGED),
    "refresh, regular": lambda hook: hook.refresh("analytics.daily", refresh_strategy="regular"),
    "refresh, concurrent": lambda hook: hook.refresh("analytics.daily", refresh_strategy="concurrent"),
    "refresh, swap": lambda hook: hook.refresh("analytics.daily", refresh_strategy="swap"),
    "refresh a view of another role": lambda hook: hook.refresh("analytics.daily", refresh_strategy="regular"),
    "refresh, exact row counts": lambda hook: hook.refresh(
        "analytics.daily", refresh_strategy="regular", row_count_strategy="exact"
    ),
    "refresh, nothing changed": lambda hook: hook.refresh("analytics.daily", skip_unchanged=True),
    "drop": lambda hook: hook.delete("analytics.daily"),
    "verify": lambda hook: hook.verify("analytics.daily"),
    "check": lambda hook: hook.check(),
    "read the record": _reading,
    "prune": lambda hook: hook.prune(keep_successes=1),
    "reap": lambda hook: hook.reap(),
    "adopt": lambda hook: (hook.adopt("analytics"), hook.graph()),
    "judge": lambda hook: hook.judge(),
    "install the change log": lambda hook: hook.install_change_log("analytics.daily"),
}
_KINDS = {"analytics.daily": "MATERIALIZED VIEW", "analytics.top": "VIEW"}


def _tables() -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield of each line what it is about, the rights with what does instead of each, and what on the record."""
    for line in (ROOT / "docs" / "permissions.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] not in ("operation", "the role"):
            name = re.sub(r"^`(.*?)`.*", r"\1", cells[0])
            rights = dict(re.findall(r"`(.*?)`(?: \(or `(.*?)`\))?", cells[1]))
            yield name, rights, cells[2] if len(cells) > 2 else ""


_ROWS = {name: (rights, record) for name, rights, record in _tables()}
_RECORD: dict[str, list[str]] = {name: [*_ROWS.pop(name)[0]] for name in ("reads", "writes", "prunes")} | {"": []}


def _give(right: str, role: str, database: Database) -> str:
    if right.startswith("OWNER OF "):
        table = right.removeprefix("OWNER OF ")
        return f"ALTER {_KINDS[table]} {table} OWNER TO {role}"
    return f"GRANT {right.replace('DATABASE shop', f'DATABASE {database.name}')} TO {role}"


def _take(right: str, role: str, database: Database) -> str:
    given = _give(right, role, database)
    if given.startswith("ALTER"):
        return _give(right, "postgres", database)
    return given.replace("GRANT", "REVOKE", 1).replace(" TO ", " FROM ")


def _as_superuser(database: Database, *statements: str) -> None:
    with database.connect() as connection:
        for statement in statements:
            connection.execute(statement.encode())


def _world(database: Database, role: str, operation: str) -> None:
    """Make everything anew, with rights for nobody."""
    _as_superuser(
        database,
        "DROP SCHEMA IF EXISTS app CASCADE; DROP SCHEMA IF EXISTS analytics CASCADE; "
        "DROP SCHEMA IF EXISTS matviews CASCADE; CREATE SCHEMA app; CREATE SCHEMA analytics",
        f"REVOKE ALL ON DATABASE {database.name} FROM {role}; REVOKE TEMP ON DATABASE {database.name} FROM public",
        "CREATE TABLE app.payments AS SELECT date '2026-01-01' + g % 31 AS day, g % 9 AS amount "
        "FROM generate_series(1, 99) g",
    )
    hook = hook_on(database)
    hook.runs()
    if operation != "create":
        hook.create(_DAILY)
        for _ in range(3 if operation == "prune" else 1):
            hook.refresh("analytics.daily", refresh_strategy="regular")
    if operation in ("apply a changed query", "refresh, swap"):
        _as_superuser(database, "CREATE VIEW analytics.top AS SELECT day FROM analytics.daily")
    if operation == "reap":
        # The process of one was lost.
        _as_superuser(database, "UPDATE matviews.mat_view_runs SET status = 1, finished_at = NULL WHERE operation = 1")


def _refused(database: Database, role: str, operation: str) -> bool:
    try:
        response = _OPERATIONS[operation](hook_on(database, role))
    except (MissingPrivilege, StrategyRefused, DependentsExist, psycopg.errors.InsufficientPrivilege):
        return True
    # What stands and cannot be compared is left alone.
    return isinstance(response, ServiceResponse) and response.response.get("drift", True) is None


def test_every_operation_that_the_page_names_is_known_here() -> None:
    assert _ROWS.keys() == _OPERATIONS.keys()


@pytest.mark.parametrize("operation", _OPERATIONS)
def test_what_the_page_says_is_enough_and_all_of_it_is_needed(operation: str, each_db: Database) -> None:
    rights, record = _ROWS[operation]
    if each_db.server.major < 17 and any("MAINTAIN" in right for right in rights):
        pytest.skip("came with PostgreSQL 17")
    role = each_db.role()
    _world(each_db, role, operation)
    _as_superuser(each_db, *(_give(right, role, each_db) for right in [*_RECORD[record], *rights]))
    for right, instead in rights.items():
        _as_superuser(each_db, _take(right, role, each_db))
        assert _refused(each_db, role, operation), f"{operation} does not need {right}"
        if instead:
            _as_superuser(each_db, _give(instead, role, each_db))
            assert not _refused(each_db, role, operation), f"{instead} does not do for {right}"
            _as_superuser(each_db, _take(instead, role, each_db))
        _as_superuser(each_db, _give(right, role, each_db))
    if record:
        usage = _RECORD[record][0]
        _as_superuser(each_db, _take(usage, role, each_db))
        assert _refused(each_db, role, operation), f"{operation} does without the record"
        _as_superuser(each_db, _give(usage, role, each_db))
    # Raises where it is not enough.
    _OPERATIONS[operation](hook_on(each_db, role))


@pytest.mark.parametrize(
    ("record", "operation"), [("reads", "read the record"), ("writes", "create"), ("prunes", "prune")]
)
def test_every_right_on_the_record_that_the_page_names_is_needed(
    record: str, operation: str, each_db: Database
) -> None:
    role = each_db.role()
    _world(each_db, role, operation)
    rights = _RECORD[record]
    _as_superuser(each_db, *(_give(right, role, each_db) for right in chain(rights, _ROWS[operation][0])))
    for right in rights:
        _as_superuser(each_db, _take(right, role, each_db))
        assert _refused(each_db, role, operation), f"who {record} does not need {right}"
        _as_superuser(each_db, _give(right, role, each_db))
    _OPERATIONS[operation](hook_on(each_db, role))


@pytest.mark.parametrize("temp", [True, False], ids=["with TEMP", "with neither"])
def test_what_a_create_makes_of_a_view_that_stands_where_its_role_may_create_nothing_there(
    temp: bool, each_db: Database
) -> None:
    role = each_db.role()
    _world(each_db, role, "apply a changed query")
    rights = {right for right in _ROWS["apply a changed query"][0] if not right.startswith("CREATE")}
    rights |= {"TEMP ON DATABASE shop"} if temp else set()
    _as_superuser(each_db, *(_give(right, role, each_db) for right in [*_RECORD["writes"], *sorted(rights)]))
    hook = hook_on(each_db, role)

    same = hook.create(_DAILY)
    assert (same.status, same.response["drift"]) == ("skipped", False if temp else None)
    if temp:
        assert hook.create(_DAILY, on_drift="fail").status == "skipped"
        assert hook.plan(_DAILY).empty
        assert not hook.plan(_CHANGED).empty
        with pytest.raises(MissingPrivilege):
            hook.create(_CHANGED)
        with pytest.raises(DriftFound):
            hook.create(_CHANGED, on_drift="fail")
        return
    changed = hook.create(_CHANGED)
    assert (changed.status, changed.response["drift"]) == ("skipped", None)
    for definition in (_DAILY, _CHANGED):
        with pytest.raises(MissingPrivilege):
            hook.create(definition, on_drift="fail")
        with pytest.raises(MissingPrivilege):
            hook.plan(definition)
