"""Pretend hosts without Ray: they die, come back, and leave nothing behind."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from tests.pretend_hosts.hosts import NodeHosts, address_of, wait_until, why_not


def started_with(state: Path) -> list[int]:
    """Processes that have that folder in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"NETSIM_STATE={state}\0".encode() in (folder / "environ").read_bytes() + b"\0":
                found.append(int(folder.name))
    return found


def test_a_host_dies_and_comes_back_and_all_of_it_ends(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    hosts = NodeHosts(tmp_path)
    state = tmp_path / "n"
    try:
        hosts.run("up", "2")
        hosts.begin("h1", "sleep", "600")
        hosts.kill("h0")
        wait_until(lambda: hosts.boots("h0"), "h0 is quite gone")
        assert hosts.run("exec", "h0", "hostname") == "h0\n"
        assert address_of("h0") in hosts.run("exec", "h0", "ip", "addr", "show", "dev", "eth0")
        assert started_with(state)
    finally:
        hosts.close()
    wait_until(lambda: not started_with(state), "all processes have ended")
    assert not state.exists()
