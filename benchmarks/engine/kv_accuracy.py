"""Accuracy of a KV cache in fp8: ``python -m benchmarks.engine.kv_accuracy``.

The bundled model scores the part of its corpus that was not used in training, in windows of 1,024
tokens: bits for each byte, and how often the most likely token equals that of float32. Then it
continues passages of 192 tokens for 64 tokens greedily: the mean number of tokens before the first
one that differs from float32, and the number of equal outputs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.demo_model.served_load import NEW_TOKENS, PROMPT_TOKENS
from benchmarks.engine.held_out import held_out
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.report.results import table
from cluster.config.cluster import EngineSection
from cluster.config.kv_cache import KvCacheDType
from cluster.launch.model_source import bundled_checkpoint
from workers.requests.request import SamplingParams

WINDOW_TOKENS = 1024
KINDS: tuple[tuple[str, KvCacheDType], ...] = (
    ("float32", "auto"),
    ("float32", "fp8"),
    ("bfloat16", "auto"),
    ("bfloat16", "fp8"),
)
"""Dtypes of the model and of its cache; the others are compared with the first pair."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Results of one engine."""

    bits_per_byte: float
    likeliest: Sequence[int]
    """The most likely token at each position of the text."""
    written: Sequence[tuple[int, ...]]
    """Greedy outputs."""


def answers(dtype: str, kind: KvCacheDType, num_windows: int | None = None) -> Answers:
    """Run the bundled model on the first windows of the text; None for the whole text."""
    text = held_out(None if num_windows is None else num_windows * WINDOW_TOKENS)
    section = EngineSection(kv_cache_dtype=kind, max_num_seqs=32, enable_prefix_caching=False)
    engine = LocalEngine(bundled_checkpoint(), dtype=dtype, section=section)
    windows = text.windows(WINDOW_TOKENS)
    scored = engine.generate(windows, SamplingParams(max_tokens=0, prompt_logprobs=1))
    places = [p for one in scored for p in one.prompt_logprobs or () if p is not None]
    assert len(places) == len(text.ids), "every token of the text has a probability"
    prompts = [part for part in text.parts(PROMPT_TOKENS) if len(part) == PROMPT_TOKENS]
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    return Answers(
        bits_per_byte=-sum(p.logprob for p in places) / math.log(2) / text.num_bytes,
        likeliest=[p.top[0][0] for p in places],
        written=[one.token_ids for one in engine.generate(prompts, greedy)],
    )


def num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens before the first one that differs."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(one))


def section(quick: bool) -> str:
    """Return the Markdown section."""
    num_windows = 1 if quick else None
    found = [answers(*kind, num_windows) for kind in KINDS]
    rows = []
    for (dtype, kind), own in zip(KINDS, found, strict=True):
        is_same = [a == b for a, b in zip(own.likeliest, found[0].likeliest, strict=True)]
        equal = [num_equal(*pair) for pair in zip(own.written, found[0].written, strict=True)]
        rows.append(
            [
                f"{dtype}, {'fp8' if kind == 'fp8' else dtype}",
                f"{own.bits_per_byte:.4f}",
                f"{sum(is_same) / len(is_same):.2%}",
                f"{sum(equal) / len(equal):.1f}",
                f"{sum(n == NEW_TOKENS for n in equal)} of {len(equal)}",
            ]
        )
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    header = ["model, cache", "bits per byte", "equal most likely token", "equal tokens of 64"]
    return (
        f"## Accuracy of a KV cache in fp8\n\n{about}\n\n{table([*header, 'equal outputs'], rows)}"
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
