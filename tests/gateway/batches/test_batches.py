"""``/v1/batches``, and who runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.batches.running import BatchTuning
from tests.cluster.batches.files import line
from tests.gateway.batches.client import (
    answers_in,
    get,
    lines_of,
    make_batch,
    start_runner,
    stop_runner,
    upload,
    wait_status,
)
from tests.gateway.batches.conftest import KEYS
from tests.gateway.stack import Stack, running_stack

pytestmark = pytest.mark.heavy

IDS = [f"id-{number}" for number in range(30)]


def work_files(stack: Stack) -> list[Path]:
    assert stack.gateway.state is not None
    return sorted(stack.gateway.state.work.iterdir())


def test_a_batch_is_answered(keeper: Stack) -> None:
    wrong = json.dumps(line("wrong", body={"prompt": "x", "max_tokens": -1})).encode()
    made = make_batch(keeper, lines_of(IDS) + wrong, metadata={"for": "tests"})
    assert (made["object"], made["status"], made["endpoint"]) == (
        "batch",
        "validating",
        "/v1/completions",
    )
    assert made["metadata"] == {"for": "tests"}
    assert made["expires_at"] - made["created_at"] == 24 * 3600
    runner = start_runner(keeper)
    done = wait_status(keeper, made["id"], "completed")
    assert done["request_counts"] == {"total": 31, "completed": 30, "failed": 1}
    for moment in ("in_progress_at", "finalizing_at", "completed_at"):
        assert done[moment] >= made["created_at"]
    found = answers_in(keeper, done["output_file_id"])
    assert set(found) == set(IDS)
    body = found["id-7"]["body"]
    assert found["id-7"]["status_code"] == 200
    assert found["id-7"]["request_id"]
    assert body["object"] == "text_completion"
    assert body["usage"]["completion_tokens"] == 4
    (failed,) = answers_in(keeper, done["error_file_id"]).values()
    assert failed["status_code"] == 400
    assert failed["body"]["error"]["param"] == "max_tokens"
    assert get(keeper, "/v1/batches")["data"] == [done]
    purposes = {one["purpose"] for one in get(keeper, "/v1/files")["data"]}
    assert purposes == {"batch", "batch_output"}
    keeper.wait_for(lambda: not work_files(keeper), "the end of the work")
    stop_runner(keeper, runner)


def test_another_gateway_goes_on(keeper: Stack) -> None:
    keeper.engine.step_s = 0.02
    made = make_batch(keeper, lines_of(IDS))
    first = start_runner(keeper, BatchTuning(poll_s=0.02, concurrency=2))
    path = f"/v1/batches/{made['id']}"
    keeper.wait_for(lambda: get(keeper, path)["request_counts"]["completed"] > 3)
    stop_runner(keeper, first)
    before = get(keeper, path)
    assert before["status"] == "in_progress"
    assert before["request_counts"]["total"] == 30
    with running_stack(keeper.config.gateway) as other:
        second = start_runner(other)
        done = wait_status(keeper, made["id"], "completed")
        asked = len(other.engine.requests)
        stop_runner(other, second)
    assert 0 < asked < 30 - 3
    assert set(answers_in(keeper, done["output_file_id"])) == set(IDS)


def test_one_gateway_runs_a_batch(keeper: Stack) -> None:
    keeper.engine.step_s = 0.01
    with running_stack(keeper.config.gateway) as other:
        runners = start_runner(keeper), start_runner(other)
        batches = [make_batch(keeper, lines_of(IDS)) for _ in range(3)]
        for made in batches:
            done = wait_status(keeper, made["id"], "completed")
            assert set(answers_in(keeper, done["output_file_id"])) == set(IDS)
        assert len(keeper.engine.requests) + len(other.engine.requests) == 90
        stop_runner(keeper, runners[0])
        stop_runner(other, runners[1])


def test_a_cancelled_batch_keeps_its_answers(keeper: Stack) -> None:
    keeper.engine.step_s = 0.05
    made = make_batch(keeper, lines_of(IDS))
    runner = start_runner(keeper, BatchTuning(poll_s=0.02, concurrency=1))
    path = f"/v1/batches/{made['id']}"
    keeper.wait_for(lambda: get(keeper, path)["request_counts"]["completed"] > 1)
    asked = keeper.http.post(f"{path}/cancel").json()
    assert asked["status"] == "cancelling"
    done = wait_status(keeper, made["id"], "cancelled")
    num_done = done["request_counts"]["completed"]
    assert 1 < num_done < 30
    assert set(answers_in(keeper, done["output_file_id"])) == set(IDS[:num_done])
    again = keeper.http.post(f"{path}/cancel")
    assert again.status_code == 409
    stop_runner(keeper, runner)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file has no request"),
        (lines_of(["a", "a"]), "line 2: custom_id 'a' came before"),
        (lines_of(["a"], url="/v1/chat/completions"), "line 1: url ('/v1/chat/completions') must"),
        (b"\xff\n", "line 1 is not JSON"),
    ],
)
def test_a_wrong_file_fails(keeper: Stack, content: bytes, message: str) -> None:
    runner = start_runner(keeper)
    made = make_batch(keeper, content)
    done = wait_status(keeper, made["id"], "failed")
    (problem,) = done["errors"]["data"]
    assert message in problem["message"]
    assert problem["line"] == (int(message.split()[1].rstrip(":")) if "line" in message else None)
    assert done["failed_at"] >= done["created_at"]
    assert keeper.engine.requests == []
    stop_runner(keeper, runner)


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"input_file_id": "file_" + "0" * 32}, "input_file_id"),
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            "output_expires_after.seconds",
        ),
    ],
)
def test_a_wrong_batch_is_refused(keeper: Stack, changed: dict[str, Any], param: str) -> None:
    body = {
        "input_file_id": upload(keeper, lines_of(["a"]))["id"],
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        **changed,
    }
    answer = keeper.http.post("/v1/batches", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert work_files(keeper) == []


def test_batches_are_of_their_key(keyed: Stack) -> None:
    mine, others = KEYS
    runner = start_runner(keyed)
    made = make_batch(keyed, lines_of(IDS), mine)
    done = wait_status(keyed, made["id"], "completed", mine)
    assert set(answers_in(keyed, done["output_file_id"], mine)) == set(IDS)
    tenants = {request.tenant for request in keyed.engine.requests}
    assert len(tenants) == 1
    assert "" not in tenants
    assert get(keyed, "/v1/batches", others)["data"] == []
    headers = {"authorization": f"Bearer {others}"}
    for path in (f"/v1/batches/{made['id']}", f"/v1/files/{done['output_file_id']}/content"):
        assert keyed.http.get(path, headers=headers).status_code == 404
    stop_runner(keyed, runner)
