"""Experts out of another worker's memory, and the pace of any source in a move."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from workers.experts.rate_limit import RateLimit
from workers.experts.sources import ExpertSource, ExpertWeight
from workers.experts.weight_client import WeightClient
from workers.experts.weight_frames import expert_num_bytes, expert_shapes
from workers.families.base import BankSpec

PEER = "peer"
"""Kind of the source; needs ``peer``, the worker's name, and ``address`` of its weights."""


GIVE_UP = "give up"
"""Kind of an order that loads nothing: moves that are not done are not wanted any more."""


class PeerSource:
    """``ExpertSource`` over one connection, which is opened with the first expert."""

    def __init__(self, connect: Callable[[], WeightClient], rate: RateLimit) -> None:
        """``rate`` is that of the client, asked before it connects."""
        self._connect = connect
        self._rate = rate
        self._client: WeightClient | None = None
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """See ``ExpertSource``; bytes received."""
        return self._num_bytes

    def weights(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> Iterator[ExpertWeight]:
        """See ``ExpertSource``; an expert is handed out when all of it has come and is checked.

        Raises as ``WeightClient`` does.
        """
        if self._client is None:
            self._rate.take(0)
            self._client = self._connect()
        matrices = self._client.fetch(bank, expert, dtype)
        self._num_bytes += expert_num_bytes(bank, dtype)
        for (exchange, matrix, _), weight in zip(expert_shapes(bank), matrices, strict=True):
            yield ExpertWeight(exchange, matrix, weight)

    def close(self) -> None:
        """See ``ExpertSource``."""
        if self._client is not None:
            self._client.close()


class PacedSource:
    """Another source at a rate. Raises ``MoveGivenUpError`` when its time is over."""

    def __init__(self, inner: ExpertSource, rate: RateLimit) -> None:
        self._inner = inner
        self._rate = rate

    @property
    def num_bytes(self) -> int:
        """See ``ExpertSource``."""
        return self._inner.num_bytes

    def weights(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> Iterator[ExpertWeight]:
        """See ``ExpertSource``."""
        for weight in self._inner.weights(bank, expert, dtype):
            self._rate.take(weight.weight.nbytes)
            yield weight

    def close(self) -> None:
        """See ``ExpertSource``."""
        self._inner.close()
