"""Sends and receives over NCCL that are part of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cluster.core.errors import PeerLostError, first_line
from workers.cuda.step_graph import StepGraph
from workers.transport.transport import ExpectedMessage, RowMessage, Tag
from workers.transport.world import Item, Transfers, World

ItemOf = Callable[[int, Tag, int, Tensor], Item]
"""Function that describes the transfer of one part of a message: (rank, tag, part, tensor)."""


class CapturedTransfers:
    """``CapturedMessages`` over the process groups of a world.

    NCCL launches its kernels on streams of its own, which the capture must join. It joins a send at
    the next receive of the same micro-batch, by when the send has ended: a rank replies only to
    rows that it has received. Until then, the memory of the sent tensors is not reused.
    """

    def __init__(
        self,
        world: World,
        graph: StepGraph,
        item_of: ItemOf,
        names: Mapping[int, str],
        device: torch.device,
    ) -> None:
        """``names``: names of the peers by rank."""
        self._world = world
        self._item_of = item_of
        self._names = names
        self._device = device
        self._sent: dict[int, list[Transfers]] = {}
        """Sends that are not joined yet, by micro-batch."""
        graph.at_end(self._join_all)

    def post(self, tag: Tag, messages: Sequence[RowMessage]) -> None:
        """Capture the sends of ``messages``. Rows, which the caller may overwrite, are copied once
        for all ranks. Raises ``PeerLostError``."""
        copies: dict[int, Tensor] = {}
        items = []
        for message in messages:
            for i, part in enumerate(message.parts):
                if not part.numel():
                    continue
                data = part
                if tag.direction == "rows":
                    if id(part) not in copies:
                        copies[id(part)] = part.clone()
                    data = copies[id(part)]
                items.append(self._item_of(message.rank, tag, i, data.contiguous()))
        self._sent.setdefault(tag.micro_batch, []).extend(self._start(tag, True, items))

    def receive(self, tag: Tag, expected: Sequence[ExpectedMessage]) -> list[tuple[Tensor, ...]]:
        """Capture the receives of the ``expected`` messages; return the tensors that they fill.

        Raises ``PeerLostError``.
        """
        received = [item.empty(self._device) for item in expected]
        items = [
            self._item_of(item.rank, tag, i, tensor)
            for item, tensors in zip(expected, received, strict=True)
            for i, tensor in enumerate(tensors)
            if tensor.numel()
        ]
        self._join(self._start(tag, False, items))
        self._join(self._sent.pop(tag.micro_batch, ()))
        return received

    def _start(self, tag: Tag, is_send: bool, items: Sequence[Item]) -> list[Transfers]:
        if not items:
            return []
        try:
            return self._world.start(tag.direction, is_send, items)
        except RuntimeError as err:
            raise PeerLostError(self._names[items[0].rank], first_line(err)) from err

    def _join(self, started: Sequence[Transfers]) -> None:
        for transfers in started:
            self._world.order(transfers)
            if transfers.error:
                raise PeerLostError(self._names[transfers.items[0].rank], transfers.error)

    def _join_all(self) -> None:
        for started in self._sent.values():
            self._join(started)
        self._sent.clear()
