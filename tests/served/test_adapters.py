"""Adapters of ``serve`` as users have them: named at the start, loaded, killed under, unloaded."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from benchmarks.checkpoints.adapters import random_adapter, target_shapes
from benchmarks.harness.distributed import free_ports
from benchmarks.harness.server import GOOD, WAIT_S, Served, running_server
from benchmarks.harness.stalls import wait_until
from cluster.launch.model_source import bundled_checkpoint
from protos import inference_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.observability.scrape import Scrape

pytestmark = pytest.mark.ray


def stream_text(server: Served, model: str, fault: Any) -> str:
    """A long greedy text; ``fault`` is called when it has begun."""
    text, body = "", {"model": model, "prompt": "ROMEO:", "max_tokens": 300, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True}
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        for number, line in enumerate(answer.iter_lines()):
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            if number == 20:
                fault()
    return text


def test_adapters_of_a_server(tmp_path: Path) -> None:
    shapes = target_shapes(bundled_checkpoint())
    folders = {n: random_adapter(shapes, s).write(tmp_path / n) for n, s in (("a", 1), ("b", 2))}
    port, grpc_port = free_ports(2)
    words = ["--num-attention-workers", "2", "--num-gateway-replicas", "2", "--deterministic"]
    words += ["--admin-port", str(port), "--admin-grpc-port", str(grpc_port)]
    words += ["--lora-modules", f"a={folders['a']}", "--max-loras", "2"]
    with running_server(tmp_path, *words) as server:
        base = server.complete(**GOOD)["choices"]
        adapted = server.complete(**GOOD, model="a")["choices"]
        assert adapted != base
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as admin:
            order = {"lora_name": "b", "lora_path": str(folders["b"])}
            assert admin.post("/v1/load_lora_adapter", json=order).status_code == 200
            for _ in range(8):  # whatever replica answers
                found = {
                    m["id"]: m["parent"] for m in server.client.get("/v1/models").json()["data"]
                }
                assert list(found) == [next(iter(found)), "a", "b"]
                assert found["a"] == found["b"] == next(iter(found))
            scrape = Scrape.of(server.client.get("/metrics").text)
            assert scrape.label_values()["lora_name"] == {"a", "b"}
            assert scrape.value("lora_adapters_loaded") == 2 * 2
            expected = stream_text(server, "b", lambda: None)
            (victim, *_) = [w for w in server.status()["workers"] if w["role"] == "attention"]
            assert (
                stream_text(server, "b", lambda: os.kill(victim["pid"], signal.SIGKILL)) == expected
            )
            (victim, *_) = [
                w for w in server.status()["workers"] if w["role"] == "expert" and w["pid"]
            ]
            assert (
                stream_text(server, "b", lambda: os.kill(victim["pid"], signal.SIGKILL)) == expected
            )
            wait_until(lambda: server.status()["state"] == "SERVING", "a whole cluster")
            order = {"lora_name": "a"}
            assert admin.post("/v1/unload_lora_adapter", json=order).status_code == 200
            missing = server.client.post("/v1/completions", json={**GOOD, "model": "a"})
            assert missing.status_code == 404
            assert missing.json()["error"]["code"] == "model_not_found"
        with grpc.insecure_channel(server.grpc) as channel:
            asked = inference_pb2.GenerateRequest(model="b", text="ROMEO:")
            asked.sampling_params.max_tokens = 4
            assert InferenceStub(channel).Generate(asked, timeout=WAIT_S).model == "b"
        assert server.complete(**GOOD)["choices"] == base
