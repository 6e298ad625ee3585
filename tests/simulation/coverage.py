"""How often what a scenario may have did occur."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.simulation.features import USES

if TYPE_CHECKING:
    from tests.simulation.world import World

_METRICS = {
    "tokens restored": "kv_restore_tokens_total",
    "tokens restored from disk": 'kv_restore_tokens_total{tier="disk"}',
    "accepted drafts": "spec_decode_num_accepted_tokens_total",
    "copies of sessions": 'session_copies_total{outcome="whole"',
}
"""What workers count, by the beginning of its name."""
_DECODED = "tokens of decode groups"
_FAILED = "failed calls of workers' disks"
OCCURRENCES = (
    *USES,
    *_METRICS,
    "restarted gateways",
    "stored objects",
    "objects read",
    _DECODED,
    _FAILED,
    "steps ahead",
    "lost steps ahead",
)
"""What a few seeds together must have, by its name in the summary."""


def requests_by_feature(world: World) -> Counter[str]:
    """By feature of the scenario, the requests that use it and that the client has whole."""
    found = Counter(dict.fromkeys(world.scenario.features & USES.keys(), 0))
    for name in found:
        found[name] += sum(USES[name](o.ask) and o.is_right for o in world.clients.outcomes)
    return found


def occurrences(world: World) -> Counter[str]:
    """The same, and what the workers that live in the end have done."""
    found = requests_by_feature(world)
    found["restarted gateways"] += world.num_restarts
    found.update(world.faults.hand_overs.done)
    if world.state is not None:
        found["stored objects"] += world.clients.state.num_stored
        found["objects read"] += world.clients.state.num_read
        found["failed calls of their disk"] += world.state.num_failed
    if world.kv_disk is not None:
        found["calls of workers' disks"] += world.kv_disk.num_calls
        found[_FAILED] += world.kv_disk.num_failed
        found["wrong bytes of workers' disks"] += world.kv_disk.num_rotten
    for worker in world.ray.actors.workers.values():
        if (role := worker.worker.roles.attention) is not None:
            runner: Any = role.engine.runner
            found["steps ahead"] += runner.num_ahead
            found["lost steps ahead"] += runner.num_lost
            if worker.worker.member.group == "decode":  # their prompts were computed elsewhere
                found[_DECODED] += int(role.stats()["generation_tokens_total"])
            for name, value in role.stats().items():
                for what, begin in _METRICS.items():
                    found[what] += int(value) if name.startswith(begin) else 0
    return found
