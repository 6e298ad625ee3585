"""Sessions are copied between workers: they go on from the copies when their own worker is gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints.random_checkpoint import TINY, write
from benchmarks.harness.cluster_gateway import Answer, ClusterGateway, gateway_of
from benchmarks.harness.serving_cluster import (
    WAIT_LIMIT_S,
    ThreadCluster,
    ThreadWorkerGroup,
    serving,
)
from tests.harness.conversation import (
    LONG,
    RESTORED,
    Conversation,
    total,
    undisturbed,
    wait_lost,
)
from tests.harness.fault_rows import quiet_config, whole, with_model
from tests.harness.tiers import quick_rows
from workers.model.families.registry import FAMILIES
from workers.process.context import WorkerContext
from workers.process.intake import kv_restores
from workers.process.worker.worker import Worker

TIERS = {"kv_host_bytes": 64 << 20}
STATES = "qwen3_next"
"""A family with recurrent states."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are restored, however busy this machine is."""
    monkeypatch.setattr(kv_restores, "MIN_LIMIT_S", WAIT_LIMIT_S)


class _Mortal(Worker):
    """A worker with attention that dies between two steps when it is told to."""

    must_die = False

    def die(self) -> None:
        self.must_die = True
        self._interrupts.wake()

    def load(self, context: WorkerContext) -> dict[str, Any]:
        info = super().load(context)
        between_steps = self.roles.between_steps

        def die_between_steps() -> None:
            if self.must_die:
                raise RuntimeError("it dies here")
            between_steps()

        self.roles.between_steps = die_between_steps  # type: ignore[method-assign]
        return info


@contextmanager
def mortal(
    mode: str, tiers: Mapping[str, Any] = TIERS, model: Path | None = None
) -> Iterator[tuple[ThreadCluster, ClusterGateway]]:
    """Two workers with attention, and a gateway; of the bundled model unless given."""
    num_experts = 2 if mode == "colocated" else 1
    config = quiet_config(2, num_experts, mode=mode, kv_tiers=dict(tiers))
    config = config if model is None else with_model(config, model)
    group = ThreadWorkerGroup(by_role={"attention": _Mortal, "colocated": _Mortal})
    cluster = ThreadCluster(config, group)
    with serving(cluster), gateway_of(cluster) as gateway:
        yield cluster, gateway


def kill(cluster: ThreadCluster, name: str) -> None:
    """A worker dies; another one takes its place."""
    worker = cluster.group.workers[name]
    assert isinstance(worker, _Mortal)
    worker.die()
    wait_lost(cluster, name)


@pytest.fixture(scope="module")
def expected() -> list[Answer]:
    return undisturbed(40, 40, 40)


@pytest.mark.parametrize("mode", quick_rows({"disaggregated"}, ["disaggregated", "colocated"]))
def test_a_session_goes_on_from_its_copies(mode: str, expected: list[Answer]) -> None:
    with mortal(mode) as (cluster, gateway):
        talk = Conversation(gateway)
        streams = talk.begin()
        home = talk.home()
        answers = [talk.end(streams)]
        holders = talk.wait_copies()
        assert home in holders
        kill(cluster, home)
        whole(cluster)
        talk.wait_workers(2)
        for _ in range(2):  # the second one shows that copies are made anew
            num_known = talk.num_computed
            streams = talk.begin()
            home = talk.home()
            answers.append(talk.end(streams))
            assert answers[-1].cached_tokens == num_known
            assert talk.wait_copies() - {home}
    assert answers == expected
    assert gateway.num_resubmitted == 0


def test_a_turn_that_loses_its_worker_is_restored() -> None:
    with mortal("disaggregated") as (cluster, gateway):
        talk = Conversation(gateway)
        answers = [talk.turn()]
        talk.wait_copies()
        num_known = talk.num_computed
        streams = talk.begin(LONG)
        streams.wait_tokens(10)
        kill(cluster, talk.home())
        answers.append(talk.end(streams))
        assert gateway.num_resubmitted == 1
        assert total(cluster, RESTORED) >= num_known
    assert answers == undisturbed(40, LONG)


def test_sessions_of_a_drained_worker_go_on_from_their_copies(expected: list[Answer]) -> None:
    with mortal("disaggregated") as (cluster, gateway):
        talk = Conversation(gateway)
        streams = talk.begin()
        home = talk.home()
        answers = [talk.end(streams)]
        talk.wait_copies()
        cluster.call("begin", "drain", {"worker": home, "limit_s": WAIT_LIMIT_S})
        cluster.wait(
            lambda s: any(w["name"] == home and w["state"] == "DRAINED" for w in s["workers"])
        )
        num_known = talk.num_computed
        answers.append(talk.turn())
        assert answers[1].cached_tokens == num_known
    assert answers == expected[:2]


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f == STATES else pytest.mark.slow) for f in sorted(FAMILIES)],
)
def test_sessions_of_every_family_go_on(family: str, tmp_path: Path) -> None:
    """With recurrent states where there are any."""
    model = write(dataclasses.replace(TINY, family=family), tmp_path)
    with mortal("disaggregated", model=model) as (cluster, gateway):
        talk = Conversation(gateway)
        streams = talk.begin()
        home = talk.home()
        answers = [talk.end(streams)]
        talk.wait_copies()
        kill(cluster, home)
        num_known = talk.num_computed
        answers.append(talk.turn())
        assert answers[1].cached_tokens == num_known
    assert answers == undisturbed(40, 40, model=model)


@pytest.mark.parametrize(
    "tiers",
    [
        pytest.param({}, id="no host memory"),
        pytest.param({**TIERS, "session_copies": False}, id="switched off"),
    ],
)
def test_nothing_is_copied_without_host_memory_or_when_switched_off(
    tiers: Mapping[str, Any],
) -> None:
    with mortal("disaggregated", tiers) as (cluster, gateway):
        talk = Conversation(gateway)
        talk.turn()
        answer = talk.turn()
        assert answer.cached_tokens
        hellos = gateway.run(_hellos(gateway))
        assert hellos == [False, False]
        assert total(cluster, "session_copy_blocks_total") == 0


async def _hellos(gateway: ClusterGateway) -> list[bool]:
    found = (client.hello for client in gateway.engines.clients)
    return [hello.keeps_copies for hello in found if hello is not None]
