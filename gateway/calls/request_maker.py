"""Makes the engine requests of a call, one for each prompt."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from msgspec.structs import replace

from gateway.auth.key_limits import KeyUsage
from gateway.calls.prompts import PromptMaker
from gateway.calls.validate import make_requests
from gateway.core.call import GenerateCall
from gateway.core.model import ModelFacts
from gateway.offload.long_work import LongWork
from workers.requests.request import Request

MakeRequests: TypeAlias = Callable[
    [ModelFacts, PromptMaker], Awaitable[tuple[GenerateCall, Sequence[Request]]]
]
"""Function that validates a call against the model that serves it, and has prompts tokenized by the
model's ``PromptMaker``. Returns the call with the rules for its
output, and one request per prompt."""


class RequestMaker:
    """Makes engine requests with the prompts and the sampling parameters of a call.

    Args:
        long_work: runs long functions.
        seed: base seed for calls without a seed; 0 selects random seeds.
        name: name of the replica.
    """

    def __init__(self, long_work: LongWork, seed: int, name: str) -> None:
        self._long_work = long_work
        self._draw_seed = _seed_source(seed, name)

    async def make(
        self, call: GenerateCall, facts: ModelFacts, maker: PromptMaker
    ) -> tuple[GenerateCall, list[Request]]:
        """Validate a call and make its engine requests, one per prompt (see ``MakeRequests``).

        Returns the call with the rules for its output, and the requests. Raises ``RequestError``.
        """
        complete, prompts = await maker.make(call, facts)
        bad_words = await maker.bad_words(complete)
        size = sum(map(len, prompts)) + len(complete.allowed_token_ids or ())
        requests = await self._long_work.run(
            size, make_requests, complete, prompts, facts, self._draw_seed, bad_words
        )
        if complete.stop:
            maker.require_tokenizer("stop")
        if complete.grammar is not None:
            maker.require_tokenizer(complete.grammar.field)
        return complete, requests


def complete_requests(
    call: GenerateCall,
    requests: Sequence[Request],
    call_id: str,
    adapter: str,
    caller: KeyUsage | None,
) -> list[Request]:
    """Return the engine requests of a call with ids (``call_id``-i) and the fields of the call.

    Args:
        call: the checked call.
        requests: one request per prompt.
        call_id: id of the call.
        adapter: key of the requested adapter; empty for the base model.
        caller: key of the caller; None if the port requires no key.
    """
    shared: dict[str, Any] = {
        "n": call.num_sampled,
        "priority": call.priority or 0,
        "cache_salt": call.cache_salt or "",
        "session": call.session,
        "cache_ttl_s": call.cache_ttl,
        "adapter": adapter,
    }
    if caller is not None:
        shared |= {"tenant": caller.entry.tenant, "weight": caller.entry.weight}
        # The salt prevents other tenants from using or detecting cached prefixes.
        shared["cache_salt"] = f"{shared['tenant']}\0{shared['cache_salt']}"
    return [
        replace(request, request_id=f"{call_id}-{index}", **shared)
        for index, request in enumerate(requests)
    ]


def _seed_source(base: int, name: str) -> Callable[[], int]:
    """Return a function that draws sampling seeds: the same ones in each run unless ``base`` is 0.

    Replicas with different names draw different seeds.
    """
    source = random.Random(f"{base}/{name}") if base else random.SystemRandom()
    return lambda: source.getrandbits(63)
