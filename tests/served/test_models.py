"""Two models behind one gateway in one private Ray; a worker of one of them is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.harness.server import WAIT_S, Served, running_server
from benchmarks.harness.stalls import wait_until
from cluster.launch.model_source import bundled_checkpoint
from expertmesh import LLM, SamplingParams
from tests.fakes import TINY_CONFIG, write_tiny_checkpoint

pytestmark = pytest.mark.ray

FIRST, SECOND = "first", "second"
NUM_TOKENS = 200
"""Of each answer."""
BEFORE_TOKENS = 5
"""Tokens that each stream has before the worker is killed."""
PROMPT = tuple(range(10, 30))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second model: small, without a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_tiny_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, list[int]]:
    """The tokens of each model alone, in this process."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    found = {}
    for name, path in ((FIRST, None), (SECOND, str(checkpoint))):
        with LLM(path, dtype="float32", deterministic="on", num_threads=1) as llm:
            (result,) = llm.generate([PROMPT], params)
            found[name] = list(result.outputs[0].token_ids)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("state")
    models = [
        {"model": str(bundled_checkpoint()), "served-model-name": FIRST},
        {"model": str(checkpoint), "served-model-name": SECOND, "num-expert-workers": 2},
    ]
    (folder / "models.yaml").write_text(json.dumps({"models": models}))
    words = ("--config", str(folder / "models.yaml"), "--deterministic", "--kv-cache-bytes", "16M")
    with running_server(folder, *words) as server:
        yield server


def body_of(model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": list(PROMPT), "max_tokens": NUM_TOKENS, "temperature": 0}
    return {**body, "ignore_eos": True, "return_token_ids": True, **fields}


def answer(server: Served, model: str) -> list[int]:
    tokens: list[int] = server.complete(**body_of(model))["choices"][0]["token_ids"]
    return tokens


def status_of(server: Served, model: str) -> dict[str, Any]:
    found = server.client.get("/cluster/v1/status", params={"model": model})
    assert found.status_code == 200, found.text
    status: dict[str, Any] = found.json()
    return status


def test_both_answer_as_each_alone(server: Served, expected: dict[str, list[int]]) -> None:
    assert expected[FIRST] != expected[SECOND]
    assert {model: answer(server, model) for model in (FIRST, SECOND)} == expected
    unnamed = {name: value for name, value in body_of(FIRST).items() if name != "model"}
    assert server.complete(**unnamed)["model"] == FIRST
    models = server.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == [FIRST, SECOND]
    assert models[1]["max_model_len"] == TINY_CONFIG["max_position_embeddings"]
    unknown = server.client.post("/v1/completions", json=body_of("third"))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert server.status()["models"] == [
        {"name": model, "revision": "1", "state": "SERVING", "num_workers": 3}
        for model in (FIRST, SECOND)
    ]
    workers = [status_of(server, model)["workers"] for model in (FIRST, SECOND)]
    names = [[worker["name"] for worker in found] for found in workers]
    assert names[0] == names[1] == ["attention-0", "expert-0", "expert-1"]
    assert not {w["pid"] for w in workers[0]} & {w["pid"] for w in workers[1]}


def tokens_of(events: Iterator[str]) -> Iterator[int]:
    """The tokens of a stream as they arrive; a stream that breaks fails the test."""
    for line in events:
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                yield from choice.get("token_ids") or []


def test_a_killed_worker_of_one_model_harms_neither(
    server: Served, expected: dict[str, list[int]]
) -> None:
    before = {model: status_of(server, model) for model in (FIRST, SECOND)}
    (victim,) = [w for w in before[SECOND]["workers"] if w["name"] == "expert-1"]
    found: dict[str, list[int]] = {}
    with ExitStack() as stack:
        streams = {}
        for model in (FIRST, SECOND):
            client = stack.enter_context(httpx.Client(base_url=server.http, timeout=WAIT_S))
            call = client.stream("POST", "/v1/completions", json=body_of(model, stream=True))
            streams[model] = tokens_of(stack.enter_context(call).iter_lines())
            found[model] = [next(streams[model]) for _ in range(BEFORE_TOKENS)]
        os.kill(victim["pid"], signal.SIGKILL)
        for model, tokens in streams.items():
            found[model] += tokens
    assert found == expected
    wait_until(lambda: len(serving(server)) == 3, "a new worker of the second model")
    assert victim["pid"] not in serving(server)
    assert status_of(server, SECOND)["generation"] > before[SECOND]["generation"]
    assert status_of(server, FIRST)["generation"] == before[FIRST]["generation"]
    assert {model: answer(server, model) for model in (FIRST, SECOND)} == expected


def serving(server: Served) -> list[int]:
    """Processes of the second model's workers that serve."""
    workers = status_of(server, SECOND)["workers"]
    return [worker["pid"] for worker in workers if worker["state"] == "SERVING"]
