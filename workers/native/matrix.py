"""Packed matrices of linear products on a CPU (``c/matrix.h``, ``c/linear.c``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from workers.native.panels import DTYPES, PANEL, pack, unpack
from workers.native.team import Team, check


class MatrixFields(ctypes.Structure):
    """``struct matrix``."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class Matrix:
    """x @ weight.T + bias, every output a single chain of sums: a row's bits are its own."""

    def __init__(self, team: Team, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [out, in], bias [out] of one of ``panels.DTYPES``; both are copied.

        The team computes nothing meanwhile.
        """
        packed = pack(team.library, weight, team=team)
        self._hold(team, packed, (weight.shape[0], weight.shape[1]), weight.dtype, bias)

    @classmethod
    def of_panels(
        cls, team: Team, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Matrix:
        """The same of panels that are kept elsewhere, see ``panels.pack``."""
        found = cls.__new__(cls)
        found._hold(team, packed, shape, dtype, None)
        return found

    def _hold(
        self,
        team: Team,
        packed: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None,
    ) -> None:
        self._team, self._packed = team, packed
        self.shape = shape
        """[out, in]."""
        self.dtype = dtype
        self._bias = None if bias is None else bias.to(torch.float32, copy=True)
        self.fields = MatrixFields(
            panels=packed.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            outputs=shape[0],
            inputs=shape[1],
            dtype=DTYPES.index(dtype),
        )
        """For C; valid as long as this matrix."""

    def weight(self) -> Tensor:
        """A copy of the weight [out, in]."""
        return unpack(self._team.library, self._packed, self.shape, self.dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows [n, in] of the weight, by indices [n] int64."""
        found = self._packed[indices // PANEL, :, indices % PANEL]
        return found.contiguous().view(self.dtype)[:, : self.shape[1]]

    def multiply(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], both of the matrix's type."""
        assert x.dtype == self.dtype, f"{x.dtype}: must be {self.dtype}"
        assert x.shape[1:] == self.shape[1:], f"rows of shape {tuple(x.shape)}"
        x = x.contiguous()
        num_rows = x.shape[0]
        out = x.new_empty(num_rows, self.shape[0])
        if num_rows:
            run = self._team.library.functions.linear_run
            fields = ctypes.byref(self.fields)
            check(run(self._team.pointer, fields, x.data_ptr(), num_rows, out.data_ptr()))
        return out
