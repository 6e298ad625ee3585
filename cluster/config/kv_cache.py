"""Data type of the KV cache, and the size of a key or value in it."""

from __future__ import annotations

from typing import Literal

KvCacheDType = Literal["auto", "fp8"]
FP8_SCALE_BYTES = 1
"""Bytes of the scale of one key or value vector in fp8; see ``workers.model.fp8``."""


def kv_vector_bytes(kind: KvCacheDType, head_dim: int, itemsize: int) -> int:
    """Return the bytes of the key or value of one token and head.

    ``itemsize``: bytes of a value in the model's dtype. Example, a head of 64 in a bfloat16 model:
    ``auto`` 128 bytes, ``fp8`` 65, so that 1.97 times as many blocks fit.
    """
    return head_dim + FP8_SCALE_BYTES if kind == "fp8" else head_dim * itemsize
