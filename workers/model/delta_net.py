"""Gated DeltaNet: what a linear-attention layer computes between input and output projections.

    convolution over the last rows, silu, q/k norms, gated delta rule, gated norm

The state of each value head is a matrix S [K, D]. A row with query q, key k, value v, decay a and
strength b updates and reads it:

    S = a S;  S = S + k (b (v - k S));  output = q S

There are two algorithms, equal up to rounding. The row-by-row one gives a row the same bits however
its sequence is split into chunks. The one for chunks of 64 positions is faster for prompts, as most
of its work is matrix products.

Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024), section 3; the
rounding is that of transformers ``models/qwen3_next``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.attention_batch import GPU_PIECE_BYTES, PIECE_BYTES, StateRows
from workers.model.config import DeltaNetSpec
from workers.model.layers import rms_norm, row_sigmoid, row_wise
from workers.model.state_runs import StateRun

CHUNK = 64
"""Number of positions in a chunk of the chunked algorithm."""
NORM_EPS = 1e-6
"""Epsilon that is added to the sum of squares of a query or key before the square root."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaNet:
    """Weights of one Gated DeltaNet layer, except its input and output projections."""

    spec: DeltaNetSpec
    conv: Tensor
    """[kernel, C] float32: weights of the causal convolution over C channels, the oldest position
    first."""
    rate: Tensor
    """[V] float32, negative, one per value head: at a row with decay input x, the state is
    multiplied by exp(rate * softplus(x + bias))."""
    bias: Tensor
    """[V] float32: bias of the decay input, one per value head."""
    norm: Tensor
    """[D] model dtype: weight of the gated norm of a value head's output; all heads share it."""
    eps: float
    """Epsilon of the gated norm."""

    @property
    def row_width(self) -> int:
        """Elements of a row after the input projection: inputs of the convolution [C], gates of the
        output [V * D], and an update strength and a decay input for each of V value heads."""
        spec = self.spec
        return spec.conv_width + spec.num_value_heads * (spec.value_dim + 2)


Mix = Callable[[Tensor, Tensor, StateRows], Tensor]
"""Function that computes a Gated DeltaNet layer from projected rows [T, row_width], the layer's
recurrent states [slots, layer_values] and the runs of the rows (``StateRun``). Returns [T, V * D];
writes the state after each run."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Inputs of the delta rule for some rows, float32: normalised keys and normalised, scaled
    queries [.., V, K], and values [.., V, D]."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    strengths: Tensor
    """[.., V]: strength of each value head's update, from 0 to 1."""
    log_decays: Tensor
    """[.., V]: logarithm of the factor by which each value head's state decays."""


class TorchDeltaNet:
    """Gated DeltaNet of one layer with torch; implements ``Mix``."""

    def __init__(self, net: DeltaNet, *, row_by_row: bool) -> None:
        """``row_by_row``: True: compute row by row, so that a row's bits depend neither on other
        rows nor on how its sequence is split; False: compute prompts in chunks, which is faster."""
        self._net = net
        self._row_by_row = row_by_row

    def __call__(self, rows: Tensor, cache: Tensor, states: StateRows) -> Tensor:
        spec = self._net.spec
        shape = (len(rows), spec.num_value_heads, spec.value_dim)
        mixed = torch.empty(shape, dtype=torch.float32, device=rows.device)
        num_decodes = 0 if self._row_by_row else states.num_decodes
        size = max(self._piece_bytes(rows.device) // (cache.shape[1] * cache.itemsize), 1)
        for first in range(0, num_decodes, size):
            last = min(first + size, num_decodes)
            slots = states.decode_slots[:, first:last]
            mixed[first:last] = self._decode(rows[first:last], cache, slots)
        for run in states.runs[num_decodes:]:
            mixed[run.first : run.last] = self._run(rows[run.first : run.last], cache, run)
        return self._gated(mixed, rows)

    def _piece_bytes(self, device: torch.device) -> int:
        """Maximum bytes of states of decode rows that are updated together.

        Measured on an AMD EPYC, torch 2.13, 1 thread, 32 states of 2 MiB in float32: 213 ms all
        together, 20 ms one by one.
        """
        return PIECE_BYTES if device.type == "cpu" else GPU_PIECE_BYTES

    def _decode(self, rows: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        """Compute decode rows, one per sequence: outputs [rows, V, D]. ``slots`` [2, rows]: slots
        of ``cache`` from which states are read, and to which they are written."""
        read, write = slots.unbind()
        earlier, matrices = self._parts(cache.index_select(0, read))
        window = torch.cat((earlier, self._inputs(rows).unsqueeze(1)), 1)
        found = self._prepared(self._convolved(window)[:, 0], rows)
        outputs, matrices = _step(found, matrices)
        cache.index_copy_(0, write, torch.cat((window[:, 1:].flatten(1), matrices.flatten(1)), 1))
        return outputs

    def _run(self, rows: Tensor, cache: Tensor, run: StateRun) -> Tensor:
        earlier, matrices = self._parts(cache[run.read])
        window = torch.cat((earlier, self._inputs(rows)))
        convolved = self._convolved(window)
        if self._row_by_row or len(rows) == 1:
            parts = []
            for i in range(len(rows)):
                output, matrices = _step(self._prepared(convolved[i], rows[i]), matrices)
                parts.append(output)
            outputs = torch.stack(parts)
        else:
            outputs, matrices = _by_chunks(self._prepared(convolved, rows), matrices)
        cache[run.write] = torch.cat((window[len(rows) :].flatten(), matrices.flatten()))
        return outputs

    def _parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Split recurrent states into earlier inputs of the convolution [.., kernel - 1, C] and
        matrices [.., V, K, D]."""
        spec = self._net.spec
        sizes = [spec.conv_values, states.shape[-1] - spec.conv_values]
        inputs, matrices = torch.split(states, sizes, -1)
        whole = states.shape[:-1]
        return (
            inputs.reshape(*whole, spec.kernel - 1, spec.conv_width),
            matrices.reshape(*whole, spec.num_value_heads, spec.key_dim, spec.value_dim),
        )

    def _inputs(self, rows: Tensor) -> Tensor:
        """Return the inputs of the convolution, [T, C] float32."""
        return rows[:, : self._net.spec.conv_width].float()

    def _convolved(self, window: Tensor) -> Tensor:
        """Convolve [.., T + kernel - 1, C] and apply silu: [.., T, C] float32, rounded to the model
        dtype."""
        conv, dtype = self._net.conv, self._net.norm.dtype
        length = window.shape[-2] - len(conv) + 1
        total = window[..., :length, :] * conv[0]
        for place in range(1, len(conv)):
            total = total + window[..., place : place + length, :] * conv[place]
        flat = total.to(dtype).flatten(0, -2)
        return row_wise(functional.silu, flat).float().view_as(total)

    def _prepared(self, convolved: Tensor, rows: Tensor) -> _Rows:
        """Return the delta rule's inputs, from convolved [.., C] and projected rows
        [.., row_width]."""
        spec, net = self._net.spec, self._net
        heads, num_values = spec.num_value_heads, spec.num_value_heads * spec.value_dim
        each = spec.num_key_heads * spec.key_dim
        queries, keys, values = torch.split(convolved, [each, each, num_values], -1)
        gates = rows[..., spec.conv_width + num_values :]
        strengths, decays = torch.split(gates.view(-1, 2 * heads), heads, 1)
        softened = row_wise(functional.softplus, decays.float() + net.bias)
        shape = (*convolved.shape[:-1], heads)
        share = heads // spec.num_key_heads

        def by_head(x: Tensor, dim: int) -> Tensor:
            return x.reshape(*x.shape[:-1], -1, dim)

        return _Rows(
            queries=_normalised(by_head(queries, spec.key_dim), share) * spec.key_dim**-0.5,
            keys=_normalised(by_head(keys, spec.key_dim), share),
            values=by_head(values, spec.value_dim),
            strengths=row_sigmoid(strengths).float().view(shape),
            log_decays=(net.rate * softened).view(shape),
        )

    def _gated(self, mixed: Tensor, rows: Tensor) -> Tensor:
        """Normalise each head of [T, V, D] and multiply it by silu of its gate: [T, V * D]."""
        spec, net = self._net.spec, self._net
        normed = rms_norm(mixed.to(net.norm.dtype).flatten(0, 1), net.norm, net.eps)
        begin, width = spec.conv_width, spec.num_value_heads * spec.value_dim
        gates = row_wise(functional.silu, rows[:, begin : begin + width].float())
        return (normed.view(len(rows), -1).float() * gates).to(net.norm.dtype)


def _normalised(heads: Tensor, share: int) -> Tensor:
    """Scale query or key heads [.., G, K] to length 1, and repeat each for the ``share`` value
    heads that use it: [.., V, K]."""
    squares = (heads * heads).sum(-1, keepdim=True)
    return (heads * torch.rsqrt(squares + NORM_EPS)).repeat_interleave(share, -2)


def _step(rows: _Rows, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the delta rule to one row of each sequence; return the outputs [.., V, D] and the
    updated states [.., V, K, D]."""
    decays = row_wise(torch.exp, rows.log_decays.view(-1, rows.log_decays.shape[-1]))
    matrices = matrices * decays.view(rows.log_decays.shape)[..., None, None]
    known = (matrices * rows.keys.unsqueeze(-1)).sum(-2)
    change = (rows.values - known) * rows.strengths.unsqueeze(-1)
    matrices = matrices + rows.keys.unsqueeze(-1) * change.unsqueeze(-2)
    return (matrices * rows.queries.unsqueeze(-1)).sum(-2), matrices


def _by_chunks(rows: _Rows, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the delta rule to T rows of one sequence, chunk by chunk; return the outputs [T, V, D]
    and the updated state [V, K, D].

    The updates of the rows in a chunk are the solution of a triangular system, so only the chunks
    are sequential.
    """
    count = len(rows.queries)

    def chunked(x: Tensor) -> Tensor:
        """Split [T, V, ..] into [V, chunks, CHUNK, ..]; padding with zeros has no effect."""
        padded = functional.pad(x, (*(0, 0) * (x.dim() - 1), 0, -count % CHUNK))
        heads_first = padded.transpose(0, 1)
        return heads_first.reshape(len(heads_first), -1, CHUNK, *x.shape[2:])

    queries, keys, values = chunked(rows.queries), chunked(rows.keys), chunked(rows.values)
    strengths = chunked(rows.strengths).unsqueeze(-1)
    total = chunked(rows.log_decays).cumsum(2)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=total.device).triu(1)
    between = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(later, float("-inf")).exp()
    since_begin = total.exp().unsqueeze(-1)
    system = (keys * strengths) @ keys.transpose(2, 3) * between
    solved = torch.linalg.solve_triangular(
        system,
        torch.cat((values * strengths, keys * strengths * since_begin), -1),
        upper=False,
        unitriangular=True,
    )
    changes, from_begin = torch.split(solved, [values.shape[-1], keys.shape[-1]], -1)
    scores = queries @ keys.transpose(2, 3) * between
    queries = queries * since_begin
    keys = keys * (total[..., -1:] - total).exp().unsqueeze(-1)
    whole = total[..., -1].exp()[..., None, None]
    outputs = []
    for i in range(total.shape[1]):
        new = changes[:, i] - from_begin[:, i] @ matrices
        outputs.append(queries[:, i] @ matrices + scores[:, i] @ new)
        matrices = matrices * whole[:, i] + keys[:, i].transpose(1, 2) @ new
    return torch.cat(outputs, 1)[:, :count].transpose(0, 1), matrices
