"""Peak memory of real worker processes while they load: their share and one tensor, no more."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from benchmarks.random_checkpoint import RandomModel, write
from tests.harness.serving_cluster import ThreadCluster, make_config, serving
from tests.harness.worker_processes import ProcessWorkerGroup
from workers.model.loading.checkpoint import Checkpoint, check_checkpoint

logger = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

SMALL = RandomModel(hidden=512, layers=2, ffn=256, vocab=16384)
"""134 MB in bfloat16."""
LARGE = RandomModel(hidden=1024, layers=5, ffn=512, vocab=50304)
"""1.25 GB in bfloat16."""
KV_BYTES = 4 << 20
SLACK_BYTES = 32 << 20
"""Stacks, sockets, table of rotations, what libraries set up at first use, holes in the heap:
3 to 10 MB measured in expert workers, 6 (small) to 35 MB (large, float32) in attention workers."""
SLACK_SHARE = 0.05
"""Rounding of the allocator, and what oneDNN pads in its own weight layout."""
EXPERT_WORKERS = 2


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Callable[[RandomModel], Path]]:
    """``checkpoint(model)``: its folder, written once, gone when the module is done."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-") as folder:
        yield lru_cache(lambda model: write(model, Path(folder) / f"{model.hidden}"))


@dataclass(frozen=True, slots=True)
class Part:
    """What one worker loads, in bytes of the dtype that it computes in."""

    share: int
    """All its tensors."""
    largest: int
    """The largest of them."""


def parts_of(path: Path, factor: int) -> dict[str, Part]:
    """By role; ``factor`` is the size of the compute dtype in sizes of the one on disk."""
    summary = check_checkpoint(path)
    opened = Checkpoint(path)
    attention = [opened.num_bytes(p) for p in summary.family.attention_tensors()]
    experts = [e.num_bytes for name, e in opened.tensors.items() if ".experts." in name]
    assert sum(experts) == summary.expert_bytes
    return {
        "attention": Part(factor * sum(attention), factor * max(attention)),
        "expert": Part(factor * sum(experts) // EXPERT_WORKERS, factor * max(experts)),
    }


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (SMALL, "bfloat16"),
        pytest.param(SMALL, "float32", marks=pytest.mark.slow),
        pytest.param(LARGE, "bfloat16", marks=pytest.mark.slow),
        pytest.param(LARGE, "float32", marks=pytest.mark.slow),
    ],
    ids=["small-bfloat16", "small-float32", "large-bfloat16", "large-float32"],
)
def test_peak_memory_is_the_share_and_one_tensor(
    model: RandomModel,
    dtype: str,
    checkpoint: Callable[[RandomModel], Path],
) -> None:
    path = checkpoint(model)
    parts = parts_of(path, factor=2 if dtype == "float32" else 1)
    group = ProcessWorkerGroup()
    config = make_config(path, 1, EXPERT_WORKERS, dtype=dtype, engine={"kv_cache_bytes": KV_BYTES})
    with serving(ThreadCluster(config, group)):
        memory = group.finish_watching()
    assert len(memory) == 1 + EXPERT_WORKERS
    for name, seen in memory.items():
        part = parts[name.partition("-")[0]]
        kv_bytes = KV_BYTES if name.startswith("attention") else 0
        loaded = seen.base + part.share + kv_bytes
        limit = loaded + part.largest + SLACK_SHARE * part.share + SLACK_BYTES
        assert seen.end > seen.base + part.share, f"{name} has not loaded its share"
        assert seen.peak <= limit, f"{name}: {seen.peak - loaded:,} bytes above {loaded:,}: {part}"
        logger.info(
            "%s: %s, %s: %d bytes above base and share", name, seen, part, seen.peak - loaded
        )
