"""A fleet of views as a task group: one ordinary task for each, in the order in which they read each other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import attrs
from airflow.providers.common.compat.sdk import TaskGroup

from airflow_provider_matviews.checks import choice
from airflow_provider_matviews.definition import MatViewDefinition, load_definitions
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.operators.matview import CreateMatViewOperator, RefreshMatViewOperator
from airflow_provider_matviews.task_groups.differences import differences
from airflow_provider_matviews.task_groups.edges import Edges

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

#: What a group may be made of: a folder, what ``load_definitions`` returns, or definitions.
Definitions: TypeAlias = "str | Path | Mapping[str, MatViewDefinition] | Iterable[MatViewDefinition]"

#: Characters that Airflow lets a task's id have, those of its groups included.
_LONGEST_TASK_ID = 250
_GROUP_ARGUMENTS = frozenset(str(field.alias) for field in attrs.fields(TaskGroup) if field.init)
#: Arguments of the operators that are the group's to say.
_NOT_PASSED_ON = frozenset({"definition", "view", "sql", "task_group"})
#: What a name may hold to be an id as it stands: ASCII only, for `dag.test()` knows no way to send anything else. A
#: hyphen sets off what makes an id unique.
_READABLE = re.compile(r"\w+\Z", re.ASCII)
_UNREADABLE = re.compile(r"\W", re.ASCII)


class _RefreshInGroup(RefreshMatViewOperator):
    """A refresh that tells first where the order of its group is not the server's."""

    custom_operator_name: ClassVar[str] = RefreshMatViewOperator.__name__
    shallow_copy_attrs = (*RefreshMatViewOperator.shallow_copy_attrs, "edges")
    edges: Edges

    def execute(self, context: Context) -> dict[str, Any]:
        # Before it, for what is missing may be what makes it fail.
        _compare(self)
        return super().execute(context)


class _CreateInGroup(CreateMatViewOperator):
    """A create that tells afterwards where the order of its group is not the server's."""

    custom_operator_name: ClassVar[str] = CreateMatViewOperator.__name__
    shallow_copy_attrs = (*CreateMatViewOperator.shallow_copy_attrs, "edges")
    edges: Edges

    def post_execute(self, context: Any, result: Any = None) -> None:
        # After it, deferred or not: before it the server knew nothing of the view.
        _compare(self)
        super().post_execute(context, result)


class GroupOperation(StrEnum):
    """What the tasks of a group do: ``refresh`` or ``create``."""

    REFRESH = "refresh"
    CREATE = "create"


_OPERATORS: Mapping[GroupOperation, type[_RefreshInGroup | _CreateInGroup]] = {
    GroupOperation.REFRESH: _RefreshInGroup,
    GroupOperation.CREATE: _CreateInGroup,
}


class MatViewTaskGroup(TaskGroup):
    """Refresh or create many views, each in a task of its own, those that are read before those that read them.

    The order comes from ``depends_on`` and from the definitions' own SQL, without a database. When a task runs it
    compares that with what the server knows, and its log says which ``depends_on`` is missing.

    A task whose upstream was skipped runs (``trigger_rule="none_failed"``): that nothing was to be done for one view
    says nothing about those that read it.

    :param group_id: of the group.
    :param definitions: a folder of ``.sql`` files, from the DAG file's own folder where it is relative; what
        :func:`load_definitions` returns; or definitions.
    :param operation: ``refresh`` or ``create``. Views with ``managed=False`` get no task in a group that creates.
    :param task_overrides: name of a view -> arguments of its task, which go before those of all:
        ``{"analytics.daily": {"pool": "heavy", "retries": 5}}``.
    :param arguments: what a TaskGroup takes (``default_args``, ``prefix_group_id``, ``tooltip`` ...) goes to the group,
        all else to every task: ``conn_id``, ``pool``, ``refresh_strategy``, ``if_locked``, ``deferrable`` ...
    :raises InvalidDefinition: when there is no such operation, a view is declared twice, views need each other in a
        circle, or ``task_overrides`` names a view that is not there.
    :raises NotADirectoryError: when there is no such folder.
    """

    def __init__(
        self,
        group_id: str,
        definitions: Definitions,
        *,
        operation: GroupOperation | str = GroupOperation.REFRESH,
        task_overrides: Mapping[str, Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> None:
        operation = choice(GroupOperation, operation, "operation")
        of_group = {name: arguments.pop(name) for name in _GROUP_ARGUMENTS & arguments.keys()}
        super().__init__(group_id=group_id, **of_group)
        given = _definitions(definitions, Path(self.dag.folder))
        if operation is GroupOperation.CREATE:
            given = [definition for definition in given if definition.managed]
        edges = Edges.of(given, remembered_as=f"{self.dag.dag_id}.{self.group_id}")
        overrides = _by_view(task_overrides or {}, edges)
        if not self._is_said("trigger_rule"):
            arguments.setdefault("trigger_rule", "none_failed")
        room = _LONGEST_TASK_ID - len(f"{self.group_id}.")
        tasks: dict[ViewName, _RefreshInGroup | _CreateInGroup] = {}
        with self:
            for view, definition in edges.definitions.items():
                task = _OPERATORS[operation](
                    **{
                        "task_id": task_id_of(view, room),
                        "task_display_name": str(view),
                        "dag": self.dag,
                        **_checked(arguments),
                        **_checked(overrides.get(view, {})),
                        "definition": definition,
                    }
                )
                task.edges = edges
                tasks[view] = task
        for view, needs in edges.needs.items():
            tasks[view].set_upstream([tasks[need] for need in sorted(needs, key=str)])
        self._edges = edges
        self._task_ids = {view: task.task_id for view, task in tasks.items()}

    def task(self, view: str) -> RefreshMatViewOperator | CreateMatViewOperator:
        """Return the task of a view, to put others before or after it.

        :param view: its name.
        :raises InvalidDefinition: when the group has no such view.
        """
        found = self._edges.find(view)
        if found is None:
            raise InvalidDefinition(f"{view} is not in the group {self.group_id}.", hint=_there_are(self._edges))
        task = self.dag.get_task(self._task_ids[found])
        assert isinstance(task, (RefreshMatViewOperator, CreateMatViewOperator))
        return task

    def _is_said(self, argument: str) -> bool:
        # The group's hold those of the groups around it.
        return argument in self.default_args or argument in self.dag.default_args


def task_id_of(view: ViewName, room: int = _LONGEST_TASK_ID) -> str:
    """Return the id of a view's task: its name as it is typed, where that can be an id; always the same one.

    What cannot be an id as it stands is replaced by underscores, and a few digits make the id unique.

    :param room: how many characters it may have.
    """
    parts = [part for part in (view.schema, view.name) if part is not None]
    plain = ".".join(parts)
    if len(plain) <= room and all(_READABLE.match(part) for part in parts):
        return plain
    end = "-" + sha256(str(view).encode()).hexdigest()[:8]
    return ".".join(_UNREADABLE.sub("_", part) for part in parts)[: room - len(end)] + end


def _definitions(given: Definitions, folder: Path) -> list[MatViewDefinition]:
    if isinstance(given, (str, Path)):
        given = load_definitions(folder / given)
    definitions = list(given.values() if isinstance(given, Mapping) else given)
    for definition in definitions:
        if not isinstance(definition, MatViewDefinition):
            raise InvalidDefinition(
                f"definitions holds {definition!r}, which is no MatViewDefinition.",
                hint="give a folder, what load_definitions(folder) returns, or a list of MatViewDefinition(...).",
            )
    return definitions


def _by_view(overrides: Mapping[str, Mapping[str, Any]], edges: Edges) -> dict[ViewName, Mapping[str, Any]]:
    found: dict[ViewName, Mapping[str, Any]] = {}
    for name, arguments in overrides.items():
        view = edges.find(name)
        if view is None:
            raise InvalidDefinition(f"task_overrides names {name}, which is not in the group.", hint=_there_are(edges))
        found[view] = arguments
    return found


def _checked(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    if wrong := sorted(_NOT_PASSED_ON & arguments.keys()):
        raise InvalidDefinition(f"{', '.join(wrong)} of a task is what its group says: leave it out.")
    return arguments


def _there_are(edges: Edges) -> str:
    return f"there are {', '.join(map(str, edges.definitions)) or 'none'}."


def _compare(task: _RefreshInGroup | _CreateInGroup) -> None:
    """Log where the order of the group is not the server's; whatever goes wrong with that, the task goes on."""
    definition = task.definition
    if not isinstance(definition, MatViewDefinition):
        return
    hook = MatViewHook(postgres_conn_id=task.conn_id, tracking_schema=task.tracking_schema)
    try:
        found = differences(definition.view, task.edges, hook.graph())
    except Exception as error:
        task.log.info("What %s reads could not be looked up: %s", definition.view, hook.redact(str(error)))
        return
    for line in found:
        task.log.warning("%s", line)
