"""Every golden against transformers, local and served: ``python -m tests.long.parity``.

The workers are processes that serve one model after the other. No speed is measured. ``--only
PREFIX`` takes some of the variants, ``--random N`` adds N random configs of each family, ``--out
FILE`` writes the table. Goldens are made first where they are missing, which needs transformers.

Columns: largest differences in float32 (hidden states, router logits and weights, logits); median
difference, equal clear choices and equal bits in bfloat16; then layouts of workers, ``ok`` where
all float32 tokens are those of transformers, and ``same bits`` where ``--deterministic`` workers
give the bits of one process, for sampled and greedy requests.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from msgspec.structs import replace

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import ServingCluster, ThreadCluster, serving
from benchmarks.report.results import table
from cluster.config.cluster import ClusterConfig, EngineSection
from tests.harness.golden_clusters import check_greedy, colocated_config, float32_config, requests
from tests.harness.worker_pool import PooledWorkerGroup
from tests.reference.exact import exact
from tests.reference.goldens import (
    ALL_VARIANTS,
    BF16_VARIANTS,
    CLASSIFIERS,
    MAX_MODEL_LEN,
    Golden,
    load_golden,
    make_random,
)
from tests.reference.parity import GREEDY, check_bfloat16, check_float32
from workers.requests.request import Request, SamplingParams

logger = logging.getLogger(__name__)

Make = Callable[[Golden], ClusterConfig]
LAYOUTS: Mapping[str, Make] = {
    "1x1": lambda golden: float32_config(golden, 1, 1),
    "1x3": lambda golden: float32_config(golden, 1, 3),
    "2x2": lambda golden: float32_config(golden, 2, 2),
    "3x4": lambda golden: float32_config(golden, 3, 4),
    "2 coloc.": lambda golden: colocated_config(golden, 2),
    "3 coloc.": lambda golden: colocated_config(golden, 3),
    "2x3 per slot, 2 micro-b.": lambda golden: float32_config(
        golden, 2, 3, engine={"combine_mode": "per_slot", "num_micro_batches": 2}
    ),
}
"""Columns: how many attention and expert workers."""
EXACT_LAYOUTS: Mapping[str, Make] = {
    "2x3 det., 2 micro-b.": lambda golden: float32_config(
        golden, 2, 3, engine={"deterministic": "on", "num_micro_batches": 2}
    ),
    "3 coloc. det.": lambda golden: colocated_config(golden, 3, engine={"deterministic": "on"}),
}
"""Columns whose bits are compared."""
SAMPLED = replace(GREEDY, temperature=1.0, top_p=0.9, seed=5, logprobs=2, prompt_logprobs=1)
HEAD = [
    "golden",
    "hidden states",
    "routers",
    "logits",
    "bf16 median",
    "bf16 agree",
    "bf16 same bits",
    *LAYOUTS,
    *EXACT_LAYOUTS,
]


def row_of(golden: Golden, group: PooledWorkerGroup) -> tuple[list[str], list[str]]:
    """A line of the table, and what failed in words."""
    cells, failures = [golden.name], []
    is_classifier = golden.name in CLASSIFIERS

    def attempt(what: str, check: Callable[[], list[str]], width: int) -> None:
        try:
            cells.extend(check())
        except Exception as err:  # whatever goes wrong with one, the others are tried
            cells.extend(["**fails**"] * width)
            failures.append(f"{golden.name}, {what}: {type(err).__name__}: {err}")

    attempt("float32", lambda: _classes(golden) if is_classifier else _float32(golden), 3)
    attempt("bfloat16", lambda: _bfloat16(golden), 3)
    for name, make in LAYOUTS.items():
        check = check_classes if is_classifier else check_greedy
        attempt(name, lambda make=make, check=check: _served(golden, make, group, check), 1)  # type: ignore[misc]
    asked = _exact_requests(golden, is_classifier)
    bits = _bits_alone(golden, asked)
    for name, make in EXACT_LAYOUTS.items():

        def same(cluster: ServingCluster, golden: Golden) -> None:
            found = cluster.answers(asked)
            for request in asked:
                outputs = found[request.request_id].outputs
                own = (exact(outputs), outputs[-1].class_logits)
                assert own == bits[request.request_id], request.request_id

        attempt(name, lambda make=make, same=same: _served(golden, make, group, same), 1)  # type: ignore[misc]
    return cells, failures


def _float32(golden: Golden) -> list[str]:
    found = check_float32(_engine(golden, "float32"), golden)
    return [f"{x:.0e}" for x in (found.hidden, found.routers, found.logits)]


def _bfloat16(golden: Golden) -> list[str]:
    if golden.name not in BF16_VARIANTS:
        return ["", "", ""]
    found = check_bfloat16(_engine(golden, "bfloat16"), golden)
    return [f"{found.median:.2f}", f"{found.agreement:.1%}", f"{found.equal:.1%}"]


def _classes(golden: Golden) -> list[str]:
    found = torch.tensor(_engine(golden, "float32").classify(golden.prompts))
    return ["", "", f"{_off(golden, found):.0e}"]


def check_classes(cluster: ServingCluster, golden: Golden) -> None:
    """Logits by class are transformers' own, up to rounding."""
    found = cluster.answers(requests(golden, SamplingParams(max_tokens=0)))
    rows = [found[f"p{i}"].outputs[-1].class_logits for i in range(len(golden.prompts))]
    assert _off(golden, torch.tensor(rows)) < 5e-4


def _off(golden: Golden, found: torch.Tensor) -> float:
    """Largest difference of logits by class [prompts, classes]."""
    want = torch.stack([golden.tensors[f"p{i}.logits"] for i in range(len(golden.prompts))])
    return (found - want).abs().max().item()


def _exact_requests(golden: Golden, is_classifier: bool) -> list[Request]:
    if is_classifier:
        return requests(golden, SamplingParams(max_tokens=0))
    params = (replace(GREEDY, logprobs=2), SAMPLED)
    return [replace(request, params=params[i % 2]) for i, request in enumerate(requests(golden))]


def _bits_alone(golden: Golden, asked: Sequence[Request]) -> dict[str, object]:
    """What each request gives alone in one process, bit by bit."""
    section = EngineSection(deterministic="on", enable_prefix_caching=False)
    engine = LocalEngine(golden.path, dtype="float32", section=section, max_model_len=MAX_MODEL_LEN)
    found: dict[str, object] = {}
    for request in asked:
        for (name, _), outputs in engine.run([request]).items():
            found[name] = (exact(outputs), outputs[-1].class_logits)
    return found


def _served(
    golden: Golden,
    make: Make,
    group: PooledWorkerGroup,
    check: Callable[[ServingCluster, Golden], None],
) -> list[str]:
    config = make(golden)
    with serving(ThreadCluster(config, group)) as cluster:
        check(cluster, golden)
    return ["same bits" if config.engine.deterministic == "on" else "ok"]


def _engine(golden: Golden, dtype: str) -> LocalEngine:
    return LocalEngine(golden.path, dtype=dtype, max_model_len=MAX_MODEL_LEN)


def run(goldens: Sequence[Golden]) -> tuple[str, list[str]]:
    """The table of some goldens, and what failed."""
    rows, failures = [], []
    group = PooledWorkerGroup()
    try:
        for number, golden in enumerate(goldens, start=1):
            start = time.monotonic()
            cells, failed = row_of(golden, group)
            rows.append(cells)
            failures += failed
            took = time.monotonic() - start
            words = (number, len(goldens), golden.name, took, len(failed))
            logger.info("%d/%d %s %.1f s, %d failed", *words)
    finally:
        group.close()
    return table(HEAD, rows), failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when nothing fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.long.parity", description=__doc__)
    parser.add_argument("--only", default="", help="beginning of the variants' names")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="random configs too")
    parser.add_argument("--first", type=int, default=100, help="number of the first of them")
    parser.add_argument("--out", type=Path, help="file for the table, by default stdout")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    names = [v for v in (*ALL_VARIANTS, *CLASSIFIERS) if v.startswith(options.only)]
    goldens = [load_golden(name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        if options.random:
            made = make_random(Path(folder), options.first, options.random)
            goldens += [golden for golden in made if golden.name.startswith(options.only)]
        text, failures = run(goldens)
    if options.out is None:
        sys.stdout.write(text + "\n")
    else:
        options.out.write_text(text + "\n")
    for failure in failures:
        sys.stdout.write(failure + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
