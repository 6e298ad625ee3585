"""Revisions of a model in a private Ray: beside the first one, and in its place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.harness.server import WAIT_S, Served, running_server
from benchmarks.harness.stalls import wait_until
from expertmesh import LLM, SamplingParams
from tests.fakes import TINY_CONFIG, tiny_tensors, write_tiny_checkpoint

pytestmark = pytest.mark.ray

MODEL, FIRST, SECOND = "tiny", "1", "tuned"
NUM_TOKENS = 40
"""Of each answer."""
PROMPT = tuple(range(10, 30))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of each revision."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {FIRST: folder / MODEL, SECOND: folder / SECOND}
    for seed, path in enumerate(paths.values()):
        write_tiny_checkpoint(path, tensors=tiny_tensors(TINY_CONFIG, seed=seed))
    return paths


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, list[int]]:
    """The tokens of each revision alone, in this process."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    found = {}
    for name, path in checkpoints.items():
        with LLM(str(path), dtype="float32", deterministic="on", num_threads=1) as llm:
            (result,) = llm.generate([PROMPT], params)
            found[name] = list(result.outputs[0].token_ids)
    return found


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]
) -> Iterator[Served]:
    words = (str(checkpoints[FIRST]), "--deterministic", "--kv-cache-bytes", "16M")
    with running_server(tmp_path_factory.mktemp("state"), *words) as server:
        wait_until(lambda: "models" in admin(server, "GET", "models"), "the table of models")
        yield server


def admin(server: Served, method: str, call: str, **body: Any) -> dict[str, Any]:
    """The response of the admin port."""
    found: dict[str, Any] = server.admin(method, call, **body).json()
    return found


def change(server: Served, kind: str, **body: Any) -> None:
    found = admin(server, "POST", f"models/{kind}", model=MODEL, **body)
    assert "models" in found, found


def states(server: Served) -> dict[str, str]:
    """The state of each revision; of the active one, also that it is active."""
    (model,) = admin(server, "GET", "models")["models"]
    return {
        one["name"]: one["state"] + (" active" if one["name"] == model["active"] else "")
        for one in model["revisions"]
    }


def answer(client: httpx.Client, **headers: str) -> list[int]:
    body = {"model": MODEL, "prompt": list(PROMPT), "max_tokens": NUM_TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    found = client.post("/v1/completions", json=body, headers=headers)
    assert found.status_code == 200, found.text
    tokens: list[int] = found.json()["choices"][0]["token_ids"]
    return tokens


@contextmanager
def requests_in_turn(server: Served) -> Iterator[list[list[int]]]:
    """Send requests in turn within the block; yields the answers so far."""
    answers: list[list[int]] = []
    failures: list[BaseException] = []
    is_done = threading.Event()

    def send() -> None:
        try:
            with httpx.Client(base_url=server.http, timeout=WAIT_S) as client:
                while not is_done.is_set():
                    answers.append(answer(client))
        except BaseException as err:  # reported by the test
            failures.append(err)

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        is_done.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert not failures


def test_a_revision_is_rolled_beside_the_first_and_back(
    server: Served, checkpoints: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    assert expected[FIRST] != expected[SECOND]
    with requests_in_turn(server) as answers:
        change(server, "load", path=str(checkpoints[SECOND]), revision=SECOND)
        wait_until(
            lambda: states(server) == {FIRST: "READY active", SECOND: "READY"}, "the revision"
        )
        named = {name: answer(server.client, **{"x-model-revision": name}) for name in expected}
        assert named == expected
        assert answer(server.client) == expected[FIRST]
        change(server, "promote")
        wait_until(lambda: answer(server.client) == expected[SECOND], "the promotion")
        change(server, "rollback")
        wait_until(lambda: states(server) == {FIRST: "READY active"}, "the end of the revision")
        assert answer(server.client) == expected[FIRST]
    assert all(tokens in expected.values() for tokens in answers)
    unknown = server.client.post(
        "/v1/completions",
        json={"model": MODEL, "prompt": [1], "max_tokens": 1},
        headers={"x-model-revision": SECOND},
    )
    error = unknown.json()["error"]
    assert (unknown.status_code, error["param"]) == (404, "x-model-revision")


def test_a_revision_takes_the_place_of_the_first_while_requests_wait(
    server: Served, checkpoints: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    with requests_in_turn(server) as answers:
        path = str(checkpoints[SECOND])
        change(server, "load", path=path, revision=SECOND, in_place=True)
        wait_until(
            lambda: states(server) == {FIRST: "STOPPED", SECOND: "READY active"}, "the revision"
        )
        assert answer(server.client) == expected[SECOND]
    assert all(tokens in expected.values() for tokens in answers)


def test_bad_loads_are_refused_by_name(server: Served) -> None:
    for body, param in (
        ({"path": "/nowhere/x"}, "path"),
        ({"settings": {"max_num_seqs": 0}}, "max_num_seqs"),
        ({"settings": {"port": 1}}, "port"),
        ({"in_place": True, "percent": 5}, "percent"),
        ({"revision": "a b"}, "revision"),
    ):
        found = admin(server, "POST", "models/load", model=MODEL, **body)
        assert found["error"]["param"] == param, found
