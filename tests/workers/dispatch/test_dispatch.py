"""Every transport, mode and split against the local reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor

from benchmarks.harness.mesh import (
    GivenRows,
    Mesh,
    TransportName,
    decodes,
    local_dispatcher,
    make_attention_bank,
    make_bank,
    make_header,
    make_placement,
    make_rows,
    prefill,
)
from cluster.config.cluster import CombineMode
from cluster.core.errors import ProtocolError
from cluster.core.placement import BankPlacement, ExpertPlacement
from workers.dispatch.dispatcher import DispatchHandle, TokenDispatcher, max_static_ranks
from workers.dispatch.expert_server import ExpertServer
from workers.metrics.step_metrics import SAMPLE_INTERVAL
from workers.model.config import BankSpec
from workers.model.layers import Dispatch
from workers.requests.step_header import StepHeader

pytestmark = pytest.mark.heavy

BANKS = (make_bank(0), make_attention_bank(1), make_bank(2, num_experts=6, top_k=3, width=24))
MODES: tuple[CombineMode, ...] = ("sum", "per_slot")
TRANSPORTS: tuple[TransportName, ...] = ("sockets", "collective")


@dataclass(frozen=True)
class Work:
    """What one attention rank runs: all banks, one after the other."""

    banks: Sequence[BankSpec]
    num_rows: Sequence[int]
    header: StepHeader
    dtype: torch.dtype = torch.float32
    change: Callable[[Tensor], Tensor] = lambda ids: ids

    def __call__(self, rank: int, dispatcher: TokenDispatcher) -> list[Tensor]:
        total = self.num_rows[rank]
        parts = [
            slice(0, total)
            if self.header.num_micro_batches == 1
            else (slice(0, -(-total // 2)), slice(-(-total // 2), total))[mb]
            for mb in range(self.header.num_micro_batches)
        ]
        keys, has_prompts = prefill(total, seed=rank).row_key, self.header.prefill_rows > 0
        batches = [
            GivenRows(
                is_prefill=torch.full_like(keys[part], has_prompts, dtype=torch.bool),
                row_key=keys[part],
            )
            for part in parts
        ]
        dispatcher.begin_step(self.header, batches)
        results = []
        for bank in self.banks:
            rows, ids, weights = make_rows(bank, total, 100 * rank + bank.index, self.dtype)
            ids = self.change(ids)
            for exchange in bank.exchanges:
                handles = [
                    dispatcher.dispatch(
                        Dispatch(bank.index, exchange.index, rows[part], ids[part], weights[part]),
                        mb,
                    )
                    for mb, part in enumerate(parts)
                ]
                rows = torch.cat([dispatcher.combine(h) for h in handles])
                results.append(rows)
        return results


def check(mesh: Mesh, work: Work, *, bitwise: bool) -> list[list[Tensor]]:
    """Run the work on the mesh and locally; the results by rank."""
    got = mesh.step(work.header, work)
    reference = local_dispatcher(mesh.banks)
    for rank, results in enumerate(got):
        for mine, expected in zip(results, work(rank, reference), strict=True):
            assert mine.dtype == expected.dtype
            assert mine.shape == expected.shape
            if bitwise:
                assert torch.equal(mine, expected)
            else:
                torch.testing.assert_close(mine, expected)
    return got


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_equals_the_local_reference_with_both_splits_bit_for_bit(
    transport: TransportName, mode: CombineMode, num_micro_batches: int
) -> None:
    """Uneven ranks, one without rows, unequal widths, per-slot inputs, unweighted exchanges."""
    rows = (5, 0)
    with Mesh(2, 3, BANKS, mode, transport) as mesh:
        results = []
        for step, exact in enumerate((False, True), start=1):
            header = make_header(rows, step=step, exact=exact, num_micro_batches=num_micro_batches)
            work = Work(BANKS, rows, header)
            results.append(check(mesh, work, bitwise=mode == "per_slot"))
        for static, exact_ in zip(*results, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(static, exact_, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exact", [False, True])
def test_bfloat16_equals_the_local_reference(mode: CombineMode, exact: bool) -> None:
    with Mesh(2, 2, BANKS, mode, dtype=torch.bfloat16) as mesh:
        work = Work(BANKS, (3, 8), make_header((3, 8), exact=exact), torch.bfloat16)
        check(mesh, work, bitwise=mode == "per_slot")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exact", [False, True])
def test_edge_cases(transport: TransportName, mode: CombineMode, exact: bool) -> None:
    """One token; all tokens to few experts or to one; the same expert in several slots."""
    with Mesh(1, 2, BANKS, mode, transport) as mesh:
        changes: list[Callable[[Tensor], Tensor]] = [
            lambda ids: ids,
            lambda ids: ids.clamp(max=0),
            lambda ids: ids // 2 * 2,
            lambda ids: torch.where(ids % 2 == 0, ids, 1),
        ]
        step = 0
        for num_rows in (1, 6):
            for change in changes:
                step += 1
                header = make_header((num_rows,), step=step, exact=exact)
                work = Work(BANKS, (num_rows,), header, change=change)
                check(mesh, work, bitwise=mode == "per_slot")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("top_k", [1, 4])
def test_k_of_one_and_k_of_all(mode: CombineMode, top_k: int) -> None:
    banks = (make_bank(num_experts=4, top_k=top_k),)
    with Mesh(1, 3, banks, mode) as mesh:
        for step, exact in enumerate((False, True), start=1):
            work = Work(banks, (7,), make_header((7,), step=step, exact=exact))
            check(mesh, work, bitwise=mode == "per_slot" or top_k == 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exact", [False, True])
def test_fewer_rows_than_granted(transport: TransportName, mode: CombineMode, exact: bool) -> None:
    """A request may end between the proposal and the header, even the rank's last one."""
    with Mesh(2, 2, BANKS, mode, transport) as mesh:
        header = make_header((6, 4), exact=exact, num_micro_batches=2)
        check(mesh, Work(BANKS, (3, 0), header), bitwise=mode == "per_slot")


@pytest.mark.parametrize("mode", MODES)
def test_one_expert_rank_equals_the_local_reference_bit_for_bit(mode: CombineMode) -> None:
    with Mesh(2, 1, BANKS, mode) as mesh:
        for step, exact in enumerate((False, True), start=1):
            check(
                mesh, Work(BANKS, (9, 2), make_header((9, 2), step=step, exact=exact)), bitwise=True
            )


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("num_attention", [1, 3])
def test_layouts(num_attention: int, num_experts: int) -> None:
    run_layout(num_attention, num_experts, "sum", "sockets")


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_experts", [1, 2, 3, 4])
@pytest.mark.parametrize("num_attention", [1, 2, 3])
def test_all_layouts(
    num_attention: int, num_experts: int, mode: CombineMode, transport: TransportName
) -> None:
    run_layout(num_attention, num_experts, mode, transport)


def run_layout(
    num_attention: int, num_experts: int, mode: CombineMode, transport: TransportName
) -> None:
    rows = (7, 0, 1)[:num_attention]
    with Mesh(num_attention, num_experts, BANKS, mode, transport, spare=1) as mesh:
        step = 0
        for num_micro_batches in (1, 2):
            for exact in (False, True):
                step += 1
                header = make_header(
                    rows, step=step, exact=exact, num_micro_batches=num_micro_batches
                )
                check(mesh, Work(BANKS, rows, header), bitwise=mode == "per_slot")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exact", [False, True])
def test_copies_change_no_result(mode: CombineMode, exact: bool) -> None:
    with Mesh(2, 3, BANKS, mode, spare=3) as mesh:
        check(
            mesh,
            Work(BANKS, (40, 3), make_header((40, 3), exact=exact)),
            bitwise=mode == "per_slot",
        )


def copies_on_two_devices() -> tuple[BankSpec, ExpertPlacement]:
    """4 experts on both devices, the second device takes 3/4 of the prefill load."""
    bank = make_bank(num_experts=4, top_k=1)
    maps = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=4,
        physical_to_logical=[[0, 1, 2, 3], [3, 2, 1, 0]],
        split=[[0.25] * 4, [0.75] * 4],
        decode_device=[0, 0, 1, 0],
    )
    return bank, ExpertPlacement(epoch=1, banks=(maps,))


def token_counts(mesh: Mesh) -> list[list[int]]:
    servers = [mesh[m.name].server for m in mesh.generation.experts]
    return [cast(list[int], s.counters.token_counts[0].tolist()) for s in servers if s is not None]


@pytest.mark.parametrize("exact", [False, True])
def test_decode_rows_use_one_copy_and_prefill_rows_the_shares(exact: bool) -> None:
    bank, placement = copies_on_two_devices()
    with Mesh(1, 2, (bank,), placement=placement) as mesh:
        check(mesh, Work((bank,), (200,), make_header((200,))), bitwise=True)
        first, second = token_counts(mesh)
        assert sum(first) + sum(second) == 200
        assert [first[2], *second[:1], *second[2:]] == [0, 0, 0, 0]
        assert second[1] > 0
        for step in range(2, 12):
            header = make_header((200,), step=step, exact=exact, prompts=True)
            check(mesh, Work((bank,), (200,), header), bitwise=True)
        prefills = [
            sum(now) - sum(old)
            for now, old in zip(token_counts(mesh), (first, second), strict=True)
        ]
        assert sum(prefills) == 2000
        # The keys of the 200 rows are the same in all ten steps: 200 draws.
        assert abs(prefills[1] / 2000 - 0.75) < 4 * (0.75 * 0.25 / 200) ** 0.5


def test_a_row_goes_once_to_each_rank_with_the_exact_split() -> None:
    bank = make_bank(num_experts=4, top_k=2)
    with Mesh(1, 2, (bank,)) as mesh:
        dispatcher = mesh["attention-0"].dispatcher
        assert dispatcher is not None
        sent: list[int] = []
        post = mesh["attention-0"].transport.post

        def spy(tag, messages, *, sized):  # type: ignore[no-untyped-def]
            sent.extend(len(m.parts[1]) for m in messages)
            post(tag, messages, sized=sized)

        mesh["attention-0"].transport.post = spy  # type: ignore[method-assign]
        # Experts 0, 1 live on rank 0 and 2, 3 on rank 1.
        ids = torch.tensor([[0, 1], [1, 2], [3, 2]])

        def home(rank: int, dispatcher: TokenDispatcher) -> Tensor:
            dispatcher.begin_step(header, [prefill(3)])
            handle = dispatcher.dispatch(Dispatch(0, 0, torch.ones(3, 16), ids, torch.ones(3, 2)))
            return dispatcher.combine(handle)

        header = make_header((3,), exact=True)
        mesh.step(header, home)
        assert sent == [2, 2]


def padding(mesh: Mesh) -> list[list[float]]:
    """Ratios of dispatch and combine, by expert rank."""
    servers = [mesh[m.name].server for m in mesh.generation.experts]
    return [
        [round(value, 6) for value in server.counters.padding.stats().values()]
        for server in servers
        if server is not None
    ]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("mode", "exact", "expected"),
    [("sum", False, [0.25, 0.25]), ("per_slot", False, [0.25, 0.0]), ("sum", True, [0.0, 0.0])],
)
def test_rows_without_an_expert_here_are_padding(
    transport: TransportName, mode: CombineMode, exact: bool, expected: list[float]
) -> None:
    """Experts 0, 1 are on rank 0 and 2, 3 on rank 1: each has no part in one row of four."""
    bank = make_bank(num_experts=4, top_k=2)
    ids = torch.tensor([[0, 1], [1, 2], [3, 2], [0, 3]])

    def home(rank: int, dispatcher: TokenDispatcher) -> Tensor:
        dispatcher.begin_step(header, [prefill(4)])
        handle = dispatcher.dispatch(Dispatch(0, 0, torch.ones(4, 16), ids, torch.ones(4, 2)))
        return dispatcher.combine(handle)

    with Mesh(1, 2, (bank,), mode, transport) as mesh:
        header = make_header((4,), step=SAMPLE_INTERVAL - 1, exact=exact)
        mesh.step(header, home)
        assert padding(mesh) == [[0.0, 0.0], [0.0, 0.0]]  # not measured
        for step in (SAMPLE_INTERVAL, 2 * SAMPLE_INTERVAL):
            header = make_header((4,), step=step, exact=exact)
            mesh.step(header, home)
            assert padding(mesh) == [expected, expected]


def test_input_rows_of_other_ranks_pairs_are_padding() -> None:
    bank = make_attention_bank(num_experts=4)
    ids = torch.tensor([[0, 1], [1, 2]])

    def home(rank: int, dispatcher: TokenDispatcher) -> Tensor:
        dispatcher.begin_step(header, [decodes(2)])
        weights = torch.ones(2, 2)
        handle = dispatcher.dispatch(Dispatch(0, 1, torch.ones(2, 2, 6), ids, weights))
        return dispatcher.combine(handle)

    header = make_header((2,), step=SAMPLE_INTERVAL)
    with Mesh(1, 2, (bank,)) as mesh:
        servers = [mesh[name].server for name in ("expert-0", "expert-1")]

        def serve(server: ExpertServer) -> None:
            server.begin_step(header)
            server.serve(0, 1)

        calls: dict[str, Callable[[], object]] = {
            f"expert-{i}": partial(serve, s) for i, s in enumerate(servers) if s is not None
        }
        dispatcher = mesh["attention-0"].dispatcher
        assert dispatcher is not None
        calls["attention-0"] = partial(home, 0, dispatcher)
        mesh.each(calls)
        assert padding(mesh) == [[0.25, 0.0], [0.75, 0.5]]


def test_an_epoch_that_is_not_known_is_refused() -> None:
    with Mesh(1, 1, BANKS) as mesh:
        dispatcher = mesh["attention-0"].dispatcher
        assert dispatcher is not None
        with pytest.raises(ProtocolError, match=r"epoch 3, known are \[1\]"):
            dispatcher.begin_step(make_header((1,), epoch=3), [decodes(1)])


def test_a_new_epoch_takes_over_at_its_step() -> None:
    bank, placement = copies_on_two_devices()
    moved = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=4,
        physical_to_logical=[[0, 1, 2, 3], [3, 2, 1, 0]],
        decode_device=[1, 1, 1, 1],
    )
    with Mesh(1, 2, (bank,), placement=placement) as mesh:
        dispatcher = mesh["attention-0"].dispatcher
        assert dispatcher is not None
        for name in ("attention-0", "expert-0", "expert-1"):
            side = mesh[name].dispatcher or mesh[name].server
            assert side is not None
            side.set_placement(ExpertPlacement(epoch=2, banks=(moved,)), mesh.generation)
        check(mesh, Work((bank,), (50,), make_header((50,))), bitwise=True)
        before = token_counts(mesh)
        check(mesh, Work((bank,), (50,), make_header((50,), step=2, epoch=2)), bitwise=True)
        after = token_counts(mesh)
        assert after[0] == before[0]
        assert sum(after[1]) - sum(before[1]) == 50


def test_placements_of_all_banks_are_used() -> None:
    placement = make_placement(BANKS, 2)
    assert [b.num_experts for b in placement.banks] == [8, 8, 6]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_micro_batches_overlap_across_layers(transport: TransportName) -> None:
    """The engine's order: the next layer of one goes out before the other has come home."""
    banks = tuple(make_bank(i) for i in range(4))
    header = make_header((7,), num_micro_batches=2)
    parts = (slice(0, 4), slice(4, 7))

    def home(rank: int, dispatcher: TokenDispatcher) -> list[Tensor]:
        dispatcher.begin_step(header, [decodes(4), decodes(3)])
        inputs = [make_rows(bank, 7, bank.index) for bank in banks]
        results: list[list[Tensor]] = [[], []]

        def dispatch(bank: int, micro_batch: int) -> DispatchHandle:
            rows, ids, weights = (x[parts[micro_batch]] for x in inputs[bank])
            return dispatcher.dispatch(Dispatch(bank, 0, rows, ids, weights), micro_batch)

        handles = [dispatch(0, micro_batch) for micro_batch in (0, 1)]
        for bank in range(1, 5):
            for micro_batch in (0, 1):
                results[micro_batch].append(dispatcher.combine(handles[micro_batch]))
                if bank < 4:
                    handles[micro_batch] = dispatch(bank, micro_batch)
        return [torch.cat(both) for both in zip(*results, strict=True)]

    with Mesh(1, 2, banks, "per_slot", transport) as mesh:
        got = mesh.step(header, home)[0]
    for mine, expected in zip(got, home(0, local_dispatcher(banks)), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("banks", "mode", "expected"),
    [
        ([make_bank(top_k=8)], "sum", 4),
        ([make_bank(top_k=8), make_bank(1, top_k=3)], "sum", 1),
        ([make_bank(top_k=8)], "per_slot", 0),
        (BANKS, "sum", 0),
    ],
    ids=["top 8", "the fewest", "by slot", "per-slot inputs"],
)
def test_half_of_the_experts_of_a_row_may_get_all_rows(
    banks: Sequence[BankSpec], mode: CombineMode, expected: int
) -> None:
    assert max_static_ranks(banks, mode) == expected
