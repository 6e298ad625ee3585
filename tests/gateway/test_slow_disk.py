"""A disk that hangs or is slow holds the requests that need it, and nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config.gateway import GatewaySection
from cluster.core.errors import ConfigError
from cluster.disk.threads import DiskThreads
from gateway.core.errors import StorageError, StorageTimeoutError
from gateway.core.tuning import GatewayTuning
from gateway.responses.stored import KIND
from gateway.state.store import open_in_time, open_store
from gateway.state.sweeper import StateSweeper
from tests.gateway.batches.client import (
    TUNING,
    answers_in,
    get,
    lines_of,
    make_batch,
    start_runner,
    stop_runner,
    upload,
    wait_status,
)
from tests.gateway.fakes import saying, tiny_tokenizer
from tests.gateway.stack import WAIT_S, Stack, complete, post, running_stack
from tests.harness.faulty_files import FaultyFiles, FileCall

pytestmark = pytest.mark.heavy

KEY, OTHER = "first-key-first-key", "other-key-other-key"
USER = [{"role": "user", "content": "hello"}]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
NUM_STUCK = 40
"""More requests than asyncio has threads."""


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A gateway with a state folder, a key file and templates of clients."""
    (tmp_path / "keys").write_text(KEY)
    section = GatewaySection(
        request_timeout_s=WAIT_S,
        state_dir=str(tmp_path / "state"),
        api_key_file=str(tmp_path / "keys"),
        trust_request_chat_template=True,
    )
    tuning = GatewayTuning(disk_limit_s=WAIT_S)
    with running_stack(section, tiny_tokenizer(TEMPLATE), tuning=tuning) as stack:
        stack.http.headers["authorization"] = f"Bearer {KEY}"
        stack.engine.script = saying("hello")
        yield stack


class HungDisk:
    """Calls of a folder wait until it is released."""

    def __init__(self, folder: Path) -> None:
        self._may_end = threading.Event()
        self.num_calls = 0
        self._files = FaultyFiles(folder, on_call=self._wait)

    def _wait(self, call: FileCall) -> None:
        self.num_calls += 1
        assert self._may_end.wait(4 * WAIT_S)

    def __enter__(self) -> HungDisk:
        self._files.__enter__()
        return self

    def release(self) -> None:
        self._may_end.set()

    def __exit__(self, *error: object) -> None:
        self.release()
        self._files.__exit__()


def stateful_requests(stored: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Requests that cannot be answered without the disk."""
    return [
        ("GET", f"/v1/files/{stored}", {}),
        ("GET", f"/v1/files/{stored}/content", {}),
        ("GET", "/v1/files", {}),
        ("GET", "/v1/batches", {}),
        ("GET", "/v1/batches/batch_" + "0" * 32, {}),
        ("DELETE", f"/v1/files/{stored}", {}),
        ("GET", "/v1/responses/resp_" + "0" * 32, {}),
        ("POST", "/v1/responses", {"json": {"input": "x", "store": True}}),
        (
            "POST",
            "/v1/responses",
            {"json": {"input": "x", "previous_response_id": "resp_" + "0" * 32}},
        ),
        ("POST", "/v1/files", {"data": {"purpose": "batch"}, "files": {"file": b"x"}}),
    ]


def check_stateless(stack: Stack) -> None:
    """Requests that store nothing are answered; those with templates too."""
    complete(stack, prompt="x", max_tokens=3)
    for more in ({}, {"chat_template": TEMPLATE}):
        answer = post(stack, "/v1/chat/completions", messages=USER, **more)
        assert answer.status_code == 200, answer.text
    messages = {"model": "tiny", "messages": USER, "max_tokens": 4}
    assert post(stack, "/v1/messages", **messages).status_code == 200
    answer = post(stack, "/v1/responses", input="x", store=False)
    assert answer.json()["store"] is False
    assert post(stack, "/tokenize", prompt="long " * 1000).status_code == 200


def test_a_disk_that_hangs_stops_no_request_that_stores_nothing(
    stack: Stack, tmp_path: Path
) -> None:
    stored = upload(stack, b"x", KEY)["id"]
    wanted = stateful_requests(stored)
    with HungDisk(tmp_path) as disk, ThreadPoolExecutor(NUM_STUCK) as clients:
        runner, sweeper = start_runner(stack), StateSweeper(stack.gateway.state, 0.0)
        stack.call(sweeper.start)
        stack.gateway.disk._limit_s = 0.3
        asked = []
        for number in range(NUM_STUCK):
            method, path, more = wanted[number % len(wanted)]
            asked.append(clients.submit(stack.http.request, method, path, **more))
        stack.wait_for(lambda: disk.num_calls >= stack.gateway.tuning.disk_threads)
        check_stateless(stack)
        for answer in (one.result() for one in asked):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (503, "storage_timeout"), answer.text
            assert error["message"].startswith("the state folder ")
            assert answer.headers["x-should-retry"] == "false"
        check_stateless(stack)
        answer = post(stack, "/v1/responses", input="x")
        assert answer.json()["store"] is False, "it is answered, and not stored"
        stack.gateway.disk._limit_s = WAIT_S
        disk.release()
        stack.wait_for(lambda: stack.http.get(f"/v1/files/{stored}").status_code != 503)
        assert post(stack, "/v1/responses", input="x", store=True).status_code == 200
        stop_runner(stack, runner)
        stack.run(sweeper.stop())


def test_a_gateway_ends_although_its_disk_hangs(stack: Stack, tmp_path: Path) -> None:
    made = make_batch(stack, lines_of(["a"]), KEY)
    with HungDisk(tmp_path / "state") as disk:
        runner = start_runner(stack)
        stack.wait_for(lambda: disk.num_calls > 0)
        stop_runner(stack, runner)
    runner = start_runner(stack)
    wait_status(stack, made["id"], "completed", KEY)
    stop_runner(stack, runner)


def test_no_call_of_a_disk_is_made_on_the_event_loop(stack: Stack, tmp_path: Path) -> None:
    loop = stack.run(_thread())
    found: list[FileCall] = []
    threads: set[int] = set()

    def note(call: FileCall) -> None:
        threads.add(call.thread)
        if call.thread == loop:
            found.append(call)

    with FaultyFiles(tmp_path, on_call=note):
        use_everything(stack, tmp_path)
    assert len(threads) > 1
    assert not found


async def _thread() -> int:
    return threading.get_ident()


def use_everything(stack: Stack, folder: Path) -> None:
    """Files, batches, responses and key files, to their ends and their errors."""
    runner, sweeper = start_runner(stack), StateSweeper(stack.gateway.state, 0.0)
    stack.call(sweeper.start)
    wrong = b'{"custom_id": "wrong", "url": "/v1/completions", "body": {"max_tokens": -1}}'
    made = make_batch(stack, lines_of([str(n) for n in range(20)]) + wrong, KEY)
    done = wait_status(stack, made["id"], "completed", KEY)
    assert len(answers_in(stack, done["output_file_id"], KEY)) == 20
    bad = make_batch(stack, b"rubbish", KEY)
    wait_status(stack, bad["id"], "failed", KEY)
    stack.engine.is_paused = True
    cancelled = make_batch(stack, lines_of(["a"]), KEY)
    wait_status(stack, cancelled["id"], "in_progress", KEY)
    assert stack.http.post(f"/v1/batches/{cancelled['id']}/cancel").status_code == 200
    wait_status(stack, cancelled["id"], "cancelled", KEY)
    left = make_batch(stack, lines_of(["a"]), KEY)
    wait_status(stack, left["id"], "in_progress", KEY)
    stop_runner(stack, runner)
    stack.engine.is_paused = False
    get(stack, "/v1/batches", KEY)
    get(stack, "/v1/files", KEY)
    stack.http.delete(f"/v1/files/{done['output_file_id']}")
    response = post(stack, "/v1/responses", input="x").json()
    for more in ({}, {"stream": True}):
        post(stack, "/v1/responses", input="y", previous_response_id=response["id"], **more)
    for path in ("", "/input_items"):
        assert stack.http.get(f"/v1/responses/{response['id']}{path}").status_code == 200
    assert stack.http.delete(f"/v1/responses/{response['id']}").status_code == 200
    (folder / "keys").write_text(f"{KEY}\n{OTHER}")
    headers = {"authorization": f"Bearer {OTHER}"}
    stack.wait_for(lambda: stack.http.get("/v1/models", headers=headers).status_code == 200)
    stack.run(sweeper.stop())


@pytest.mark.parametrize("name", ["write", "stat", "fsync"])
def test_a_slow_call_of_a_batch_delays_no_other_request(
    stack: Stack, tmp_path: Path, name: str
) -> None:
    """While one call of the batch's files waits, others are answered."""
    made = make_batch(stack, lines_of([str(n) for n in range(20)]), KEY)
    has_begun, may_end = threading.Event(), threading.Event()

    def wait(call: FileCall) -> None:
        if call.name == name and made["id"] in call.path:
            has_begun.set()
            assert may_end.wait(4 * WAIT_S)

    with FaultyFiles(tmp_path / "state" / "work", on_call=wait):
        runner = start_runner(stack, replace(TUNING, concurrency=4))
        assert has_begun.wait(WAIT_S)
        check_stateless(stack)
        may_end.set()
        wait_status(stack, made["id"], "completed", KEY)
        stop_runner(stack, runner)


def test_a_gateway_starts_without_its_disk(tmp_path: Path) -> None:
    section = GatewaySection(state_dir=str(tmp_path / "state"))
    store = open_store(section, opens=False)
    assert store is not None
    threads = DiskThreads("the state folder", 2, 2, 0.1, StorageTimeoutError)
    with HungDisk(tmp_path) as disk:
        asyncio.run(open_in_time(store, threads))  # returns
        disk.release()
    assert store.list_ids(KIND, "a") == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").touch()
    wrong = open_store(GatewaySection(state_dir=str(tmp_path / "other")), opens=False)
    with pytest.raises(ConfigError, match="contains other files"):
        asyncio.run(open_in_time(wrong, threads))
    assert wrong is not None
    with pytest.raises(StorageError, match="the state folder contains other files"):
        wrong.list_ids(KIND, "a")
