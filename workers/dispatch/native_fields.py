"""Fields and buffers shared by both sides of native exchanges."""

from __future__ import annotations

from ctypes import addressof

import torch

from workers.model.config import BankSpec
from workers.native.exchange import ExchangeFields
from workers.native.panels import DTYPES
from workers.transport.direct import DirectEdges


def exchange_fields(
    direct: DirectEdges, bank: BankSpec, exchange: int, micro_batch: int, dtype: torch.dtype
) -> ExchangeFields:
    """Create the C ``struct exchange`` with the parameters of one exchange.

    The caller must set the field ``by_pair``. ``direct`` must outlive the result.
    """
    spec = bank.exchanges[exchange]
    num_inputs = bank.top_k if spec.per_slot_input else 1
    fields = ExchangeFields(
        waiting=addressof(direct.waiting),
        frames=direct.frames,
        num_peers=len(direct.edges),
        dtype=DTYPES.index(dtype),
        top_k=bank.top_k,
        num_inputs=num_inputs,
        in_bytes=num_inputs * spec.in_width * dtype.itemsize,
        out_width=spec.out_width,
    )
    place = fields.place
    place.step = addressof(direct.step)
    place.bank, place.exchange, place.micro_batch = bank.index, exchange, micro_batch
    return fields


class GrowingBuffer:
    """Memory for native code that grows on demand; growing discards the contents."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._num_bytes = self._address = 0

    def of(self, num_bytes: int) -> int:
        """Return the address of at least ``num_bytes`` bytes, valid until a later call needs more
        bytes."""
        if num_bytes > self._num_bytes:
            self._num_bytes = num_bytes
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
            self._address = self._bytes.data_ptr()
        return self._address
