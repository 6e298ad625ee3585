"""Exchanges of rows between attention ranks and expert ranks (``c/exchange.h``).

Reference: ``workers.dispatch.row_exchange`` and ``workers.dispatch.row_serving``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from workers.native.experts import CallFields
from workers.native.frames import FrameFields, PlaceFields
from workers.native.library import Library
from workers.native.panels import DTYPES
from workers.native.structs import c_struct
from workers.native.thread_team import check

UNEXPECTED, UNSENT = 5, 6
"""Values of ``enum result`` in C if native code stopped in an exchange, which Python then
continues: after an unexpected message or a time-out, or with rows or outputs that are not sent."""


@c_struct("exchange.h", "exchange", place=PlaceFields, frames=ctypes.POINTER(FrameFields))
class ExchangeFields(ctypes.Structure):
    """C ``struct exchange``: parameters that both sides of an exchange need."""


@c_struct("exchange.h", "exchange_attention", exchange=ExchangeFields)
class AttentionSideFields(ctypes.Structure):
    """C ``struct exchange_attention``: an exchange on an attention rank, with the rows that it
    sends."""


@c_struct("exchange.h", "exchange_server", exchange=ExchangeFields, experts=CallFields)
class ServerFields(ctypes.Structure):
    """C ``struct exchange_server``: an exchange on an expert rank, with its experts."""


def dispatch_rows(library: Library, side: AttentionSideFields) -> int:
    """Send rows and their expert slots to all expert ranks; return 0, or ``UNSENT`` if Python must
    continue.

    Raises ``IndexError`` for an invalid expert id.
    """
    return _checked(library.functions.exchange_dispatch(ctypes.byref(side)))


def gather_outputs(library: Library, side: AttentionSideFields) -> int:
    """Receive the expert outputs of dispatched rows and sum them; return 0, or ``UNEXPECTED`` if
    Python must continue.

    Raises ``IndexError`` for a row with an expert that no peer has.
    """
    return _checked(library.functions.exchange_gather(ctypes.byref(side)))


def memory_bytes(library: Library, server: ServerFields) -> int:
    """Return the memory that ``serve_exchanges`` needs for the rows of all peers, in bytes."""
    return int(library.functions.exchange_memory(ctypes.byref(server)))


def serve_exchanges(
    library: Library,
    servers: ctypes.Array[ctypes.c_void_p],
    first: int,
    *,
    only_one: bool = False,
) -> tuple[int, int]:
    """Serve the exchanges from ``first`` on, or ``only_one``: receive rows, run their experts, send
    the outputs back.

    servers: addresses of ``ServerFields``, one for each exchange. Returns the number of served
    exchanges and a result: 0 if all were served; ``UNEXPECTED`` if the next exchange was not
    computed; ``UNSENT`` if outputs are left to send. Raises ``IndexError`` for an empty slot, and
    ``RuntimeError`` if memory is exhausted.
    """
    num_served = ctypes.c_int64()
    start = ctypes.addressof(servers) + first * ctypes.sizeof(ctypes.c_void_p)
    serve = library.functions.exchange_serve
    count = 1 if only_one else len(servers) - first
    result = serve(start, count, ctypes.byref(num_served))
    return num_served.value, _checked(result)


def _checked(result: int) -> int:
    if result < UNEXPECTED:
        check(result)
    return result


def sent_slots(library: Library, slots: Tensor, ids: Tensor, weights: Tensor | None) -> Tensor:
    """Return the values to send to each expert rank for a row: slots of its experts, then weight
    bits.

    slots [ranks, experts] int32, -1 for an expert that is not on the rank; ids [T, k] int64;
    weights [T, k] of one of ``panels.DTYPES``. Returns [ranks, T, 2k] int32, or [ranks, T, k]
    without weights. Raises ``IndexError`` for an invalid expert id.
    """
    assert slots.dtype == torch.int32
    assert slots.is_contiguous()
    assert ids.dtype == torch.int64
    (num_ranks, num_experts), (num_rows, top_k) = slots.shape, ids.shape
    dtype, ids, address = 0, ids.contiguous(), None
    if weights is not None:
        assert weights.shape == ids.shape
        dtype, weights = DTYPES.index(weights.dtype), weights.contiguous()
        address = weights.data_ptr()
    width = top_k if weights is None else 2 * top_k
    sent = torch.empty(num_ranks, num_rows, width, dtype=torch.int32)
    check(
        library.functions.exchange_slots(
            slots.data_ptr(),
            num_ranks,
            num_experts,
            ids.data_ptr(),
            num_rows,
            top_k,
            address,
            dtype,
            sent.data_ptr(),
        )
    )
    return sent
