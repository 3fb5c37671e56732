"""What takes and gives privileges, each by its own grantor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from psycopg import sql

from airflow_provider_matviews.names import quote
from airflow_provider_matviews.services.alterations.base import Relation, role, text
from airflow_provider_matviews.services.instructions import raw
from airflow_provider_matviews.services.picture import Picture, Privilege
from airflow_provider_matviews.services.plan_steps import PlanStep, StepKind


@dataclass(frozen=True)
class _Right:
    """A privilege, on the view or on one of its columns."""

    privilege: Privilege
    column: str | None

    @property
    def key(self) -> tuple[str | None, str, str, str | None]:
        return self.privilege.grantee, self.privilege.grantor, self.privilege.privilege, self.column


def privileges(relation: Relation, before: Picture, after: Picture) -> Iterator[PlanStep]:
    """Return what takes and gives privileges, each by its own grantor.

    :param before: after whatever gave the view to another owner.
    """
    present = {right.key: right for right in _rights(before)}
    wanted = {right.key: right for right in _rights(after)}
    surplus: list[_Right] = []
    optional: list[_Right] = []
    for key in list(present):
        right = present.get(key)
        target = wanted.get(key)
        if right is None:
            continue  # Went with the one that it was granted from.
        if target is None:
            surplus.append(right)
            del present[key]
        elif right.privilege.grantable and not target.privilege.grantable:
            optional.append(right)
            present[key] = target
        else:
            continue
        if right.privilege.grantable:
            _forget_granted_from(right, present)
        if right.column is None:
            # Taken from the whole, it is taken from each column (https://www.postgresql.org/docs/current/sql-revoke.html).
            for other in [other for other in present if other[:3] == key[:3] and other[3] is not None]:
                del present[other]
    for rights in _together(surplus):
        yield _revoked(relation, after.owner, rights, option_only=False)
    for rights in _together(optional):
        yield _revoked(relation, after.owner, rights, option_only=True)
    missing = [right for key, right in wanted.items() if present.get(key) != right]
    for rights in _together(_in_order_of_grantors(missing, present.values(), after.owner)):
        yield _granted(relation, after.owner, rights)


def _together(rights: Iterable[_Right]) -> list[list[_Right]]:
    """Return them in groups that one statement can name."""

    def alike(right: _Right) -> tuple[object, ...]:
        return right.privilege.grantee, right.privilege.grantor, right.privilege.grantable, right.column

    return [list(group) for _, group in groupby(rights, key=alike)]


def _rights(picture: Picture) -> Iterator[_Right]:
    for privilege in picture.privileges:
        yield _Right(privilege, None)
    for column in picture.columns:
        for privilege in column.privileges:
            yield _Right(privilege, column.name)


def _forget_granted_from(source: _Right, present: dict[tuple[str | None, str, str, str | None], _Right]) -> None:
    for key, right in list(present.items()):
        privilege = right.privilege
        if (
            privilege.grantor == source.privilege.grantee
            and privilege.privilege == source.privilege.privilege
            and source.column in (None, right.column)
            and key in present
        ):
            del present[key]
            if privilege.grantable:
                _forget_granted_from(right, present)


def _in_order_of_grantors(missing: Sequence[_Right], present: Iterable[_Right], owner: str) -> list[_Right]:
    able = {_source(right) for right in present if right.privilege.grantable}
    waiting, ordered = list(missing), []
    while waiting:
        ready = [
            right
            for right in waiting
            if right.privilege.grantor == owner
            or {(right.privilege.grantor, right.privilege.privilege, column) for column in (None, right.column)} & able
        ]
        if not ready:
            # A grantor without a grant option. Let the server say what is wrong.
            ready = list(waiting)
        for right in ready:
            waiting.remove(right)
            ordered.append(right)
            if right.privilege.grantable:
                able.add(_source(right))
    return ordered


def _source(right: _Right) -> tuple[str | None, str, str | None]:
    return right.privilege.grantee, right.privilege.privilege, right.column


def _what(rights: Sequence[_Right]) -> sql.Composable:
    column = rights[0].column
    of_column = sql.SQL("") if column is None else sql.SQL(" ({})").format(sql.Identifier(column))
    return sql.SQL(", ").join(raw(right.privilege.privilege) + of_column for right in rights)


def _by(owner: str, grantor: str, statement: sql.Composable) -> tuple[str, ...]:
    if grantor == owner:
        return (text(statement),)
    return (
        text(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(grantor))),
        text(statement),
        "RESET ROLE",
    )


def _revoked(relation: Relation, owner: str, rights: Sequence[_Right], *, option_only: bool) -> PlanStep:
    first = rights[0].privilege
    statement = sql.SQL("REVOKE {}{} ON {} FROM {}{}").format(
        sql.SQL("GRANT OPTION FOR " if option_only else ""),
        _what(rights),
        relation.identifier,
        role(first.grantee),
        sql.SQL(" CASCADE" if first.grantable else ""),
    )
    return PlanStep(
        StepKind.REVOKE,
        _described(rights),
        "nothing declares the right to grant it on" if option_only else "nothing declares it",
        cut=_by(owner, first.grantor, statement),
    )


def _granted(relation: Relation, owner: str, rights: Sequence[_Right]) -> PlanStep:
    first = rights[0].privilege
    statement = sql.SQL("GRANT {} ON {} TO {}{}").format(
        _what(rights),
        relation.identifier,
        role(first.grantee),
        sql.SQL(" WITH GRANT OPTION" if first.grantable else ""),
    )
    return PlanStep(
        StepKind.GRANT,
        _described(rights),
        "it is declared and was not granted",
        cut=_by(owner, first.grantor, statement),
    )


def _described(rights: Sequence[_Right]) -> str:
    first, column = rights[0].privilege, rights[0].column
    return (
        ", ".join(right.privilege.privilege for right in rights)
        + ("" if column is None else f" on column {quote(column)}")
        + f" to {'everybody' if first.grantee is None else quote(first.grantee)}"
        + (" with grant option" if first.grantable else "")
    )
