"""Streams of HTTP clients on a pretended host, and the longest pause that a fault makes in them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from benchmarks.faults.load import Line, Load
from tests.pretend_hosts.hosts import TIMEOUT_S
from tests.pretend_hosts.role_hosts import RoleHosts, url_of


class HostLoad(Load):
    """``host_clients`` on the host of a gateway, seen from here."""

    def __init__(self, hosts: RoleHosts, entry: str, num_clients: int, num_tokens: int) -> None:
        super().__init__(num_clients)
        self._hosts = hosts
        self._entry = entry
        self._words = [url_of(entry), str(num_clients), str(num_tokens)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """All clients ask, for the length of a ``with`` block."""
        self.lines[:] = [Line() for _ in self.lines]
        words = [sys.executable, "-m", "tests.long.host_clients", *self._words]
        log = self._hosts.folder / "clients.log"
        clients = self._hosts.start(self._entry, *words, log=log)
        assert clients.stdout is not None
        reader = threading.Thread(target=self._read, args=(clients.stdout,), daemon=True)
        reader.start()
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(clients.pid, signal.SIGKILL)
            clients.wait(TIMEOUT_S)
            reader.join(TIMEOUT_S)
            clients.stdout.close()

    def _read(self, output: IO[str]) -> None:
        for text in output:
            number, event, what = text.rstrip("\n").split(" ", 2)
            line = self.lines[int(number)]
            if event == "call":
                line.calls.append([])
            elif event == "delta":
                line.calls[-1].append(float(what))
            else:
                self.failures.append(what)
