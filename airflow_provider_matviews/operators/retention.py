"""The operator that keeps the record small. Thin: the hook does it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_provider_matviews.operators.base import HookOperator
from airflow_provider_matviews.retention import EVERY_VIEW, RetentionPolicy

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_matviews.services.retention import PruneResponse


class PruneMatViewRunsOperator(HookOperator):
    """Delete the run rows that nobody needs any more, in short transactions, while operations go on.

    For each view and operation (create, refresh, drop) the last so many successes, failures and skipped runs stay, of
    these only what is not too old. The last run of each status always stays, and so does every run that says
    ``running``. A view whose definition declares a ``retention`` of its own keeps that. Runs that ended without a word
    are marked as failed first, and the change log is pruned too.

    :param views: names as one would type them, or patterns with ``*``, ``?`` and ``[...]`` over ``schema.name``, of
        views on record, whether they stand or were dropped. All of them unless this or ``schemas`` is given; what is
        given and comes out empty is refused. (templated)
    :param schemas: exact names of schemas, all views of which are meant; without ``views``, these alone. (templated)
    :param exclude: names and patterns of views that are not meant after all. (templated)
    :param keep_successes: how many of the last successes stay; None for all.
    :param keep_failures: how many of the last failures stay; None for all.
    :param keep_skipped: how many of the last skipped runs stay; None for as many as successes.
    :param max_age: seconds, or a timedelta, after which a run goes whatever its number; None for never.
    :param batch_size: runs that one transaction deletes at the most.
    :param pause: seconds between two of them.
    :param vacuum: VACUUM the run table after something was deleted, which its owner may, the database's, and from
        PostgreSQL 17 on who has MAINTAIN; a warning says where it was passed over. Without it autovacuum does.
    :param dry_run: only count what would go: nothing is deleted, and nothing is marked.
    :param conn_id: the PostgreSQL connection. (templated)
    :param tracking_schema: the schema of the run tables. (templated)
    """

    template_fields: Sequence[str] = (*HookOperator.template_fields, "views", "schemas", "exclude")

    def __init__(
        self,
        *,
        views: Sequence[str] = EVERY_VIEW,
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        keep_successes: int | None = 500,
        keep_failures: int | None = None,
        keep_skipped: int | None = None,
        max_age: float | timedelta | None = None,
        batch_size: int = 5000,
        pause: float = 0.05,
        vacuum: bool = False,
        dry_run: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.views = views
        self.schemas = schemas
        self.exclude = exclude
        # Asked here: a template that is rendered empty must not come to mean every view.
        self._schemas_alone = views is EVERY_VIEW and schemas != ()
        self.keep_successes = keep_successes
        self.keep_failures = keep_failures
        self.keep_skipped = keep_skipped
        self.max_age = max_age
        self.batch_size = batch_size
        self.pause = pause
        self.vacuum = vacuum
        # Not `dry_run`: that is a method of BaseOperator.
        self.is_dry_run = dry_run

    def execute(self, context: Context) -> dict[str, Any]:
        """Do it, and return for XCom what was removed and what is left.

        :raises InvalidDefinition: when an argument cannot be what it should be.
        :raises ViewNotFound: when a name is of a view that is not on record.
        :raises MissingPrivilege: when the role may not use the run tables.
        :raises MatViewError: when somebody keeps a lock on the run table; it says who.
        """
        policy = RetentionPolicy(
            keep_successes=self.keep_successes,
            keep_failures=self.keep_failures,
            keep_skipped=self.keep_skipped,
            max_age=self.max_age,
        )
        with self._working(context) as hook:
            result = hook.prune(
                policy,
                views=() if self._schemas_alone else self.views,
                schemas=self.schemas,
                exclude=self.exclude,
                dry_run=self.is_dry_run,
                batch_size=self.batch_size,
                pause=self.pause,
                vacuum=self.vacuum,
            )
            self._tell(result, hook.redact)
        return result.as_dict()

    def _tell(self, result: PruneResponse, redact: Any) -> None:
        lines = result.table()
        if lines:
            self.log.info("::group::What %s of each view", "would go" if result.dry_run else "was removed")
            for line in lines:
                self.log.info("%s", redact(line))
            self.log.info("::endgroup::")
        self.log.info("%s", result.story())
