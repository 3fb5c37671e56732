"""The steps of a plan: what would be done to a view, with which statements, why, and what readers feel of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class StepKind(StrEnum):
    """What a step does."""

    CREATE_VIEW = "create view"
    RENAME_VIEW = "rename view"
    CHANGE_QUERY = "change query"
    REBUILD = "rebuild"
    ADD_COLUMN = "add column"
    DROP_COLUMN = "drop column"
    RENAME_COLUMN = "rename column"
    CHANGE_COLUMN = "change column"
    COLUMN_SETTINGS = "column settings"
    BUILD_INDEX = "build index"
    CHANGE_INDEX = "change index"
    REPAIR_INDEX = "repair index"
    DROP_INDEX = "drop index"
    RENAME_INDEX = "rename index"
    ALTER_INDEX = "alter index"
    CREATE_STATISTICS = "create statistics"
    CHANGE_STATISTICS = "change statistics"
    ALTER_STATISTICS = "alter statistics"
    DROP_STATISTICS = "drop statistics"
    GRANT = "grant"
    REVOKE = "revoke"
    OWNER = "owner"
    COMMENT = "comment"
    STORAGE_PARAMETERS = "storage parameters"
    TABLESPACE = "tablespace"
    ACCESS_METHOD = "access method"
    REPLICA_IDENTITY = "replica identity"
    SECURITY_LABEL = "security label"
    EXTENSION = "extension"


class Lock(StrEnum):
    """What a statement locks of the view that stands, and what that is to readers.

    See https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-TABLES.
    """

    NONE = "none"
    SHARE_UPDATE_EXCLUSIVE = "SHARE UPDATE EXCLUSIVE"
    SHARE = "SHARE"
    EXCLUSIVE = "EXCLUSIVE"
    ACCESS_EXCLUSIVE = "ACCESS EXCLUSIVE"

    @property
    def cost(self) -> str:
        """What readers feel while it is held."""
        match self:
            case Lock.ACCESS_EXCLUSIVE:
                return "readers wait for the moment it takes"
            case Lock.SHARE | Lock.EXCLUSIVE:
                return "readers go on, a refresh waits"
        return "readers go on"


@dataclass(frozen=True)
class PlanStep:
    """One step of a plan.

    :ivar kind: what it does.
    :ivar subject: to what: ``index "mv_id_key"``.
    :ivar why: what the definition says and what the view has.
    :ivar build: the statements that come first and may take long; they let readers go on.
    :ivar cut: the statements that come last, together with those of all other steps, and take milliseconds.
    :ivar lock: the strongest lock that any of them takes on the view.
    :ivar cost: what readers feel of it.
    :ivar detail: more on what differs, line by line.
    """

    kind: StepKind
    subject: str
    why: str
    build: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    lock: Lock = Lock.NONE
    cost: str = ""
    detail: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.cost:
            object.__setattr__(self, "cost", self.lock.cost)

    @property
    def sql(self) -> tuple[str, ...]:
        """Its statements, in order."""
        return self.build + self.cut

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "kind": self.kind.value,
            "subject": self.subject,
            "why": self.why,
            "sql": list(self.sql),
            "lock": self.lock.value,
            "cost": self.cost,
            "detail": list(self.detail),
        }

    @property
    def title(self) -> str:
        """What it does to what, in a few words."""
        noun = self.kind.split()[-1]
        what = self.subject.removeprefix(f"{noun} ")
        if self.subject in (f"the {noun}", f"the view's {noun}"):
            return self.kind.value
        if what != self.subject or self.kind in (StepKind.GRANT, StepKind.REVOKE):
            return f"{self.kind} {what}"
        return f"{self.kind} of {self.subject}" if self.kind is StepKind.COLUMN_SETTINGS else f"{self.kind}: {what}"

    def __str__(self) -> str:
        return f"{self.title}: {self.why} [lock {self.lock}: {self.cost}]"


@dataclass(frozen=True)
class Plan:
    """What would make a view what its definition says.

    :ivar view: its name, as one would type it.
    :ivar stands: whether there is one.
    :ivar steps: what would be done, in order; empty where the view is what it should be.
    :ivar left_alone: what the view has and the definition does not mention, each for a person.
    :ivar refusals: why it cannot be applied as it is, each a sentence.
    :ivar notes: what else there is to know.
    """

    view: str
    stands: bool
    steps: tuple[PlanStep, ...] = ()
    left_alone: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.steps

    @property
    def rebuilds(self) -> bool:
        """Whether the whole view would be built beside the one that stands."""
        return any(
            step.kind in (StepKind.CHANGE_QUERY, StepKind.REBUILD, StepKind.TABLESPACE, StepKind.ACCESS_METHOD)
            for step in self.steps
        )

    @property
    def sql(self) -> tuple[str, ...]:
        """All statements: first those that let readers go on, then those of the one short cut."""
        return tuple(text for step in self.steps for text in step.build) + tuple(
            text for step in self.steps for text in step.cut
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "view": self.view,
            "stands": self.stands,
            "steps": [step.as_dict() for step in self.steps],
            "left_alone": list(self.left_alone),
            "refusals": list(self.refusals),
            "notes": list(self.notes),
        }

    def lines(self, *, statements: bool = True) -> list[str]:
        """Return it as text for a person, line by line.

        :param statements: with the SQL of each step.
        """
        if self.empty:
            return [f"{self.view} is what its definition says.", *self._margin()]
        what = "Plan for" if self.stands else "Plan, to create"
        lines = [f"{what} {self.view}: {len(self.steps)} step{'' if len(self.steps) == 1 else 's'}."]
        for number, step in enumerate(self.steps, 1):
            lines.append(f"  {number}. {step.title}: {step.why}")
            lines += [f"       {line}" for line in step.detail]
            if step.lock is not Lock.NONE:
                lines.append(f"     lock {step.lock}: {step.cost}")
            if statements:
                lines += [f"     {line}" for text in step.sql for line in f"{text};".splitlines()]
        return lines + self._margin()

    def _margin(self) -> list[str]:
        lines = [f"  Note: {note}" for note in self.notes]
        if self.left_alone:
            lines.append(f"  Left alone, since the definition does not mention it: {', '.join(self.left_alone)}.")
        return lines + [f"  CANNOT BE APPLIED: {refusal}" for refusal in self.refusals]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def summary(self) -> str:
        """Return its steps in a few words."""
        counted: dict[str, int] = {}
        for step in self.steps:
            counted[step.kind.value] = counted.get(step.kind.value, 0) + 1
        return ", ".join(f"{kind} ({number})" if number > 1 else kind for kind, number in counted.items())
