"""Edges that carry a fixed number of rows, fewer than a rank has."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from benchmarks.harness import mesh as meshes
from benchmarks.harness.both_roles import Alone
from benchmarks.harness.mesh import (
    GivenRows,
    Mesh,
    TransportName,
    decodes,
    local_dispatcher,
    make_bank,
    make_rows,
    prefill,
)
from cluster.core.topology import Generation, Member
from tests.harness.pretend_gpu import DEVICE, pretend_gpu
from tests.workers.dispatch.test_dispatch import BANKS as MIXED_BANKS
from tests.workers.dispatch.test_dispatch import Work
from tests.workers.transport.nccl_over_gloo import FakeNccl, nccl
from workers.dispatch.dispatcher import TokenDispatcher
from workers.dispatch.edge_rows import EdgeRows
from workers.dispatch.remote import RemoteDispatcher
from workers.model.layers import Dispatch
from workers.requests.step_header import ALL_ROWS, StepHeader
from workers.transport.transport import ExpectedMessage, RowMessage, Tag

pytestmark = pytest.mark.heavy

__all__ = ["nccl"]

BANKS = (make_bank(0, num_experts=12), make_bank(1, num_experts=10, width=24))
"""Two experts a row."""
ROWS = (12, 5)
MANY = (24, 5)
"""Enough to learn a share from."""


def make_header(rows: Sequence[int], limit: int, step: int, parts: int = 1) -> StepHeader:
    header = meshes.make_header(rows, step=step, num_micro_batches=parts)
    return replace(header, edge_limit=limit)


def home_of(mesh: Mesh) -> TokenDispatcher:
    """The dispatcher of attention rank 0."""
    dispatcher = mesh["attention-0"].dispatcher
    assert dispatcher is not None
    return dispatcher


def run(mesh: Mesh, work: Work) -> list[tuple[bool, bool]]:
    """Whether each attention rank's step is complete, and whether its sums are right."""

    def home(rank: int, dispatcher: TokenDispatcher) -> tuple[list[Tensor], bool]:
        sums = work(rank, dispatcher)
        dispatcher.finish_step()
        return sums, dispatcher.end_step()

    reference, found = local_dispatcher(mesh.banks), []
    rtol, atol = (0.05, 0.05) if work.dtype == torch.bfloat16 else (1e-5, 1e-6)
    for rank, (sums, is_complete) in enumerate(mesh.step(work.header, home)):
        pairs = zip(sums, work(rank, reference), strict=True)
        found.append((is_complete, all(torch.allclose(a, b, rtol, atol) for a, b in pairs)))
    return found


@pytest.mark.parametrize("transport", ["sockets", "collective", "nccl"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_complete_step_has_all_sums_and_an_incomplete_one_is_known(
    nccl: FakeNccl, transport: TransportName, parts: int
) -> None:
    complete = []
    with Mesh(2, 5, BANKS, transport=transport) as mesh:
        for limit in range(1, 13):
            found = run(mesh, Work(BANKS, ROWS, make_header(ROWS, limit, limit, parts)))
            assert all(is_complete == is_right for is_complete, is_right in found)
            complete.append(all(is_complete for is_complete, _ in found))
    assert complete == sorted(complete)
    assert complete.index(True) in range(2, 10)


def test_an_edge_carries_so_many_rows_as_the_header_says() -> None:
    with Mesh(2, 5, BANKS) as mesh:
        sent = []
        for step, limit in enumerate((0, 4), start=1):
            server = mesh["expert-3"].server
            assert server is not None
            before = dict(server.counters.num_bytes)
            run(mesh, Work(BANKS, ROWS, make_header(ROWS, limit, step)))
            sent.append({name: n - before[name] for name, n in server.counters.num_bytes.items()})
    row_bytes = 4 * (16 + 24)
    assert [s["combine"] for s in sent] == [17 * row_bytes, 8 * row_bytes]
    assert sent[1]["dispatch"] * 17 == sent[0]["dispatch"] * 8


def test_requests_that_ended_leave_rows_without_a_request() -> None:
    with Mesh(2, 5, BANKS) as mesh:
        for step, rows in enumerate([(3, 0), (0, 0), (12, 1)], start=1):
            header = make_header(ROWS, 9, step, parts=2)
            assert run(mesh, Work(BANKS, rows, header)) == [(True, True)] * 2


def test_colocated_workers() -> None:
    rows = (12, 5, 0, 7)
    with Mesh(0, 4, BANKS, colocated=True) as mesh:
        for step, limit in enumerate((0, 2, 10), start=1):
            found = run(mesh, Work(BANKS, rows, make_header(rows, limit, step)))
            assert all(is_complete == is_right for is_complete, is_right in found)
            assert found[0][0] == (limit != 2)


@pytest.mark.parametrize("rows", [ROWS, (12, 0)])
@pytest.mark.parametrize("limit", [0, 9])
def test_rows_are_filled_up_to_the_bucket(
    nccl: FakeNccl, limit: int, rows: tuple[int, int]
) -> None:
    """A rank without rows sends as many as one with some."""
    with Mesh(2, 5, BANKS, transport="nccl") as mesh:
        server = mesh["expert-3"].server
        assert server is not None
        for step, bucket in enumerate((12, 16), start=1):
            before = server.counters.num_bytes["combine"]
            header = replace(make_header(rows, limit, step), bucket=bucket)
            found = run(mesh, Work(BANKS, rows, header))
            assert all(is_complete == is_right for is_complete, is_right in found)
            num_sent = 2 * min(bucket, limit or bucket)
            assert server.counters.num_bytes["combine"] - before == num_sent * 4 * (16 + 24)


def test_partial_sums_over_nccl_come_in_the_type_of_the_model(nccl: FakeNccl) -> None:
    with Mesh(1, 3, BANKS, transport="nccl", dtype=torch.bfloat16) as mesh:
        for step, limit in enumerate((0, 11), start=1):
            work = Work(BANKS, (12,), make_header((12,), limit, step), torch.bfloat16)
            assert run(mesh, work) == [(True, True)]
        server = mesh["expert-0"].server
        assert server is not None
        assert server.counters.num_bytes["combine"] == (12 + 11) * 2 * (16 + 24)


@pytest.mark.parametrize("case", ["as many ranks as experts of a row", "inputs by slot"])
def test_other_ranks_do_not_ask_for_a_limit(case: str) -> None:
    is_few = case.startswith("as many")
    banks, num_ranks = (BANKS, 2) if is_few else (MIXED_BANKS, 5)
    with Mesh(2, num_ranks, banks) as mesh:
        assert run(mesh, Work(banks, MANY, make_header(MANY, 0, 1))) == [(True, True)] * 2
        dispatcher = home_of(mesh)
        assert dispatcher.edge_share == 0


def test_the_share_is_the_most_of_late_and_begins_anew_with_a_generation() -> None:
    with Mesh(2, 5, BANKS) as mesh:
        dispatcher = home_of(mesh)
        assert dispatcher.edge_share == 0
        run(mesh, Work(BANKS, MANY, make_header(MANY, 0, 1)))
        share = dispatcher.edge_share
        assert ALL_ROWS // 5 < share < ALL_ROWS
        # All rows to one rank, and then as before.
        run(mesh, Work(BANKS, MANY, make_header(MANY, 0, 2), change=lambda ids: ids.clamp(max=1)))
        assert dispatcher.edge_share == ALL_ROWS
        run(mesh, Work(BANKS, MANY, make_header(MANY, 0, 3)))
        assert share < dispatcher.edge_share < ALL_ROWS
        mesh.apply(replace(mesh.generation, number=2))
        assert dispatcher.edge_share == 0
        run(mesh, Work(BANKS, MANY, replace(make_header(MANY, 0, 4), generation=2)))
        assert dispatcher.edge_share == share


class FarTransport(Alone):
    """Sends nothing, and finds zeros."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, ...]] = []
        """Rows on each edge, by dispatch."""

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        self.sent.append(tuple(len(part) for message in messages for part in message.parts))

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        return [
            tuple(
                torch.zeros(count, part.width, dtype=part.dtype, device=DEVICE)
                for part, count in zip(item.parts, item.counts, strict=True)
            )
            for item in expected
        ]


@pytest.mark.parametrize(
    ("num_ranks", "header", "sent", "is_complete", "num_waits"),
    [
        (5, make_header((12,), 4, 1), 4, False, 0),
        (2, meshes.make_header((12,), prompts=True), 12, True, 0),
        (5, meshes.make_header((12,), exact=True), None, True, 2),
    ],
    ids=["decodes", "prompts", "exact"],
)
def test_the_host_waits_for_a_gpu_only_to_choose_exactly_the_needed_rows(
    num_ranks: int,
    header: StepHeader,
    sent: int | None,
    is_complete: bool,
    num_waits: int,
) -> None:
    """It waits once in each exchange. ``sent``: rows on each edge; None: they differ."""
    placement, transport = meshes.make_placement(BANKS, num_ranks, spare=1), FarTransport()
    members = [Member(name=f"{r}", role="expert", rank=r, device=r) for r in range(num_ranks)]
    home = Member(name="a", role="attention", rank=0)
    with pretend_gpu() as log:
        dispatcher = RemoteDispatcher(
            transport,
            BANKS,
            rank=0,
            combine_mode="sum",
            dtype=torch.float32,
            device=torch.device(DEVICE),
        )
        dispatcher.set_placement(placement, Generation(number=1, members=(home, *members)))
        work = [tuple(x.to(DEVICE) for x in make_rows(bank, 12, 0)) for bank in BANKS]
        batch = prefill(12) if header.prefill_rows else decodes(12)
        on_device = GivenRows(batch.is_prefill.to(DEVICE), batch.row_key.to(DEVICE))
        log.clear()
        dispatcher.begin_step(header, [on_device])
        for bank, (rows, ids, weights) in zip(BANKS, work, strict=True):
            handle = dispatcher.dispatch(Dispatch(bank.index, 0, rows, ids, weights))
            assert dispatcher.combine(handle).shape == rows.shape
        dispatcher.finish_step()
        assert log.waits.total() == num_waits
    assert sent is None or transport.sent == [(sent,) * 2 * num_ranks] * 2
    assert dispatcher.end_step() == is_complete


def test_rows_that_did_not_fit_end_the_limit() -> None:
    rows, needed = EdgeRows(), torch.tensor([[True] * 12 + [False] * 8, [False] * 20])

    def step(num_sent: int) -> bool:
        rows.begin_step()
        rows.note(needed, 20, num_sent)
        rows.finish_step()
        return rows.end_step()

    assert step(20)
    assert rows.share == 600
    assert step(12)
    assert not step(11)
    assert rows.share == 0
    assert step(20)
    assert rows.share == 600


def test_a_share_is_not_proposed_where_edges_cannot_be_limited_any_more() -> None:
    """The first proposal of a generation comes before its first step."""
    with Mesh(2, 5, BANKS) as mesh:
        dispatcher = home_of(mesh)
        run(mesh, Work(BANKS, MANY, make_header(MANY, 0, 1)))
        assert dispatcher.edge_share > 0
        members = [m for m in mesh.generation.members if m.device < 2]
        left = Generation(number=2, members=tuple(members))
        dispatcher.set_placement(meshes.make_placement(BANKS, 2), left)
        assert dispatcher.edge_share == 0


def test_few_rows_say_nothing_of_the_share_of_many() -> None:
    rows = EdgeRows()
    for num_sent in (4, 3):
        rows.begin_step()
        rows.note(torch.ones(2, 4, dtype=torch.bool), 4, num_sent)
        rows.finish_step()
        assert rows.end_step() == (num_sent == 4)
    assert rows.share == 0


def test_the_share_is_of_a_bucket_that_is_filled_up() -> None:
    rows = EdgeRows()
    rows.begin_step()
    rows.note(torch.ones(2, 16, dtype=torch.bool), 32, 32)
    rows.finish_step()
    assert rows.end_step()
    assert rows.share == 500


def test_a_step_that_broke_leaves_nothing_behind() -> None:
    rows = EdgeRows()
    rows.begin_step()
    rows.note(torch.ones(2, 8, dtype=torch.bool), 8, 1)
    rows.finish_step()
    rows.begin_step()
    assert rows.end_step()
    assert rows.share == 0


def test_a_step_launched_before_an_incomplete_one_was_read_says_nothing_of_the_share() -> None:
    """The step that did not fit must run again with all rows, whatever the next one needed."""
    rows = EdgeRows()
    ends = []
    for needed in (25, 16):
        rows.begin_step()
        rows.note(torch.arange(64).expand(2, 64) < needed, 64, 24)
        rows.finish_step()
        ends.append(rows.end_later())
    assert [end() for end in ends] == [False, True]
    assert rows.share == 0
