"""An attention rank and expert ranks of one process, which take turns: no thread, no socket.

Each expert rank is a greenlet that serves a step; who waits for a message lets the others run. So
all of them can be on a pretended GPU, whose log is that of one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from benchmarks.harness.both_roles import Alone
from benchmarks.harness.local_engine import LocalEngine
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.core.topology import Generation, Member
from tests.harness.pretend_gpu import DEVICE
from workers.cuda.step_graph import StepGraph
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.remote import RemoteDispatcher
from workers.model.config import BankSpec
from workers.requests.step_header import StepHeader
from workers.transport.transport import ExpectedMessage, RowMessage, Tag, empty_messages

MAX_KEPT_ROWS = 1000
Key = tuple[str, int, Tag]
"""The direction, the expert rank at one end, and the place in the step."""


class Turns:
    """Who runs next, and the messages under way."""

    def __init__(self) -> None:
        self.messages: dict[Key, tuple[Tensor, ...]] = {}
        self._waiting: deque[greenlet] = deque()

    def start(self, serve: greenlet) -> None:
        self._waiting.append(serve)

    def pass_on(self) -> None:
        """Let another run."""
        self._waiting.append(getcurrent())
        while (other := self._waiting.popleft()).dead:
            assert self._waiting, "all the others have ended"
        if other is not getcurrent():
            other.switch()

    def finish(self) -> None:
        """Run all the others to their end; they must not wait for this one."""
        while self._waiting:
            serve = self._waiting.popleft()
            if not serve.dead:
                serve.switch()


class TurnTransport(Alone):
    """``DataTransport`` of one rank; ``own``: the expert rank, None at the attention rank.

    ``is_captured``: on a pretended GPU, messages are part of captured steps.
    """

    def __init__(self, turns: Turns, own: int | None, is_captured: bool = False) -> None:
        self._turns = turns
        self._own = own
        self._is_captured = is_captured
        self.captured_state = 1 if is_captured else None

    def capture(self, graph: StepGraph) -> CapturedTurns | None:
        """See ``DataTransport``."""
        return CapturedTurns(self) if self._is_captured else None

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """See ``DataTransport``."""
        for message in messages:
            parts = tuple(part.clone() for part in message.parts)
            self._turns.messages[self._key(tag, message.rank)] = parts

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        """See ``DataTransport``."""
        keys = [self._key(tag, item.rank) for item in expected]
        while not all(key in self._turns.messages for key in keys):
            self._turns.pass_on()
        found = [self._turns.messages.pop(key) for key in keys]
        for item, parts in zip(expected, found, strict=True):
            counts = tuple(len(part) for part in parts)
            assert sized or counts == item.counts, f"{counts} rows, expected are {item.counts}"
        return found

    def _key(self, tag: Tag, rank: int) -> Key:
        return tag.direction, rank if self._own is None else self._own, tag


class CapturedTurns:
    """``CapturedMessages`` of one rank on a pretended GPU."""

    def __init__(self, transport: TurnTransport) -> None:
        self._transport = transport

    def post(self, tag: Tag, messages: Sequence[RowMessage]) -> None:
        """See ``CapturedMessages``."""
        mode = messages[0].parts[0].maker  # type: ignore[attr-defined]
        mode.launched("send", lambda: self._transport.post(tag, messages, sized=False))

    def receive(self, tag: Tag, expected: Sequence[ExpectedMessage]) -> list[tuple[Tensor, ...]]:
        """See ``CapturedMessages``."""
        places = empty_messages(expected, torch.device(DEVICE))

        def again() -> None:
            found = self._transport.receive(tag, expected, sized=False, must_wait=False)
            for place, parts in zip(places, found, strict=True):
                for tensor, part in zip(place, parts, strict=True):
                    tensor.copy_(part)

        places[0][0].maker.launched("receive", again)  # type: ignore[attr-defined]
        return places


class ExpertsApart:
    """The experts of a local engine on so many expert ranks: expert e on rank e % ranks."""

    def __init__(self, engine: LocalEngine, num_ranks: int, *, is_captured: bool = False) -> None:
        self.turns = Turns()
        self.engine = engine
        place, banks = engine.slots.banks[0].device, engine.banks
        self.servers = [
            ExpertServer(
                TurnTransport(self.turns, rank, is_captured),
                engine.slots.banks,
                banks,
                device_index=rank,
                combine_mode="sum",
                dtype=engine.dtype,
                device=place,
                max_kept_rows=MAX_KEPT_ROWS,
            )
            for rank in range(num_ranks)
        ]
        self.home = RemoteDispatcher(
            TurnTransport(self.turns, None, is_captured),
            banks,
            rank=0,
            combine_mode="sum",
            dtype=engine.dtype,
            device=place,
        )
        self.place(0, epoch=1)
        engine.engine.set_dispatcher(self.home)

    def place(self, turn: int, epoch: int) -> None:
        """Expert e is on rank (e + ``turn``) % ranks, in slot e."""
        ranks = range(len(self.servers))
        placement = _spread(self.engine.banks, len(ranks), turn, epoch)
        members = [Member(name="attention-0", role="attention", rank=0, device=-1)]
        members += [Member(name=f"expert-{r}", role="expert", rank=r, device=r) for r in ranks]
        generation = Generation(number=1, members=tuple(members))
        self.home.set_placement(placement, generation)
        for server in self.servers:
            server.set_placement(placement, generation)

    @contextmanager
    def serving(self, header: StepHeader) -> Iterator[None]:
        """Serve the step that runs within."""
        for server in self.servers:
            self.turns.start(greenlet(lambda own=server: own.run_step(header)))
        yield
        self.turns.finish()


def _spread(banks: Sequence[BankSpec], num_ranks: int, turn: int, epoch: int) -> ExpertPlacement:
    maps = [
        BankPlacement.from_maps(
            bank=bank.bank,
            layer=bank.layer,
            num_experts=bank.num_experts,
            physical_to_logical=[
                [
                    e if (e + turn) % num_ranks == rank else FREE_SLOT
                    for e in range(bank.num_experts)
                ]
                for rank in range(num_ranks)
            ],
        )
        for bank in banks
    ]
    return ExpertPlacement(epoch=epoch, banks=tuple(maps))
