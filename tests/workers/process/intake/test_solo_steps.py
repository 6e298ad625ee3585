"""Stages of solo steps go to the gateway of the request, and come back from it alone."""

from __future__ import annotations

from typing import cast

from workers.engine.engine import Engine
from workers.process.intake.solo_steps import SoloStepReporter
from workers.requests.request import Queued, SoloStage, SoloStep


class ListEngine:
    """Has messages for gateways, and records acknowledgements and disconnections.

    Its requests and their isolation are the object itself.
    """

    def __init__(self) -> None:
        self.messages: list[SoloStep | Queued] = []
        self.acknowledged: list[SoloStep] = []
        self.num_ended = 0
        self.requests = self.isolation = self

    def take_solo_steps(self) -> list[SoloStep | Queued]:
        messages, self.messages = self.messages, []
        return messages

    def acknowledge(self, solo_step: SoloStep) -> None:
        self.acknowledged.append(solo_step)

    def drop_solo_step(self) -> None:
        self.num_ended += 1


def step(stage: SoloStage) -> SoloStep:
    return SoloStep(request_id="r", attempt=0, stage=stage)


def test_a_gateway_learns_of_the_end_of_a_request_that_has_ended() -> None:
    engine, sent = ListEngine(), []
    reporter = SoloStepReporter(
        cast("Engine", engine), lambda gateway, message: sent.append((gateway, message))
    )
    engine.messages = [step(SoloStage.OFFERED)]
    reporter.report({"r": "one"})
    engine.messages = [step(SoloStage.OVER)]
    reporter.report({})
    assert sent == [("one", step(SoloStage.OFFERED)), ("one", step(SoloStage.OVER))]
    reporter.acknowledge("another", step(SoloStage.OVER))
    reporter.acknowledge("one", step(SoloStage.OVER))
    assert engine.acknowledged == [step(SoloStage.OVER)]
    reporter.drop_gateway("another")
    assert engine.num_ended == 0
    reporter.drop_gateway("one")
    assert engine.num_ended == 1
