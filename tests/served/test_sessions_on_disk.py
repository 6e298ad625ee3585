"""A session's KV blocks outlive the attention worker that computed them, and the whole server."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.server import GOOD, Served, running_server
from benchmarks.harness.stalls import wait_until

pytestmark = pytest.mark.ray

PROMPT = "ROMEO: " + "But, soft! what light through yonder window breaks? " * 8
MIB = 2**20


SESSION = {**GOOD, "prompt": PROMPT, "prompt_cache_key": "s", "cache_ttl": 600}


def ask(server: Served) -> tuple[Any, int]:
    """Text and tokens of the session's turn, and the cached tokens of its prompt."""
    answer = server.complete(**SESSION)
    return answer["choices"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def attention_worker(server: Served) -> dict[str, Any]:
    """The one that serves; empty before it does."""
    status = server.status()
    found = [w for w in status["workers"] if (w["role"], w["state"]) == ("attention", "SERVING")]
    return found[0] if status["state"] == "SERVING" and len(found) == 1 else {}


def number(server: Served, name: str) -> float:
    """One of its numbers about the disk, 0 before it has told it."""
    stats = attention_worker(server).get("stats", {})
    return float(stats.get(f'{name}{{tier="disk"}}', 0.0))


@pytest.mark.slow
def test_a_session_outlives_its_worker_and_its_server(tmp_path: Path) -> None:
    words = ["--deterministic", "--kv-host-bytes", "16M", "--kv-disk-bytes", "64M"]
    words += ["--kv-disk-dir", str(tmp_path / "kv")]
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with running_server(first, *words) as server:
        expected, cached = ask(server)
        assert cached == 0
        wait_until(lambda: number(server, "kv_tier_bytes") > 0, "blocks on disk")
        written = sorted(path.name for path in (tmp_path / "kv").rglob("*.kv"))
        victim = attention_worker(server)["pid"]
        os.kill(victim, signal.SIGKILL)
        wait_until(
            lambda: attention_worker(server).get("pid", victim) != victim,
            "another attention worker",
        )
        found, cached = ask(server)
        assert (found, cached > 0) == (expected, True)
        wait_until(lambda: number(server, "kv_restore_tokens_total") == cached, "a restore")
        assert number(server, "kv_tier_broken_total") == 0
    assert {path.name for path in (tmp_path / "kv").rglob("*.kv")} >= {*written}
    with running_server(second, *words) as server:
        found, again = ask(server)
        assert (found, again) == (expected, cached)
        wait_until(lambda: number(server, "kv_restore_tokens_total") == cached, "a restore")
