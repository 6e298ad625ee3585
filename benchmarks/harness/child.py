"""The process of one of the compared systems; started by ``systems.py``.

python -m benchmarks.harness.child NAME CHECKPOINT, where NAME is one of ``SYSTEMS``

Each line on stdin is a batch, ``{"prompts": [[ids]], "new_tokens": N}``; each line on stdout is its
answer, by sequence the seconds from the start to each token. The first answer, ``null``, says that
the model is loaded. The number of threads comes from ``OMP_NUM_THREADS``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[list[float]]]
"""Runs prompts with a number of new tokens; returns seconds to each token of each sequence."""

ROUTED_KV_BYTES = 128 << 20
"""Size of the KV cache of each worker of a routed cluster."""


@contextmanager
def _transformers(checkpoint: Path, dtype: str = "bfloat16") -> Iterator[Generate]:
    """``generate`` of transformers with defaults and greedy sampling."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind = getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=kind).eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: Prompts, new_tokens: int) -> list[list[float]]:
        clock = _Clock()
        ids = torch.tensor(prompts)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
        return [clock.times[1:]] * len(prompts)  # the prompt comes first

    yield generate


class _Clock:
    """A streamer that records only times."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._start = perf_counter()

    def put(self, value: object) -> None:
        """Called with the prompts, then with each step's tokens."""
        self.times.append(perf_counter() - self._start)

    def end(self) -> None:
        """Do nothing."""


@contextmanager
def _local(checkpoint: Path, num_threads: int | None = None, **engine: Any) -> Iterator[Generate]:
    """The engine and all experts in this process; ``engine`` has settings of its section."""
    from benchmarks.harness.local_engine import LocalEngine
    from benchmarks.harness.local_runs import run_batch
    from cluster.config.cluster import EngineSection

    local_engine = LocalEngine(
        checkpoint,
        dtype="bfloat16",
        # prompts come again in a repetition
        section=EngineSection(enable_prefix_caching=False, **engine),
        num_threads=num_threads or int(os.environ["OMP_NUM_THREADS"]),
    )

    yield partial(run_batch, local_engine)


@contextmanager
def _ray(checkpoint: Path, **sections: Mapping[str, Any]) -> Iterator[Generate]:
    """Two workers as Ray actors, by default 1 + 1, used over their engine streams."""
    from benchmarks.harness.ray_serving import EngineClient, serving

    with serving(checkpoint, **sections) as addresses, EngineClient(addresses) as client:
        yield client.generate


@contextmanager
def _routed(checkpoint: Path, policy: str) -> Iterator[Generate]:
    """Two attention workers and an expert worker behind the gateway's pool of streams."""
    from benchmarks.harness.pool_client import PoolClient
    from benchmarks.harness.ray_serving import serving
    from gateway.engines.router import RoutingPolicy

    workers = {"num_attention_workers": 2, "num_expert_workers": 1, "cpus_per_worker": 0.6}
    engine = {"enable_prefix_caching": True, "kv_cache_bytes": ROUTED_KV_BYTES}
    with (
        serving(checkpoint, workers=workers, engine=engine) as addresses,
        PoolClient(addresses, RoutingPolicy(policy)) as client,
    ):
        yield client.generate


SYSTEMS: dict[str, Callable[[Path], AbstractContextManager[Generate]]] = {
    "transformers": _transformers,
    "transformers-float32": partial(_transformers, dtype="float32"),
    "local": _local,
    "local-off": partial(_local, deterministic="off"),
    "local-deterministic": partial(_local, deterministic="on"),
    "ray": _ray,
    "ray-kv": partial(_routed, policy="kv"),
    "ray-round-robin": partial(_routed, policy="round-robin"),
    "ray-off": partial(_ray, engine={"deterministic": "off"}),
    "ray-deterministic": partial(_ray, engine={"deterministic": "on"}),
    "ray-one-micro-batch": partial(_ray, engine={"num_micro_batches": 1, "max_num_seqs": 128}),
    "ray-colocated": partial(_ray, workers={"mode": "colocated", "num_expert_workers": 2}),
    "ray-two-micro-batches": partial(_ray, engine={"num_micro_batches": 2, "max_num_seqs": 128}),
}
"""Name -> system; names that start with ``ray`` are clusters."""


def main(name: str, checkpoint: str) -> None:
    """Serve stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries write to stdout must not end up among the answers
    with SYSTEMS[name](Path(checkpoint)) as generate:
        answers.write("null\n")
        answers.flush()
        for line in sys.stdin:
            batch = json.loads(line)
            answers.write(json.dumps(generate(batch["prompts"], batch["new_tokens"])) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
