"""Which relations a query reads, by its text alone: for DAG files, which have no database to ask.

Knows neither Airflow nor a database. sqlglot reads the query. It takes about half a second to import and some
milliseconds for each query, and Airflow reads a DAG file anew every 30 seconds, each time in a new process: nothing
that is kept in memory would help there. So what was found is kept in a file, and sqlglot is imported only for a query
that was not seen before.

That file is the one exception from the rule that reading a DAG file reads nothing but what was declared. It lies in a
folder of the user's own below the one for temporary files, it holds nothing but names, and nothing depends on it: where
it is missing, damaged, of another version or not to be written, the queries are read again.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from airflow_provider_matviews import __version__
from airflow_provider_matviews.names import MAX_IDENTIFIER_BYTES, ViewName, shorten

if TYPE_CHECKING:
    from sqlglot import exp

#: The relations that a query reads; None where the query could not be read.
References: TypeAlias = "frozenset[ViewName] | None"

_log = logging.getLogger(__name__)

_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


def fold(text: str) -> str:
    """Return text in lower case as PostgreSQL folds what is not quoted: ASCII letters only."""
    return text.translate(_LOWER)


# The same views are often refreshed and created in one DAG file.
@lru_cache(maxsize=1024)
def references(sql: str) -> References:
    """Return the relations that a query reads.

    Names are folded and cut off as PostgreSQL does it. A name without a schema is left so: the search path decides.
    What stands in a WITH clause is no relation where that clause holds. What is read by views that the query reads, and
    by functions that it calls, is not told.

    :param sql: one SELECT, WITH, VALUES or TABLE statement.
    :returns: their names, or None where sqlglot cannot read the query.
    """
    import sqlglot
    from sqlglot import exp

    try:
        trees = sqlglot.parse(sql, read="postgres")
        trees = [tree for tree in trees if tree is not None and not isinstance(tree, exp.Semicolon)]
        if len(trees) != 1 or not isinstance(trees[0], (exp.Query, exp.Values)) or _is_misread(trees[0]):
            return None
        return frozenset(_relations(trees[0]))
    except Exception as error:
        # Not its own errors only: it meets text of any kind, and a DAG file has to be read all the same.
        _log.debug("sqlglot cannot read a query: %s: %s", type(error).__name__, error)
        return None


def read_all(queries: Iterable[str], remembered_as: str) -> dict[str, References]:
    """Return the relations that each of many queries reads, as :func:`references` does.

    :param queries: the queries.
    :param remembered_as: a name for all of them together, the same each time; what was found is kept under it.
    """
    readers = f"{__version__}\0{version('sqlglot')}\0"
    keys = {sql: sha256((readers + sql).encode(errors="surrogatepass")).hexdigest() for sql in queries}
    if not keys:
        return {}
    file = _file(remembered_as)
    known = _load(file)
    if new := [sql for sql, key in keys.items() if key not in known]:
        known |= {keys[sql]: references(sql) for sql in new}
        # Only these: what is no longer asked for is forgotten.
        _save(file, {key: known[key] for key in keys.values()})
    return {sql: known[key] for sql, key in keys.items()}


def _relations(tree: exp.Expr) -> Iterator[ViewName]:
    from sqlglot import exp

    # A stack and not recursion: a chain of a thousand UNIONs is a thousand levels deep.
    rest: list[tuple[exp.Expr, frozenset[str]]] = [(tree, frozenset())]
    while rest:
        node, hidden = rest.pop()
        if isinstance(node, exp.Lock):
            # FOR UPDATE OF names what FROM has named.
            continue
        if isinstance(node, exp.Table) and isinstance(node.this, exp.Identifier):
            name = ViewName(_identifier(node.this), _identifier(node.args.get("db")) or None)
            if name.schema is not None or name.name not in hidden:
                yield name
        clause = next((child for child in node.args.values() if isinstance(child, exp.With)), None)
        if clause is not None:
            names = [_identifier(cte.args["alias"].this) for cte in clause.expressions]
            # With RECURSIVE each of them sees all, else each sees those before it.
            for position, cte in enumerate(clause.expressions):
                rest.append((cte, hidden.union(names if clause.recursive else names[:position])))
            hidden = hidden.union(names)
        rest.extend((child, hidden) for child in node.iter_expressions() if child is not clause)


def _is_misread(tree: exp.Expr) -> bool:
    """Return whether `TABLE name` was taken for a column or a relation called table, as by sqlglot before 30.30."""
    from sqlglot import exp

    return any(
        isinstance(node.this, exp.Identifier)
        and not node.this.args.get("quoted")
        and fold(node.name) == "table"
        and not (node.args.get("db") or node.args.get("table"))
        for node in tree.find_all(exp.Column, exp.Table)
    )


def _identifier(node: exp.Expr | None) -> str:
    if node is None:
        return ""
    name = node.name if node.args.get("quoted") else fold(node.name)
    return shorten(name, MAX_IDENTIFIER_BYTES)


def _file(remembered_as: str) -> Path:
    folder = Path(tempfile.gettempdir()) / f"airflow-provider-matviews-{os.getuid()}"
    return folder / f"{sha256(remembered_as.encode()).hexdigest()[:32]}.json"


def _load(file: Path) -> dict[str, References]:
    try:
        _check_folder(file.parent)
        return {key: _unpacked(names) for key, names in json.loads(file.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        _log.debug("What queries read is not remembered: %s", error)
        return {}


def _save(file: Path, found: dict[str, References]) -> None:
    packed = {
        key: None if names is None else [(each.schema, each.name) for each in names] for key, names in found.items()
    }
    try:
        with suppress(FileExistsError):
            file.parent.mkdir(mode=0o700)
        _check_folder(file.parent)
        descriptor, path = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(descriptor, "w") as stream:
                json.dump(packed, stream)
            # In one step: who reads at this moment sees the old file or the new one.
            Path(path).replace(file)
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.debug("What queries read cannot be remembered: %s", error)


def _check_folder(folder: Path) -> None:
    """Make sure that nobody else can have put anything there.

    :raises OSError: when somebody can, or there is no such folder.
    """
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder that only this user can enter")


def _unpacked(names: object) -> References:
    if names is None:
        return None
    if not isinstance(names, list):
        raise TypeError("no list of names")
    found = frozenset(ViewName(name, schema) for schema, name in names)
    if not all(isinstance(each.name, str) and isinstance(each.schema, (str, type(None))) for each in found):
        raise TypeError("no names")
    return found
