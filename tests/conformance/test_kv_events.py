"""KV events of a real engine, read with vLLM's own types by a program of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.harness.distributed import free_ports
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from tests.harness.clients import program, vllm_module
from workers.requests.request import Request, SamplingParams

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROGRAM = Path(__file__).parent / "clients" / "use_vllm_kv_events.py"
TOPIC = "kv@10.0.0.4@model"
LIMIT_S = 240.0


def test_vllm_s_own_types_read_them(tiny_checkpoint: Path) -> None:
    python, module = program("python", "zmq"), vllm_module()
    endpoint, replay = (f"tcp://127.0.0.1:{port}" for port in sorted(free_ports(2)))
    events = {
        "kv_events_endpoint": endpoint,
        "kv_events_replay_endpoint": replay,
        "kv_events_topic": TOPIC,
    }
    config = make_config(tiny_checkpoint, kv_events=events)
    with serving(ThreadCluster(config)) as cluster:
        stream = cluster.stream()
        words = [python, str(PROGRAM), str(module), endpoint, replay, TOPIC]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        asked: list[tuple[int, ...]] = []
        while child.poll() is None:  # until it has subscribed, and has got one
            number = len(asked)
            request = Request(
                request_id=f"r{number}",
                prompt=tuple(range(3 + number % 40, 43 + number % 40)),
                params=SamplingParams(max_tokens=1),
            )
            asked.append(request.prompt)
            stream.finish([request])
        output, errors = child.communicate(timeout=LIMIT_S)
        stream.close()
    assert child.returncode == 0, errors
    prefixes = {tuple(tokens) for tokens in json.loads(output)}
    assert prefixes
    size = config.engine.block_size_tokens
    assert {len(p) % size for p in prefixes} == {0}
    assert all(any(prompt[: len(p)] == p for prompt in asked) for p in prefixes)
