"""A session of several turns through a gateway, and who has its KV blocks."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.cluster_gateway import Answer, ClusterGateway, Streams, gateway_of
from benchmarks.harness.serving_cluster import ServingCluster, ThreadCluster, serving
from benchmarks.harness.stalls import wait_until
from gateway.core.call import CallKind, GenerateCall
from tests.harness.fault_rows import quiet_config, with_model
from workers.requests.block_hash import prompt_hashes
from workers.requests.request import Request, SamplingParams

BLOCK = 16
RESTORED = 'kv_restore_tokens_total{tier="host"}'
"""Tokens that a worker did not compute, as their blocks were in its host memory."""
NUM_NEW = 60
"""Tokens that the user says in each turn."""
LONG = 200
"""Tokens of an answer that is still under way when a test has seen a few of them."""
CALL = GenerateCall(
    kind=CallKind.COMPLETION,
    temperature=1.0,
    logprobs=2,
    ignore_eos=True,
    return_token_ids=True,
)


class Conversation:
    """Every prompt is all that was said before, and something new."""

    def __init__(self, gateway: ClusterGateway, name: str = "s") -> None:
        self.said: list[int] = []
        """All tokens so far."""
        self._gateway = gateway
        self._fields = replace(CALL, session_id=name)
        self._draw = random.Random(name)
        self._num_turns = 0

    @property
    def num_computed(self) -> int:
        """Tokens of full blocks with keys and values: of all but the newest token."""
        return max(len(self.said) - 1, 0) // BLOCK * BLOCK

    def begin(self, num_tokens: int = 40) -> Streams:
        """Begin the next turn, whose answer has so many tokens."""
        self._num_turns += 1
        self.said += [self._draw.randrange(4, 1000) for _ in range(NUM_NEW)]
        prompt, seed = tuple(self.said), self._num_turns
        call = replace(self._fields, prompts=(prompt,), seed=seed, max_tokens=num_tokens)
        name = f"{self._fields.session_id}-{self._num_turns}"
        return self._gateway.stream([call], name)

    def end(self, streams: Streams) -> Answer:
        """Wait for the end of a turn."""
        (answer,) = streams.finish()
        self.said += [token.token_id for token in answer.tokens]
        return answer

    def turn(self, num_tokens: int = 40) -> Answer:
        """The next turn, from its beginning to its end."""
        return self.end(self.begin(num_tokens))

    def home(self) -> str:
        """The worker of the turn that is under way."""

        async def find() -> str:
            clients = self._gateway.engines.clients
            (name,) = (client.worker for client in clients if client.submissions)
            return name

        return self._gateway.run(find())

    def holders(self) -> set[str]:
        """Workers from which the session could go on without computing it again."""
        tokens = tuple(self.said[: self.num_computed])
        request = Request(request_id="", prompt=tokens, params=SamplingParams())
        names = prompt_hashes(request, BLOCK, None)

        async def find() -> set[str]:
            known = self._gateway.engines.kv.matches(names)
            return {worker for worker, count in known.items() if count == len(names)}

        return self._gateway.run(find())

    def wait_workers(self, count: int) -> None:
        """Wait until the gateway has streams to so many workers."""

        async def find() -> int:
            return len(self._gateway.engines.clients)

        wait_until(lambda: self._gateway.run(find()) == count, f"{count} workers")

    def wait_copies(self) -> set[str]:
        """Wait until two workers have all blocks; their names."""
        wait_until(lambda: len(self.holders()) > 1, "a copy of the session")
        return self.holders()


def undisturbed(*num_tokens: int, model: Path | None = None) -> list[Answer]:
    """The answers of these lengths where nothing happens; of the bundled model unless given."""
    config = quiet_config(1, 1)
    cluster = ThreadCluster(config if model is None else with_model(config, model))
    with serving(cluster), gateway_of(cluster) as gateway:
        talk = Conversation(gateway)
        return [talk.turn(count) for count in num_tokens]


def wait_lost(cluster: ServingCluster, name: str) -> None:
    """Wait until the controller takes a worker for lost."""
    cluster.wait(lambda s: any(w["name"] == name and w["state"] == "LOST" for w in s["workers"]))


def total(cluster: ServingCluster, name: str) -> float:
    """The sum of a number of all workers that serve."""
    found = cluster.snapshot(fresh=True)["workers"]
    return sum(float(w["stats"].get(name, 0.0)) for w in found if w["state"] == "SERVING")
