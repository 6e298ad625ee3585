"""A client of files and batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.batches.runner import BatchRunner
from gateway.batches.running import BatchTuning
from gateway.http.api import HttpApi
from tests.cluster.batches.files import line
from tests.gateway.stack import Stack

TUNING = BatchTuning(poll_s=0.02, retry_s=0.02)


def lines_of(ids: Iterable[str], **changed: Any) -> bytes:
    """A file of requests."""
    return b"".join(json.dumps(line(one, **changed)).encode() + b"\n" for one in ids)


def upload(stack: Stack, content: bytes, key: str = "", **fields: str) -> dict[str, Any]:
    """Store a file; its object."""
    answer = stack.http.post(
        "/v1/files",
        files={"file": ("in.jsonl", content)},
        data={"purpose": "batch", **fields},
        headers=headers_of(key),
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def make_batch(stack: Stack, content: bytes, key: str = "", **fields: Any) -> dict[str, Any]:
    """Store requests, and a batch of them."""
    body = {
        "input_file_id": upload(stack, content, key)["id"],
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        **fields,
    }
    answer = stack.http.post("/v1/batches", json=body, headers=headers_of(key))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def get(stack: Stack, path: str, key: str = "") -> Any:
    """What is at a path."""
    answer = stack.http.get(path, headers=headers_of(key))
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait_status(stack: Stack, batch_id: str, status: str, key: str = "") -> dict[str, Any]:
    """The batch once it has this status."""
    path = f"/v1/batches/{batch_id}"
    stack.wait_for(lambda: get(stack, path, key)["status"] == status, f"{status} of a batch")
    found: dict[str, Any] = get(stack, path, key)
    return found


def answers_in(stack: Stack, file_id: str, key: str = "") -> dict[str, dict[str, Any]]:
    """The answers of a file, by their requests; each has one."""
    answer = stack.http.get(f"/v1/files/{file_id}/content", headers=headers_of(key))
    assert answer.status_code == 200, answer.text
    found = [json.loads(text) for text in answer.text.splitlines()]
    by_id = {one["custom_id"]: one["response"] for one in found}
    assert len(by_id) == len(found)
    return by_id


def headers_of(key: str) -> Mapping[str, str]:
    """With a key, unless it is empty."""
    return {"authorization": f"Bearer {key}"} if key else {}


def start_runner(stack: Stack, tuning: BatchTuning = TUNING) -> BatchRunner:
    """One that runs batches of this gateway."""

    async def start() -> BatchRunner:
        runner = BatchRunner(stack.gateway, HttpApi(stack.gateway).routes(), tuning)
        runner.start()
        return runner

    return stack.run(start())


def stop_runner(stack: Stack, runner: BatchRunner) -> None:
    """End it as a gateway that stops does."""
    stack.run(runner.stop())
