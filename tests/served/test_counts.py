"""Every counter and histogram of ``/metrics`` against calls whose tokens are known."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from benchmarks.harness.server import WAIT_S, Served, running_server
from benchmarks.harness.stalls import wait_until
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.grpc.test_grpc import request_of
from tests.gateway.observability.scrape import Scrape
from tests.paths import DEMO
from tests.served.conftest import HEADERS, KEY, LIMITED_KEY, OPERATOR

pytestmark = pytest.mark.ray

LONG = 4000
"""Tokens of a stream that its client leaves."""
_CONFIG = json.loads((DEMO / "config.json").read_text())
PAIRS_OF_A_ROW = _CONFIG["num_hidden_layers"] * _CONFIG["num_experts_per_tok"]
"""Pairs of token and expert, in all layers."""


def ids_of(length: int, first: int = 40) -> list[int]:
    """A prompt."""
    return [first + place % 150 for place in range(length)]


@dataclass(slots=True)
class Sent:
    """What the counters must have grown by."""

    num_calls: int = 0
    """That generate or read, and come to their end."""
    prompts: list[int] = field(default_factory=list)
    """Tokens of each prompt."""
    queried: int = 0
    """Tokens of prompts, for every choice."""
    cached: int = 0
    """Of the prompts' tokens those that the answers call cached."""
    outputs: list[int] = field(default_factory=list)
    """Tokens of each choice."""
    longest: int = 0
    """Tokens of the longest choice of each call, added up."""
    max_tokens: list[int] = field(default_factory=list)
    """Of each prompt that is continued."""
    n: int = 0
    """Of each call, added up."""
    events: int = 0
    """Server-sent events, but for the last one."""
    answers: dict[tuple[str, str], int] = field(default_factory=dict)
    """By route and status."""

    def add(self, usage: dict[str, Any], outputs: list[int], n: int, max_tokens: int) -> None:
        """A call whose prompts have equally many tokens."""
        num_prompts = max(1, len(outputs) // n)
        length, rest = divmod(usage["prompt_tokens"], num_prompts)
        assert rest == 0
        assert usage.get("completion_tokens", 0) == sum(outputs)
        self.num_calls += 1
        self.prompts += [length] * num_prompts
        self.queried += length * num_prompts * n
        self.cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        self.outputs += outputs
        self.longest += max(outputs)
        self.max_tokens += [max_tokens] * num_prompts if max_tokens else []
        self.n += n

    def answered(self, route: str, status: int) -> None:
        key = route, str(status)
        self.answers[key] = self.answers.get(key, 0) + 1


class Client:
    """Sends calls, and notes what they must be counted as."""

    def __init__(self, server: Served) -> None:
        self.server = server
        self.sent = Sent()

    def scrape(self) -> Scrape:
        return Scrape.of(self.server.client.get("/metrics", headers=OPERATOR).text)

    def post(self, path: str, status: int = 200, key: str = KEY, **fields: Any) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {key}"}
        response = self.server.client.post(path, json=fields, headers=headers)
        assert response.status_code == status, response.text
        self.sent.answered(path, status)
        body: dict[str, Any] = response.json()
        return body

    def complete(self, prompt: Any, max_tokens: int, n: int = 1, **fields: Any) -> None:
        """Generate exactly ``max_tokens`` of each choice."""
        fields |= {"prompt": prompt, "max_tokens": max_tokens, "n": n, "ignore_eos": True}
        answer = self.post("/v1/completions", **fields)
        outputs = [max_tokens] * len(answer["choices"])
        self.sent.add(answer["usage"], outputs, n, max_tokens)

    def stream(self, path: str, max_tokens: int, n: int = 1, **fields: Any) -> None:
        """The same as a stream."""
        fields |= {"max_tokens": max_tokens, "n": n, "ignore_eos": True, "stream": True}
        fields |= {"stream_options": {"include_usage": True}}
        answer = self.server.client.post(path, json=fields, headers=HEADERS)
        assert answer.status_code == 200, answer.text
        *events, done = [line for line in answer.text.split("\n\n") if line.startswith("data: ")]
        assert done == "data: [DONE]"
        self.sent.answered(path, 200)
        self.sent.events += len(events)
        usage = json.loads(events[-1].removeprefix("data: "))["usage"]
        self.sent.add(usage, [max_tokens] * n, n, max_tokens)


@pytest.fixture
def client(keyed: Served) -> Client:
    """No other test sends requests meanwhile. The client is the operator, who sees all series."""
    return Client(keyed)


def check_sent(before: Scrape, after: Scrape, sent: Sent) -> None:
    """Everything that calls which come to their end are counted as."""
    num_outputs = sum(sent.outputs)
    making = [tokens for tokens in sent.outputs if tokens]
    grown = {
        "prompt_tokens_total": sum(sent.prompts),
        "prompt_tokens_cached_total": sent.cached,
        "generation_tokens_total": num_outputs,
        "request_success_total": len(sent.outputs),
        "num_preemptions_total": 0,
        "request_prompt_tokens_count": len(sent.prompts),
        "request_prompt_tokens_sum": sum(sent.prompts),
        "request_prefill_kv_computed_tokens_count": len(sent.prompts),
        "request_prefill_kv_computed_tokens_sum": sum(sent.prompts) - sent.cached,
        "request_generation_tokens_count": len(sent.outputs),
        "request_generation_tokens_sum": num_outputs,
        "request_max_num_generation_tokens_count": sent.num_calls,
        "request_max_num_generation_tokens_sum": sent.longest,
        "request_params_n_count": sent.num_calls,
        "request_params_n_sum": sent.n,
        "request_params_max_tokens_count": len(sent.max_tokens),
        "request_params_max_tokens_sum": sum(sent.max_tokens),
        "inter_token_latency_seconds_count": num_outputs - len(making),
        "request_time_per_output_token_seconds_count": sum(tokens > 1 for tokens in making),
        "e2e_request_latency_seconds_count": sent.num_calls,
        **{
            f"request_{phase}_time_seconds_count": len(sent.outputs)
            for phase in ("queue", "inference", "prefill", "decode")
        },
    }
    found = {name: after.since(before, name) for name in grown}
    assert found == grown


def test_everything_that_is_sent_is_counted_once(client: Client) -> None:
    before, sent = client.scrape(), client.sent
    for length in (5, 9, 30):
        client.complete(ids_of(length), max_tokens=8)
    client.complete(ids_of(12), max_tokens=6, n=3, temperature=1.0)
    client.complete([ids_of(7), ids_of(7, first=60)], max_tokens=5)
    client.complete(ids_of(11), max_tokens=1)
    for _ in range(2):  # the second one finds the first one's blocks
        client.complete(ids_of(120, first=90), max_tokens=4)
    assert sent.cached > 0
    client.stream("/v1/completions", 10, prompt=ids_of(6))
    client.stream("/v1/completions", 7, n=2, prompt=ids_of(8), temperature=1.0)
    messages = [{"role": "user", "content": "Who is there?"}]
    client.stream("/v1/chat/completions", 9, messages=messages)
    answer = client.post("/v1/chat/completions", messages=messages, max_tokens=5, ignore_eos=True)
    sent.add(answer["usage"], [5], 1, 5)
    answer = client.post("/v1/embeddings", input=[ids_of(6), ids_of(6, first=70)])
    sent.add(answer["usage"], [0, 0], 1, 0)
    num_ended = sent.num_calls
    for wrong in ({"prompt": ""}, {"prompt": "x", "temperature": -1}, {"prompt": "x", "n": 0}):
        client.post("/v1/completions", 400, **wrong)
    client.post("/v1/completions", 404, prompt="x", model="another")
    client.post("/v1/completions", 401, key="nobody-s", prompt="x")
    client.post("/v1/completions", key=LIMITED_KEY, prompt=ids_of(4), max_tokens=1)
    sent.add({"prompt_tokens": 4, "completion_tokens": 1}, [1], 1, 1)
    for _ in range(2):
        client.post("/v1/completions", 429, key=LIMITED_KEY, prompt=ids_of(4), max_tokens=1)
    client.server.wait_idle()
    after = client.scrape()

    check_sent(before, after, sent)
    assert after.since(before, "time_to_first_token_seconds_count") == num_ended  # no embeddings
    ends = {"length": len(sent.outputs) - 2, "stop": 0, "abort": 0, "error": 0}
    found = {e: after.since(before, "request_success_total", finished_reason=e) for e in ends}
    assert sum(found.values()) == len(sent.outputs)
    assert (found["abort"], found["error"]) == (0, 0)
    assert after.since(before, "prefix_cache_queries_total") == sent.queried
    for (route, status), number in sent.answers.items():
        labels = {"route": route, "status": status, "method": "POST"}
        assert after.since(before, "http_requests_total", **labels) == number, labels
    assert after.since(before, "admission_rejections_total", reason="key_requests") == 2
    assert after.since(before, "admission_rejections_total") == 2
    assert after.since(before, "sse_events_total") == sent.events
    assert after.since(before, "client_disconnects_total") == 0
    assert after.since(before, "requests_replayed_total") == 0
    assert 3 <= after.since(before, "gateway_stream_lag_seconds_count") <= sent.events


def test_pairs_of_experts_are_those_of_the_steps_rows(client: Client) -> None:
    """The workers' numbers against each other; expert load comes with a report, a little later."""

    def settled_rows(expected: float | None = None) -> float:
        """Wait for the load of all rows; returns their number, which is ``expected`` if given."""
        found: list[float] = []

        def agree() -> bool:
            scrape = client.scrape()
            found[:] = [scrape.value("iteration_tokens_total_sum")]
            pairs = found[0] * PAIRS_OF_A_ROW
            names = ("expert_tokens_total", "expert_worker_tokens_total")
            is_expected = found[0] == expected if expected else found[0] > 0
            return is_expected and all(scrape.value(name) == pairs for name in names)

        wait_until(agree, "the expert load of all rows")
        return found[0]

    before = settled_rows()
    client.complete(ids_of(50), max_tokens=20, cache_salt="alone")
    settled_rows(before + 50 + 20 - 1)


def test_what_a_client_leaves_is_counted_until_then(client: Client) -> None:
    client.server.wait_idle()
    before = client.scrape()
    num_read = 5
    fields = {"prompt": ids_of(6), "max_tokens": LONG, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=client.server.http, timeout=WAIT_S, headers=HEADERS) as leaving,
        leaving.stream("POST", "/v1/completions", json={**fields, "n": 2}) as answer,
    ):
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        for _ in range(num_read):
            next(lines)
    client.server.wait_idle()

    def is_counted() -> bool:
        return client.scrape().since(before, "client_disconnects_total") == 1

    wait_until(is_counted, "the count of the client that left")
    after = client.scrape()
    assert num_read - 1 <= after.since(before, "generation_tokens_total") < 2 * LONG
    assert after.since(before, "prompt_tokens_total") == 6
    assert after.since(before, "request_success_total", finished_reason="abort") == 2
    assert after.since(before, "request_success_total") == 2
    assert after.since(before, "e2e_request_latency_seconds_count") == 0
    labels = {"route": "/v1/completions", "status": "499"}
    assert after.since(before, "http_requests_total", **labels) == 1


def test_grpc_calls_are_counted(client: Client) -> None:
    before = client.scrape()
    with grpc.insecure_channel(client.server.grpc) as channel:
        stub, key = InferenceStub(channel), (("authorization", f"Bearer {KEY}"),)
        sampling = {"max_tokens": 6, "ignore_eos": True}
        good = request_of(text="ROMEO:", sampling_params=sampling)
        usage = stub.Generate(good, timeout=WAIT_S, metadata=key).usage
        wrong = request_of(text="x", sampling_params={"max_tokens": 6, "temperature": -1.0})
        with pytest.raises(grpc.RpcError):
            stub.Generate(wrong, timeout=WAIT_S, metadata=key)

    def grown(code: str) -> float:
        labels = {"method": "Generate", "code": code}
        return client.scrape().since(before, "grpc_requests_total", **labels)

    wait_until(lambda: (grown("OK"), grown("INVALID_ARGUMENT")) == (1, 1), "both counts")
    after = client.scrape()
    assert after.since(before, "generation_tokens_total") == usage.completion_tokens == 6
    assert after.since(before, "prompt_tokens_total") == usage.prompt_tokens


@pytest.mark.slow
def test_a_lost_worker_makes_no_token_count_twice(tmp_path: Path) -> None:
    """Requests go on at another attention worker, which computes their tokens again."""
    num_streams, num_tokens = 6, 400
    with running_server(tmp_path, "--num-attention-workers", "2") as server:
        client = Client(server)
        before = client.scrape()
        status = server.status()["workers"]
        victim = next(int(w["pid"]) for w in status if w["role"] == "attention")
        with ThreadPoolExecutor(num_streams) as pool:
            calls = [
                pool.submit(httpx.post, f"{server.http}/v1/completions", timeout=WAIT_S, json=body)
                for number in range(num_streams)
                for body in [
                    {
                        "prompt": ids_of(40, 41 + number),
                        "max_tokens": num_tokens,
                        "ignore_eos": True,
                    }
                ]
            ]

            def all_run() -> bool:
                tokens = num_streams * 2
                return client.scrape().since(before, "generation_tokens_total") > tokens

            wait_until(all_run, "tokens of all streams")
            os.kill(victim, signal.SIGKILL)
            for call in calls:
                answer = call.result().json()
                client.sent.add(answer["usage"], [num_tokens], 1, num_tokens)
        wait_until(lambda: server.status()["state"] == "SERVING", "the recovery")
        after = client.scrape()
    check_sent(before, after, client.sent)
    assert after.since(before, "request_success_total", finished_reason="length") == num_streams
    assert after.since(before, "time_to_first_token_seconds_count") == num_streams
    assert after.since(before, "recoveries_total", cause="attention_worker") == 1
    assert after.since(before, "recoveries_total") == 1
    replayed = after.since(before, "requests_replayed_total", cause="attention_worker")
    assert 1 <= replayed <= num_streams
    known = after.since(before, "tokens_recomputed_total", cause="attention_worker")
    assert 40 * replayed <= known <= (40 + num_tokens) * replayed
