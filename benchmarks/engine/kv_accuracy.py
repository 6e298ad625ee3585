"""What a KV cache in fp8 does to answers: ``python -m benchmarks.engine.kv_accuracy``.

The bundled model, which was trained on text, reads the part of its corpus that training never saw,
in windows of 1,024 tokens: bits for each byte, and how often the most likely token is that of
float32. Then it goes on greedily for 64 tokens from stretches of 192: how many of these tokens come
before the first that differs, and how many answers are equal.
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
"""Types of the model and of its cache; the first is what others are compared with."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What an engine makes of a text."""

    bits_per_byte: float
    likeliest: Sequence[int]
    """The most likely token at each place of the text."""
    written: Sequence[tuple[int, ...]]
    """Greedy answers."""


def answers(dtype: str, kind: KvCacheDType, num_windows: int | None = None) -> Answers:
    """Of the bundled model, on the first windows of the text; None: on all of it."""
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
    """Tokens before the first that differs."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(one))


def section(quick: bool) -> str:
    """The section of its page."""
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
    header = ["model, cache", "bits per byte", "same likeliest token", "equal tokens of 64"]
    return f"## Answers with a KV cache in fp8\n\n{about}\n\n{table([*header, 'equal'], rows)}"


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
