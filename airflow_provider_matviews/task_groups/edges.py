"""Which views of a group have to be refreshed before which, told without a database.

Knows definitions and nothing of Airflow. What only the server can tell, such as what is read through a plain view, is
compared with this when a task runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, ViewName
from airflow_provider_matviews.references import fold, read_all

_log = logging.getLogger(__name__)

_PUBLIC = "public"
#: A name that can only ever stand as a word of its own in a query.
_PLAIN = re.compile(r"[a-z_][a-z0-9_$]*\Z")
_WORD = re.compile(r"[A-Za-z0-9_$\u0080-\U0010ffff]+")
#: What a name in escapes begins with: U&"d\\0061ta" is "data".
_ESCAPED = 'u&"'


@dataclass(frozen=True)
class Edges:
    """What comes before what.

    :ivar definitions: all views of the group, in the order in which they were given.
    :ivar needs: for each view those that come before it at once.
    """

    definitions: Mapping[ViewName, MatViewDefinition]
    needs: Mapping[ViewName, frozenset[ViewName]]

    @classmethod
    def of(cls, definitions: Iterable[MatViewDefinition], remembered_as: str) -> Edges:
        """Find them, by ``depends_on`` and by what the queries read.

        A name in ``depends_on`` that is not in the group makes no edge. A query that cannot be read is told in the log,
        where it mentions a view of the group that it is not declared to depend on.

        :param definitions: the views.
        :param remembered_as: see :func:`references.read_all`.
        :raises InvalidDefinition: when a view is declared twice, or views need each other in a circle.
        """
        views: dict[ViewName, MatViewDefinition] = {}
        for definition in definitions:
            if definition.view in views:
                raise InvalidDefinition(f"{definition.view} is declared twice in one group.")
            views[definition.view] = definition
        declared = {view: frozenset(_declared(definition, views)) for view, definition in views.items()}
        read = _read(views, declared, remembered_as)
        needs = {view: declared[view] | read[view] for view in views}
        try:
            TopologicalSorter(needs).prepare()
        except CycleError as error:
            raise _refusal(list(reversed(error.args[1])), declared) from None
        return cls(views, needs)

    @cached_property
    def before(self) -> Mapping[ViewName, frozenset[ViewName]]:
        """For each view all that come before it, at once or by way of others."""
        before: dict[ViewName, frozenset[ViewName]] = {}
        for view in TopologicalSorter(self.needs).static_order():
            before[view] = self.needs[view].union(*(before[need] for need in self.needs[view]))
        return before

    def find(self, view: str) -> ViewName | None:
        """Return the view of the group that a name means, or None."""
        return meant(ViewName.parse(view), None, self.definitions)


def meant(name: ViewName, schema: str | None, views: Mapping[ViewName, object]) -> ViewName | None:
    """Return which of some views a name means, or None.

    The search path, which decides about a name without a schema, is not known here. Such a name means the view that is
    declared without a schema too, or else the one in ``public``, or else the one in the schema of what reads it. A name
    in ``public`` means also the view that is declared without a schema.

    :param name: the name.
    :param schema: the schema of the view whose definition holds the name, or None.
    :param views: the views that there are.
    """
    candidates = [name]
    if name.schema is None:
        candidates += [ViewName(name.name, each) for each in (_PUBLIC, schema) if each is not None]
    elif name.schema == _PUBLIC:
        candidates.append(ViewName(name.name))
    return next((each for each in candidates if each in views), None)


def as_list(names: Iterable[str]) -> str:
    """Return names as a list that may be copied into a definition, in a file or in code."""
    return "[" + ", ".join(f"'{name}'" if '"' in name else f'"{name}"' for name in names) + "]"


def _declared(definition: MatViewDefinition, views: Mapping[ViewName, object]) -> Iterator[ViewName]:
    for text in definition.depends_on:
        need = meant(ViewName.parse(text), definition.view.schema, views)
        if need is None:
            _log.debug("%s depends on %s, which is not in its group: no edge.", definition.view, text)
        else:
            yield need


def _read(
    views: Mapping[ViewName, MatViewDefinition],
    declared: Mapping[ViewName, frozenset[ViewName]],
    remembered_as: str,
) -> dict[ViewName, frozenset[ViewName]]:
    mentions = _Mentions(views)
    mentioned = {view: mentions.in_query(definition.sql) - {view} for view, definition in views.items()}
    # A query that holds no other view's name reads none, and need not be parsed.
    asked = [view for view, others in mentioned.items() if others or _is_escaped(views[view].sql)]
    references = read_all((views[view].sql for view in asked), remembered_as)
    read: dict[ViewName, frozenset[ViewName]] = dict.fromkeys(views, frozenset())
    for view in asked:
        names = references[views[view].sql]
        if names is None:
            _warn_unread(views[view], sorted(map(str, mentioned[view] - declared[view])))
            continue
        needs = {meant(name, view.schema, views) for name in names}
        # No query reads its own view: what has that name is something else.
        read[view] = frozenset(need for need in needs if need is not None and need != view)
    return read


def _warn_unread(definition: MatViewDefinition, undeclared: Sequence[str]) -> None:
    unread = (
        f"The query of {definition.view} cannot be read without the server, so that only depends_on says what it comes "
        "after."
    )
    if undeclared:
        depends_on = as_list([*definition.depends_on, *undeclared])
        _log.warning(
            "%s It mentions %s: write depends_on = %s into its definition, without what it does not read.",
            unread,
            ", ".join(undeclared),
            depends_on,
        )
    elif _is_escaped(definition.sql) and not definition.depends_on:
        _log.warning("%s It holds names in escapes: write depends_on = [...] into its definition.", unread)


def _is_escaped(sql: str) -> bool:
    return _ESCAPED in fold(sql)


def _refusal(circle: Sequence[ViewName], declared: Mapping[ViewName, frozenset[ViewName]]) -> InvalidDefinition:
    steps = [
        f"{reader} {'depends on' if need in declared[reader] else 'reads'} {need}" for reader, need in pairwise(circle)
    ]
    return InvalidDefinition(
        f"Views need each other in a circle: {', '.join(steps)}.",
        hint="take one of them out of depends_on; where a query reads another relation of that name, "
        "write its schema into the query.",
    )


class _Mentions:
    """Which views' names stand in a text, but for those in escapes: never too few, perhaps too many."""

    def __init__(self, views: Iterable[ViewName]) -> None:
        self._by_word: dict[str, set[ViewName]] = {}
        self._by_text: dict[str, set[ViewName]] = {}
        for view in views:
            if _PLAIN.match(view.name):
                self._by_word.setdefault(view.name, set()).add(view)
            else:
                self._by_text.setdefault(fold(view.name.replace('"', '""')), set()).add(view)

    def in_query(self, sql: str) -> frozenset[ViewName]:
        text = fold(sql)
        # The server cuts longer ones off.
        words = {word[:MAX_IDENTIFIER_BYTES] for word in _WORD.findall(text)}
        found = [self._by_word[word] for word in words & self._by_word.keys()]
        found += [views for name, views in self._by_text.items() if name in text]
        return frozenset().union(*found)
