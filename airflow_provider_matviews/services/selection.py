"""Which views are meant, by names, patterns and schemas."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache

from airflow_provider_matviews.checks import as_tuple, check_flag
from airflow_provider_matviews.exceptions import InvalidDefinition, ViewNotFound
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.graph import Graph

_WILD = frozenset("*?[")


@dataclass(frozen=True)
class Selection:
    """Which views.

    :param views: names as one would type them, or patterns with ``*``, ``?`` and ``[...]`` over ``schema.name``; a
        pattern without a dot is over the names of schema ``public``.
    :param schemas: exact names of schemas, all views of which are meant.
    :param exclude: names and patterns of views that are not meant after all.
    :param feeds: whether everything that reads them is meant too, near and far.
    :param needs: whether everything that they read is meant too, near and far.
    :param stale: whether of all these only those are meant that are older than what they read, and what reads those.
    :raises InvalidDefinition: when it is nothing of that, or selects nothing by its form.
    """

    views: Sequence[str] = ()
    schemas: Sequence[str] = ()
    exclude: Sequence[str] = ()
    feeds: bool = False
    needs: bool = False
    stale: bool = False

    def __post_init__(self) -> None:
        for name in ("views", "schemas", "exclude"):
            object.__setattr__(self, name, as_tuple(getattr(self, name), name, (str,)))
        for name in ("feeds", "needs", "stale"):
            check_flag(getattr(self, name), name)
        for name in (*self.views, *self.exclude):
            if not _is_pattern(name):
                ViewName.parse(name)
        if not self.views and not self.schemas:
            raise InvalidDefinition(
                "Which views? views= and schemas= are empty.",
                hint="give views=['analytics.*'], schemas=['analytics'], or views=['*.*'] for all of the database.",
            )

    def of(self, graph: Graph, standing: Mapping[str, str | None]) -> frozenset[str]:
        """Return the names of the views that are meant, but for :attr:`stale`.

        :param standing: of each exact name, the view that it stands for in the graph; None where there is none.
        :raises ViewNotFound: when an exact name stands for no materialized view.
        """
        missing = [name for name in self.views if not _is_pattern(name) and standing[name] is None]
        if missing:
            raise ViewNotFound(
                f"No materialized view stands under {', '.join(missing)}.",
                hint="create it first, mend the name, or use a pattern, which may select nothing.",
            )
        chosen = self._matching(self.views, graph, standing)
        chosen |= {name for name, view in graph.views.items() if view.schema in self.schemas}
        if self.feeds:
            chosen |= graph.fed_by(chosen)
        if self.needs:
            chosen |= graph.needed_by(chosen)
        return frozenset(chosen - self._matching(self.exclude, graph, standing))

    def without_effect(self, graph: Graph, standing: Mapping[str, str | None]) -> list[str]:
        """Return what is worth a warning: patterns and exceptions that mean no view."""
        return [
            f"{what}={name!r} means no materialized view; patterns are case-sensitive."
            for what, names in (("views", self.views), ("exclude", self.exclude))
            for name in names
            if not self._matching([name], graph, standing)
        ] + [
            f"schemas={name!r} has no materialized view."
            for name in self.schemas
            if not any(view.schema == name for view in graph.views.values())
        ]

    @staticmethod
    def _matching(names: Sequence[str], graph: Graph, standing: Mapping[str, str | None]) -> set[str]:
        exact = {standing[name] for name in names if not _is_pattern(name)}
        patterns = [name for name in names if _is_pattern(name)]
        matching = {
            name
            for name, view in graph.views.items()
            if any(is_meant(pattern, view.schema, view.name) for pattern in patterns)
        }
        return matching | {name for name in exact if name is not None}

    @property
    def exact_names(self) -> list[str]:
        """The names that are no patterns."""
        return [name for name in (*self.views, *self.exclude) if not _is_pattern(name)]


def is_meant(name: str, schema: str, view: str) -> bool:
    """Whether a pattern, or a name, means a view; without a schema one in ``public``.

    :raises InvalidName: when it is neither.
    """
    return bool(_matcher(name)(f"{schema}\0{view}" if not _is_pattern(name) else f"{schema}.{view}"))


@lru_cache(maxsize=1024)
def _matcher(name: str) -> Callable[[str], object]:
    # Made once, and asked for each of a thousand views.
    if not _is_pattern(name):
        parsed = ViewName.parse(name)
        return f"{parsed.schema or 'public'}\0{parsed.name}".__eq__
    return re.compile(translate(name if "." in name else f"public.{name}")).match


@lru_cache(maxsize=1024)
def _is_pattern(name: str) -> bool:
    return bool(_WILD & set(name)) and '"' not in name
