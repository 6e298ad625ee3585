"""A session of several turns through a gateway, and who has its KV blocks."""

from __future__ import annotations

import random
from dataclasses import replace

from gateway.core.call import CallKind, GenerateFields
from tests.harness.cluster_gateway import Answer, ClusterGateway, Streams
from tests.harness.stalls import wait_until
from workers.requests.block_hash import prompt_hashes
from workers.requests.request import Request, SamplingParams

BLOCK = 16
CALL = GenerateFields(
    kind=CallKind.COMPLETION,
    temperature=1.0,
    logprobs=2,
    ignore_eos=True,
    return_token_ids=True,
)


class Conversation:
    """Every prompt is all that was said before, and something new.

    ``num_tokens`` is the length of each answer.
    """

    def __init__(self, gateway: ClusterGateway, name: str = "s", num_tokens: int = 40) -> None:
        self.said: list[int] = []
        """All tokens so far."""
        self._gateway = gateway
        self._fields = replace(CALL, session_id=name, max_tokens=num_tokens)
        self._draw = random.Random(name)
        self._num_turns = 0

    @property
    def num_computed(self) -> int:
        """Tokens of full blocks with keys and values: of all but the newest token."""
        return max(len(self.said) - 1, 0) // BLOCK * BLOCK

    def begin(self, num_new: int = 60) -> Streams:
        """Begin the next turn, with so many new tokens of the user."""
        self._num_turns += 1
        self.said += [self._draw.randrange(4, 1000) for _ in range(num_new)]
        prompt, seed = tuple(self.said), self._num_turns
        call = replace(self._fields, prompts=(prompt,), seed=seed)
        name = f"{self._fields.session_id}-{self._num_turns}"
        return self._gateway.stream([call], name)

    def end(self, streams: Streams) -> Answer:
        """Wait for the end of a turn."""
        (answer,) = streams.finish()
        self.said += [token.token_id for token in answer.tokens]
        return answer

    def turn(self) -> Answer:
        """The next turn, from its beginning to its end."""
        return self.end(self.begin())

    def home(self) -> str:
        """The worker of the turn that is under way."""

        async def find() -> str:
            clients = self._gateway.engines.clients
            (name,) = (client.worker for client in clients if client.num_requests)
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
