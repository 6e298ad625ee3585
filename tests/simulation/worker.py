"""Worker processes: the product's workers, with the toy model behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cluster.core.topology import Member
from cluster.sizing.start_plan import WorkerArguments
from tests.simulation.kernel import Kernel, Process
from tests.simulation.network import network
from tests.simulation.toy_model import ToyBank, banks
from workers.experts.slots import ExpertSlots
from workers.model.side_stream import SideStream
from workers.process.context import WorkerContext
from workers.process.worker.worker import Worker
from workers.process.worker_args import WorkerArgs


class ToySlots(ExpertSlots):
    """Slots of numbers, which report a write to a slot that a step may read."""

    def __init__(self, context: WorkerContext) -> None:
        self._worker = context
        num_slots = context.args.num_slots
        made: Any = tuple(ToyBank(spec, num_slots, self._written) for spec in banks())
        self.banks = made
        self._contents = [{} for _ in made]
        self._team = None
        self._device = torch.device("cpu")
        self._side = SideStream(self._device)

    def _written(self, bank: int, slot: int) -> None:
        """A matrix is stored in a slot, or a slot is given back."""
        membership, kernel = self._worker.membership, Kernel.current
        if kernel is not None and not kernel.is_over:
            kernel.num_writes[self._worker.member.name] += 1
        if not membership.is_running or kernel is None or kernel.is_over:
            return
        slots = membership.epochs.current.banks[bank].physical_to_logical
        device = self._worker.member.device
        if slot < len(slots[device]) and slots[device][slot] >= 0:
            kernel.failures.append(
                f"{self._worker.member.name} writes slot {slot} of bank {bank}, which is in force"
            )


class SimWorker:
    """A Ray actor that hosts a worker: its process and the worker."""

    def __init__(
        self, kernel: Kernel, host: str, pid: int, member: Member, arguments: WorkerArguments
    ) -> None:
        self.name = member.name
        self.process = Process(kernel, member.name, host, pid)
        self.args = WorkerArgs.from_plain(*arguments, host)
        before, kernel.process = kernel.process, self.process
        self.worker = Worker(self._args_here(), self._die)
        kernel.process = before
        if kernel.kv_disk is not None:
            self.process.on_death.append(partial(kernel.kv_disk.close_of, self.process))

    @property
    def is_dead(self) -> bool:
        return self.process.is_dead

    def call(self, method: str, *args: Any) -> Any:
        """A method of the actor, run in its process."""
        kernel = self.process.kernel
        before, kernel.process = kernel.process, self.process
        try:
            if method == "describe":
                return self.args
            if method == "stop":
                self.worker.control.check_term(*args)
                return self.worker.stop()
            if method == "redirect":
                return self.worker.control.redirect(*args)
            return getattr(self.worker, method)(*args)
        finally:
            kernel.process = before

    def _args_here(self) -> WorkerArgs:
        """The same path is another folder on each host."""
        tiers = self.args.config.kv_tiers
        if tiers.kv_disk_dir is None:
            return self.args
        tiers = replace(tiers, kv_disk_dir=f"{tiers.kv_disk_dir}/{self.process.host}")
        return replace(self.args, config=replace(self.args.config, kv_tiers=tiers))

    def _die(self, reason: str) -> None:
        """The worker ends itself."""
        kernel = self.process.kernel
        if (
            self.worker.control.has_connected
        ):  # one that finds no controller at its start ends again
            kernel.deaths[self.name] = reason
        self.process.kill(f"its own end: {reason}")
        kernel.this_fiber().park()


class ToyModel:
    """What the engine asks of a model."""

    dtype = torch.float32
    device = torch.device("cpu")

    def head(self, hidden: object) -> Any:
        raise AssertionError("the toy draws from states")


def listening_hosts() -> Iterator[str]:
    """Hosts with a listener, for tests."""
    for address in network().listeners:
        yield address.rpartition(":")[0]
