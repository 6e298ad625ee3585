"""Peak memory of real worker processes while they load: their weights once, KV and a constant."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from benchmarks.checkpoints.random_checkpoint import RandomModel, write
from benchmarks.harness.worker_memory import EXPERT_WORKERS, memory_of_workers

logger = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

SMALL = RandomModel(hidden=512, layers=2, ffn=256, vocab=16384)
"""134 MB in bfloat16."""
LARGE = RandomModel(hidden=1024, layers=5, ffn=512, vocab=50304)
"""1.25 GB in bfloat16; the head alone has 103 MB."""


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Callable[[RandomModel], Path]]:
    """``checkpoint(model)``: its folder, written once, gone when the module is done."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-") as folder:
        yield lru_cache(lambda model: write(model, Path(folder) / f"{model.hidden}"))


@pytest.mark.slow
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
def test_peak_memory_is_the_share_once_kv_and_a_constant(
    model: RandomModel,
    dtype: str,
    checkpoint: Callable[[RandomModel], Path],
) -> None:
    found = memory_of_workers(checkpoint(model), dtype)
    assert len(found) == 1 + EXPERT_WORKERS
    for name, worker in found.items():
        loaded = worker.share + worker.kv_bytes
        logger.info("%s: %s, %d bytes above weights and KV", name, worker, worker.peak - loaded)
        assert worker.seen.end - worker.seen.base > worker.share, f"{name} has not loaded its share"
        above = f"{name}: {worker.peak - loaded:,} bytes above {loaded:,}"
        assert worker.peak <= worker.limit, above
