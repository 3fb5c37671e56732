"""Says what broke and what to do, by way of whichever notifier a deployment has: mail, chat, pager."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import psycopg
from airflow.providers.common.compat.sdk import BaseNotifier, redact

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import FleetFailed, InvalidDefinition, MatViewError
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.services.ledger import Run
from airflow_provider_matviews.services.observing import runs_query
from airflow_provider_matviews.services.response import ServiceResponse

#: A person reads it: so many views are told one by one.
_MOST_VIEWS = 5
#: So many runs of a view are looked at for how long it has been failing.
_MOST_RUNS = 100
#: What the operators do, by their classes' names, which are all that a mapped task shows of them.
_OPERATIONS = {
    "Create": "creation",
    "Refresh": "refresh",
    "Delete": "drop",
    "Prune": "pruning",
    "Verify": "verification",
}

_SUBJECT = "{{ matview.headline }}"
_TEXT = """\
{{ matview.headline }}.
{% if matview.dag_id %}Task {{ matview.task_id }} of DAG {{ matview.dag_id }}, run {{ matview.run_id }}\
{% if matview.try_number %}, try {{ matview.try_number }}{% endif %}.
{% endif -%}
{% if matview.error %}
What broke: {{ matview.error }}: {{ matview.message }}
{% endif -%}
{% if matview.hint %}What to do: {{ matview.hint }}
{% endif -%}
{% for breach in matview.breaches %}
{{ breach.view }}: {{ breach.message }}
  What to do: {{ breach.what_to_do }}
{% endfor -%}
{% for view in matview.views %}
{{ view.name }}: {{ view.story }}
{%- if view.message and view.message != matview.message %}
  {{ view.error }}: {{ view.message }}
{%- if view.hint %}
  What to do: {{ view.hint }}
{%- endif %}
{%- endif %}
{%- endfor %}
{% if matview.more_views %}and {{ matview.more_views }} more
{% endif -%}
{% if matview.note %}{{ matview.note }}
{% endif -%}
{% if matview.sql %}
To look further: {{ matview.sql }}
{% endif -%}
{% if matview.log_url %}Log: {{ matview.log_url }}
{% endif -%}
"""


class MatViewNotifier(BaseNotifier):
    """Tell what became of a task about materialized views: which view, what broke, since when, what to do.

    It writes the message, puts it into the task's log, and hands it on to other notifiers, whose templates can use it:
    ``{{ matview.subject }}``, ``{{ matview.text }}``, ``{{ matview.html }}`` (the text, for a mail), and its parts,
    which docs/observability.md lists. So any notifier serves, and nothing has to be installed for it::

        on_failure_callback=MatViewNotifier(SlackWebhookNotifier(text="{{ matview.text }}"))

    For ``on_failure_callback``, ``on_retry_callback``, ``on_success_callback`` and ``on_skipped_callback``, of tasks or
    in ``default_args``; on tasks about something else it tells what there is to tell. Whatever goes wrong in it is
    logged, and changes nothing about the task.

    :param notifiers: notifiers, or functions that take the context, one or several; none for the log alone. The context
        that they are given holds ``matview``.
    :param subject: a Jinja template instead of the one line; ``matview`` and all of the context is there.
    :param text: a Jinja template instead of the message.
    :raises InvalidDefinition: when a notifier cannot be called, or a template is no text.
    """

    def __init__(
        self,
        notifiers: Callable[[Any], Any] | Sequence[Callable[[Any], Any]] = (),
        *,
        subject: str = _SUBJECT,
        text: str = _TEXT,
    ) -> None:
        super().__init__()
        given = list(notifiers) if isinstance(notifiers, (list, tuple)) else [notifiers]
        for each in given:
            if not callable(each):
                raise InvalidDefinition(
                    f"{each!r} is no notifier: give objects that can be called with a context, such as "
                    "SmtpNotifier(...) or a function."
                )
        for name, template in (("subject", subject), ("text", text)):
            if not isinstance(template, str):
                raise InvalidDefinition(f"{name}={template!r} is no template: give a string.")
        self.notifiers: list[Callable[[Any], Any]] = given  # type: ignore[assignment]
        self.subject = subject
        self.text = text

    def notify(self, context: Any) -> None:
        """Write the message, log it, and hand it on.

        :param context: of the task, as Airflow gives it to callbacks.
        """
        try:
            told = _facts(context)
            inside = {**context, "matview": told}
            told["subject"] = self._render_or(self.subject, inside, _SUBJECT).strip()
            told["text"] = self._render_or(self.text, inside, _TEXT).strip()
            told["html"] = f"<pre>{html.escape(told['text'])}</pre>"
        except Exception as error:
            # What cannot be told must not hide what happened.
            self.log.warning("No message could be written: %s: %s", type(error).__name__, redact(str(error)))
            return
        (self.log.error if told["error"] else self.log.info)("%s", told["text"])
        for notifier in self.notifiers:
            try:
                notifier(dict(inside))
            except Exception as error:
                name = getattr(notifier, "__name__", type(notifier).__name__)
                self.log.warning("%s could not be told: %s: %s", name, type(error).__name__, redact(str(error)))

    def _render_or(self, template: str, context: Any, usual: str) -> str:
        try:
            return str(self.render_template(template, context, self.get_template_env()))
        except Exception as error:
            if template is usual:
                raise
            self.log.warning("The template could not be rendered, so the usual one is: %s", redact(str(error)))
            return str(self.render_template(usual, context, self.get_template_env()))


def _facts(context: Mapping[str, Any]) -> dict[str, Any]:
    """Return what there is to tell, without secrets."""
    task: Any = context.get("task")
    instance, error = context.get("ti"), context.get("exception")
    whose = {name: getattr(instance, name, None) for name in ("dag_id", "task_id", "run_id", "map_index", "try_number")}
    hook = _hook_of(task)
    breaches = _breaches(task, instance)
    names = _views(task, error)
    operation = _operation(task)
    views: list[dict[str, Any]] = []
    note = None
    if hook is not None:
        try:
            for name in names[:_MOST_VIEWS]:
                views.append(_about(name, hook.runs(name, limit=_MOST_RUNS), whose))
        except Exception as trouble:
            note = f"The record could not be read: {type(trouble).__name__}."
    message, hint = _words(_message(error)) if error else (None, None)
    recorded = [view for view in views if view.pop("is_this") and view["message"]]
    if error and recorded and not isinstance(error, FleetFailed):
        # As recorded: without the excerpt of a statement, and with what mends it, also by way of a triggerer.
        message, hint = recorded[0]["message"], recorded[0]["hint"]
    what = f"{operation.capitalize()} of {_listed(names)}" if names else _task_name(whose)
    facts = {
        **whose,
        "operation": operation,
        "headline": f"{what} {_ended(instance, error, breaches)}",
        "error": type(error).__name__ if isinstance(error, BaseException) else "Error" if error else None,
        "message": message,
        "hint": hint or _hint(error),
        "views": views,
        "more_views": max(0, len(names) - len(views)) if views else 0,
        "breaches": breaches,
        "note": note,
        "sql": _question(task, views),
        "log_url": getattr(instance, "log_url", None),
    }
    cleaned: dict[str, Any] = _clean(facts, hook.redact if hook is not None else str)
    return cleaned


def _hook_of(task: Any) -> MatViewHook | None:
    """Return a hook on the database that a task is about; None where it is about something else."""
    conn_id, tracking_schema = getattr(task, "conn_id", None), getattr(task, "tracking_schema", None)
    if not isinstance(conn_id, str) or not isinstance(tracking_schema, str):
        return None
    return MatViewHook(postgres_conn_id=conn_id, tracking_schema=tracking_schema)


def _about(name: str, runs: Sequence[Run], whose: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the record says of a view; ``runs`` are its latest ones, newest first."""
    ended = [run for run in runs if run.status in ("success", "failed")]
    successes = [place for place, run in enumerate(ended) if run.status == "success"]
    failures = ended[: successes[0]] if successes else ended
    last = runs[0] if runs else None
    mine = next((run for run in runs if all(run.meta.get(key) == value for key, value in whose.items())), None)
    success = ended[successes[0]] if successes else None
    error: dict[str, Any] = (failures[0].error if failures else None) or {}
    message, hint = _words(error.get("message"))
    if last is None:
        story = "nothing is recorded of it"
    elif failures:
        count = f"{len(failures)} failure{'' if len(failures) == 1 else 's'} in a row"
        if len(runs) == _MOST_RUNS and success is None:
            count = f"at least {count}"
        story = f"{count}, since {_moment(failures[-1].created_at)}"
        story += f"; last brought up to date {_moment(success.finished_at)}" if success else ""
    else:
        told = mine or last
        rows = "" if told.row_count_after is None else f", {told.row_count_after:,} rows"
        reason = told.meta.get("response", {}).get("reason") if told.status == "skipped" else None
        story = f"{told.operation} {told.status}, {(told.duration_ms or 0) / 1000:.2f} s{rows}"
        story += f" ({reason})" if reason else ""
    return {
        "name": name,
        "story": story,
        "mat_view_run_id": mine.id if mine is not None else last.id if last is not None else None,
        "consecutive_failures": len(failures),
        "failing_since": failures[-1].created_at if failures else None,
        "last_success": success.finished_at if success else None,
        "error": error.get("class"),
        "message": message,
        "hint": error.get("hint") or hint,
        "is_this": bool(failures) and mine is failures[0],
    }


def _words(message: str | None) -> tuple[str | None, str | None]:
    """Return a message without its hint, and the hint; PostgreSQL's own is a line of the message."""
    if message is None:
        return None, None
    lines = message.splitlines()
    hints = [line.removeprefix("HINT:").strip() for line in lines if line.startswith("HINT:")]
    return "\n".join(line for line in lines if not line.startswith("HINT:")), "\n".join(hints) or None


def _views(task: Any, error: Any) -> list[str]:
    """Return the names of the views that it is about, those first that are to blame."""
    if isinstance(error, FleetFailed):
        return [*error.failed, *error.stopped]
    response = getattr(error, "response", None)
    if isinstance(response, ServiceResponse):
        return [response.response["view"]]
    definition = getattr(task, "definition", None)
    if isinstance(definition, MatViewDefinition):
        return [definition.name]
    if isinstance(definition, Mapping) and definition.get("name"):
        return [str(definition["name"])]
    view = getattr(task, "view", None)
    return [view] if isinstance(view, str) else []


def _operation(task: Any) -> str:
    name = getattr(task, "task_type", "")
    return next((word for prefix, word in _OPERATIONS.items() if name.startswith(prefix)), "check")


def _ended(instance: Any, error: Any, breaches: Sequence[Any]) -> str:
    if breaches:
        return f"found {len(breaches)} breach{'' if len(breaches) == 1 else 'es'}"
    state = getattr(instance, "state", None)
    state = getattr(state, "value", state)
    if error or state in ("failed", "up_for_retry"):
        return "failed and will be tried again" if state == "up_for_retry" else "failed"
    return "was skipped" if state == "skipped" else "succeeded"


def _breaches(task: Any, instance: Any) -> list[dict[str, Any]]:
    # Only a task that looks for them has any; and one that was told by another one is not asked for.
    if instance is None or not hasattr(task, "on_breach"):
        return []
    found = instance.xcom_pull(task_ids=instance.task_id, key="breaches", map_indexes=instance.map_index)
    return [dict(each) for each in found or () if isinstance(each, Mapping)]


def _message(error: Any) -> str | None:
    if error is None:
        return None
    if isinstance(error, MatViewError):
        return error.message
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        detail = error.diag.message_detail
        return error.diag.message_primary + (f" ({detail})" if detail else "")
    return str(error) or None


def _hint(error: Any) -> str | None:
    said = [getattr(error, "hint", None), *getattr(error, "__notes__", ())]
    return "\n".join(str(each) for each in said if each) or None


def _question(task: Any, views: Sequence[Mapping[str, Any]]) -> str | None:
    known = [view for view in views if view["mat_view_run_id"] is not None]
    if not known:
        return None
    return runs_query(task.tracking_schema, [view["mat_view_run_id"] for view in known])


def _task_name(whose: Mapping[str, Any]) -> str:
    return f"Task {whose['task_id']}" if whose["task_id"] else "A DAG run"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _moment(at: datetime | None) -> str:
    return "at an unknown time" if at is None else f"{at:%Y-%m-%d %H:%M %Z}"


def _clean(value: Any, hide: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return redact(hide(value))
    if isinstance(value, Mapping):
        return {key: _clean(item, hide) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item, hide) for item in value]
    return value
