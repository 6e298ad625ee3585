"""The way of a lost expert worker through the controller: few modules, and in one direction."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from cluster.controller.effects import Effect, EndWorkers, SendFrame
from cluster.core.frames import ControllerSnapshot, LoadExperts, NewGeneration, Shutdown
from tests.cluster.controller.fakes_cluster import FakeCluster

DECIDING = ("cluster.controller", "cluster.policy", "cluster.load")
"""Below them are ``cluster.core``, whose values they share, and above them the actor."""
MOST_MODULES = 11


def calls_of(act: Callable[[], None]) -> set[tuple[str, str]]:
    """(caller, callee), both modules, of all calls while ``act`` runs."""
    found = set()

    def on_event(frame: FrameType, event: str, arg: object) -> None:
        callee = str(frame.f_globals.get("__name__"))
        is_code = frame.f_code.co_filename != "<string>"  # as the constructors of plain values are
        if event == "call" and is_code and callee.startswith(DECIDING):
            caller = frame.f_back.f_globals.get("__name__") if frame.f_back else ""
            found.add((str(caller), callee))

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        act()
    finally:
        sys.setprofile(before)
    return found


def test_a_lost_expert_worker_crosses_few_modules_in_one_direction() -> None:
    cluster = FakeCluster(2, 3)
    cluster.serve()
    cluster.link.sent.clear()
    effects: list[Effect] = []

    def lose() -> None:
        cluster.disconnect("expert-1")
        effects.extend(cluster.known.take_effects())

    calls = {(a, b) for a, b in calls_of(lose) if a != b and a.startswith(DECIDING)}
    assert len({module for call in calls for module in call}) <= MOST_MODULES
    assert not {(a, b) for a, b in calls if (b, a) in calls}, "no module calls its caller"
    kinds = [type(e.frame) if isinstance(e, SendFrame) else type(e) for e in effects]
    loads = [LoadExperts] * 2
    assert kinds == [ControllerSnapshot, Shutdown, NewGeneration, *loads, EndWorkers]
