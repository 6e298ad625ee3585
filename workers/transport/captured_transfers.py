"""Sends and receives over NCCL that are part of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.cuda.step_graph import StepGraph
from workers.transport.transfer_items import ItemOf, items_to_receive, items_to_send
from workers.transport.transport import (
    Direction,
    ExpectedMessage,
    RowMessage,
    Tag,
    empty_messages,
)
from workers.transport.world import Item, Transfers, World


class CapturedTransfers:
    """``CapturedMessages`` over the process groups of a world.

    NCCL launches its kernels on streams of its own, which the capture must join. It joins a send at
    the next receive of the same micro-batch in the other direction, by when the send has ended: a
    rank returns outputs only of rows that it has received, and sends rows of a layer only after it
    has received the outputs of the layer before. Until then, the memory of the sent tensors is not
    reused.
    """

    def __init__(
        self,
        world: World,
        graph: StepGraph,
        item_of: ItemOf,
        check: Callable[[], None],
        device: torch.device,
    ) -> None:
        """``check`` raises ``PeerLostError`` or ``GenerationChangedError`` if waits must end."""
        self._world = world
        self._item_of = item_of
        self._check = check
        self._device = device
        self._sent: dict[tuple[Direction, int], list[Transfers]] = {}
        """Sends that are not joined yet, by direction and micro-batch."""
        graph.at_end(self._join_all)

    def post(self, tag: Tag, messages: Sequence[RowMessage]) -> None:
        """Capture the sends of ``messages``.

        Raises ``PeerLostError`` and ``GenerationChangedError``.
        """
        items = items_to_send(self._item_of, tag, messages)
        sent = self._sent.setdefault((tag.direction, tag.micro_batch), [])
        sent += self._start(tag, True, items)

    def receive(self, tag: Tag, expected: Sequence[ExpectedMessage]) -> list[tuple[Tensor, ...]]:
        """Capture the receives of the ``expected`` messages; return the tensors that they fill.

        Raises ``PeerLostError`` and ``GenerationChangedError``.
        """
        received = empty_messages(expected, self._device)
        items = items_to_receive(self._item_of, tag, expected, received)
        self._join(self._start(tag, False, items))
        other: Direction = "outputs" if tag.direction == "rows" else "rows"
        self._join(self._sent.pop((other, tag.micro_batch), ()))
        return received

    def _start(self, tag: Tag, is_send: bool, items: Sequence[Item]) -> list[Transfers]:
        if not items:
            return []
        try:
            return self._world.start(tag.direction, is_send, items)
        except RuntimeError:
            self._check()  # the cause is most likely a lost peer
            raise

    def _join(self, started: Sequence[Transfers]) -> None:
        for transfers in started:
            self._world.order(transfers)
            assert not transfers.error, "NCCL reports no errors of captured transfers"

    def _join_all(self) -> None:
        for started in self._sent.values():
            self._join(started)
        self._sent.clear()
