"""Workers that are both sides at once: the same results, the same order on every rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from benchmarks.harness.mesh import (
    Mesh,
    TransportName,
    decodes,
    local_dispatcher,
    make_attention_bank,
    make_bank,
    make_header,
    make_rows,
)
from cluster.config.cluster import CombineMode
from cluster.core.errors import PeerLostError
from cluster.core.topology import Generation
from tests.workers.dispatch.test_dispatch import Work, check
from workers.dispatch.dispatcher import DispatchHandle, TokenDispatcher
from workers.model.config import BankSpec
from workers.model.layers import Dispatch
from workers.requests.step_header import Grants, StepHeader

pytestmark = pytest.mark.heavy

BANKS = (make_bank(0), make_attention_bank(1), make_bank(2, num_experts=6, top_k=3, width=24))
MODES: tuple[CombineMode, ...] = ("sum", "per_slot")
TRANSPORTS: tuple[TransportName, ...] = ("sockets", "collective")


def colocated(
    num_workers: int,
    banks: Sequence[BankSpec] = BANKS,
    mode: CombineMode = "per_slot",
    transport: TransportName = "sockets",
    spare: int = 0,
) -> Mesh:
    return Mesh(num_workers, num_workers, banks, mode, transport, spare=spare, colocated=True)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_workers", [1, 3])
def test_equals_the_local_reference(
    num_workers: int, mode: CombineMode, transport: TransportName
) -> None:
    """Uneven ranks, both splits, one and two micro-batches, fewer rows than granted."""
    granted = (7, 2, 1)[:num_workers]
    with colocated(num_workers, mode=mode, transport=transport, spare=1) as mesh:
        step = 0
        for exact in (False, True):
            for num_micro_batches in (1, 2):
                for missing in (0, 1):
                    step += 1
                    header = make_header(
                        granted, step=step, exact=exact, num_micro_batches=num_micro_batches
                    )
                    rows = [max(n - missing, 0) for n in granted]
                    check(mesh, Work(BANKS, rows, header), bitwise=mode == "per_slot")


def overlapping(
    banks: Sequence[BankSpec], header: StepHeader, num_rows: Sequence[int]
) -> Callable[[int, TokenDispatcher], list[Tensor]]:
    """The engine's order with two micro-batches; a rank without rows sits out."""

    def home(rank: int, dispatcher: TokenDispatcher) -> list[Tensor]:
        total = num_rows[rank]
        if not total:
            dispatcher.run_empty_step(header)
            return []
        first = -(-total // 2)
        parts = (slice(0, first), slice(first, total))
        dispatcher.begin_step(header, [decodes(first), decodes(total - first)])
        inputs = [make_rows(bank, total, 10 * rank + bank.index) for bank in banks]
        results: list[list[Tensor]] = [[], []]

        def dispatch(bank: int, micro_batch: int) -> DispatchHandle:
            rows, ids, weights = (x[parts[micro_batch]] for x in inputs[bank])
            return dispatcher.dispatch(Dispatch(bank, 0, rows, ids, weights), micro_batch)

        handles = [dispatch(0, micro_batch) for micro_batch in (0, 1)]
        for bank in range(1, len(banks) + 1):
            for micro_batch in (0, 1):
                results[micro_batch].append(dispatcher.combine(handles[micro_batch]))
                if bank < len(banks):
                    handles[micro_batch] = dispatch(bank, micro_batch)
        return [torch.cat(both) for both in zip(*results, strict=True)]

    return home


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("rows", [(7, 0, 4), (0, 1, 0), (0, 0, 1)])
def test_micro_batches_overlap_and_ranks_without_rows_serve(
    rows: tuple[int, ...], transport: TransportName, exact: bool
) -> None:
    banks = tuple(make_bank(i) for i in range(4))
    with colocated(3, banks, transport=transport) as mesh:
        for step in (1, 2):
            header = make_header(rows, step=step, exact=exact, num_micro_batches=2)
            got = mesh.step(header, overlapping(banks, header, rows))
    reference = local_dispatcher(banks)
    for rank, mine in enumerate(got):
        expected = overlapping(banks, header, rows)(rank, reference)
        assert len(mine) == (len(banks) if rows[rank] else 0)
        for found, right in zip(mine, expected, strict=True):
            assert torch.equal(found, right)


def test_every_pair_has_one_connection() -> None:
    with colocated(3) as mesh:
        for rank in range(3):
            others = {f"colocated-{i}" for i in range(3) if i != rank}
            assert set(mesh[f"colocated-{rank}"].connections.edges) == others


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_frames_larger_than_the_sockets_buffers_cross(num_micro_batches: int) -> None:
    """All send megabytes to all before any of them reads."""
    banks = tuple(make_bank(i, num_experts=6, width=4096) for i in range(2))
    rows = (240, 250, 200)
    with colocated(3, banks) as mesh:
        for step, exact in enumerate((False, True), start=1):
            header = make_header(rows, step=step, exact=exact, num_micro_batches=num_micro_batches)
            check(mesh, Work(banks, rows, header), bitwise=True)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_steps", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_random_steps(transport: TransportName, num_steps: int) -> None:
    """Any grants, splits and micro-batches one after the other, some ranks sitting out."""
    draw = random.Random(5)
    banks = tuple(make_bank(i) for i in range(3))
    reference = local_dispatcher(banks)
    with colocated(4, banks, transport=transport, spare=2) as mesh:
        for step in range(1, num_steps + 1):
            rows = [draw.choice((0, 0, 1, 2, 9, 30)) for _ in range(4)]
            rows[draw.randrange(4)] += 2
            header = make_header(rows, step=step, exact=draw.random() < 0.5, num_micro_batches=2)
            got = mesh.step(header, overlapping(banks, header, rows))
            for rank, mine in enumerate(got):
                expected = overlapping(banks, header, rows)(rank, reference)
                assert len(mine) == len(expected) or not rows[rank]
                assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=False))


def test_own_rows_never_reach_a_socket() -> None:
    banks = (make_bank(),)
    with colocated(2, banks) as mesh:
        sent: list[str] = []
        connections = mesh["colocated-0"].connections
        send = connections.send

        def spy(name, header, parts):  # type: ignore[no-untyped-def]
            sent.append(name)
            send(name, header, parts)

        connections.send = spy  # type: ignore[method-assign]
        check(mesh, Work(banks, (5, 5), make_header((5, 5))), bitwise=True)
        assert sent == ["colocated-1", "colocated-1"]  # rows, outputs


def test_rows_may_be_overwritten_after_dispatch() -> None:
    banks = (make_bank(),)
    rows, ids, weights = make_rows(banks[0], 4, seed=1)
    expected = local_dispatcher(banks)
    right = expected.combine(expected.dispatch(Dispatch(0, 0, rows, ids, weights)))

    def home(rank: int, dispatcher: TokenDispatcher) -> Tensor:
        own = rows.clone()
        dispatcher.begin_step(header, [decodes(4)])
        handle = dispatcher.dispatch(Dispatch(0, 0, own, ids, weights))
        own.zero_()
        return dispatcher.combine(handle)

    header = make_header((4, 4))
    with colocated(2, banks) as mesh:
        for found in mesh.step(header, home):
            assert torch.equal(found, right)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_survivors_run_the_step_again_with_the_copies(transport: TransportName) -> None:
    """A worker dies in mid-step: the others keep their edges and get the same results."""
    banks = (make_bank(0), make_bank(1))
    rows = (3, 3, 3)
    with colocated(3, banks, transport=transport, spare=8) as mesh:
        calm = check(mesh, Work(banks, rows, make_header(rows)), bitwise=True)
        header = make_header(rows, step=2)
        broken = [
            mesh.pool.submit(Work(banks, rows, header), rank, dispatcher)
            for rank in (0, 2)
            if (dispatcher := mesh[f"colocated-{rank}"].dispatcher) is not None
        ]
        mesh["colocated-1"].transport.close()
        mesh["colocated-1"].connections.close()
        for future in broken:
            with pytest.raises(PeerLostError, match="colocated-1"):
                future.result(120)
        kept = mesh["colocated-0"].connections.edges["colocated-2"].sock
        assert mesh.placement is not None
        mesh.placement = mesh.placement.without_devices(frozenset({1}), epoch=2)
        survivors = tuple(m for m in mesh.generation.members if m.rank != 1)
        mesh.apply(Generation(number=2, members=survivors))
        assert mesh["colocated-0"].connections.edges["colocated-2"].sock is kept
        grants = make_header(rows, step=3, generation=2, epoch=2)
        header = make_header_without(grants, 1)
        again = mesh.step(header, Work(banks, rows, header))
        for mine, before in zip(again, (calm[0], calm[2]), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True))


def make_header_without(header: StepHeader, rank: int) -> StepHeader:
    """The same header after that rank was lost."""
    return replace(header, grants=Grants.of({r: g for r, g in header.grants if r != rank}))
