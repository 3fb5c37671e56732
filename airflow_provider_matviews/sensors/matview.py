"""The sensor that says when views fail, lag behind, or are refreshed unusually slowly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.common.compat.sdk import (
    AirflowFailException,
    BaseSensorOperator,
    PokeReturnValue,
    conf,
)

from airflow_provider_matviews.checks import as_seconds, choice
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.operators.base import whose
from airflow_provider_matviews.outcome import log_error, unpack_error
from airflow_provider_matviews.rules import AlertRules
from airflow_provider_matviews.services.alerts import table
from airflow_provider_matviews.triggers.metrics import HealthyMatViewsTrigger

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

#: Under which breaches are put into XCom, however the task ends.
BREACHES_KEY = "breaches"


class OnBreach(StrEnum):
    """What the sensor does where a rule is broken.

    ``fail``: its task fails at once, without retries, so that callbacks, notifiers and deadline alerts do the rest.
    ``wait``: it looks again until none is, so that what follows it waits. ``report``: its task succeeds with the list.
    """

    FAIL = "fail"
    WAIT = "wait"
    REPORT = "report"


class MatViewMetricsSensor(BaseSensorOperator):
    """Say when materialized views fail, lag behind, are refreshed unusually slowly, or have an unusual size.

    Reads the record by two or three statements, whatever the number of views and the length of the history. Breaches
    are told as a table in the log, and as a list in XCom under ``breaches``.

    :param views: names as one would type them, or patterns with ``*``, ``?`` and ``[...]`` over ``schema.name``.
        Patterns mean the views that are on record; a name may also be of one that stands and is not. (templated)
    :param schemas: exact names of schemas, all views of which are meant. (templated)
    :param exclude: names and patterns of views that are not meant after all. (templated)
    :param failed: whether it is a breach that a view's latest create or refresh failed; skipped runs are no runs here.
    :param unreadable: whether it is one that no such view stands any more, though we have not dropped it, or that it
        holds no data.
    :param consecutive_failures: so many failed runs in a row, or more, are one.
    :param max_duration_ratio: how many times the average of the successful refreshes before it the latest one may have
        taken; a run that is under way is measured by it too. None: that is no breach; and so for the others.
    :param window: how many successful refreshes that average is over, at the most.
    :param min_samples: how many there have to be for any average.
    :param min_duration: seconds that count as slow at the least, whatever the average.
    :param max_age: seconds, or a timedelta, within which a view has to be filled, or to be found unchanged.
    :param max_running: seconds, or a timedelta, that a run may take that is under way.
    :param max_row_count_ratio: how many times more, or how many times fewer, rows a view may have than after the
        refreshes before, on average over the same window.
    :param max_bloat: how many times the room that it took after the last rebuild a row may take; only of views of more
        than 8 MiB.
    :param overrides: name or pattern -> the rules that are different for those views, such as
        ``{"reports.*": {"max_age": 3600}}``; the later go before. (templated)
    :param on_breach: ``fail``: the task fails at once, without retries; ``wait``: it looks again until no rule is
        broken; ``report``: it succeeds, with ``{"healthy": False, ...}`` in XCom.
    :param conn_id: the PostgreSQL connection. (templated)
    :param tracking_schema: the schema of the run tables. (templated)
    :param deferrable: whether it waits in the triggerer, without a worker's slot; by default
        ``[operators] default_deferrable``. Only waiting takes time: it looks once on the worker first.
    """

    template_fields: Sequence[str] = ("conn_id", "tracking_schema", "views", "schemas", "exclude", "overrides")
    ui_color = "#e6f1f2"

    def __init__(
        self,
        *,
        views: Sequence[str] = ("*.*",),
        schemas: Sequence[str] = (),
        exclude: Sequence[str] = (),
        failed: bool = True,
        unreadable: bool = True,
        consecutive_failures: int | None = None,
        max_duration_ratio: float | None = 2.0,
        window: int = 20,
        min_samples: int = 5,
        min_duration: float = 1.0,
        max_age: float | timedelta | None = None,
        max_running: float | timedelta | None = None,
        max_row_count_ratio: float | None = None,
        max_bloat: float | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        on_breach: str = OnBreach.FAIL.value,
        conn_id: str = "postgres_default",
        tracking_schema: str = "matviews",
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.views = views
        self.schemas = schemas
        self.exclude = exclude
        # These are not templated: what is wrong with them is said when the DAG is read.
        self.rules = AlertRules(
            failed=failed,
            unreadable=unreadable,
            consecutive_failures=consecutive_failures,
            max_duration_ratio=max_duration_ratio,
            window=window,
            min_samples=min_samples,
            min_duration=min_duration,
            max_age=max_age,
            max_running=max_running,
            max_row_count_ratio=max_row_count_ratio,
            max_bloat=max_bloat,
        ).as_dict()
        self.overrides = overrides
        self.on_breach = choice(OnBreach, on_breach, "on_breach").value
        self.conn_id = conn_id
        self.tracking_schema = tracking_schema
        self.deferrable = deferrable
        self._hook: MatViewHook | None = None
        self._told: list[str] = []

    def poke(self, context: Context) -> bool | PokeReturnValue:
        """Look once.

        :returns: what goes to XCom: whether all is well, how many views were looked at, and the breaches; False where
            it is to look again.
        :raises AirflowFailException: when a rule is broken, with ``on_breach="fail"``.
        :raises TaskDeferred: when the triggerer is to wait.
        :raises ViewNotFound: when a name is of a view that neither stands nor is on record, or that was dropped.
        :raises InvalidDefinition: when a rendered argument is not what it should be.
        :raises MissingPrivilege: when the role may not use the run tables.
        """
        hook = self._hook = MatViewHook(
            postgres_conn_id=self.conn_id, tracking_schema=self.tracking_schema, context=whose(context)
        )
        try:
            checkup = hook.check(**self._arguments())
        except Exception as error:
            log_error(self.log, error, hook.redact)
            raise
        finally:
            self._hook = None
        found = checkup.as_dict(hook.redact)
        self._tell(checkup.story(), found["breaches"])
        return self._judge(context, found)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Go on where the trigger has ended.

        :raises MatViewError: what the trigger met.
        """
        if "error" in event:
            error = unpack_error(event["error"])
            log_error(self.log, error)
            raise error
        self.log.info("All is well.")
        judged = self._judge(context, event["found"])
        assert isinstance(judged, PokeReturnValue)
        return judged.xcom_value

    def on_kill(self) -> None:
        """Stop the statement on the server."""
        if self._hook is not None:
            self._hook.refuse("Airflow stopped the task")

    def _judge(self, context: Context, found: dict[str, Any]) -> bool | PokeReturnValue:
        context["ti"].xcom_push(key=BREACHES_KEY, value=found["breaches"])
        if not found["healthy"]:
            if self.on_breach == OnBreach.FAIL:
                self._fail(found["breaches"])
            if self.on_breach == OnBreach.WAIT:
                if self.deferrable:
                    self._defer(context)
                return False
        return PokeReturnValue(True, found)

    def _fail(self, breaches: Sequence[Mapping[str, Any]]) -> NoReturn:
        first = breaches[0]
        more = f" (and {len(breaches) - 1} more, see the table in the log)" if len(breaches) > 1 else ""
        raise AirflowFailException(f"{first['view']}: {first['message']}. {first['what_to_do']}.{more}")

    def _tell(self, story: str, breaches: Sequence[Mapping[str, Any]]) -> None:
        lines = table(breaches) if breaches else []
        if lines and lines == self._told:
            self.log.info("%s As before.", story)
            return
        self._told = lines
        self.log.info("%s", story)
        for line in lines:
            self.log.warning("%s", line)

    def _arguments(self) -> dict[str, Any]:
        return {
            "views": self.views,
            "schemas": self.schemas,
            "exclude": self.exclude,
            "overrides": self.overrides,
            **self.rules,
        }

    def _defer(self, context: Context) -> NoReturn:
        overrides = {
            name: {
                rule: as_seconds(value, rule) if isinstance(value, timedelta) else value
                for rule, value in rules.items()
            }
            for name, rules in (self.overrides or {}).items()
        }
        self.log.info("Deferred: the triggerer looks again every %g s.", self.poke_interval)
        self.defer(
            trigger=HealthyMatViewsTrigger(
                arguments={**self._arguments(), "overrides": overrides},
                conn_id=self.conn_id,
                tracking_schema=self.tracking_schema,
                context=whose(context),
                poke_interval=self.poke_interval,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout),
        )
