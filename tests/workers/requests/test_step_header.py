"""What a step header says of its rows, and what it must not say."""

from __future__ import annotations

import pytest
from msgspec import structs

from cluster.core.errors import ProtocolError
from workers.requests.step_header import HEADERS, MAX_ROWS, Grant, Grants, StepHeader, pack
from workers.requests.traced import MAX_TRACED


def header(num_micro_batches: int = 1, oldest_epoch: int = 5) -> StepHeader:
    return StepHeader(
        generation=1,
        step=9,
        epoch=5,
        oldest_epoch=oldest_epoch,
        grants=Grants.of({0: Grant(decode_rows=3, prefill_rows=4), 2: Grant(decode_rows=1)}),
        num_micro_batches=num_micro_batches,
    )


def test_rows_are_those_of_all_ranks() -> None:
    assert (header().decode_rows, header().prefill_rows) == (4, 4)
    assert header().grant(0).num_rows == 7
    assert header().grant(1) == Grant(decode_rows=0, prefill_rows=0)


def test_the_first_of_two_micro_batches_has_the_larger_half() -> None:
    assert header().rows(0, 0) == 7
    two = header(num_micro_batches=2)
    assert [two.rows(0, 0), two.rows(0, 1)] == [4, 3]
    assert [two.rows(2, 0), two.rows(2, 1)] == [1, 0]
    assert [two.rows(1, 0), two.rows(1, 1)] == [0, 0]


@pytest.mark.parametrize("ranks", [(), (1, 0), (0, 0)])
def test_ranks_are_named_once_and_in_order(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sorted by rank"):
        Grants(ranks=pack(ranks), numbers=pack([0] * 3 * len(ranks)), totals=Grant())


def test_there_is_a_number_in_each_column_for_each_rank() -> None:
    with pytest.raises(ValueError, match="numbers must be 3 for each rank"):
        Grants(ranks=pack([0, 1]), numbers=pack([0] * 5), totals=Grant())
    with pytest.raises(ValueError, match="sorted by rank"):
        Grants(ranks=b"123", numbers=b"", totals=Grant())


def test_grants_are_those_of_each_rank() -> None:
    each = {
        1: Grant(decode_rows=5, prefill_rows=7, draft_rows=2),
        4: Grant(decode_rows=4, draft_rows=4),
        9: Grant(decode_rows=MAX_ROWS, prefill_rows=3, draft_rows=1),
    }
    grants = Grants.of(each)
    assert dict(grants) == each
    assert [*grants.positions] == [1, 4, 9]
    assert [grants.of_rank(rank).num_decodes for rank in (1, 4, 9, 5)] == [3, 0, MAX_ROWS - 1, 0]
    assert grants.totals == Grant(decode_rows=MAX_ROWS + 9, prefill_rows=10, draft_rows=7)
    assert list(grants.rows) == [12, 4, MAX_ROWS + 3]
    with pytest.raises(ValueError, match=f"rows are {MAX_ROWS + 1}"):
        Grants.of({0: Grant(decode_rows=MAX_ROWS + 1)})


@pytest.mark.parametrize("num_rows", range(10))
def test_the_halves_of_all_ranks_are_those_of_each(num_rows: int) -> None:
    grants = Grants.of({0: Grant(prefill_rows=num_rows), 1: Grant(decode_rows=1)})
    two = StepHeader(
        generation=1, step=1, epoch=1, oldest_epoch=1, grants=grants, num_micro_batches=2
    )
    for micro_batch in (0, 1):
        counts = [two.rows(rank, micro_batch) for rank in (0, 1)]
        assert list(two.edge_counts(micro_batch)) == counts
    assert sum(two.edge_counts(0)) + sum(two.edge_counts(1)) == num_rows + 1
    assert structs.replace(two, bucket=max(two.edge_counts(0))).edge_counts(1)


def test_the_counts_of_all_ranks_are_those_of_each() -> None:
    plain = header(num_micro_batches=2)
    for one in (
        plain,
        structs.replace(plain, edge_limit=3),
        structs.replace(plain, bucket=8),
        structs.replace(plain, bucket=8, edge_limit=3),
        header(),
    ):
        for micro_batch in range(one.num_micro_batches):
            counts = [one.edge_rows(rank, micro_batch) for rank in (0, 2)]
            assert list(one.edge_counts(micro_batch)) == counts


def test_no_more_rows_are_of_drafts_than_there_are() -> None:
    with pytest.raises(ValueError, match="draft_rows must not exceed decode_rows"):
        structs.replace(header(), grants=Grants.of({0: Grant(decode_rows=2, draft_rows=3)}))


def test_an_edge_limit_is_for_steps_whose_edges_carry_all_rows() -> None:
    limited = structs.replace(header(num_micro_batches=2), edge_limit=3)
    assert [limited.edge_rows(0, 0), limited.edge_rows(0, 1), limited.edge_rows(2, 0)] == [3, 3, 1]
    assert header().edge_rows(0, 0) == 7
    with pytest.raises(ValueError, match="an exact step must have no edge_limit"):
        structs.replace(limited, exact=True)


def test_a_bucket_fills_up_the_rows_of_all_ranks() -> None:
    filled = structs.replace(header(num_micro_batches=2), bucket=8)
    assert [filled.rows(rank, 1) for rank in range(3)] == [3, 0, 0]
    for rank in range(3):
        assert [filled.edge_rows(rank, mb) for mb in (0, 1)] == [8, 8]
    assert filled.rows(0, 0) == 4
    assert structs.replace(filled, edge_limit=3).edge_rows(2, 0) == 3
    with pytest.raises(ValueError, match="and no bucket"):
        structs.replace(filled, exact=True)
    with pytest.raises(ValueError, match="bucket must hold the rows of every rank"):
        structs.replace(filled, bucket=3)


def test_a_step_runs_in_no_epoch_that_may_be_overwritten() -> None:
    with pytest.raises(ValueError, match="oldest_epoch must not exceed epoch"):
        header(oldest_epoch=6)
    with pytest.raises(ProtocolError, match="a step header"):
        HEADERS.decode(HEADERS.encode(header()).replace(b"\x05\x05", b"\x05\x06"))


def test_so_many_requests_are_traced_at_most() -> None:
    parent = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    most = structs.replace(header(), parents=((0, (parent,) * MAX_TRACED),))
    assert len(most.parents[0][1]) == MAX_TRACED
    with pytest.raises(ValueError, match=f"parents must be at most {MAX_TRACED}"):
        structs.replace(header(), parents=(*most.parents, (2, (parent,))))
