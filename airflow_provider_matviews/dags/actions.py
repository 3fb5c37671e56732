"""The DAG behind the buttons of the page: what somebody asks for there, done by ordinary tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from airflow.providers.common.compat.sdk import DAG, Param, XComArg, task

from airflow_provider_matviews.definition import RefreshStrategy
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.operators.matview import CreateMatViewOperator, RefreshMatViewOperator
from airflow_provider_matviews.operators.verify import VerifyMatViewOperator
from airflow_provider_matviews.web.settings import ACTIONS, action_dag, shown_connections

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

_AS_DECLARED = "as declared"


class _RefreshAsAsked(RefreshMatViewOperator):
    """A refresh by the strategy that was picked from a list, in which "as declared" stands, too."""

    custom_operator_name: ClassVar[str] = RefreshMatViewOperator.__name__

    def execute(self, context: Context) -> dict[str, Any]:
        if self.refresh_strategy == _AS_DECLARED:
            self.refresh_strategy = None
        return super().execute(context)


def matview_actions(dag_id: str = "matviews_actions", **arguments: Any) -> DAG:
    """Return the DAG that the page triggers, which anybody may trigger who has the right to.

    It acts on views behind those connections only whose DAG it is, by ``[matviews] connections`` and
    ``[matviews] actions`` of the workers' configuration: that, and who may trigger it, is all that stands between a
    click and a refresh. What it does goes on record as any other run, with the run of this DAG.

    Three actions: ``refresh``; ``verify``, exactly; and ``apply``, which makes the view what it was last declared to
    be. For a DAG file of its own::

        from airflow_provider_matviews.dags.actions import matview_actions

        dag = matview_actions()

    :param dag_id: which ``[matviews] actions`` names. One for each connection keeps the rights to them apart.
    :param arguments: those of ``DAG``: ``default_args`` for retries, a pool, ``execution_timeout``; ``access_control``.
    """
    with DAG(
        dag_id,
        schedule=None,
        catchup=False,
        params={
            "action": Param(ACTIONS[0], enum=list(ACTIONS), description="What is to be done."),
            "connection_id": Param(
                type="string", minLength=1, title="Connection", description="One that this DAG may act on."
            ),
            "view": Param(type="string", minLength=1, description="Its name as one would type it in SQL."),
            "refresh_strategy": Param(
                _AS_DECLARED,
                enum=[_AS_DECLARED, *(each.value for each in RefreshStrategy)],
                title="Strategy",
                description="Of a refresh.",
            ),
        },
        **{"tags": ["matviews"], "doc_md": _DOC, **arguments},
    ) as dag:
        chosen = cast("Any", task.branch(task_id="choose")(_choose)()).operator

        def told(name: str) -> Any:
            return XComArg(chosen, key=name)

        place = {"conn_id": told("conn_id"), "tracking_schema": told("tracking_schema")}
        _RefreshAsAsked(
            task_id="refresh",
            view=told("view"),
            refresh_strategy=told("refresh_strategy"),
            # Whoever clicks twice wants one refresh.
            if_locked="skip",
            **place,
        )
        VerifyMatViewOperator(task_id="verify", view=told("view"), **place)
        CreateMatViewOperator(task_id="apply", definition=told("definition"), **place)
    return dag


_DOC = """What the page **Browse > Materialized views** asks for: one run for each click.

Trigger it by hand with the same parameters, if you like.
"""


def _choose(params: Any = None, ti: Any = None, dag: Any = None) -> str:
    """Say which task is to run, and tell it on what.

    :raises InvalidDefinition: when this DAG may not act on the connection, or what is asked for cannot be.
    """
    action = params["action"]
    if action not in ACTIONS:
        raise InvalidDefinition(f"action={action!r} is none of {', '.join(ACTIONS)}.")
    connection_id = params["connection_id"]
    schema = shown_connections().get(connection_id)
    if schema is None or action_dag(connection_id) != dag.dag_id:
        raise InvalidDefinition(
            f"The DAG {dag.dag_id} may not act on the connection {connection_id!r}.",
            hint=f"for who administers this Airflow: name it in the section [matviews] of the workers' configuration, "
            f"connections = {connection_id} and actions = {connection_id}={dag.dag_id}",
        )
    told: dict[str, Any] = {
        "conn_id": connection_id,
        "tracking_schema": schema,
        "view": str(ViewName.parse(params["view"])),
        "refresh_strategy": params["refresh_strategy"],
    }
    if action == "apply":
        hook = MatViewHook(postgres_conn_id=connection_id, tracking_schema=schema)
        told["definition"] = hook.declared_definition(told["view"]).to_dict()
    for name, value in told.items():
        ti.xcom_push(key=name, value=value)
    return str(action)
