"""``--mode auto``: chooses the layout that serves a model faster on the same workers.

The given workers form either two pools or one: 1 attention and 2 expert workers, or 3 colocated
workers. The layout with the faster decode step of a full batch wins (``cluster.sizing.roofline``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.config.cluster import ClusterConfig
from cluster.config.resources import NodeResources, plan_shares
from cluster.config.workers import WorkersSection
from cluster.core.load_profile import LoadProfile
from cluster.sizing.devices import worker_device
from cluster.sizing.gpus import UNKNOWN_GPU
from cluster.sizing.group_steps import choose_sharing
from cluster.sizing.roofline import (
    BankSize,
    DeviceSpec,
    ModelSize,
    StepTime,
    activation_shares,
    colocated_step,
    disaggregated_step,
)

_CONTEXT_SHARE = 0.5
"""Assumed average length of a sequence, as a share of the maximum length."""


def resolve_mode(
    config: ClusterConfig,
    size: ModelSize,
    max_model_len: int,
    nodes: Sequence[NodeResources],
    free_cpus: float | None = None,
    gpu: DeviceSpec = UNKNOWN_GPU,
) -> ClusterConfig:
    """Return the configuration with ``auto`` of mode, or else of ``share_experts``, replaced by
    the value for these nodes.

    ``max_model_len`` is the model's own limit, used if the configuration has none; ``gpu`` is the
    GPU of workers on CUDA. Raises ``ConfigError`` as ``plan_shares`` does.
    """
    import psutil

    workers, engine = config.workers, config.engine
    context = _CONTEXT_SHARE * (config.model.max_model_len or max_model_len)
    share = plan_shares(workers, nodes, free_cpus)
    device = worker_device(share, len(nodes), gpu)
    if workers.mode == "auto":
        batch = workers.num_attention_ranks * engine.max_num_seqs
        chosen = choose_mode(workers, size, batch=batch, context_tokens=context, device=device)
    else:
        memory_bytes = psutil.virtual_memory().available * len(nodes)
        if on_gpu := share.device == "cuda":
            engine = engine.on_gpus(workers.num_attention_ranks)
        chosen = choose_sharing(
            workers,
            size,
            num_seqs=engine.max_num_seqs,
            step_tokens=engine.step_tokens,
            context_tokens=context,
            device=device,
            memory_bytes=None if on_gpu else memory_bytes,
        )
    return replace(config, workers=chosen)


def choose_mode(
    workers: WorkersSection,
    size: ModelSize,
    *,
    batch: int,
    context_tokens: float,
    device: DeviceSpec,
) -> WorkersSection:
    """Return ``workers`` with mode and pools of the faster layout; disaggregated if equal.

    ``mode_reason`` is set. Both layouts have the same number of workers and the same ``batch``.
    ``context_tokens``: average length of a sequence. ``device``: characteristics of one worker.
    """
    total = workers.num_attention_ranks + workers.num_expert_workers
    obstacle = _obstacle(workers, size, total)
    if obstacle:
        return replace(workers, mode="disaggregated", mode_reason=obstacle)
    apart = disaggregated_step(
        size,
        batch,
        context_tokens,
        num_attention=workers.num_attention_ranks,
        num_experts=workers.num_expert_workers,
        device=device,
    )
    together = colocated_step(size, batch, context_tokens, num_workers=total, device=device)
    reason = _reason(apart, together, batch, context_tokens, device)
    if together.step_s >= apart.step_s:
        return replace(workers, mode="disaggregated", mode_reason=reason)
    return replace(
        workers,
        mode="colocated",
        num_attention_workers=None,
        num_expert_workers=total,
        mode_reason=reason,
    )


def bank_sizes(
    banks: Sequence[Mapping[str, Any]], profile: LoadProfile | None
) -> tuple[BankSize, ...]:
    """Convert dicts of banks to ``BankSize``, with the experts' load if ``profile`` is given.

    ``banks``: dicts of ``bank``, ``layer`` and fields of ``BankSize``.
    """
    found = []
    for bank in banks:
        numbers = {name: value for name, value in bank.items() if name not in ("bank", "layer")}
        counts = profile.counts(bank["bank"], bank["layer"]) if profile else ()
        found.append(BankSize(**numbers, activation=activation_shares(counts, bank["top_k"])))
    return tuple(found)


def _obstacle(workers: WorkersSection, size: ModelSize, total: int) -> str:
    """Return the reason why colocated workers are impossible; empty if they are possible."""
    experts = min((b.num_experts for b in size.banks), default=0)
    if workers.placement_file is not None:
        return f"the placement file is for {workers.num_expert_workers} expert workers"
    if total > experts:
        return f"{total} colocated workers would be more than the {experts} experts of a bank"
    return ""


def _reason(
    apart: StepTime, together: StepTime, batch: int, context_tokens: float, device: DeviceSpec
) -> str:
    """Describe the predictions for both layouts in one line, the faster layout first."""
    is_colocated = together.step_s < apart.step_s
    first, second = (together, apart) if is_colocated else (apart, together)
    price = "; two pools would give elasticity and failure isolation, not speed" * is_colocated
    return (
        f"a decode step of {batch} rows with {context_tokens:.0f} tokens of context each is "
        f"predicted to take {_text(first)}, and {_text(second)}, by {device.name} numbers{price}"
    )


def _text(step: StepTime) -> str:
    ms = [f"{1000 * s:.3g}" for s in (step.attention_s, step.experts_s, step.exchange_s)]
    times = f" in each of {step.num_micro_batches} micro-batches" * (step.num_micro_batches > 1)
    return (
        f"{1000 * step.step_s:.3g} ms on {step.layout} (attention {ms[0]}, experts {ms[1]}, "
        f"exchange {ms[2]}{times}; host {1000 * step.host_s:.3g})"
    )
