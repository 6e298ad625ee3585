"""``/metrics`` of several models: one exposition, each series with the name of its model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config.gateway import GatewaySection
from gateway.cluster.serve_replicas import ReplicaCall, own_first
from tests.gateway.fakes import other_tokenizer
from tests.gateway.observability.scrape import Scrape
from tests.gateway.stack import MODEL, OTHER_MODEL, WAIT_S, Stack, complete, running_stack

PEER = "gateway-peer"


class Peers:
    """``ServeReplicas`` with a second replica that has the metrics of the first one's start."""

    def __init__(self, stack: Stack) -> None:
        self._answers = stack.gateway.status.answers
        self.families = stack.gateway.status.own_families()

    async def call(self, question: ReplicaCall, *details: Any) -> dict[str, Any]:
        other = self.families if question == "metrics" else {"name": PEER}
        return own_first(self._answers.handle(question, *details), {PEER: other})


@pytest.fixture(scope="module")
def replicated() -> Iterator[Stack]:
    section = GatewaySection(request_timeout_s=WAIT_S, num_gateway_replicas=2)
    with running_stack(section, more_models={OTHER_MODEL: other_tokenizer()}) as stack:
        complete(stack, prompt=[65], max_tokens=2, model=OTHER_MODEL)
        stack.gateway.status.replicas = Peers(stack)
        yield stack


def scrape(stack: Stack) -> Scrape:
    """Fails if a family or a series is there twice."""
    return Scrape.of(stack.http.get("/metrics").text)


def test_each_model_has_its_own_series(pair: Stack) -> None:
    before = scrape(pair)
    complete(pair, prompt="hello", max_tokens=3, model=MODEL)
    complete(pair, prompt="hello", max_tokens=5, model=OTHER_MODEL)
    after = scrape(pair)
    grown = {
        (model, name): after.since(before, name, model_name=model)
        for model in (MODEL, OTHER_MODEL)
        for name in ("prompt_tokens_total", "generation_tokens_total")
    }
    assert grown == {
        (MODEL, "prompt_tokens_total"): 1,
        (MODEL, "generation_tokens_total"): 3,
        (OTHER_MODEL, "prompt_tokens_total"): 5,
        (OTHER_MODEL, "generation_tokens_total"): 5,
    }
    assert after.label_values()["model_name"] == {MODEL, OTHER_MODEL}


def test_workers_with_equal_names_have_series_of_their_own(pair: Stack) -> None:
    found = scrape(pair).samples("expert_worker_up")
    up = {(sample.labels["model_name"], sample.labels["worker"]) for sample in found}
    assert up == {(model, f"expert-{rank}") for model in (MODEL, OTHER_MODEL) for rank in (0, 1)}


def test_each_family_is_described_once(pair: Stack) -> None:
    text = pair.http.get("/metrics").text
    described = re.findall(r"^# TYPE (\S+) ", text, re.M)
    assert len(described) == len(set(described))
    assert len(list(text_string_to_metric_families(text))) == len(described)


def test_replicas_report_each_model_once(replicated: Stack) -> None:
    complete(replicated, prompt=[65], max_tokens=3, model=MODEL)
    complete(replicated, prompt=[65], max_tokens=4, model=OTHER_MODEL)
    found = scrape(replicated)
    tokens = {
        (s.labels["gateway"], s.labels["model_name"]): s.value
        for s in found.samples("generation_tokens_total")
    }
    assert tokens == {
        ("gateway-test", MODEL): 3,
        ("gateway-test", OTHER_MODEL): 6,
        (PEER, MODEL): 0,
        (PEER, OTHER_MODEL): 2,
    }
    running = [s.labels["model_name"] for s in found.samples("num_requests_running")]
    assert sorted(running) == sorted((MODEL, OTHER_MODEL))


def test_a_replica_that_does_not_know_a_model_has_no_series_of_it(replicated: Stack) -> None:
    peers = Peers(replicated)
    del peers.families[OTHER_MODEL]
    former, replicated.gateway.status.replicas = replicated.gateway.status.replicas, peers
    found = scrape(replicated).samples("generation_tokens_total")
    replicated.gateway.status.replicas = former
    assert {(s.labels["gateway"], s.labels["model_name"]) for s in found} == {
        ("gateway-test", MODEL),
        ("gateway-test", OTHER_MODEL),
        (PEER, MODEL),
    }


def test_the_names_of_vllm_have_series_of_all_models() -> None:
    section = GatewaySection(request_timeout_s=WAIT_S, vllm_metric_names=True)
    with running_stack(section, more_models={OTHER_MODEL: other_tokenizer()}) as stack:
        complete(stack, prompt=[65], max_tokens=2, model=MODEL)
        complete(stack, prompt=[65], max_tokens=3, model=OTHER_MODEL)
        families = list(text_string_to_metric_families(stack.http.get("/metrics").text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    (tokens,) = [family for family in families if family.name == "vllm:generation_tokens"]
    values = {s.labels["model_name"]: s.value for s in tokens.samples if s.name.endswith("_total")}
    assert values == {MODEL: 2, OTHER_MODEL: 3}
