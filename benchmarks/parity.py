"""Every golden against transformers, local and served: ``python -m benchmarks.parity``.

No speed is measured. ``--only PREFIX`` takes some of the variants, ``--out FILE`` writes the table.
Goldens are made first where they are missing, which needs transformers.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.results import table
from cluster.config import ClusterConfig
from tests.goldens import ALL_VARIANTS, BF16_VARIANTS, MAX_MODEL_LEN, Golden, load_golden
from tests.parity import check_bfloat16, check_float32
from tests.serving_cluster import ThreadCluster, serving
from tests.test_layouts import check_greedy, colocated_config, float32_config
from workers.local_engine import LocalEngine

logger = logging.getLogger(__name__)

LAYOUTS: Mapping[str, Callable[[Golden], ClusterConfig]] = {
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


def row_of(variant: str) -> tuple[list[str], list[str]]:
    """A line of the table, and what failed in words."""
    golden = load_golden(variant)
    cells, failures = [variant], []

    def attempt(what: str, check: Callable[[], list[str]], width: int) -> None:
        try:
            cells.extend(check())
        except Exception as err:  # whatever goes wrong with one, the others are tried
            cells.extend(["**fails**"] * width)
            failures.append(f"{variant}, {what}: {type(err).__name__}: {err}")

    attempt("float32", lambda: _float32(golden), 3)
    attempt("bfloat16", lambda: _bfloat16(golden), 2)
    for name, config in LAYOUTS.items():
        attempt(name, lambda make=config: _served(golden, make), 1)  # type: ignore[misc]
    return cells, failures


def _float32(golden: Golden) -> list[str]:
    found = check_float32(_engine(golden, "float32"), golden)
    return [f"{x:.0e}" for x in (found.hidden, found.routers, found.logits)]


def _bfloat16(golden: Golden) -> list[str]:
    if golden.name not in BF16_VARIANTS:
        return ["", ""]
    found = check_bfloat16(_engine(golden, "bfloat16"), golden)
    return [f"{found.median:.2f}", f"{found.agreement:.1%}"]


def _served(golden: Golden, make: Callable[[Golden], ClusterConfig]) -> list[str]:
    with serving(ThreadCluster(make(golden))) as cluster:
        check_greedy(cluster, golden)
    return ["ok"]


def _engine(golden: Golden, dtype: str) -> LocalEngine:
    return LocalEngine(golden.path, dtype=dtype, max_model_len=MAX_MODEL_LEN)


def run(variants: Sequence[str]) -> tuple[str, list[str]]:
    """The table of some variants, and what failed."""
    head = ["golden", "hidden states", "routers", "logits", "bf16 median", "bf16 agree", *LAYOUTS]
    rows, failures = [], []
    for number, variant in enumerate(variants, start=1):
        start = time.monotonic()
        cells, failed = row_of(variant)
        rows.append(cells)
        failures += failed
        took = time.monotonic() - start
        logger.info("%d/%d %s %.1f s, %d failed", number, len(variants), variant, took, len(failed))
    return table(head, rows), failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when nothing fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("--only", default="", help="beginning of the variants' names")
    parser.add_argument("--out", type=Path, help="file for the table, by default stdout")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    text, failures = run([v for v in ALL_VARIANTS if v.startswith(options.only)])
    if options.out is None:
        sys.stdout.write(text + "\n")
    else:
        options.out.write_text(text + "\n")
    for failure in failures:
        sys.stdout.write(failure + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
