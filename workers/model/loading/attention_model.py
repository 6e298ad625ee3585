"""Loads a model without its routed experts from a checkpoint, as attention workers need it."""

from __future__ import annotations

import torch

from workers.model.batch_invariant.invariant import RowInvariantBlocks
from workers.model.building_blocks import BuildingBlocks
from workers.model.compute_threads import ComputeThreads
from workers.model.cuda.blocks import CudaBlocks
from workers.model.layers import AttentionModel
from workers.model.loading.checkpoint import Checkpoint
from workers.model.native.blocks import NativeBlocks
from workers.native.thread_team import ThreadTeam
from workers.quantization.formats import WeightFormat


def load_attention_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int | None = None,
    compute_threads: ComputeThreads | None = None,
    deterministic: bool = False,
    team: ThreadTeam | None = None,
    form: WeightFormat | None = None,
) -> AttentionModel:
    """Load a model without its routed experts; close the checkpoint's files afterwards.

    ``max_positions``: number of positions in the table of the rotary embedding; None: the model's
    context. On a CPU with a ``team``, native kernels compute. Without a team, ``compute_threads``
    share large products; None: the calling thread computes alone, as it always does on a GPU or if
    ``deterministic``. ``form``: format to which native products are quantized while they are
    loaded; None: not quantized. A format requires a team.

    Raises ``CheckpointError``, and ``ConfigError`` if this machine cannot be deterministic.
    """
    family = checkpoint.family
    checkpoint.expect(sum(checkpoint.num_bytes(p) for p in family.attention_tensors()))
    try:
        if team is not None and device.type == "cpu":
            blocks: BuildingBlocks = NativeBlocks(team, form)
        elif deterministic:
            blocks = RowInvariantBlocks(device)
        elif device.type == "cuda":
            blocks = CudaBlocks()
        else:
            blocks = BuildingBlocks(compute_threads)
        model = family.attention_model(checkpoint, dtype, device, max_positions, blocks)
        checkpoint.files.confirm()
        return model
    finally:
        checkpoint.files.close()
