"""Starts a command under `server_guard`, as a user whom PostgreSQL accepts."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GUARD = Path(__file__).with_name("server_guard.py")


@dataclass(frozen=True)
class Identity:
    """Who a server runs as: this user (both None), this user under other ids, or another user.

    :param namespace: user and group id to appear as in a user namespace; to the outside nothing changes.
    :param user: user and group id to switch to.
    """

    namespace: tuple[int, int] | None = None
    user: tuple[int, int] | None = None


@functools.cache
def server_identity() -> Identity:
    """Choose an identity that PostgreSQL accepts: not root, and known to the user database.

    A user namespace comes first, because the files stay those of the current user.

    :raises OSError: when there is none.
    """
    known = {entry.pw_uid: entry for entry in pwd.getpwall()}
    if os.geteuid() != 0 and os.geteuid() in known:
        return Identity()
    by_name = {entry.pw_name: entry for entry in known.values()}
    other = by_name.get("nobody") or next((e for uid, e in sorted(known.items()) if uid != 0), None)
    if other is None:
        raise OSError("PostgreSQL refuses to run as root, and the system has no other user")
    ids = (other.pw_uid, other.pw_gid)
    code = f"import server_guard; server_guard.enter_user_namespace({ids[0]}, {ids[1]})"
    probe = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=GUARD.parent, capture_output=True, text=True, check=False
    )
    if probe.returncode == 0:
        return Identity(namespace=ids)
    if os.geteuid() == 0:
        return Identity(user=ids)
    raise OSError(
        f"user id {os.geteuid()} has no entry in the user database, which PostgreSQL needs, and a user "
        f"namespace is refused here: {probe.stderr.strip()[-300:]}"
    )


class GuardedProcess:
    """A command that ends when this process does, even by SIGKILL.

    Its attribute ``pid`` is the command's process id, 0 when it could not be started.

    :param command: the command line.
    :param work_dir: where it runs; removed when this process dies before the command.
    :param log: the file that receives the output.
    :param orphan_signal: what the command receives when this process dies first.
    :param identity: who it runs as.
    :param own_session: whether it leads a session of its own, all of which ends with it.
    :param environment: its environment.
    """

    def __init__(
        self,
        command: Sequence[object],
        *,
        work_dir: Path,
        log: Path,
        orphan_signal: signal.Signals,
        identity: Identity,
        own_session: bool = False,
        environment: Mapping[str, str],
    ) -> None:
        namespace, user = identity.namespace or (None, None), identity.user or (None, None)
        spec = {
            "command": [str(part) for part in command],
            "log": str(log),
            "own_session": own_session,
            "namespace_uid": namespace[0],
            "namespace_gid": namespace[1],
            "user_id": user[0],
            "group_id": user[1],
            "orphan_signal": int(orphan_signal),
            "orphan_remove": str(work_dir),
        }
        with log.open("ab") as errors:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,  # What a dead guard did not read must not be written again on close.
                cwd=work_dir,  # The command's user may not be allowed into the caller's directory.
                env=dict(environment),
                start_new_session=True,  # Ctrl-C in a terminal is for the caller, who then ends the command.
            )
        assert self._guard.stdout is not None
        self.pid = int(self._guard.stdout.readline() or 0)
        self._guard.stdout.close()

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._guard.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for it to end and return its exit status.

        :raises subprocess.TimeoutExpired: when it goes on for longer.
        """
        return self._guard.wait(timeout)

    def ask(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens when it has ended."""
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(b"%d\n" % number)

    def end(self, *signals: signal.Signals, timeout: float) -> None:
        """End it by the first signal that does, at last by SIGKILL.

        :param signals: what to try, in this order.
        :param timeout: how many seconds to wait after each.
        """
        assert self._guard.stdin is not None
        for number in (*signals, signal.SIGKILL):
            self.ask(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(timeout)
                break
        self._guard.stdin.close()
        self.wait()
