"""Tensors of mapped files, without a copy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """CPU tensors [rows_i, ..] of one type as [sum of rows_i, ..] in the same memory.

    None where they do not follow each other there, row after row. Libraries write the tensors of a
    file by name: ``gate_proj`` of an expert, and then its ``up_proj``.
    """
    first = tensors[0]
    if not all(tensor.is_contiguous() for tensor in tensors):
        return None
    if len(tensors) == 1:
        return first
    if any(a.data_ptr() + a.nbytes != b.data_ptr() for a, b in pairwise(tensors)):
        return None
    memory = (ctypes.c_uint8 * sum(t.nbytes for t in tensors)).from_address(first.data_ptr())
    memory.owners = list(tensors)  # type: ignore[attr-defined]  # as long as the result lives
    rows = sum(t.shape[0] for t in tensors)
    return (
        torch.frombuffer(memory, dtype=torch.uint8).view(first.dtype).view(rows, *first.shape[1:])
    )
