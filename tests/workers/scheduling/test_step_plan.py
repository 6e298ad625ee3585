"""The rows of a step."""

from __future__ import annotations

import math

from msgspec.structs import replace

from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.scheduling.step_plan import PlannedRows, StepPlan, single_rows


def planned(name: str, blocks: list[int], first: int, count: int) -> PlannedRows:
    request = Request(request_id=name, prompt=tuple(range(8)), params=SamplingParams(max_tokens=1))
    sequence = SequenceState(request=request, choice=0, arrival=0, deadline=math.inf)
    sequence.blocks.extend(blocks)
    return PlannedRows(sequence, first, count, is_decode=False, num_new_blocks=0, is_admitted=False)


def test_a_plan_names_its_requests_and_cache_slots() -> None:
    plan = StepPlan((planned("b", [7, 2], 3, 3), planned("a", [5], 0, 1), planned("b", [9], 1, 1)))
    assert plan.num_rows == 5
    assert list(plan.request_ids) == ["b", "a"]
    assert plan.cache_slots(4) == [31, 8, 9, 20, 37]


def test_rows_of_drafts_are_decodes_of_their_own() -> None:
    plain = planned("a", [5], 0, 2)
    assert single_rows([plain]) == [plain]
    drafted = replace(planned("b", [7, 2], 7, 3), is_decode=True, num_new_blocks=1, drafts=(40, 41))
    assert drafted.samples_token
    one, *others = single_rows([drafted, plain])
    expected = replace(planned("b", [7, 2], 7, 1), sequence=drafted.sequence, is_decode=True)
    assert one == expected
    assert one.samples_token
    assert others == [
        replace(expected, first=8, drafts=(40,)),
        replace(expected, first=9, drafts=(41,)),
        plain,
    ]
