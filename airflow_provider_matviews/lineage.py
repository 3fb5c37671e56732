"""OpenLineage: what the catalogs say that an operation read and wrote, as datasets and facets.

Which relations and columns a view reads is PostgreSQL's own word (``services/lineage.py``); which column comes of which
is worked out of its query and checked against that (``services/column_lineage.py``).

Nothing here is imported, read or paid for where the OpenLineage provider is not installed or not configured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.lineage import Relation, ViewLineage, pack, unpack
from airflow_provider_matviews.services.response import ServiceResponse

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage

    from airflow_provider_matviews.hooks.matview import MatViewHook

#: What happened to the view itself, by operation and status.
_CHANGES = {
    ("create", "created"): "CREATE",
    ("create", "updated"): "ALTER",
    ("refresh", "updated"): "OVERWRITE",
    ("drop", "deleted"): "DROP",
}
#: Characters of statements that go into one event; a fleet's may be long, and receivers have limits.
_MOST_SQL = 100_000
#: Seconds after which columns are no longer followed, for the rest of a fleet: OpenLineage gives up an event that takes
#: longer than ``[openlineage] execution_timeout``, which is 10 s.
_LONGEST_FOLLOWING = 3.0


def enabled() -> bool:
    """Whether there is somebody to tell: the OpenLineage provider is installed, and configured to send."""
    try:
        from airflow.providers.openlineage.conf import is_disabled
    except ImportError:
        return False
    return not is_disabled()


def told_by(hook: MatViewHook) -> dict[str, Any] | None:
    """Return what :func:`facets` needs of the operations that a hook has ended, as plain data; None for nothing.

    For the task's process, which may be another one than that in which the operation ran. Raises nothing: what became
    of the operations is what the task has to tell.
    """
    try:
        return _told_by(hook)
    except Exception as error:
        hook.log.warning("OpenLineage will not be told of this: %s: %s", type(error).__name__, hook.redact(str(error)))
        return None


def _told_by(hook: MatViewHook) -> dict[str, Any] | None:
    ended = [each for each in hook.ended if each.status != "skipped"]
    if not ended:
        return None
    packed = pack(each.lineage for each in ended if each.lineage is not None)
    for relation in packed["relations"]:
        if relation["query"] is not None:
            relation["query"] = hook.redact(relation["query"])
    places = iter(range(len(ended)))
    operations = []
    for each in ended:
        facts = each.response.response if isinstance(each.response, ServiceResponse) else {}
        operations.append(
            {
                "view": each.view,
                "operation": each.operation,
                "status": each.status,
                "rows": facts.get("row_count_after"),
                "size": facts.get("size_bytes"),
                "sql": [hook.redact(text) for text in facts.get("sql", ())],
                "lineage": None if each.lineage is None else next(places),
            }
        )
    namespace, database = hook.dataset_place
    return {"namespace": namespace, "database": database, "operations": operations, "lineage": packed}


def facets(told: Mapping[str, Any] | None) -> OperatorLineage[Any, Any]:
    """Return what OpenLineage asks an operator for.

    :param told: by :func:`told_by`; None where nothing was done.
    """
    from airflow.providers.common.compat.openlineage.facet import (
        Dataset,
        LifecycleStateChange,
        LifecycleStateChangeDatasetFacet,
        OutputDataset,
        OutputStatisticsOutputDatasetFacet,
        SchemaDatasetFacet,
        SchemaDatasetFacetFields,
        SQLJobFacet,
    )
    from airflow.providers.openlineage.extractors import OperatorLineage

    if told is None:
        return OperatorLineage()
    begun = time.monotonic()
    lineages = unpack(told["lineage"])
    namespace = told["namespace"]

    def schema_of(relation: Relation) -> dict[str, Any]:
        fields = [SchemaDatasetFacetFields(name=name, type=type_) for name, type_ in relation.columns]
        return {"schema": SchemaDatasetFacet(fields=fields)}

    inputs: dict[str, Any] = {}
    outputs = []
    for operation in told["operations"]:
        known = None if operation["lineage"] is None else lineages[operation["lineage"]]
        database = told["database"] or (known.database if known else "")
        described: dict[str, Any] = {}
        statistics: dict[str, Any] = {}
        if known is not None:
            described |= schema_of(known.view)
            if operation["operation"] != "drop":
                for relation in known.inputs:
                    name = _dataset(database, relation.schema, relation.name)
                    inputs[name] = Dataset(namespace=namespace, name=name, facets=schema_of(relation))
                if time.monotonic() - begun < _LONGEST_FOLLOWING:
                    described |= _column_facet(known, namespace, database)
        change = _CHANGES.get((operation["operation"], operation["status"]))
        if change is not None:
            described["lifecycleStateChange"] = LifecycleStateChangeDatasetFacet(
                lifecycleStateChange=LifecycleStateChange[change]
            )
        size = operation["size"] if operation["size"] is not None or known is None else known.size_bytes
        if change not in (None, "DROP") and (operation["rows"] is not None or size is not None):
            statistics["outputStatistics"] = OutputStatisticsOutputDatasetFacet(rowCount=operation["rows"], size=size)
        parsed = ViewName.parse(operation["view"])
        outputs.append(
            OutputDataset(
                namespace=namespace,
                name=_dataset(database, parsed.schema or "public", parsed.name),
                facets=described,
                outputFacets=statistics,
            )
        )
    job: dict[str, Any] = {}
    statements = ";\n".join(text for operation in told["operations"] for text in operation["sql"])
    if statements and len(statements) <= _MOST_SQL:
        job["sql"] = SQLJobFacet(query=statements)
    return OperatorLineage(inputs=list(inputs.values()), outputs=outputs, job_facets=job)


def _dataset(database: str, schema: str, name: str) -> str:
    # https://openlineage.io/docs/spec/naming/
    return f"{database}.{schema}.{name}"


def _column_facet(lineage: ViewLineage, namespace: str, database: str) -> dict[str, Any]:
    from airflow.providers.common.compat.openlineage.facet import ColumnLineageDatasetFacet, Fields, InputField

    from airflow_provider_matviews.services.column_lineage import columns_of

    columns = columns_of(lineage)
    if columns is None:
        return {}

    def field(relation: Relation, column: str) -> Any:
        return InputField(namespace=namespace, name=_dataset(database, relation.schema, relation.name), field=column)

    told = {
        name: Fields(inputFields=[field(*each) for each in sources])
        for name, sources in columns.made_of.items()
        if sources
    }
    elsewhere = [field(*each) for each in columns.elsewhere]
    return {"columnLineage": ColumnLineageDatasetFacet(fields=told, dataset=elsewhere)}
