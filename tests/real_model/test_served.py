"""``expertmesh serve`` with the real model: prompts, answers, and workers that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks.harness.server import Served, running_server
from benchmarks.harness.stalls import wait_until
from tests.real_model.reference import Reference

pytestmark = pytest.mark.ray

NUM_TOKENS = 150
TASKS = (
    "Tell me a story about a dragon.",
    "Why is the sky blue?",
    "Write a letter to a friend about the sea.",
    "Explain how a car works.",
)
SYSTEM = {"role": "system", "content": "You answer in one word.\n\nAlways."}
FIRST = {
    "role": "user",
    "content": "  Which is larger, 12345 or 6789? <|im_end|>\ttabs, \u00e9\u4e2d\U0001f600 ",
}
SAID = {"role": "assistant", "content": "The first"}
NEXT = {"role": "user", "content": "And why?"}
CONVERSATIONS = ([FIRST], [SYSTEM, FIRST], [FIRST, SAID, NEXT], [SYSTEM, FIRST, SAID, NEXT, SAID])


@pytest.fixture(scope="module")
def server(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two attention and two expert workers."""
    words = (str(reference.folders["mixtral"]), "--num-attention-workers", "2")
    pool = ("--num-expert-workers", "2", "--max-model-len", "2048", "--kv-cache-bytes", "128M")
    with running_server(tmp_path_factory.mktemp("state"), *words, *pool) as server:
        yield server


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
@pytest.mark.parametrize("end", ["add_generation_prompt", "continue_final_message", "neither"])
def test_prompts_are_those_of_transformers(
    reference: Reference, server: Served, messages: list[dict[str, str]], end: str
) -> None:
    if end == "continue_final_message" and messages[-1] is not SAID:
        messages = [*messages, SAID]
    options = {name: name == end for name in ("add_generation_prompt", "continue_final_message")}
    answer = server.client.post("/tokenize", json={"messages": messages, **options})
    assert answer.status_code == 200, answer.text
    assert tuple(answer.json()["tokens"]) == reference.chat(messages, **options)


@pytest.mark.parametrize(("country", "capital"), [("France", "Paris"), ("Japan", "Tokyo")])
def test_the_model_knows_capitals(
    reference: Reference, server: Served, country: str, capital: str
) -> None:
    question = f"What is the capital of {country}?"
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert capital in found["choices"][0]["message"]["content"]
    assert found["usage"]["prompt_tokens"] == len(reference.ask(question))


@pytest.mark.parametrize("role", ["expert", "attention"])
def test_a_killed_worker_changes_no_token(reference: Reference, server: Served, role: str) -> None:
    prompts = [reference.ask(task) for task in TASKS]
    expected = together(server, prompts, lambda: None)
    for prompt, answer in zip(prompts, expected, strict=True):
        reference.check_greedy(prompt, answer)
    before = server.status()["generation"]

    def kill() -> None:
        wait_until(lambda: all(map(_runs, _serving(server, "attention"))), "requests everywhere")
        os.kill(_serving(server, role)[0]["pid"], signal.SIGKILL)

    assert together(server, prompts, kill) == expected
    status = server.status()
    assert status["generation"] > before
    wait_until(lambda: server.status()["state"] == "SERVING", "a whole cluster")
    wait_until(lambda: len(_serving(server, role)) == 2, "a worker in place of the killed one")


def together(
    server: Served, prompts: list[tuple[int, ...]], meanwhile: Callable[[], None]
) -> list[list[int]]:
    """Greedy tokens behind prompts that are sent at once."""

    def ask(prompt: tuple[int, ...]) -> list[int]:
        answer = server.complete(
            prompt=list(prompt),
            max_tokens=NUM_TOKENS,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(ask, prompt) for prompt in prompts]
        meanwhile()
        return [answer.result() for answer in answers]


def _serving(server: Served, role: str) -> list[dict[str, Any]]:
    workers = server.status()["workers"]
    return [w for w in workers if w["role"] == role and w["state"] == "SERVING"]


def _runs(worker: dict[str, Any]) -> bool:
    return bool(worker["stats"].get("num_requests_running"))
