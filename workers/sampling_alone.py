"""Drawing and scoring row by row, for ``--deterministic``.

Some functions of torch give the elements at the end of a tensor other last bits than those in the
middle, so a row must not share its tensor with others.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from workers.logit_rules import SamplingRow
from workers.request import TokenLogprob
from workers.sampling import Drawn, logprob_entries, sample


def sample_alone(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
    """``sampling.sample`` of each row in memory of its own."""
    return [sample(logits[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows)]


def logprob_entries_alone(
    logits: Tensor, tokens: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprob]:
    """``sampling.logprob_entries`` of each row in memory of its own."""
    return [
        logprob_entries(logits[i : i + 1].clone(), [token], [count])[0]
        for i, (token, count) in enumerate(zip(tokens, num_top, strict=True))
    ]
