"""The one rank harness: N CPU processes, a time limit, and failures that say which rank.

    run_ranks(3, worker, "tcp")        # worker(rank, size, ports, "tcp") in three processes

``bench dispatch`` needs the same, so it is in the product.
"""

from __future__ import annotations

from cluster.cli.bench.ranks import RankError, free_ports, run_ranks

__all__ = ["RankError", "free_ports", "run_ranks"]
