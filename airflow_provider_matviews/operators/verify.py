"""The operator that compares views with their queries."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.providers.common.compat.sdk import AirflowSkipException, conf

from airflow_provider_matviews.checks import as_tuple, check_text
from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition, VerificationFailed
from airflow_provider_matviews.hooks.verify import VerificationRun
from airflow_provider_matviews.operators.base import Deferral, HookOperator
from airflow_provider_matviews.outcome import log_error
from airflow_provider_matviews.services.selection import Selection
from airflow_provider_matviews.services.verification import FAIL_ON, Verdict, check_fail_on, timings_csv
from airflow_provider_matviews.timeouts import Timeouts

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

#: How many views an error names.
_MOST_NAMED = 5


class VerifyMatViewOperator(Deferral, HookOperator):
    """Compare materialized views with their queries: is each what it would be if it were made now?

    Nothing is changed or recorded. One table of all views in the log, with differing rows by example, and the same in
    XCom, also when the task fails. The verdict of each:

    - ``equal``, or ``rounding`` where only the last digits of floating-point numbers differ;
    - ``stale``: what it reads has changed since its last refresh, which a refresh mends;
    - ``corrupt``: it differs though nothing that it reads has changed;
    - ``differs``: it differs, and which of these cannot be told;
    - ``unpopulated``: it has never been filled; ``failed``: it could not be verified.

    :param view: one view's name. (templated)
    :param definition: its definition instead of its name, with which it is then compared, too.
    :param views: names as one would type them, or patterns with ``*``, ``?`` and ``[...]`` over ``schema.name``;
        ``*.*`` is all of the database. (templated)
    :param schemas: exact names of schemas, all views of which are meant. (templated)
    :param exclude: names and patterns of views that are not meant after all. (templated)
    :param mode: ``exact``: all rows; ``sampled``: some rows of each view, cheap where it has a unique index and its
        query can be restricted to some keys; ``checksum``: whether, not where, in little memory. (templated)
    :param sample: how many rows ``sampled`` looks at.
    :param seed: which rows; the same seed picks the same ones. (templated)
    :param examples: how many differing rows of each kind are told, values included; 0 where values may not be seen in
        logs and XCom.
    :param fail_on: verdicts that fail the task. By default ``corrupt`` and ``differs``: a view that is stale is waiting
        for its refresh. Add ``stale`` right after a refresh, when none should be. A view that could not be verified
        always fails it.
    :param timing_rounds: how often each view is timed against its query as well; 0 for not at all.
    :param csv_path: where to write these timings as CSV; the folder must be there. (templated)
    :param session_settings: PostgreSQL settings for the comparison, before those of a definition: ``work_mem`` bounds
        its memory, beyond which it spills to temporary files.
    :param conn_id: the PostgreSQL connection. A standby will do. (templated)
    :param tracking_schema: the schema of the run tables, where the last refresh is looked up. (templated)
    :param lock_timeout: seconds that one attempt waits for a lock; None for 1.
    :param max_wait: seconds after which waiting for the locks of a view ends in failure of that view; None for 600.
    :param statement_timeout: seconds that one statement may take; None for the server's setting.
    :param timeout: seconds after which the verification of one view is stopped on the server; None for never.
        ``execution_timeout`` limits all of them together.
    :param deferrable: whether the triggerer carries it out, without a worker's slot; by
        default ``[operators] default_deferrable``.
    :param cancel_on_kill: deferred only: whether it ends with its task when somebody marks that failed or clears it.
    """

    template_fields: Sequence[str] = (
        *HookOperator.template_fields,
        "view",
        "definition",
        "views",
        "schemas",
        "exclude",
        "mode",
        "seed",
        "csv_path",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"definition": "py"}

    def __init__(
        self,
        *,
        view: str | None = None,
        definition: MatViewDefinition | Mapping[str, Any] | None = None,
        views: Sequence[str] = (),
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        mode: str = "exact",
        sample: int = 1000,
        seed: int = 0,
        examples: int = 5,
        fail_on: Sequence[str] = FAIL_ON,
        timing_rounds: int = 0,
        csv_path: str | None = None,
        session_settings: Mapping[str, Any] | None = None,
        lock_timeout: float | None = None,
        max_wait: float | None = None,
        statement_timeout: float | None = None,
        timeout: float | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        cancel_on_kill: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.view = view
        self.definition = definition
        self.views = views
        self.schemas = schemas
        self.exclude = exclude
        self.mode = mode
        self.sample = sample
        self.seed = seed
        self.examples = examples
        self.fail_on = fail_on
        self.timing_rounds = timing_rounds
        self.csv_path = csv_path
        self.session_settings = session_settings
        self.lock_timeout = lock_timeout
        self.max_wait = max_wait
        self.statement_timeout = statement_timeout
        self.timeout = timeout
        self.deferrable = deferrable
        self.cancel_on_kill = cancel_on_kill

    def execute(self, context: Context) -> dict[str, Any]:
        """Compare them, here or in the triggerer, and return for XCom what came of each.

        :raises AirflowSkipException: when patterns mean no view.
        :raises TaskDeferred: when the triggerer is to do it.
        :raises VerificationFailed: when a verdict is among ``fail_on``, or a view could not be verified.
        :raises MatViewError: another one of ``exceptions.py``, when it cannot be done as asked.
        """
        with self._working(context) as hook:
            arguments = self._arguments()
            definitions = self._definitions()
            # Refused before anything is touched, and before the triggerer has it.
            check_fail_on(self.fail_on)
            names = [*arguments["views"], *(str(each.view) for each in definitions)]
            Selection(names, arguments["schemas"], arguments["exclude"])
            manners = {name: value for name, value in arguments.items() if name not in ("views", "schemas", "exclude")}
            VerificationRun(hook, **manners)
            self._check_csv_path()
            if self.deferrable:
                deferred = {**arguments, "definitions": [each.to_dict() for each in definitions]}
                self._defer_to(context, "verify_many", None, deferred, Timeouts())
            report = hook.verify_many(definitions=definitions, **arguments)
            return self._conclude(context, report.as_dict(hook.redact))

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on where the trigger has ended.

        :raises AirflowSkipException: as of :meth:`execute`.
        :raises MatViewError: as of :meth:`execute`.
        """
        self._raise_from(event)
        self.log.info("::group::What came of each view")
        for line in event["table"]:
            self.log.info("%s", line)
        self.log.info("::endgroup::")
        try:
            return self._conclude(context, event["summary"])
        except VerificationFailed as error:
            log_error(self.log, error)
            raise

    def _conclude(self, context: Context, summary: dict[str, Any]) -> dict[str, Any]:
        if not summary["views"]:
            raise AirflowSkipException("There was no view to be verified: the patterns mean none.")
        if self.csv_path is not None:
            # Whatever becomes of the file.
            context["ti"].xcom_push(key="return_value", value=summary)
            Path(self.csv_path).write_text(timings_csv(summary["timings"]), encoding="utf-8", newline="")
            self.log.info("Timings written to %s.", self.csv_path)
        failing = {*check_fail_on(self.fail_on), Verdict.FAILED}
        bad = [each for each in summary["views"] if each["verdict"] in failing]
        if bad:
            # A task that fails returns nothing.
            context["ti"].xcom_push(key="return_value", value=summary)
            raise self._failure(bad, len(summary["views"]))
        return summary

    @staticmethod
    def _failure(bad: Sequence[Mapping[str, Any]], count: int) -> VerificationFailed:
        told = [
            f"{each['view']} is {each['verdict']}: {next(iter(each['reason'].splitlines()), '')}"
            if each["verdict"] != Verdict.FAILED
            else f"{each['view']} could not be verified: {next(iter(each['reason'].splitlines()), '')}"
            for each in bad[:_MOST_NAMED]
        ]
        if len(bad) > _MOST_NAMED:
            told.append(f"and {len(bad) - _MOST_NAMED} more")
        return VerificationFailed(
            f"{len(bad)} of {count} view{'' if count == 1 else 's'} did not pass. {'; '.join(told)}",
            views=[each["view"] for each in bad],
            hint="see the table and the examples in the log. fail_on says which verdicts fail the task.",
        )

    def _check_csv_path(self) -> None:
        if self.csv_path is None:
            return
        if not self.timing_rounds:
            raise InvalidDefinition("csv_path is for timings: it goes with timing_rounds=3, say.")
        check_text(self.csv_path, "csv_path")
        path = Path(self.csv_path)
        if not path.parent.is_dir():
            raise InvalidDefinition(f"csv_path={self.csv_path!r}: there is no folder {path.parent} on this worker.")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InvalidDefinition(f"csv_path={self.csv_path!r} cannot be written on this worker.")

    def _definitions(self) -> list[MatViewDefinition]:
        if self.definition is None:
            return []
        if self.view is not None:
            raise InvalidDefinition("Give either view=... or definition=..., not both.")
        if isinstance(self.definition, MatViewDefinition):
            return [self.definition]
        return [MatViewDefinition.from_dict(self.definition)]

    def _arguments(self) -> dict[str, Any]:
        return {
            "views": [*([] if self.view is None else [self.view]), *as_tuple(self.views, "views", (str,))],
            "schemas": list(as_tuple(self.schemas, "schemas", (str,))),
            "exclude": list(as_tuple(self.exclude, "exclude", (str,))),
            "mode": self.mode,
            "sample": self.sample,
            "seed": int(self.seed) if isinstance(self.seed, str) and self.seed.isdecimal() else self.seed,
            "examples": self.examples,
            "rounds": self.timing_rounds,
            "session_settings": self.session_settings,
            "lock_timeout": self.lock_timeout,
            "max_wait": self.max_wait,
            "statement_timeout": self.statement_timeout,
            "timeout": self.timeout,
        }
