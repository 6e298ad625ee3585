"""Data type of the KV cache, and the bytes that a key or a value takes in it."""

from __future__ import annotations

from typing import Literal

KvCacheDType = Literal["auto", "fp8"]
FP8_SCALE_BYTES = 1
"""Bytes of the scale of one fp8 vector; see ``workers.model.fp8``."""


def kv_vector_bytes(kind: KvCacheDType, head_dim: int, itemsize: int) -> int:
    """Bytes of the key, or the value, of one token and head; ``itemsize`` is the model's.

    A head of 64 in a bfloat16 model: ``auto`` 128, ``fp8`` 65, 1.97 times as many blocks.
    """
    return head_dim + FP8_SCALE_BYTES if kind == "fp8" else head_dim * itemsize
