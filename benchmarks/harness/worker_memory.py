"""Peak memory of real worker processes while they load, and what it may come to at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from benchmarks.harness.worker_processes import Memory, ProcessWorkerGroup
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.checkpoint_summary import check_checkpoint

KV_BYTES = 4 << 20
"""Of the attention worker."""
EXPERT_WORKERS = 2
CONSTANT_BYTES = 64 << 20
"""What a worker takes at most beside the interpreter with its libraries, its weights and its KV."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerMemory:
    """Of one worker, in bytes beside the interpreter with its libraries."""

    seen: Memory
    share: int
    """All weights that it loads, in the type that it computes in."""
    kv_bytes: int

    @property
    def peak(self) -> int:
        """Most that it took."""
        return self.seen.peak - self.seen.base

    @property
    def limit(self) -> int:
        """Most that it may take."""
        return self.share + self.kv_bytes + CONSTANT_BYTES


def memory_of_workers(path: Path, dtype: str) -> dict[str, WorkerMemory]:
    """Start and end one attention and two expert workers with a checkpoint in bfloat16."""
    group = ProcessWorkerGroup()
    config = make_config(path, 1, EXPERT_WORKERS, dtype=dtype, engine={"kv_cache_bytes": KV_BYTES})
    with serving(ThreadCluster(config, group)):
        memory = group.finish_watching()
    shares = _shares(path, factor=2 if dtype == "float32" else 1)
    return {
        name: WorkerMemory(
            seen=seen,
            share=shares[name.partition("-")[0]],
            kv_bytes=KV_BYTES if name.startswith("attention") else 0,
        )
        for name, seen in memory.items()
    }


def _shares(path: Path, factor: int) -> Mapping[str, int]:
    """By role; ``factor`` is the size of the compute dtype in sizes of the one on disk."""
    summary = check_checkpoint(path)
    opened = Checkpoint(path)
    experts = [e.num_bytes for name, e in opened.tensors.items() if ".experts." in name]
    assert sum(experts) == summary.expert_bytes
    return {
        "attention": factor * summary.attention_bytes,
        "expert": factor * sum(experts) // EXPERT_WORKERS,
    }
