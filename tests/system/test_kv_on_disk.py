"""Blocks on disk outlive a cluster, and are of use to clusters that compute the same bits only."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.serving_cluster import (
    ThreadCluster,
    ThreadWorkerGroup,
    make_config,
)
from benchmarks.harness.serving_cluster import serving as served
from benchmarks.harness.stalls import wait_until
from tests.reference.exact import exact
from tests.system.test_exact_by_default import (
    KernelsOf,
    kernels_of,
    needs_kernels,
    needs_two,
    results,
)
from tests.system.test_kv_fetch import CACHED, EagerWorker, answer, request_of

__all__ = ["kernels_of"]

MIB = 2**20


def cluster_of(checkpoint: Path, folder: Path, dtype: str) -> ThreadCluster:
    tiers = {"kv_host_bytes": MIB, "kv_disk_bytes": 16 * MIB, "kv_disk_dir": str(folder)}
    config = make_config(checkpoint, 1, 1, dtype=dtype, kv_tiers=tiers)
    return ThreadCluster(config, ThreadWorkerGroup(by_role={"attention": EagerWorker}))


def serve_once(checkpoint: Path, folder: Path, dtype: str = "bfloat16") -> tuple[str, object, int]:
    """Arithmetic of a new cluster, what a client sees, and cached tokens; all is on disk then."""
    with served(cluster_of(checkpoint, folder, dtype)) as cluster:
        outputs = answer(cluster, 0, request_of(100))
        assert isinstance(cluster, ThreadCluster)
        tiers = cluster.group.attention("attention-0").tiers
        assert tiers is not None
        wait_until(lambda: tiers.copies.is_idle, "copies of KV blocks")
        assert tiers.tiers.wait_written(60.0)
        cached = outputs[0].num_cached_tokens
        assert cached is not None
        return results(cluster)["arithmetic"], exact(outputs), cached


@needs_two
def test_another_expert_worker_changes_the_arithmetic_of_the_blocks(
    tiny_checkpoint: Path, tmp_path: Path, kernels_of: KernelsOf
) -> None:
    """The attention worker can compute in both ways; the expert worker decides."""
    kernels_of({"attention-0": "avx512_bf16", "expert-0": "avx512"})
    arithmetic, _, _ = serve_once(tiny_checkpoint, tmp_path / "kv")
    assert arithmetic.startswith("bfloat16-fma ")
    kernels_of({"attention-0": "avx512_bf16", "expert-0": "avx512_bf16"})
    expected = serve_once(tiny_checkpoint, tmp_path / "empty")
    assert expected[0].startswith("bfloat16-dot ")
    assert serve_once(tiny_checkpoint, tmp_path / "kv") == expected
    arithmetic, found, cached = serve_once(tiny_checkpoint, tmp_path / "kv")
    assert (arithmetic, found, cached) == (*expected[:2], CACHED)


@needs_kernels
def test_blocks_of_a_cluster_that_is_not_exact_are_no_blocks_of_an_exact_one(
    tiny_checkpoint: Path, tmp_path: Path, kernels_of: KernelsOf
) -> None:
    kernels_of({"expert-0": ""})
    arithmetic, _, _ = serve_once(tiny_checkpoint, tmp_path / "kv", "float32")
    assert arithmetic == ""
    kernels_of({})
    expected = serve_once(tiny_checkpoint, tmp_path / "empty", "float32")
    assert expected[0].startswith("float32 ")
    assert serve_once(tiny_checkpoint, tmp_path / "kv", "float32") == expected
