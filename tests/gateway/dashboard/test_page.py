"""The web page's files and data; ``test_browser`` has it in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import gateway.dashboard
from benchmarks.harness.large_snapshot import snapshot_of
from cluster.config.gateway import GatewaySection
from cluster.tracing.gateway_counts import GatewayCounts, GatewayRecord
from gateway.dashboard.data import MAX_EVENTS, PageData
from gateway.dashboard.sampler import Sampler
from tests.gateway.stack import WAIT_S, Stack, complete, running_stack

STATIC = Path(gateway.dashboard.__file__).parent / "static"
FILES = [p.relative_to(STATIC).as_posix() for p in STATIC.rglob("*.*")]


@pytest.fixture(scope="module")
def keyed() -> Iterator[Stack]:
    section = GatewaySection(api_keys=("secret",), admin_keys=("root",), request_timeout_s=WAIT_S)
    with running_stack(section) as stack:
        yield stack


def admin_client(stack: Stack) -> httpx.Client:
    return httpx.Client(base_url=f"http://{stack.admin.http}", timeout=WAIT_S)


@pytest.mark.parametrize("path", ["/", "/dashboard"])
def test_the_page_needs_no_key_and_runs_no_inline_code(keyed: Stack, path: str) -> None:
    answer = keyed.http.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert 'data-port="public"' in answer.text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", answer.text)
    assert not re.search(r"(src|href)=\"(https?:)?//", answer.text), "all files are our own"


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_without_a_key(keyed: Stack, name: str) -> None:
    answer = keyed.http.get(f"/dashboard/static/{name}")
    assert answer.status_code == 200
    assert answer.content == (STATIC / name).read_bytes()
    again = keyed.http.get(
        f"/dashboard/static/{name}", headers={"if-none-match": answer.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")


def test_the_licence_of_the_chart_library_is_kept() -> None:
    assert "Leon Sorokin" in (STATIC / "uplot" / "LICENSE").read_text()


@pytest.mark.parametrize(
    "path", ["/dashboard/api/state", "/dashboard/api/history", "/dashboard/api/load"]
)
def test_the_data_needs_the_key_of_its_port(keyed: Stack, path: str) -> None:
    with admin_client(keyed) as admin:
        for client in (keyed.http, admin):
            assert client.get(path).status_code == 401
            headers = {"authorization": "Bearer root"}
            assert client.get(path, headers=headers).status_code == 200


def test_a_key_of_a_client_shows_no_load(keyed: Stack) -> None:
    headers = {"authorization": "Bearer secret"}
    state = keyed.http.get("/dashboard/api/state", headers=headers).json()
    assert state["sees_experts"] is False
    assert state["status"]["is_partial"] is True
    assert state["counters"].keys() == {
        *("prompt_tokens_total", "generation_tokens_total", "request_success_total")
    }
    refused = keyed.http.get("/dashboard/api/load", headers=headers)
    assert refused.status_code == 403
    assert "admin key" in refused.json()["error"]["message"]
    whole = keyed.http.get("/dashboard/api/state", headers={"authorization": "Bearer root"})
    assert whole.json()["sees_experts"] is True


def test_the_state_has_what_all_replicas_counted(stack: Stack) -> None:
    before = stack.http.get("/dashboard/api/state").json()
    complete(stack, prompt="hello", max_tokens=7)
    after = stack.http.get("/dashboard/api/state").json()
    name = "generation_tokens_total"
    assert after["counters"][name] - before["counters"][name] == 7
    assert after["time"] > before["time"]
    requests = "request_success_total"
    assert after["counters"][requests] - before["counters"][requests] == 1
    assert before["started"] == after["started"] <= before["time"]
    assert after["status"]["state"] == "SERVING"
    assert "metrics" not in after["status"]
    assert after["scheme"] == "http", "of the gateway's own ports, for links past a proxy"


def test_the_state_of_a_large_cluster_is_small_and_shared(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 workers and 256 events, for pages that are open at the same time."""
    known = stack.http.get("/dashboard/api/state").json()["status"]
    entries = [{"cause": f"expert-{number} is ready", "effect": "x" * 99} for number in range(256)]
    snapshot = {**known, **snapshot_of(64, 64), "history": entries, "changes": entries}
    asked = []

    async def ask() -> dict[str, object]:
        asked.append(1)
        return snapshot

    monkeypatch.setattr(stack.gateway.numbers, "snapshot", ask)
    data = PageData(stack.gateway, stack.gateway.keys)

    async def ask_twice() -> tuple[dict[str, Any], dict[str, Any]]:
        return await asyncio.gather(data.state(), data.state())

    one, other = stack.run(ask_twice())
    assert len(asked) == 1
    assert one["status"] == other["status"]
    assert len(json.dumps(one)) < 80_000 < len(json.dumps(snapshot)) // 5
    workers = one["status"]["workers"]
    assert len(workers) == 128
    assert workers[0]["stats"].keys() == {"num_requests_running", "num_requests_waiting"}
    assert one["status"]["history"] == entries[-MAX_EVENTS:]
    assert "changes" not in one["status"]


def take_sample(stack: Stack, sampler: Sampler, time_s: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.dashboard.sampler.now_s", lambda: time_s)
        stack.run(sampler.sample())


def take_samples(stack: Stack, tokens: int) -> None:
    """Two samples, with an answer of so many tokens between them."""
    sampler = Sampler(stack.gateway)
    take_sample(stack, sampler, 1000.0)
    headers = {"authorization": "Bearer root"}
    fields = {"prompt": "hello", "max_tokens": tokens}
    assert stack.http.post("/v1/completions", json=fields, headers=headers).is_success
    take_sample(stack, sampler, 1002.0)


def test_the_history_is_there_when_a_page_loads(stack: Stack) -> None:
    take_samples(stack, 7)
    document = stack.http.get("/dashboard/api/history").json()
    (sample,) = document["samples"]
    assert (sample["time"], sample["seconds"], sample["output"]) == (1002.0, 2.0, 7)
    assert sum(count for _, _, count in sample["ttft"]) == 1
    assert sample["waiting"].keys() == sample["kv"].keys()
    later = stack.http.get("/dashboard/api/history?after=1002").json()
    assert later["samples"] == []


def test_a_key_of_a_client_shows_a_history_without_experts(keyed: Stack) -> None:
    take_samples(keyed, 3)
    shown = {}
    for key in ("secret", "root"):
        headers = {"authorization": f"Bearer {key}"}
        (shown[key],) = keyed.http.get("/dashboard/api/history", headers=headers).json()["samples"]
    assert shown["root"].keys() - shown["secret"].keys() == {"balancedness"}
    assert shown["secret"]["output"] == 3


def test_history_and_totals_outlive_a_gateway_and_a_controller(stack: Stack) -> None:
    take_samples(stack, 3)
    headers = {"authorization": "Bearer root"}
    before = stack.http.get("/dashboard/api/state", headers=headers).json()
    own = stack.gateway.counts.ended(())[stack.gateway.name]
    past = {**own["samples"][0], "time": 900.0, "output": 44, "seconds": 2.0}
    totals = dict.fromkeys(own["totals"], 5.0)
    ended = GatewayRecord(time=own["time"], created=77.0, totals=totals, samples=[past])
    stack.controller.counts.exchange({"gateway-ended": ended}, {})
    sampler = Sampler(stack.gateway)
    take_sample(stack, sampler, 1004.0)
    after = stack.http.get("/dashboard/api/state", headers=headers).json()
    assert after["started"] == 77.0
    for name, value in before["counters"].items():
        assert after["counters"][name] == value + 5
    shown = stack.http.get("/dashboard/api/history", headers=headers).json()["samples"]
    assert [(one["time"], one["output"]) for one in shown[:2]] == [(900.0, 44), (1002.0, 3)]
    stack.controller.counts = GatewayCounts()  # another controller
    take_sample(stack, sampler, 1006.0)
    take_sample(stack, sampler, 1008.0)
    assert "gateway-ended" in stack.controller.counts.times()


@pytest.mark.parametrize("after", ["-1", "x", "", "1.5", "9" * 99])
def test_a_time_that_is_none(stack: Stack, after: str) -> None:
    answer = stack.http.get("/dashboard/api/history", params={"after": after})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "after"


def test_every_word_with_a_tooltip_has_one() -> None:
    page = (STATIC / "index.html").read_text() + (STATIC / "main.js").read_text()
    used = {a or b for a, b in re.findall(r'data-term="(\w+)"|term\("(\w+)"', page)}
    known = set(re.findall(r"^  (\w+): \"", (STATIC / "terms.js").read_text(), re.MULTILINE))
    assert used == known
    assert {"ttft", "itl", "kv", "balancedness", "phases", "generation", "epoch"} <= known


def test_a_button_that_may_be_disabled_has_a_place_for_the_reason() -> None:
    page = (STATIC / "index.html").read_text()
    scripts = "".join(path.read_text() for path in STATIC.glob("*.js"))
    for name in set(re.findall(r'allow\(byId\("([\w-]+)"\)', scripts)):
        (reason,) = re.findall(rf'id="{name}"[^>]* aria-describedby="([\w-]+)"', page)
        assert f'id="{reason}"' in page


def test_the_load_of_a_bank_has_a_cell_for_each_copy(stack: Stack) -> None:
    document = stack.http.get("/dashboard/api/load?bank=0").json()
    assert document["cells"] == [[[0, 1], [1, 2]], [[2, 3], [3, 4]]]
    assert document["workers"] == ["expert-0", "expert-1"]
    assert document["copies"] == [1, 1, 1, 2]
    assert document["banks"] == [
        {"layer": 0, "bank": "mlp", "balancedness": {"predicted": 1.0, "achieved": 0.5}}
    ]


@pytest.mark.parametrize("bank", ["1", "-1", "x", "", "9" * 99])
def test_a_bank_that_is_none(stack: Stack, bank: str) -> None:
    answer = stack.http.get("/dashboard/api/load", params={"bank": bank})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "bank"


def test_the_page_of_the_admin_port_has_the_buttons(stack: Stack) -> None:
    with admin_client(stack) as admin:
        answer = admin.get("/dashboard")
        assert answer.status_code == 200
        assert 'data-port="admin"' in answer.text
        assert admin.get("/dashboard/static/main.js").status_code == 200
