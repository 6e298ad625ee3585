"""``cluster.batches.run``."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.batches import run
from cluster.batches.requests import BatchRequest, RequestFile
from cluster.batches.response_file import ResponseFile
from cluster.batches.run import BatchCounts, BatchResponse, BatchRun, UnreachableError
from cluster.core.errors import ConflictError
from tests.cluster.batches.files import line, read_lines, write_lines
from tests.harness.faulty_files import Fault, FaultyFiles, FileCall

IDS = [f"id-{number}" for number in range(20)]


class Server:
    """Answers with the prompt; ``plan`` says what comes before that, by id."""

    def __init__(self, **plan: list[BatchResponse | Exception]) -> None:
        self.plan = plan
        self.asked = Counter[str]()
        self.running = self.most = 0
        self.num_awaited = 0
        """Requests that must run at the same time, before the first one is answered."""
        self._has_all = asyncio.Event()

    async def send(self, request: BatchRequest) -> BatchResponse:
        self.asked[request.custom_id] += 1
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running >= self.num_awaited:
            self._has_all.set()
        await self._has_all.wait()
        await asyncio.sleep(0)
        self.running -= 1
        planned = self.plan.get(request.custom_id.replace("-", "_"), [])
        if planned:
            first = planned.pop(0)
            if isinstance(first, Exception):
                raise first
            return first
        return BatchResponse(200, {"text": request.body["prompt"]}, f"req-{request.custom_id}")


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_FIRST_WAIT_S", 0.0)


def batch(
    folder: Path,
    server: Server,
    clock: Callable[[], float] = lambda: 0.0,
    seen: list[tuple[int, int]] | None = None,
    concurrency: int = 4,
    disk_limit_s: float = 0.0,
) -> BatchCounts:
    """Run ``in`` to its end."""

    def note(counts: BatchCounts) -> None:
        if seen is not None:
            seen.append((counts.completed, counts.failed))

    requests = RequestFile.check(folder / "in")
    with ResponseFile(folder / "out") as answers, ResponseFile(folder / "errors") as errors:
        work = BatchRun(
            requests,
            answers,
            errors,
            server.send,
            concurrency,
            60.0,
            note,
            clock,
            disk_limit_s=disk_limit_s,
        )
        asyncio.run(work.run())
        return work.counts


def answered(path: Path) -> dict[str, Any]:
    return {one["custom_id"]: one["response"]["body"] for one in read_lines(path)}


def test_each_request_has_one_answer(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [line(one) for one in IDS])
    server, seen = Server(id_3=[BatchResponse(400, {"error": {}})]), list[tuple[int, int]]()
    server.num_awaited = 4
    counts = batch(tmp_path, server, seen=seen)
    assert (counts.total, counts.completed, counts.failed, counts.left) == (20, 19, 1, 0)
    assert answered(tmp_path / "out") == {one: {"text": one} for one in IDS if one != "id-3"}
    (failed,) = read_lines(tmp_path / "errors")
    assert failed["custom_id"] == "id-3"
    assert failed["response"] == {"status_code": 400, "request_id": "", "body": {"error": {}}}
    assert failed["error"] is None
    assert server.most == 4
    assert [sum(one) for one in seen] == list(range(21))


def test_what_is_answered_is_not_asked_again(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [line(one) for one in IDS[:8]])
    batch(tmp_path, Server(id_3=[BatchResponse(400, {})]))
    before = (tmp_path / "out").read_bytes()
    write_lines(tmp_path / "in", [line(one) for one in IDS])
    server = Server()
    counts = batch(tmp_path, server)
    assert set(server.asked) == set(IDS[8:])
    assert (counts.completed, counts.failed) == (19, 1)
    assert (tmp_path / "out").read_bytes().startswith(before)


def test_answers_of_another_batch_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [line("other")])
    batch(tmp_path, Server())
    write_lines(tmp_path / "in", [line("a")])
    with pytest.raises(ConflictError, match="the batch has no request 'other'"):
        batch(tmp_path, Server())


def test_a_server_that_names_no_pause_is_not_asked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float, real: Callable[[float], Any] = asyncio.sleep) -> None:
        is_own = threading.current_thread() is threading.main_thread()
        if is_own:  # else of a stack that other tests use
            pauses.append(seconds)
        await real(0.0 if is_own else seconds)

    write_lines(tmp_path / "in", [line("id-0")])
    monkeypatch.setattr(run, "_FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    server = Server(id_0=[BatchResponse(status, {}, retry_after_s=0.0) for status in (429, 503)])
    assert batch(tmp_path, server).completed == 1
    assert pauses.count(0.5) == 2


def test_a_full_or_restarting_server_is_asked_again(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [line(one) for one in IDS])
    gone = UnreachableError("gone")
    server = Server(
        id_0=[BatchResponse(429, {}, retry_after_s=0.0), BatchResponse(503, {}, retry_after_s=0.0)],
        id_1=[gone, gone, gone],
        id_2=[BatchResponse(408, {}, retry_after_s=0.0)],
    )
    assert batch(tmp_path, server).completed == 20
    assert [server.asked[f"id-{number}"] for number in range(4)] == [3, 4, 2, 1]


@pytest.mark.parametrize(
    "lost", [UnreachableError("gone"), BatchResponse(503, {}, retry_after_s=0)]
)
def test_a_server_that_stays_away_ends_the_run(
    tmp_path: Path, lost: BatchResponse | Exception
) -> None:
    write_lines(tmp_path / "in", [line(one) for one in IDS[:3]])
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += 1.0
        return now_s

    server = Server(id_1=[lost] * 1000)
    with pytest.raises(ExceptionGroup) as caught:
        batch(tmp_path, server, clock, concurrency=1)
    assert caught.group_contains(UnreachableError)
    assert set(answered(tmp_path / "out")) == {"id-0"}
    assert 40 < server.asked["id-1"] < 80
    server.plan.clear()
    assert batch(tmp_path, server).completed == 3
    assert server.asked["id-0"] == 1


# ---- disks that fail -------------------------------------------------------------------------


def refusing(name: str, after: int, number: int) -> Callable[[FileCall], None]:
    """Fails calls of ``name``, ``number`` of them after the first ``after``."""
    num_calls = 0

    def on_call(call: FileCall) -> None:
        nonlocal num_calls
        if call.name == name:
            num_calls += 1
            if after < num_calls <= after + number:
                raise OSError(errno.ENOSPC, "No space left on device")

    return on_call


@pytest.mark.parametrize(("name", "after"), [("write", 0), ("write", 5), ("fsync", 0)])
def test_answers_wait_for_a_disk_that_refuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    monkeypatch.setattr(run, "_SYNC_S", 0.0)
    write_lines(tmp_path / "in", [line(one) for one in IDS])
    server = Server()
    with FaultyFiles(tmp_path, on_call=refusing(name, after, 5)):
        assert batch(tmp_path, server, disk_limit_s=60.0).completed == 20
    assert answered(tmp_path / "out") == {one: {"text": one} for one in IDS}
    assert set(server.asked.values()) == {1}


def test_nothing_is_asked_while_there_is_no_room(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [line(one) for one in IDS])
    server = Server()
    requests = RequestFile.check(tmp_path / "in")
    with ResponseFile(tmp_path / "out") as answers:
        work = BatchRun(requests, answers, answers, server.send, 4, 60.0)
        with (
            FaultyFiles(tmp_path, Fault(0, lasts=True)),
            pytest.raises(OSError, match="No space left"),
        ):
            asyncio.run(work.run())
    assert not server.asked


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_a_disk_that_fails_for_good_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(run, "_SYNC_S", 0.0)
    write_lines(tmp_path / "in", [line(one) for one in IDS])
    server = Server()
    with (
        FaultyFiles(tmp_path, on_call=refusing(name, 5, 10**9)),
        pytest.raises((OSError, ExceptionGroup)) as caught,
    ):
        batch(tmp_path, server)
    error = caught.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, OSError)
    before = answered(tmp_path / "out")
    assert 0 < len(before) < 20 or name == "fsync"
    assert batch(tmp_path, server).completed == 20
    assert all(server.asked[one] == 1 for one in before)
