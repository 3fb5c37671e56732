"""Metrics by way of Airflow's own ``Stats``: whatever a deployment has configured under ``[metrics]``.

docs/observability.md lists the names and the tags. What goes wrong with a metric is nothing to an operation.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from typing import Any

from airflow.providers.common.compat.sdk import Stats, conf

from airflow_provider_matviews.services.fleet import FleetResponse
from airflow_provider_matviews.services.observing import Ended

# With InfluxDB's style of tags Airflow puts them into the name, drops a tag whose value holds "," or "=", and drops the
# whole metric where anything but these characters is left, or where all of it is longer than 250
# (validators.stat_name_default_handler).
_REFUSED = re.compile(r"[^A-Za-z0-9_.-]")
_LONGEST = {"view": 100, "conn_id": 40, "error": 50}
_DIGITS = 6


def enabled() -> bool:
    """Whether Airflow is configured to send metrics anywhere."""
    switches = ("statsd_on", "statsd_datadog_enabled", "otel_on")
    return any(conf.getboolean("metrics", switch, fallback=False) for switch in switches)


def tag(value: str, longest: int = 100) -> str:
    """Return a value that every backend takes as a tag.

    Where something had to be replaced or cut off, a few digits of a hash are added, so that two names which look alike
    then do not become one.
    """
    kept = _REFUSED.sub("_", value.replace('"', ""))
    if kept == value and len(kept) <= longest:
        return kept
    digits = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]
    return f"{kept[: longest - _DIGITS - 1]}_{digits}"


def emit(ended: Ended, conn_id: str, redact: Callable[[str], str] = str) -> None:
    """Send the metrics of one operation.

    :param conn_id: the Airflow connection, which becomes a tag.
    :param redact: takes secrets out of text.
    """
    facts: dict[str, Any] = ended.response.response if ended.response is not None else {}
    whose = _tags(view=redact(ended.view), conn_id=conn_id)
    name = f"matviews.{ended.operation}"
    _ready()
    Stats.timing(f"{name}.lock_wait", 1000 * ended.waited, tags=whose)
    if ended.status == "skipped":
        Stats.incr(f"{name}.skipped", tags=whose | _tags(reason=_why_skipped(facts)))
        return
    how = _tags(strategy=facts.get("strategy"))
    Stats.timing(f"{name}.duration", 1000 * ended.seconds, tags=whose | how | _tags(status=ended.status))
    if ended.error is not None:
        Stats.incr(f"{name}.failures", tags=whose | _tags(error=type(ended.error).__name__))
        return
    for metric, value in (("rows", facts.get("row_count_after")), ("size", facts.get("size_bytes"))):
        if value is not None:
            Stats.gauge(f"{name}.{metric}", value, tags=whose | how)
    if ended.lag is not None:
        Stats.timing(f"{name}.lag", 1000 * ended.lag, tags=whose | how)


def emit_left(result: FleetResponse, conn_id: str, redact: Callable[[str], str] = str) -> None:
    """Send the metrics of those views of a fleet on which no operation was begun.

    :param conn_id: the Airflow connection, which becomes a tag.
    :param redact: takes secrets out of text.
    """
    _ready()
    for outcome in result.outcomes:
        if outcome.response is None and outcome.status in ("skipped", "stopped"):
            reason = "unchanged" if outcome.status == "skipped" else "stopped"
            tags = _tags(view=redact(outcome.view), conn_id=conn_id, reason=reason)
            Stats.incr("matviews.refresh.skipped", tags=tags)


def _tags(**values: str | None) -> dict[str, str]:
    return {name: tag(value, _LONGEST.get(name, 20)) for name, value in values.items() if value}


def _why_skipped(facts: dict[str, Any]) -> str:
    if facts.get("locked"):
        return "locked"
    if facts.get("already"):
        return "earlier_try"
    return str(facts.get("spared") or "nothing_to_do")


def _ready() -> None:
    # Airflow sets Stats up in its workers and triggerers (3.3.2, seen in both); nobody does where a hook is used in a
    # script, or a DAG is tried with dag.test().
    module = sys.modules[Stats.initialize.__module__]
    if getattr(module, "_factory", module) is None:
        from airflow.sdk.observability.metrics.stats_utils import get_stats_factory

        legacy = conf.getboolean("metrics", "legacy_names_on", fallback=True)
        Stats.initialize(factory=get_stats_factory(), export_legacy_names=legacy)
