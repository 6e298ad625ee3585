"""Step header: what the wire refuses, and the leader's policy."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec
import pytest

from cluster.config.cluster import NumMicroBatches
from cluster.core.errors import ProtocolError
from workers.engine.leader import decide_header, limit_edges, step_sizes
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.step_proposals import ProposalTable, StepProposal
from workers.requests.buckets import buckets_up_to
from workers.requests.step_header import HEADERS, MAX_ROWS, Grant, Grants, StepHeader, pack
from workers.requests.traced import MAX_TRACED
from workers.scheduling.step_plan import RowsWanted

NOTHING = {"decode_rows": 0, "prefill_rows": 0}
"""Sums of a message's grants."""


def proposals(*wanted: tuple[int, int]) -> dict[int, RowsWanted]:
    """(decode, prefill) by rank."""
    return {rank: RowsWanted(*rows) for rank, rows in enumerate(wanted)}


def table_of(known: Mapping[int, RowsWanted]) -> ProposalTable:
    table = ProposalTable(sorted(known))
    table.put(StepProposal.of(rank, rows) for rank, rows in known.items())
    return table


def decide(
    known: dict[int, RowsWanted],
    *,
    step: int = 5,
    cap: int = 512,
    buckets: Sequence[int] = (),
    has_static_prompts: bool = False,
    even_empty: bool = False,
    micro_batches: MicroBatchRule | None = None,
) -> StepHeader | None:
    """The policy with usual values."""
    return decide_header(
        table_of(known),
        generation=2,
        step=step,
        epoch=7,
        oldest_epoch=6,
        max_prefill_rows=cap,
        micro_batches=micro_batches
        or MicroBatchRule(setting="auto", decode_threshold=4, prefill_threshold=8),
        buckets=buckets,
        has_static_prompts=has_static_prompts,
        even_empty=even_empty,
    )


def make_header(**changes: object) -> StepHeader:
    values: dict[str, object] = {
        "generation": 2,
        "step": 1 << 40,
        "epoch": 7,
        "oldest_epoch": 6,
        "grants": Grants.of({0: Grant(decode_rows=3), 2: Grant(decode_rows=1, prefill_rows=6)}),
        "num_micro_batches": 2,
        "exact": True,
    }
    return StepHeader(**{**values, **changes})  # type: ignore[arg-type]


def test_a_grant_says_how_many_rows_are_of_drafts() -> None:
    """Workers tell sequences from rows in it."""
    known = {r: replace(p, draft_rows=r) for r, p in proposals((1, 0), (3, 0), (2, 0)).items()}
    header = decide(known)
    assert header is not None
    assert [grant.num_decodes for _, grant in header.grants] == [1, 2, 0]
    assert header.num_decodes == 3
    alone = decide({**known, 0: replace(known[0], is_alone=True)})
    assert alone is not None
    assert alone.num_decodes == 1


def test_the_header_has_the_spans_of_ranks_that_run_rows() -> None:
    known = proposals((1, 0), (0, 0), (1, 0))
    known = {rank: replace(p, parents=(bytes([rank]) * 24,)) for rank, p in known.items()}
    header = decide(known)
    assert header is not None
    assert header.parents == ((0, (b"\0" * 24,)), (2, (b"\2" * 24,)))
    assert HEADERS.decode(HEADERS.encode(header)) == header


def test_a_step_has_few_spans_however_many_ranks_ask() -> None:
    known = proposals(*[(1, 0)] * 3)
    known = {
        rank: replace(p, parents=tuple(bytes([rank, i]) * 12 for i in range(MAX_TRACED)))
        for rank, p in known.items()
    }
    found = []
    for step in range(3):
        header = decide(known, step=step)
        assert header is not None
        assert all(
            parents == known[rank].parents[: len(parents)] for rank, parents in header.parents
        )
        found.append([len(parents) for _, parents in header.parents])
    assert found == [[2, 1, 1], [1, 2, 1], [1, 1, 2]]


def test_a_header_with_more_spans_than_a_step_has_is_refused() -> None:
    parents = (bytes(24),) * MAX_TRACED
    with pytest.raises(ValueError, match="parents must be at most"):
        make_header(parents=((0, parents), (1, parents[:1])))


def test_a_proposal_that_must_be_alone_gets_the_step_for_itself() -> None:
    known = proposals((3, 100), (1, 0), (0, 40), (2, 0), (0, 0))
    for rank in (1, 2, 4):  # rank 4 has nothing to run
        known[rank] = replace(known[rank], is_alone=True)
    served = []
    for step in (5, 6, 7):
        header = decide(known, step=step)
        assert header is not None
        assert header.is_alone
        assert HEADERS.decode(HEADERS.encode(header)) == header
        served.append([rank for rank, grant in header.grants if grant.num_rows])
    assert served == [[2], [1], [2]]
    header = decide(proposals((3, 100), (1, 0)))
    assert header is not None
    assert not header.is_alone


def test_header_survives_the_wire() -> None:
    header = make_header()
    assert HEADERS.decode(HEADERS.encode(header)) == header


def test_grant_of_an_unknown_rank_is_empty() -> None:
    assert make_header().grant(1) == Grant()


@pytest.mark.parametrize(("total", "first", "second"), [(0, 0, 0), (1, 1, 0), (7, 4, 3), (8, 4, 4)])
def test_micro_batch_0_takes_the_larger_half(total: int, first: int, second: int) -> None:
    header = make_header(grants=Grants.of({0: Grant(decode_rows=total)}))
    assert [header.rows(0, mb) for mb in (0, 1)] == [first, second]
    whole = make_header(grants=Grants.of({0: Grant(decode_rows=total)}), num_micro_batches=1)
    assert whole.rows(0, 0) == total


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("num_micro_batches", 0, ">= 1"),
        ("num_micro_batches", 3, "<= 2"),
        ("is_alone", 2, "`bool`"),
        ("exact", 2, "`bool`"),
        ("step", -1, ">= 0"),
        ("generation", 1 << 32, "<= 4294967295"),
        ("oldest_epoch", 8, "oldest_epoch must not exceed epoch"),
        ("grants", [b"", b"", NOTHING], "must name at least one rank"),
        ("grants", [pack([1, 0]), pack([0] * 6), NOTHING], "sorted by rank"),
        ("grants", [pack([0, 0]), pack([0] * 6), NOTHING], "sorted by rank"),
        ("grants", [pack([0]), pack([0] * 4), NOTHING], "3 for each rank"),
        ("grants", [pack([0]), pack([MAX_ROWS + 1, 0, 0]), NOTHING], f"<= {MAX_ROWS}"),
        ("grants", [pack([0]), pack([0, MAX_ROWS + 1, 0]), NOTHING], f"<= {MAX_ROWS}"),
        ("grants", [pack([0]), pack([1, 0, 2]), NOTHING], "draft_rows must not exceed decode_rows"),
    ],
)
def test_header_with_a_wrong_value_is_refused(field: str, value: object, rule: str) -> None:
    values = msgspec.msgpack.decode(HEADERS.encode(make_header()))
    values[StepHeader.__struct_fields__.index(field)] = value
    with pytest.raises(ProtocolError, match=f"not a step header: .*{rule}"):
        HEADERS.decode(msgspec.msgpack.encode(values))


def test_wrong_lengths_are_refused() -> None:
    header = HEADERS.encode(make_header())
    for data in (header[:-1], header + b"x", header[:5], b""):
        with pytest.raises(ProtocolError, match="not a step header"):
            HEADERS.decode(data)


def test_random_bytes_are_refused_or_valid_but_never_crash() -> None:
    rng = random.Random(0)
    good = HEADERS.encode(make_header())
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            header = HEADERS.decode(
                bytes(data[: rng.randint(0, len(data))] if rng.random() < 0.3 else data)
            )
        except ProtocolError:
            continue
        assert HEADERS.decode(HEADERS.encode(header)) == header


def test_no_header_without_work() -> None:
    assert decide(proposals((0, 0), (0, 0))) is None


def test_decodes_are_granted_and_split_is_static_without_prefill() -> None:
    header = decide(proposals((5, 0), (0, 0)))
    assert header is not None
    assert header.grants == Grants.of({0: Grant(decode_rows=5), 1: Grant()})
    assert (header.exact, header.step) == (False, 5)
    assert (header.epoch, header.oldest_epoch, header.generation) == (7, 6, 2)


def test_prefill_is_capped_over_all_ranks_and_the_grant_rotates() -> None:
    wanted = proposals((1, 300), (2, 300), (0, 300), (0, 300))
    for step in (5, 6, 7, 8):
        header = decide(wanted, step=step)
        assert header is not None
        grants = [g.prefill_rows for _, g in header.grants]
        first = step % 4
        assert grants[first] == 300
        assert grants[(first + 1) % 4] == 212
        assert sum(grants) == 512
        assert header.exact
        assert [g.decode_rows for _, g in header.grants] == [1, 2, 0, 0]


@pytest.mark.parametrize("setting", [1, 2, "auto"])
@pytest.mark.parametrize("most", [1, 5, 64, 512])
def test_sizes_are_those_of_all_numbers_of_rows(setting: NumMicroBatches, most: int) -> None:
    rule, buckets = MicroBatchRule(setting=setting, decode_threshold=64), buckets_up_to(most)
    sizes = step_sizes(buckets, rule)
    limit = 2 * most if most == 512 else most
    found = set()
    for rows in range(1, limit + 1):
        header = decide(proposals((rows, 0)), buckets=buckets, micro_batches=rule)
        assert header is not None
        found.add((header.bucket, header.num_micro_batches))
    assert set(sizes) == {size for size in found if size[0]}
    assert len(sizes) == len(set(sizes))
    assert sizes[0][0] * sizes[0][1] == max(bucket * number for bucket, number in sizes)


def test_all_rows_of_prompts_may_go_to_every_expert_rank() -> None:
    known = {r: replace(p, edge_share=250) for r, p in proposals((4, 9), (1, 0)).items()}
    header = decide(known, buckets=(1, 4, 16), has_static_prompts=True)
    assert header is not None
    assert (header.exact, header.bucket, header.edge_limit) == (False, 0, 0)
    assert [header.edge_rows(rank, 0) for rank in (0, 1)] == [7, 1]
    assert [header.edge_rows(rank, 1) for rank in (0, 1)] == [6, 0]
    header = decide(proposals((4, 0)), buckets=(1, 4, 16), has_static_prompts=True)
    assert header is not None
    assert header.bucket == 4


@pytest.mark.parametrize(
    ("wanted", "cap", "expected"),
    [
        (((3, 0), (3, 0)), 512, 1),
        (((4, 0), (0, 0)), 512, 2),
        (((4, 0), (0, 1)), 512, 1),
        (((4, 4), (0, 0)), 512, 2),
        (((4, 100), (0, 0)), 3, 1),
    ],
    ids=["few decodes", "decodes", "any prefill", "decodes and prefill", "little granted"],
)
def test_the_leader_splits_by_what_it_grants_the_busiest_rank(
    wanted: tuple[tuple[int, int], ...], cap: int, expected: int
) -> None:
    header = decide(proposals(*wanted), cap=cap)
    assert header is not None
    assert header.num_micro_batches == expected


def test_ranks_that_want_nothing_do_not_disturb_the_rotation() -> None:
    wanted = proposals((1, 300), (2, 0), (0, 300))
    for step in (5, 6, 7, 8):
        header = decide(wanted, step=step, cap=300)
        assert header is not None
        assert [g.prefill_rows for _, g in header.grants] == [[300, 0, 0], [0, 0, 300]][step % 2]
        assert (header.decode_rows, header.prefill_rows) == (3, 300)


def test_every_decided_header_survives_the_wire() -> None:
    rng = random.Random(1)
    for step in range(200):
        wanted = [(rng.randint(0, 40), rng.choice((0, 0, 300))) for _ in range(rng.randint(1, 5))]
        header = decide(proposals(*wanted), step=step)
        if header is not None:
            assert HEADERS.decode(HEADERS.encode(header)) == header


@pytest.mark.parametrize(
    ("ranks", "limit"),
    [
        ([(64, 320)], 32),  # 21 rows, and 10
        ([(32, 430)], 24),  # 14 rows, and 8: just little enough
        ([(256, 320), (10, 1000), (0, 0)], 104),
        ([(256, 320), (104, 0)], 104),  # rank 1 does not know, but may send all that it has
        ([(256, 320), (105, 0)], 0),
        ([(256, 900)], 0),  # too little to save
        ([(8, 500)], 0),
        ([], 0),
    ],
)
def test_edges_have_room_for_what_was_needed_and_two_deviations(
    ranks: list[tuple[int, int]], limit: int
) -> None:
    assert limit_edges([n for n, _ in ranks], [share for _, share in ranks]) == limit


def test_edges_are_limited_in_steps_without_prompts() -> None:
    known = {r: replace(p, edge_share=250) for r, p in proposals((64, 0), (40, 0)).items()}
    header = decide(known)
    assert header is not None
    assert header.num_micro_batches == 2
    assert header.edge_limit == 16  # of 32: 8 rows, and 6
    assert [header.edge_rows(rank, 0) for rank in (0, 1)] == [16, 16]
    assert [header.rows(rank, 0) for rank in (0, 1)] == [32, 20]
    known[1] = replace(known[1], prefill_rows=3)
    header = decide(known)
    assert header is not None
    assert (header.exact, header.edge_limit) == (True, 0)


def test_decodes_of_all_ranks_are_filled_up_to_one_bucket() -> None:
    buckets = (1, 4, 16)
    header = decide(proposals((3, 0), (1, 0), (0, 0)), buckets=buckets)
    assert header is not None
    assert header.bucket == 4
    assert [header.edge_rows(rank, 0) for rank in range(3)] == [4, 4, 4]
    header = decide(proposals((22, 0), (1, 0)), buckets=buckets)
    assert header is not None
    assert (header.num_micro_batches, header.bucket) == (2, 16)
    for other in (proposals((3, 1)), proposals((40, 0))):
        header = decide(other, buckets=buckets)
        assert header is not None
        assert header.bucket == 0


def test_edges_are_limited_as_rows_are_filled_up() -> None:
    known = {0: replace(proposals((140, 0))[0], edge_share=250)}
    header = decide(known, buckets=(48, 96))
    assert header is not None
    assert (header.bucket, header.edge_limit) == (96, 48)  # 24 rows, and 10, and a bucket
    known[1] = proposals((0, 0), (0, 0))[1]  # has no rows, and never had
    header = decide(known, buckets=(48, 96))
    assert header is not None
    assert (header.bucket, header.edge_limit) == (96, 48)
    header = decide(known, buckets=(96,))
    assert header is not None
    assert (header.bucket, header.edge_limit) == (96, 0)


def test_a_step_without_rows_has_no_bucket() -> None:
    header = decide(proposals((0, 0)), buckets=(1, 2), even_empty=True)
    assert header is not None
    assert header.bucket == 0
