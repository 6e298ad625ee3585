"""Batches whose files are damaged, whose key is full or gone, and those beside them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.batches.requests import BatchRequest
from cluster.batches.run import BatchResponse, response_line
from cluster.config.gateway import GatewaySection
from gateway.batches.batch_store import BatchStore, WorkPart
from gateway.batches.file_store import FileStore
from gateway.batches.objects import BATCHES, StoredBatch
from gateway.batches.runner import BatchRunner
from gateway.batches.running import BatchTuning, with_status
from gateway.core.errors import KeyFullError, StorageError
from gateway.state.store import StateStore
from tests.cluster.batches.files import line
from tests.gateway.batches.client import (
    TUNING,
    answers_in,
    get,
    headers_of,
    lines_of,
    make_batch,
    start_runner,
    stop_runner,
    upload,
    wait_status,
)
from tests.gateway.batches.conftest import KEYS
from tests.gateway.stack import WAIT_S, Stack, running_stack
from tests.harness.faulty_files import (
    FAULTS,
    FEW_FAULTS,
    Fault,
    FaultyFiles,
    FileCall,
    Killed,
    each_fault,
)
from tests.harness.tiers import quick_rows

pytestmark = pytest.mark.heavy

IDS = [f"id-{number}" for number in range(30)]
ONE_SEAT = BatchTuning(poll_s=0.02, retry_s=3600.0, max_batches=1)


def state_of(stack: Stack) -> StateStore:
    assert stack.gateway.state is not None
    return stack.gateway.state


def object_file(stack: Stack, object_id: str) -> Path:
    (found,) = state_of(stack).work.parent.glob(f"*/*/{object_id}")
    return found


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Stack]:
    """A gateway that keeps 16 KB for a key."""
    section = GatewaySection(
        request_timeout_s=WAIT_S, state_dir=str(tmp_path / "state"), state_max_bytes=16_000
    )
    with running_stack(section) as stack:
        yield stack


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ('{"custom_id": "\\ud800", "url": "/v1/completions", "body": {}}', "is not JSON"),
        (json.dumps(line("a", body={"prompt": "a", "temperature": float("nan")})), "is not JSON"),
        ("[" * 200_000, "is nested too deeply: at most 128 levels"),
    ],
)
def test_what_cannot_be_sent_fails_a_batch(keeper: Stack, wrong: str, message: str) -> None:
    runner = start_runner(keeper)
    made = make_batch(keeper, lines_of(["a"]) + wrong.encode())
    done = wait_status(keeper, made["id"], "failed")
    assert f"line 2 {message}" in done["errors"]["data"][0]["message"]
    stop_runner(keeper, runner)


def test_a_batch_that_stands_still_keeps_no_seat(keeper: Stack) -> None:
    made = make_batch(keeper, lines_of(IDS))
    in_the_way = state_of(keeper).work / f"{made['id']}.answers"
    in_the_way.mkdir()
    other = make_batch(keeper, lines_of(IDS))
    runner = start_runner(keeper, ONE_SEAT)
    wait_status(keeper, other["id"], "completed")
    assert get(keeper, f"/v1/batches/{made['id']}")["status"] == "validating"
    stop_runner(keeper, runner)
    in_the_way.rmdir()
    runner = start_runner(keeper)
    wait_status(keeper, made["id"], "completed")
    stop_runner(keeper, runner)


def test_one_key_leaves_a_seat(keyed: Stack) -> None:
    mine, others = KEYS
    keyed.engine.is_paused = True
    for _ in range(3):
        make_batch(keyed, lines_of(["a"]), mine)
    runner = start_runner(keyed, replace(TUNING, max_batches=2))
    made = make_batch(keyed, lines_of(["b"]), others)
    wait_status(keyed, made["id"], "in_progress", others)
    states = [one["status"] for one in get(keyed, "/v1/batches", mine)["data"]]
    assert states == ["validating", "validating", "in_progress"]
    keyed.engine.is_paused = False
    wait_status(keyed, made["id"], "completed", others)
    stop_runner(keyed, runner)


@pytest.mark.parametrize("damage", [b"\0\0\n", b"", b'{"id": "batch_req_x", "custom_id": "id-1'])
def test_damaged_answers_cost_what_is_damaged_alone(keeper: Stack, damage: bytes) -> None:
    made = make_batch(keeper, lines_of(IDS))
    paid = [
        response_line(BatchRequest(one, "", {}), BatchResponse(200, {"paid": one})) for one in IDS
    ]
    texts = [json.dumps(one).encode() + b"\n" for one in paid[:8]]
    path = state_of(keeper).work / f"{made['id']}.answers"
    path.write_bytes(b"".join(texts[:5]) + damage + b"".join(texts[5:]))
    runner = start_runner(keeper)
    done = wait_status(keeper, made["id"], "completed")
    found = answers_in(keeper, done["output_file_id"])
    assert set(found) == set(IDS)
    assert [found[one]["body"] for one in IDS[:8]] == [{"paid": one} for one in IDS[:8]]
    assert len(keeper.engine.requests) == len(IDS) - 8
    keeper.wait_for(lambda: not list(state_of(keeper).work.iterdir()))
    stop_runner(keeper, runner)


FULL = [errno.ENOSPC, errno.EDQUOT, errno.EIO]


@pytest.mark.parametrize("number", quick_rows(FULL[:1], FULL))
def test_a_batch_waits_for_a_disk_that_refuses_and_loses_nothing(
    keeper: Stack, number: int
) -> None:
    """Each request is asked once, although the disk takes no answers for a while."""
    made = make_batch(keeper, lines_of(IDS))
    num_writes, num_refused, is_full = 0, 0, True

    def refuse(call: FileCall) -> None:
        nonlocal num_writes, num_refused
        if call.name == "write" and call.path.endswith(".answers"):
            num_writes += 1
            if num_writes > 4 and is_full:
                num_refused += 1
                raise OSError(number, os.strerror(number))

    runner = start_runner(keeper)
    with FaultyFiles(state_of(keeper).work, on_call=refuse):
        keeper.wait_for(lambda: num_refused > 1, "a full disk")
        keeper.wait_for(lambda: not keeper.engine.running, "the end of what runs")
        is_full = False
        done = wait_status(keeper, made["id"], "completed")
    check_each_answered_once(keeper, done)
    stop_runner(keeper, runner)


def check_each_answered_once(keeper: Stack, done: dict[str, Any]) -> None:
    """A completed batch of all ``IDS``."""
    assert set(answers_in(keeper, done["output_file_id"])) == set(IDS)
    assert len(keeper.engine.requests) == len(IDS)


@pytest.mark.parametrize("name", quick_rows({"open"}, ["open", "stat"]))
def test_answers_in_memory_survive_a_disk_that_refuses_all_else(keeper: Stack, name: str) -> None:
    """Counts that cannot be stored, or orders that cannot be read, cost no answer."""
    made = make_batch(keeper, lines_of(IDS))
    num_writes, num_refused, is_full = 0, Counter[str](), True

    def refuse(call: FileCall) -> None:
        nonlocal num_writes
        is_answer = call.name == "write" and call.path.endswith(".answers")
        num_writes += is_answer
        if num_writes > 4 and is_full and (is_answer or call.name == name):
            num_refused[call.name] += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    runner = start_runner(keeper)
    with FaultyFiles(state_of(keeper).work.parent, on_call=refuse):
        keeper.wait_for(lambda: min(num_refused["write"], num_refused[name]) > 2, "a full disk")
        keeper.wait_for(lambda: not keeper.engine.running, "the end of what runs")
        is_full = False
        done = wait_status(keeper, made["id"], "completed")
    check_each_answered_once(keeper, done)
    stop_runner(keeper, runner)


KINDS = pytest.mark.parametrize("kinds", [FEW_FAULTS, pytest.param(FAULTS, marks=pytest.mark.slow)])


@KINDS
def test_a_batch_survives_every_fault_of_its_disk(tmp_path: Path, kinds: Sequence[Fault]) -> None:
    """A store after a fault at each of its calls: a batch is there as a whole, or can be made."""
    batch = StoredBatch(id="", endpoint="", input_file_id="", created_at=0, expires_at=1)
    for folder, fault in each_fault(tmp_path, kinds=kinds):
        store = BatchStore(state_in(folder))
        made = msgspec.structs.replace(batch, id=store.new_id())
        with FaultyFiles(folder, fault), contextlib.suppress(StorageError, OSError, Killed):
            store.make("a", made, b"requests")
        store = BatchStore(state_in(folder))
        found = store.get("a", made.id)
        if found is None:
            store.make("a", made, b"requests")
        assert store.get("a", made.id) == made, fault
        assert [work.batch_id for work in store.waiting()] == [made.id], fault
        assert store.path(made.id, WorkPart.REQUESTS).read_bytes() == b"requests", fault


@KINDS
def test_answers_are_stored_as_a_whole_or_stay(tmp_path: Path, kinds: Sequence[Fault]) -> None:
    content = b"answer\n" * 100_000

    def prepare(folder: Path) -> None:
        (folder / "answers").write_bytes(content)

    for folder, fault in each_fault(tmp_path, prepare, kinds):
        files = FileStore(state_in(folder / "state"))
        file_id, path = files.new_id(), folder / "answers"
        with FaultyFiles(folder, fault), contextlib.suppress(StorageError, Killed):
            files.put_output("a", "out", path, file_id, None)
        assert path.read_bytes() == content
        found = files.get("a", file_id)
        assert found is None or found[1] == content, fault
        files.put_output("a", "out", path, file_id, None)
        found = files.get("a", file_id)
        assert found is not None
        assert found[1] == content, fault


def state_in(folder: Path) -> StateStore:
    return StateStore(folder, max_objects=10, max_bytes=1 << 20, ttl_s=1e9)


def test_a_full_key_is_asked_without_reading_the_answers(tmp_path: Path) -> None:
    files, path = FileStore(state_in(tmp_path / "state")), tmp_path / "answers"
    for _ in range(3):
        files.put("a", "x", b"x" * 300_000)
    path.write_bytes(b"x" * 400_000)
    calls = Counter[str]()
    with FaultyFiles(tmp_path, on_call=lambda call: calls.update([call.name])):
        for _ in range(5):
            with pytest.raises(KeyFullError):
                files.put_output("a", "out", path, files.new_id(), None)
    assert calls["read"] == calls["write"] == 0


def test_a_file_is_read_in_pieces(tmp_path: Path) -> None:
    files, content = FileStore(state_in(tmp_path)), bytes(range(256)) * 2000
    file_id, facts = files.put("a", "x", content)
    assert files.open("b", file_id) is None
    opened = files.open("a", file_id)
    assert opened is not None
    with opened[1] as reader:
        assert opened[0] == facts
        assert reader.num_left == len(content)
        assert b"".join(iter(lambda: reader.read(1000), b"")) == content
    (path,) = tmp_path.glob(f"*/*/{file_id}")
    raw = path.read_bytes()
    for damaged in (raw[:-1], raw[:-1] + b"?", raw + b"?"):
        path.write_bytes(damaged)
        opened = files.open("a", file_id)
        assert opened is not None
        with opened[1] as reader, pytest.raises(StorageError, match="damaged"):
            all(reader.read(1000) for _ in range(len(raw)))


def test_a_failing_batch_is_tried_less_and_less_often(keeper: Stack) -> None:
    runner = BatchRunner(keeper.gateway, [], BatchTuning(retry_s=10.0, max_retry_s=60.0))

    def pauses(err: Exception) -> list[float]:
        found = []
        for _ in range(4):
            runner._pause("a", err)
            found.append(runner._pauses["a"].length_s)
        return found

    assert pauses(OSError("full")) == [10.0, 20.0, 40.0, 60.0]
    assert pauses(KeyFullError("full")) == [10.0] * 4  # nothing is read or written for it


def test_a_damaged_entry_stops_no_other_batch(keeper: Stack) -> None:
    (state_of(keeper).work / "batch_0.json").write_bytes(b"\xff")
    (state_of(keeper).work / "batch_1.json").mkdir()
    made = make_batch(keeper, lines_of(IDS))
    runner = start_runner(keeper)
    wait_status(keeper, made["id"], "completed")
    stop_runner(keeper, runner)


def test_lists_go_without_damaged_objects(keeper: Stack) -> None:
    damaged, other = (upload(keeper, lines_of(["a"]))["id"] for _ in range(2))
    batches = [make_batch(keeper, lines_of(["a"]))["id"] for _ in range(2)]
    for one in (damaged, batches[0]):
        object_file(keeper, one).write_bytes(b"\xff\n")
    listed = [one["id"] for one in get(keeper, "/v1/files")["data"]]
    assert other in listed
    assert damaged not in listed
    assert [one["id"] for one in get(keeper, "/v1/batches")["data"]] == batches[1:]
    first = make_batch(keeper, lines_of(["a"]))["id"]
    page = get(keeper, "/v1/batches?limit=1")
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([first], True)
    page = get(keeper, "/v1/batches?order=asc&limit=1")
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (batches[1:], True)


def test_answers_wait_for_room(keeper: Stack, tmp_path: Path) -> None:
    section = replace(keeper.config.gateway, state_dir=str(tmp_path / "other"), state_max_objects=2)
    with running_stack(section) as stack:
        made = make_batch(stack, lines_of(IDS))
        in_the_way = upload(stack, b"x")
        runner = start_runner(stack)
        found = wait_status(stack, made["id"], "finalizing")
        assert found["output_file_id"] is None  # it is not there yet
        stack.http.delete(f"/v1/files/{in_the_way['id']}")
        done = wait_status(stack, made["id"], "completed")
        assert set(answers_in(stack, done["output_file_id"])) == set(IDS)
        assert len(stack.engine.requests) == 30
        stop_runner(stack, runner)


def test_a_batch_ends_before_its_answers_are_too_large(small: Stack) -> None:
    small.engine.step_s = 0.005
    ids = [str(number) for number in range(80)]
    made = make_batch(small, lines_of(ids))
    small.http.delete(f"/v1/files/{made['input_file_id']}")
    runner = start_runner(small, replace(TUNING, poll_s=0.001, concurrency=1))
    done = wait_status(small, made["id"], "failed")
    (problem,) = done["errors"]["data"]
    assert problem["code"] == "answers_too_large"
    assert 10 < len(answers_in(small, done["output_file_id"])) < 80
    stop_runner(small, runner)


def test_requests_that_wait_are_bounded(small: Stack) -> None:
    ids = [str(number) for number in range(60)]
    stored = upload(small, lines_of(ids))
    body = {"input_file_id": stored["id"], "endpoint": "/v1/completions"}
    body["completion_window"] = "24h"
    statuses = [small.http.post("/v1/batches", json=body).status_code for _ in range(4)]
    fits = 16_000 // stored["bytes"]
    assert statuses == [200] * fits + [429] * (4 - fits)
    assert len(get(small, "/v1/batches")["data"]) == fits
    assert len(list(state_of(small).work.glob("*.requests"))) == fits


def test_a_batch_that_cannot_be_made_leaves_nothing(keeper: Stack) -> None:
    stored = upload(keeper, lines_of(IDS))
    work = state_of(keeper).work
    work.rmdir()
    work.touch()
    body = {"input_file_id": stored["id"], "endpoint": "/v1/completions"}
    body["completion_window"] = "24h"
    answer = keeper.http.post("/v1/batches", json=body)
    assert answer.json()["error"]["code"] == "storage_failed"
    assert get(keeper, "/v1/batches")["data"] == []


def test_a_maker_that_was_killed_leaves_nothing(keeper: Stack) -> None:
    made = make_batch(keeper, lines_of(IDS))
    object_file(keeper, made["id"]).unlink()
    batches = BatchStore(state_of(keeper))
    runner = start_runner(keeper)
    keeper.wait_for(lambda: batches.path(made["id"], WorkPart.ANSWERS).exists())
    assert batches.is_pending(made["id"])  # its maker may be at work
    stop_runner(keeper, runner)
    (work,) = batches.waiting()
    ahead = BatchStore(state_of(keeper), clock=lambda: 2e10)
    assert ahead.take(work) is None
    assert batches.is_pending(made["id"]), "a clock that is ahead ends no batch"
    state_of(keeper).disk_time_s = lambda: 2e10
    assert batches.take(work) is None
    assert not batches.is_pending(made["id"])


def test_a_clock_that_is_ahead_ends_no_batch(keeper: Stack) -> None:
    made = make_batch(keeper, lines_of(IDS))
    section = keeper.config.gateway
    store = StateStore(
        Path(section.state_dir or ""),
        max_objects=section.state_max_objects,
        max_bytes=section.state_max_bytes,
        ttl_s=section.state_ttl_s,
        clock=lambda: time.time() + 400 * 24 * 3600.0,
    )
    ahead = BatchStore(store, clock=lambda: time.time() + 400 * 24 * 3600.0)
    (work,) = ahead.waiting()
    assert ahead.take(work) is None
    ahead.sweep()
    store.sweep()
    batch = BatchStore(state_of(keeper)).take(work)
    assert batch is not None
    assert not ahead.must_end(batch)
    runner = start_runner(keeper)
    done = wait_status(keeper, made["id"], "completed")
    assert set(answers_in(keeper, done["output_file_id"])) == set(IDS)
    stop_runner(keeper, runner)


def test_a_batch_outlives_its_window(tmp_path: Path) -> None:
    now_s = 1e9
    store = StateStore(tmp_path, max_objects=10, max_bytes=1 << 20, ttl_s=60.0, clock=lambda: now_s)
    batches = BatchStore(store, clock=lambda: now_s)
    batch_id = batches.new_id()
    batch = StoredBatch(
        id=batch_id, endpoint="/v1/completions", input_file_id="", created_at=0, expires_at=0
    )
    batches.make("a", batch, b"x")
    now_s += 24 * 3600.0
    assert store.list_ids(BATCHES, "a") == [batch_id]
    batches.save("a", with_status(batch, "completed"))
    now_s += 60.0
    assert store.list_ids(BATCHES, "a") == []


def test_a_key_that_is_taken_away_ends_its_batches(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\n".join(KEYS))
    section = GatewaySection(
        request_timeout_s=WAIT_S, state_dir=str(tmp_path / "state"), api_key_file=str(keys)
    )
    with running_stack(section) as stack:
        stack.engine.is_paused = True
        made = make_batch(stack, lines_of(IDS), KEYS[0])
        runner = start_runner(stack)
        wait_status(stack, made["id"], "in_progress", KEYS[0])
        keys.write_text(KEYS[1])
        batches = BatchStore(state_of(stack))
        stack.wait_for(lambda: not batches.is_pending(made["id"]))
        stack.engine.is_paused = False
        keys.write_text("\n".join(KEYS))
        path = f"/v1/batches/{made['id']}"
        headers = headers_of(KEYS[0])
        stack.wait_for(lambda: stack.http.get(path, headers=headers).status_code == 200)
        done = get(stack, path, KEYS[0])
        assert (done["status"], done["errors"]["data"][0]["code"]) == ("failed", "no_key")
        stop_runner(stack, runner)
