"""Runs one command, and ends it when the Python process that asked for it goes away.

`postgres_server` starts this file as a script, never imports it. It is a process of its own because only a
process that outlives its parent can clean up after a parent that was killed with SIGKILL. It also is the place
to change identity: PostgreSQL refuses to run as root, and neither a user namespace nor another user id can be
entered by the parent without changing the parent itself.

Usage: `server_guard.py SPEC`, where SPEC is a JSON object:

- `command`: the command line to run.
- `log`: the file that receives its output.
- `own_session`: whether it gets a session of its own, and with it every process of that session its signals and,
  when it has ended, a last SIGKILL.
- `namespace_uid`, `namespace_gid`: the ids the process sees as its own in a new user namespace, or null.
- `user_id`, `group_id`: the ids to switch the command to, or null.
- `orphan_signal`: what the command receives when the parent has died.
- `orphan_remove`: a directory to remove after that, or null.

The first line on standard output is the command's process id. A line on standard input is the number of a signal
to pass on; end of file there means that the parent has died. The exit status is the command's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1
ESCALATE_AFTER_SECONDS = 10.0


def enter_user_namespace(uid: int, gid: int) -> None:
    """Make this process, outside still its old user, appear as uid and gid to itself and to its children.

    :param uid: the user id to appear as; it needs an entry in the user database, which initdb looks up.
    :param gid: the group id to appear as.
    :raises OSError: when the kernel or the container refuses user namespaces.
    """
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    # The kernel accepts a gid_map of an unprivileged process only after setgroups has been given up.
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {outer_uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {outer_gid} 1")


def start(spec: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the command so that it also ends when this guard is killed (Linux only: elsewhere it would stay)."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    guard = os.getpid()

    def follow_guard() -> None:
        # After the change of user, because that clears the setting.
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, spec["orphan_signal"], 0, 0, 0)
            if os.getppid() != guard:
                os._exit(1)

    with Path(spec["log"]).open("ab") as log:
        identity: dict[str, Any] = {}
        if spec["user_id"] is not None:
            identity = {"user": spec["user_id"], "group": spec["group_id"], "extra_groups": []}
        return subprocess.Popen(
            spec["command"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=spec["own_session"],
            preexec_fn=follow_guard,  # noqa: PLW1509 - this process has one thread
            **identity,
        )


def send(process: subprocess.Popen[bytes], number: int, *, to_group: bool) -> None:
    """Send a signal to the command, or to its process group."""
    if not to_group:
        process.send_signal(number)
    elif process.poll() is None:
        os.killpg(process.pid, number)


def sweep_session(session: int) -> None:
    """Kill what is left of a session: a process that moved to a group of its own outlives its leader's group."""
    for _ in range(100):
        members = [pid for pid in _processes() if _session_of(pid) == session]
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def _session_of(pid: int) -> int | None:
    try:
        # The second field, the name, may hold blanks and parentheses; what follows the last one does not.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[3]) if fields[0] != "Z" else None


def watch(process: subprocess.Popen[bytes], orphan_signal: int, *, to_group: bool) -> bool:
    """Wait for the command to end, passing on what the parent asks for.

    :returns: True when the parent went away first.
    """
    parent = os.getppid()
    asked_to_end: list[int] = []
    wake, wake_write = socket.socketpair()
    wake.setblocking(False)
    wake_write.setblocking(False)
    signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked_to_end.append(number))

    while process.poll() is None:
        # The time-out is for a parent that died while a forked child of it still holds the pipe open.
        readable, _, _ = select.select([0, wake.fileno()], [], [], 1.0)
        if wake.fileno() in readable:
            wake.recv(4096)
        message = os.read(0, 4096) if 0 in readable else None
        if message:
            for line in message.split():
                send(process, int(line), to_group=to_group)
        elif message == b"" or asked_to_end or os.getppid() != parent:
            end(process, orphan_signal, to_group=to_group)
            return True
    return False


def end(process: subprocess.Popen[bytes], orphan_signal: int, *, to_group: bool) -> None:
    """End the command: politely, then by PostgreSQL's immediate shutdown, then by force."""
    for number in (orphan_signal, signal.SIGQUIT, signal.SIGKILL):
        send(process, number, to_group=to_group)
        try:
            process.wait(ESCALATE_AFTER_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return


def main() -> int:
    """Run what the first argument describes."""
    spec = json.loads(sys.argv[1])
    if spec["namespace_uid"] is not None:
        enter_user_namespace(spec["namespace_uid"], spec["namespace_gid"])
    process = start(spec)
    sys.stdout.write(f"{process.pid}\n")
    sys.stdout.flush()
    orphaned = watch(process, spec["orphan_signal"], to_group=spec["own_session"])
    if spec["own_session"]:
        sweep_session(process.pid)
    if orphaned and spec["orphan_remove"]:
        shutil.rmtree(spec["orphan_remove"], ignore_errors=True)
    return process.wait() & 0xFF


if __name__ == "__main__":
    sys.exit(main())
