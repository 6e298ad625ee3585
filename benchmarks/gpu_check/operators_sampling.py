"""Draws of tokens on the device: the same as on a CPU, one for one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from benchmarks.gpu_check.section import Place, Report
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.sampling.logits_processors import LogitsProcessors, SamplingRow
from workers.sampling.sampler import sample_tokens

PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=40),
    SamplingParams(temperature=0.9, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=100, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.5),
    SamplingParams(temperature=0.8, presence_penalty=1.0, logit_bias=((3, 5.0), (4, -100.0))),
    SamplingParams(temperature=1.0, allowed_token_ids=(1, 5, 9)),
    SamplingParams(temperature=1.0, bad_words=((7,), (8, 9))),
)


def run(place: Place, report: Report) -> None:
    """Plain rows, rows with processors and both together, in both types."""
    num_rows, vocab = place.size(64, 10), place.size(50304, 128)
    plain = [p for p in PARAMS if _row(p, 0).is_plain]
    num_drawn = 0
    for name, params in {"plain": plain, "changed": PARAMS[-4:], "mixed": PARAMS}.items():
        for dtype in (torch.float32, torch.bfloat16):
            with report.part(f"{name} {dtype}"):
                rows = [_row(params[i % len(params)], i) for i in range(num_rows)]
                num_drawn += _compare(place, report, f"{name} {dtype}", rows, vocab, dtype)
    report.say(f"{num_drawn} tokens")


def _compare(
    place: Place,
    report: Report,
    what: str,
    rows: Sequence[SamplingRow],
    vocab: int,
    dtype: torch.dtype,
) -> int:
    generator = torch.Generator().manual_seed(1)
    logits = (3.0 * torch.randn(len(rows), vocab, generator=generator)).to(dtype)
    logits[len(rows) // 2, 5] = math.nan  # a row that fails
    want = sample_tokens(logits, rows)
    got = sample_tokens(logits.to(place.device), rows).cpu()
    num_other = int((got != want).sum())
    report.check(not num_other, f"{what}: {num_other} of {len(rows)} tokens differ")
    return len(rows)


def _row(params: SamplingParams, index: int) -> SamplingRow:
    request = Request(request_id=f"r{index}", prompt=(1, 2, 3, 4), params=params)
    sequence = SequenceState(request, 0, index, math.inf, output=[5, 8, 5])
    return LogitsProcessors(sequence, ()).row()
