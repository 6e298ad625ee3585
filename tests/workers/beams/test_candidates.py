"""The tokens that may follow beams, from logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.beams.candidates import CandidateParams, beam_candidates, beam_candidates_by_row
from workers.sampling.sampler import logprob_entries

WIDTHS = (1, 3, 8)
ENDINGS = ((), (7,), tuple(range(0, 40, 2)))


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (torch.randn((4, 50), generator=generator) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("may_end", [True, False])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_best_of_all_and_of_those_that_go_on(
    width: int, ending: tuple[int, ...], may_end: bool, dtype: torch.dtype
) -> None:
    logits = rows(dtype)
    wanted = CandidateParams(width=width, ending=ending, may_end=may_end, num_top=2)
    logprobs = logits.float().log_softmax(-1)
    for row, found in enumerate(beam_candidates(logits, wanted)):
        order = sorted(range(50), key=lambda t: (-float(logprobs[row, t]), t))
        best = order[:width] if may_end else []
        others = [token for token in order if token not in ending][:width]
        assert {one.token_id for one in found} == {*best, *others}
        ids = [one.token_id for one in found]
        assert len(ids) == len(set(ids))
        assert [one.logprob for one in found] == sorted((o.logprob for o in found), reverse=True)
        same = logits[row].expand(len(ids), 50)
        assert found == logprob_entries(same, ids, [2] * len(ids))


def test_alternatives_are_reported_where_they_are_asked_for() -> None:
    wanted = CandidateParams(width=2, ending=(), may_end=True)
    for one in beam_candidates(rows(), wanted)[0]:
        assert (one.rank, one.top) == (0, ())
    more = CandidateParams(width=2, ending=(), may_end=True, num_top=5)
    (first, second) = beam_candidates(rows(), more)[0]
    assert len(first.top) == len(second.top) == 5
    assert first.top[:2] == ((first.token_id, first.logprob), (second.token_id, second.logprob))


def test_a_row_alone_has_the_same_bits_in_any_batch() -> None:
    logits, wanted = rows(), CandidateParams(width=3, ending=(7,), may_end=True, num_top=1)
    each = [beam_candidates_by_row(row.unsqueeze(0), wanted)[0] for row in logits]
    assert beam_candidates_by_row(logits, wanted) == each
