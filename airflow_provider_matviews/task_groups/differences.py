"""Where the order of a group is not what the server knows of a view, and what to declare.

Knows neither Airflow nor a database.
"""

from __future__ import annotations

from collections.abc import Iterable

from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.graph import Graph
from airflow_provider_matviews.task_groups.edges import Edges, as_list


def differences(view: ViewName, edges: Edges, graph: Graph) -> list[str]:
    """Tell, a line each, which views of its group a view reads although nothing makes it wait for them.

    What it does wait for and does not read is not told: that costs time at most.

    :param view: one of the group.
    :param edges: those of the group.
    :param graph: what the server knows.
    """
    standing = _standing(edges.definitions, graph)
    own = standing.get(view)
    if own is None:
        return []
    by_name = {name: each for each, name in standing.items()}
    # Without what a circle through plain views would ask for: that is legal, and no declaration could follow it.
    needs = {by_name[name] for name in graph.needs_in_order[own] if name in by_name}
    missing = sorted(needs - edges.before[view], key=str)
    depends_on = as_list([*edges.definitions[view].depends_on, *map(str, missing)])
    return [
        f"{view} reads {need} by ways that its query does not show, and does not wait for it: "
        f"write depends_on = {depends_on} into its definition"
        + (f", and let {need} no longer depend on {view}." if view in edges.before[need] else ".")
        for need in missing
    ]


def _standing(views: Iterable[ViewName], graph: Graph) -> dict[ViewName, str]:
    """Return the names under which the graph has the views; not those that do not stand."""
    schemas: dict[str, dict[str | None, str]] = {}
    for name, resolved in graph.views.items():
        schemas.setdefault(resolved.name, {})[resolved.schema] = name
    found: dict[ViewName, str] = {}
    for view in views:
        candidates = schemas.get(view.name, {})
        schema = view.schema
        if schema is None:
            # The search path decides; it says public where nobody changed it.
            schema = next(iter(candidates)) if len(candidates) == 1 else "public"
        if schema in candidates:
            found[view] = candidates[schema]
    return found
