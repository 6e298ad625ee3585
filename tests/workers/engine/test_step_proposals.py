"""Proposals of one and of many ranks, in a table and on the wire."""

from __future__ import annotations

import msgspec
import pytest

from cluster.core.errors import ProtocolError
from workers.engine.step_proposals import PROPOSALS, ProposalTable, StepProposal, StepProposals
from workers.requests.step_header import MAX_ROWS
from workers.requests.traced import MAX_TRACED
from workers.scheduling.step_plan import RowsWanted

ALONE = RowsWanted(3, 9, edge_share=250, is_alone=True, parents=(b"a" * 24,), draft_rows=2)


def message(*proposals: StepProposal) -> StepProposals:
    return StepProposals(generation=1, step=1 << 50, proposals=proposals, is_settled=False)


def test_proposals_survive_the_wire() -> None:
    alone = StepProposal.of(3, ALONE)
    assert alone.num_rows == 12
    assert StepProposal.of(3, RowsWanted(decode_rows=2, draft_rows=2)).draft_rows == 2
    proposals = message(alone, StepProposal.of(5, RowsWanted(1)))
    assert PROPOSALS.decode(PROPOSALS.encode(proposals)) == proposals
    assert (alone.parents, alone.is_alone, alone.edge_share) == ((b"a" * 24,), True, 250)


def test_a_table_is_complete_with_all_of_its_ranks() -> None:
    table = ProposalTable((0, 2, 7))
    assert table.missing() == [0, 2, 7]
    table.put([StepProposal.of(7, ALONE), StepProposal.of(2, RowsWanted(4))])
    assert table.missing() == [0]
    assert not table.is_complete
    changed = [StepProposal.of(0, RowsWanted(1)), StepProposal.of(7, RowsWanted(5))]
    assert table.put(changed)
    assert not table.put(changed)
    assert table.is_complete
    assert [(p.rank, p.decode_rows) for p in table.in_order] == [(0, 1), (2, 4), (7, 5)]
    table.clear()
    assert table.missing() == [0, 2, 7]
    assert table.in_order == []


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("decode_rows", MAX_ROWS + 1, f"<= {MAX_ROWS}"),
        ("prefill_rows", MAX_ROWS + 1, f"<= {MAX_ROWS}"),
        ("draft_rows", 4, "draft_rows must not exceed decode_rows"),
        ("edge_share", 1001, "<= 1000"),
        ("is_alone", 2, "`bool`"),
        ("parents", (b"a" * 23,), "length"),
        ("parents", (b"a" * 24,) * (MAX_TRACED + 1), "length"),
    ],
)
def test_wrong_values_are_refused(field: str, value: object, rule: str) -> None:
    values = msgspec.msgpack.decode(PROPOSALS.encode(message(StepProposal.of(0, ALONE))))
    proposals = values[StepProposals.__struct_fields__.index("proposals")]
    proposals[0][StepProposal.__struct_fields__.index(field)] = value
    with pytest.raises(ProtocolError, match=f"not a step proposal: .*{rule}"):
        PROPOSALS.decode(msgspec.msgpack.encode(values))


def test_wrong_lengths_are_refused() -> None:
    data = PROPOSALS.encode(message(StepProposal.of(0, ALONE)))
    for wrong in (data[:-1], data + b"x", b""):
        with pytest.raises(ProtocolError, match="not a step proposal"):
            PROPOSALS.decode(wrong)
