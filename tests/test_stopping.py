"""Stopping stops: whatever ends a task, its query is gone from the server soon, undone, and the record says why.

A real scheduler, real workers, real triggerers and real signals. All refreshes stand in the middle of their queries,
at gates that the test keeps closed, when they are stopped.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.live_airflow import (
    GatedView,
    LiveAirflow,
    ancestors_of,
    descendants_of,
    kill,
    live_airflow,
    moment,
    parent_of,
    wait_until,
)

pytestmark = pytest.mark.e2e

#: Seconds within which a query has to be gone once its own process has been told, and in any case.
TOLD, ANYHOW = 2.0, 10.0
#: Seconds after which an operation ends whose task has an ``execution_timeout`` of 10 seconds.
LONGEST = 9.0

SETTINGS = {
    "AIRFLOW__CORE__EXECUTOR": "tests.preloading.PreloadingLocalExecutor",
    "AIRFLOW__CORE__PARALLELISM": "24",
    # Seconds between its looks when there is nothing to do.
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.3",
    # A triggerer that was killed is given up after a few seconds, not after half a minute.
    "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "6",
}
TRIGGERER = ("triggerer", "--skip-serve-logs")
MODES = ("", "_deferred")
DAG_IDS = (
    *(f"{dag_id}{mode}" for dag_id in ("plain", "limited", "limited_run", "compared") for mode in MODES),
    "kept_deferred",
)


@pytest.fixture(scope="module")
def live() -> Iterator[LiveAirflow]:
    with live_airflow("stopping", DAG_IDS, SETTINGS, {"triggerer-2": TRIGGERER}) as running:
        wait_until(lambda: len(running.airflow.api.triggerers()) == 2, "both triggerers are at work", 60)
        yield running


@dataclass
class Stop:
    """What became of a refresh that was stopped.

    :ivar acted: when Airflow, or the test, did what was to stop it.
    :ivar told: when the task's process was told, where that can be seen.
    :ivar gone: when the server's process no longer built the view.
    """

    view: GatedView
    acted: float
    gone: float
    told: float | None = None


@dataclass(frozen=True)
class Scenario:
    """One way to stop a refresh.

    :ivar dag_id: whose run is stopped; None for a run at a terminal.
    :ivar act: stops it, given the run's id too; None where it ends by itself.
    :ivar error: the class in the record.
    :ivar message: a pattern in the message of the record.
    :ivar speaks: whether its process can say why it ends.
    :ivar told_by_airflow: whether the task's supervisor asks Airflow from time to time, and only then is told.
    """

    dag_id: str | None
    act: Callable[[LiveAirflow, str], object] | None
    error: str
    message: str
    speaks: bool = True
    told_by_airflow: bool = False


def _mark_task(mode: str) -> Callable[[LiveAirflow, str], None]:
    return lambda live, name: live.airflow.api.set_task_state(f"plain{mode}", name, "refresh", "failed")


def _mark_run(mode: str) -> Callable[[LiveAirflow, str], None]:
    return lambda live, name: live.airflow.api.set_run_state(f"plain{mode}", name, "failed")


def _clear(mode: str) -> Callable[[LiveAirflow, str], None]:
    return lambda live, name: live.airflow.api.clear_task(f"plain{mode}", name, "refresh")


def _signal_task(live: LiveAirflow, name: str) -> None:
    kill(live.task("plain", name)["pid"], number=signal.SIGTERM)


def _signal_worker(live: LiveAirflow, name: str) -> None:
    kill(parent_of(live.task("plain", name)["pid"]), number=signal.SIGTERM)


def _kill_worker(live: LiveAirflow, name: str) -> None:
    task = live.task("plain", name)["pid"]
    kill(parent_of(task), task)


_CANCELLED = "OperationCancelled"
_STOPPED = r"Cancelled after \d+\.\d s: Airflow stopped the (deferred )?task \(it was marked"
# A little before Airflow's own clock ends the process.
_TIMED_OUT = ("OperationTimedOut", r"Timed out after 9 s")
_CTRL_C = "ctrl_c"
SCENARIOS = {
    "dagrun_timeout": Scenario("limited_run", None, _CANCELLED, _STOPPED, told_by_airflow=True),
    "dagrun_timeout_deferred": Scenario("limited_run_deferred", None, _CANCELLED, _STOPPED),
    "execution_timeout": Scenario("limited", None, *_TIMED_OUT),
    "execution_timeout_deferred": Scenario("limited_deferred", None, *_TIMED_OUT),
    "task_marked_failed": Scenario("plain", _mark_task(""), _CANCELLED, _STOPPED, told_by_airflow=True),
    "task_marked_failed_deferred": Scenario("plain_deferred", _mark_task("_deferred"), _CANCELLED, _STOPPED),
    "run_marked_failed": Scenario("plain", _mark_run(""), _CANCELLED, _STOPPED, told_by_airflow=True),
    "run_marked_failed_deferred": Scenario("plain_deferred", _mark_run("_deferred"), _CANCELLED, _STOPPED),
    "task_cleared": Scenario("plain", _clear(""), _CANCELLED, _STOPPED, told_by_airflow=True),
    "task_cleared_deferred": Scenario("plain_deferred", _clear("_deferred"), _CANCELLED, _STOPPED),
    "task_process_sigterm": Scenario("plain", _signal_task, _CANCELLED, _STOPPED),
    "worker_sigterm": Scenario("plain", _signal_worker, _CANCELLED, _STOPPED),
    "worker_sigkill": Scenario("plain", _kill_worker, "RunLost", r"ended without a word \(killed", speaks=False),
    _CTRL_C: Scenario(None, None, "KeyboardInterrupt", r"Interrupted after \d+\.\d s by Ctrl-C"),
}
SPOKEN = tuple(name for name, scenario in SCENARIOS.items() if scenario.speaks)
CLEARED = ("task_cleared", "task_cleared_deferred")


@pytest.fixture(scope="module")
def stops(live: LiveAirflow) -> dict[str, Stop]:
    """Every way to stop a refresh, all at the same time, each on a view of its own."""
    views = {name: live.view(name) for name in SCENARIOS}
    for view in views.values():
        view.close_gate()
    builders: dict[str, int] = {}
    terminal = live.airflow.add(_CTRL_C, "dags", "test", "at_a_terminal", "--conf", f'{{"view": "{_CTRL_C}"}}')
    # Their clocks run from the beginning on: they are not to share the processors with all the others.
    timed = [name for name in SCENARIOS if "_timeout" in name]
    for names in (timed, [name for name in SCENARIOS if name not in timed]):
        for name in names:
            if (dag_id := SCENARIOS[name].dag_id) is not None:
                live.start(dag_id, name)
        builders |= {name: views[name].wait_for_first_builder() for name in names}
    acted: dict[str, float] = {}
    for name, scenario in SCENARIOS.items():
        if scenario.act is not None:
            acted[name] = time.time()
            scenario.act(live, name)
    acted[_CTRL_C] = time.time()
    terminal.ask(signal.SIGINT)

    gone = {name: views[name].wait_until_gone(builders[name]) for name in SCENARIOS}
    assert terminal.wait(30) != 0
    live.airflow.release(_CTRL_C).end(timeout=1)
    for mode in MODES:
        acted[f"dagrun_timeout{mode}"] = moment(
            live.airflow.api.run(f"limited_run{mode}", f"dagrun_timeout{mode}")["end_date"]
        )
        (run,) = views[f"execution_timeout{mode}"].runs()
        acted[f"execution_timeout{mode}"] = run["started_at"].timestamp() + LONGEST
        live.wait_for_task(f"limited{mode}", f"execution_timeout{mode}", "failed")
    stopped = {}
    for name, scenario in SCENARIOS.items():
        told = _told(live, scenario.dag_id, name) if scenario.dag_id and scenario.told_by_airflow else None
        stopped[name] = Stop(views[name], acted[name], gone[name], told)
        after = "" if told is None else f", {gone[name] - told:.2f} s after its process was told"
        sys.stdout.write(f"{name}: gone after {gone[name] - acted[name]:.2f} s{after}\n")
    return stopped


def _told(live: LiveAirflow, dag_id: str, run_id: str) -> float:
    """When the supervisor of a task's first try ended its process, by the task's log."""
    (told,) = (
        moment(entry["timestamp"])
        for entry in live.airflow.api.log_entries(live.task(dag_id, run_id), try_number=1)
        if isinstance(entry, dict) and "Terminating process" in str(entry.get("event"))
    )
    return told


@pytest.mark.parametrize("how", SCENARIOS)
def test_the_query_is_gone_soon(stops: dict[str, Stop], how: str) -> None:
    stop, scenario = stops[how], SCENARIOS[how]
    assert stop.gone - stop.acted < ANYHOW
    if scenario.told_by_airflow:
        assert stop.told is not None
        assert stop.gone - stop.told < TOLD
    elif scenario.speaks and not how.endswith("_deferred"):
        assert stop.gone - stop.acted < TOLD


@pytest.mark.parametrize("how", SPOKEN)
def test_the_record_says_why(stops: dict[str, Stop], how: str) -> None:
    (run,) = [run for run in stops[how].view.runs() if run["try_number"] == 1]
    assert (run["status"], run["error_class"]) == ("failed", SCENARIOS[how].error)
    assert re.search(SCENARIOS[how].message, run["error_message"]), run["error_message"]
    assert run["finished_at"] is not None
    assert run["duration_ms"] >= 0


def test_nothing_of_a_stopped_refresh_is_left(live: LiveAirflow, stops: dict[str, Stop]) -> None:
    # The tasks that were cleared are at work again: beside them there is no session of ours that could hold a lock.
    for how in CLEARED:
        stops[how].view.wait_for_builder()
    wait_until(lambda: {name.rpartition("/")[2] for name, *_ in live.sessions("%")} == set(CLEARED), "all are gone", 10)
    for how in SPOKEN:
        assert stops[how].view.served() == 1


@pytest.mark.parametrize("how", CLEARED)
def test_a_cleared_task_refreshes_again_and_only_once_at_a_time(
    live: LiveAirflow, stops: dict[str, Stop], how: str
) -> None:
    view = stops[how].view
    view.wait_for_builder()
    if how.endswith("_deferred"):
        live.wait_until_deferred(view.name, try_number=2)
    view.open_gate()
    live.wait_for_task(str(SCENARIOS[how].dag_id), view.name, "success")
    assert [(run["status"], run["try_number"]) for run in view.runs()] == [("failed", 1), ("success", 2)]
    assert view.served() == 2
    assert (len(view.builders()), view.most_at_once()) == (2, 1)


def test_the_next_operation_finds_what_a_killed_worker_left(live: LiveAirflow, stops: dict[str, Stop]) -> None:
    view = stops["worker_sigkill"].view
    assert [run["status"] for run in view.runs()] == ["running"]
    assert view.served() == 1
    view.open_gate()
    live.hook.refresh(view.name)
    lost, found = view.runs()
    assert (lost["status"], lost["error_class"], found["status"]) == ("failed", "RunLost", "success")
    assert re.search(SCENARIOS["worker_sigkill"].message, lost["error_message"]), lost["error_message"]
    assert view.served() == 2


def test_a_deferred_refresh_that_is_to_outlive_its_task_does(live: LiveAirflow) -> None:
    view = live.view("kept")
    view.close_gate()
    live.start("kept_deferred", view.name)
    builder = view.wait_for_builder()
    live.airflow.api.set_task_state("kept_deferred", view.name, "refresh", "failed")
    task = live.wait_for_task("kept_deferred", view.name, "failed")
    wait_until(lambda: "goes on" in live.airflow.api.log(task), "the trigger was told", 30)
    assert view.building() == {builder}
    view.open_gate()
    wait_until(lambda: [run["status"] for run in view.runs()] == ["success"], "it ends well", 30)
    assert view.served() == 2


def _defer(live: LiveAirflow, name: str) -> tuple[GatedView, int, str]:
    """Defer a refresh, and return its view, the server's process that builds it, and the triggerer behind that."""
    view = live.view(name)
    view.close_gate()
    live.start("plain_deferred", name)
    builder = view.wait_for_builder()
    ancestors = ancestors_of(live.client_of(builder))
    (triggerer,) = (name for name, pid in live.airflow.pids.items() if pid in ancestors)
    return view, builder, triggerer


@dataclass(frozen=True)
class HandOver:
    """A deferred refresh that went from one triggerer to another.

    :ivar builders: the server's processes, in order.
    :ivar after: seconds from the signal until the first one was gone.
    """

    view: GatedView
    builders: list[int]
    after: float


def _take_over(view: GatedView, first: int, acted: float) -> HandOver:
    after = view.wait_until_gone(first) - acted
    second = view.wait_for_builder()
    sys.stdout.write(f"{view.name}: gone after {after:.2f} s, taken over after {time.time() - acted:.1f} s\n")
    return HandOver(view, [first, second], after)


@pytest.fixture(scope="module")
def hand_overs(live: LiveAirflow, stops: dict[str, Stop]) -> dict[str, HandOver]:
    """One triggerer is frozen, so that it is taken for dead, the other one is killed, and a third one takes over."""
    frozen, first_of_frozen, name = _defer(live, "triggerer_frozen")
    processes = [live.airflow.pids[name], *descendants_of(live.airflow.pids[name])]
    kill(*processes, number=signal.SIGSTOP)
    try:
        killed, first_of_killed, name = _defer(live, "triggerer_sigkill")
        live.airflow.add("triggerer-3", *TRIGGERER)
        acted = kill(live.airflow.pids[name], *descendants_of(live.airflow.pids[name]))
        live.airflow.release(name).end(timeout=20)
        outcome = {"sigkill": _take_over(killed, first_of_killed, acted)}
        # The server knows nothing of the sleep: the refresh stands as it stood, and nobody else may begin one.
        wait_until(lambda: live.waiting(frozen.name) != [], "the second copy waits for the first", 60)
        assert frozen.building() == {first_of_frozen}
    finally:
        acted = kill(*processes, number=signal.SIGCONT)
    return {**outcome, "frozen": _take_over(frozen, first_of_frozen, acted)}


def _assert_done_once(live: LiveAirflow, hand_over: HandOver, error: str, message: str) -> None:
    """Let the second copy pass, and look at what both leave."""
    view = hand_over.view
    live.wait_until_deferred(view.name)
    view.open_gate()
    live.wait_for_task("plain_deferred", view.name, "success")
    lost, found = view.runs()
    assert (lost["status"], lost["error_class"], found["status"]) == ("failed", error, "success")
    assert re.search(message, lost["error_message"]), lost["error_message"]
    assert lost["try_number"] == found["try_number"] == 1
    assert view.served() == 2
    assert (view.builders(), view.most_at_once()) == (hand_over.builders, 1)


def test_a_triggerer_that_is_killed_leaves_one_refresh_and_one_success(
    live: LiveAirflow, hand_overs: dict[str, HandOver]
) -> None:
    assert hand_overs["sigkill"].after < ANYHOW
    _assert_done_once(live, hand_overs["sigkill"], "RunLost", r"ended without a word \(killed")


def test_a_triggerer_that_was_taken_for_dead_gives_way(live: LiveAirflow, hand_overs: dict[str, HandOver]) -> None:
    assert hand_overs["frozen"].after < ANYHOW
    _assert_done_once(live, hand_overs["frozen"], _CANCELLED, r"Cancelled after \d+\.\d s: ")


def test_a_triggerer_that_shuts_down_stops_its_refresh_and_another_one_does_it(
    live: LiveAirflow, hand_overs: dict[str, HandOver]
) -> None:
    view, first, name = _defer(live, "triggerer_sigterm")
    acted = kill(live.airflow.pids[name], number=signal.SIGTERM)
    process = live.airflow.release(name)
    hand_over = _take_over(view, first, acted)
    assert process.wait(60) == 0
    process.end(timeout=1)
    assert hand_over.after < TOLD
    _assert_done_once(live, hand_over, _CANCELLED, r"its triggerer was shut down, and the next one begins anew")


def test_both_modes_leave_the_same(live: LiveAirflow) -> None:
    views = {mode: live.view(name) for mode, name in zip(MODES, ("refreshed_here", "done_elsewhere"), strict=True)}
    for mode, view in views.items():
        view.close_gate()
        live.start(f"compared{mode}", view.name)
    live.wait_until_deferred(views["_deferred"].name)
    for view in views.values():
        view.wait_for_builder()
        view.open_gate()
    left: list[dict[str, Any]] = []
    for mode, view in views.items():
        task = live.wait_for_task(f"compared{mode}", view.name, "success")
        (run,) = view.runs()
        found = {
            "xcom": live.airflow.api.xcom(task),
            "events": {event["uri"]: event["extra"] for event in live.airflow.api.asset_events(f"compared{mode}")},
            "log": _story(live.airflow.api.log_entries(task)),
            "run": run,
        }
        left.append(_lasting(found, view.name))
    plain, deferred = left
    assert plain["run"]["status"] == "success"
    assert plain["xcom"]["status"] == "updated"
    assert len(plain["events"]) == 2
    assert any("REFRESH MATERIALIZED VIEW" in line for line in plain["log"])
    # What is said of the way there, and how one copy of a deferred refresh knows another.
    assert deferred["log"].pop(0).startswith("Deferred: ")
    del deferred["run"]["meta"]["deferral"]
    for part in plain:
        assert deferred[part] == plain[part]


#: What differs between any two runs.
_PASSING = re.compile(r"(^|_)(id|at|ms|wal_bytes|process)$")


def _lasting(value: Any, view: str) -> Any:
    """Return what was found of a run without times, ids, and names of its own."""
    if isinstance(value, dict):
        return {
            _lasting(key, view): _lasting(item, view) for key, item in value.items() if not _PASSING.search(str(key))
        }
    if isinstance(value, list):
        return [_lasting(item, view) for item in value]
    if isinstance(value, str):
        return re.sub(rf"{view}|_mv_[0-9a-f]{{8}}|\d+(\.\d+)? m?s\b|gate\(\d+\)", "...", value)
    return value


def _story(entries: list[Any]) -> list[str]:
    """Return what a log says of the view, by whichever process said it; not how far it was after so many seconds."""
    told = [entry for entry in entries if isinstance(entry, dict) and "matviews" in str(entry.get("logger"))]
    events = [entry["event"].strip() for entry in told]
    return [event for event in events if not event.startswith("Refreshing ")]


def test_no_two_ever_built_one_view_at_once(live: LiveAirflow, stops: dict[str, Stop]) -> None:
    assert {view.name: view.most_at_once() for view in live.views.values()} == dict.fromkeys(live.views, 1)
    assert live.twins() == 0
