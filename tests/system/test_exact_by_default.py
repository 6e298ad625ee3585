"""Clusters whose workers may compute differently: on which arithmetic they agree, what it gives.

The kernels of a worker are chosen by its name, which is that of its data thread too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import ServingCluster, ThreadCluster, make_config, serving
from cluster.config.cluster import EngineSection
from tests.reference.exact import exact, mixed_requests
from tests.workers.native.builds import NAMES, library
from workers.native.thread_team import Kernels, ThreadTeam
from workers.process.worker import worker

BEST = NAMES[0] if NAMES else ""
KernelsOf = Callable[[dict[str, str]], None]
needs_kernels = pytest.mark.skipif(not NAMES, reason="no compiled kernels on this machine")
needs_two = pytest.mark.skipif(
    "avx512_bf16" not in NAMES, reason="one arithmetic for bfloat16 on this processor"
)


def kernels(name: str, count: int) -> Kernels:
    """Those of an instruction set; torch without one."""
    return (
        Kernels(ThreadTeam(library(name), count), name) if name else Kernels(None, "torch (a test)")
    )


@pytest.fixture
def kernels_of(monkeypatch: pytest.MonkeyPatch) -> KernelsOf:
    """Gives workers the kernels of instruction sets by name; others have the best."""

    def choose(by_name: dict[str, str]) -> None:
        def start(count: int, why_torch: str = "") -> Kernels:
            return kernels(by_name.get(threading.current_thread().name, BEST), count)

        monkeypatch.setattr(worker, "start_kernels", start)

    return choose


def results(cluster: ServingCluster) -> dict[str, Any]:
    found: dict[str, Any] = cluster.snapshot()["results"]
    return found


def answers(cluster: ServingCluster, vocab_size: int) -> dict[str, object]:
    asked = mixed_requests(vocab_size, count=9, max_tokens=10)
    return {name: exact(found.outputs) for name, found in cluster.answers(asked).items()}


def alone(checkpoint: Path, dtype: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What each request gives alone in one process, with the kernels of an instruction set."""
    start = "workers.engine.embedded.start_kernels"
    monkeypatch.setattr(start, lambda count: kernels(name, count))
    section = EngineSection(enable_prefix_caching=False)
    engine = LocalEngine(checkpoint, dtype=dtype, section=section, num_threads=2)
    assert engine.is_exact
    found: dict[str, object] = {}
    for request in mixed_requests(engine.config.vocab_size, count=9, max_tokens=10):
        ((key, outputs),) = engine.run([request]).items()
        found[key[0]] = exact(outputs)
    return found, engine.config.vocab_size


@needs_kernels
@pytest.mark.parametrize("workers", [{}, {"mode": "colocated"}], ids=["pools", "colocated"])
def test_results_are_exact_by_default(
    tiny_checkpoint: Path, workers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, vocab_size = alone(tiny_checkpoint, "float32", NAMES[-1], monkeypatch)
    config = make_config(tiny_checkpoint, 2, 2, dtype="float32", workers=workers)
    with serving(ThreadCluster(config)) as cluster:
        assert results(cluster)["exact"]
        assert results(cluster)["arithmetic"].startswith("float32 ")
        assert answers(cluster, vocab_size) == expected


@needs_two
def test_the_lowest_common_arithmetic_is_taken(
    tiny_checkpoint: Path, kernels_of: KernelsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels_of({"attention-0": "avx512_bf16", "expert-0": "avx512_bf16", "expert-1": "avx512"})
    expected, vocab_size = alone(tiny_checkpoint, "bfloat16", "avx2", monkeypatch)
    with serving(ThreadCluster(make_config(tiny_checkpoint, 1, 2, dtype="bfloat16"))) as cluster:
        assert results(cluster)["arithmetic"].startswith("bfloat16-fma ")
        assert answers(cluster, vocab_size) == expected


@needs_kernels
def test_a_worker_with_torch_ends_exactness_and_the_reason_is_said(
    tiny_checkpoint: Path, kernels_of: KernelsOf
) -> None:
    kernels_of({"expert-1": ""})
    with serving(ThreadCluster(make_config(tiny_checkpoint, 1, 2, dtype="float32"))) as cluster:
        reason = "expert-1 computes experts with torch (a test)"
        assert results(cluster) == {"exact": False, "arithmetic": "", "reason": reason}


@needs_kernels
def test_where_exact_results_are_demanded_that_worker_is_refused(
    tiny_checkpoint: Path, kernels_of: KernelsOf
) -> None:
    kernels_of({"expert-1": ""})
    config = make_config(tiny_checkpoint, 1, 2, dtype="float32", engine={"deterministic": "on"})
    words = "computes with (torch|float32 .*), the others with (torch|float32 .*)"
    with pytest.raises(RuntimeError, match=words), serving(ThreadCluster(config)):
        raise AssertionError("it serves")


def test_off_is_said_too(tiny_checkpoint: Path) -> None:
    config = make_config(tiny_checkpoint, engine={"deterministic": "off"})
    with serving(ThreadCluster(config)) as cluster:
        assert results(cluster)["reason"] == "attention-0 has --deterministic off"
