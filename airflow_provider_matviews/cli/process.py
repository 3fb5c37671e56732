"""What kind of process a command runs in, as Airflow sees it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

#: Airflow's own commands that read connections set it, too (3.2 to 3.3: ``airflow connections get``).
_CONTEXT = "_AIRFLOW_PROCESS_CONTEXT"


@contextmanager
def with_connections_of_airflow() -> Iterator[None]:
    """Have connections found where people keep them, Airflow's own database included.

    Outside of a task and of Airflow's servers they are otherwise looked for in the environment and in secrets backends
    alone (Airflow 3.3.2, ``ensure_secrets_backend_loaded``).
    """
    before = os.environ.get(_CONTEXT)
    os.environ[_CONTEXT] = "server"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CONTEXT]
        else:
            os.environ[_CONTEXT] = before
