"""Experts from the memory of another worker.

An item of the transfer (``workers.transport.peer_link``) is one expert: its matrices [out, in],
row-major, exchange by exchange. A matrix is sent in the model's dtype, or as quantized values,
scales and zero points. The key of an item is bank and expert.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from cluster.core.errors import ProtocolError
from workers.experts.slots import ExpertSlots
from workers.experts.sources import ExpertWeight
from workers.experts.transfer.rate_limit import RateLimit
from workers.model.config import BankSpec
from workers.quantization.matrix import empty_weight, parts_of
from workers.transport.peer_link import PeerClient, view_bytes

PEER = "peer"
"""Value of ``kind`` in ``LoadExperts.source`` for ``PeerSource``. Parameters: ``peer`` (worker
name) and ``address``."""
GIVE_UP = "give up"
"""Value of ``kind`` in a load command that loads nothing and cancels unfinished transfers."""
KEY: Final = struct.Struct("!HH")
"""Format of the key that names an expert in a transfer: index of its bank, and logical expert."""


class ExpertProvider:
    """Provides the experts in this worker's slots to other workers (``ItemProvider``).

    After the copy of a slot, its record of contents is checked, so that a slot overwritten during
    the copy is not sent.
    """

    def __init__(self, slots: ExpertSlots) -> None:
        self._slots = slots

    def acquire(self, keys: Sequence[bytes]) -> list[list[Tensor]]:
        """Copy the expert of the first key, or return ``[]`` if no slot holds it; see
        ``ItemProvider``.

        A call never copies more than one expert, because each copy takes memory.
        """
        found = [self._slots.read_expert(*KEY.unpack(key)) for key in keys[:1]]
        return [
            [part for matrix in matrices for part in parts_of(matrix)]
            for matrices in found
            if matrices is not None
        ]

    def read(self, item: list[Tensor]) -> list[Tensor]:
        return item

    def release(self, items: list[list[Tensor]], num_kept: int) -> None:
        """Release acquired experts; see ``ItemProvider``. Copies need no release."""


class PeerSource:
    """Expert source that copies experts from another worker, over one connection that it opens for
    the first expert."""

    def __init__(self, connect: Callable[[], PeerClient], rate: RateLimit) -> None:
        """Connect later, by calling ``connect``. ``rate`` limits the bytes per second and the total
        time, which includes connecting."""
        self._connect = connect
        self._rate = rate
        self._client: PeerClient | None = None
        self.num_bytes = 0

    def weights(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> Iterator[ExpertWeight]:
        """Yield all matrices of an expert, after all bytes of the expert have arrived and are
        checked.

        Raises the errors of ``PeerClient``, ``TransferAbortedError``, and ``ProtocolError`` if the
        peer does not hold the expert.
        """
        if self._client is None:
            self._rate.take(0)
            self._client = self._connect()
        matrices = [
            empty_weight(bank.exchanges[exchange].form_of(matrix), shape, dtype)
            for exchange, matrix, shape in bank.matrices
        ]
        what = f"expert {expert} of bank {bank.bank} layer {bank.layer}"
        parts = [view_bytes(part) for matrix in matrices for part in parts_of(matrix)]
        if not self._client.fetch(what, [KEY.pack(bank.index, expert)], parts):
            raise ProtocolError(f"{self._client.peer} does not hold {what}")
        self.num_bytes += bank.num_bytes(dtype.itemsize)
        for (exchange, matrix, _), weight in zip(bank.matrices, matrices, strict=True):
            yield ExpertWeight(exchange, matrix, weight)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
