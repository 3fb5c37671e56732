"""Roles of every kind get their work done, or are told which right they lack and the GRANT that gives it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import MissingPrivilege
from airflow_provider_matviews.hooks.matview import MatViewHook
from tests.conftest import Database, hook_on

_MV = MatViewDefinition(name="mart.mv", sql="SELECT id FROM mart.t", unique_index_columns=["id"])


def _as_superuser(database: Database, statements: str, *roles: str) -> None:
    """Run statements; ``{0}``, ``{1}`` ... are the roles, ``{database}`` is the database."""
    text = statements.format(*(f'"{role}"' for role in roles), database=f'"{database.name}"')
    with database.connect() as connection:
        connection.execute(text.encode())


def _mart(database: Database, owner: str) -> None:
    """A schema with a source table, of an ordinary role."""
    _as_superuser(
        database,
        "CREATE SCHEMA mart AUTHORIZATION {0}; CREATE TABLE mart.t (id int); INSERT INTO mart.t VALUES (1), (2);"
        "ALTER TABLE mart.t OWNER TO {0}",
        owner,
    )


def _shared_ledger(database: Database, *roles: str) -> None:
    """Run tables that a superuser made, and rights on them as the README and every refusal give them."""
    hook_on(database).runs()
    for role in roles:
        _as_superuser(
            database,
            "GRANT USAGE ON SCHEMA matviews TO {0};"
            "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA matviews TO {0}",
            role,
        )


def _ways_out(error: MissingPrivilege) -> list[str]:
    """Return the alternatives that a hint offers, each as SQL to run."""
    assert error.hint is not None
    _, _, statements = error.hint.partition("run")
    text = re.sub(r"^( either)?: ", "", statements)
    text = re.sub(r"or choose another schema with tracking_schema=\.\.\.$", "", text.strip())
    return [way.strip() for way in re.split(r" or: ", text)]


def _refused(operation: Callable[[], Any]) -> MissingPrivilege:
    with pytest.raises(MissingPrivilege) as raised:
        operation()
    return raised.value


def _everything(hook: MatViewHook) -> None:
    assert hook.create(_MV).status == "created"
    assert hook.refresh("mart.mv", row_count_strategy="exact").response["strategy"] == "concurrent"
    assert hook.refresh("mart.mv", refresh_strategy="regular").status == "updated"
    assert hook.create(_MV, force=True).status == "updated"
    assert hook.describe("mart.mv").columns == (("id", "integer"),)
    assert hook.delete("mart.mv").status == "deleted"
    assert [run.status for run in hook.runs("mart.mv")] == ["success"] * 5
    assert len(hook.definitions()) == 1


def test_an_ordinary_owner_does_everything(each_db: Database) -> None:
    owner = each_db.role("LOGIN NOSUPERUSER")
    _mart(each_db, owner)
    _as_superuser(each_db, "GRANT CREATE ON DATABASE {database} TO {0}", owner)
    _everything(hook_on(each_db, owner))
    assert each_db.value("SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'matviews'") == owner


@pytest.mark.parametrize("way", [0, 1])
def test_without_the_right_to_create_schemas_either_way_out_that_is_told_works(way: int, each_db: Database) -> None:
    owner = each_db.role()
    _mart(each_db, owner)
    hook = hook_on(each_db, owner)
    for operation in (lambda: hook.create(_MV), hook.runs, hook.definitions, lambda: hook.delete("mart.mv")):
        error = _refused(operation)
    assert f'The role "{owner}" may not create the schema "matviews" for the run tables' in str(error)
    assert each_db.rows("SELECT 1 FROM pg_class WHERE relname IN ('mv', 'mat_view_runs')") == []
    ways = _ways_out(error)
    assert len(ways) == 2
    _as_superuser(each_db, ways[way])
    _everything(hook)


def test_a_ledger_of_another_role_works_once_it_is_granted(each_db: Database) -> None:
    first, second = each_db.role(), each_db.role()
    _mart(each_db, second)
    _as_superuser(each_db, "GRANT CREATE ON DATABASE {database} TO {0}", first)
    assert hook_on(each_db, first).runs() == []
    hook = hook_on(each_db, second)
    for operation in (lambda: hook.create(_MV), lambda: hook.refresh("mart.mv"), hook.runs, hook.definitions):
        error = _refused(operation)
        assert f'The role "{second}" may not use the run tables in schema "matviews"' in str(error)
    assert each_db.value("SELECT count(*) FROM matviews.mat_view_runs") == 0
    (way,) = _ways_out(error)
    with each_db.connect(first) as connection:
        connection.execute(way.encode())
    _everything(hook)


def test_rights_on_only_some_of_the_ledger_are_not_enough_and_it_is_told_so(each_db: Database) -> None:
    role = each_db.role()
    _mart(each_db, role)
    hook_on(each_db).runs()
    hook = hook_on(each_db, role)
    steps = [
        "GRANT USAGE ON SCHEMA matviews TO {0}",
        "GRANT SELECT ON matviews.mat_view_migrations TO {0}",
        "GRANT SELECT ON matviews.mat_view_definitions TO {0}",
        "GRANT INSERT, UPDATE ON matviews.mat_view_definitions TO {0}",
        "GRANT SELECT, INSERT ON matviews.mat_view_runs TO {0}",
    ]
    for step in steps:
        _as_superuser(each_db, step, role)
        assert "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA" in str(_refused(lambda: hook.create(_MV)))
    assert "may not use the run tables" in str(_refused(hook.runs))
    assert each_db.value("SELECT to_regclass('mart.mv')") is None
    _as_superuser(each_db, _ways_out(_refused(hook.runs))[0])
    _everything(hook)


def test_who_may_only_read_the_ledger_reads_it(each_db: Database) -> None:
    reader = each_db.role()
    hook_on(each_db).create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    _as_superuser(
        each_db, "GRANT USAGE ON SCHEMA matviews TO {0}; GRANT SELECT ON ALL TABLES IN SCHEMA matviews TO {0}", reader
    )
    hook = hook_on(each_db, reader)
    assert [run.view for run in hook.runs()] == ["mv"]
    assert hook.last_run("mv") is not None
    assert hook.describe("mv").owner == "postgres"
    error = _refused(lambda: hook.refresh("mv"))
    assert "may not use the run tables" in str(error)


def test_a_ledger_may_be_kept_apart_by_another_schema(db: Database) -> None:
    owner = db.role()
    _mart(db, owner)
    hook_on(db).runs()
    _as_superuser(db, 'CREATE SCHEMA "My runs" AUTHORIZATION {0}', owner)
    _everything(hook_on(db, owner, tracking_schema="My runs"))
    assert hook_on(db).runs() == []


def _maintain_or_ownership(database: Database) -> int:
    return 2 if database.server.major >= 17 else 1


@pytest.mark.parametrize("way", [0, 1])
def test_who_does_not_own_a_view_is_told_the_grant_that_lets_it_refresh(way: int, each_db: Database) -> None:
    owner, other = each_db.role(), each_db.role()
    _mart(each_db, owner)
    _shared_ledger(each_db, owner, other)
    hook_on(each_db, owner).create(_MV)
    _as_superuser(each_db, "GRANT USAGE ON SCHEMA mart TO {0}; GRANT SELECT ON mart.mv TO {0}", other)
    hook = hook_on(each_db, other)
    error = _refused(lambda: hook.refresh("mart.mv"))
    assert f'The role "{other}" may not refresh mart.mv, which belongs to "{owner}"' in str(error)
    run = hook.last_run("mart.mv")
    assert run is not None
    assert run.status == "failed"
    ways = _ways_out(error)
    assert len(ways) == _maintain_or_ownership(each_db)
    chosen = ways[min(way, len(ways) - 1)]
    assert ("MAINTAIN" in chosen) is (way == 0 and len(ways) == 2)
    _as_superuser(each_db, chosen)
    each_db.execute("INSERT INTO mart.t VALUES (3)")
    for strategy in ("concurrent", "regular"):
        response = hook.refresh("mart.mv", refresh_strategy=strategy, row_count_strategy="exact").response
        assert response["row_count_after"] == 3


def test_who_does_not_own_a_view_is_told_the_grant_that_lets_it_drop_and_replace(each_db: Database) -> None:
    owner, other = each_db.role(), each_db.role()
    _mart(each_db, owner)
    _shared_ledger(each_db, owner, other)
    hook_on(each_db, owner).create(_MV)
    _as_superuser(
        each_db,
        "GRANT USAGE, CREATE ON SCHEMA mart TO {0}; GRANT SELECT ON mart.t TO {0}; GRANT SELECT ON mart.mv TO {0}",
        other,
    )
    hook = hook_on(each_db, other)
    replacing = _refused(lambda: hook.create(_MV, force=True))
    assert f'The role "{other}" may not replace or alter mart.mv, which belongs to "{owner}"' in str(replacing)
    dropping = _refused(lambda: hook.delete("mart.mv"))
    assert f'The role "{other}" may not drop mart.mv, which belongs to "{owner}"' in str(dropping)
    assert _ways_out(dropping) == _ways_out(replacing)
    _as_superuser(each_db, _ways_out(dropping)[0])
    _as_superuser(each_db, "REVOKE SELECT ON mart.mv FROM {0}", other)
    assert hook.create(_MV, force=True).status == "updated"
    assert hook.describe("mart.mv").owner == owner
    assert hook.delete("mart.mv").status == "deleted"


def test_the_owner_of_the_schema_may_drop_what_others_made_in_it(each_db: Database) -> None:
    owner, guest = each_db.role(), each_db.role()
    _mart(each_db, owner)
    _shared_ledger(each_db, owner, guest)
    _as_superuser(each_db, "GRANT USAGE, CREATE ON SCHEMA mart TO {0}; GRANT SELECT ON mart.t TO {0}", guest)
    hook_on(each_db, guest).create(_MV)
    assert hook_on(each_db, owner).delete("mart.mv").status == "deleted"


def test_without_rights_on_the_schema_a_create_tells_the_grant(each_db: Database) -> None:
    owner = each_db.role()
    _mart(each_db, owner)
    for has in ("", "GRANT USAGE ON SCHEMA mart TO {0}", "GRANT CREATE ON SCHEMA mart TO {0}"):
        other = each_db.role()
        _shared_ledger(each_db, other)
        hook = hook_on(each_db, other)
        if has:
            _as_superuser(each_db, has, other)
        error = _refused(partial(hook.create, _MV))
        assert f'The role "{other}" may not create mart.mv' in str(error)
        _as_superuser(each_db, _ways_out(error)[0])
        # The next thing that is missing comes as PostgreSQL says it: the source is not ours to grant.
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for table t"):
            hook.create(_MV)
        _as_superuser(each_db, "GRANT SELECT ON mart.t TO {0}", other)
        assert hook.create(_MV).status == "created"
        hook.delete("mart.mv")


def test_without_usage_on_the_schema_not_even_the_views_owner_gets_there_and_it_is_told_so(each_db: Database) -> None:
    owner, other = each_db.role(), each_db.role()
    _mart(each_db, owner)
    _shared_ledger(each_db, owner, other)
    hook_on(each_db, owner).create(_MV)
    _as_superuser(each_db, "ALTER MATERIALIZED VIEW mart.mv OWNER TO {0}; GRANT SELECT ON mart.t TO {0}", other)
    hook = hook_on(each_db, other)
    for operation in (lambda: hook.refresh("mart.mv"), lambda: hook.delete("mart.mv", force=True)):
        error = _refused(operation)
        assert f'The role "{other}" may not reach mart.mv: it lacks USAGE on the schema "mart"' in str(error)
    _as_superuser(each_db, _ways_out(error)[0])
    assert hook.refresh("mart.mv").status == "updated"
    assert hook.delete("mart.mv").status == "deleted"


def test_a_refresh_needs_the_owners_right_to_read_the_source_whoever_runs_it(each_db: Database) -> None:
    owner = each_db.role()
    _mart(each_db, owner)
    hook = hook_on(each_db)
    hook.create(MatViewDefinition(name="mart.mv", sql="SELECT id FROM mart.t"))
    _as_superuser(
        each_db,
        "ALTER MATERIALIZED VIEW mart.mv OWNER TO {0}; ALTER TABLE mart.t OWNER TO postgres;"
        "REVOKE ALL ON mart.t FROM {0}",
        owner,
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for table t"):
        hook.refresh("mart.mv")
    run = hook.last_run("mart.mv")
    assert run is not None
    assert run.error is not None
    assert (run.status, run.error["sqlstate"]) == ("failed", "42501")
    with each_db.connect() as connection:
        assert connection.execute("SELECT count(*) FROM mart.mv").fetchone() == (2,)
        connection.execute(sql.SQL("GRANT SELECT ON mart.t TO {}").format(sql.Identifier(owner)))
    assert hook.refresh("mart.mv").status == "updated"


def test_a_replaced_view_gives_nobody_more_than_before_and_is_filled_with_its_owners_rights(each_db: Database) -> None:
    owner, revoked = each_db.role(), each_db.role()
    each_db.execute(
        "CREATE TABLE open_to_all AS SELECT 1 AS a",
        "CREATE TABLE closed AS SELECT 2 AS a",
        f"GRANT SELECT ON open_to_all TO {owner}",
        f"GRANT CREATE, USAGE ON SCHEMA public TO {owner}",
        f"ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO {revoked}",
        "CREATE MATERIALIZED VIEW mv AS SELECT a FROM open_to_all",
        f"REVOKE SELECT ON mv FROM {revoked}",
        f"ALTER MATERIALIZED VIEW mv OWNER TO {owner}",
    )
    hook = hook_on(each_db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT a FROM open_to_all WHERE a > 0"), force=True)
    assert each_db.value("SELECT has_table_privilege(%s, 'mv', 'SELECT')", (revoked,)) is False
    assert each_db.value("SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relname = 'mv'") == owner
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        hook.create(MatViewDefinition(name="mv", sql="SELECT a FROM closed"), force=True)
    assert each_db.rows("SELECT a FROM mv") == [(1,)]
