"""TCP ports for servers that listen on the loopback address."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Find a TCP port of the loopback address that nobody uses now; somebody may take it a moment later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
