"""Divides a step's outputs into messages to gateways. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from workers.requests.request import StepOutput, TokenOutput


def step_messages(
    outputs: Iterable[TokenOutput], owners: Mapping[str, str]
) -> Iterator[tuple[str, StepOutput]]:
    """Yield (gateway, message) pairs, in the order of the outputs for each gateway.

    ``owners``: gateway by request id; outputs of other requests are dropped. An output with arrays
    is a message of its own, and so are the outputs of each beam search, as either may be close to
    the size limit of a message.
    """
    by_gateway: defaultdict[str, list[TokenOutput]] = defaultdict(list)
    for output in outputs:
        owner = owners.get(output.request_id)
        if owner is not None:
            by_gateway[owner].append(output)
    for gateway, own in by_gateway.items():
        small = tuple(o for o in own if not o.arrays and o.score is None)
        if small:
            yield gateway, StepOutput(outputs=small)
        searches: defaultdict[str, list[TokenOutput]] = defaultdict(list)
        for output in own:
            if output.arrays:
                yield gateway, StepOutput(outputs=(output,))
            elif output.score is not None:
                searches[output.request_id].append(output)
        for beams in searches.values():
            yield gateway, StepOutput(outputs=tuple(beams))
