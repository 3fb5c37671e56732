"""Something between clients and the server that may change, or keep back, what they say to each other."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from airflow_provider_matviews.hooks.matview import MatViewHook
from tests.conftest import Database, hook_on


class Cut(Exception):
    """Raised by a filter: the line is cut. What it is raised with is still passed on."""


#: Is given a piece of what one side said, and returns what the other side is to hear.
Filter = Callable[[bytes], bytes]


class _Proxy:
    def __init__(self, port: int, to_server: Filter, to_client: Filter) -> None:
        self._server = ("127.0.0.1", port)
        self._to_server, self._to_client = to_server, to_client
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._clients: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def close(self) -> None:
        # shutdown() wakes the accept() up, close() alone would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        # First, or a client that it has just accepted would be overlooked.
        self._threads[0].join()
        self._listener.close()
        for client in self._clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                self._clients.append(client)
                self._threads.append(threading.Thread(target=self._connect, args=(client,)))
                self._threads[-1].start()

    def _connect(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server:
            answers = threading.Thread(target=self._pass_on, args=(server, client, self._to_client))
            answers.start()
            self._pass_on(client, server, self._to_server)
            answers.join()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket, changed: Filter) -> None:
        with suppress(OSError):
            try:
                while said := source.recv(65536):
                    target.sendall(changed(said))
            except Cut as cut:
                # To the source the line is dead before the target has heard the last of it.
                source.shutdown(socket.SHUT_RDWR)
                target.sendall(b"".join(cut.args))
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextmanager
def hook_through(database: Database, to_server: Filter = bytes, to_client: Filter = bytes) -> Iterator[MatViewHook]:
    """Yield a hook on a test's database whose connections go through filters."""
    proxy = _Proxy(database.server.port, to_server, to_client)
    try:
        hook = hook_on(database)
        hook.connection.port = proxy.port
        yield hook
    finally:
        proxy.close()
