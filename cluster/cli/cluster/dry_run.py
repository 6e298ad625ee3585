"""``--dry-run``: shows all decisions and checks of a start without starting anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.cli.terminal.output import table
from cluster.core.placement import FREE_SLOT
from cluster.core.topology import Role, holds_experts
from cluster.launch.checkpoint_check import CheckpointFacts
from cluster.launch.model_plan import ModelPlan, num_kv_blocks
from cluster.launch.plan import LaunchPlan
from cluster.sizing.start_plan import StartPlan, plan_start

_KNOWN_AFTER_JOINING = "determined by the nodes of the Ray cluster after joining"


def describe(plan: LaunchPlan) -> dict[str, Any]:
    """Return the document of ``--dry-run --json``; of several models, ``models`` has one for each.

    Values that depend on the nodes of a Ray cluster to be joined are None or empty.
    """
    addresses = {"http": plan.http_url, "grpc": plan.grpc_target}
    models = [_describe(plan, model) for model in plan.models]
    document = {"schema": 1, "dry_run": True, **addresses, **models[0]}
    return document | ({"models": models} if plan.others else {})


def _describe(whole: LaunchPlan, plan: ModelPlan) -> dict[str, Any]:
    facts = plan.facts
    blocks = num_kv_blocks(plan.config, facts)
    size, kind = facts.itemsize(plan.config.model.dtype), plan.config.engine.kv_cache_dtype
    start = None
    if whole.temp_dir:
        start = plan_start(plan.config, facts.banks, whole.private_nodes, profile=plan.profile)
    workers = plan.config.workers
    may_be_gpu = start.share.device == "cuda" if start else workers.device != "cpu"
    is_measured = may_be_gpu and plan.config.engine.kv_cache_bytes is None
    is_open = workers.mode == "auto"
    return {
        "mode": workers.mode,
        "mode_reason": _KNOWN_AFTER_JOINING if is_open else workers.mode_reason,
        "model": {
            "name": plan.config.model.served_model_name,
            "path": plan.config.model.path,
        },
        "device": start.share.device if start else None,
        "cpus_per_worker": start.share.cpus if start else None,
        "gpus_per_worker": start.share.gpus if start else None,
        "threads_per_worker": start.share.threads if start else None,
        "kv_cache_tokens": None if is_measured else blocks * plan.config.engine.block_size_tokens,
        "kv_cache_dtype": kind,
        "kv_host_bytes": plan.config.kv_tiers.kv_host_bytes,
        "kv_disk_bytes": plan.config.kv_tiers.kv_disk_bytes,
        "kv_disk_dir": plan.config.kv_tiers.kv_disk_dir,
        "num_states": plan.config.engine.num_states if facts.state_bytes else 0,
        "state_bytes": facts.state_bytes,
        "kv_bytes_per_token": facts.kv_bytes_per_token(plan.config.model.dtype, kind),
        "workers": [
            {
                "name": f"{role}-{rank}",
                "role": role,
                "rank": rank,
                "slots": start.num_slots if start and holds_experts(role) else None,
                "weight_bytes": _weights(role, rank, start, facts, size) if start else None,
            }
            for role, number in ({} if is_open else workers.pools).items()
            for rank in range(number)
        ],
        "placement": start.placement.to_dict() if start else None,
    }


def _weights(role: Role, rank: int, start: StartPlan, facts: CheckpointFacts, itemsize: int) -> int:
    """Return the bytes of a worker's weights: non-expert weights, experts of its slots, or both."""
    mode = start.config.workers.mode
    held = 0
    if holds_experts(role) or mode == "local":
        for bank, placed in zip(facts.banks, start.placement.banks, strict=True):
            slots = placed.physical_to_logical[rank]
            each = bank["expert_bytes"] or bank["expert_values"] * itemsize
            held += each * sum(expert != FREE_SLOT for expert in slots)
    return held + (0 if role == "expert" else facts.attention_weights * itemsize)


def text(document: Mapping[str, Any], address: str) -> str:
    """Format the document of ``--dry-run`` as text; ``address`` is the Ray cluster to join."""
    addresses = [f"http     {document['http']}", f"grpc     {document['grpc']}"]
    models = document.get("models", [document])
    return "\n\n".join(["\n".join(addresses), *(_model_text(one, address) for one in models)])


def _model_text(document: Mapping[str, Any], address: str) -> str:
    reason = document["mode_reason"]
    shares = f"determined by the nodes of {address} after joining"
    if document["device"] is not None:
        shares = (
            f"{document['cpus_per_worker']:g} CPUs, {document['gpus_per_worker']:g} GPUs, "
            f"{document['threads_per_worker']} compute threads per worker, on {document['device']}"
        )
    tokens = document["kv_cache_tokens"] or "as many as fit on the GPU,"
    each = document["kv_bytes_per_token"]
    kind = "" if document["kv_cache_dtype"] == "auto" else f" ({document['kv_cache_dtype']})"
    lines = [
        f"mode     {document['mode']}{f': {reason}' if reason else ''}",
        f"model    {document['model']['name']} ({document['model']['path']})",
        f"shares   {shares}",
        f"kv       {tokens} tokens of {each} bytes{kind} in each attention worker",
    ]
    if document["num_states"]:
        each_state = f"{document['state_bytes'] / 1e6:.3g} MB"
        lines.append(f"states   {document['num_states']} of {each_state} in each attention worker")
    if document["kv_host_bytes"]:
        lines.append(f"tiers    {_tiers(document)} in each attention worker")
    rows = [
        (w["name"], w["role"], _gigabytes(w["weight_bytes"]), _slots_text(w["slots"]))
        for w in document["workers"]
    ]
    if rows:
        lines.append(table(("WORKER", "ROLE", "WEIGHTS", "HOLDS"), rows))
    return "\n".join(lines)


def _tiers(document: Mapping[str, Any]) -> str:
    host, disk = (_gigabytes(document[f"kv_{tier}_bytes"]) for tier in ("host", "disk"))
    on_disk = f" and {disk} on disk ({document['kv_disk_dir']})" if document["kv_disk_dir"] else ""
    return f"copies of KV: {host} of host memory{on_disk}"


def _gigabytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e9:.3g} GB"


def _slots_text(slots: int | None) -> str:
    return "" if slots is None else f"{slots} expert slots a bank"
