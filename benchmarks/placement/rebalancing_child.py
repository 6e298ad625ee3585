"""One paced cluster under a load that shifts between domains; started by ``rebalancing.py``.

python -m benchmarks.placement.rebalancing_child, with the job as JSON on stdin: ``checkpoint``,
``sections`` of the configuration, ``phases`` as ``[domain, seconds]``, ``streams``,
``prompt_tokens``, ``new_tokens``, ``tokens_a_domain``, ``time_taken`` (``slot_s``, ``token_s``) by
experts. The answer is JSON on stdout: ``tokens`` as ``[seconds, inter-token latency or null]``,
``marks`` (when phases began), ``events`` (what ``status`` said of rebalancing, whenever it
changed), and ``load`` (of the experts, as ``load --json`` has it).
"""

from __future__ import annotations

import json
import os
import queue
import random
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.harness.ray_serving import (
    FOLDER_VARIABLE,
    Received,
    Stream,
    controlled,
    engine_addresses,
)
from benchmarks.placement.paced import ComputeTime, paced_worker
from cluster.core.topology import Role
from cluster.launch.local_ray import PrivateRay
from workers.process.worker.actor import WorkerActor
from workers.requests.request import Request, SamplingParams, StepOutput

_POLL_S = 0.1
_ANSWER_LIMIT_S = 120.0


class Watch:
    """Records the controller's rebalance state whenever it changes."""

    def __init__(self, controller: Any, began: float) -> None:
        self.events: list[dict[str, Any]] = []
        self._controller = controller
        self._began = began
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._ends.set()
        self._thread.join(_ANSWER_LIMIT_S)

    def _run(self) -> None:
        import ray

        while not self._ends.wait(_POLL_S):
            snapshot = ray.get(self._controller.snapshot.remote())
            state = {
                "epoch": snapshot["placement_epoch"],
                "phase": snapshot["rebalance"]["phase"],
                "moves": bool(snapshot["rebalance"]["loading"]),
                "last": snapshot["rebalance"]["last"],
            }
            if not self.events or {**self.events[-1], "at": 0} != {**state, "at": 0}:
                self.events.append({**state, "at": perf_counter() - self._began})


class ClosedLoop:
    """Runs a fixed number of requests at a time; a new one starts when one ends."""

    def __init__(self, address: str, job: Mapping[str, Any], began: float) -> None:
        self._job = job
        self._began = began
        self._received: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self._stream = Stream(address, self._received)
        self._rng = random.Random(1)
        self._count = 0
        self._running: dict[str, float | None] = {}
        self.tokens: list[tuple[float, float | None]] = []

    def run(self, domain: int, seconds: float) -> None:
        """Start new requests in ``domain``; running ones keep theirs. Raises ``RuntimeError``."""
        until = perf_counter() + seconds
        while perf_counter() < until:
            while len(self._running) < self._job["streams"]:
                self._begin(domain)
            received = self._received.get(timeout=_ANSWER_LIMIT_S)
            if received.message is None:
                raise RuntimeError("the engine stream ended")
            if not isinstance(received.message, StepOutput):
                continue
            for output in received.message.outputs:
                if output.error:
                    raise RuntimeError(output.error)
                self._note(output.request_id, received.at, len(output.token_ids))
                if output.finish_reason is not None:
                    del self._running[output.request_id]

    def close(self) -> None:
        """End the stream."""
        self._stream.close()

    def _begin(self, domain: int) -> None:
        first = domain * self._job["tokens_a_domain"]
        size = range(first, first + self._job["tokens_a_domain"])
        prompt = tuple(self._rng.choices(size, k=self._job["prompt_tokens"]))
        params = SamplingParams(
            max_tokens=self._job["new_tokens"], temperature=1.0, seed=self._count, ignore_eos=True
        )
        name = str(self._count)
        self._count += 1
        self._running[name] = None
        request = Request(request_id=name, prompt=prompt, params=params)
        self._stream.outgoing.put(request)

    def _note(self, name: str, at: float, num_tokens: int) -> None:
        before = self._running[name]
        for _ in range(num_tokens):
            self.tokens.append((at - self._began, None if before is None else at - before))
        self._running[name] = at


def main() -> None:
    """Run the job."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries write to stdout must not end up in the answer
    job = json.loads(sys.stdin.readline())
    import ray

    private = PrivateRay(folder=Path(os.environ[FOLDER_VARIABLE]))
    private.start(num_cpus=2, num_gpus=0)
    try:
        classes: dict[Role, type[WorkerActor]] = {
            "expert": paced_worker(ComputeTime(**job["time_taken"]))
        }
        with controlled(Path(job["checkpoint"]), job["sections"], classes) as controller:
            (address,) = engine_addresses(controller)
            began = perf_counter()
            watch, loop = Watch(controller, began), ClosedLoop(address, job, began)
            marks = []
            for domain, seconds in job["phases"]:
                marks.append(perf_counter() - began)
                loop.run(domain, seconds)
            watch.stop()
            loop.close()
            found = {
                "tokens": loop.tokens,
                "marks": marks,
                "events": watch.events,
                "load": ray.get(controller.load.remote(), timeout=_ANSWER_LIMIT_S),
            }
    finally:
        private.stop()
    json.dump(found, answers)
    answers.flush()


if __name__ == "__main__":
    main()
