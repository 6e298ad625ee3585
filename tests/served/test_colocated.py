"""``serve --mode colocated`` as users meet it: status, answers, and a killed worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.harness.server import WAIT_S, Served, command, running_server
from benchmarks.harness.stalls import Limit
from cluster.core.process import count_cpus
from expertmesh import LLM, SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_TOKENS = 400
PROMPTS = [tuple(range(10 + i, 20 + 5 * i)) for i in range(6)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two colocated workers, each with a copy of the other's experts."""
    words = ["--mode", "colocated", "--num-expert-workers", "2", "--num-redundant-experts", "32"]
    words.append("--deterministic")
    with running_server(tmp_path_factory.mktemp("state"), *words) as server:
        yield server


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The tokens of the model in this process."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(dtype="float32", deterministic="on", num_threads=1) as llm:
        return [result.outputs[0].token_ids for result in llm.generate(PROMPTS, params)]


def ask(server: Served, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """Tokens of one completion; none where it failed."""
    body = {"prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0}
    answer = server.client.post(
        "/v1/completions", json={**body, "ignore_eos": True, "return_token_ids": True}
    )
    if answer.status_code >= 500:
        return []
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def read(server: Served, *words: str) -> Any:
    """What a reading command prints as JSON."""
    done = subprocess.run(
        command("--url", server.http, "--json", *words),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_both_workers_are_shown_with_requests_and_experts(pair: Served) -> None:
    status = read(pair, "status")
    assert (status["mode"], status["mode_reason"]) == ("colocated", "")
    workers = status["workers"]
    assert [(w["name"], w["role"], w["rank"]) for w in workers] == [
        ("colocated-0", "colocated", 0),
        ("colocated-1", "colocated", 1),
    ]
    assert [w["slots"] for w in workers] == [64, 64]
    assert all(w["kv_blocks_total"] > 0 and w["engine_address"] for w in workers)
    assert [w["threads"] for w in workers] == [max(1, count_cpus() // 2)] * 2
    (bank, *_) = read(pair, "placement")["banks"]
    assert [len(slots) for slots in bank["physical_to_logical"]] == [64, 64]


def together(server: Served, num_tokens: int, meanwhile: Callable[[], None]) -> list[list[int]]:
    """All prompts at once; by prompt its tokens, none where the answer is an error."""
    found: list[list[int]] = [[] for _ in PROMPTS]

    def run(i: int) -> None:
        found[i] = ask(server, PROMPTS[i], num_tokens)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    meanwhile()
    for thread in threads:
        thread.join(WAIT_S)
    return found


def wait_for(server: Served, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The status as soon as it is as asked for."""
    limit = Limit(WAIT_S)
    while not is_so(status := server.status()):
        assert not limit.is_over(), f"never so: {status}"
    return status


def test_answers_are_the_local_engines(pair: Served, expected: list[list[int]]) -> None:
    found = together(pair, 24, lambda: None)
    assert found == [tokens[:24] for tokens in expected]
    served = [w["stats"]["generation_tokens_total"] for w in pair.status()["workers"]]
    assert all(served), "one of the workers served nobody"


def test_requests_of_a_killed_worker_go_on_at_the_other(
    pair: Served, expected: list[list[int]]
) -> None:
    """The last test of this module: the one that led is lost, and another takes its place."""

    def all_run(status: dict[str, Any]) -> bool:
        return all(w["stats"]["num_requests_running"] > 0 for w in status["workers"])

    def kill() -> None:
        workers = wait_for(pair, all_run)["workers"]
        os.kill(workers[0]["pid"], signal.SIGKILL)

    assert together(pair, NUM_TOKENS, kill) == expected
    status = wait_for(pair, lambda s: s["generation"] >= 3 and s["state"] == "SERVING")
    assert [w["state"] for w in status["workers"]] == ["LOST", "SERVING", "SERVING"]
    assert together(pair, 24, lambda: None) == [tokens[:24] for tokens in expected]
