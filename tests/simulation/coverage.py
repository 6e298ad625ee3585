"""How often what a scenario may have did occur."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.outcomes import Outcome
    from tests.simulation.world import World

_REQUESTS: dict[str, Callable[[Outcome], bool]] = {
    "choices": lambda outcome: outcome.ask.num_choices > 1,
}
"""By feature, whether a request uses it."""


def occurrences(world: World) -> Counter[str]:
    """By feature of the scenario, the requests that use it and that the client has whole."""
    found = Counter(dict.fromkeys(world.scenario.features & _REQUESTS.keys(), 0))
    for name in found:
        found[name] += sum(_REQUESTS[name](o) and o.is_right for o in world.outcomes)
    return found
