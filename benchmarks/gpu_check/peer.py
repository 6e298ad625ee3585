"""Decode rate of transformers with a static cache, ``torch.compile`` and CUDA graphs."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.checkpoints.random_checkpoint import TINY
from benchmarks.gpu_check.section import Place, Report
from benchmarks.gpu_check.speed import BATCHES, OLMOE
from benchmarks.gpu_check.transformers_peer import TransformersPeer


def run(place: Place, report: Report) -> None:
    """Measure OLMoE at each batch size."""
    if find_spec("transformers") is None:
        report.value("transformers", "not installed")
        return
    peer = TransformersPeer(place, TINY if place.is_tiny else OLMOE, is_compiled=True)
    for batch in BATCHES[: place.size(len(BATCHES), 1)]:
        with report.part(f"compiled {batch}"):
            rate = peer.decode_rate(batch, place.size(1024, 24))
            report.value(f"compiled {batch}", {"tokens_per_s": rate})
            report.say(f"{rate:.0f} tokens/s at batch {batch}")
