"""Packed matrices of linear products on a CPU (``c/matrix.h``, ``c/linear.c``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from workers.native.panels import DTYPES, PANEL, unpack
from workers.native.quantized import FormFields, form_fields, pack_weight, unpack_quantized
from workers.native.structs import c_struct
from workers.native.thread_team import ThreadTeam, check
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix, Weight


@c_struct("matrix.h", "matrix", form=FormFields)
class MatrixFields(ctypes.Structure):
    """C ``struct matrix``: a packed weight matrix and its bias."""


class Matrix:
    """Linear product x @ weight.T + bias on a CPU. The bits of a row do not depend on other
    rows."""

    def __init__(
        self,
        team: ThreadTeam,
        weight: Weight,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Pack copies of a weight and a bias. The team must be idle.

        weight [out, in] of one of ``panels.DTYPES``, or quantized; bias [out]. ``dtype``: dtype of
        rows, needed for a quantized weight.
        """
        packed = pack_weight(team.library, weight, team=team)
        form = weight.format if isinstance(weight, QuantizedMatrix) else None
        own = weight.dtype if isinstance(weight, Tensor) else dtype or torch.float32
        self._hold(team, packed, (weight.shape[0], weight.shape[1]), own, form, bias)

    @classmethod
    def of_panels(
        cls,
        team: ThreadTeam,
        packed: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        form: WeightFormat | None = None,
    ) -> Matrix:
        """Create a matrix from panels that are already packed; see ``quantized.pack_weight``."""
        found = cls.__new__(cls)
        found._hold(team, packed, shape, dtype, form, None)
        return found

    def _hold(
        self,
        team: ThreadTeam,
        packed: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        form: WeightFormat | None,
        bias: Tensor | None,
    ) -> None:
        self._team, self._packed = team, packed
        self.shape = shape
        """Shape of the weight, [out, in]."""
        self.dtype = dtype
        """Dtype of the rows that the matrix multiplies, and of the results."""
        self.form = form
        """Format of a quantized weight; None if the weight is not quantized."""
        self._bias = None if bias is None else bias.to(torch.float32, copy=True)
        self.fields = MatrixFields(
            panels=packed.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            outputs=shape[0],
            inputs=shape[1],
            dtype=DTYPES.index(dtype),
            form=form_fields(form),
        )
        """C struct of this matrix; its pointers are valid as long as this object."""

    def weight(self) -> Tensor:
        """Return a copy of the weight [out, in]; a quantized weight is dequantized and rounded to
        ``dtype``."""
        library = self._team.library
        if self.form is None:
            return unpack(library, self._packed, self.shape, self.dtype)
        found = unpack_quantized(library, self._packed, self.form, self.shape)
        return found.dequantized().to(self.dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows [n, in] of a weight that is not quantized, by indices [n] int64."""
        assert self.form is None, "rows of a quantized matrix"
        found = self._packed[indices // PANEL, :, indices % PANEL]
        return found.contiguous().view(self.dtype)[:, : self.shape[1]]

    def multiply(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias for x [rows, in]: [rows, out], in the matrix's dtype like
        x."""
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
