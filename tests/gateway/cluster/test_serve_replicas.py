"""Several replicas behind one route: each one reports all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config.gateway import GatewaySection
from gateway.cluster.serve_replicas import ReplicaCall, own_first
from tests.gateway.stack import WAIT_S, Stack, complete, running_stack

OTHER = "gateway-other"


class TwoReplicas:
    """``ServeReplicas`` whose second replica has scripted answers."""

    def __init__(self, stack: Stack) -> None:
        self._answers = stack.gateway.status.answers
        self.other: dict[str, Any] = {
            "describe": {"name": OTHER},
            "abort": ["theirs"],
            "metrics": stack.gateway.status.own_families(),
        }
        self.asked: list[tuple[Any, ...]] = []

    async def call(self, question: ReplicaCall, *details: Any) -> dict[str, Any]:
        self.asked.append((question, *details))
        own = self._answers.handle(question, *details)
        return own_first(own, {OTHER: self.other[question]})


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Stack, TwoReplicas]]:
    section = GatewaySection(request_timeout_s=WAIT_S, num_gateway_replicas=2)
    with running_stack(section) as stack:
        complete(stack, prompt="hello", max_tokens=3)
        stack.gateway.status.replicas = peers = TwoReplicas(stack)
        yield stack, peers


def test_the_status_lists_all_with_the_one_that_answers_first(
    pair: tuple[Stack, TwoReplicas],
) -> None:
    stack, _ = pair
    found = stack.http.get("/cluster/v1/status").json()["gateway"]
    assert [replica["name"] for replica in found] == ["gateway-test", OTHER]


def test_every_number_is_reported_once(pair: tuple[Stack, TwoReplicas]) -> None:
    stack, _ = pair
    complete(stack, prompt="hello", max_tokens=4)
    text = stack.http.get("/metrics").text
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    samples = [s for family in families for s in family.samples]
    series = [(s.name, *sorted(s.labels.items())) for s in samples]
    assert len(series) == len(set(series))
    tokens = {
        s.labels["gateway"]: s.value
        for s in samples
        if s.name == "expertmesh:generation_tokens_total"
    }
    assert tokens == {"gateway-test": 7, OTHER: 3}
    assert sum(s.name == "expertmesh:num_requests_running" for s in samples) == 1


def test_requests_of_other_replicas_are_ended(pair: tuple[Stack, TwoReplicas]) -> None:
    stack, peers = pair
    names = ["theirs", "nobody-s"]
    assert stack.run(stack.gateway.status.abort_calls(names)) == ["theirs"]
    assert peers.asked[-1] == ("abort", names)


def test_a_replica_is_not_counted_twice() -> None:
    assert own_first(("a", 1), {"a": 2, "b": 3}) == {"a": 1, "b": 3}
