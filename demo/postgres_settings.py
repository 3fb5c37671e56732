"""The configuration of a private PostgreSQL server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_SETTINGS = {
    "max_connections": "100",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
}
# Not synchronous_commit: what was committed has to be there after an immediate restart.
_SETTINGS_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}


def write_settings(data_dir: Path, settings: Mapping[str, str], *, durable: bool) -> None:
    """Write the settings into a file of their own, which postgresql.conf includes.

    Not as options of the command line: those would win over ALTER SYSTEM.

    :param data_dir: the data directory of a server that does not run.
    :param settings: what to set, in addition to small defaults.
    :param durable: whether a commit waits for the disk.
    """
    effective = {**_SETTINGS, **({} if durable else _SETTINGS_NOT_DURABLE), **settings}
    own = data_dir / "postgres_server.conf"
    own.write_text("".join(f"{name} = {_quoted(value)}\n" for name, value in effective.items()))
    own.chmod(0o644)  # The server may run as another user.
    main = data_dir / "postgresql.conf"
    include = f"include = '{own.name}'\n"
    if include not in (text := main.read_text()):
        main.write_text(f"{text}\n{include}")


def _quoted(value: str) -> str:
    escaped = value.replace("'", "''")
    return f"'{escaped}'"
