from airflow_provider_matviews.definition import MatViewDefinition
from tests.conftest import Database, hook_on


def test_smoke(each_db: Database) -> None:
    hook = hook_on(each_db)
    assert hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a")).status == "created"
