"""Readers in a loop, in processes of their own, who note what they feel."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection as Pipe
from multiprocessing.synchronize import Event

import psycopg


def read_in_a_loop(dsn: str, statement: str, stop: Event, pipe: Pipe) -> None:
    """Query until told to stop, then send the longest time in milliseconds, how many reads, and how many failed."""
    longest, queries, failed = 0.0, 0, 0
    with psycopg.connect(dsn, autocommit=True) as connection:
        pipe.send("ready")
        while not stop.is_set():
            begun = time.perf_counter()
            try:
                connection.execute(statement, (queries % 80000,))
            except psycopg.Error:
                failed += 1
            longest = max(longest, (time.perf_counter() - begun) * 1000)
            queries += 1
            time.sleep(0.001)
    pipe.send((longest, queries, failed))


class Readers:
    """Readers in processes of their own, one for each statement, for the length of a ``with`` block.

    ``longest`` (milliseconds), ``queries`` and ``failed`` are known after it.

    :param reads: the statements; each takes a number below 80,000.
    """

    def __init__(self, dsn: str, *reads: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._readers = []
        for statement in reads:
            pipe, theirs = context.Pipe()
            process = context.Process(target=read_in_a_loop, args=(dsn, statement, self._stop, theirs), daemon=True)
            self._readers.append((process, pipe))
        self.longest, self.queries, self.failed = 0.0, 0, 0

    def __enter__(self) -> Readers:
        for process, _ in self._readers:
            process.start()
        for _, pipe in self._readers:
            pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for process, pipe in self._readers:
            longest, queries, failed = pipe.recv()
            self.longest = max(self.longest, longest)
            self.queries += queries
            self.failed += failed
            process.join()
