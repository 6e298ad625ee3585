"""Process groups: what both kinds do, and what NCCL's do beyond that, without a GPU."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from msgspec import structs
from torch import Tensor

from benchmarks.harness.mesh import (
    Mesh,
    TransportName,
    decodes,
    local_dispatcher,
    make_bank,
    make_header,
    make_rows,
    prefill,
)
from cluster.config.cluster import CombineMode
from cluster.core.errors import GenerationChangedError, PeerLostError, TransportError
from tests.workers.transport.nccl_over_gloo import FakeNccl, NcclOverGloo, nccl
from workers.cuda.step_graph import StepGraph
from workers.dispatch.dispatcher import TokenDispatcher
from workers.model.layers import Dispatch
from workers.transport.captured_transfers import CapturedTransfers
from workers.transport.collective import (
    _MAX_AHEAD,
    _MAX_AHEAD_PROMPTS,
    CollectiveTransport,
)
from workers.transport.transport import ExpectedMessage, PartShape, RowMessage, Tag

__all__ = ["nccl"]

BANKS = (make_bank(0), make_bank(1))
KINDS: tuple[TransportName, ...] = ("collective", "nccl")
LIMIT_S = 60.0
"""Longest wait for anything."""


def run_steps(mesh: Mesh, num_attention: int, steps: Sequence[int]) -> None:
    """Some steps, whose results are the local ones."""

    def run(rank: int, dispatcher: TokenDispatcher) -> list[Tensor]:
        dispatcher.begin_step(header, [decodes(4)])
        sent = [Dispatch(b.index, 0, *make_rows(b, 4, rank)) for b in BANKS]
        results = [dispatcher.combine(dispatcher.dispatch(s)) for s in sent]
        dispatcher.finish_step()
        return results

    for step in steps:
        header = make_header((4,) * num_attention, step=step, generation=mesh.generation.number)
        got = mesh.step(header, run)
        expected = [run(rank, local_dispatcher(BANKS)) for rank in range(num_attention)]
        for mine, other in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("num_attention", "num_experts"), [(1, 1), (2, 3), (3, 2)])
def test_all_edges_are_connected_before_the_first_step(
    nccl: FakeNccl, num_attention: int, num_experts: int
) -> None:
    """The first step would connect them without looking at lost peers, in an order of its own."""
    with Mesh(num_attention, num_experts, BANKS, transport="nccl") as mesh:
        homes, experts = range(num_attention), range(num_attention, num_attention + num_experts)
        made = {edge for group in nccl.groups for edge in group.edges}
        assert made == {edge for a in homes for e in experts for edge in ((a, e), (e, a))}
        before = nccl.num_connected
        run_steps(mesh, num_attention, (1, 2))
        assert nccl.num_connected == before


def test_colocated_workers_connect_without_waiting_in_a_circle(nccl: FakeNccl) -> None:
    with Mesh(0, 4, BANKS, transport="nccl", colocated=True) as mesh:
        for group in nccl.groups:
            assert len(group.edges) <= 3
        made = [(group.rank, edge) for group in nccl.groups for edge in group.edges]
        assert len(set(made)) == 4 * 3 * 2, "each rank sends to, and receives from, all others"
        assert len(made) == 2 * len(set(made)), "rows and outputs"
        before = nccl.num_connected
        run_steps(mesh, 4, (1, 2))
        assert nccl.num_connected == before


def test_the_groups_of_a_world_are_aborted_at_the_same_time(nccl: FakeNccl) -> None:
    """An abort may wait for kernels that only the abort of another group ends."""
    together = threading.Barrier(4)
    nccl.aborting = lambda group: together.wait(LIMIT_S)
    with Mesh(0, 1, BANKS, transport="nccl", colocated=True):
        assert len(nccl.groups) == 4
    for group in nccl.groups:
        assert group.aborted.wait(LIMIT_S)
    assert not together.broken


def test_the_group_that_sends_is_aborted_first(nccl: FakeNccl) -> None:
    """Else an aborted receive would let the stream compute of memory, and send that."""
    order: list[NcclOverGloo] = []
    nccl.aborting = order.append
    with Mesh(1, 1, BANKS, transport="nccl"):
        pass
    for group in nccl.groups:
        assert group.aborted.wait(LIMIT_S)
    for rank in (0, 1):
        sends = [{sender for sender, _ in g.edges} == {rank} for g in order if g.rank == rank]
        assert sends == [True, False]


def test_giving_up_a_world_does_not_wait_for_its_groups(nccl: FakeNccl) -> None:
    may_abort = threading.Event()
    nccl.aborting = lambda group: may_abort.wait(LIMIT_S)
    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        old = list(nccl.groups)
        mesh.apply(structs.replace(mesh.generation, number=2))
        assert not any(group.aborted.is_set() for group in old)
        run_steps(mesh, 1, (1,))
        may_abort.set()
        for group in old:
            assert group.aborted.wait(LIMIT_S)


@pytest.mark.parametrize("when", ["making", "connecting"])
def test_a_world_that_is_built_as_an_interrupt_comes_is_given_up(nccl: FakeNccl, when: str) -> None:
    """Its group is aborted at once, or as soon as it is made: nobody else would ever do it."""
    reached, go_on = threading.Event(), threading.Event()

    def stay(*group: NcclOverGloo) -> None:
        reached.set()
        assert go_on.wait(LIMIT_S)

    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        worker = mesh["attention-0"]
        setattr(nccl, when, stay)
        generation = structs.replace(mesh.generation, number=2)
        building = mesh.pool.submit(worker.transport.apply_generation, generation)
        assert reached.wait(LIMIT_S)
        worker.connections.interrupt(3)
        with pytest.raises(GenerationChangedError):
            building.result(LIMIT_S)
        if when == "connecting":
            assert nccl.groups[-1].aborted.wait(LIMIT_S)
        setattr(nccl, when, lambda *group: None)
        go_on.set()
        end_of("world-build")
        assert nccl.groups[-1].aborted.wait(LIMIT_S)
        assert len(nccl.groups) == 5, "no further group was made"


def end_of(name: str) -> None:
    """Wait for threads of that name."""
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(LIMIT_S)
            assert not thread.is_alive()


def test_an_error_of_nccl_is_a_lost_peer(nccl: FakeNccl) -> None:
    """Not an error of this worker, which would end it; also for all who use the world later.

    The step ends with it: only the device waits between layers.
    """
    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        while not nccl.works.empty():
            nccl.works.get()
        dispatcher, transport = mesh["attention-0"].dispatcher, mesh["attention-0"].transport
        assert dispatcher is not None
        dispatcher.begin_step(make_header((4,)), [decodes(4)])
        sent = dispatcher.dispatch(Dispatch(0, 0, *make_rows(BANKS[0], 4, 0)))
        waiting = mesh.pool.submit(dispatcher.combine, sent)
        nccl.works.get(timeout=LIMIT_S)
        outputs = nccl.works.get(timeout=LIMIT_S)
        outputs.fail()
        waiting.result(LIMIT_S)
        with pytest.raises(PeerLostError, match="expert-0: NCCL reports an error"):
            dispatcher.finish_step()
        message = RowMessage(0, (torch.ones(1, 4),))
        with pytest.raises(PeerLostError, match="expert-0: NCCL reports an error"):
            transport.post(Tag(1, 0, 0, "rows"), [message], sized=False)


TAG = Tag(0, 0, 0, "outputs")
EXPECTED = [ExpectedMessage(0, (PartShape(4, torch.float32),), (2,))]


def test_only_the_device_waits_for_what_the_host_does_not_read(nccl: FakeNccl) -> None:
    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        nccl.holds = False
        sender, receiver = mesh["expert-0"].transport, mesh["attention-0"].transport
        ((got,),) = receiver.receive(TAG, EXPECTED, sized=False, must_wait=False)
        finishing = mesh.pool.submit(receiver.finish_step)
        with pytest.raises(TimeoutError):
            finishing.result(0.1)
        sender.post(TAG, [RowMessage(0, (torch.ones(2, 4),))], sized=False)
        finishing.result(LIMIT_S)
        assert torch.equal(got, torch.ones(2, 4))
        receiver.finish_step()  # nothing is left


@pytest.mark.parametrize(("prompts", "most"), [(False, _MAX_AHEAD), (True, _MAX_AHEAD_PROMPTS)])
def test_the_host_is_a_few_receives_ahead_and_no_more(
    nccl: FakeNccl, prompts: bool, most: int
) -> None:
    """A stream that waits for a lost peer does not take any number of launches."""
    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        nccl.holds = False
        sender, receiver = mesh["expert-0"].transport, mesh["attention-0"].transport
        receiver.begin_step(make_header((2,), prompts=prompts))

        def receive(number: int) -> None:
            receiver.receive(TAG._replace(bank=number), EXPECTED, sized=False, must_wait=False)

        for number in range(most):
            receive(number)
        one_more = mesh.pool.submit(receive, most)
        with pytest.raises(TimeoutError):
            one_more.result(0.1)
        message = RowMessage(0, (torch.ones(2, 4),))
        sender.post(TAG._replace(bank=0), [message], sized=False)
        one_more.result(LIMIT_S)
        for number in range(1, most + 1):
            sender.post(TAG._replace(bank=number), [message], sized=False)
        receiver.finish_step()


def test_the_end_of_a_step_does_not_wait_for_a_peer_that_is_lost(nccl: FakeNccl) -> None:
    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        nccl.holds = False
        receiver = mesh["attention-0"].transport
        receiver.receive(TAG, EXPECTED, sized=False, must_wait=False)
        mesh["attention-0"].connections.interrupt(3)
        with pytest.raises(GenerationChangedError):
            receiver.finish_step()


def test_a_step_that_ends_with_an_interrupt_frees_the_device(nccl: FakeNccl) -> None:
    """It may wait for what never comes: whatever is given to it next would wait as well."""
    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        nccl.holds = False
        home = mesh["attention-0"]
        home.transport.receive(TAG, EXPECTED, sized=False, must_wait=False)
        home.connections.interrupt(3)
        with pytest.raises(GenerationChangedError):
            home.transport.post(
                TAG._replace(direction="rows"), [RowMessage(0, (torch.ones(2, 4),))], sized=False
            )
        for group in nccl.groups:
            if group.rank == 0:
                assert group.aborted.wait(LIMIT_S)


def test_memory_is_not_kept_for_the_end_of_the_step(nccl: FakeNccl) -> None:
    """That is the outputs of all layers. On a GPU, torch knows when NCCL has written to it."""
    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        sender, receiver = mesh["expert-0"].transport, mesh["attention-0"].transport
        sender.post(TAG, [RowMessage(0, (torch.ones(2, 4),))], sized=False)
        ((got,),) = receiver.receive(TAG, EXPECTED, sized=False, must_wait=False)
        kept = weakref.ref(got)
        del got
        while not nccl.works.empty():
            nccl.works.get()
        assert kept() is None
        receiver.finish_step()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("combine_mode", ["sum", "per_slot"])
def test_the_host_waits_between_layers_only_to_read(
    nccl: FakeNccl, exact: bool, combine_mode: CombineMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of prompts, and pairs, are picked by the host; decode rows are all sent."""
    reads: list[bool] = []
    receive = CollectiveTransport.receive

    def spy(*arguments: Any, must_wait: bool, **others: Any) -> list[tuple[Tensor, ...]]:
        reads.append(must_wait)
        return receive(*arguments, must_wait=must_wait, **others)

    monkeypatch.setattr(CollectiveTransport, "receive", spy)
    with Mesh(1, 1, BANKS, transport="nccl", combine_mode=combine_mode) as mesh:
        header = make_header((4,), exact=exact)  # its step is not one that is measured

        def run(rank: int, dispatcher: TokenDispatcher) -> None:
            dispatcher.begin_step(header, [prefill(4) if exact else decodes(4)])
            for bank in BANKS:
                sent = Dispatch(bank.index, 0, *make_rows(bank, 4, rank))
                dispatcher.combine(dispatcher.dispatch(sent))
            dispatcher.finish_step()

        mesh.step(header, run)
    assert len(reads) == 2 * len(BANKS), "each layer's rows and outputs"
    assert set(reads) == {exact or combine_mode == "per_slot"}


@pytest.mark.parametrize("transport", KINDS)
def test_memory_of_sends_is_kept_no_longer_than_they_take(
    transport: TransportName, nccl: FakeNccl
) -> None:
    """Not until the next step: that is a copy of all rows of all layers."""
    expected = [ExpectedMessage(0, (PartShape(4, torch.float32),), (2,))]
    sent: list[weakref.ref[Tensor]] = []
    with Mesh(1, 1, BANKS, transport=transport) as mesh:
        sender, receiver = mesh["expert-0"].transport, mesh["attention-0"].transport
        while not sent or sent[0]() is not None:
            assert len(sent) < 500
            rows = torch.ones(2, 4)
            sent.append(weakref.ref(rows))
            tag = Tag(len(sent), 0, 0, "outputs")
            sender.post(tag, [RowMessage(0, (rows,))], sized=False)
            del rows
            ((got,),) = receiver.receive(tag, expected, sized=False, must_wait=True)
            assert torch.equal(got, torch.ones(2, 4))


class Graph:
    """In place of a ``StepGraph``: its capture computes, and it is replayed by hand."""

    def __init__(self) -> None:
        self.acts: list[Callable[[], None]] = []
        self.ends: list[Callable[[], None]] = []
        self.is_dropped = False
        self.before = self.acts.append
        self.at_end = self.ends.append

    def drop(self) -> None:
        self.is_dropped = True


def capturing(mesh: Mesh, name: str) -> tuple[Graph, CapturedTransfers]:
    """Begin to capture a graph of a worker; return it with its messages."""
    graph = Graph()
    captured = mesh[name].transport.capture(cast(StepGraph, graph))
    assert isinstance(captured, CapturedTransfers)
    return graph, captured


ROWS_TAG, OUTPUTS_TAG = Tag(0, 0, 0, "rows"), Tag(0, 0, 0, "outputs")
PART = PartShape(3, torch.float32)


def test_captured_messages_arrive_and_all_streams_are_joined(nccl: FakeNccl) -> None:
    rows, meta = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    with Mesh(1, 2, BANKS, transport="nccl") as mesh:
        while not nccl.works.empty():
            nccl.works.get()
        graph, home = capturing(mesh, "attention-0")
        others = [capturing(mesh, f"expert-{rank}") for rank in (0, 1)]
        home.post(ROWS_TAG, [RowMessage(rank, (meta, rows)) for rank in (0, 1)])
        rows.zero_()  # the caller may
        for _, expert in others:
            expected = ExpectedMessage(0, (PART, PART), (2, 2))
            ((first, second),) = expert.receive(ROWS_TAG, [expected])
            assert [first.sum(), second.sum()] == [6, 15]
            expert.post(OUTPUTS_TAG, [RowMessage(0, (2 * second,))])
        found = home.receive(OUTPUTS_TAG, [ExpectedMessage(r, (PART,), (2,)) for r in (0, 1)])
        assert [parts[0].sum() for parts in found] == [30, 30]
        home.post(ROWS_TAG, [RowMessage(0, (meta,))])
        others[0][1].receive(ROWS_TAG, [ExpectedMessage(0, (PART,), (2,))])
        for own in (graph, *(own for own, _ in others)):
            for act in own.ends:
                act()
        works = [nccl.works.get() for _ in range(nccl.works.qsize())]
        assert len(works) == 8
        assert {work.waited for work in works} == {1}


def test_a_lost_world_drops_its_graphs_and_begins_no_replay(nccl: FakeNccl) -> None:
    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        transport = mesh["attention-0"].transport
        state = transport.captured_state
        graph, _ = capturing(mesh, "attention-0")
        (begin_replay,) = graph.acts
        begin_replay()
        with pytest.raises(PeerLostError, match="expert-0"):
            transport.reject(0, "nonsense")
        assert graph.is_dropped
        with pytest.raises((PeerLostError, TransportError)):
            begin_replay()
        mesh.apply(structs.replace(mesh.generation, number=2))
        assert transport.captured_state != state


class Event:
    """In place of ``torch.cuda.Event``: nothing runs."""

    is_over = False

    def record(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        return self.is_over


def test_the_end_of_a_replay_is_awaited_and_a_lost_peer_ends_the_wait(
    nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        transport = mesh["attention-0"].transport
        graph, _ = capturing(mesh, "attention-0")
        transport.begin_step(make_header((1,)))
        graph.acts[0]()
        monkeypatch.setattr(Event, "is_over", True)
        transport.finish_step()
        transport.finish_step()  # nothing has been replayed since
        monkeypatch.setattr(Event, "is_over", False)
        transport.begin_step(make_header((1,), step=2))
        graph.acts[0]()
        mesh["expert-0"].connections.close()
        with pytest.raises(PeerLostError, match="expert-0"):
            transport.finish_step()
        assert graph.is_dropped


def test_a_step_is_finished_after_the_next_one_has_begun(
    nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The confirmations of both arrive before the first is read, or after it."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "is_over", True)
    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        home, expert = mesh["attention-0"].transport, mesh["expert-0"].transport
        graph, _ = capturing(mesh, "attention-0")
        late: list[Callable[[], None]] = []
        for step in range(1, 5):
            header = make_header((1,), step=step)
            home.begin_step(header)
            graph.acts[0]()
            late.append(home.finish_later())
            if step == 1:
                continue
            before = mesh.pool.submit(late[step - 2])
            for confirmed in (1, 2) if step == 2 else (step,):
                expert.begin_step(make_header((1,), step=confirmed))
                expert.confirm_step()
            before.result(LIMIT_S)
        late[-1]()
        home.begin_step(make_header((1,), step=5))
        graph.acts[0]()
        lost = home.finish_later()
        mesh["expert-0"].connections.close()
        with pytest.raises(PeerLostError, match="expert-0"):
            lost()
        with pytest.raises(PeerLostError, match="expert-0"):
            lost()


def test_a_step_of_an_earlier_generation_cannot_be_finished(
    nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with Mesh(1, 1, BANKS, transport="nccl") as mesh:
        home = mesh["attention-0"].transport
        graph, _ = capturing(mesh, "attention-0")
        home.begin_step(make_header((1,)))
        graph.acts[0]()
        finish = home.finish_later()
        mesh.apply(structs.replace(mesh.generation, number=2))
        with pytest.raises(TransportError, match="an earlier generation"):
            finish()


def test_gloo_s_messages_are_not_captured() -> None:
    with Mesh(1, 1, BANKS, transport="collective") as mesh:
        transport = mesh["attention-0"].transport
        assert transport.capture(cast(StepGraph, Graph())) is None
        assert transport.captured_state is None


@pytest.mark.parametrize("colocated", [False, True])
def test_a_step_is_complete_once_all_expert_ranks_have_confirmed_it(
    nccl: FakeNccl, colocated: bool
) -> None:
    """Outputs may have been computed from rows that never came."""
    sizes = (0, 3) if colocated else (2, 2)
    with Mesh(*sizes, BANKS, transport="nccl", colocated=colocated) as mesh:
        homes = [mesh[m.name] for m in mesh.generation.attention]
        experts = [mesh[m.name] for m in mesh.generation.experts]
        for step in (1, 2):
            header = make_header((4, 0) if step == 1 else (4, 4), step=step)
            for worker in {id(w): w for w in (*homes, *experts)}.values():
                worker.transport.begin_step(header)
            waiting = [mesh.pool.submit(homes[0].transport.await_confirmation)]
            if step == 2:
                waiting.append(mesh.pool.submit(homes[1].transport.await_confirmation))
            for expert in experts:
                assert not waiting[0].done() or len(experts) == 1
                expert.transport.confirm_step()
            for future in waiting:
                future.result(LIMIT_S)
        homes[0].transport.begin_step(make_header((4, 4), step=3))
        lost = mesh.pool.submit(homes[0].transport.await_confirmation)
        experts[-1].connections.close()
        with pytest.raises(PeerLostError, match=mesh.generation.experts[-1].name):
            lost.result(LIMIT_S)
