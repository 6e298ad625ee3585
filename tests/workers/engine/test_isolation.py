"""Which request is to blame when workers die one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from benchmarks.harness.local_engine import LocalEngine
from cluster.core.errors import PeerLostError
from cluster.core.topology import Generation, StepGroup
from tests.cluster.controller.fakes_cluster import make_members
from tests.fakes import FailingDispatcher
from tests.workers.scheduling.test_scheduler import Desk, rows
from workers.engine.isolation import ACKNOWLEDGE_LIMIT_S, Isolation, StepMembers
from workers.requests.request import (
    FinishReason,
    Queued,
    Request,
    SamplingParams,
    SoloStage,
    SoloStep,
    TokenOutput,
)
from workers.requests.sequence import SequenceStatus
from workers.requests.step_header import Grant, Grants, StepHeader
from workers.scheduling.step_intent import Restriction

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def always(request_id: str) -> bool:
    return True


def twice_hit(*names: str) -> Isolation:
    """After two deaths with these requests in the step."""
    isolation = Isolation()
    for name in names:
        isolation.enter(name, 0)
    for _ in range(2):
        isolation.record_abandoned(names)
        assert isolation.record_death() is None
    return isolation


def test_two_deaths_make_a_suspect() -> None:
    isolation = Isolation()
    isolation.record_abandoned(["a", "b"])
    isolation.record_death()
    assert not isolation.suspects
    isolation.commit({"b"})
    isolation.record_abandoned(["a", "b"])
    isolation.record_death()
    assert isolation.suspects == {"a"}
    isolation.enter("c", 2)
    assert isolation.suspects == {"a", "c"}


def test_a_step_that_broke_without_a_death_counts_nothing() -> None:
    isolation = Isolation()
    for _ in range(5):
        isolation.record_abandoned(["a"])
        isolation.commit({"a"})
        assert isolation.record_death() is None
    assert not isolation.suspects


def advance(isolation: Isolation, now_s: float = 0.0) -> list[SoloStep | Queued]:
    return isolation.advance(always, lambda name: 3, now_s)


def stage_of(name: str, stage: SoloStage) -> SoloStep:
    return SoloStep(request_id=name, attempt=3, stage=stage)


def start(isolation: Isolation) -> str:
    """Let the next suspect begin its solo step; its name."""
    (offer,) = advance(isolation)
    assert isinstance(offer, SoloStep)
    assert advance(isolation) == [], "an offer is made once"
    isolation.acknowledge(offer)
    assert isolation.is_waiting, "the gateway has recorded nothing yet"
    (certain,) = advance(isolation)
    assert certain == stage_of(offer.request_id, SoloStage.CERTAIN)
    isolation.acknowledge(certain)
    assert isolation.alone == offer.request_id
    assert not isolation.is_waiting
    return offer.request_id


def end(isolation: Isolation, name: str) -> None:
    """The gateway learns that a solo step is over."""
    assert (isolation.is_waiting, isolation.alone) == (True, None)
    (over,) = advance(isolation)
    assert over == stage_of(name, SoloStage.OVER)
    isolation.acknowledge(over)
    assert not isolation.is_waiting


def test_a_commit_clears_and_a_third_death_makes_the_cause() -> None:
    isolation = twice_hit("a", "b")
    assert start(isolation) == "a"
    isolation.commit({"c"})
    assert isolation.alone == "a"
    isolation.commit({"a"})
    assert isolation.suspects == {"b"}
    end(isolation, "a")
    assert start(isolation) == "b"
    isolation.record_abandoned(["b"])
    assert isolation.record_death() == "b"
    isolation.forget("b")
    end(isolation, "b")
    assert isolation.alone is None
    assert not isolation.suspects


@pytest.mark.parametrize("limit_s", [ACKNOWLEDGE_LIMIT_S, 1000 * ACKNOWLEDGE_LIMIT_S])
def test_nothing_runs_before_the_gateway_knows_that_the_step_is_over(limit_s: float) -> None:
    """If this worker died in the next step, the gateway would take the request for the cause."""
    isolation = twice_hit("a", "b")
    assert start(isolation) == "a"
    isolation.commit({"a"})
    isolation.forget("a")  # it was its last token
    (over,) = advance(isolation)
    assert advance(isolation, limit_s) == []
    assert isolation.is_waiting
    isolation.acknowledge(stage_of("a", SoloStage.CERTAIN))  # twice
    assert isolation.is_waiting
    assert isinstance(over, SoloStep)
    isolation.acknowledge(over)
    assert not isolation.is_waiting


def test_a_step_that_is_certain_is_not_withdrawn() -> None:
    isolation = twice_hit("a", "b")
    (offer,) = advance(isolation)
    assert isinstance(offer, SoloStep)
    isolation.acknowledge(offer)
    assert advance(isolation, 1000 * ACKNOWLEDGE_LIMIT_S) == [stage_of("a", SoloStage.CERTAIN)]
    assert advance(isolation, 2000 * ACKNOWLEDGE_LIMIT_S) == []
    assert isolation.is_waiting
    isolation.drop_solo_step()
    assert not isolation.is_waiting
    assert isolation.suspects == {"a", "b"}


def test_an_abort_of_an_offer_ends_it_at_once() -> None:
    isolation = twice_hit("a")
    advance(isolation)
    isolation.forget("a")
    assert not isolation.is_waiting
    assert advance(isolation) == []


def test_a_death_in_which_it_did_not_run_is_not_its_doing() -> None:
    isolation = twice_hit("a")
    assert start(isolation) == "a"
    assert isolation.record_death() is None
    assert isolation.alone == "a"


def test_what_was_given_up_before_a_generation_runs_is_not_held_against_it() -> None:
    """Its step was abandoned because a worker joined, which dies later, outside its steps."""
    isolation = twice_hit("a")
    assert start(isolation) == "a"
    isolation.record_abandoned(["a"])
    isolation.begin_generation()
    assert isolation.record_death() is None
    assert isolation.alone == "a"


def of(number: int, *names: str) -> Generation:
    """A generation of some of two attention and three expert workers."""
    members = tuple(m for m in make_members(2, 3) if m.name in names)
    return Generation(number=number, members=members)


def test_only_members_of_a_generation_that_ran_have_died_in_its_steps() -> None:
    both, more = ("attention-0", "expert-0"), ("attention-0", "expert-0", "expert-1")
    members = StepMembers()
    assert members.take_dead(of(1, *both), ()) == frozenset()
    members.begin_generation(of(1, *both), "attention-0")
    assert members.take_dead(of(2, *more), ()) == frozenset()
    assert members.take_dead(of(3, *both), ()) == frozenset()  # expert-1 was only joining
    assert members.take_dead(of(4, *more), ()) == frozenset()
    members.begin_generation(of(4, *more), "attention-0")
    assert members.take_dead(of(5, *both), ()) == {"expert-1"}
    assert members.take_dead(of(6, "attention-0"), ()) == {"expert-0"}
    assert members.take_dead(of(7, "attention-0"), ()) == frozenset()  # each once


@pytest.mark.parametrize(("name", "dead"), [("attention-0", "expert-0"), ("expert-1", "both")])
def test_workers_of_another_step_group_have_not_died_in_its_steps(name: str, dead: str) -> None:
    groups: dict[int, StepGroup] = {0: "prefill", 1: "decode"}
    whole = of(1, "attention-0", "attention-1", "expert-0", "expert-1")
    own = [replace(m, group=groups[m.rank]) for m in whole.attention]
    members = StepMembers()
    members.begin_generation(replace(whole, members=(*own, *whole.experts)), name)
    lost = {"expert-0", "attention-1"} if dead == "both" else {dead}
    assert members.take_dead(of(2, "attention-0", "expert-1"), ()) == lost


def test_a_drained_worker_is_no_death() -> None:
    names = ("attention-0", "expert-0", "expert-1", "expert-2")
    members = StepMembers()
    members.begin_generation(of(1, *names), "attention-0")
    assert members.take_dead(of(2, "attention-0", "expert-0"), ["expert-1"]) == {"expert-2"}


def test_an_offer_without_an_answer_goes_to_the_end() -> None:
    isolation = twice_hit("a", "b")
    (first,) = advance(isolation)
    assert advance(isolation, ACKNOWLEDGE_LIMIT_S - 0.01) == []
    assert isolation.is_waiting
    assert advance(isolation, ACKNOWLEDGE_LIMIT_S) == [Queued(request_id="a", attempt=3)]
    assert not isolation.is_waiting
    (second,) = advance(isolation, 2.0)
    assert (first.request_id, second.request_id) == ("a", "b")
    assert isinstance(first, SoloStep)
    isolation.acknowledge(first)  # too late, and its gateway has recorded nothing
    assert advance(isolation, 2.0) == []
    assert isolation.alone is None
    assert twice_hit("a").advance(lambda name: False, lambda name: 3, 0.0) == []


def test_a_plan_leaves_out_requests_held_back_or_not_alone() -> None:
    desk = Desk()
    (first,) = desk.add(5)
    desk.step()
    (second,) = desk.add(6)
    (third,) = desk.add(7)
    names = [s.request.request_id for s in (first, second, third)]
    desk.restriction = Restriction(frozenset(names[:2]))
    wanted = desk.wanted()
    assert (wanted.decode_rows, wanted.prefill_rows, wanted.is_alone) == (0, 7, False)
    assert [p.sequence for p in desk.grant(0, 7).rows] == [third]
    desk.restriction = Restriction(frozenset(names), names[1])
    wanted = desk.wanted()
    assert (wanted.decode_rows, wanted.prefill_rows, wanted.is_alone) == (0, 6, True)
    assert [p.sequence for p in desk.grant(4, 32).rows] == [second]
    desk.restriction = Restriction(frozenset(), names[0])
    assert desk.wanted().decode_rows == 1


@pytest.mark.parametrize("seats", [1, 4])
def test_a_request_that_must_run_alone_gets_room(seats: int) -> None:
    """Others may have taken it in a step that was on its way when it was accepted."""
    desk = Desk(num_blocks=6, max_num_seqs=seats)
    (other,) = desk.add(16, SamplingParams(max_tokens=4))
    desk.step()
    (suspect,) = desk.add(9, SamplingParams(max_tokens=8))
    desk.restriction = Restriction(frozenset({"r1"}), "r1")
    assert rows(desk.plan()) == [("r1", 0, 9, False)]
    assert other.status is SequenceStatus.WAITING
    desk.step()
    assert suspect.output == [50]
    desk.restriction = Restriction()
    while SequenceStatus.FINISHED not in (other.status, suspect.status):
        desk.step()


def test_a_request_that_runs_alone_takes_the_next_block_from_another() -> None:
    desk = Desk(num_blocks=6)
    (other,) = desk.add(9, SamplingParams(max_tokens=4))
    desk.add(11, SamplingParams(max_tokens=8))
    desk.step()
    desk.step()
    assert desk.pool.num_free == 0
    desk.restriction = Restriction(frozenset({"r1"}), "r1")
    assert rows(desk.plan()) == [("r1", 12, 1, True)]
    assert other.status is SequenceStatus.WAITING


class Cluster:
    """One engine whose peers die at the test's order."""

    def __init__(self, checkpoint: Path, clock: Callable[[], float] = time.monotonic) -> None:
        local = LocalEngine(checkpoint, wrap=FailingDispatcher, clock=clock)
        assert isinstance(local.dispatcher, FailingDispatcher)
        self.engine, self.peers = local.engine, local.dispatcher
        self.number = 0
        self.steps: list[bool] = []
        """Of each step, whether it was for one request alone."""

    def step(self, dies: bool = False) -> list[TokenOutput]:
        """What a worker does in one pass of its loop."""
        wanted = self.engine.rows_wanted()
        grant = Grant(decode_rows=wanted.decode_rows, prefill_rows=wanted.prefill_rows)
        self.number += 1
        header = StepHeader(
            generation=1,
            step=self.number,
            epoch=1,
            oldest_epoch=1,
            grants=Grants.of({0: grant}),
            exact=bool(grant.prefill_rows),
            is_alone=wanted.is_alone,
        )
        self.steps.append(header.is_alone)
        if not dies:
            return self.engine.step(header)
        self.peers.fail_at = 0
        with pytest.raises(PeerLostError):
            self.engine.step(header)
        self.engine.requests.record_worker_death()
        return self.engine.poll()

    def run_alone(self) -> list[SoloStep | Queued]:
        """Answer as a gateway does, until nothing is left to answer; returns the messages."""
        seen: list[SoloStep | Queued] = []
        while messages := self.engine.requests.take_solo_steps():
            for message in messages:
                if isinstance(message, SoloStep):
                    self.engine.requests.isolation.acknowledge(message)
            seen += messages
        return seen


def test_an_engine_runs_suspects_alone_and_fails_the_one_that_kills(tiny_checkpoint: Path) -> None:
    cluster = Cluster(tiny_checkpoint)
    engine = cluster.engine
    for name in "ab":
        engine.add_request(Request(request_id=name, prompt=(5, 6, 7), params=GREEDY, n=2))
    cluster.step(dies=True)
    assert engine.requests.take_solo_steps() == []
    cluster.step(dies=True)
    engine.add_request(Request(request_id="c", prompt=(8, 9), params=GREEDY))
    assert engine.requests.take_solo_steps() == [SoloStep(request_id="a", attempt=0)]
    assert engine.rows_wanted().prefill_rows == 0  # nothing runs before it is recorded
    engine.requests.isolation.acknowledge(SoloStep(request_id="a", attempt=1))
    assert engine.requests.take_solo_steps() == []
    engine.requests.isolation.acknowledge(SoloStep(request_id="a", attempt=0))
    assert engine.rows_wanted().prefill_rows == 0
    cluster.run_alone()
    outputs = cluster.step()
    assert {output.request_id for output in outputs} == {"a"}
    assert cluster.run_alone() == [
        SoloStep(request_id="a", attempt=0, stage=SoloStage.OVER),
        SoloStep(request_id="b", attempt=0),
        SoloStep(request_id="b", attempt=0, stage=SoloStage.CERTAIN),
    ]
    outputs = cluster.step(dies=True)
    assert {output.request_id for output in outputs} == {"b"}
    assert {output.error_code for output in outputs} == {"poisonous_request"}
    assert [output.choice for output in outputs] == [0, 1]
    assert cluster.steps == [False, False, True, True]
    assert cluster.run_alone() == [SoloStep(request_id="b", attempt=0, stage=SoloStage.OVER)]
    found: list[TokenOutput] = []
    while engine.has_work:
        found += cluster.step()
    assert {o.request_id for o in found if o.finish_reason is FinishReason.LENGTH} == {"a", "c"}
    assert not any(cluster.steps[4:])
    engine.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_gateway_learns_that_an_offer_without_an_answer_is_withdrawn(
    tiny_checkpoint: Path,
) -> None:
    """Else it would take a request for the cause of a death in a step of others."""
    now = [0.0]
    cluster = Cluster(tiny_checkpoint, clock=lambda: now[0])
    engine = cluster.engine
    for name in "ab":
        engine.add_request(Request(request_id=name, prompt=(5, 6, 7), params=GREEDY))
    cluster.step(dies=True)
    cluster.step(dies=True)
    engine.add_request(Request(request_id="c", prompt=(8, 9), params=GREEDY))
    offer = SoloStep(request_id="a", attempt=0)
    assert engine.requests.take_solo_steps() == [offer]
    now[0] = ACKNOWLEDGE_LIMIT_S
    assert engine.requests.take_solo_steps() == [Queued(request_id="a", attempt=0)]
    assert {output.request_id for output in cluster.step()} == {"c"}
    assert engine.requests.take_solo_steps() == [SoloStep(request_id="b", attempt=0)]
    engine.requests.isolation.acknowledge(offer)  # too late
    assert engine.requests.take_solo_steps() == []
    engine.requests.isolation.acknowledge(SoloStep(request_id="b", attempt=0))
    cluster.run_alone()
    assert {output.request_id for output in cluster.step()} == {"b"}


def test_a_request_brings_its_deaths_along_and_may_be_aborted_in_its_solo_step(
    tiny_checkpoint: Path,
) -> None:
    cluster = Cluster(tiny_checkpoint)
    engine = cluster.engine
    request = Request(request_id="a", prompt=(5, 6), params=GREEDY, attempt=2, num_deaths=2)
    engine.add_request(request)
    engine.add_request(Request(request_id="b", prompt=(5, 6), params=GREEDY))
    cluster.run_alone()
    assert engine.rows_wanted().is_alone
    engine.abort("a")
    assert not engine.rows_wanted().is_alone
    cluster.run_alone()
    assert {output.request_id for output in cluster.step()} == {"b"}
