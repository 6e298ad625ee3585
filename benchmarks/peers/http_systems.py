"""Servers that are measured over HTTP: processes of expertmesh and vLLM with one model each."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.report.timing import Times
from cluster.launch.plan import free_port

HOST = "127.0.0.1"
START_LIMIT_S = 600.0
"""Longest start of a server; some compile first."""
BATCH_LIMIT_S = 600.0
"""Longest time for one batch."""
_END_LIMIT_S = 60.0
_POLL_S = 0.5
_PROBE_LIMIT_S = 5.0
_SOURCE = Path(__file__).resolve().parents[2]


class HttpSystem:
    """One server process with its log file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        url: str,
        ready_path: str,
        log: Path,
    ) -> None:
        """Start the server, with output to ``log``; ``ready_path`` returns 200 when it serves."""
        self.url = url
        self._name, self._ready_url, self._log = name, f"{url}{ready_path}", log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT
            )

    def wait_loaded(self) -> None:
        """Wait until the server serves. Raises ``RuntimeError`` if it does not start."""
        deadline = time.monotonic() + START_LIMIT_S
        while not self._is_ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._name} ended: {_last_line(self._log)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._name} is not ready after {START_LIMIT_S:g} s")
            time.sleep(_POLL_S)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._ready_url, timeout=_PROBE_LIMIT_S) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
        """Serve a batch of concurrent requests; returns the seconds to each token of each sequence.

        Raises ``RuntimeError`` for a request that fails or has another number of tokens.
        """
        times = asyncio.run(stream_all(f"{self.url}/v1/completions", prompts, new_tokens))
        wrong = [len(t) for t in times if len(t) != new_tokens]
        if wrong:
            raise RuntimeError(f"{self._name} made {wrong[0]} tokens instead of {new_tokens}")
        return times

    def close(self) -> None:
        """End the process and its children."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_END_LIMIT_S)


def start_ours(name: str, checkpoint: Path, dtype: str, layout: Sequence[str]) -> HttpSystem:
    """Start ``expertmesh serve`` with ``options``, and defaults otherwise."""
    port = free_port(HOST)
    command = [
        *(sys.executable, "-m", "cluster.cli.main", "serve", str(checkpoint)),
        *("--port", str(port), "--grpc-port", "0", "--dtype", dtype, *layout),
        *("--served-model-name", "model", "--drain-lead-s", "0"),
    ]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EXPERTMESH_", "RAY_"))}
    ours = {"PYTHONPATH": str(_SOURCE), "EXPERTMESH_PARENT": str(os.getpid())}
    return HttpSystem(
        name,
        command,
        {**kept, **ours},
        f"http://{HOST}:{port}",
        "/ready",
        checkpoint.parent / f"ours-{port}.log",
    )


def start_vllm(
    name: str, folder: Path, checkpoint: Path, dtype: str, cores: Sequence[int], tokens: int
) -> HttpSystem:
    """Start ``vllm serve`` of the virtual environment ``folder`` on these cores.

    ``tokens`` is the longest sequence.
    """
    port = free_port(HOST)
    command = [
        *(str(folder / "bin" / "vllm"), "serve", str(checkpoint), "--dtype", dtype),
        *("--host", HOST, "--port", str(port), "--served-model-name", "model"),
        *("--max-model-len", str(tokens)),
    ]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    settings = {
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; by default half of the memory
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{folder / 'bin'}{os.pathsep}{kept.get('PATH', '')}",  # of its compiler's helpers
    }
    return HttpSystem(
        name,
        command,
        {**kept, **settings},
        f"http://{HOST}:{port}",
        "/health",
        checkpoint.parent / f"vllm-{port}.log",
    )


async def stream_all(url: str, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
    """Stream all prompts, each on a separate connection."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=BATCH_LIMIT_S),
    ) as session:
        start = time.perf_counter()
        calls = [_stream(session, url, prompt, new_tokens, start) for prompt in prompts]
        try:
            return await asyncio.gather(*calls)
        except (aiohttp.ClientError, TimeoutError) as err:
            raise RuntimeError(f"{url}: {type(err).__name__}: {err}") from err


async def _stream(
    session: aiohttp.ClientSession,
    url: str,
    prompt: Sequence[int],
    new_tokens: int,
    start: float,
) -> list[float]:
    """Stream one completion; returns the seconds from ``start`` to each of its tokens."""
    body = {
        "model": "model",
        "prompt": list(prompt),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    times: list[float] = []
    async with session.post(url, json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{url}: {answer.status}: {(await answer.text())[:500]}")
        async for line in answer.content:
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                now = time.perf_counter() - start
                times += [now] * _num_tokens(json.loads(line[5:]))
    return times


def _num_tokens(event: Mapping[str, Any]) -> int:
    """Number of tokens in an event. Raises ``RuntimeError`` if the event reports an error."""
    if "error" in event:
        raise RuntimeError(str(event["error"]))
    return sum(len(choice.get("token_ids") or ()) for choice in event["choices"])


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no word"
