"""Worker actors that only talk to the controller, for tests of placing, starting and ending."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from benchmarks.harness.members import member_of
from cluster.core.codec import from_plain
from cluster.core.frames import (
    ControlFrame,
    GenerationReady,
    Heartbeat,
    NewGeneration,
    Register,
    RunGeneration,
    StatusReply,
    WorkerFailed,
    WorkerReady,
    WorkerReport,
)
from cluster.core.topology import Member
from tests.cluster.controller.fakes_cluster import slots_of
from workers.process.control.control_client import ControlClient


class TrivialWorker:
    """Registers, is ready at once, takes part in every generation."""

    def __init__(
        self,
        config: dict[str, Any],
        member: dict[str, Any],
        control_address: str,
        extra: dict[str, Any],
    ) -> None:
        self.name = str(member["name"])
        self.threads = int(extra["threads"])
        self._member = dict(member)
        self._config = dict(config)
        self._order: NewGeneration | None = None
        self._runs = False
        self._generation = 0
        self._client = ControlClient(
            control_address,
            str(config["cluster_token"]),
            self.name,
            self._on_frame,
            heartbeat=self._heartbeat,
            status=lambda: StatusReply(token=0, stats={"threads": float(self.threads)}),
            worker_report=self._worker_report,
        )

    def start(self) -> None:
        self._client.start()
        self._client.send(Register(member=from_plain(self._member | {"pid": os.getpid()}, Member)))
        self._client.send(WorkerReady())

    def describe(self) -> dict[str, Any]:
        return {"config": self._config, "num_slots": 0, "has_called": True}

    def redirect(self, control_address: str, term: int, controller: str) -> None:
        self._client.check_term(term, controller)
        self._client.redirect(control_address)

    def ping(self) -> str:
        return self.name

    def stop(self, term: int, controller: str) -> None:
        self._client.check_term(term, controller)
        self._client.close()

    def _heartbeat(self) -> Heartbeat:
        epoch = self._order.placement.epoch if self._order is not None else 0
        return Heartbeat(
            progress=0,
            idle=True,
            generation=self._generation,
            running=self._runs,
            epoch=epoch,
        )

    def _worker_report(self) -> list[ControlFrame]:
        order = self._order
        return [
            WorkerReport(
                generation=order.generation if order is not None else None,
                placement=order.placement if order is not None else None,
                running=self._runs,
                highest_step=0,
                highest_epoch=1,
                slots=slots_of(order, self.name) if order is not None else (),
            )
        ]

    def _on_frame(self, frame: ControlFrame) -> None:
        if isinstance(frame, RunGeneration):
            self._runs = True
        if isinstance(frame, NewGeneration):
            self._order, self._runs = frame, False
            self._generation = frame.generation.number
            self._client.send(
                GenerationReady(
                    generation=self._generation,
                    highest_step=0,
                    highest_epoch=1,
                    slots=slots_of(frame, self.name),
                )
            )


class BrokenWorker(TrivialWorker):
    """Its constructor fails."""

    def __init__(self, *args: Any) -> None:
        raise ValueError("the shape of lm_head is wrong")


class HangingWorker(TrivialWorker):
    """The constructor of a new worker in the place of a lost one does not return."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if "." in self.name:
            threading.Event().wait()


class BrokenStartWorker(TrivialWorker):
    """Its start fails."""

    def start(self) -> None:
        raise OSError("no free port")


class FailingWorker(TrivialWorker):
    """Tells the controller that it failed, while it loads."""

    def start(self) -> None:
        self._client.start()
        self._client.send(Register(member=member_of(self.name, pid=os.getpid())))
        self._client.send(WorkerFailed(reason="layer 3 is missing"))


class DyingWorker(TrivialWorker):
    """Its process dies before it has called the controller."""

    def start(self) -> None:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()


class SilentWorker(TrivialWorker):
    """Cannot call the controller, and says why when it is asked."""

    def start(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "has_called": False}

    def ping(self) -> str:
        raise RuntimeError("the checkpoint has no config.json")


class StubbornWorker(TrivialWorker):
    """Ignores the order to stop."""

    def stop(self, term: int, controller: str) -> None:
        time.sleep(60)
