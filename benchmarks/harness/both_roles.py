"""A local engine that sends rows to its experts as to the experts of another worker.

One colocated worker without another: rows are posted, received, checked and summed by the code of
attention and expert workers, and never leave the process. What the exchange costs beside the
transport is the difference to ``LocalDispatcher``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NoReturn

from torch import Tensor

from benchmarks.harness.local_engine import LocalEngine
from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.core.topology import Generation, Member
from workers.cuda.step_graph import StepGraph
from workers.dispatch.colocated import ColocatedDispatcher, LoopbackTransport
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.remote import RemoteDispatcher
from workers.model.config import BankSpec
from workers.requests.step_header import StepHeader
from workers.transport.transport import CapturedMessages, ExpectedMessage, RowMessage, Tag


class Alone:
    """``DataTransport`` of a worker without peers, which sends nothing."""

    sums_are_rounded = False
    captured_state: Hashable = None

    def begin_step(self, header: StepHeader) -> None:
        """Do nothing."""

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """See ``DataTransport``."""
        raise AssertionError(f"{tag} is for another worker")

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        """See ``DataTransport``."""
        raise AssertionError(f"{tag} is from another worker")

    def finish_step(self) -> None:
        """Return at once, as nothing is sent."""

    def finish_later(self) -> Callable[[], None]:
        """Return a function that does nothing, as nothing is sent."""
        return lambda: None

    def confirm_step(self) -> None:
        """Do nothing."""

    def await_confirmation(self) -> None:
        """Do nothing."""

    def capture(self, graph: StepGraph) -> CapturedMessages | None:
        """Return None, as nothing is sent."""
        return None

    def direct(self, ranks: Sequence[int]) -> None:
        """Do nothing, as there are no edges."""

    def reject(self, rank: int, reason: str) -> NoReturn:
        """See ``DataTransport``."""
        raise AssertionError(reason)

    def apply_generation(self, generation: Generation) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def take_both_roles(engine: LocalEngine) -> ColocatedDispatcher:
    """Make the engine exchange rows with its own experts; expert e stays in slot e."""
    place, banks = engine.slots.banks[0].device, engine.banks
    transport = LoopbackTransport(Alone(), rank=0)
    dispatcher = ColocatedDispatcher(
        transport,
        RemoteDispatcher(
            transport, banks, rank=0, combine_mode="sum", dtype=engine.dtype, device=place
        ),
        ExpertServer(
            transport,
            engine.slots.banks,
            banks,
            device_index=0,
            combine_mode="sum",
            dtype=engine.dtype,
            device=place,
        ),
    )
    dispatcher.set_placement(whole_placement(banks), generation_of(1))
    engine.engine.set_dispatcher(dispatcher)
    return dispatcher


def whole_placement(banks: Sequence[BankSpec]) -> ExpertPlacement:
    """Placement of all experts on device 0, expert e in slot e."""
    maps = [
        BankPlacement.from_maps(
            bank=bank.bank,
            layer=bank.layer,
            num_experts=bank.num_experts,
            physical_to_logical=[list(range(bank.num_experts))],
        )
        for bank in banks
    ]
    return ExpertPlacement(epoch=1, banks=tuple(maps))


def generation_of(num_workers: int) -> Generation:
    """Generation 1 with a number of colocated workers."""
    members = [
        Member(name=f"colocated-{rank}", role="colocated", rank=rank, device=rank)
        for rank in range(num_workers)
    ]
    return Generation(number=1, members=tuple(members))
